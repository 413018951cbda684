"""Which tokens of the prompt a layer holds, and the gathers that follow from it.

Slots are places 0 ... S-1 of the sequence that enters layer 0. After a drop a layer holds some of
them; tokens that are decoded later get slots S, S+1, ... in every layer. Rows that a rule adds have
names of their own, S and up; masks take them for the last token of their image, behind which they
stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Added:
    """Rows that a rule adds to the sequence, at most ``c`` per sample.

    Attributes:
        hidden: ``(batch, c, hidden)``.
        names: int64 ``(batch, c)``; ``slots``: of the last token of their image.
        behind: int64 ``(batch, c)``, the place that each stands behind, before anything is dropped.
        real: bool ``(batch, c)``, False at fillers of samples that get fewer.
    """

    hidden: torch.Tensor
    names: torch.Tensor
    slots: torch.Tensor
    behind: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Slots of the prompt that one run of layers holds.

    Attributes:
        slots: int64 ``(batch, n)``, ascending over the valid entries.
        valid: bool ``(batch, n)``, False at empty slots in front of samples that keep fewer
            tokens than others; ``None`` if there are none.
        total: S, slots of the whole prompt.
        names: int64 ``(batch, n)``, what tells tokens apart; the slots where no row was added.
        added: most rows that were added to any sample so far; names stay below ``total + added``.
        positions: int64 ``(batch, n)``, rotary positions where they were counted anew.
    """

    slots: torch.Tensor
    valid: torch.Tensor | None
    total: int
    names: torch.Tensor
    added: int = 0
    positions: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens per sample, ``n``."""
        return self.slots.shape[1]

    @property
    def is_whole(self) -> bool:
        """Nothing was dropped or added yet."""
        return self.count == self.total and self.valid is None and not self.added

    @staticmethod
    def whole(batch: int, total: int, device: torch.device) -> Layout:
        """Everything is there."""
        slots = iota(total, device).expand(batch, total)
        return Layout(slots, None, total, slots)

    def to(self, device: torch.device) -> Layout:
        """The same on another device (a model may be spread over several)."""
        if self.slots.device == device:
            return self
        return replace(
            self,
            slots=self.slots.to(device),
            valid=None if self.valid is None else self.valid.to(device),
            names=self.names.to(device),
            positions=None if self.positions is None else self.positions.to(device),
        )

    def kept(self) -> torch.Tensor:
        """``(batch, n)`` names, ``-1`` at empty slots."""
        if self.valid is None:
            return self.names.clone()
        return self.names.masked_fill(~self.valid, -1)

    def counted(self) -> torch.Tensor:
        """:attr:`positions`, ``-1`` at empty slots."""
        assert self.positions is not None
        if self.valid is None:
            return self.positions.clone()
        return self.positions.masked_fill(~self.valid, -1)

    def places_of(self, names: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """Current places of tokens that are here: ``names`` ``(rows, m)`` of batch rows
        ``samples``."""
        if self.is_whole:
            return names
        inverse = self.slots.new_zeros(self.slots.shape[0], self.total + self.added)
        here = iota(self.count, self.slots.device).expand_as(self.slots)
        if self.valid is not None:  # empty slots must not claim a place
            here = here.masked_fill(~self.valid, 0)
        inverse.scatter_add_(1, self.names, here)
        return inverse[samples[:, None], names]

    def drop(
        self, keep: torch.Tensor, held: list[int], added: Added | None = None
    ) -> tuple[Layout, torch.Tensor]:
        """The layout after a drop.

        Args:
            keep: bool ``(batch, n)``.
            held: how many tokens each sample holds then (known to the caller, so that the device
                need not be asked).
            added: rows that come in.

        Returns:
            the new layout, and int64 ``(batch, max(held))`` current places to gather; places
            ``n`` and up are those of the added rows.
        """
        if self.valid is not None:
            keep = keep & self.valid
        slots, names, more = self.slots, self.names, self.added
        # A stable sort puts dropped places first and kept ones last, each in order: the last
        # `count` columns are the kept ones, with leftovers in front where a sample keeps fewer.
        order = keep.int()
        if added is not None:
            order, keep = _order_with(added, keep)
            slots = torch.cat([slots, added.slots], dim=1)
            names = torch.cat([names, added.names], dim=1)
            more += added.names.shape[1]
        index = order.argsort(dim=1, stable=True)[:, -max(held) :]
        valid = keep.gather(1, index) if min(held) < max(held) else None
        positions = self.positions
        if positions is not None and added is None:
            positions = positions.gather(1, index)
        kept = slots.gather(1, index)
        names = kept if names is slots else names.gather(1, index)
        return Layout(kept, valid, self.total, names, more, positions), index

    def at(self, index: torch.Tensor) -> Layout:
        """The tokens at places ``(batch, m)``."""
        return replace(
            self,
            slots=self.slots.gather(1, index),
            names=self.names.gather(1, index),
            valid=None if self.valid is None else self.valid.gather(1, index),
            positions=None if self.positions is None else self.positions.gather(1, index),
        )

    def without_last(self, count: int) -> Layout:
        """Without the last ``count`` slots, all of which are here."""
        total, names = self.total - count, self.names[:, :-count]
        return Layout(
            self.slots[:, :-count],
            None if self.valid is None else self.valid[:, :-count],
            total,
            torch.where(names >= self.total, names - count, names),
            self.added,
            None if self.positions is None else self.positions[:, :-count],
        )

    def counted_anew(self, real: torch.Tensor | None) -> Layout:
        """With rotary positions 0, 1, ... over what is here.

        Args:
            real: bool ``(batch, S)``, False at padding of the prompt; ``None`` if there is none.
        """
        there = torch.ones_like(self.slots) if real is None else real.long().gather(1, self.slots)
        if self.valid is not None:
            there = there * self.valid
        return replace(self, positions=(there.cumsum(dim=1) - 1).clamp(min=0))

    def next_position(self) -> torch.Tensor:
        """Rotary position behind those that were counted anew, int64 ``(batch, 1)``."""
        assert self.positions is not None
        return self.positions.amax(dim=1, keepdim=True) + 1


def _order_with(added: Added, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort keys of all places and added rows, what goes first; and what stays of both."""
    step, more = keep.shape[1], added.names.shape[1]
    here = iota(step, keep.device) * (more + 1)
    between = added.behind * (more + 1) + 1 + iota(more, keep.device)
    keep = torch.cat([keep, added.real], dim=1)
    order = torch.cat([here.expand(keep.shape[0], step), between], dim=1)
    return order + keep * ((step + 1) * (more + 1)), keep


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
