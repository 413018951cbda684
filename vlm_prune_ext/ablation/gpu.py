"""Memory in use on the GPUs that a study may use, read from outside of CUDA (NVML)."""

from __future__ import annotations

import os
import time
from typing import Any

SETTLE = 10.0
"""Seconds that a driver is given to take back what an ended process had."""


def used_memory() -> dict[str, int] | None:
    """Bytes in use by GPU, all processes together; ``None`` where there is no NVML or no GPU.

    Only the GPUs that ``CUDA_VISIBLE_DEVICES`` names are read.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return {
            name: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            for name, handle in _visible(pynvml)
        } or None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def settled_memory(start: dict[str, int] | None) -> dict[str, int] | None:
    """Like :func:`used_memory`, once it is back to ``start`` or :data:`SETTLE` seconds are over."""
    end = time.monotonic() + SETTLE
    while True:
        now = used_memory()
        if now is None or start is None or time.monotonic() > end:
            return now
        if all(now.get(name, 0) <= used for name, used in start.items()):
            return now
        time.sleep(0.2)


def _visible(nvml: Any) -> list[tuple[str, Any]]:
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None:
        names = [str(i) for i in range(nvml.nvmlDeviceGetCount())]
    else:
        names = [name.strip() for name in stated.split(",") if name.strip()]
    found = []
    for name in names:
        if name.lstrip("-").isdigit():
            if int(name) < 0:  # CUDA stops reading here
                break
            found.append((name, nvml.nvmlDeviceGetHandleByIndex(int(name))))
        else:
            found.append((name, nvml.nvmlDeviceGetHandleByUUID(name)))
    return found
