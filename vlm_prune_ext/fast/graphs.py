"""A piece of work with fixed shapes, recorded once as a CUDA graph and replayed from then on.

A graph reads and writes the memory it was recorded with: callers copy inputs into buffers that
stay, and read outputs before the same work is replayed.

Recorded work has one shape, so cuDNN plans its attention once, and comes first: prefills of
LLaVA-1.5-7B in bf16 take 3 to 6 % less time than with FlashAttention-2 on an H200, and decode steps
5 to 15 % less than with the kernel that else takes their masks.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_prune_ext.engine.prune import steady_attention
from vlm_prune_ext.errors import first_line

Value = TypeVar("Value")
# Models record on one stream per device, with one collector and one choice of attention kernels.
_recording = threading.Lock()


class RecordingError(RuntimeError):
    """CUDA could not record a piece of work."""


class Recorder:
    """What all recordings of a model share.

    Args:
        device: where the model is.
        capture: record CUDA graphs; otherwise every call runs the work as it is (on a CPU, or to
            look for a fault).
        around: what is around work that is being recorded.

    Attributes:
        count: recordings made so far; seconds: how long they took, warm-up included.
    """

    def __init__(
        self,
        device: torch.device,
        capture: bool,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.device, self.capture, self.around = device, capture, around
        self.count, self.seconds = 0, 0.0
        # Recordings never run at the same time and their outputs are read at once, so what one
        # needs in between can be the memory of another.
        self.pool = torch.cuda.graph_pool_handle() if capture else None


class Recorded:
    """One piece of work, recorded when it is called for the second time: what comes only once (an
    odd length of prompt) runs as it is, with the same kernels, which takes half as long.

    It never holds the work, whose owner holds it: in a circle, both would keep their memory until
    Python's collector comes by.

    Args:
        recorder: shared by the model's recordings.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.graph: Any = None
        self.output: Any = None
        self._met = False

    def __call__(self, work: Callable[[], Any], changes: Sequence[torch.Tensor] = ()) -> Any:
        """Do the work. What it returns is overwritten by the next call.

        Args:
            work: always the same; takes nothing, returns tensors; shapes, and every Python value
                in it, are fixed.
            changes: buffers that ``work`` itself changes.
        """
        if not self.recorder.capture:
            self._count()
            return self._run(work)
        if not self._met:
            self._met = True
            return self._run(work)
        if self.graph is None:
            try:
                with _recording:
                    self._record(work, changes)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                said = first_line(error)
                raise RecordingError(f"CUDA could not record it ({said})") from error
        self.graph.replay()
        return self.output

    def _count(self) -> None:
        if self.graph is None:
            self.graph = True
            self.recorder.count += 1

    def _run(self, work: Callable[[], Any]) -> Any:
        if not self.recorder.capture:
            with steady_attention():
                return work()
        with fixed_shape_attention(), self.recorder.around():
            return work()

    def _record(self, work: Callable[[], Any], changes: Sequence[torch.Tensor]) -> None:
        device, aside = self.recorder.device, _side_stream(self.recorder.device)
        began = time.perf_counter()
        before = [buffer.clone() for buffer in changes]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            self._run(work)  # libraries allocate, and choose kernels, in the first run
            for buffer, value in zip(changes, before, strict=True):
                buffer.copy_(value)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads (of a data loader, say) may use the device meanwhile.
        with (
            _no_collection(),
            torch.cuda.graph(
                graph, pool=self.recorder.pool, stream=aside, capture_error_mode="thread_local"
            ),
        ):
            self.output = self._run(work)
        self.graph = graph
        self.recorder.count += 1
        self.recorder.seconds += time.perf_counter() - began


@contextmanager
def fixed_shape_attention() -> Iterator[None]:
    """cuDNN first, where it can, for work whose shapes stay as they are."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector keeps out: letting go of somebody's old recording ends the one that is
    being made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that recording happens on: always the same, since matrix products keep a work
    space of tens of MiB for each stream they ever ran on."""
    return torch.cuda.Stream(device)


class Mark:
    """A moment in a device's work, which is not waited for before it is asked for.

    Args:
        device: on a GPU the moment at which it has done what is queued now.
    """

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def since(self, earlier: Mark) -> float:
        """Seconds between two of one device."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class LRU(Generic[Value]):
    """The last few things that were made, by key.

    Args:
        room: how many; the one that was not used for longest goes first.
        on_removal: called with each that goes.
    """

    def __init__(self, room: int, on_removal: Callable[[Value], None] | None = None) -> None:
        self.room, self.on_removal = room, on_removal
        self._items: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What is there under ``key``, or is made now."""
        if key not in self._items:
            while len(self._items) >= self.room:
                self._remove(next(iter(self._items)))
            self._items[key] = make()
        self._items.move_to_end(key)
        return self._items[key]

    def drop_where(self, test: Callable[[Value], bool]) -> None:
        """Let go of what passes a test."""
        for key in [key for key, item in self._items.items() if test(item)]:
            self._remove(key)

    def _remove(self, key: Hashable) -> None:
        item = self._items.pop(key)
        if self.on_removal is not None:
            self.on_removal(item)


class Arena:
    """Memory that recorded pieces take turns with: blocks by name.

    Many pieces are recorded, one for each length of prompt, and each works on the addresses it was
    recorded with. With memory of its own for each, hundreds of lengths would take hundreds of KV
    caches. So all of a kind are views of one block, as large as the largest needed so far. What two
    pieces keep there cannot be kept at the same time.

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
