"""Many runs as one grid: models x methods x budgets x data, side by side in one table.

Each checkpoint is loaded once per process and methods are swapped on it. A cell is a run as
``run_vlmeval.py`` makes it, in a folder of its own, so a sweep goes on from whatever is there; the
tables and pictures are made from these folders' result files alone.

Two processes share the work on a CPU with two cores or more, each with one thread: at the size of
the demo model that is faster than one process with two. On GPUs each has a worker.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import (
    DONE,
    FAILED,
    SKIPPED,
    Cell,
    Held,
    Line,
    line_of,
    run,
    slot,
)
from vlm_prune_ext.experiment.log import Log, lock, write_json
from vlm_prune_ext.experiment.record import Record, read_record
from vlm_prune_ext.experiment.report import (
    Column,
    Figure,
    Table,
    line_plot,
    metric_figures,
    write_table,
)
from vlm_prune_ext.experiment.report import Line as Curve
from vlm_prune_ext.experiment.settings import MODEL, Settings, resolve
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import method_class, parse_method, standard_method

LOG = "sweep.jsonl"
"""A line for each cell that a start did."""


# -- cells -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """A method that was asked for.

    Attributes:
        text: as it was asked for.
        method: it; ``None`` is the baseline.
        why: why there is no such method (the text's budget is none that it can have).
    """

    text: str
    method: Method | None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Cells to run, in order, and lines about those that cannot be."""

    cells: list[Cell]
    skipped: list[Line]


def plan(base: Settings, models: Sequence[str | None], choices: Sequence[Choice]) -> Plan:
    """All combinations of models, the data of ``base`` and methods, in this order.

    Args:
        base: what all cells share, their data sets among it.
        models: checkpoints; ``None`` is the demo's.
        choices: methods.

    Raises:
        InputError: a checkpoint that is not there. A method that does not fit one is skipped.
    """
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.evals.precheck import check_fit
    from vlm_prune_ext.models.checkpoint import Checkpoint, check_trust

    def why_not(source: Checkpoint, choice: Choice) -> str:
        try:
            check_fit(source, choice.method)
        except InputError as error:
            return str(error)
        return choice.why

    made = Plan([], [])
    for model in models:
        source = Checkpoint(model or str(CHECKPOINT))
        check_trust(source, base.trust_remote_code)
        reasons = [why_not(source, choice) for choice in choices]
        for name in base.data:
            for choice, why in zip(choices, reasons, strict=True):
                one = replace(base, model_path=model, method=choice.method, data=(name,))
                if why:
                    cell = Cell({**one.as_json(), "asked": choice.text}, label=choice.text)
                    made.skipped.append(line_of(cell, SKIPPED, why=why))
                else:
                    made.cells.append(cell_of(one))
    return made


def cell_of(settings: Settings) -> Cell:
    """One run as a cell."""
    plain = settings.as_json()
    group = json.dumps({name: plain[name] for name in MODEL})
    return Cell(plain, group, settings.label)


def choices_of(names: Sequence[str], budgets: Sequence[str] = ()) -> list[Choice]:
    """Methods at budgets.

    Args:
        names: short forms; one that states no parameters is taken at each of ``budgets``, if it
            has a keep budget, else as published.
        budgets: counts or ratios, as texts.

    Raises:
        InputError: an unknown name, with the near one, before anything else is looked at.
    """
    known = [method_class(name.partition(":")[0].strip()) for name in names]
    found: dict[str, Choice] = {}
    for name, cls in zip(names, known, strict=True):
        swept = bool(budgets) and ":" not in name and has_keep_budget(cls)
        for text in [f"{name}:{budget}" for budget in budgets] if swept else [name]:
            try:
                method = parse_method(text) if ":" in text else standard_method(text)
                found.setdefault(repr(method), Choice(text, method))
            except InputError as error:
                if not swept:
                    raise
                found.setdefault(text, Choice(text, None, str(error)))
    return list(found.values())


def has_keep_budget(cls: type[Method] | None) -> bool:
    """Whether a method's short form states how much stays (VTW's states a layer, SAINT's a
    threshold: in a sweep these run once, as published)."""
    if cls is None:
        return False
    own = cls.budget_settings.__func__ is not Method.budget_settings.__func__  # type: ignore[attr-defined]
    return own or cls.budget_field in cls.budgets()


# -- running ---------------------------------------------------------------------------------------
class Evaluate:
    """Does cells: one data set with one method, on the model that it holds.

    Args:
        threads: of torch; 0: its own choice.
    """

    def __init__(self, threads: int = 0) -> None:
        import torch

        from vlm_prune_ext.evals.shapes import register_datasets

        if threads:
            torch.set_num_threads(threads)
        if "fork" in multiprocessing.get_all_start_methods():
            # VLMEvalKit scores short answers in 16 processes of its own: spawned, each would
            # import it all.
            multiprocessing.set_start_method("fork", force=True)
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
        from vlm_prune_ext.evals.vlmeval_run import Files, run_dataset

        settings, _ = resolve({}, cell.settings)
        record = run_dataset(settings, settings.data[0], self.held(cell.group))
        path = Files(settings, settings.data[0]).ours("results.json")
        values = record.metrics if record is not None else {}
        return {"record": str(path.relative_to(settings.work_dir)), "metrics": values}


def carry_out(made: Plan, folder: Path, workers: int | None, shown: Shown) -> list[Line]:
    """Run the cells in processes that share them, with what is there so far on the terminal.

    Args:
        made: what to run.
        folder: of the results; locked meanwhile.
        workers: processes; ``None``: one per GPU, or two on a CPU.
        shown: how results are shown.

    Returns:
        a line per cell, in order.
    """
    from vlm_prune_ext.evals.interrupt import terminable

    count, threads = _workers(workers, made.cells)
    lines: dict[str, Line] = {line.key: line for line in made.skipped}
    with lock(folder), terminable(), _progress(len(made.cells), count, folder, shown) as tell:
        arguments = (threads,)
        logs = folder / "logs"
        for line in run(made.cells, Evaluate, arguments, workers=count, output=logs):
            lines[line.key] = line
            Log(folder / LOG).append(vars(line))
            tell(line)
    return [lines[cell.key] for cell in made.cells] + made.skipped


def _workers(asked: int | None, cells: Sequence[Cell]) -> tuple[int, int]:
    """Processes, and torch's threads in each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_gpu = torch.cuda.is_available() and all(c.settings["device"] != "cpu" for c in cells)
    count = asked or (torch.cuda.device_count() if on_gpu else min(2, cores or 1))
    count = max(1, min(count, len(cells)))
    return count, 1 if count > 1 and not on_gpu else 0


@contextmanager
def _progress(total: int, count: int, folder: Path, shown: Shown) -> Iterator[Any]:
    """A table that grows on a terminal, a line per cell elsewhere; both on standard error."""
    done: list[Line] = []
    start = time.monotonic()
    where = f"{count} process{'es' if count > 1 else ''}, output in {folder / 'logs'}"
    if not sys.stderr.isatty():
        print(f"{total} runs in {where}", file=sys.stderr, flush=True)

        def tell(line: Line) -> None:
            done.append(line)
            said = f": failed: {line.why}" if line.status == FAILED else ""
            name = f"{line.label}, {line.cell['data'][0]}"
            print(f"{len(done)}/{total} {name}{said}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    def now() -> Any:
        spent = time.monotonic() - start
        rows = sum(one.samples for one in records_of(done, folder))
        left = f", {spent / len(done) * (total - len(done)):.0f} s left" if done else ""
        said = f"{len(done)} of {total} runs in {where}, {rows / spent:.1f} rows/s{left}"
        return Group(shown.table(records_of(done, folder)).rich(), Text(said))

    with Live(get_renderable=now, console=Console(stderr=True), transient=True):
        yield done.append


# -- what is shown ---------------------------------------------------------------------------------
def records_of(lines: Sequence[Line], folder: Path) -> list[Record]:
    """Records of the cells that are done, read from their files."""
    return [read_record(folder / line.result["record"]) for line in lines if line.result]


@dataclass(frozen=True)
class Shown:
    """How a sweep's results are shown.

    Attributes:
        data: name of a data set -> heading of its scores, in order.
        title: of the table.
    """

    data: Mapping[str, str]
    title: str = "Visual tokens kept against scores"

    def table(self, records: Sequence[Record]) -> Table:
        """A row per model and method, a column per data set."""
        columns = [
            Column("setting", left=True),
            Column("visual tokens"),
            Column("FLOPs", unit=" %"),
        ]
        columns += [Column(title) for title in self.data.values()]
        more = metric_figures()
        table = Table([*columns, Column("prefill", 0, unit=" ms"), *more], title=self.title)
        alone = len({one.config["checkpoint"] for one in records}) < 2
        for row in by_setting(records):
            some = next(iter(row.values()))
            ratios = [one.flops.ratio for one in row.values() if one.flops]
            times = [one.seconds.prefill.median for one in row.values() if one.seconds.prefill]
            scores = [row[name].score for name in self.data if name in row]
            table.rows.append(
                [
                    setting_of(some) if alone else some.name,
                    some.token_steps,
                    100 * sum(ratios) / len(ratios) if ratios else None,
                    *(score.value if score else None for score in scores),
                    *[None] * (len(self.data) - len(scores)),
                    1000 * sum(times) / len(times) if times else None,
                    *(
                        _mean(one.metrics.get(figure.key) for one in row.values())
                        for figure in more
                    ),
                ]
            )
        return table


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def by_setting(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Records of one model and method, by data set."""
    found: dict[str, dict[str, Record]] = {}
    for one in records:
        found.setdefault(one.name, {})[one.dataset] = one
    return list(found.values())


def setting_of(record: Record) -> str:
    """What tells a method's settings apart, without the model's name."""
    from vlm_prune_ext.evals.names import model_name

    return record.name.removeprefix(f"{model_name(record.config['model_path'])}-")


FIGURES = (
    Figure("model", left=True, path="model"),
    Figure("method", left=True, path="setting"),
    Figure("data", left=True, path="dataset"),
    Figure("status", left=True, path="status"),
    Figure("score", 2, path="score.value"),
    Figure("score name", left=True, key="score_name", path="score.name"),
    Figure("±", 2, "standard error", key="standard_error", path="score.standard_error"),
    Figure("rows", 0, path="samples"),
    Figure("failed", 0, path="failed_rows"),
    Figure("visual tokens", left=True, key="visual_tokens", path="token_steps"),
    Figure("kept", 1, "visual tokens of a decoder layer, mean over layers", path="kept"),
    Figure("kept last", 1, "of the last layer", key="kept_last", path="kept_last"),
    Figure(
        "FLOPs", 3, "language model's prefill, over unpruned", key="flops_ratio", path="flops.ratio"
    ),
    Figure(
        "image FLOPs",
        3,
        "the same of visual tokens alone, as papers state it",
        key="flops_ratio_visual",
        path="flops.ratio_visual",
    ),
    Figure(
        "with tower",
        3,
        "the same with the vision tower",
        key="flops_ratio_with_vision",
        path="flops.ratio_with_vision",
    ),
    Figure(
        "TTFT ms",
        1,
        "time to first token, median",
        key="ttft_ms",
        path="seconds.prefill.median",
        scale=1e3,
    ),
    Figure(
        "TPOT ms",
        1,
        "time per output token",
        key="tpot_ms",
        path="seconds.decode_per_token",
        scale=1e3,
    ),
    Figure("peak GiB", 2, key="peak_gib", path="peak_memory_bytes", scale=2**-30),
)
WHY = Figure("why", left=True, note="why a cell was skipped or failed", path="why")


def long_table(lines: Sequence[Line], folder: Path) -> Table:
    """A row per cell, with those that were skipped or failed."""
    columns = [*FIGURES, *metric_figures(), WHY]
    table = Table(columns, title="Sweep")
    for line in lines:
        shown: dict[str, Any] = {"status": line.status, "why": line.why}
        if line.status == DONE:
            (one,) = records_of([line], folder)
            shown |= asdict(one) | {
                "model": one.config["model_path"] or "demo",
                "setting": setting_of(one),
                "failed_rows": len(one.failed),
                "token_steps": one.token_steps,
                "kept": one.mean_visual_tokens,
                "kept_last": one.last_visual_tokens,
            }
        else:
            shown |= {
                "model": line.cell["model_path"] or "demo",
                "setting": line.label,
                "dataset": line.cell["data"][0],
            }
        table.rows.append([column.of(shown) for column in columns])
    return table


def draw(records: Sequence[Record], shown: Shown, path: Path) -> None:
    """Score against visual tokens kept (in the last layer): a panel per data set, a line per
    method, from the unpruned model on."""
    panels: dict[str, list[Curve]] = {}
    names = list(dict.fromkeys(one.method["name"] for one in records))
    for data, title in shown.data.items():
        mine = [one for one in records if one.dataset == data and one.score]
        whole = [_point(one) for one in mine if one.method["name"] == "none"]
        curves = []
        for place, name in enumerate(n for n in names if n != "none"):
            points = [_point(one) for one in mine if one.method["name"] == name]
            curves.append(Curve(name, [*points, *whole], color=place))
        panels[title] = curves or [Curve("none", whole)]
    line_plot(panels, path, x="visual tokens kept (last layer)", y="score", log_x=True)


def _point(record: Record) -> tuple[float, float]:
    return record.last_visual_tokens or 0.0, record.score.value if record.score else 0.0


def finish(lines: Sequence[Line], folder: Path, shown: Shown, start: float) -> int:
    """Print the table, write all forms of it; returns the exit code."""
    records = records_of(lines, folder)
    table = shown.table(records)
    table.show(boxed=True)
    hardware = next((one.hardware[0] for one in records if one.hardware), {})
    device = hardware.get("gpu", hardware.get("cpu", ""))
    print(
        "FLOPs: language model's prefill over the unpruned one's, text included; prefill: median. "
        f"{device}, {time.perf_counter() - start:.0f} s."
    )
    for note in dict.fromkeys(one.note for one in records if one.note):
        print(note)
    write_table(folder, "sweep", long_table(lines, folder))
    if records:
        draw(records, shown, folder / "sweep.png")
    return _exit_code(lines, records)


def _exit_code(lines: Sequence[Line], records: Sequence[Record]) -> int:
    for line in lines:
        if line.status != DONE:
            name = f"{line.label}, {line.cell['data'][0]}"
            print(f"{line.status.capitalize()}: {name}: {line.why}", file=sys.stderr)
    failed = sum(len(one.failed) for one in records)
    if failed:
        print(f"{failed} rows failed; the others are done.", file=sys.stderr)
    return 1 if failed or any(line.status == FAILED for line in lines) else 0


# -- the demo --------------------------------------------------------------------------------------
DEMO_ROWS = 50
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
    folder = Path(settings.work_dir)
    shown = Shown({name: DEMO_DATA[name] for name in _IN_TABLE})
    made = plan(base, [None], choices_of(DEMO_METHODS))
    lines = carry_out(made, folder, None, shown)
    order = list(dict.fromkeys(cell.label for cell in made.cells))
    lines.sort(key=lambda line: order.index(line.label))
    records = records_of(lines, folder)
    write_json(folder / "comparison.json", [summary_of(one) for one in records])
    code = finish(lines, folder, shown, start)
    if len(records) == len(made.cells):
        draw_comparison(by_setting(records), shown, folder / "comparison.png")
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


def draw_comparison(rows: Sequence[Mapping[str, Record]], shown: Shown, path: Path) -> None:
    """Scores against visual tokens kept, one line per data set; crosses: dropped at random."""
    curves = []
    for place, (data, title) in enumerate(shown.data.items()):
        mine = [row[data] for row in rows if row[data].score]
        at_random = [one for one in mine if one.method["name"] == "random"]
        chosen = [one for one in mine if one.method["name"] != "random"]
        curves.append(Curve(title, [_point(one) for one in chosen], color=place))
        curves.append(Curve("", [_point(one) for one in at_random], "x", place))
    some = next(iter(rows[0].values()))
    line_plot(
        {some.note or f"{some.samples} samples per set; x: at random, before layer 0": curves},
        path,
        x="visual tokens kept (FastV in front of layer 3; the right-most: all)",
        y="score",
        log_x=True,
        ticks=sorted({_point(next(iter(row.values())))[0] for row in rows}),
        limits=(0, 102),
    )
