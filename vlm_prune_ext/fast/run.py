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

from vlm_prune_ext.engine.call import Call
from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.evidence import AttentionReader, Looker, Seen, reads
from vlm_prune_ext.engine.layout import Layout, iota, sent, take
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.fast.pieces import Pieces
from vlm_prune_ext.fast.segments import Segment, SegmentCache, Step
from vlm_prune_ext.methods.evidence import Stage, attention_needs

ROOM = 128  # for decoded tokens at first: limits are high, answers short


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


@dataclass
class _Note:
    """What a stage left, to be written into the trace once the device has work to do."""

    layer: int
    layout: Layout
    held: list[int]
    visual: list[int]


class Run:
    """One prompt, and what is decoded after it.

    Attributes:
        logits: ``(batch, vocabulary)`` of the next token; overwritten by :meth:`step`.
    """

    def __init__(
        self, pieces: Pieces, aligned: _Aligned, state: Prefill, max_new_tokens: int
    ) -> None:
        self.pieces, self.aligned, self.state = pieces, aligned, state
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
        observes = stages.pop(0, None)
        if observes is not None:
            self.state.observe(observes, self._looker(observes, hidden, positions))
        starts = [0, *sorted(stages)]
        stops = [*starts[1:], len(self.pieces.parts.layers)]
        for first, stop in zip(starts, stops, strict=True):
            if first in stages:
                hidden, positions = self._drop(stages[first], hidden, positions)
            segment = self.pieces.segment(first, stop, hidden, min(self.limit, ROOM))
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
        gone, _ = state.select(stage, self._looker(stage, hidden, positions))
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
        slots = layout.slots.gather(1, index)
        self.state.layout = Layout(slots, valid, layout.total, slots)
        self.state.segments[layer] = self.state.layout
        return index

    def _looker(self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor) -> Looker:
        parts, state = self.pieces.parts, self.state
        seen = [self._before(stage)] if reads(stage.needs) else []
        if attention_needs(stage.needs, "coming"):
            seen.append(self._coming(stage, hidden, positions))
        joined = [dict(ChainMap(*each)) for each in zip(*seen, strict=True)] if seen else None
        return Looker(stage.needs, parts, state, hidden, joined)

    def _before(self, stage: Stage) -> Seen:
        """What a stage wants to see of the layer in front of it."""
        segment, count = self.segments[-1], self.state.layout.count
        layer, memory = segment.cache.stop - 1, segment.memory
        rotary = (memory.cosines[:, :count], memory.sines[:, :count])
        keys = segment.cache.keys[layer][:, :, :count]
        return self._reader(layer, memory.attended[:, :count], keys, rotary).read(
            stage.needs, "before"
        )

    def _coming(self, stage: Stage, hidden: torch.Tensor, positions: torch.Tensor) -> Seen:
        """What a stage wants to see of the layer behind it, if nothing were dropped."""
        parts, decoder = self.pieces.parts, self.pieces.parts.decoder
        rotary = decoder.rotary_emb(hidden, position_ids=positions)  # type: ignore[union-attr,operator]
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
            keys=keys,
            mask=None,
            rotary=rotary,
            prompt=True,
        )

    def write_trace(self, pruner: DecoderPruner, call: Call) -> None:
        """What was kept, as the ordinary path says it: places in the padded prompt."""
        origin = call.state.prefill
        for note in self.notes:
            lost = self._lost(note.held)
            held = [before - n for before, n in zip(origin.held, lost, strict=True)]
            layout, _ = origin.layout.drop(self._still_there(note.layout), held)
            pruner.selection.write_trace(note.layer, call, layout, note.visual)

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
            self.caches = [self.pieces.wider(cache, more) for cache in self.caches]
        self._step = self.pieces.step(self.caches)
        room = [[segment.tokens] for segment in self.segments]
        real = torch.stack(self.real)[..., None]
        self._step.start(self._position + self.done, real, sent(room, real.device), self.done)


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
    aligned = _Aligned.of(prompt)
    stages: dict[int, Stage] = {}
    state = aligned.prefill(None if call is None else call.state.prefill)
    if pruner is not None and call is not None:
        done = {0} if pruner.entrance.first_stage is not None else set()
        stages = {layer: stage for layer, stage in pruner.stages.items() if layer not in done}
    run = Run(pieces, aligned, state, max_new_tokens)
    run.prefill(aligned(prompt.embeds, -2), aligned(prompt.positions, -1), stages)
    if pruner is not None and call is not None:
        run.write_trace(pruner, call)
    return run
