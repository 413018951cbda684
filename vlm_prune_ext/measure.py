"""Measuring: synchronised time, peak memory, energy, and what it was measured with.

Work on a GPU is queued: a clock that is read without waiting for the queue measures how fast
Python is. Everything here waits first. Nothing here changes what a model computes.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

PACKAGES = (
    "vlm-prune-ext",
    "torch",
    "transformers",
    "accelerate",
    "ms-vlmeval",
    "vlmeval",
    "lmms-eval",
    "flash-attn",
)
"""Distributions whose versions are recorded, where they are installed."""


# -- time --------------------------------------------------------------------------------------
def now(device: torch.device | str | None = None) -> float:
    """Seconds on a steady clock, once everything queued on ``device`` is done."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TokenClock(LogitsProcessor):
    """Splits the time of a ``generate`` call into prefill and decode.

    Given to ``generate`` as a logits processor, it sees the scores of every new token and returns
    them untouched; the model gets no hook. The device is waited for at the first token only (and
    at the end), so decoding is not slowed down.

    >>> clock = TokenClock(model.device)                                      # doctest: +SKIP
    >>> model.generate(**inputs, logits_processor=[clock]); clock.stop()      # doctest: +SKIP

    Args:
        device: where the model computes its scores.

    Attributes:
        steps: tokens seen.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.steps = 0
        self._first: float | None = None
        self._end: float | None = None
        self._start = now(self.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``(batch, vocabulary)``, as they came."""
        if self._first is None:
            self._first = now(self.device)
        self.steps += 1
        return scores

    def stop(self) -> None:
        """Read the clock for the last time."""
        self._end = now(self.device)

    @property
    def prefill_seconds(self) -> float:
        """From construction to the scores of the first new token (time to first token)."""
        return (self._first if self._first is not None else self._start) - self._start

    @property
    def decode_seconds(self) -> float:
        """From the first new token to :meth:`stop`."""
        if self._first is None or self._end is None:
            return 0.0
        return self._end - self._first


@dataclass(frozen=True)
class Spread:
    """Mean, median, 90th percentile and number of some measurements."""

    mean: float
    median: float
    p90: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """Of any number of values; ``None`` of none."""
        ordered = sorted(values)
        if not ordered:
            return None
        rank = max(0, -(-9 * len(ordered) // 10) - 1)  # nearest rank: a value that occurred
        return Spread(
            statistics.fmean(ordered), statistics.median(ordered), ordered[rank], len(ordered)
        )


# -- memory ------------------------------------------------------------------------------------
def reset_peak(device: torch.device | str) -> None:
    """Start a new peak on a GPU. The peak of a process on a CPU cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device | str) -> int:
    """Peak bytes: allocated by tensors on a GPU since :func:`reset_peak`; on a CPU the resident
    memory of the process since it started."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- energy ------------------------------------------------------------------------------------
class EnergyMeter:
    """Joules a GPU has used, from NVML's counter.

    Args:
        device: the GPU as torch numbers it; anything else has no counter.

    Attributes:
        available: whether there is a counter (module ``pynvml``, of ``nvidia-ml-py``, and a GPU
            that counts).
    """

    def __init__(self, device: torch.device | str) -> None:
        self._nvml, self._handle = _counter(torch.device(device))
        self._device = device
        self._start = self._joules()

    @property
    def available(self) -> bool:
        """Whether the GPU counts."""
        return self._start is not None

    def joules(self) -> float | None:
        """Since construction; ``None`` where nothing counts."""
        end = self._joules()
        return None if end is None or self._start is None else end - self._start

    def _joules(self) -> float | None:
        if self._handle is None:
            return None
        now(self._device)
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000.0
        except self._nvml.NVMLError:
            return None


def _counter(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's: the UUID is what they share.
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError):
        return None, None


# -- what it was measured with -------------------------------------------------------------------
def versions() -> dict[str, str]:
    """Python's version and those of :data:`PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` where files differ from it;
    ``None`` outside of a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware(device: torch.device | str | None = None) -> dict[str, Any]:
    """Processor, cores, threads and memory; with ``device`` on a GPU also its name and memory."""
    import psutil

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device) if device is not None else "cpu",
    }
    if device is not None and torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


@cache
def cpu_name() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines: Sequence[str] = info.read_text().splitlines() if info.exists() else ()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
