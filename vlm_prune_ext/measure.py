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
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import pairwise
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
    """Mean, median, 90th and 10th percentile and number of some measurements.

    ``p10`` is ``None`` in records that were written before it was kept.
    """

    mean: float
    median: float
    p90: float
    count: int
    p10: float | None = field(default=None, compare=False)

    @staticmethod
    def of_some(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        found = Spread.of(values)
        assert found is not None
        return found

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """Of any number of values; ``None`` of none."""
        ordered = sorted(values)
        if not ordered:
            return None
        # Nearest rank: values that occurred.
        high, low = (max(0, -(-tenths * len(ordered) // 10) - 1) for tenths in (9, 1))
        return Spread(
            mean=statistics.fmean(ordered),
            median=statistics.median(ordered),
            p90=ordered[high],
            count=len(ordered),
            p10=ordered[low],
        )


# -- memory ------------------------------------------------------------------------------------
def reset_peak(device: torch.device | str) -> bool:
    """Start a new peak. Returns whether that was possible: always on a GPU, on a CPU where Linux
    lets a process reset its own peak of resident memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    before = _resident_peak()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    after = _resident_peak()
    return before is not None and after is not None and after <= before


def peak_memory(device: torch.device | str) -> int:
    """Peak bytes: allocated by tensors on a GPU since :func:`reset_peak`; on a CPU the resident
    memory of the process, since :func:`reset_peak` where that works, else since it started."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident_peak()
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_peak() -> int | None:
    """Peak resident bytes as Linux counts them; ``None`` elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


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


POWERCAP = Path("/sys/class/powercap")
"""Where Linux keeps the energy counters of processors (RAPL)."""


class CpuEnergyMeter:
    """Joules all processor packages have used, from RAPL's counters.

    They count what everything on the machine uses, not this process alone. Reading them needs
    rights that are often root's only; without any there is no figure.

    Args:
        folder: where the counters are.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._counters = _rapl_packages(folder)
        self._start = self._read()

    @property
    def available(self) -> bool:
        """Whether there are counters that can be read."""
        return self._start is not None

    def joules(self) -> float | None:
        """Since construction; ``None`` where nothing counts. A counter that has started anew from
        zero in between (once; each holds minutes to hours) is allowed for."""
        end = self._read()
        if end is None or self._start is None:
            return None
        used = 0
        for (_, span), first, last in zip(self._counters, self._start, end, strict=True):
            used += last - first if last >= first else last - first + span
        return used / 1e6

    def _read(self) -> list[int] | None:
        try:
            found = [int((path / "energy_uj").read_text()) for path, _ in self._counters]
        except (OSError, ValueError):
            return None
        return found or None


def _rapl_packages(folder: Path) -> list[tuple[Path, int]]:
    """Top-level RAPL zones (one a package) with the micro-joules after which each starts anew."""
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # parts of a package are in its figure already
            continue
        try:
            found.append((zone, int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return found


def energy_meter(device: torch.device | str) -> EnergyMeter | CpuEnergyMeter:
    """The counter that fits a device; it may turn out not to be ``available``."""
    if torch.device(device).type == "cuda":
        return EnergyMeter(device)
    return CpuEnergyMeter()


class PowerSampler:
    """Energy of a GPU by sampling its power, to check the counter against.

    A thread reads NVML's power while the ``with`` block runs; the area under the samples
    (trapezoids) is the energy.

    Args:
        device: the GPU; anything else gives no samples.
        period: seconds between samples.

    Attributes:
        samples: ``(seconds, watts)``.
    """

    def __init__(self, device: torch.device | str, period: float = 0.02) -> None:
        self._nvml, self._handle = _counter(torch.device(device))
        self._period = period
        self._device = device
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.samples: list[tuple[float, float]] = []

    def __enter__(self) -> PowerSampler:
        if self._handle is not None:
            now(self._device)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            now(self._device)
            self._done.set()
            self._thread.join()

    def _run(self) -> None:
        last = False
        while True:
            try:
                watts = self._watts()
            except self._nvml.NVMLError:
                return
            self.samples.append((time.perf_counter(), watts))
            if last:
                return
            last = self._done.wait(self._period)  # then one more sample, at the very end

    def _watts(self) -> float:
        """Power at this moment; where a GPU does not give that, its mean over the last second."""
        nvml = self._nvml
        field = getattr(nvml, "NVML_FI_DEV_POWER_INSTANT", None)
        if field is not None:
            found = nvml.nvmlDeviceGetFieldValues(self._handle, [field])[0]
            if found.nvmlReturn == nvml.NVML_SUCCESS:
                return float(found.value.uiVal) / 1000.0
        return nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000.0

    @property
    def joules(self) -> float | None:
        """Energy over the block; ``None`` without at least two samples."""
        return area(self.samples)

    @property
    def watts(self) -> float | None:
        """Mean power over the block."""
        joules = self.joules
        return joules / (self.samples[-1][0] - self.samples[0][0]) if joules is not None else None


def area(samples: Sequence[tuple[float, float]]) -> float | None:
    """Area under ``(seconds, watts)`` by trapezoids, in joules; ``None`` of fewer than two."""
    if len(samples) < 2:
        return None
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(samples))


def idle_power(device: torch.device | str, seconds: float = 1.0) -> float | None:
    """Watts drawn while nothing is done, over ``seconds``; ``None`` where nothing counts.

    A GPU's power is sampled (its counter moves in steps too coarse for a short look), a
    processor's comes from its counter.
    """
    if torch.device(device).type == "cuda":
        with PowerSampler(device) as sampler:
            time.sleep(seconds)
        return sampler.watts
    meter = CpuEnergyMeter()
    if not meter.available:
        return None
    start = time.perf_counter()
    time.sleep(seconds)
    joules = meter.joules()
    return joules / (time.perf_counter() - start) if joules is not None else None


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
