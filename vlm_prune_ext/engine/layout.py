"""Which tokens of the prompt a layer holds, and the gathers that follow from it.

Slots are places 0 ... S-1 of the sequence that enters layer 0. After a drop a layer holds some of
them; tokens that are decoded later get slots S, S+1, ... in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """Slots of the prompt that one run of layers holds.

    Attributes:
        slots: int64 ``(batch, n)``, ascending over the valid entries.
        valid: bool ``(batch, n)``, False at empty slots in front of samples that keep fewer
            tokens than others; ``None`` if there are none.
        total: S, slots of the whole prompt.
    """

    slots: torch.Tensor
    valid: torch.Tensor | None
    total: int

    @property
    def count(self) -> int:
        """Tokens per sample, ``n``."""
        return self.slots.shape[1]

    @staticmethod
    def whole(batch: int, total: int, device: torch.device) -> Layout:
        """Everything is there."""
        return Layout(iota(total, device).expand(batch, total), None, total)

    def to(self, device: torch.device) -> Layout:
        """The same on another device (a model may be spread over several)."""
        if self.slots.device == device:
            return self
        valid = None if self.valid is None else self.valid.to(device)
        return Layout(self.slots.to(device), valid, self.total)

    def positions(self) -> torch.Tensor:
        """``(batch, n)`` slots, ``-1`` at empty ones."""
        if self.valid is None:
            return self.slots.clone()
        return self.slots.masked_fill(~self.valid, -1)

    def places_of(self, slots: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """Current places of given slots: ``slots`` ``(rows, m)`` of batch rows ``samples``."""
        if self.count == self.total and self.valid is None:
            return slots  # nothing was dropped yet
        inverse = self.slots.new_zeros(self.slots.shape[0], self.total)
        here = iota(self.count, self.slots.device).expand_as(self.slots)
        if self.valid is not None:  # empty slots must not claim a place
            here = here.masked_fill(~self.valid, 0)
        inverse.scatter_add_(1, self.slots, here)
        return inverse[samples[:, None], slots]

    def drop(self, keep: torch.Tensor, held: list[int]) -> tuple[Layout, torch.Tensor]:
        """The layout after a drop.

        Args:
            keep: bool ``(batch, n)``.
            held: how many tokens each sample keeps (known to the caller, so that the device need
                not be asked).

        Returns:
            the new layout, and int64 ``(batch, max(held))`` current places to gather.
        """
        if self.valid is not None:
            keep = keep & self.valid
        # A stable sort puts dropped places first and kept ones last, each in order: the last
        # `count` columns are the kept ones, with leftovers in front where a sample keeps fewer.
        index = keep.int().argsort(dim=1, stable=True)[:, -max(held) :]
        valid = keep.gather(1, index) if min(held) < max(held) else None
        return Layout(self.slots.gather(1, index), valid, self.total), index


def take(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather along ``dim`` with one index row per sample.

    Args:
        tensor: the batch is the dimension just before ``dim``, of size batch or 1 (which is
            expanded); anything may stand around them.
        index: int64 ``(batch, m)``.
        dim: negative dimension to gather along.
    """
    batch, m = index.shape
    if tensor.shape[dim - 1] != batch:
        shape = list(tensor.shape)
        shape[dim - 1] = batch
        tensor = tensor.expand(shape)
    view = [1] * tensor.dim()
    view[dim - 1], view[dim] = batch, m
    shape = list(tensor.shape)
    shape[dim] = m
    return tensor.gather(tensor.dim() + dim, index.to(tensor.device).view(view).expand(shape))


@lru_cache(maxsize=256)
def iota(count: int, device: torch.device) -> torch.Tensor:
    """int64 ``(count,)``: 0, 1, ...; made once, never to be written to."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device)


def sent(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Numbers as an int64 tensor on a device, without waiting for what the device has to do."""
    made = torch.tensor(numbers)
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)
