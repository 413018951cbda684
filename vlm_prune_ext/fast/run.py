"""Pruned prefill and greedy decoding as a few recorded pieces with fixed shapes.

The layers between two drops are one recording, a decode step is another. What lies between the
pieces (a rule, and the gather it leads to) runs as ever, while the device is still busy with the
piece before. So every rule that keeps a fixed number of tokens works here as it is.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.evidence import AttentionReader, Looker, Seen, attention_needs, reads
from vlm_prune_ext.engine.layout import Layout, Prefill, iota, sent, take
from vlm_prune_ext.engine.state import Call
from vlm_prune_ext.fast.pieces import PROMPT_STEP, VARYING_STEP, Pieces
from vlm_prune_ext.fast.segments import Bundle, Part, Segment, Step, turns
from vlm_prune_ext.methods.evidence import FeatureStage, Stage

ROOM = 128  # for decoded tokens at first: limits are high, answers short


@dataclass
class Prompt:
    """What the decoder would have been called with.

    Attributes:
        embeds: ``(batch, n, hidden)``.
        real: bool ``(batch, n)``, False at padding; ``None`` if there is none.
        positions: int64 ``(batch, n)``, rotary positions; where these have several axes,
            ``(axes, batch, n)``.
        stacked: ``(levels, batch, n, hidden)``, what the decoder adds behind its first layers
            (DeepStack); ``None``: nothing.
    """

    embeds: torch.Tensor
    real: torch.Tensor | None
    positions: torch.Tensor
    stacked: torch.Tensor | None = None


@dataclass
class Aligned:
    """The prompt with its padding moved behind it.

    ``order``: int64 ``(batch, n)``, place in the prompt of each token there; ``counts``: int64
    ``(batch,)``, real tokens of each sample; ``padded``: are there any others?
    """

    order: torch.Tensor
    counts: torch.Tensor
    padded: bool

    @staticmethod
    def of(prompt: Prompt) -> Aligned:
        """Real tokens first, in order."""
        batch, count = prompt.embeds.shape[:2]
        if prompt.real is None:
            order = iota(count, prompt.embeds.device).expand(batch, count)
            return Aligned(order, torch.full_like(order[:, 0], count), padded=False)
        order = (~prompt.real).int().argsort(dim=1, stable=True)
        return Aligned(order, prompt.real.sum(dim=1), padded=True)

    def __call__(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """A tensor of the prompt in this order, tokens along the negative ``dim``."""
        return take(tensor, self.order, dim) if self.padded else tensor

    def prefill(self, origin: Prefill | None) -> Prefill:
        """The engine's state of the prompt, in this order; ``origin``: in its own."""
        batch, count = self.order.shape
        layout = Layout.whole(batch, count, self.order.device)
        groups = origin.groups if origin is not None else []
        tails = origin.tail_starts if origin is not None else [count] * batch
        state = Prefill(
            layout, groups, [count] * batch, tails, segments={0: layout}, created=[0] * batch
        )
        if self.padded:
            state.moved = place = self.order.argsort(dim=1)
            state.real = layout.slots < self.counts[:, None]
            state.groups = [
                replace(
                    group,
                    tokens=place[group.samples[:, None], group.tokens],
                    last=place[group.samples[:, None], group.last],
                )
                for group in groups
            ]
        return state

    def back(self, layout: Layout, before: Layout) -> Layout:
        """A layout of this order as one of the prompt's own.

        Args:
            layout: of a segment.
            before: of the prompt as it entered layer 0.
        """
        if not self.padded and layout.valid is None and before.valid is None:
            return layout
        slots = self.order.gather(1, layout.slots)
        inside = layout.names < layout.total
        places = self.order.gather(1, layout.names.clamp(max=layout.total - 1))
        valid = torch.ones_like(inside) if layout.valid is None else layout.valid
        if before.valid is not None:  # empty from the start: no padding, though handled as such
            valid = valid & before.valid.gather(1, slots)
        # Rows that were added come behind their image's last token, whose slot they share.
        index = slots.masked_fill(~valid, -1).argsort(dim=1, stable=True)
        names, positions = places.where(inside, layout.names), layout.positions
        if positions is not None and self.padded:  # counted from the first token that is real
            positions = positions.masked_fill(layout.slots >= self.counts[:, None], 0)
        moved = replace(layout, slots=slots, names=names, valid=valid, positions=positions)
        return moved.at(index)


@dataclass
class _Note:
    """What a stage left, to be written into the trace once the device has work to do."""

    layer: int
    layout: Layout
    held: list[int]
    visual: list[int]
    merged: int


@dataclass
class Behind:
    """What a stage may see of the layer in front of it.

    Attributes:
        layer: which one.
        attended: ``(batch, n, hidden)``, what its attention received.
        keys: ``(batch, kv_heads, n, head_dim)``.
        rotary: cosines and sines, ``(batch, n, head_dim)``.
    """

    layer: int
    attended: torch.Tensor
    keys: torch.Tensor
    rotary: tuple[torch.Tensor, ...]

    @staticmethod
    def of(segment: Segment, count: int) -> Behind:
        """A segment's last layer, with so many tokens; overwritten by the next segment."""
        layer, memory = segment.cache.stop - 1, segment.memory
        return Behind(
            layer,
            memory.attended[:, :count],
            segment.cache.keys[layer][:, :, :count],
            (memory.cosines[:, :count], memory.sines[:, :count]),
        )


class Run:
    """One prompt, and what is decoded after it.

    Attributes:
        logits: ``(batch, vocabulary)`` of the next token; overwritten by :meth:`step`.
    """

    def __init__(
        self, pieces: Pieces, aligned: Aligned, state: Prefill, max_new_tokens: int
    ) -> None:
        self.pieces, self.aligned, self.state = pieces, aligned, state
        self.limit = max_new_tokens
        self.done = 0  # tokens that were decoded
        self.held: list[Part] = []  # by segment
        self.behind: Behind | None = None  # the last layer that ran
        self.notes: list[_Note] = []
        self.bundle: Bundle | None = None
        self.varying = False  # what enters depends on the picture
        self.logits: torch.Tensor
        self._step: Step | None = None

    def prefill(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        stages: dict[int, Stage],
        layers: range | None = None,
        room: int = 0,
        stacked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All segments, and the drops between them.

        Args:
            hidden: ``(batch, n, hidden)``, what enters the first of these layers.
            positions: int64 ``([axes,] batch or 1, n)``, rotary positions.
            stages: by layer.
            layers: to run; ``None``: all.
            room: places that the caches have besides those for decoded tokens.
            stacked: see :class:`Prompt`; in this order.

        Returns:
            what the last segment gave, see :meth:`Segment.run`.
        """
        layers = range(len(self.pieces.parts.layers)) if layers is None else layers
        counts = self.aligned.counts[:, None]
        whole = positions.expand(*positions.shape[:-2], len(counts), -1)
        behind = take(whole, counts - 1, -1) + 1
        behind = behind if behind.dim() == 2 else behind.amax(dim=0)
        room = room or min(self.limit, ROOM)
        step = VARYING_STEP if self.varying else PROMPT_STEP
        starts = sorted({layers.start, *(layer for layer in stages if layer in layers)})
        for first, stop in zip(starts, [*starts[1:], layers.stop], strict=True):
            if first in stages:
                hidden = self.choose(stages[first], hidden, positions)
                positions = self._positions(whole)
                step = VARYING_STEP if _varies(stages[first]) else step
            segment = self.pieces.segment(first, stop, hidden, room, step)
            real = self._real_tokens()
            segment.fill(hidden, positions, real - 1, self._stacked(stacked, first))
            seen = iota(segment.tokens, hidden.device) < real[:, None, None]
            after = behind if self.state.layout.positions is None else real[:, None]
            self.held.append(Part(segment.cache, seen, after))
            output = segment.run()
            self.behind = Behind.of(segment, hidden.shape[1])
            hidden = output if segment.is_last else output[:, : hidden.shape[1]]
        self.logits = hidden
        return hidden

    def _lost(self, held: list[int]) -> list[int]:
        """How many tokens each sample has lost where it holds so many."""
        return [self.aligned.order.shape[1] - count for count in held]

    def _real_tokens(self) -> torch.Tensor:
        """int64 ``(batch,)``: what each sample holds now, padding not counted."""
        counts, lost = self.aligned.counts, self._lost(self.state.held)
        if len(set(lost)) == 1:
            return counts - lost[0]  # nothing to send, nothing to wait for
        return counts - sent(lost, counts.device)

    def _positions(self, whole: torch.Tensor) -> torch.Tensor:
        """Rotary positions of what is held now; ``whole``: those of the prompt."""
        layout = self.state.layout
        return take(whole, layout.slots, -1) if layout.positions is None else layout.positions

    def _stacked(self, whole: torch.Tensor | None, layer: int) -> torch.Tensor | None:
        """What is added at what is held now; nothing at rows that a rule added."""
        layout = self.state.layout
        if whole is None or layer >= len(whole) or layout.is_whole:
            return whole
        held = take(whole, layout.slots, -2)
        if layout.added:
            held = held.masked_fill((layout.names >= layout.total)[..., None], 0)
        return held

    def choose(self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Let a stage choose; what stays goes on, in order, at the left."""
        state = self.state
        look = self._looker(stage, hidden, positions)
        if stage.mode == "observe":
            state.observe(stage, look)
            return hidden
        gone, added = state.select(stage, look)
        if gone is not None or added is not None:
            index = state.drop(stage.layer, gone, added, recount=stage.recount)
            if added is not None:
                hidden = torch.cat([hidden, added.hidden.to(hidden.dtype)], dim=1)
            hidden = take(hidden, self._move_left(stage.layer, index), -2)
        self.notes.append(
            _Note(
                stage.layer,
                state.layout,
                list(state.held),
                state.visual_counts(),
                0 if added is None else added.names.shape[1],
            )
        )
        return hidden

    def _move_left(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        """The engine fills samples that hold less up in front; here empty slots come last. Returns
        the places to gather, in that order."""
        layout = self.state.layout
        if layout.valid is None:
            return index
        left = (~layout.valid).int().argsort(dim=1, stable=True)
        self.state.layout = self.state.segments[layer] = layout.at(left)
        return index.gather(1, left)

    def _looker(self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor) -> Looker:
        parts, state = self.pieces.parts, self.state
        seen = [self._before(stage)] if reads(stage.needs) else []
        if attention_needs(stage.needs, "coming"):
            seen.append(self._coming(stage, hidden, positions))
        joined = [dict(ChainMap(*each)) for each in zip(*seen, strict=True)] if seen else None
        return Looker(stage.needs, parts, state, hidden, joined)

    def _before(self, stage: Stage) -> Seen:
        """What a stage wants to see of the layer in front of it."""
        behind = self.behind
        assert behind is not None
        reader = self._reader(behind.layer, behind.attended, behind.keys, behind.rotary)
        return reader.read(stage.needs, "before")

    def _coming(self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor) -> Seen:
        """What a stage wants to see of the layer behind it, if nothing were dropped."""
        parts, decoder = self.pieces.parts, self.pieces.parts.decoder
        rotary = turns(decoder, hidden, positions)
        normed = parts.input_norm(parts.layers[stage.layer]).forward(hidden)
        return self._reader(stage.layer, normed, None, rotary).read(stage.needs, "coming")

    def _reader(
        self, layer: int, hidden: torch.Tensor, keys: torch.Tensor | None, rotary: Any
    ) -> AttentionReader:
        parts = self.pieces.parts
        attn: Any = parts.layers[layer].self_attn
        return AttentionReader(
            parts,
            attn,
            hidden,
            self.state,
            self.state.layout,
            held=keys,
            mask=None,
            rotary=rotary,
            prompt=True,
        )

    def write_trace(self, pruner: DecoderPruner, call: Call) -> None:
        """What was kept, as the hooks say it: places in the padded prompt."""
        origin = call.state.prefill
        for note in self.notes:
            layout = self.aligned.back(note.layout, origin.layout)
            lost = self._lost(note.held)
            held = [before - n for before, n in zip(origin.held, lost, strict=True)]
            if max(held) < layout.count:
                last = iota(layout.count, layout.slots.device)[layout.count - max(held) :]
                layout = layout.at(last.expand(len(held), -1))
            if min(held) == max(held):
                layout = replace(layout, valid=None)
            pruner.note(note.layer, call, layout, note.visual, note.merged)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode one token further.

        Args:
            tokens: int64 ``(batch,)``, the newest.

        Returns:
            logits ``(batch, vocabulary)`` of the next; overwritten by the next call.
        """
        if self._step is None or self.done == self._room():
            self._make_room()
        assert self._step is not None
        self._step.token.copy_(tokens[:, None])
        self.logits = self._step.run()
        self.done += 1
        return self.logits

    def _room(self) -> int:
        """Decoded tokens that fit the caches."""
        return min(part.room for part in self.held)

    def _make_room(self) -> None:
        """Decode from now on in the prompt's own caches, or in wider ones."""
        if self.done == self._room():  # as much again, but never past the limit
            more = max(1, min(self.done, self.limit - self.done))
            self.held = [
                replace(part, cache=self.pieces.wider(part.cache, more * part.together))
                for part in self.held
            ]
        after = [part.next for part in self.held]
        counted = any(position is not after[0] for position in after)
        self._step = self.pieces.step(self.held, len(after[0]), counted=counted)
        positions = torch.stack(after if counted else after[:1])
        self._step.start(self.held, positions + self.done, self.done, self.bundle)


def _varies(stage: Stage | FeatureStage) -> bool:
    """Does the number of tokens that a stage leaves depend on the picture?"""
    return stage.budget is None and stage.left is None


def start(
    pieces: Pieces,
    prompt: Prompt,
    max_new_tokens: int,
    pruner: DecoderPruner | None = None,
    call: Call | None = None,
) -> Run:
    """Prefill.

    Args:
        pieces: of the decoder.
        prompt: as it would enter layer 0.
        max_new_tokens: how many tokens will be decoded at most.
        pruner, call: the method that is attached, and what it made of the prompt so far.
    """
    aligned = Aligned.of(prompt)
    stages: dict[int, Stage] = {}
    state = aligned.prefill(None if call is None else call.state.prefill)
    if pruner is not None and call is not None:
        done = {0} if pruner.first_stage is not None else set()
        stages = {layer: stage for layer, stage in pruner.stages.items() if layer not in done}
    run = Run(pieces, aligned, state, max_new_tokens)
    between = None if pruner is None else pruner.method.feature_stage()
    run.varying = between is not None and _varies(between)
    stacked = None if prompt.stacked is None else aligned(prompt.stacked, -2)
    positions = aligned(prompt.positions, -1)
    run.prefill(aligned(prompt.embeds, -2), positions, stages, stacked=stacked)
    if pruner is not None and call is not None:
        run.write_trace(pruner, call)
    return run
