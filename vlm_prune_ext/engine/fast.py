"""Pruned prefill and greedy decoding as a few recorded pieces with fixed shapes.

The layers between two drops are one recording, a decode step is another. What lies between the
pieces (a rule, and the gather it leads to) runs as ever, while the device is still busy with the
piece before. So every rule that keeps a fixed number of tokens works here as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vlm_prune_ext.engine import masks
from vlm_prune_ext.engine.arena import Arena
from vlm_prune_ext.engine.decoder import Call, DecoderPruner
from vlm_prune_ext.engine.evidence import AttentionReader, Looker, read
from vlm_prune_ext.engine.fused import FusedLayers
from vlm_prune_ext.engine.layout import Layout, iota, sent, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prefill import Group, Prefill
from vlm_prune_ext.engine.recorded import Recorder, Shelf
from vlm_prune_ext.engine.static import Activations, Head, Segment, SegmentCache, Step, widen
from vlm_prune_ext.methods.base import Method, Stage

# Decoders whose forward does nothing around its layers but embedding, rotary positions and the last
# norm: what else one did (Granite scales its embeddings) would be passed over.
KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
PROMPT_STEP = 4  # what a piece holds is filled up to a multiple; fillers stay to the last layer
CACHE_STEP = 128  # likewise caches, so that many lengths share one decode step
ROOM = 128  # for decoded tokens at first: limits are high, answers short
CACHES, SEGMENTS, STEPS = 48, 128, 24  # kept at a time


def why_not(parts: ModelParts, method: Method | None) -> str | None:
    """Why a model with a method cannot run on fixed shapes; ``None`` if it can."""
    decoder: Any = parts.decoder
    if decoder is None:
        return "the model has no language model whose layers are known"
    name = type(decoder).__name__
    if name not in KNOWN or not type(decoder).__module__.startswith("transformers.models."):
        return f"{name} is not one of {', '.join(KNOWN)}"
    config = getattr(decoder, "config", None)
    if not parts.plain_rotary or parts.counts_real or not hasattr(decoder, "rotary_emb"):
        return f"{name} does not have one rotary position per token"
    if any(masks.sliding_windows(config, len(parts.layers))):
        return f"{name} has sliding windows"
    if getattr(decoder.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        return f"{name}'s rotary embedding depends on the length"
    if len({parameter.device for parameter in decoder.parameters()}) > 1:
        return "the model is spread over several devices"
    if getattr(parts.model, "hf_quantizer", None) is not None:
        return "the weights are quantised"
    return why_not_now(parts, method)


def why_not_now(parts: ModelParts, method: Method | None) -> str | None:
    """The part of :func:`why_not` that may change while a model lives."""
    attention = getattr(getattr(parts.decoder, "config", None), "_attn_implementation", None)
    if attention != "sdpa":
        return f"attn_implementation={attention!r} (sdpa is needed)"
    return None if method is None else _why_not_method(method, len(parts.layers))


def _why_not_method(method: Method, layers: int) -> str | None:
    for stage in method.stages(layers):
        if stage.mode == "mask":
            return f"{method.name} with mode='mask' drops nothing"
        if stage.budget is None:
            return f"{method.name} keeps a number of tokens that depends on the picture"
        if stage.layer == layers:
            return f"{method.name} drops behind the last layer"
    if any(method.decode_position_shift(layer) for layer in range(layers)):
        return f"{method.name} with reference_positions=True shifts decode positions"
    return None


@dataclass
class Prompt:
    """What the decoder would have been called with.

    Attributes:
        embeds: ``(batch, n, hidden)``.
        real: bool ``(batch, n)``, False at padding; ``None`` if there is none.
        positions: int64 ``(batch, n)``, rotary positions.
    """

    embeds: torch.Tensor
    real: torch.Tensor | None
    positions: torch.Tensor


@dataclass
class _Aligned:
    """The prompt with its padding moved behind it.

    ``order``: int64 ``(batch, n)``, place in the prompt of each token there; ``counts``: int64
    ``(batch,)``, real tokens of each sample; ``padded``: are there any others?
    """

    order: torch.Tensor
    counts: torch.Tensor
    padded: bool

    @staticmethod
    def of(prompt: Prompt) -> _Aligned:
        batch, count = prompt.embeds.shape[:2]
        if prompt.real is None:
            order = iota(count, prompt.embeds.device).expand(batch, count)
            return _Aligned(order, torch.full_like(order[:, 0], count), padded=False)
        order = (~prompt.real).int().argsort(dim=1, stable=True)
        return _Aligned(order, prompt.real.sum(dim=1), padded=True)

    def __call__(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """A tensor of the prompt in this order, tokens along the negative ``dim``."""
        return take(tensor, self.order, dim) if self.padded else tensor

    def prefill(self, groups: list[Group]) -> Prefill:
        """The engine's state of the prompt, in this order."""
        batch, count = self.order.shape
        layout = Layout.whole(batch, count, self.order.device)
        if not self.padded:
            return Prefill(layout, groups, [count] * batch, None, {0: layout})
        place = self.order.argsort(dim=1)
        moved = [
            Group(g.samples, g.names, place[g.samples[:, None], g.starts], g.total, g.places)
            for g in groups
        ]
        real = layout.slots < self.counts[:, None]
        return Prefill(layout, moved, [count] * batch, real, {0: layout})


@dataclass
class _Note:
    """What a stage left, to be written into the trace once the device has work to do."""

    layer: int
    layout: Layout
    held: list[int]
    visual: list[int]


class _Shelves:
    """What was made last. Nothing here points back at who made it, so all memory is free as soon
    as the last user lets go."""

    def __init__(self) -> None:
        segments: Shelf[Segment] = Shelf(SEGMENTS)
        steps: Shelf[Step] = Shelf(STEPS)

        def forget(cache: SegmentCache) -> None:
            """A cache goes, and with it what was recorded on its memory."""
            segments.drop_where(lambda segment: segment.cache is cache)
            steps.drop_where(lambda step: cache in step.caches)

        self.segments, self.steps = segments, steps
        self.caches: Shelf[SegmentCache] = Shelf(CACHES, forget)

    def let_go(self, block: Hashable) -> None:
        """A block of memory goes, and with it what was recorded on it."""
        if isinstance(block, tuple):
            self.caches.drop_where(lambda cache: cache.first <= block[1] < cache.stop)
            self.steps.drop_where(
                lambda step: any(cache.first <= block[1] < cache.stop for cache in step.caches)
            )
        else:
            self.segments.drop_where(lambda segment: True)


class FastDecoder:
    """Runs one model's decoder on fixed shapes.

    Args:
        parts: where things are in the model.
        head: see :data:`vlm_prune_ext.engine.static.Head`.
        capture: record CUDA graphs; without them the same pieces run one by one.
    """

    def __init__(self, parts: ModelParts, head: Head, *, capture: bool) -> None:
        self.parts, self.head = parts, head
        decoder: Any = parts.decoder
        first = next(decoder.parameters())
        self.dtype = first.dtype
        around = FusedLayers(decoder) if capture else nullcontext
        self.recorder = Recorder(first.device, capture, around)
        self._shelves = shelves = _Shelves()
        self.arena = Arena(first.device, shelves.let_go)

    def start(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        pruner: DecoderPruner | None = None,
        call: Call | None = None,
    ) -> Run:
        """Prefill.

        Args:
            prompt: as it would enter layer 0.
            max_new_tokens: how many tokens will be decoded at most.
            pruner, call: the method that is attached, and what it made of the prompt so far.
        """
        aligned = _Aligned.of(prompt)
        stages: dict[int, Stage] = {}
        state = aligned.prefill([])
        if pruner is not None and call is not None:
            stages = {layer: stage for layer, stage in pruner.stages.items() if layer > 0}
            state = aligned.prefill(call.state.prefill.groups)
        run = Run(self, aligned, state, max_new_tokens)
        run.prefill(aligned(prompt.embeds, -2), aligned(prompt.positions, -1), stages)
        if pruner is not None and call is not None:
            run.write_trace(pruner, call)
        return run

    def segment(self, first: int, stop: int, hidden: torch.Tensor, room: int) -> Segment:
        """The layers ``first`` ... ``stop - 1`` for prompts of up to a bucket's length, with
        ``room`` for decoded tokens."""
        batch, tokens = hidden.shape[0], _round_up(hidden.shape[1], PROMPT_STEP)
        key = (first, stop, batch, _round_up(tokens + room, CACHE_STEP))
        segment = self._shelves.segments.get((*key, tokens), lambda: self._make(key, tokens))
        self._shelves.caches.get(key, lambda: segment.cache)  # used just now
        return segment

    def _make(self, key: tuple[int, int, int, int], tokens: int) -> Segment:
        config = self.parts.decoder.config  # type: ignore[union-attr]
        memory = Activations.of(self.arena, config, key[2], tokens, self.dtype)
        return Segment(self.parts, self.head, self._cache(key), memory, self.recorder)

    def _cache(self, key: tuple[int, int, int, int]) -> SegmentCache:
        config = self.parts.decoder.config  # type: ignore[union-attr]
        return self._shelves.caches.get(
            key, lambda: SegmentCache(self.arena, config, *key, self.dtype)
        )

    def wider(self, old: SegmentCache, more: int) -> SegmentCache:
        """A cache with the same content and at least ``more`` places beside."""
        width = _round_up(old.width + more, CACHE_STEP)
        new = self._cache((old.first, old.stop, old.batch, width))
        widen(old, new)
        return new

    def step(self, caches: list[SegmentCache]) -> Step:
        """One decode step over these caches."""
        key = tuple(id(cache) for cache in caches)
        return self._shelves.steps.get(
            key, lambda: Step(self.parts, self.head, caches, self.recorder)
        )


class Run:
    """One prompt, and what is decoded after it.

    Attributes:
        logits: ``(batch, vocabulary)`` of the next token; overwritten by :meth:`step`.
    """

    def __init__(
        self, decoder: FastDecoder, aligned: _Aligned, state: Prefill, max_new_tokens: int
    ) -> None:
        self.decoder, self.aligned, self.state = decoder, aligned, state
        self.limit = max_new_tokens
        self.done = 0  # tokens that were decoded
        self.caches: list[SegmentCache] = []
        self.segments: list[Segment] = []
        self.real: list[torch.Tensor] = []
        self.notes: list[_Note] = []
        self.logits: torch.Tensor
        self._position: torch.Tensor  # rotary, of the first token that is decoded
        self._step: Step | None = None

    def prefill(
        self, hidden: torch.Tensor, positions: torch.Tensor, stages: dict[int, Stage]
    ) -> None:
        """All segments, and the drops between them."""
        counts = self.aligned.counts[:, None]
        self._position = positions.expand(len(counts), -1).gather(1, counts - 1) + 1
        starts = [0, *sorted(stages)]
        stops = [*starts[1:], len(self.decoder.parts.layers)]
        for first, stop in zip(starts, stops, strict=True):
            if first in stages:
                hidden, positions = self._drop(stages[first], hidden, positions)
            segment = self.decoder.segment(first, stop, hidden, min(self.limit, ROOM))
            real = self._real_tokens()
            segment.fill(hidden, positions, real - 1)
            self.segments.append(segment)
            self.real.append(real)
            output = segment.run()
            hidden = output if segment.is_last else output[:, : hidden.shape[1]]
        self.logits = hidden

    def _lost(self, held: list[int]) -> list[int]:
        """How many tokens each sample has lost where it holds so many."""
        return [self.aligned.order.shape[1] - count for count in held]

    def _real_tokens(self) -> torch.Tensor:
        """int64 ``(batch,)``: what each sample holds now, padding not counted."""
        counts, lost = self.aligned.counts, self._lost(self.state.held)
        if len(set(lost)) == 1:
            return counts - lost[0]  # nothing to send, nothing to wait for
        return counts - sent(lost, counts.device)

    def _drop(
        self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let a stage choose; what stays goes on, in order, at the left."""
        state = self.state
        gone = state.select(stage, self._looker(stage, hidden))
        if gone is not None:
            index = self._move_left(gone, stage.layer)
            hidden, positions = take(hidden, index, -2), take(positions, index, -1)
        self.notes.append(_Note(stage.layer, state.layout, list(state.held), state.visual_counts()))
        return hidden, positions

    def _move_left(self, gone: torch.Tensor, layer: int) -> torch.Tensor:
        """Update the layout; returns the ``(batch, n')`` places to gather. Where samples lose
        different numbers, dropped tokens fill the shorter ones up from behind."""
        layout, held = self.state.layout, self.state.held
        lost = gone if layout.valid is None else gone | ~layout.valid
        index = lost.int().argsort(dim=1, stable=True)[:, : max(held)]
        valid = ~lost.gather(1, index) if min(held) < max(held) else None
        self.state.layout = Layout(layout.slots.gather(1, index), valid, layout.total)
        self.state.segments[layer] = self.state.layout
        return index

    def _looker(self, stage: Stage, hidden: torch.Tensor) -> Looker:
        if not any(need == "keys" or need.startswith("attention:") for need in stage.needs):
            return Looker(stage.needs, None, None, hidden)
        segment, count = self.segments[-1], hidden.shape[1]
        before, memory = segment.cache.stop - 1, segment.memory
        reader = AttentionReader(
            self.decoder.parts,
            self.decoder.parts.layers[before].self_attn,  # type: ignore[arg-type]
            memory.attended[:, :count],
            self.state,
            self.state.layout,
            keys=segment.cache.keys[before][:, :, :count],
            mask=None,
            rotary=(memory.cosines[:, :count], memory.sines[:, :count]),
            prompt=True,
        )
        return Looker(stage.needs, *read(stage.needs, reader), hidden)

    def write_trace(self, pruner: DecoderPruner, call: Call) -> None:
        """What was kept, as the ordinary path says it: places in the padded prompt."""
        origin = call.state.prefill
        for note in self.notes:
            lost = self._lost(note.held)
            held = [before - n for before, n in zip(origin.held, lost, strict=True)]
            layout, _ = origin.layout.drop(self._still_there(note.layout), held)
            pruner.write_trace(note.layer, call, layout, note.visual)

    def _still_there(self, layout: Layout) -> torch.Tensor:
        """Bool ``(batch, n)`` over the places of the padded prompt."""
        order = self.aligned.order
        there = torch.zeros_like(order)
        ones = torch.ones_like(layout.slots) if layout.valid is None else layout.valid
        there.scatter_add_(1, layout.slots, ones.long())
        return torch.zeros_like(order).scatter_(1, order, there).bool()

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
        pairs = zip(self.caches, self.segments, strict=True)
        return min(cache.width - segment.tokens for cache, segment in pairs)

    def _make_room(self) -> None:
        """Decode from now on in the prompt's own caches, or in wider ones."""
        if not self.caches:
            self.caches = [segment.cache for segment in self.segments]
        if self.done == self._room():  # as much again, but never past the limit
            more = min(self.done, self.limit - self.done)
            self.caches = [self.decoder.wider(cache, more) for cache in self.caches]
        self._step = self.decoder.step(self.caches)
        room = [[segment.tokens] for segment in self.segments]
        real = torch.stack(self.real)[..., None]
        self._step.start(self._position + self.done, real, sent(room, real.device), self.done)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
