"""Cells of an experiment, and the processes that work through them.

A cell is one combination of settings. Cells of one group share what is expensive to make, a loaded
model; a worker that holds it is given the group's other cells first. What was done is in the log,
so an interrupted grid goes on where it stopped; a worker that dies costs its cell a retry, never
the grid.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.experiment.log import Log, object_of
from vlm_prune_ext.experiment.record import digest

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


@dataclass(frozen=True)
class Cell:
    """One combination of settings.

    Attributes:
        settings: plain values: everything that decides the result.
        group: the same for cells that one loaded model serves.
        label: in short, for progress and messages.
    """

    settings: Mapping[str, Any]
    group: str = ""
    label: str = ""

    @property
    def key(self) -> str:
        """The same for equal settings only."""
        return digest(self.settings)


@dataclass(frozen=True)
class Line:
    """What became of a cell: a line of the grid's log.

    Attributes:
        key: of the cell.
        cell: its settings.
        label: the cell's.
        status: ``"done"``, ``"failed"`` or ``"skipped"``.
        result: of a cell that is done, plain values.
        why: of one that is not.
        host: hardware, versions and the like, with the date.
    """

    key: str
    cell: dict[str, Any]
    label: str
    status: str
    result: dict[str, Any] | None = None
    why: str | None = None
    host: dict[str, Any] = field(default_factory=dict)


Job = Callable[[Cell], Mapping[str, Any]]
"""Does a cell; what it returns is the line's result. An entry ``"host"`` goes to the line's."""


def product(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations of the axes' values, the first axis outermost."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def read_lines(log: Log) -> dict[str, Line]:
    """The last line of each cell that a grid's log has."""
    found: dict[str, Line] = {}
    for entry in log.read():
        line = object_of(Line, entry)
        if line is not None:  # else of another command
            found[line.key] = line
    return found


def run(
    cells: Sequence[Cell],
    make_job: Callable[..., Job],
    arguments: tuple[Any, ...] = (),
    *,
    workers: int = 0,
    log: Log | None = None,
    retries: int = 1,
    output: Path | None = None,
    fresh: bool = False,
    watch: Callable[[Sequence[Cell]], None] | None = None,
) -> Iterator[Line]:
    """Do the cells, and yield a line for each as it is done.

    Args:
        cells: in order; those that ``log`` has as done are not done again.
        make_job: called once per process with ``arguments``; returns what does cells. Both are
            pickled where there are workers.
        workers: processes (0: this one, one cell after the other).
        log: takes the lines.
        retries: how often a cell is tried again whose process died.
        output: folder for what each worker prints (``process-1.log``...).
        fresh: a new process for each cell, so that all memory of the one before is free.
        watch: called with the cells that are being done when one begins, and then a few times a
            second (without workers: before each).

    Raises:
        InputError: the log cannot be written. What a job raises fails its cell only, but for
            ``KeyboardInterrupt`` and ``SystemExit``.
    """
    known = read_lines(log) if log is not None else {}
    done = {key for key, line in known.items() if line.status == DONE}
    for cell in cells:
        if cell.key in done:
            yield known[cell.key]
    pending = [cell for cell in cells if cell.key not in done]
    if workers:
        lines = _pooled(
            pending, make_job, arguments, workers, retries, output, fresh, watch or _unseen
        )
    else:
        lines = _here(pending, make_job(*arguments), watch or _unseen) if pending else iter(())
    for line in lines:
        if log is not None:
            log.append(vars(line))
        yield line


Watch = Callable[[Sequence[Cell]], None]
_POLL = 0.2  # seconds between two looks at what workers do


def _unseen(cells: Sequence[Cell]) -> None:
    """Nobody watches."""


def _here(cells: Sequence[Cell], job: Job, watch: Watch) -> Iterator[Line]:
    for cell in cells:
        watch([cell])
        yield do(cell, job)


_slot = 0


def slot() -> int:
    """Which of the workers that are there at the same time this process is, from 0: what it takes
    its device by."""
    return _slot


def take_slot(number: int) -> None:
    """Say which worker this process is, where somebody else started it."""
    global _slot
    _slot = number


def do(cell: Cell, job: Job, *, tell: bool = False) -> Line:
    """Do one cell; whatever goes wrong with it is in the line, and where it did is told on standard
    error if that is a file."""
    try:
        result = dict(job(cell))
    except InputError as error:
        return line_of(cell, FAILED, why=str(error))
    except Exception as error:  # the other cells are still to be done
        if tell:
            traceback.print_exc()
        return line_of(cell, FAILED, why=reason_of(error))
    host = result.pop("host", {})
    return line_of(cell, DONE, result=result, host=host)


def line_of(cell: Cell, status: str, **more: Any) -> Line:
    """A line about a cell, dated."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    host = {**more.pop("host", {}), "date": date}
    return Line(cell.key, dict(cell.settings), cell.label, status, host=host, **more)


class Held:
    """One expensive thing at a time, such as a loaded model.

    Args:
        load: name -> the thing.
    """

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._name: str | None = None
        self._thing: Any = None
        self._error: Exception | None = None

    def __call__(self, name: str) -> Any:
        """The thing of this name; another one is let go of first. What could not be loaded is not
        tried again for each of its cells."""
        if name != self._name:
            self.release()
            self._name = name
            try:
                self._thing = self._load(name)
            except Exception as error:
                self._error = error.with_traceback(None)
        if self._error is not None:
            raise self._error
        return self._thing

    def release(self) -> None:
        """Let go of it, and of the GPU's memory that it had."""
        self._name = self._thing = self._error = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- processes -------------------------------------------------------------------------------------
class _Worker:
    """A process that does cells, one at a time."""

    def __init__(
        self,
        number: int,
        slot: int,
        make_job: Callable[..., Job],
        arguments: tuple[Any, ...],
        output: Any,
    ) -> None:
        self.slot = slot
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, number, slot, make_job, arguments, output), daemon=False
        )
        self.process.start()
        theirs.close()
        self.signs = (self.pipe, self.process.sentinel)
        self.cell: Cell | None = None
        self.group: str | None = None

    def give(self, cell: Cell) -> None:
        """Hand it a cell."""
        self.cell, self.group = cell, cell.group
        self.pipe.send(cell)

    def take(self) -> Line | None:
        """The line of the cell it was given; ``None``: it died over it."""
        try:
            line = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            line = None
        if line is None:
            return None
        self.cell = None
        return line

    def end(self, *, at_once: bool) -> None:
        """See to it that it is gone."""
        self.pipe.close()  # an idle one ends by itself
        if at_once:
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(
    pipe: Any,
    number: int,
    slot: int,
    make_job: Callable[..., Job],
    arguments: tuple[Any, ...],
    output: Any,
) -> None:
    """The life of a worker: cells in, lines out, until nobody is at the other end."""
    global _slot
    _slot = slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if output is not None:
        file = (Path(output) / f"process-{number}.log").open("a", buffering=1)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    job: Job | None = None
    while True:
        try:
            cell = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if job is None:
                job = make_job(*arguments)
        except Exception as error:
            pipe.send(line_of(cell, FAILED, why=reason_of(error)))
            continue
        pipe.send(do(cell, job, tell=output is not None))


def _end_with_parent() -> None:
    """A worker whose first process was killed must not go on with, and hold, what is another
    run's by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _pooled(
    cells: Sequence[Cell],
    make_job: Callable[..., Job],
    arguments: tuple[Any, ...],
    count: int,
    retries: int,
    output: Path | None,
    fresh: bool,
    watch: Watch,
) -> Iterator[Line]:
    waiting, tries = list(cells), dict.fromkeys((cell.key for cell in cells), 0)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count(1)
    workers: list[_Worker] = []
    at_once = True
    try:
        while waiting or any(worker.cell for worker in workers):
            idle = [worker for worker in workers if worker.cell is None]
            while waiting and (idle or len(workers) < count):
                if not idle:
                    free = min(set(range(count)) - {worker.slot for worker in workers})
                    idle.append(_Worker(next(numbers), free, make_job, arguments, output))
                    workers.append(idle[-1])
                worker = idle.pop()
                worker.give(waiting.pop(next_cell(waiting, worker.group)))
            busy = [worker for worker in workers if worker.cell is not None]
            watch([worker.cell for worker in busy if worker.cell is not None])
            for worker in _ready(busy, None if watch is _unseen else _POLL):
                cell, line = worker.cell, worker.take()
                assert cell is not None
                if line is not None:
                    if fresh:
                        worker.end(at_once=False)
                        workers.remove(worker)
                    yield line
                    continue
                worker.end(at_once=True)
                workers.remove(worker)
                tries[cell.key] += 1
                if tries[cell.key] <= retries:
                    waiting.insert(0, cell)
                else:
                    yield line_of(cell, FAILED, why=how_it_ended(worker.process.exitcode))
        at_once = False
    finally:
        for worker in workers:
            worker.end(at_once=at_once)


def _ready(workers: Sequence[_Worker], timeout: float | None) -> list[_Worker]:
    """Those that have said something, or are gone. (Processes of a worker's own may keep its end
    of the pipe open, so the pipe alone does not tell.)"""
    signs = {id(sign): worker for worker in workers for sign in worker.signs}
    ready = multiprocessing.connection.wait([s for w in workers for s in w.signs], timeout)
    return list({id(w): w for w in (signs[id(sign)] for sign in ready)}.values())


def next_cell(waiting: Sequence[Cell], group: str | None) -> int:
    """The next cell of the group that a worker holds; else the first there is."""
    mine = (i for i, cell in enumerate(waiting) if cell.group == group)
    return next(mine, 0)


def how_it_ended(code: int | None) -> str:
    """Why a process is gone that should not be."""
    if code is not None and code < 0:
        hint = " (often: main memory ran out)" if code == -9 else ""
        return f"its process was ended by signal {-code}{hint}"
    return f"its process ended with exit code {code}"
