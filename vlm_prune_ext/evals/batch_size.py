"""How many samples are answered together."""

from __future__ import annotations

from typing import Any

import torch

from vlm_prune_ext.errors import InputError

AUTO = "auto"
LARGEST = 64
"""Samples that ``auto`` answers together at most."""
_FIRST = 16  # on a GPU


def batch_size_of(name: str, given: Any) -> int | str:
    """A batch size: an integer of at least 1, or ``auto``.

    Raises:
        InputError: something else.
    """
    if given == AUTO:
        return AUTO
    try:
        size = int(given)
    except (TypeError, ValueError):
        size = 0
    if size < 1 or isinstance(given, bool | float):
        raise InputError(f"{name}={given!r} is not valid: an integer of at least 1, or auto.")
    return size


class BatchSize:
    """How many samples are answered together.

    ``auto`` starts with one, on a GPU with 16, and grows, fourfold because the fast path records
    each size, as long as memory allows and throughput rises by a tenth; of what was tried, the
    fastest stays. (Sizes that run out of memory are halved by :class:`Answerer`, stated or not.)

    Args:
        asked: a number, or ``auto``; ``None``: ``auto`` on a GPU, else 1.
        device: of the model.
        most: of ``auto``.
        together: what ``auto`` is, of an engine that makes its batches itself.

    Attributes:
        now: samples.
    """

    def __init__(
        self,
        asked: int | str | None,
        device: torch.device,
        most: int = LARGEST,
        together: int | None = None,
    ) -> None:
        if together is not None and asked in (None, AUTO):
            asked = together
        if asked is None:
            asked = AUTO if device.type == "cuda" else 1
        self._device, self._most = device, most
        self._grows = asked == AUTO
        first = min(_FIRST, most) if device.type == "cuda" else 1
        self.now = first if asked == AUTO else int(asked)
        self._rates: dict[int, float] = {}
        self._tries = 0
        on_gpu = self._grows and device.type == "cuda"
        self._before = torch.cuda.memory_allocated(device) if on_gpu else 0

    def note(self, count: int, seconds: float, largest: int | None) -> None:
        """Learn from a batch.

        Args:
            count: of its samples.
            seconds: that it took.
            largest: samples that fit into memory, if it was too small for more.
        """
        if largest is not None and largest < self.now:
            self.now, self._grows = largest, False
        if not self._grows or 2 * count < self.now:
            return
        best = max((rate for size, rate in self._rates.items() if size < self.now), default=0.0)
        self._rates[self.now] = max(count / seconds, self._rates.get(self.now, 0.0))
        self._tries += 1
        if self._rates[self.now] > 1.1 * best:
            larger = next((n for n in (4, 2) if self._allowed(n)), 1)
            self._grows, self._tries = larger > 1, 0
            self.now *= larger
        elif self._tries == 4:  # kernels are compiled for the first, and recorded at the second
            self.now, self._grows = max(self._rates, key=lambda n: self._rates[n]), False

    def _allowed(self, times: int) -> bool:
        if self.now * times > self._most:
            return False
        if self._device.type != "cuda":
            return True
        took = torch.cuda.max_memory_allocated(self._device) - self._before
        free = torch.cuda.mem_get_info(self._device)[0]
        reserved = torch.cuda.memory_reserved(self._device)
        return self._before + took * times < 0.9 * (free + reserved)
