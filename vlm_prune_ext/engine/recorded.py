"""A piece of work with fixed shapes, recorded once as a CUDA graph and replayed from then on.

A graph reads and writes the memory it was recorded with: callers copy inputs into buffers that
stay, and read outputs before the same work is replayed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

from vlm_prune_ext.engine.kernels import fixed_shape_attention, steady_attention

WARM_UPS = 2  # libraries allocate and choose kernels in the first runs

Value = TypeVar("Value")


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
    """Work that is recorded when it is first called.

    Args:
        work: takes nothing, returns tensors; shapes, and every Python value in it, are fixed.
        recorder: shared by the model's recordings.
        reset: puts buffers that ``work`` itself changes back as they were.
    """

    def __init__(
        self, work: Callable[[], Any], recorder: Recorder, reset: Callable[[], None] | None = None
    ) -> None:
        self.work, self.recorder, self.reset = work, recorder, reset
        self.graph: Any = None
        self.output: Any = None

    def __call__(self) -> Any:
        """Do the work. What it returns is overwritten by the next call."""
        if not self.recorder.capture:
            self._count()
            return self._run()
        if self.graph is None:
            try:
                self._record()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                said = str(error).strip().split("\n")[0]
                raise RecordingError(f"CUDA could not record it ({said})") from error
        self.graph.replay()
        return self.output

    def _count(self) -> None:
        if self.graph is None:
            self.graph = True
            self.recorder.count += 1

    def _run(self) -> Any:
        if not self.recorder.capture:
            with steady_attention():
                return self.work()
        with fixed_shape_attention(), self.recorder.around():
            return self.work()

    def _record(self) -> None:
        device, aside = self.recorder.device, _side_stream(self.recorder.device)
        began = time.perf_counter()
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._run()
                if self.reset is not None:
                    self.reset()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads (of a data loader, say) may use the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self.recorder.pool, stream=aside, capture_error_mode="thread_local"
        ):
            self.output = self._run()
        self.graph = graph
        self.recorder.count += 1
        self.recorder.seconds += time.perf_counter() - began


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that recording happens on: always the same, since matrix products keep a work
    space of tens of MiB for each stream they ever ran on."""
    return torch.cuda.Stream(device)


class Shelf(Generic[Value]):
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
