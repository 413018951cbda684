"""Many runs as one grid: models x methods x budgets x data, side by side in one table.

Each checkpoint is loaded once per process and methods are swapped on it. A cell is a run as
``run_vlmeval.py`` makes it, in a folder of its own, so a sweep goes on from whatever is there; the
tables and pictures are made from these folders' result files alone.

Two processes share the work on a CPU with two cores or more, each with one thread: at the size of
the demo model that is faster than one process with two. On GPUs each has a worker. Under torchrun
or accelerate each of their processes is a worker, and takes every so-manieth cell.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.choices import Choice, choices_of
from vlm_prune_ext.evals.names import run_name, table_name, task_file
from vlm_prune_ext.experiment import grid, report, show
from vlm_prune_ext.experiment.comparison import by_setting, failures, summary_table
from vlm_prune_ext.experiment.grid import FAILED, SKIPPED, Cell, Held, Line, line_of, slot
from vlm_prune_ext.experiment.log import Log, lock, write_json
from vlm_prune_ext.experiment.published import published_table
from vlm_prune_ext.experiment.record import Record
from vlm_prune_ext.experiment.report import Line as Curve
from vlm_prune_ext.experiment.report import line_plot
from vlm_prune_ext.experiment.results import LOG, Results, Run, read
from vlm_prune_ext.experiment.settings import MODEL, Settings, resolve


# -- cells -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Cells to run, in order; lines about those that cannot be; and what readers of the folder are
    to know of each, by its key: ``budget`` and ``folder``."""

    cells: list[Cell]
    skipped: list[Line]
    more: dict[str, dict[str, str]]

    def as_json(self) -> list[dict[str, Any]]:
        """For the log: what the folder's reader knows of cells that are not done."""
        plain = [{"key": c.key, "cell": dict(c.settings), "label": c.label} for c in self.cells]
        plain += [{"key": s.key, "cell": s.cell, "label": s.label} for s in self.skipped]
        return [{**one, **self.more[str(one["key"])]} for one in plain]


def plan(
    base: Settings,
    models: Sequence[str | None],
    choices: Callable[[Any], Sequence[Choice]],
) -> Plan:
    """All combinations of models, the data of ``base`` and methods, in this order.

    Args:
        base: what all cells share, their data sets among it.
        models: checkpoints; ``None`` is the demo's.
        choices: methods for a checkpoint.

    Raises:
        InputError: checkpoints that are not there. A method that does not fit one is skipped.
    """
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.evals.precheck import check_fit, check_stated
    from vlm_prune_ext.models.catalogue import PICTURES, VIDEOS
    from vlm_prune_ext.models.checkpoint import Checkpoint, check_trust

    def why_not(model: str | None, source: Checkpoint, choice: Choice) -> str:
        try:
            if model is None:  # all that matters is stated, and transformers need not be imported
                check_stated(source.folder, choice.method)
            else:
                check_fit(source, choice.method)
        except InputError as error:
            return str(error)
        return choice.why

    sources = _all_of([lambda m=m: Checkpoint(m or str(CHECKPOINT)) for m in models])  # type: ignore[misc]
    made = Plan([], [], {})
    for model, source in zip(models, sources, strict=True):
        check_trust(source, base.trust_remote_code)
        if any(base.as_json().get(name) is not None for name in (*PICTURES, *VIDEOS)):
            from vlm_prune_ext.models.adapters import check_pictures

            check_pictures(source, base.as_json())
        chosen = list(choices(source))
        reasons = [why_not(model, source, choice) for choice in chosen]
        for name in base.data:
            for choice, why in zip(chosen, reasons, strict=True):
                seed = getattr(choice.method, "seed", base.seed)
                one = replace(base, model_path=model, method=choice.method, data=(name,), seed=seed)
                if why:
                    plain = {**one.as_json(), "asked": choice.text}
                    plain["method"] = {"name": choice.text.partition(":")[0]}
                    cell = Cell(plain, label=choice.text)
                    made.skipped.append(line_of(cell, SKIPPED, why=why))
                else:
                    cell = cell_of(one)
                    made.cells.append(cell)
                data = table_name(name)
                where = f"{run_name(model, choice.method)}_{data}"
                made.more[cell.key] = {"budget": choice.budget, "folder": where, "data": data}
    return made


def _all_of(makers: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each makes; everything that is wrong is said in one go."""
    found, wrong = [], []
    for make in makers:
        try:
            found.append(make())
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(dict.fromkeys(wrong)))
    return found


def cell_of(settings: Settings) -> Cell:
    """One run as a cell."""
    plain = settings.as_json()
    group = json.dumps({name: plain[name] for name in MODEL})
    return Cell(plain, group, settings.label)


def evaluate(
    settings: Settings, data: str, models: Any, share: Sequence[int] | None = None
) -> Record | None:
    """One model with one method on one data set of either framework's, see ``run_dataset``."""
    name = table_name(data)
    if task_file(name) is None:
        from vlm_prune_ext.evals.vlmeval_run import run_dataset

        return run_dataset(settings, data, models, share=share)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"data={data!r}: under torchrun ./run_lmms.sh evaluates tasks of lmms-eval."
        )
    from vlm_prune_ext.evals.lmms_run import run_task

    return run_task(settings, name, models)


SHARE = "share"
"""Setting of a cell that is a part of another: which, of how many."""


def shares_of(cells: Sequence[Cell], count: int) -> dict[str, tuple[Cell, Cell]]:
    """Parts of cells that are to be done first, by their keys, each with the cell that it is of.
    Tasks of lmms-eval, and what is done, have none."""
    from vlm_prune_ext.evals.vlmeval_store import Files

    found = {}
    for cell in cells:
        settings, _ = resolve({}, cell.settings)
        name = table_name(settings.data[0])
        ended = Files(settings, name).ours("results.json").is_file() and not settings.fresh
        for k in range(count if task_file(name) is None and not ended else 0):
            part = Cell({**cell.settings, SHARE: [k, count]}, cell.group, cell.label)
            found[part.key] = (part, cell)
    return found


# -- running ---------------------------------------------------------------------------------------
class Evaluate:
    """Does cells: one data set with one method, on the model that it holds.

    Args:
        threads: of torch; 0: its own choice.
    """

    def __init__(self, threads: int = 0) -> None:
        import torch

        from vlm_prune_ext.evals.rows import register_datasets

        if threads:
            torch.set_num_threads(threads)
        register_datasets()
        self.held = Held(self._load)

    @staticmethod
    def _load(group: str) -> Any:
        import torch

        from vlm_prune_ext.evals.vlmeval_run import Models

        settings, _ = resolve({}, json.loads(group))
        if settings.device in (None, "cuda") and torch.cuda.is_available():
            number = slot() % torch.cuda.device_count()
            settings = replace(settings, device=f"cuda:{number}")
        return Models(settings)

    def __call__(self, cell: Cell) -> Mapping[str, Any]:
        """The result is where the cell's record is, below the folder of all."""
        from vlm_prune_ext.evals.vlmeval_store import Files

        plain = dict(cell.settings)
        share = plain.pop(SHARE, None)
        settings, _ = resolve({}, plain)
        record = evaluate(settings, settings.data[0], self.held(cell.group), share)
        path = Files(settings, table_name(settings.data[0])).ours("results.json")
        values = record.metrics if record is not None else {}
        return {"record": str(path.relative_to(settings.work_dir)), "metrics": values}


@dataclass(frozen=True)
class Launch:
    """How cells are worked through.

    Attributes:
        workers: processes; ``None``: one per GPU, or two on a CPU.
        launcher: ``"local"`` or ``"ray"``.
        address: of a Ray cluster; ``None``: the one that the environment names, else a local one.
        shards: parts of a cell's rows that are done side by side before they are put together.
    """

    workers: int | None = None
    launcher: str = "local"
    address: str | None = None
    shards: int = 1


def carry_out(
    made: Plan,
    folder: Path,
    launch: Launch = Launch(),
    titles: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Results | None:
    """Run the cells in processes that share them, with what is there so far on the terminal.

    Args:
        made: what to run.
        folder: of the results; locked meanwhile.
        launch: how.
        titles: data set -> heading of its scores.
        settings: what was asked for, for readers of the folder.

    Returns:
        the results, read from the files; ``None`` in processes of torchrun's other than the first.
    """
    from vlm_prune_ext.experiment.log import terminable

    rank, world = _rank()
    log = Log(folder / LOG)
    with lock(folder) if rank == 0 else nullcontext(), terminable():
        if rank == 0:
            date = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
            plain = json.loads(json.dumps(settings or {}, default=str))
            log.append({"start": {"date": date, "settings": plain, "cells": made.as_json()}})
            log.append(*map(vars, made.skipped))
        mine = made.cells[rank::world]
        with _progress(made, folder, titles, quiet=rank > 0) as (say, tell):
            running: list[str] = []

            def watch(cells: Sequence[Cell]) -> None:
                nonlocal running
                keys = sorted(cell.key for cell in cells)
                if keys != running:
                    running = keys
                    log.append({"running": keys})

            if launch.shards > 1:
                parts = shares_of(mine, launch.shards)

                def watch_parts(some: Sequence[Cell]) -> None:
                    watch(list({id(c): c for c in (parts[one.key][1] for one in some)}.values()))

                first = [part for part, _ in parts.values()]
                for line in _lines(first, folder, launch, world, watch_parts, say):
                    if line.status == FAILED:  # what is missing is asked with the whole cell
                        report.say(f"A part of {line.label} failed: {line.why}", error=True)
            for line in _lines(mine, folder, launch, world, watch, say):
                log.append(vars(line))
                tell(line)
            log.append({"running": []})
            if rank == 0 and world > 1:
                _wait_for(made, folder, date)
    return read(folder) if rank == 0 else None


def _lines(
    cells: Sequence[Cell],
    folder: Path,
    launch: Launch,
    world: int,
    watch: grid.Watch,
    say: Callable[[str], None],
) -> Iterator[Line]:
    if launch.launcher == "ray":
        from vlm_prune_ext.experiment.cluster import run_on_ray

        yield from run_on_ray(cells, Evaluate, (1,), address=launch.address, watch=watch, say=say)
        return
    count, threads = (0, 0) if world > 1 else _workers(launch.workers, cells)
    say(f"{max(count, 1)} process{'es' if count > 1 else ''}, output in {folder / 'logs'}")
    logs = folder / "logs"
    yield from grid.run(cells, Evaluate, (threads,), workers=count, output=logs, watch=watch)


def _rank() -> tuple[int, int]:
    """Which of how many processes of torchrun or accelerate this is. Each does cells of its own, so
    their variables are taken away: nothing is to wait for the others inside of a cell."""
    found = {name: os.environ.pop(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if int(found["WORLD_SIZE"] or 1) < 2:
        return 0, 1
    grid.take_slot(int(found["LOCAL_RANK"] or 0))
    return int(found["RANK"]), int(found["WORLD_SIZE"])


def _wait_for(made: Plan, folder: Path, date: str) -> None:
    """Until the log has a line of this start for each cell. (torchrun ends all processes when one
    of them fails.) Other processes may have begun a little earlier than this one."""
    keys = {cell.key for cell in made.cells}
    start = datetime.datetime.fromisoformat(date) - datetime.timedelta(seconds=60)
    date = start.isoformat("T", "seconds")
    while True:
        lines = grid.read_lines(Log(folder / LOG))
        if all(k in lines and lines[k].host.get("date", "") >= date for k in keys):
            return
        time.sleep(1.0)


def _workers(asked: int | None, cells: Sequence[Cell]) -> tuple[int, int]:
    """Processes, and torch's threads in each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = _gpus([cell.settings["device"] for cell in cells])
    count = max(1, min(asked or gpus or min(2, cores or 1), len(cells)))
    return count, 1 if count > 1 and not gpus else 0


def _gpus(devices: Sequence[str | None]) -> int:
    """How many GPUs there are for what is asked for these devices."""
    if "cpu" in devices:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _progress(
    made: Plan, folder: Path, titles: Mapping[str, str] | None, *, quiet: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[Line], None]]]:
    """A table that grows on a terminal, a line per cell elsewhere; both on standard error. Yields
    what takes a text about the processes, and what takes lines."""
    total, done, where = len(made.cells), 0, ""
    live = sys.stderr.isatty()

    def say(text: str) -> None:
        nonlocal where
        where = text
        if not live and not quiet:
            print(f"{total} runs in {text}", file=sys.stderr, flush=True)

    def tell(line: Line) -> None:
        nonlocal done
        done += 1
        said = f": failed: {line.why}" if line.status == FAILED else ""
        if not live and not quiet:
            name = f"{line.label}, {line.cell['data'][0]}"
            report.say(f"{done}/{total} {name}{said}", error=True)

    if not live or quiet:
        yield say, tell
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from vlm_prune_ext.experiment.status import status_of

    def now() -> Any:
        results = read(folder)
        said = status_of(results, datetime.datetime.now(datetime.timezone.utc)).text()
        return Group(summary_table(results, titles).rich(), Text(f"{said} {where}"))

    with Live(
        get_renderable=now, console=Console(stderr=True), transient=True, refresh_per_second=1
    ):
        yield say, tell


# -- what is shown ---------------------------------------------------------------------------------
def finish(results: Results, start: float, titles: Mapping[str, str] | None = None) -> int:
    """Print the table, write all forms of it; returns the exit code."""
    records = [run.record for run in results.done if run.record is not None]
    summary_table(results, titles).show(boxed=True)
    hardware = next((one.hardware[0] for one in records if one.hardware), {})
    device = hardware.get("gpu", hardware.get("cpu", ""))
    print(
        "FLOPs: language model's prefill over the unpruned one's, text included; prefill: median. "
        f"{device}, {time.perf_counter() - start:.0f} s."
    )
    for note in dict.fromkeys(one.note for one in records if one.note):
        report.say(note)
    show.write(results, titles=titles)
    if (beside := published_table(results)).rows:
        beside.show(boxed=True)
    for line in failures(results):
        report.say(line, error=True)
    failed = sum(len(one.failed) for one in records)
    if failed:
        print(f"{failed} rows failed; the others are done.", file=sys.stderr)
    return 1 if failed or any(run.status == FAILED for run in results.runs) else 0


# -- the demo --------------------------------------------------------------------------------------
DEMO_ROWS = 50
DEMO_BATCH = 10
"""Rows that are answered together on a CPU, where a decode step of so small a model costs more in
Python than in arithmetic: captions take 6 % (all tokens) to 34 % (32) less processor time, short
answers up to 14 %. Answers are the same as one by one."""
DEMO_METHODS = ("none", "fastv:288", "fastv:100", "fastv:32", "random:32")
DEMO_DATA = {  # the longest answers first: they are what two processes can share worst
    "Shapes_Caption": "BLEU-4",
    "Shapes_MCQ": "MCQ %",
    "Shapes_VQA": "VQA %",
    "Shapes_YN": "YN %",
}
_IN_TABLE = ("Shapes_MCQ", "Shapes_YN", "Shapes_VQA", "Shapes_Caption")


def demo(settings: Settings) -> int:
    """The demo's sweep: five settings of its model on its four sets; also ``comparison.json`` and
    ``comparison.png``.

    Args:
        settings: ``work_dir``, ``limit`` (default: :data:`DEMO_ROWS`), ``fresh``, ``seed``,
            ``device`` and ``dtype`` are taken.
    """
    start = time.perf_counter()
    limit = settings.limit or DEMO_ROWS
    base = replace(settings, limit=limit, data=tuple(DEMO_DATA))
    if not _gpus([settings.device]):
        base = replace(base, batch_size=DEMO_BATCH)
    folder = Path(settings.work_dir)
    titles = {name: DEMO_DATA[name] for name in _IN_TABLE}
    made = plan(base, [None], lambda _: choices_of(DEMO_METHODS, seeds=[settings.seed]))
    results = carry_out(made, folder, titles=titles)
    assert results is not None
    rows = by_setting(results.done)
    summaries = [summary_of(run.record) for row in rows for run in row if run.record]
    write_json(folder / "comparison.json", summaries)
    code = finish(results, start, titles)
    if len(results.done) == len(made.cells):
        draw_comparison(rows, titles, folder / "comparison.png")
    interval = 196.0 * (0.9 * 0.1 / limit) ** 0.5
    print(
        f"{limit} samples per set (95 % interval of an accuracy of 90 %: ± {interval:.0f} points). "
        "FastV drops in front of layer 3, random dropping in front of layer 0.\n"
        f"Figure: {folder / 'comparison.png'}   "
        f"Records: {folder / '<setting>_<data>' / '*_results.json'}"
    )
    return code


def summary_of(record: Record) -> dict[str, Any]:
    """A record in a few words."""
    return {
        "name": record.name,
        "dataset": record.dataset,
        "score": asdict(record.score) if record.score else None,
        "samples": record.samples,
        "visual_tokens_last_layer": record.last_visual_tokens,
        "flops_ratio": record.flops.ratio if record.flops else None,
    }


def draw_comparison(rows: Sequence[Sequence[Run]], titles: Mapping[str, str], path: Path) -> None:
    """Scores against visual tokens kept, one line per data set; crosses: dropped at random."""
    records = [run.record for row in rows for run in row if run.record and run.record.score]
    curves = []
    for place, (data, title) in enumerate(titles.items()):
        mine = [one for one in records if one.dataset == data]
        at_random = [one for one in mine if one.method["name"] == "random"]
        chosen = [one for one in mine if one.method["name"] != "random"]
        curves.append(Curve(title, [_point(one) for one in chosen], color=place))
        curves.append(Curve("", [_point(one) for one in at_random], "x", place))
    some = records[0]
    line_plot(
        {some.note or f"{some.samples} samples per set; x: at random, before layer 0": curves},
        path,
        x="visual tokens kept (FastV in front of layer 3; the right-most: all)",
        y="score",
        log_x=True,
        ticks=sorted({_point(one)[0] for one in records}),
        limits=(0, 102),
    )


def _point(record: Record) -> tuple[float, float]:
    return record.last_visual_tokens or 0.0, record.score.value if record.score else 0.0
