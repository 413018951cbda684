"""The demo: several settings of one model side by side, as a table and as a figure.

Two processes share the work on a CPU with two cores or more, each with one thread: at the size of
the demo model that is faster than one process with two.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.console import console, tokens
from vlm_prune_ext.evals.interrupt import terminable
from vlm_prune_ext.evals.record import Record
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.random_drop import RandomDrop
from vlm_prune_ext.settings import Settings

ROWS = 50
DATA = ("Shapes_Caption", "Shapes_MCQ", "Shapes_VQA", "Shapes_YN")  # the longest answers first
METHODS: tuple[Method | None, ...] = (
    None,
    FastV(agg_layer=3, attention_rank=288),
    FastV(agg_layer=3, attention_rank=100),
    FastV(agg_layer=3, attention_rank=32),
    RandomDrop(keep=32),
)
TITLES = {
    "Shapes_MCQ": "MCQ %",
    "Shapes_YN": "YN %",
    "Shapes_VQA": "VQA %",
    "Shapes_Caption": "BLEU-4",
}


def compare(settings: Settings) -> int:
    """Run all of :data:`METHODS` on all of :data:`DATA`, print the table, write the figure.

    Args:
        settings: ``work_dir``, ``limit`` (default: :data:`ROWS`), ``reuse``, ``seed``, ``device``
            and ``dtype`` are taken.

    Returns:
        the exit code: 0, or 1 if rows failed.
    """
    start = time.perf_counter()
    settings = replace(settings, limit=settings.limit or ROWS)
    folder = Path(settings.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"work_dir {str(folder)!r} cannot be made ({error.strerror}).") from error
    jobs = [replace(settings, method=m, data=(name,)) for name in DATA for m in METHODS]
    made = _work(jobs, folder)
    records = {(one.name, one.dataset): one for one in made}
    names = list(dict.fromkeys(one.name for one in sorted(made, key=_order)))
    figure = folder / "comparison.png"
    _write_summary(made, folder / "comparison.json")
    draw([[records[name, data] for data in TITLES] for name in names], figure)
    _print([[records[name, data] for data in TITLES] for name in names], settings, start)
    print(f"Figure: {figure}   Records: {folder / '<setting>_<data>' / '*_results.json'}")
    failed = sum(len(one.failed) for one in made)
    if failed:
        print(f"{failed} rows failed; the others are done.", file=sys.stderr)
    return 1 if failed else 0


def _order(record: Record) -> int:
    labels = [method.label() if method is not None else "baseline" for method in METHODS]
    return next(i for i, label in enumerate(labels) if record.name.endswith(f"-{label}"))


# -- processes -----------------------------------------------------------------------------------
def _work(jobs: Sequence[Settings], folder: Path) -> list[Record]:
    """Run the jobs in processes that share them, with progress on standard error."""
    count = _processes(jobs[0].device)
    context = multiprocessing.get_context("spawn")
    lock = context.Value("i", 0)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    pool = ProcessPoolExecutor(count, context, _start_worker, (str(logs), count, lock))
    try:
        with terminable():
            futures = [pool.submit(_job, job) for job in jobs]
            return list(_watched(futures, count, logs))
    except BaseException:
        _stop(pool)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _processes(device: str | None) -> int:
    import torch

    on_gpu = torch.cuda.is_available() and device != "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if on_gpu else min(2, cores or 1)


def _start_worker(logs: str, count: int, number: Any) -> None:
    """What VLMEvalKit prints, bars and all, goes into a file per process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells us
    with number.get_lock():
        number.value += 1
        mine = number.value
    log = (Path(logs) / f"process-{mine}.log").open("w", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    # VLMEvalKit scores short answers in 16 processes of its own: spawned, each would import it all.
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
    if count > 1:
        import torch

        torch.set_num_threads(1)


def _job(settings: Settings) -> Record:
    from vlm_prune_ext.evals.shapes import register_datasets
    from vlm_prune_ext.evals.vlmeval_run import run_dataset

    register_datasets()
    record = run_dataset(
        settings, settings.data[0], _models(replace(settings, method=None, data=()))
    )
    assert record is not None
    return record


@cache
def _models(settings: Settings) -> Any:
    """The checkpoint, once per process."""
    from vlm_prune_ext.evals.vlmeval_run import Models

    return Models(settings)


def _watched(futures: Sequence[Future[Record]], count: int, logs: Path) -> Iterator[Record]:
    total = len(futures)
    with _progress(total, count, logs) as advance:
        for future in as_completed(futures):
            record = future.result()
            advance(f"{record.name}, {record.dataset}")
            yield record


@contextmanager
def _progress(total: int, count: int, logs: Path) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    where = f"{count} process{'es' if count > 1 else ''}, output in {logs}"
    if not sys.stderr.isatty():
        print(f"{total} runs in {where}", file=sys.stderr, flush=True)
        done = iter(range(1, total + 1))
        yield lambda name: print(f"{next(done)}/{total} {name}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"starting {where}", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def _stop(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


# -- what is shown -------------------------------------------------------------------------------
def _print(rows: Sequence[Sequence[Record]], settings: Settings, start: float) -> None:
    from rich.table import Table

    table = Table(title="Visual tokens kept against scores", title_justify="left")
    table.add_column("setting", no_wrap=True)
    for column in ("visual tokens", "FLOPs", *TITLES.values(), "prefill"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        flops = sum(one.flops.ratio for one in row if one.flops) / len(row)
        table.add_row(
            row[0].name.removeprefix(f"{_model(rows)}-"),
            tokens(row[0]),
            f"{100 * flops:.1f} %",
            *(f"{one.score.value:.1f}" if one.score else "-" for one in row),
            _prefill(row),
        )
    console().print(table)
    hardware = rows[0][0].hardware[0] if rows[0][0].hardware else {}
    print(
        f"{_model(rows)}, {settings.limit} samples per set "
        f"(95 % interval of an accuracy of 90 %: ± {_interval(settings.limit or 1):.0f} points); "
        "FLOPs: language model's prefill over the baseline's; prefill: median. FastV drops in "
        "front of layer 3, random dropping in front of layer 0. "
        f"{hardware.get('gpu', hardware.get('cpu', ''))}, {time.perf_counter() - start:.0f} s."
    )
    for note in dict.fromkeys(one.note for row in rows for one in row if one.note):
        print(note)


def _model(rows: Sequence[Sequence[Record]]) -> str:
    return rows[0][0].name.removesuffix("-baseline")


def _interval(count: int) -> float:
    return 196.0 * (0.9 * 0.1 / count) ** 0.5


def _prefill(row: Sequence[Record]) -> str:
    medians = [one.seconds.prefill.median for one in row if one.seconds and one.seconds.prefill]
    return f"{1000 * sum(medians) / len(medians):.0f} ms" if medians else "-"


def _write_summary(made: Sequence[Record], path: Path) -> None:
    short = [
        {
            "name": one.name,
            "dataset": one.dataset,
            "score": asdict(one.score) if one.score else None,
            "samples": one.samples,
            "visual_tokens_last_layer": one.visual_tokens[-1].after if one.visual_tokens else None,
            "flops_ratio": one.flops.ratio if one.flops else None,
        }
        for one in sorted(made, key=_order)
    ]
    path.write_text(json.dumps(short, indent=2) + "\n", "utf-8")


def draw(rows: Sequence[Sequence[Record]], path: Path) -> None:
    """Scores against visual tokens kept (in the last layer), one line per data set.

    Args:
        rows: per setting, one record per data set in the same order; the first is the baseline.
        path: PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.color_sequences["tab10"]
    for place, data in enumerate(TITLES):
        points = [(_kept(row[place]), _value(row[place])) for row in rows[:-1]]
        points.sort()
        axes.plot(*zip(*points, strict=True), "o-", color=colors[place], label=TITLES[data])
        last = rows[-1][place]
        axes.plot(_kept(last), _value(last), "x", ms=9, mew=2.2, color=colors[place])
    axes.plot([], [], "x", ms=9, mew=2.2, color="grey", label="at random,\nbefore layer 0")
    axes.set_xscale("log", base=2)
    ticks = sorted({_kept(row[0]) for row in rows})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept (FastV in front of layer 3; the right-most: all)")
    axes.set_ylabel("score")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    note = next((row[0].note for row in rows if row[0].note), None)
    axes.set_title(
        note
        or f"{rows[0][0].name.removesuffix('-baseline')}: {rows[0][0].samples} samples per set",
        fontsize=9,
    )
    figure.savefig(path)


def _kept(record: Record) -> float:
    return record.visual_tokens[-1].after if record.visual_tokens else 0.0


def _value(record: Record) -> float:
    return record.score.value if record.score else 0.0
