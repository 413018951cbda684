"""Measuring: time, memory and energy of a model that works on a device.

One name for each quantity, everywhere in this package:

- *latency*: seconds of a whole ``generate`` call on a prepared batch;
- *TTFT* (time to first token): of these, until the scores of the first new token;
- *decode*: the rest; *TPOT* (time per output token): decode over the further steps;
- *vision* / *prefill*: the parts of TTFT in and behind the vision modules;
- *peak memory*: bytes, see :func:`peak_memory`;
- *energy*: joules, see :class:`EnergyMeter`;
- *roofline*: the least time that a device allows, see :class:`Roofline`.

Work on a GPU is queued: a clock that is read without waiting for the queue measures how fast
Python is. Everything here waits first. Nothing here changes what a model computes.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

from vlm_prune_ext.experiment.record import Spread

GPU_WARM_UP = 1.0  # seconds; an idle GPU runs at a fraction of its clocks


# -- time --------------------------------------------------------------------------------------
def now(device: torch.device | str | None = None) -> float:
    """Seconds on a steady clock, once everything queued on ``device`` is done."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TokenClock(LogitsProcessor):
    """Splits the time of a ``generate`` call at its first new token.

    Given to ``generate`` as a logits processor, it sees the scores of every new token and returns
    them untouched; the model gets no hook. The device is waited for at the first token only (and
    at the end), so decoding is not slowed down.

    >>> clock = TokenClock(model.device)                                      # doctest: +SKIP
    >>> model.generate(**inputs, logits_processor=[clock]); clock.stop()      # doctest: +SKIP

    Args:
        device: where the model computes its scores.
        at_first: called when the scores of the first new token are there.

    Attributes:
        steps: tokens seen.
    """

    def __init__(
        self, device: torch.device | str, at_first: Callable[[], object] | None = None
    ) -> None:
        self.device, self._at_first = torch.device(device), at_first
        self.steps = 0
        self._first: float | None = None
        self._end: float | None = None
        self._start = now(self.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``(batch, vocabulary)``, as they came."""
        if self._first is None:
            self._first = now(self.device)
            if self._at_first is not None:
                self._at_first()
        self.steps += 1
        return scores

    def stop(self) -> None:
        """Read the clock for the last time."""
        self._end = now(self.device)

    @property
    def ttft(self) -> float:
        """Seconds from construction to the scores of the first new token."""
        return (self._first if self._first is not None else self._start) - self._start

    @property
    def decode(self) -> float:
        """Seconds from the first new token to :meth:`stop`."""
        if self._first is None or self._end is None:
            return 0.0
        return self._end - self._first

    @property
    def latency(self) -> float:
        """Seconds of the whole call."""
        return self.ttft + self.decode

    @property
    def tpot(self) -> float | None:
        """Seconds of decoding for each further step of the batch; ``None`` where there was none."""
        return self.decode / (self.steps - 1) if self.steps > 1 else None


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
    warm(call, warm_up)
    timed = _on_gpu if device.type == "cuda" else _on_cpu
    return Spread.of_some([timed(call, device) for _ in range(repeat)])


def warm(call: Callable[[], Any], runs: int, seconds: float = 0.0) -> None:
    """Do something ``runs`` times, and on until ``seconds`` are over."""
    began, done = time.perf_counter(), 0
    while done < runs or time.perf_counter() - began < seconds:
        call()
        done += 1


def _on_gpu(call: Callable[[], Any], device: torch.device) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000.0


def _on_cpu(call: Callable[[], Any], _: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def stopwatch(
    modules: Sequence[torch.nn.Module], device: torch.device | str
) -> Iterator[Callable[[], float]]:
    """Seconds spent in some modules, the device waited for in front of each and behind it: this
    slows the model down, so nothing else is to be timed in the same run."""
    spent: list[float] = []
    entered: list[float] = []
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_: entered.append(now(device))))
        handles.append(
            module.register_forward_hook(lambda *_: spent.append(now(device) - entered.pop()))
        )
    try:
        yield lambda: sum(spent)
    finally:
        for handle in handles:
            handle.remove()


# -- the roofline --------------------------------------------------------------------------------
# A prefill is bound by arithmetic: its FLOPs over the rate of a large matrix product. A decoded
# token of a small batch is bound by reading the weights (and the KV cache) once: their bytes over
# the rate of a large copy. Neither can be beaten without doing less.
@dataclass(frozen=True)
class Roofline:
    """Rates of a device.

    Attributes:
        flops: FLOP/s of a large matrix product.
        bytes: bytes/s of a large copy, reading and writing counted.
        dtype: of the product, as text.
    """

    flops: float
    bytes: float
    dtype: str

    def prefill_seconds(self, flops: float) -> float:
        """Of a prefill at least: its arithmetic."""
        return flops / self.flops

    def token_seconds(self, weight_bytes: float) -> float:
        """Of a token at least: the weights are read."""
        return weight_bytes / self.bytes


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a matrix product (8,192 a side on a GPU, 2,048 on a CPU, or 256 where its kernels for
    the type are slow) and a copy (2 GiB; 256 MiB)."""
    on_gpu = device.type == "cuda"
    numbers = 1 << 30 if on_gpu else 1 << 26
    flops = _product_flops(8192 if on_gpu else 256, device, dtype)
    if not on_gpu and flops > 1e10:
        flops = _product_flops(2048, device, dtype)
    source = torch.zeros(numbers, dtype=torch.float16 if on_gpu else torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, repeat=7)
    moved = 2.0 * source.numel() * source.element_size()
    return Roofline(flops, moved / seconds.median, str(dtype).removeprefix("torch."))


def _product_flops(side: int, device: torch.device, dtype: torch.dtype) -> float:
    left = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(left)
    seconds = seconds_of(lambda: torch.mm(left, left, out=product), device, repeat=7)
    return 2.0 * side**3 / seconds.median


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


SETTLE = 10.0
"""Seconds that a driver is given to take back what an ended process had."""


def used_memory() -> dict[str, int] | None:
    """Bytes in use by GPU, all processes together, read from outside of CUDA; ``None`` where there
    is no NVML or no GPU. Only the GPUs that ``CUDA_VISIBLE_DEVICES`` names are read."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        found = {name: int(nvml.nvmlDeviceGetMemoryInfo(h).used) for name, h in _visible(nvml)}
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
    return found or None


def settled_memory(start: dict[str, int] | None) -> dict[str, int] | None:
    """Like :func:`used_memory`, once it is back to ``start`` or :data:`SETTLE` seconds are over."""
    end = time.monotonic() + SETTLE
    while True:
        found = used_memory()
        if found is None or start is None or time.monotonic() > end:
            return found
        if all(found.get(name, 0) <= used for name, used in start.items()):
            return found
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


def _nvml() -> Any:
    """The module ``pynvml``, ready (of ``nvidia-ml-py``); ``None`` without it or a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


# -- energy ------------------------------------------------------------------------------------
POWERCAP = Path("/sys/class/powercap")
"""Where Linux keeps the energy counters of processors (RAPL)."""


class EnergyMeter:
    """Joules from a hardware counter: a GPU's own (NVML), or all processor packages' (RAPL).

    RAPL counts what everything on the machine uses, not this process alone, and reading it needs
    rights that are often root's only. Where nothing counts there is no figure, never 0.

    Args:
        device: what does the work.
        processors: where processors' counters are; ``None``: a GPU's only (of several processes
            on one machine each would count what all of them use).
    """

    def __init__(self, device: torch.device | str, processors: Path | None = POWERCAP) -> None:
        self._device = torch.device(device)
        self._gpu = _gpu_counter(self._device)
        on_gpu = self._device.type == "cuda"
        self._packages = [] if on_gpu or processors is None else _rapl_packages(processors)
        self._start = self._read()

    @property
    def available(self) -> bool:
        """Whether something counts."""
        return self._start is not None

    def joules(self) -> float | None:
        """Since construction; ``None`` where nothing counts. A processor's counter that has started
        anew from zero in between (once; each holds minutes to hours) is allowed for."""
        end = self._read()
        if end is None or self._start is None:
            return None
        spans = [span for _, span in self._packages] or [0]
        pairs = zip(spans, self._start, end, strict=True)
        used = (last - first + (span if last < first else 0) for span, first, last in pairs)
        return sum(used) / 1e6

    def _read(self) -> list[int] | None:
        """Micro-joules of each counter."""
        nvml, handle = self._gpu
        if handle is not None:
            now(self._device)
            try:
                return [1000 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle)]
            except nvml.NVMLError:
                return None
        try:
            return [int((zone / "energy_uj").read_text()) for zone, _ in self._packages] or None
        except (OSError, ValueError):
            return None


def _gpu_counter(device: torch.device) -> tuple[Any, Any]:
    """NVML and a GPU's handle in it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, None
    nvml = _nvml()
    if nvml is None:
        return None, None
    try:
        # CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's: the UUID is what they share.
        uuid = torch.cuda.get_device_properties(device).uuid
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (nvml.NVMLError, AttributeError):
        return None, None


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
        self._nvml, self._handle = _gpu_counter(torch.device(device))
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
    meter = EnergyMeter(device)
    if not meter.available:
        return None
    start = time.perf_counter()
    time.sleep(seconds)
    joules = meter.joules()
    return joules / (time.perf_counter() - start) if joules is not None else None


@dataclass(frozen=True)
class Energy:
    """Joules per example; all ``None`` where nothing counts.

    Attributes:
        counted: by the hardware's counter.
        sampled: the area under sampled power in the same runs (GPUs only).
        above_idle: counted, less what idling would have used in that time.
        seconds: how long was measured.
        examples: in that time.
    """

    counted: float | None = None
    sampled: float | None = None
    above_idle: float | None = None
    seconds: float | None = None
    examples: int | None = None


def energy_of(
    call: Callable[[], Any],
    device: torch.device | str,
    *,
    examples: int,
    seconds: float,
    idle: float | None = None,
) -> Energy:
    """Energy of a call, repeated for long enough that the counter moves (every 20 ms or so).

    Args:
        call: what to do again and again.
        device: where it works.
        examples: that one call answers.
        seconds: how long at least; 0: not at all.
        idle: watts at idle, if known.
    """
    if not seconds or not EnergyMeter(device).available:
        return Energy()
    with PowerSampler(device) as sampler:
        start, meter, runs = now(device), EnergyMeter(device), 0
        while not runs or now(device) - start < seconds:
            call()
            runs += 1
        joules, spent = meter.joules(), now(device) - start
    if joules is None:
        return Energy()
    count = runs * examples
    return Energy(
        counted=joules / count,
        sampled=sampler.joules / count if sampler.joules is not None else None,
        above_idle=(joules - idle * spent) / count if idle is not None else None,
        seconds=spent,
        examples=count,
    )
