"""A vision tower that is recorded as a whole, with what a rule behind it needs to see of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.prune import Session
from vlm_prune_ext.engine.tower import Seen, VisionPruner, Watch
from vlm_prune_ext.fast.graphs import LRU, Recorded, Recorder

_SHAPES = 8  # of inputs, kept at a time


def drops_inside(session: Session | None) -> bool:
    """Do tokens go inside the tower?"""
    pruners = session.pruners if session is not None else []
    return any(isinstance(pruner, VisionPruner) and pruner.stages for pruner in pruners)


def site_of(session: Session | None) -> FeatureSite | None:
    """What chooses between tower and language model, if anything does."""
    pruners = session.pruners if session is not None else []
    return next((p.site for p in pruners if isinstance(p, DecoderPruner)), None)


class RecordedTower:
    """A vision tower whose forward is recorded, per shape of its input and what is noted of it.

    Hooks inside it run while it is recorded, and not when it is replayed: what they noted then is
    part of the recording.
    """

    def __init__(self, tower: nn.Module, recorder: Recorder) -> None:
        self._tower = weakref.ref(tower)
        self._recorder = recorder
        self._watch: Watch | None = None
        self._shapes: LRU[tuple[torch.Tensor, Recorded]] = LRU(_SHAPES)

    def take_over(self, watch: Watch | None) -> None:
        """From now on the tower's calls come here; ``watch`` notes what a rule needs of them."""
        self._watch = watch
        self._tower().forward = self._forward  # type: ignore[union-attr,method-assign]

    def step_back(self) -> None:
        """The tower has its own forward back."""
        self._watch = None
        vars(self._tower()).pop("forward", None)

    def _forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        watch = self._watch
        needs = () if watch is None else watch.needs
        key = (tuple(pixel_values.shape), pixel_values.dtype, needs, tuple(sorted(kwargs.items())))
        buffer, recorded = self._shapes.get(
            key, lambda: (torch.empty_like(pixel_values), Recorded(self._recorder))
        )
        buffer.copy_(pixel_values)
        before = Seen() if watch is None else watch.take()
        output, named = recorded(lambda: self._work(buffer, kwargs))
        if watch is not None:
            watch.seen = before
            for name, tensor in named:  # the next call writes where this one's are
                watch.seen.note(name, tensor.clone())
        return type(output)(**output)  # models write into what they get

    def _work(self, pixels: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        tower: Any = self._tower()
        output = type(tower).forward(tower, pixels, **kwargs)
        seen = Seen() if self._watch is None else self._watch.take()
        return output, [(name, part) for name, parts in seen.named.items() for part in parts]
