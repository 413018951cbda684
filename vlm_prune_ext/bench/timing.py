"""Seconds of a call, many times over, after warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vlm_prune_ext.measure import Spread


def seconds_of(
    call: Callable[[], Any], device: torch.device, *, repeat: int, warm_up: int = 2
) -> Spread:
    """Time a call.

    Args:
        call: what to time.
        device: where it works. On a GPU each call stands between two CUDA events, and is waited
            for before the next one begins, so that launching counts where it is what takes time.
        repeat: timed calls, at least 1.
        warm_up: calls before them.

    Returns:
        seconds.
    """
    for _ in range(warm_up):
        call()
    if device.type == "cuda":
        return Spread.of_some([_on_gpu(call, device) for _ in range(repeat)])
    return Spread.of_some([_on_cpu(call) for _ in range(repeat)])


def _on_gpu(call: Callable[[], Any], device: torch.device) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000.0


def _on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
