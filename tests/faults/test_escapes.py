"""What others wrote, in every form that a command writes: it is shown, and nothing obeys it."""

from __future__ import annotations

import csv
import html
import io
from typing import Any

import pytest

from vlm_prune_ext.experiment.report import (
    Column,
    Table,
    csv_text,
    html_page,
    markdown_cell,
    plain_cell,
    say,
    sheet_cell,
    terminal_text,
)

FORMULAS = ["=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "\uff0b1"]
FORMULAS += ["\uff0d1", "\uff20SUM(1)", "'=1", "''", '=HYPERLINK("http://x","y")', "=cmd|'/C'!A"]
ESCAPES = ["\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\x07", "\x08"]
ESCAPES += ["\r", "\u202e", "\u2066", "\u200f", "\ufeff", "\u2028", "\x00", "\x7f", "\ud800"]
ESCAPES += ["\U000e0041"]
MARKS = ["a|b", "[x](http://x)", "![x](x)", "<img src=x onerror=alert(1)>", "`code`", "**b**"]
MARKS += ["_b_", "__init__", "~~s~~", "$x$", "a_b", "\\", "&lt;", "line\nbreak", "{{ 7 }}"]
MARKS += ["</td></tr></table>"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_spreadsheet_takes_a_text_for_a_formula(text: str) -> None:
    assert sheet_cell(text).startswith("'") and plain_cell(sheet_cell(text)) == text
    (row,) = csv.reader(io.StringIO(csv_text([[text, 1.5]]), newline=""))
    assert plain_cell(row[0]) == text and row[1] == "1.5"


@pytest.mark.parametrize("text", ESCAPES, ids=ascii)
def test_no_terminal_obeys_a_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table([Column(f"name{text}", left=True), Column("[red]b")], title=f"title{text}")
    table.rows.append([f"cell{text}", f"[bold]{text}"])
    table.show(boxed=True)
    table.show()
    say(f"said {text}")
    say(f"said {text}", error=True)
    shown = "".join(capsys.readouterr())
    assert text not in shown.replace("\n", "") and terminal_text(text) in shown
    assert "[red]b" in shown and "[bold]" in shown


@pytest.mark.parametrize("text", [*MARKS, *ESCAPES], ids=ascii)
def test_pages_show_a_text_as_it_is(text: str) -> None:
    """Markdown by the renderer that the tests have; HTML by undoing its escapes."""
    table = Table([Column("name", left=True)], [[text]], title=text)
    page = html_page(text, [table.html_table()])
    assert "<img src=x" not in page and page.count("</table>") == 1 == page.count("</td>")
    assert html.unescape(page).count(terminal_text(text)) >= 2
    line = table.markdown().splitlines()[4]
    assert line == f"| {markdown_cell(text)} |" and "\n" not in line
    assert rendered(line) == [terminal_text(text).strip()]


def rendered(line: str) -> list[str]:
    """Cells of a row of a Markdown table as a reader sees them."""
    parser: Any = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    tokens = parser.enable(["table", "strikethrough"]).parse(f"| h |\n|---|\n{line}\n")
    cells = [token for token in tokens if token.type == "inline"][1:]
    for cell in cells:
        assert {part.type for part in cell.children} <= {"text", "text_special"}, cell.children
    return ["".join(part.content for part in cell.children) for cell in cells]
