"""One HTML page with everything in it: tables that sort at a click, and the plots."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_prune_ext.profiling.rows import (
    FIGURES,
    Question,
    Row,
    cell_text,
    energy_note,
    shared_settings,
    varying,
)
from vlm_prune_ext.profiling.sections import ModelReport, Section, columns_of, failed_text

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1800px;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 1.8rem; } .scroll { overflow-x: auto; } .small { font-size: .85rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
         white-space: nowrap; }
th { background: var(--head); cursor: pointer; user-select: none; }
th[data-kind=text], td.text { text-align: left; }
th[aria-sort=ascending]::after { content: " \\25B2"; }
th[aria-sort=descending]::after { content: " \\25BC"; }
tbody tr:hover { background: var(--head); }
img { max-width: 100%; height: auto; background: white; margin: .8rem 0; }
"""

# Empty cells go last in both directions.
_SCRIPT = """
document.querySelectorAll("th").forEach(function (head) {
  head.addEventListener("click", function () {
    var body = head.closest("table").tBodies[0];
    var up = head.getAttribute("aria-sort") !== "ascending";
    var place = head.cellIndex;
    head.parentNode.querySelectorAll("th").forEach(function (other) {
      other.removeAttribute("aria-sort");
    });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    Array.from(body.rows).map(function (row) {
      return { row: row, value: row.cells[place].dataset.value };
    }).sort(function (a, b) {
      if (a.value === "" || b.value === "") {
        return (a.value === "") - (b.value === "");
      }
      var x = Number(a.value), y = Number(b.value), side;
      if (isNaN(x) && isNaN(y)) { side = a.value < b.value ? -1 : a.value > b.value ? 1 : 0; }
      else if (isNaN(x) || isNaN(y)) { side = isNaN(x) - isNaN(y); }
      else { side = x - y; }
      return up ? side : -side;
    }).forEach(function (entry) { body.appendChild(entry.row); });
  });
});
"""


def html_page(models: Sequence[ModelReport], folder: Path) -> str:
    """The page.

    Args:
        models: what is on it.
        folder: where their plots are.
    """
    hosts = dict.fromkeys(host for model in models for host in model.hosts)
    parts = [
        "<h1>Profiles of vision-language models</h1>",
        "<ul>" + "".join(f"<li>{escape(host)}</li>" for host in hosts) + "</ul>",
        '<p class="small">A click on a heading sorts. '
        + "; ".join(f"<b>{escape(c.name)}</b>: {escape(c.note)}" for c in FIGURES)
        + ".</p>",
    ]
    if len(models) > 1:
        links = [f'<a href="#{escape(m.stem)}">{escape(m.name)}</a>' for m in models]
        parts.append(f"<p>{' · '.join(links)}</p>")
    parts += [_model(model, folder) for model in models]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Profiles</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _model(model: ModelReport, folder: Path) -> str:
    parts = [f'<h2 id="{escape(model.stem)}">{escape(model.name)}</h2>']
    if model.rows:
        said = f"{shared_settings(model.rows)}. {energy_note(model.rows)}"
        parts.append(f"<p>{escape(said)}</p>")
    parts += [_section(section, folder) for section in model.sections]
    if model.rows:
        parts.append("<h3>All cells</h3>")
        parts.append(_table(model.rows, varying(model.rows)))
    if model.failed:
        lines = "".join(f"<li>{escape(failed_text(line))}</li>" for line in model.failed)
        parts.append(f"<h3>Failed</h3><ul>{lines}</ul>")
    return "\n".join(parts)


def _section(section: Section, folder: Path) -> str:
    parts = [f"<h3>{escape(section.question.title)}</h3>"]
    notes = [f"Everything else: {section.fixed}." if section.fixed else "", section.note]
    parts += [f"<p>{escape(note)}</p>" for note in notes if note]
    parts.append(_table(section.rows, columns_of(section)))
    picture = base64.b64encode((folder / section.plot).read_bytes()).decode("ascii")
    title = escape(section.question.title)
    parts.append(f'<img alt="{title}" src="data:image/png;base64,{picture}">')
    return "\n".join(parts)


def _table(rows: Sequence[Row], axes: Sequence[Question]) -> str:
    heads = [f'<th data-kind="text">{escape(question.column)}</th>' for question in axes]
    heads += [f'<th title="{escape(c.note)}">{escape(c.name)}</th>' for c in FIGURES]
    lines = []
    for row in rows:
        cells = [_cell(_sorts(row, q), row.shown(q.axis) or "default", "text") for q in axes]
        for column in FIGURES:
            value = row.figures[column.name]
            cells.append(_cell("" if value is None else value, cell_text(column, value)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _sorts(row: Row, question: Question) -> Any:
    value = row.setting(question.axis)
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool)
        else row.shown(question.axis)
    )


def _cell(value: Any, shown: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<td{name} data-value="{escape(str(value))}">{escape(shown)}</td>'
