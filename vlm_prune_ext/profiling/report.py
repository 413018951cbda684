"""Reports from the log: a Markdown page a model with plots, an index, and one HTML page."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.profiling.log import Line, Log
from vlm_prune_ext.profiling.page import html_page
from vlm_prune_ext.profiling.plots import draw
from vlm_prune_ext.profiling.rows import (
    FIGURES,
    QUESTIONS,
    Question,
    Row,
    answer_to,
    cell_text,
    energy_note,
    failures_of,
    held_fixed,
    hosts_of,
    image_note,
    order,
    rows_of,
    shared_settings,
    varying,
)
from vlm_prune_ext.profiling.sections import ModelReport, Section, columns_of, failed_text

FOLDER = "pretty_results"


def write_reports(out: Path) -> list[Path]:
    """Write all reports of a log.

    Args:
        out: folder of the log.

    Returns:
        the pages: index, HTML, then one a model.

    Raises:
        InputError: no log, or nothing in it.
    """
    from vlm_prune_ext.profiling.runner import LOG

    lines = Log(out / LOG).read()
    if not lines:
        raise InputError(f"--out {str(out)!r} has no {LOG} with cells: measure some first.")
    folder = out / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        models = [_model(name, lines, folder) for name in _names(lines)]
        pages = []
        for model in models:
            pages.append(folder / f"{model.stem}.md")
            pages[-1].write_text(markdown(model), encoding="utf-8")
        (folder / "index.md").write_text(index(models), encoding="utf-8")
        (folder / "index.html").write_text(html_page(models, folder), encoding="utf-8")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(out / LOG)!r} has a line that vlm-prune profile did not write ({error!r}): give "
            "another --out."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {str(folder)!r} cannot be written ({reason}).") from error
    return [folder / "index.md", folder / "index.html", *pages]


def _names(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.cell["model_name"] for line in lines))


def _model(name: str, lines: Sequence[Line], folder: Path) -> ModelReport:
    own = [line for line in lines if line.cell["model_name"] == name]
    rows = sorted(rows_of(own), key=_all_axes)
    stem = _stem(name, _names(lines))
    sections = []
    for question in varying(rows):
        chosen = answer_to(question, rows)
        if len({repr(row.setting(question.axis)) for row in chosen}) < 2:
            continue
        plot = f"{stem}_{question.axis}.png"
        draw(question, chosen, folder / plot)
        note = image_note(chosen) if question.axis == "img_size" else ""
        sections.append(Section(question, chosen, held_fixed(question, chosen, rows), note, plot))
    return ModelReport(name, stem, rows, sections, failures_of(own), hosts_of(own))


def _all_axes(row: Row) -> tuple:
    return tuple(order(row, question.axis)[:2] for question in QUESTIONS)


def _stem(name: str, all_names: Sequence[str]) -> str:
    """File name of a model: its last part, with a digest where two would be the same."""

    def last(text: str) -> str:
        return re.sub(r"[^\w.-]+", "-", text.rstrip("/").rpartition("/")[2]) or "model"

    stem = last(name)
    if sum(last(other).lower() == stem.lower() for other in all_names) > 1 or stem == "index":
        stem += "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
    return stem


# -- Markdown ------------------------------------------------------------------------------------
def markdown(model: ModelReport) -> str:
    """A model's page."""
    parts = [f"# {model.name}", "", *(f"- {host}" for host in model.hosts)]
    if model.rows:
        parts += [f"- {shared_settings(model.rows)}", f"- {energy_note(model.rows)}", ""]
    for section in model.sections:
        parts += [f"## {section.question.title}", ""]
        parts += [f"Everything else: {section.fixed}.", ""] if section.fixed else []
        parts += [section.note, ""] if section.note else []
        parts += [table(section.rows, columns_of(section)), ""]
        parts += [f"![{section.question.title}]({section.plot})", ""]
    if model.rows:
        parts += ["## All cells", "", table(model.rows, varying(model.rows)), "", legend(), ""]
    if model.failed:
        parts += ["## Failed", "", *(f"- {failed_text(line)}" for line in model.failed), ""]
    return "\n".join(parts)


def table(rows: Sequence[Row], axes: Sequence[Question]) -> str:
    """Rows as a Markdown table."""
    heads = [question.column for question in axes] + [column.name for column in FIGURES]
    rules = ["---"] * len(axes) + ["---:"] * len(FIGURES)
    lines = [heads, rules]
    for row in rows:
        shown = [row.shown(question.axis) or "default" for question in axes]
        lines.append(shown + [cell_text(c, row.figures[c.name]) for c in FIGURES])
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def legend() -> str:
    """What the columns are."""
    return "; ".join(f"*{column.name}*: {column.note}" for column in FIGURES) + "."


def index(models: Sequence[ModelReport]) -> str:
    """The page that leads to the others."""
    parts = [
        "# Profiles",
        "",
        "| model | cells | failed | latency ms (best) | examples/s (best) | J/example (least) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in models:
        figures = [row.figures for row in model.rows]
        energy = [f["J/example"] for f in figures if f["J/example"] is not None]
        cells = [
            f"[{model.name}]({model.stem}.md)",
            str(len(model.rows)),
            str(len(model.failed)),
            f"{min(f['latency ms'] for f in figures):.1f}" if figures else "",
            f"{max(f['examples/s'] for f in figures):.2f}" if figures else "",
            f"{min(energy):.2f}" if energy else "",
        ]
        parts.append(f"| {' | '.join(cells)} |")
    hosts = dict.fromkeys(host for model in models for host in model.hosts)
    parts += ["", *(f"- {host}" for host in hosts), "", "Everything in one page: index.html.", ""]
    return "\n".join(parts)
