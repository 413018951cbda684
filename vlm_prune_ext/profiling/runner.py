"""Runs a grid: what is not in the log yet is measured and written there, cell by cell."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.experiment.host import cpu_name, host, now
from vlm_prune_ext.experiment.measure import idle_power
from vlm_prune_ext.experiment.metrics import require
from vlm_prune_ext.profiling.data import Folder
from vlm_prune_ext.profiling.grid import Cell, Optimization, Plan, groups, method_label
from vlm_prune_ext.profiling.loading import (
    Loaded,
    check_name,
    check_optimization,
    load_for,
    resolve_device,
)
from vlm_prune_ext.profiling.log import DONE, FAILED, Line, Log
from vlm_prune_ext.profiling.measuring import CellMeasurer, Result

LOG = "cells.jsonl"
Tracker = Callable[[Sequence[Cell], int], Iterator[Cell]]
"""Goes through cells and shows progress; the number is how many were done before."""


@dataclass(frozen=True)
class Outcome:
    """What a start did.

    Attributes:
        done: cells measured by this start.
        before: cells that were done already.
        failed: lines of cells that failed.
    """

    done: int
    before: int
    failed: list[Line]


def resolved(plan: Plan) -> Plan:
    """A plan with devices that are there.

    Raises:
        InputError: a device that is not there, an optimisation that one of them cannot do, a
            random model of an unknown shape, or a package that is not installed.
    """
    devices = list(dict.fromkeys(resolve_device(name) for name in plan.axes["device"]))
    for device in devices:
        for optimization in plan.axes["optimization"]:
            check_optimization(optimization, device)
    for name in plan.axes["model_name"]:
        check_name(name)
    require({"jiwer": "profile", "sacrebleu": "profile"})
    return Plan({**plan.axes, "device": devices}, plan.shared)


def cells_of(plan: Plan, folder: Folder) -> list[Cell]:
    """The cells of a resolved plan over the examples of a folder."""
    count = len(folder.examples)
    shared = {**plan.shared, "samples": min(plan.shared["samples"] or count, count)}
    names = {device: _processor(device) for device in plan.axes["device"]}
    return Plan(plan.axes, shared).cells(folder.digest, names)


def _processor(device: str) -> str:
    return torch.cuda.get_device_properties(device).name if device != "cpu" else cpu_name()


def run_cells(
    cells: Sequence[Cell],
    folder: Folder,
    out: Path,
    track: Tracker,
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
) -> Outcome:
    """Measure what is not in the log yet.

    Args:
        cells: the grid.
        folder: the examples.
        out: folder of the log.
        track: shows progress.
        say: prints a line about a cell that failed.
        trust_remote_code: see :func:`vlm_prune_ext.load`.

    Returns:
        what was done. Cells that failed are in the log with the reason; the others are done.

    Raises:
        InputError: the log cannot be read or written, or nothing at all could be measured.
    """
    log = Log(out / LOG)
    known = {line.key for line in log.read() if line.status == DONE}
    ordered = [cell for _, group in groups(cells) for cell in group]
    pending = [cell for cell in ordered if cell.key not in known]
    bench = _Bench(folder, log, trust_remote_code)
    failed: list[Line] = []
    for cell in track(pending, len(ordered) - len(pending)):
        line = bench.measure(cell)
        if line.status == FAILED:
            failed.append(line)
            say(f"Failed: {cell.label}: {line.why}")
    bench.close()
    done = len(pending) - len(failed)
    if failed and not done and len(pending) == len(ordered):
        raise InputError(f"No cell could be measured. The first: {failed[0].why}")
    return Outcome(done, len(ordered) - len(pending), failed)


class _Bench:
    """Holds one model at a time, and measures cells with it."""

    def __init__(self, folder: Folder, log: Log, trust_remote_code: bool) -> None:
        self.folder, self.log, self.trust = folder, log, trust_remote_code
        self._held: tuple[str, str, str] | None = None
        self._loaded: Loaded | None = None
        self._broken: Exception | None = None
        self._hosts: dict[str, dict[str, Any]] = {}

    def measure(self, cell: Cell) -> Line:
        """Measure a cell and write its line."""
        result: Result | None = None
        why = None
        where = self._host(cell.device)  # idle power is taken before a model is there
        try:
            self._hold(cell)
            assert self._loaded is not None
            idle = where["idle_watts"]
            result = CellMeasurer(self._loaded, cell, self.folder.examples, idle).measure()
        except torch.OutOfMemoryError:
            why = f"a batch of {cell.batch_size} does not fit into the memory of {cell.device}."
        except InputError as error:
            why = str(error)
        except Exception as error:  # whatever it is, the other cells are still to be measured
            why = reason_of(error)
        line = Line(
            key=cell.key,
            cell=cell.as_json(),
            label=method_label(cell.method),
            status=DONE if result is not None else FAILED,
            result=asdict(result) if result is not None else None,
            why=why,
            host={**where, "date": now()},
        )
        self.log.append(line)
        if why is not None:
            self._empty()
        return line

    def _hold(self, cell: Cell) -> None:
        """Load the model that a cell needs, unless it is held; a failure to load is kept too."""
        wanted = (cell.model_name, cell.device, cell.optimization)
        if wanted != self._held:
            self.close()
            self._held = wanted
            optimization = Optimization()
            if cell.optimization:
                optimization = Optimization.parse(cell.optimization)
            try:
                self._loaded = load_for(
                    cell.model_name, cell.device, optimization, trust_remote_code=self.trust
                )
            except Exception as error:
                self._broken = error.with_traceback(None)
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """Let go of the model."""
        self._held = self._loaded = self._broken = None
        self._empty()

    @staticmethod
    def _empty() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _host(self, device: str) -> dict[str, Any]:
        if device not in self._hosts:
            self._hosts[device] = host(device, idle_power(device))
        return self._hosts[device]
