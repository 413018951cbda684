"""Prompts that begin alike, their pictures included: what they share is computed once.

Causal attention keeps what follows from what stands in front, so a picture's tokens are the same in
all prompts up to the first choice that depends on the question
(:meth:`~vlm_prune_ext.methods.base.Method.first_by_question`). Up to there pictures are the rows of
the batch, first alone (run.py), then with all their questions behind them; from there
on each question is a row of its own, with what is left of its picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.layout import Layout, Prefill, iota, sent
from vlm_prune_ext.engine.prompt import Image, runs_of
from vlm_prune_ext.engine.state import Call, State
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.fast.graphs import Mark
from vlm_prune_ext.fast.pieces import QUESTION_STEP, Pieces, round_up
from vlm_prune_ext.fast.run import ROOM, Aligned, Behind, Prompt, Run
from vlm_prune_ext.fast.segments import Bundle, own_places, turns
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.evidence import Stage

BYTES = 1 << 30
"""Of prefixes that are kept, per model."""


@dataclass(frozen=True)
class Asked:
    """Questions, those with one prefix side by side.

    Attributes:
        owner: by question, its prefix: 0, 0, ..., 1, 1, ...
        questions: token ids of each, all that stands behind its prefix.
        lengths: tokens of each prefix, up to and with the last one of its last picture.
        keys: by prefix; equal ones are equal prefixes of equal pictures, made in equal ways.
        make: prefixes -> the model's inputs for them, each with one token more (any text), and the
            tiles of each.
        found: is filled with the prefixes.
        known: is filled with those of them that were there already.
    """

    owner: list[int]
    questions: list[list[int]]
    lengths: list[int]
    keys: list[Hashable]
    make: Callable[[list[int]], tuple[Mapping[str, Any], list[float]]]
    found: list[Prefix] = field(default_factory=list)
    known: list[Prefix] = field(default_factory=list)


@dataclass
class Prefix:
    """A prompt's beginning, as it enters layer 0.

    Attributes:
        embeds: ``(n, hidden)``; positions: int64 ``(n [, axes])``, rotary; after: int64 ``(1,)``,
            of what follows.
        images: places of each image's tokens.
        length: tokens before anything was dropped; visual: those of images; tiles: that went
            through the tower.
        places: int64 ``(n,)``, where they stood among these; ``None``: nobody asks.
        tower: what the trace says of the tower: by layer, rows of its images.
        stacked: ``(n, levels, hidden)``, see :class:`~vlm_prune_ext.fast.run.Prompt`.
        added, attention: see :class:`~vlm_prune_ext.engine.trace.Trace`.
        took: when it was begun and made, and how many were made together.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    after: torch.Tensor
    images: list[list[int]]
    length: int
    visual: int
    tiles: float
    places: torch.Tensor | None = None
    tower: dict[int, torch.Tensor] = field(default_factory=dict)
    stacked: torch.Tensor | None = None
    added: int | None = None
    attention: Any = None
    took: tuple[Mark, Mark, int] | None = None

    @property
    def count(self) -> int:
        """Tokens, ``n``."""
        return self.embeds.shape[0]

    @property
    def seconds(self) -> float:
        """That it took to make, its share of those that were made together."""
        if self.took is None:
            return 0.0
        begun, made, together = self.took
        return made.since(begun) / together

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        stacked = 0 if self.stacked is None else self.stacked.nbytes
        return self.embeds.nbytes + self.positions.nbytes + stacked


class Prefixes:
    """Prefixes by key, the newest, of at most :data:`BYTES`."""

    def __init__(self) -> None:
        self._items: OrderedDict[Hashable, Prefix] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def get(self, key: Hashable) -> Prefix | None:
        """What is kept under a key."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Keep one; those that were not used for longest go."""
        if prefix.bytes > BYTES:
            return
        self.drop(key)
        while self.bytes + prefix.bytes > BYTES:
            self.drop(next(iter(self._items)))
        self._items[key] = prefix
        self.bytes += prefix.bytes

    def drop(self, key: Hashable) -> None:
        """Let go of one."""
        gone = self._items.pop(key, None)
        self.bytes -= 0 if gone is None else gone.bytes

    def clear(self) -> None:
        """Let go of all."""
        self._items.clear()
        self.bytes = 0


def version_of(tensor: torch.Tensor) -> int:
    """How often it was written to; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def in_front(method: Method | None, layers: int) -> Method | None:
    """What of a method a prefix depends on: all of it where it works in front of layer 0."""
    if method is None:
        return None
    works = {"tower", "features"} & set(method.working_sites)
    first = any(
        stage.layer == 0 and stage.mode == "drop" for stage in method.decoder_stages(layers)
    )
    return method if works or first else None


def why_not_shared(method: Method | None, layers: int) -> str | None:
    """Why questions about one picture cannot share anything; ``None`` if they can."""
    if method is None:
        return None
    if method.first_by_question(layers) == -1:
        return f"{method.name} chooses by the question in front of the language model"
    stages = method.decoder_stages(layers)
    if any(stage.mode == "mask" for stage in stages):
        return f"{method.name} with mode='mask' chooses anew for every token"
    if any(stage.layer == layers for stage in stages):
        return f"{method.name} drops behind the last layer"
    if any(method.decode_position_shift(layer) for layer in range(layers)):
        return f"{method.name} with reference_positions=True shifts decode positions"
    return None


# -- prefixes -------------------------------------------------------------------------------------
def take_prefixes(
    prompt: Prompt,
    call: Call | None,
    lengths: Sequence[int],
    tiles: Sequence[float],
    trace: Trace | None,
) -> list[Prefix]:
    """Prefixes out of prompts that end with one token more.

    Args:
        prompt: what the decoder would get, filled up in front.
        call: what the attached method made of it.
        lengths: tokens of each prefix before anything was dropped.
        tiles: of each.
        trace: what the method noted.
    """
    width, longest = prompt.embeds.shape[1], max(lengths)
    short = None if call is None else call.state.short
    images: list[list[list[int]]] = [[] for _ in lengths]
    counts = list(lengths)
    if call is not None:
        for image in call.state.prefill.images:
            images[image.sample].append(image.slots)
    if short is not None:
        counts = [held - longest + n - 1 for held, n in zip(short.held, lengths, strict=True)]
    positions = prompt.positions
    positions = positions.expand(*positions.shape[:-2], len(lengths), -1)
    found = []
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        here = slice(width - 1 - count, width - 1)
        prefix = Prefix(
            prompt.embeds[row, here].clone(),
            positions[..., row, here].movedim(-1, 0).clone(),
            positions[..., row, -1:].flatten()[-1:].clone(),
            [[slot - here.start for slot in slots] for slots in images[row]],
            length,
            0 if trace is None or call is None else trace.visual_input[row],
            tiles[row],
        )
        if prompt.stacked is not None:
            prefix.stacked = prompt.stacked[:, row, here].movedim(0, 1).clone()
        if short is not None and short.origin is not None:
            prefix.places = short.origin[row, here] - (longest - length)
        found.append(prefix)
    if trace is not None:
        _note_tower(found, tiles, trace)
    return found


def _note_tower(found: list[Prefix], tiles: Sequence[float], trace: Trace) -> None:
    for prefix in found:
        prefix.added, prefix.attention = trace.merged.get(-1), trace.vision_attention
    for layer, kept in trace.vision_kept.items():
        each = [len(prefix.images) for prefix in found]
        sizes = next((s for s in ([int(n) for n in tiles], each) if sum(s) == len(kept)), None)
        if sizes is not None:
            for prefix, rows in zip(found, kept.split(sizes), strict=True):
                prefix.tower[layer] = rows.clone()


# -- the run --------------------------------------------------------------------------------------
class Table:
    """Where the tokens of questions stand.

    Args:
        prefixes: of the batch.
        asked: questions.
        device: of the model.

    Attributes:
        together: questions behind a prefix, at most; length: places of each.
        owner, turn, sizes, fronts: int64 ``(rows, 1)``: each question's prefix, its number there,
            its tokens, and those of its prefix.
        width: tokens of the longest prompt.
    """

    def __init__(self, prefixes: list[Prefix], asked: Asked, device: torch.device) -> None:
        self.asked, self.device = asked, device
        self.turns: list[int] = []
        for row, owner in enumerate(asked.owner):
            again = row and asked.owner[row - 1] == owner
            self.turns.append(self.turns[-1] + 1 if again else 0)
        self.together = max(self.turns) + 1
        lengths = [len(ids) for ids in asked.questions]
        self.length = round_up(max(lengths), QUESTION_STEP)
        self.count, self.rows = len(prefixes), len(lengths)
        fronts = [prefixes[owner].count for owner in asked.owner]
        self.totals = [a + b for a, b in zip(fronts, lengths, strict=True)]
        self.width = max(self.totals)
        numbers = sent([asked.owner, self.turns, lengths, fronts, self.totals], device)
        self.owner, self.turn, self.sizes, self.fronts, self.counts = numbers[..., None]
        self.alike = len(set(self.totals)) == 1

    def ids(self) -> torch.Tensor:
        """Token ids of the questions, int64 ``(prefixes, together * length)``."""
        table = [[0] * (self.together * self.length) for _ in range(self.count)]
        for owner, turn, ids in zip(
            self.asked.owner, self.turns, self.asked.questions, strict=True
        ):
            first = turn * self.length
            table[owner][first : first + len(ids)] = ids
        return sent(table, self.device)

    def columns(self, start: int) -> torch.Tensor:
        """Where each row's tokens are in its prefix's row of the batch, int64 ``(rows, width)``,
        where questions go from ``start`` on; 0 at fillers behind."""
        place = iota(self.width, self.device)
        question = start + self.turn * self.length + place - self.fronts
        return question.where(place >= self.fronts, place) * (place < self.counts)

    def of(self, joined: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of their own: ``(prefixes, n, ...)`` -> ``(rows, width, ...)``."""
        return joined[self.owner, self.columns(start)]

    def last(self) -> torch.Tensor:
        """int64 ``(rows,)``, each question's last token, counted over the batch."""
        first = (self.owner * self.together + self.turn) * self.length
        return (first + self.sizes - 1).flatten()

    def bundle(self) -> Bundle:
        """How rows share the places of the batch."""
        unpack = self.owner * self.together + self.turn
        pack = torch.zeros(self.count * self.together, dtype=torch.int64, device=self.device)
        pack[unpack.flatten()] = iota(self.rows, self.device)
        return Bundle(pack, unpack.flatten())

    def each(self) -> torch.Tensor:
        """Tokens of each question, int64 ``(prefixes, together)``, 1 where there is none."""
        table = torch.ones(self.count * self.together, dtype=torch.int64, device=self.device)
        table[(self.owner * self.together + self.turn).flatten()] = self.sizes.flatten()
        return table.view(self.count, self.together)


def start_shared(
    pieces: Pieces,
    prefixes: list[Prefix],
    asked: Asked,
    max_new_tokens: int,
    pruner: DecoderPruner | None = None,
) -> Run:
    """Prefill.

    Args:
        pieces: of the decoder.
        prefixes: what the questions share.
        asked: the questions.
        max_new_tokens: how many tokens will be decoded at most.
        pruner: the method that is attached.
    """
    device = prefixes[0].embeds.device
    table = Table(prefixes, asked, device)
    layers, stages = len(pieces.parts.layers), dict[int, Stage]()
    first: int | None = None
    if pruner is not None:
        done = {0} if pruner.first_stage is not None else set()
        stages = {layer: stage for layer, stage in pruner.stages.items() if layer not in done}
        first = pruner.method.first_by_question(layers)
    joint = _Joint(
        pieces,
        prefixes,
        table,
        max_new_tokens,
        layers if first is None else first,
        stages if first is None else {},
    )
    if first is None:
        run = joint.front
        run.logits = joint.output
        run.held, run.bundle = joint.held(), table.bundle()
    else:
        run = joint.apart(stages)
    if pruner is not None:
        _write_trace(pruner, prefixes, table, run, apart=first is not None)
    return run


class _Joint:
    """Layers in which pictures are the rows of the batch: ``shared`` of them, from layer 0 on."""

    def __init__(
        self,
        pieces: Pieces,
        prefixes: list[Prefix],
        table: Table,
        limit: int,
        shared: int,
        stages: dict[int, Stage],
    ) -> None:
        self.pieces, self.prefixes, self.table, self.limit = pieces, prefixes, table, limit
        self.shared = shared
        self.embeds = pad_sequence([p.embeds for p in prefixes], batch_first=True)
        positions = pad_sequence([p.positions for p in prefixes], batch_first=True)
        self.after = torch.stack([p.after for p in prefixes])
        steps = iota(table.length, table.device).repeat(table.together)
        self.ids, asks = table.ids(), self.after + steps
        wide = asks if positions.dim() == 2 else asks[..., None].expand(-1, -1, positions.shape[2])
        self.positions = torch.cat([positions, wide], dim=1)
        positions = _axes_first(positions)
        counts = [prefix.count for prefix in prefixes]
        images = _images(prefixes, range(len(prefixes)), [0] * len(prefixes))
        aligned, state = _state(counts, [0] * len(counts), images, table.device)
        self.front = Run(pieces, aligned, state, limit)
        room = (table.length + min(limit, ROOM)) * table.together + QUESTION_STEP
        layers = range(shared)
        self.stacked = _stacked(prefixes, self.embeds, pieces.parts.stacked)
        added = None if self.stacked is None else self.stacked.movedim(2, 0)
        hidden = self.front.prefill(self.embeds, positions, stages, layers, room, added)
        behind = self.front.behind
        assert behind is not None
        if shared < len(pieces.parts.layers):  # the next piece works in the same memory
            hidden = hidden.clone()
            behind = replace(behind, attended=behind.attended.clone())
        self.follow = pieces.follow(self.front.held, table.together, table.length, table.rows)
        self.follow.fill(self.ids, asks, self.front.held, table.last())
        self.output = self.follow.run()
        self.hidden, self.behind = hidden, behind

    def held(self) -> list[Any]:
        """What decoding needs to know of these layers."""
        table = self.table
        turns = own_places(table.each(), table.length)
        after = self.after[table.owner.flatten()] + table.sizes
        return self.follow.held_by(self.front.held, turns, after)

    def apart(self, stages: dict[int, Stage]) -> Run:
        """The other layers, in which each question is a row of its own."""
        table, pieces = self.table, self.pieces
        images = _images(self.prefixes, table.asked.owner, [0] * table.rows)
        pads = [table.width - total for total in table.totals]
        aligned, state = _state(table.totals, pads, images, table.device)
        run = Run(pieces, aligned, state, self.limit)
        count = self.embeds.shape[1]
        positions = _axes_first(table.of(self.positions, count))
        observe = stages.get(0)
        if observe is not None:
            decoder: Any = pieces.parts.decoder
            embed = decoder.get_input_embeddings()
            entering = torch.cat([self.embeds, embed(self.ids)], dim=1)
            run.choose(observe, table.of(entering, count), positions)
        hidden = table.of(torch.cat([self.hidden, self.output], dim=1), count)
        run.behind = self._behind(hidden, positions, count)
        added = None
        if self.stacked is not None and self.shared < pieces.parts.stacked:
            nothing = self.stacked.new_zeros(*self.ids.shape, *self.stacked.shape[2:])
            joined = torch.cat([self.stacked, nothing], dim=1)
            added = table.of(joined, count).movedim(2, 0)
        layers = range(self.shared, len(pieces.parts.layers))
        run.prefill(hidden, positions, stages, layers, stacked=added)
        run.held, run.bundle = [*self.held(), *run.held], table.bundle()
        return run

    def _behind(self, hidden: torch.Tensor, positions: torch.Tensor, count: int) -> Behind:
        """What the last of these layers shows, row by row."""
        follow, layer = self.follow, self.behind.layer
        attended = torch.cat([self.behind.attended, follow.memory.attended], dim=1)
        keys = follow.caches[-1].keys[layer].transpose(1, 2)
        return Behind(
            layer,
            self.table.of(attended, count),
            self.table.of(keys, follow.starts[-1]).transpose(1, 2),
            turns(self.pieces.parts.decoder, hidden, positions),
        )


def _stacked(prefixes: list[Prefix], like: torch.Tensor, levels: int) -> torch.Tensor | None:
    """What is added at the prefixes' tokens, ``(prefixes, n, levels, hidden)``."""
    if not levels:
        return None
    shape = (levels, like.shape[-1])
    each = [
        like.new_zeros(one.count, *shape) if one.stacked is None else one.stacked
        for one in prefixes
    ]
    return pad_sequence(each, batch_first=True)


def _axes_first(positions: torch.Tensor) -> torch.Tensor:
    return positions if positions.dim() == 2 else positions.movedim(-1, 0)


def _images(prefixes: list[Prefix], owner: Iterable[int], pads: list[int]) -> list[Image]:
    """The images of rows: ``owner``, each row's prefix, has ``pads`` fillers in front there."""
    spans = [[runs_of(slots) for slots in prefix.images] for prefix in prefixes]
    return [
        Image.of(row, [(start + pads[row], length) for start, length in runs])
        for row, index in enumerate(owner)
        for runs in spans[index]
    ]


def _state(
    counts: list[int], pads: list[int], images: list[Image], device: torch.device
) -> tuple[Aligned, Prefill]:
    """Prompts of so many tokens each, at the left; ``pads``: what stood in front of them."""
    width = max(counts)
    state = Prefill.start(images, len(counts), width, None, device)
    padded = min(counts) < width
    real = sent(counts, device)
    order = iota(width, device).expand(len(counts), width)
    if padded:
        state.real = order < real[:, None]
        order = (order + sent(pads, device)[:, None]) % width
    return Aligned(order, real, padded), state


# -- the record -----------------------------------------------------------------------------------
def _write_trace(
    pruner: DecoderPruner, prefixes: list[Prefix], table: Table, run: Run, *, apart: bool
) -> None:
    """What was kept, as if each question had been asked with its whole prompt, filled up in front
    to equal lengths."""
    trace, owner, device = pruner.trace, table.asked.owner, table.device
    mine = [prefixes[index] for index in owner]
    lost = [prefix.length - prefix.count for prefix in mine]
    whole = max(total + n for total, n in zip(table.totals, lost, strict=True))
    trace.clear_decoder()
    trace.lengths[:] = [whole - min(lost)] * pruner.num_layers
    trace.visual_input[:] = [prefix.visual for prefix in mine]
    trace.visual_tokens[0] = [sum(map(len, prefix.images)) for prefix in mine]
    trace.vision_kept.clear()
    for layer in mine[0].tower:
        rows = [prefix.tower[layer] for prefix in mine if layer in prefix.tower]
        trace.vision_kept[layer] = pad_sequence(
            [row for part in rows for row in part], batch_first=True, padding_value=-1
        )
    if mine[0].added is not None:
        trace.merged[-1] = max(prefix.added or 0 for prefix in mine)
    trace.vision_attention = mine[0].attention
    pads = [table.width - total for total in table.totals]
    images = _images(prefixes, owner, pads)
    origin = Prefill.start(images, table.rows, table.width, None, device)
    call = Call(State(origin, None), prefill=True)
    if apart:
        run.write_trace(pruner, call)
        return
    if mine[0].places is not None and pruner.first_stage is not None:
        stays = [_marks(prefix.places, prefix.length) for prefix in prefixes]
        counts = [
            prefix.length + len(ids)
            for prefix, ids in zip(mine, table.asked.questions, strict=True)
        ]
        layout = _layout(stays, owner, counts, lost, device)
        trace.kept[0] = layout.kept()
        trace.lengths[:] = [layout.count] * pruner.num_layers
    for note in run.notes:
        gone = [run.aligned.order.shape[1] - held for held in note.held]
        names = note.layout.kept()
        stays = [_marks(names[row], prefix.count) for row, prefix in enumerate(prefixes)]
        layout = _layout(stays, owner, table.totals, [gone[index] for index in owner], device)
        visual = [note.visual[index] for index in owner]
        pruner.note(note.layer, call, layout, visual, note.merged)


def _marks(names: torch.Tensor | None, length: int) -> torch.Tensor:
    """Bool ``(length,)``: which places are among ``names``, negative or beyond ones apart."""
    assert names is not None
    marks = torch.zeros(length + 1, dtype=torch.bool, device=names.device)
    marks[names.where((names >= 0) & (names < length), length)] = True
    return marks[:length]


def _layout(
    stays: list[torch.Tensor],
    owner: list[int],
    totals: list[int],
    lost: list[int],
    device: torch.device,
) -> Layout:
    """What is left of prompts that were filled up in front: ``stays`` by prefix, and all else."""
    width = max(totals)
    keep = torch.ones(len(owner), width, dtype=torch.bool, device=device)
    for row, (index, total) in enumerate(zip(owner, totals, strict=True)):
        first = width - total
        keep[row, first : first + len(stays[index])] = stays[index]
    held = [width - n for n in lost]
    return Layout.whole(len(owner), width, device).drop(keep, held)[0]
