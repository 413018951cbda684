"""Tables and pictures of results, in every form that a command writes: console, Markdown, CSV,
HTML, JSON and PNG.

A command states columns and rows once. What stands in a cell may come from anywhere (an answer, a
row's name, a file), so each form escapes it here: Markdown and HTML show it as it is, no escape
sequence reaches a terminal, and a spreadsheet takes it for text whatever it begins with.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_prune_ext.experiment import metrics
from vlm_prune_ext.experiment.log import write_whole

FORMATS = ("md", "csv", "html", "json")


# -- escaping --------------------------------------------------------------------------------------
class Markup(str):
    """A cell that this package wrote as Markdown (a link, code) and that is not to be escaped."""


def terminal_text(value: object) -> str:
    """One line without anything that a terminal would obey: control characters, line ends and
    marks that turn the direction of text are written out (``\\x1b``)."""
    return "".join(_shown(c) for c in str(value))


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return character.encode("unicode_escape", "backslashreplace").decode()
    return character


def say(line: object, *, error: bool = False) -> None:
    """Print a line that may hold what others wrote: on standard output, or on standard error."""
    print(terminal_text(line), file=sys.stderr if error else sys.stdout, flush=True)


def markdown_cell(value: object) -> str:
    """A cell of a Markdown table that reads as the value."""
    if isinstance(value, Markup):
        return str(value)
    text = terminal_text(value)
    for sign in "\\`*[]|~$":
        text = text.replace(sign, f"\\{sign}")
    text = _EMPHASIS.sub(r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # not inside a word


def html_cell(value: object) -> str:
    """A cell of an HTML table that reads as the value."""
    return html.escape(terminal_text(value))


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def sheet_cell(text: str) -> str:
    """A text that spreadsheets take for text: with an apostrophe in front where they might see a
    formula. :func:`plain_cell` takes it off again."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def plain_cell(text: str) -> str:
    """What :func:`sheet_cell` was given."""
    return text[1:] if text[:1] == "'" and text[1:].startswith(_FORMULA) else text


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; texts by :func:`sheet_cell`, numbers as they are, ``None`` empty."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")  # "\r\n" at its end, else a cell with "\r" is not quoted
        csv.writer(line).writerow([sheet_cell(x) if isinstance(x, str) else x for x in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


# -- tables ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: heading, and key in JSON.
        digits: behind the point, for numbers.
        note: what it is, for the legend.
        left: whether it is text, flush left.
        key: its name in CSV and JSON, where that is another.
        unit: written behind numbers.
        empty: what stands where there is no value.
    """

    name: str
    digits: int = 1
    note: str = ""
    left: bool = False
    key: str = ""
    unit: str = ""
    empty: str = "-"

    def text(self, value: object) -> object:
        """A value as people read it: numbers rounded."""
        if value is None:
            return self.empty
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return f"{value:.{self.digits}f}{self.unit}"


@dataclass(frozen=True)
class Figure(Column):
    """A column that knows where a result has its figure: one declaration a figure.

    Attributes:
        path: names of keys joined by dots; of several paths, joined by ``+``, the sum.
        scale: from there to what is shown.
    """

    path: str = ""
    scale: float = 1.0

    def of(self, result: Mapping[str, Any]) -> Any:
        """The value as it is shown; ``None`` where there is none."""
        found = [_dig(result, path) for path in self.path.split("+")]
        if any(value is None for value in found):
            return None
        if self.left:
            return found[0]
        return sum(found) if self.scale == 1 else sum(found) * self.scale


def _dig(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def metric_figures(path: str = "metrics", empty: str = "-") -> list[Figure]:
    """A column for each metric that every command shows.

    Args:
        path: where results have the values, by the metrics' names.
        empty: what stands where there is no value.
    """
    shown = (metrics.METRICS[name] for name in metrics.everywhere())
    return [
        Figure(m.title, m.digits, m.help, key=m.name, empty=empty, path=f"{path}.{m.name}")
        for m in shown
    ]


@dataclass
class Table:
    """Columns, rows, and what to say about them.

    Attributes:
        columns: in order.
        rows: of values (numbers, texts, ``None``), one per column.
        title: above.
        notes: sentences below.
    """

    columns: Sequence[Column]
    rows: list[Sequence[Any]] = field(default_factory=list)
    title: str = ""
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(figures: Sequence[Figure], results: Iterable[Mapping[str, Any]], **more: Any) -> Table:
        """A row per result, a column per figure; ``more``: title and notes."""
        return Table(figures, [[one.of(result) for one in figures] for result in results], **more)

    def cells(self) -> list[list[object]]:
        """Rows as people read them."""
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def keys(self) -> list[str]:
        """Names of the columns in CSV and JSON."""
        return [column.key or column.name for column in self.columns]

    def legend(self) -> str:
        """What the columns are, where their names do not say it."""
        return "; ".join(f"{c.name}: {c.note}" for c in self.columns if c.note)

    def markdown(self) -> str:
        """As a Markdown page's part."""
        rules = ["---" if column.left else "---:" for column in self.columns]
        lines: list[Sequence[object]] = [[c.name for c in self.columns], *self.cells()]
        shown = [f"| {' | '.join(map(markdown_cell, line))} |" for line in lines]
        shown.insert(1, f"| {' | '.join(rules)} |")
        parts = [f"## {markdown_cell(self.title)}", ""] if self.title else []
        parts += shown
        for note in (self.legend(), *self.notes):
            parts += ["", markdown_cell(note)] if note else []
        return "\n".join(parts) + "\n"

    def csv(self) -> str:
        """As CSV: values in full, a header of keys."""
        return csv_text([self.keys(), *self.rows])

    def html(self) -> str:
        """As an HTML page without anything from elsewhere."""
        notes = (f"<p>{html_cell(note)}</p>" for note in (self.legend(), *self.notes) if note)
        return html_page(self.title, [self.html_table(), *notes])

    def html_table(self) -> str:
        """As part of an HTML page; a click on a heading sorts."""
        head = "".join(
            f'<th title="{html_cell(column.note)}">{html_cell(column.name)}</th>'
            for column in self.columns
        )
        body = "".join(
            f"<tr>{''.join(map(_html_cell, self.columns, values, shown))}</tr>\n"
            for values, shown in zip(self.rows, self.cells(), strict=True)
        )
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n'
            f"{body}</tbody></table></div>"
        )

    def records(self) -> list[dict[str, Any]]:
        """Rows as objects."""
        return [dict(zip(self.keys(), row, strict=True)) for row in self.rows]

    def json(self) -> str:
        """As JSON: a list of objects."""
        return json.dumps(self.records(), indent=2, ensure_ascii=False, default=str) + "\n"

    def show(self, *, boxed: bool = False) -> None:
        """Print it: as a table of lines on a terminal (or anywhere, ``boxed``), in plain columns
        when piped."""
        if boxed or sys.stdout.isatty():
            console().print(self.rich())
        else:
            print(plain_columns([[c.name for c in self.columns], *self.cells()]))

    def rich(self) -> Any:
        """As rich draws it; texts are shown as they are, not read as markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=Text(terminal_text(self.title)) if self.title else None)
        drawn.title_justify = "left"
        for place, column in enumerate(self.columns):
            last = column.left and place == len(self.columns) - 1
            drawn.add_column(
                Text(terminal_text(column.name)),
                justify="left" if column.left else "right",
                no_wrap=not last,
                overflow="fold",
                ratio=1 if last and place else None,
            )
        for row in self.cells():
            drawn.add_row(*(Text(terminal_text(cell)) for cell in row))
        return drawn


def plain_columns(lines: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns, two spaces apart, no line broken: easy to grep and cut."""
    shown = [[terminal_text(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in shown]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def console() -> Any:
    """Where tables go: as wide as the terminal, wide enough without one."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def bars() -> Any:
    """Progress bars with the time left, on standard error; gone when they are through."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def write_table(folder: Path, stem: str, table: Table, formats: Iterable[str] = FORMATS) -> None:
    """Write a table in several forms: ``<stem>.md`` and so on.

    Raises:
        InputError: the folder cannot be written.
    """
    made = {"md": table.markdown, "csv": table.csv, "html": table.html, "json": table.json}
    for name in formats:
        write_whole(folder / f"{stem}.{name}", made[name]())


def _html_cell(column: Column, value: object, shown: object) -> str:
    kind = ' class="t"' if column.left else ""
    sorts = html_cell("" if value is None else value)
    return f'<td{kind} data-value="{sorts}">{html_cell(shown)}</td>'


# -- pages -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Heading:
    """In front of what follows it; of two levels, 1 and 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Picture:
    """A PNG that is there; a Markdown page beside it names it, an HTML page holds it."""

    path: Path
    title: str


Part = Heading | Picture | Table | str | list[str]
"""Of a page: a text is a paragraph, several are a list."""


@dataclass
class Page:
    """A title and what stands below it."""

    title: str
    parts: list[Part]

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join([f"# {markdown_cell(self.title)}", "", *map(_markdown_part, self.parts)])

    def html(self) -> str:
        """As an HTML page without anything from elsewhere; links lead to several chapters."""
        chapters = [p.text for p in self.parts if isinstance(p, Heading) and p.level == 1]
        links = (f'<a href="#{_anchor(name)}">{html_cell(name)}</a>' for name in chapters)
        contents = [f"<p>{' · '.join(links)}</p>"] if len(chapters) > 1 else []
        return html_page(self.title, [*contents, *map(_html_part, self.parts)])


def _markdown_part(part: Part) -> str:
    match part:
        case Heading():
            return f"{'#' * part.level} {markdown_cell(part.text)}\n"
        case Picture():
            return f"![{part.title}]({part.path.name})\n"
        case Table():
            return part.markdown()
        case list():
            return "".join(f"- {markdown_cell(one)}\n" for one in part)
    return f"{markdown_cell(part)}\n"


def _html_part(part: Part) -> str:
    match part:
        case Heading():
            tag = f"h{part.level + 1}"
            return f'<{tag} id="{_anchor(part.text)}">{html_cell(part.text)}</{tag}>'
        case Picture():
            return html_image(part.path, part.title)
        case Table():
            return part.html_table()
        case list():
            return f"<ul>{''.join(f'<li>{html_cell(one)}</li>' for one in part)}</ul>"
    return f"<p>{html_cell(part)}</p>"


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page of parts that are HTML already."""
    return _PAGE.format(title=html_cell(title), body="\n".join(parts), script=_SORT)


def html_image(path: Path, title: str) -> str:
    """A picture, in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html_cell(title)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #8886; text-align: right }}
th, .t {{ text-align: left }} th {{ cursor: pointer; vertical-align: bottom }}
th[aria-sort=ascending]::after {{ content: " \\25B2" }}
th[aria-sort=descending]::after {{ content: " \\25BC" }}
img {{ max-width: 100%; height: auto; background: white; margin: .8em 0 }}
.scroll {{ overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body></html>
"""

# Empty cells go last in both directions.
_SORT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[place].dataset.value;
  Array.from(body.rows).sort((one, two) => {
    const a = value(one), b = value(two);
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = !isNaN(a) && !isNaN(b);
    const side = numbers ? a - b : isNaN(a) - isNaN(b) || (a < b ? -1 : a > b ? 1 : 0);
    return up ? side : -side;
  }).forEach(row => body.appendChild(row));
}));
"""


# -- pictures --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: in the legend; empty: not in it.
        points: ``(x, y)``, drawn in the order of x.
        style: matplotlib's format.
        color: number of a colour; lines of one number share it.
        low, high: a band around it, per point.
        bars: whether the band is drawn as error bars.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "o-"
    color: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    bars: bool = False


def line_plot(
    panels: Mapping[str, Sequence[Line]],
    path: Path,
    *,
    x: str,
    y: str | None,
    log_x: bool = False,
    ticks: Sequence[float] | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    share_y: bool = True,
) -> None:
    """Lines, a panel per entry, one legend beside the last.

    Args:
        panels: title of a panel -> its lines.
        path: PNG (or PDF, SVG: by the name's ending).
        x, y: labels of the axes; without ``y`` each panel has an axis of its own from 0, named by
            its title.
        log_x: whether the x axis is logarithmic, base 2.
        ticks: places on the x axis that are marked.
        limits: of the y axis.
        title: above all.
        share_y: whether the panels have one y axis.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colors = mpl.color_sequences["tab10"]
    size = (3.4 + 3.8 * len(panels), 4.2)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=y is not None and share_y, squeeze=False)[0]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            order = sorted(range(len(line.points)), key=lambda i: line.points[i])
            xs, ys = ([line.points[i][k] for i in order] for k in (0, 1))
            color = colors[line.color % len(colors)]
            axis.plot(xs, ys, line.style, color=color, label=_plain(line.name) or None)
            if line.low is not None and line.high is not None:
                band = ([line.low[i] for i in order], [line.high[i] for i in order])
                if line.bars:
                    sides = [[abs(y - e) for y, e in zip(ys, ends, strict=True)] for ends in band]
                    axis.errorbar(xs, ys, sides, fmt="none", color=color, alpha=0.5, capsize=2)
                else:
                    axis.fill_between(xs, *band, alpha=0.15, color=color)
        if log_x:
            axis.set_xscale("log", base=2)
        if ticks:
            axis.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        if limits:
            axis.set_ylim(*limits)
        if y is None:
            axis.set_ylabel(_plain(name))
            axis.set_ylim(0, axis.get_ylim()[1])
        else:
            axis.set_title(_plain(name), fontsize=10)
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
    if y is not None:
        axes[0].set_ylabel(y)
    handles, _ = axes[-1].get_legend_handles_labels()
    if handles:
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    if title:
        figure.suptitle(_plain(title), fontsize=9)
    save(figure, path)


def bar_plot(
    panels: Mapping[str, Sequence[float | None] | Mapping[str, Sequence[float | None]]],
    names: Sequence[str],
    path: Path,
    *,
    digits: int = 3,
    floors: Mapping[str, Sequence[float | None]] | None = None,
    title: str = "",
) -> None:
    """Horizontal bars, a panel per figure, the same rows in each, the first on top.

    Args:
        panels: title of a panel -> a value per row; ``None`` has no bar. Several parts by name are
            stacked.
        names: of the rows.
        path: PNG.
        digits: of the numbers behind the bars.
        floors: title of a panel -> a mark per row (what a device allows).
        title: above all.
    """
    from matplotlib.figure import Figure

    height = 1.2 + 0.32 * max(len(names), 2)
    figure = Figure(figsize=(2.2 + 2.3 * len(panels), height), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = range(len(names))
    for axis, (name, given) in zip(axes, panels.items(), strict=True):
        parts = given if isinstance(given, Mapping) else {"": given}
        values: list[float | None] = [None] * len(names)
        for part, color in zip(parts, itertools.cycle(_COLORS)):
            left = [value or 0.0 for value in values]
            more = [value or 0.0 for value in parts[part]]
            bars = axis.barh(places, more, left=left, color=color, label=_plain(part) or None)
            values = [_sum(a, b) for a, b in zip(values, parts[part], strict=True)]
        if len(parts) > 1:
            axis.legend(fontsize=7)
        said = ["–" if value is None else f"{value:.{digits}f}" for value in values]
        axis.bar_label(bars, said, padding=2, fontsize=8)
        if floors and name in floors:
            marks = [float("nan") if floor is None else floor for floor in floors[name]]
            axis.plot(marks, places, "|", color="black", ms=11, mew=2)
        axis.set_title(_plain(name), fontsize=10)
        axis.set_xlim(0, 1.3 * max([value for value in values if value], default=1.0))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, [_plain(name) for name in names], fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    if title:
        figure.suptitle(_plain(title), fontsize=9)
    save(figure, path)


_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def _sum(first: float | None, second: float | None) -> float | None:
    """Of what there is."""
    there = [value for value in (first, second) if value is not None]
    return sum(there) if there else None


def save(figure: Any, path: Path) -> None:
    """Write a figure whole, in the form that the file's name says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format=path.suffix.lstrip(".") or "png")
    write_whole(path, out.getvalue())


def _plain(text: str) -> str:
    """A text that matplotlib does not read as mathematics."""
    return terminal_text(text).replace("$", r"\$")
