"""Memory that recorded pieces take turns with.

A CUDA graph works on the addresses it was recorded with, and many are recorded: one for each length
of prompt. With memory of its own for each, hundreds of lengths would take hundreds of KV caches. So
all of a kind are views of one block, as large as the largest needed so far. What two pieces keep
there cannot be kept at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch


class Arena:
    """Blocks of memory by name.

    Args:
        device: where.
        on_growth: called with the name of a block that is about to be replaced by a larger one:
            what was recorded on it must be let go of.
    """

    def __init__(self, device: torch.device, on_growth: Callable[[Hashable], None]) -> None:
        self.device, self.on_growth = device, on_growth
        self._blocks: dict[Hashable, torch.Tensor] = {}

    def view(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape at the start of the block. It holds what was there before; zeros
        at first."""
        size = math.prod(shape)
        if not self._fits(name, size, dtype):
            self._grow(name, size, dtype)
        return self._blocks[name][:size].view(*shape)

    def _fits(self, name: Hashable, size: int, dtype: torch.dtype) -> bool:
        block = self._blocks.get(name)
        return block is not None and block.numel() >= size and block.dtype == dtype

    def _grow(self, name: Hashable, size: int, dtype: torch.dtype) -> None:
        before = self._blocks.pop(name, None)
        if before is not None:
            size = max(size, before.numel() * 5 // 4)  # or every longer prompt would come here
            del before  # free before the larger one is made
            self.on_growth(name)
        # Blocks outlive the call that needs them first, which may be in inference mode.
        with torch.inference_mode(False):
            self._blocks[name] = torch.zeros(size, dtype=dtype, device=self.device)

    def wipe(self) -> None:
        """Zeros everywhere: masks hide old numbers, but not what is no number."""
        for block in self._blocks.values():
            block.zero_()
