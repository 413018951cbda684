"""A vision tower that is recorded as a whole, where no method works in it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.fast.graphs import LRU, Recorded, Recorder

_SHAPES = 8  # of inputs, kept at a time


class RecordedTower:
    """A vision tower whose forward is recorded, per shape of its input."""

    def __init__(self, tower: nn.Module, recorder: Recorder) -> None:
        self._tower = weakref.ref(tower)
        self.recorder = recorder
        self._shapes: LRU[tuple[torch.Tensor, Recorded]] = LRU(_SHAPES)

    def take_over(self) -> None:
        """From now on the tower's calls come here."""
        if self.recorder.capture:
            self._tower().forward = self._forward  # type: ignore[union-attr,method-assign]

    def step_back(self) -> None:
        """The tower has its own forward back."""
        vars(self._tower()).pop("forward", None)

    def _forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        tower: Any = self._tower()
        key = (tuple(pixel_values.shape), pixel_values.dtype, tuple(sorted(kwargs.items())))
        buffer, recorded = self._shapes.get(
            key, lambda: (torch.empty_like(pixel_values), Recorded(self.recorder))
        )
        buffer.copy_(pixel_values)
        output = recorded(lambda: type(tower).forward(tower, buffer, **kwargs))
        return type(output)(**output)  # models write into what they get
