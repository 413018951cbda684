"""Runs a grid: what is not in the log yet is measured and written there, cell by cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.examples import Data
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.grid import Line
from vlm_prune_ext.experiment.host import cpu_name, host
from vlm_prune_ext.experiment.log import Log, lock, put_aside
from vlm_prune_ext.experiment.measure import idle_power
from vlm_prune_ext.experiment.metrics import require
from vlm_prune_ext.experiment.record import digest
from vlm_prune_ext.experiment.settings import method_as_json, method_of
from vlm_prune_ext.models import device_of
from vlm_prune_ext.profiling.grid import AXES, Optimization, ProfileSettings
from vlm_prune_ext.profiling.loading import (
    Loaded,
    check_name,
    check_optimization,
    load_for,
)
from vlm_prune_ext.profiling.measuring import CellMeasurer
from vlm_prune_ext.profiling.report import LOG, failed_text

Tracker = Callable[[Iterator[Line], int, int], Iterator[Line]]
"""Passes lines on and shows progress; the numbers are of all cells, and of those done before."""


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


def resolved(said: ProfileSettings) -> ProfileSettings:
    """Settings with devices that are there.

    Raises:
        InputError: a device that is not there, an optimisation that one of them cannot do, a
            random model of an unknown shape, or a package that is not installed.
    """
    devices = list(dict.fromkeys(str(device_of(name)) for name in said.device))
    for device in devices:
        for optimization in said.optimization:
            check_optimization(optimization, device)
    for name in said.model_name:
        check_name(name)
    require({"jiwer": "profile", "sacrebleu": "profile"})
    return replace(said, device=devices)


SHARED = ("samples", "repeat", "warmup", "max_new_tokens", "seed", "energy_seconds")
"""Settings that all cells share."""


def cells_of(said: ProfileSettings, data: Data) -> list[grid.Cell]:
    """All combinations of resolved settings over a folder's examples, each once, those that one
    loaded model serves together."""
    count = len(data.rows)
    shared = {name: getattr(said, name) for name in SHARED}
    # Cells of other sizes of pictures are others; those of earlier profiles keep their names.
    shared |= {name: value for name, value in said.load().items() if name.endswith("_pixels")}
    shared |= {"samples": min(said.samples or count, count), "data": digest(data.digests())}
    found: dict[str, grid.Cell] = {}
    for own in grid.product({name: getattr(said, name) for name in AXES}):
        label = own["method"].label() if own["method"] is not None else "none"
        own["method"] = method_as_json(own["method"])
        own["optimization"] = str(own["optimization"])
        group = json.dumps([own["model_name"], own["device"], own["optimization"]])
        own |= {**shared, "processor": _processor(own["device"])}
        cell = grid.Cell(own, group, label)
        found.setdefault(cell.key, cell)
    groups = list(dict.fromkeys(cell.group for cell in found.values()))
    return sorted(found.values(), key=lambda cell: groups.index(cell.group))


@cache
def _processor(device: str) -> str:
    return torch.cuda.get_device_properties(device).name if device != "cpu" else cpu_name()


def run_cells(
    cells: Sequence[grid.Cell],
    data: Data,
    out: Path,
    track: Tracker,
    say: Callable[[str], None],
    *,
    load: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Outcome:
    """Measure what is not in the log yet, one cell after the other: cells that share a machine
    would be in each other's figures.

    Args:
        cells: the grid.
        data: the examples.
        out: folder of the log.
        track: shows progress.
        say: prints a line about a cell that failed.
        load: further arguments of :func:`vlm_prune_ext.load`.
        fresh: what is in ``out`` is put aside first.

    Returns:
        what was done. Cells that failed are in the log with the reason; the others are done.

    Raises:
        InputError: the log cannot be read or written, another run writes it, or nothing at all
            could be measured.
    """
    with lock(out):
        if fresh:
            put_aside(out)
        log = Log(out / LOG)
        known = {key for key, line in grid.read_lines(log).items() if line.status == grid.DONE}
        pending = [cell for cell in cells if cell.key not in known]
        before = len(cells) - len(pending)
        lines = grid.run(pending, make_job, (data, dict(load or {})), log=log)
        failed: list[Line] = []
        for line in track(lines, len(cells), before):
            if line.status == grid.FAILED:
                failed.append(line)
                say(f"Failed: {failed_text(line)}")
    done = len(pending) - len(failed)
    if failed and not done and not before:
        raise InputError(f"No cell could be measured. The first: {failed[0].why}")
    return Outcome(done, before, failed)


def make_job(data: Data, given: dict[str, Any]) -> grid.Job:
    """What measures cells over the examples, one loaded model at a time."""

    def load(group: str) -> Loaded:
        name, device, how = json.loads(group)
        return load_for(name, device, Optimization.parse(how), **given)

    held, hosts = grid.Held(load), dict[str, dict[str, Any]]()

    def job(cell: grid.Cell) -> dict[str, Any]:
        own = SimpleNamespace(**{**cell.settings, "method": method_of(cell.settings["method"])})
        if own.device not in hosts:  # idle power is taken before a model is there
            held.release()
            hosts[own.device] = host(own.device, idle_power(own.device))
        where = hosts[own.device]
        try:
            measurer = CellMeasurer(held(cell.group), own, data.rows, where["idle_watts"])
            return {**asdict(measurer.measure()), "host": where}
        except torch.OutOfMemoryError:
            raise InputError(
                f"a batch of {own.batch_size} does not fit into the memory of {own.device}."
            ) from None

    return job
