"""Reports of a profile's log: a Markdown page a model with plots, an index, and one HTML page."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import DONE, FAILED, Line, read_lines
from vlm_prune_ext.experiment.log import Log, write_whole
from vlm_prune_ext.experiment.metrics import METRICS
from vlm_prune_ext.experiment.report import (
    Column,
    Figure,
    Heading,
    Markup,
    Page,
    Part,
    Picture,
    Table,
    bar_plot,
    line_plot,
    markdown_cell,
    metric_figures,
    write_table,
)
from vlm_prune_ext.experiment.report import Line as Drawn

FOLDER = "pretty_results"
LOG = "cells.jsonl"


# -- what is shown -------------------------------------------------------------------------------
_MS, _GIGA = 1e3, 1e-9


def _figure(name: str, digits: int, path: str, note: str, scale: float = 1.0) -> Figure:
    return Figure(name, digits, note, empty="", path=path, scale=scale)


FIGURES = (
    _figure("visual", 0, "tokens.visual", "visual tokens of the prompt, mean per example"),
    _figure("kept", 0, "tokens.visual_kept", "of these, held by a decoder layer, mean over layers"),
    _figure("text", 1, "tokens.text", "text tokens, template included, padding not"),
    _figure("width", 0, "tokens.width", "positions of the prompt that are computed, with padding"),
    _figure("new", 1, "tokens.new", "generated tokens"),
    _figure("latency ms", 1, "latency.total.median", "of a batch, median", _MS),
    _figure("p10", 1, "latency.total.p10", "of the latency", _MS),
    _figure("p90", 1, "latency.total.p90", "of the latency", _MS),
    _figure("vision ms", 1, "latency.vision", "tower and projector, median of own runs", _MS),
    _figure("prefill ms", 1, "latency.prefill", "the rest of TTFT", _MS),
    _figure("TTFT ms", 1, "latency.first_token.median", "time to first token, median", _MS),
    _figure("decode ms", 1, "latency.decode.median", "behind the first new token, median", _MS),
    _figure("TPOT ms", 2, "latency.per_token", "time per output token, of the batch", _MS),
    _figure("examples/s", 2, "examples_per_second", "batch size over latency"),
    _figure("score", 1, "quality.value", "see the column beside it, in percent"),
    Figure(
        "scored by",
        note="vqa: VQA accuracy; accuracy: exact match; bleu4: BLEU-4",
        left=True,
        path="quality.name",
    ),
    _figure("WER", 2, "quality.wer", METRICS["wer"].help),
    _figure("J/example", 2, "energy.counted", "energy; empty where nothing counts it"),
    _figure(
        "GFLOP",
        3,
        "flops.vision+flops.prefill",
        "per example until the first new token, counted by torch, the rule's own included",
        _GIGA,
    ),
    _figure(
        "GFLOP analytic",
        3,
        "flops.analytic_vision+flops.analytic_prefill",
        "the same by formula, the rule's own not included",
        _GIGA,
    ),
    _figure("peak GiB", 2, "peak_memory", "tensors on a GPU, the process on a CPU", 2**-30),
)


def figures() -> list[Figure]:
    """All columns: those above, and the metrics that every command shows."""
    return [*FIGURES, *metric_figures("quality.metrics", empty="")]


@dataclass(frozen=True)
class Question:
    """One question of the study: what does this axis do?

    Attributes:
        axis: name of a cell's setting.
        title: of its table.
        column: heading of its values.
    """

    axis: str
    title: str
    column: str


QUESTIONS = (
    Question("img_size", "Image size", "image"),
    Question("batch_size", "Batch size", "batch"),
    Question("max_input_len", "Prompt length", "text limit"),
    Question("optimization", "Optimisation", "optimisation"),
    Question("cached", "KV cache", "KV cache"),
    Question("method", "Pruning budget", "pruning"),
    Question("device", "Device", "device"),
)


@dataclass(frozen=True)
class Row:
    """A cell that is done, as a table shows it.

    Attributes:
        line: from the log.
        figures: name of a column -> value; ``None`` where there is none.
    """

    line: Line
    figures: dict[str, Any]

    def setting(self, axis: str) -> Any:
        """The value of an axis, as it sorts."""
        return self.line.label if axis == "method" else self.line.cell[axis]

    def shown(self, axis: str) -> str:
        """The value of an axis, as it reads."""
        value = self.setting(axis)
        if axis == "cached":
            return "yes" if value else "no"
        if axis == "optimization":
            precision = (self.line.result or {}).get("precision", "")
            return value if precision in value or not value else f"{value} ({precision})"
        if axis in ("img_size", "max_input_len"):
            return "as is" if value is None else str(value)
        return str(value)


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """Cells that are done."""
    columns = figures()
    return [
        Row(line, {column.name: column.of(_checked(line.result)) for column in columns})
        for line in lines
        if line.status == DONE
    ]


def _checked(result: dict[str, Any] | None) -> dict[str, Any]:
    """A result of this command (of another, there is no such key)."""
    assert result is not None
    return {**result, "latency": result["latency"], "tokens": result["tokens"]}


# -- from cells to questions ---------------------------------------------------------------------
def varying(rows: Sequence[Row]) -> list[Question]:
    """Axes with several values among these rows."""
    return [q for q in QUESTIONS if _values(q, rows) > 1]


def answer_to(question: Question, rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in this axis (and in the method) only.

    Of the groups of cells that share everything else, the one with the most values of the axis is
    taken; of equals, the first. The pruning budget is answered for every optimisation: what it
    saves depends on that most.
    """
    free = {question.axis, "method"}
    best = max(_alike(rows, free), key=lambda group: _values(question, group), default=[])
    if question.axis == "method" and best:
        inside = _but(best[0], free | {"optimization"})
        near = [row for row in rows if _but(row, free | {"optimization"}) == inside]
        groups = [group for group in _alike(near, free) if _values(question, group) > 1]
        best = [row for group in groups for row in group]
        return sorted(best, key=lambda r: (order(r, "optimization")[:2], order(r, "method")))
    return sorted(best, key=lambda row: order(row, question.axis))


def _but(row: Row, axes: set[str]) -> str:
    """A cell without some of its axes."""
    return repr({k: v for k, v in row.line.cell.items() if k not in axes})


def _alike(rows: Sequence[Row], free: set[str]) -> list[list[Row]]:
    """Groups of rows that share everything but some axes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_but(row, free), []).append(row)
    return list(groups.values())


def _values(question: Question, group: Sequence[Row]) -> int:
    return len({repr(row.setting(question.axis)) for row in group})


def order(row: Row, axis: str) -> tuple[Any, ...]:
    """Rows by the value of an axis (true before false), then from most visual tokens to fewest."""
    value = row.setting(axis)
    if isinstance(value, bool):  # what people run first
        value = not value
    number = value if isinstance(value, int | float) else float("inf")
    last = (-row.figures["kept"], row.line.label)
    return last if axis == "method" else (number, str(value), *last)


# -- a model's page ------------------------------------------------------------------------------
@dataclass
class Model:
    """All about one model.

    Attributes:
        name: as it was given.
        stem: of file names.
        rows: all cells that are done.
        failed: sentences about cells that failed.
        hosts: sentences about hardware and software.
        parts: of its page: what all cells share, a table for each axis, all cells, what failed.
    """

    name: str
    stem: str
    rows: list[Row]
    failed: list[str]
    hosts: list[str]
    parts: list[Part] = field(default_factory=list)

    def page(self) -> Page:
        """Its page."""
        legend = "; ".join(f"{c.name}: {c.note}" for c in figures()) + "."
        return Page(self.name, [self.hosts, *self.parts, *([legend] if self.rows else [])])

    def sheet(self) -> Table:
        """All cells that are done, under every axis."""
        return table(self.rows, QUESTIONS)


def table(
    rows: Sequence[Row],
    axes: Sequence[Question],
    shown: Sequence[Figure] | None = None,
    title: str = "",
) -> Table:
    """Rows under the axes that tell them apart, and their figures (``None``: all)."""
    shown = figures() if shown is None else shown
    made = Table([*(Column(q.column, left=True, key=q.axis) for q in axes), *map(_bare, shown)])
    made.title = title
    for row in rows:
        settings = [row.shown(q.axis) or "default" for q in axes]
        made.rows.append([*settings, *(row.figures[figure.name] for figure in shown)])
    return made


def _bare(figure: Figure) -> Column:
    """Without its note: the legend stands once on a page, not under every table."""
    return replace(figure, note="")


def _model(name: str, names: Sequence[str], lines: Sequence[Line], folder: Path) -> Model:
    own = [line for line in lines if line.cell["model_name"] == name]
    rows = sorted(rows_of(own), key=lambda row: [order(row, q.axis)[:2] for q in QUESTIONS])
    failed = [failed_text(line) for line in own if line.status == FAILED]
    model = Model(name, _stem(name, names), rows, failed, hosts_of(own))
    if rows:
        model.parts.append([_shared(rows), _energy_note(rows)])
    for question in varying(rows):
        chosen = answer_to(question, rows)
        if _values(question, chosen) > 1:
            model.parts += _section(question, chosen, rows, folder / model.stem)
    if rows:
        model.parts += [Heading("All cells"), table(rows, varying(rows))]
    if failed:
        model.parts += [Heading("Failed"), failed]
    return model


def _section(
    question: Question, chosen: Sequence[Row], rows: Sequence[Row], stem: Path
) -> list[Part]:
    parts: list[Part] = [Heading(question.title)]
    if fixed := _held_fixed(question, chosen, rows):
        parts.append(f"Everything else: {fixed}.")
    if question.axis == "img_size" and (note := _image_note(chosen)):
        parts.append(note)
    plot = stem.with_name(f"{stem.name}_{question.axis}.png")
    draw(question, chosen, plot)
    axes = list(dict.fromkeys([question, *varying(chosen)]))
    return [*parts, table(chosen, axes), Picture(plot, question.title)]


def _stem(name: str, all_names: Sequence[str]) -> str:
    """File name of a model: its last part, with a digest where two would be the same."""

    def last(text: str) -> str:
        return re.sub(r"[^\w.-]+", "-", text.rstrip("/").rpartition("/")[2]) or "model"

    stem = last(name)
    if sum(last(other).lower() == stem.lower() for other in all_names) > 1 or stem == "index":
        stem += "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
    return stem


# -- sentences -----------------------------------------------------------------------------------
def _held_fixed(question: Question, rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """What the other axes are in a question's table, where they vary elsewhere."""
    here = varying(rows)
    return ", ".join(
        f"{other.column} {rows[0].shown(other.axis)}"
        for other in varying(all_rows)
        if other.axis not in (question.axis, "method") and other not in here
    )


def _image_note(rows: Sequence[Row]) -> str:
    """What a model made of pictures of several sizes."""
    shapes = {tuple((row.line.result or {})["tokens"]["pixels"][1:]) for row in rows}
    shape = next(iter(shapes))
    if len(shapes) != 1 or len(shape) < 3:
        return ""
    return (
        f"This model's processor resizes every picture to {shape[-1]} x {shape[-2]} pixels itself, "
        "so the size in front of it changes neither the visual tokens nor their cost."
    )


def _energy_note(rows: Sequence[Row]) -> str:
    """How energy was measured, or that nothing counts it."""
    if not _has_energy(rows):
        return "No energy counter could be read on this hardware, so energy is left empty."
    found = {row.line.host.get("idle_watts") for row in rows}
    watts = sorted(value for value in found if value is not None)
    idle = f" Idle power: {', '.join(f'{value:.0f} W' for value in watts)}." if watts else ""
    return f"Energy is that of the hardware's counter, idle power included.{idle}"


def hosts_of(lines: Sequence[Line]) -> list[str]:
    """Sentences about hardware and software, each different one once."""
    said: dict[str, list[str]] = {}
    for line in lines:
        if "hardware" in line.host:
            said.setdefault(_host_text(line.host), []).append(line.host["date"][:10])
    return [f"{text} ({_dates(dates)})" for text, dates in said.items()]


def _host_text(host: Mapping[str, Any]) -> str:
    hardware, versions = host["hardware"], host["versions"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s)"
    if "gpu" in hardware:
        where = f"{hardware['gpu']} ({hardware['gpu_memory_gib']} GiB), {where}"
    names = ("python", "torch", "transformers", "vlm-prune-ext", "bitsandbytes")
    software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    head, dash, state = (host.get("commit") or "").partition("-")
    return f"{where}; {software}" + (f", commit {head[:12]}{dash}{state}" if head else "")


def _dates(dates: list[str]) -> str:
    first, last = min(dates), max(dates)
    return first if first == last else f"{first} to {last}"


def _shared(rows: Sequence[Row]) -> str:
    """Samples, repeats and the like, where all cells share them."""
    said = []
    for name in ("samples", "repeat", "warmup", "max_new_tokens", "seed"):
        values = sorted({row.line.cell[name] for row in rows})
        said.append(f"{name.replace('_', ' ')} {' / '.join(map(str, values))}")
    return ", ".join(said)


def failed_text(line: Line) -> str:
    """A failed cell in a line."""
    row = Row(line, {})
    settings = [f"{q.column} {row.shown(q.axis) or 'default'}" for q in QUESTIONS[:-2]]
    return f"{', '.join(settings)}, {line.label}: {line.why}"


# -- plots ---------------------------------------------------------------------------------------
def _has_energy(rows: Sequence[Row]) -> bool:
    return any(row.figures["J/example"] is not None for row in rows)


def draw(question: Question, rows: Sequence[Row], path: Path) -> None:
    """Draw what an axis does: latency in parts, arithmetic or energy, and the score.

    Args:
        question: the axis.
        rows: of its table, in order.
        path: of the PNG.
    """
    energy = {"joules per example": "J/example"} if _has_energy(rows) else {}
    flops = {"GFLOP per example until first token": "GFLOP"}
    score = {f"{'/'.join(sorted({r.figures['scored by'] for r in rows}))}, %": "score"}
    if question.axis == "method":
        costs = {"ms per batch": "latency ms", **energy, **flops, **score}
        _draw_budgets(rows, costs, path)
        return
    several = len({row.line.label for row in rows}) > 1
    names = [
        f"{question.column} {row.shown(question.axis) or 'default'}"
        + (f", {row.line.label}" if several else "")
        for row in rows
    ]
    parts = ("vision", "prefill", "decode")
    latency = {part: [row.figures[f"{part} ms"] for row in rows] for part in parts}
    costs = {**(energy or flops), **score}
    panels: dict[str, Any] = {"ms per batch (median)": latency}
    panels |= {title: [row.figures[name] for row in rows] for title, name in costs.items()}
    bar_plot(panels, names, path, digits=1, title=question.title)


def _draw_budgets(rows: Sequence[Row], costs: Mapping[str, str], path: Path) -> None:
    """Everything against the visual tokens that decoder layers hold on average."""
    lines = budget_lines(rows)
    panels = {
        title: [
            Drawn(
                name,
                [
                    (row.figures["kept"], row.figures[column])
                    for row in own
                    if row.figures[column] is not None
                ],
                color=number,
            )
            for number, (name, own) in enumerate(lines.items())
        ]
        for title, column in costs.items()
    }
    x = "visual tokens held, mean over layers"
    line_plot(panels, path, x=x, y=None, title="Pruning budget")


def budget_lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> rows: a line for each method and optimisation, the baseline at its end."""
    optimizations = dict.fromkeys(row.shown("optimization") for row in rows)
    methods = dict.fromkeys(row.line.cell["method"]["name"] for row in rows)
    lines = {}
    for optimization in optimizations:
        for method in [name for name in methods if name != "none"] or methods:
            name = f"{optimization or 'default'}, {method}" if len(optimizations) > 1 else method
            own = [
                row
                for row in rows
                if row.shown("optimization") == optimization
                and row.line.cell["method"]["name"] in (method, "none")
            ]
            if any(row.line.cell["method"]["name"] == method for row in own):
                lines[name] = own
    return lines


# -- all pages -----------------------------------------------------------------------------------
def write_reports(out: Path) -> list[Path]:
    """Write all reports of a log.

    Args:
        out: folder of the log.

    Returns:
        the pages: index, HTML, then one a model.

    Raises:
        InputError: no log, or nothing in it, or a folder that cannot be written.
    """
    lines = list(read_lines(Log(out / LOG)).values())
    if not lines:
        raise InputError(f"--out {str(out)!r} has no {LOG} with cells: measure some first.")
    folder = out / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(line.cell["model_name"] for line in lines))
        models = [_model(name, names, lines, folder) for name in names]
        pages = {folder / f"{model.stem}.md": model.page().markdown() for model in models}
        index = {folder / "index.md": _index(models), folder / "index.html": _everything(models)}
        for model in models:
            write_table(folder, model.stem, model.sheet(), ("csv", "json"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(out / LOG)!r} has a line that vlm-prune profile did not write ({error!r}): give "
            "another --out."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {str(folder)!r} cannot be written ({reason}).") from error
    for path, text in {**index, **pages}.items():
        write_whole(path, text)
    return [*index, *pages]


SHOWN = ("kept", "latency ms", "TTFT ms", "TPOT ms", "examples/s", "score", "GFLOP", "peak GiB")


def console_tables(out: Path) -> list[Table]:
    """What a terminal is shown of a log: a table a model, its main figures and the metrics that
    every command shows."""
    lines = list(read_lines(Log(out / LOG)).values())
    columns = [figure for figure in figures() if figure.name in SHOWN or figure not in FIGURES]
    by_model = {
        name: rows_of(line for line in lines if line.cell["model_name"] == name)
        for name in dict.fromkeys(line.cell["model_name"] for line in lines)
    }
    return [
        table(rows, varying(rows) or [QUESTIONS[-2]], columns, name)
        for name, rows in by_model.items()
        if rows
    ]


_INDEX = (
    Column("model", left=True),
    Column("cells", 0),
    Column("failed", 0),
    Column("latency ms (best)", 1, empty=""),
    Column("examples/s (best)", 2, empty=""),
    Column("J/example (least)", 2, empty=""),
)


def _index(models: Sequence[Model]) -> str:
    """The page that leads to the others."""
    made = Table(_INDEX)
    for model in models:
        best = {
            name: of((x for r in model.rows if (x := r.figures[name]) is not None), default=None)
            for name, of in (("latency ms", min), ("examples/s", max), ("J/example", min))
        }
        link = Markup(f"[{markdown_cell(model.name)}]({model.stem}.md)")
        made.rows.append([link, len(model.rows), len(model.failed), *best.values()])
    all_in_one = "Everything in one page: index.html."
    return Page("Profiles", [made, _all_hosts(models), all_in_one]).markdown()


def _all_hosts(models: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(host for model in models for host in model.hosts))


def _everything(models: Sequence[Model]) -> str:
    """All pages, plots included, in one file."""
    legend = "; ".join(f"{c.name}: {c.note}" for c in figures())
    parts: list[Part] = [_all_hosts(models), f"A click on a heading sorts. {legend}."]
    for model in models:
        parts += [Heading(model.name, 1), *model.parts]
    return Page("Profiles of vision-language models", parts).html()
