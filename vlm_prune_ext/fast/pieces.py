"""The recorded pieces of one decoder, and the memory they share."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.fast.fused import FusedLayers
from vlm_prune_ext.fast.graphs import LRU, Arena, Recorder
from vlm_prune_ext.fast.segments import (
    Activations,
    Follow,
    Head,
    Part,
    Segment,
    SegmentCache,
    Step,
    widen,
)

PROMPT_STEP = 4  # what a piece holds is filled up to a multiple; fillers stay to the last layer
VARYING_STEP = 16  # the same where counts depend on the picture, so that many share a recording
CACHE_STEP = 128  # likewise caches, so that many lengths share one decode step
QUESTION_STEP = 8  # likewise questions about one picture
CACHES, SEGMENTS, FOLLOWS, STEPS = 48, 128, 32, 24  # kept at a time


class _Recent:
    """What was made last. Nothing here points back at who made it, so all memory is free as soon
    as the last user lets go."""

    def __init__(self) -> None:
        segments: LRU[Segment] = LRU(SEGMENTS)
        follows: LRU[Follow] = LRU(FOLLOWS)
        steps: LRU[Step] = LRU(STEPS)

        def forget(cache: SegmentCache) -> None:
            """A cache goes, and with it what was recorded on its memory."""
            segments.drop_where(lambda segment: segment.cache is cache)
            follows.drop_where(lambda follow: cache in follow.caches)
            steps.drop_where(lambda step: cache in step.caches)

        self.segments, self.follows, self.steps = segments, follows, steps
        self.caches: LRU[SegmentCache] = LRU(CACHES, forget)

    def let_go(self, block: Hashable) -> None:
        """A block of memory goes, and with it what was recorded on it."""
        if isinstance(block, tuple):

            def touched(cache: SegmentCache) -> bool:
                return cache.first <= block[1] < cache.stop

            self.caches.drop_where(touched)
            self.follows.drop_where(lambda follow: any(map(touched, follow.caches)))
            self.steps.drop_where(lambda step: any(map(touched, step.caches)))
        else:
            self.segments.drop_where(lambda segment: True)
            self.follows.drop_where(lambda follow: True)


class Pieces:
    """What is recorded of one model's decoder, by shape.

    Args:
        parts: where things are in the model.
        head: see :data:`vlm_prune_ext.fast.segments.Head`.
        capture: record CUDA graphs; without them the same pieces run one by one.
    """

    def __init__(self, parts: ModelParts, head: Head, *, capture: bool) -> None:
        self.parts, self.head = parts, head
        decoder: Any = parts.decoder
        first = next(decoder.parameters())
        self.dtype = first.dtype
        around = FusedLayers(decoder) if capture else nullcontext
        self.recorder = Recorder(first.device, capture, around)
        self.recent = recent = _Recent()
        self.arena = Arena(first.device, recent.let_go)

    def segment(
        self, first: int, stop: int, hidden: torch.Tensor, room: int, step: int = PROMPT_STEP
    ) -> Segment:
        """The layers ``first`` ... ``stop - 1`` for prompts of up to a bucket's length, a multiple
        of ``step``, with ``room`` for decoded tokens."""
        batch, tokens = hidden.shape[0], round_up(hidden.shape[1], step)
        key = (first, stop, batch, round_up(tokens + room, CACHE_STEP))
        segment = self.recent.segments.get((*key, tokens), lambda: self._make(key, tokens))
        self.recent.caches.get(key, lambda: segment.cache)  # used just now
        return segment

    def _make(self, key: tuple[int, int, int, int], tokens: int) -> Segment:
        config = self.parts.decoder.config  # type: ignore[union-attr]
        levels = self.parts.stacked if key[0] < self.parts.stacked else 0
        memory = Activations.of(self.arena, config, key[2], tokens, self.dtype, levels)
        return Segment(self.parts, self.head, self._cache(key), memory, self.recorder)

    def _cache(self, key: tuple[int, int, int, int]) -> SegmentCache:
        config = self.parts.decoder.config  # type: ignore[union-attr]
        return self.recent.caches.get(
            key, lambda: SegmentCache(self.arena, config, *key, self.dtype)
        )

    def follow(self, held: list[Part], together: int, length: int, rows: int) -> Follow:
        """``together`` questions of up to a bucket's length behind each prompt of some caches, for
        ``rows`` answers; with its last places in :attr:`Follow.starts`."""
        caches = [part.cache for part in held]
        starts = [round_up(part.start, QUESTION_STEP) for part in held]
        key = (together, length, rows, *starts, *(id(cache) for cache in caches))

        def make() -> Follow:
            config = self.parts.decoder.config  # type: ignore[union-attr]
            tokens = together * length
            memory = Activations.of(self.arena, config, caches[0].batch, tokens, self.dtype)
            recorder = self.recorder
            return Follow(self.parts, self.head, caches, starts, memory, together, rows, recorder)

        return self.recent.follows.get(key, make)

    def wider(self, old: SegmentCache, more: int) -> SegmentCache:
        """A cache with the same content and at least ``more`` places beside."""
        width = round_up(old.width + more, CACHE_STEP)
        new = self._cache((old.first, old.stop, old.batch, width))
        widen(old, new)
        return new

    def step(self, held: list[Part], rows: int, *, counted: bool) -> Step:
        """One decode step of ``rows`` over these caches; ``counted``: see :class:`Step`."""
        caches, together = [part.cache for part in held], [part.together for part in held]
        key = (counted, rows, *together, *(id(cache) for cache in caches))

        def make() -> Step:
            return Step(
                self.parts, self.head, caches, rows, together, self.recorder, counted=counted
            )

        return self.recent.steps.get(key, make)


def round_up(number: int, step: int) -> int:
    """The next multiple."""
    return -(-number // step) * step
