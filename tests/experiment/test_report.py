"""Tables in every form: the same values, and nothing in a cell is obeyed."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlm_prune_ext.experiment.report import (
    Column,
    Line,
    Markup,
    Table,
    bar_plot,
    line_plot,
    plain_cell,
    sheet_cell,
    terminal_text,
    write_table,
)

HOSTILE = (
    "=1+1",
    '=HYPERLINK("http://evil","A")',
    "+1",
    "-2",
    "@SUM(1)",
    "'quoted",
    "\t=1",
    "my[/b]set [red]x",
    "<script>alert(1)</script>",
    "a | b\nc",
    "\x1b[2J\x1b[31mfake",
    "\u202egnp.exe",
    "[x](http://evil)",
    "`code` *bold* \\",
    "None",
    "",
    " A ",
    "007",
)


def table(*texts: str) -> Table:
    columns = [Column("name", left=True), Column("score", 2, "percent", key="value")]
    return Table(columns, [[text, index / 3] for index, text in enumerate(texts)], "Title <1>")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = [""]
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "td":
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("")


def test_html_shows_what_it_is_given() -> None:
    reader = Reader()
    reader.feed(table(*HOSTILE).html())
    assert reader.cells[::2] == [terminal_text(text) for text in HOSTILE]
    assert not {"a", "img"} & set(reader.tags)
    assert reader.tags.count("script") == 1  # that sorts


def test_csv_reads_back_equal_and_is_text_to_a_spreadsheet() -> None:
    read = list(csv.reader(io.StringIO(table(*HOSTILE).csv())))
    assert read[0] == ["name", "value"]
    assert [plain_cell(row[0]) for row in read[1:]] == list(HOSTILE)
    assert all(row[0][:1] not in tuple("=+-@\t\r") or not row[0] for row in read[1:])
    assert float(read[2][1]) == 1 / 3  # numbers in full


@pytest.mark.parametrize("text", HOSTILE)
def test_apostrophes_are_taken_off_again(text: str) -> None:
    assert plain_cell(sheet_cell(text)) == text
    assert plain_cell(sheet_cell(sheet_cell(text))) == sheet_cell(text)


def test_markdown_keeps_one_line_a_row_and_escapes() -> None:
    lines = table(*HOSTILE).markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(HOSTILE)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "<script>" not in "".join(lines) and "\\[x\\](http" in "".join(lines)
    assert "score: percent" in lines
    trusted = Table([Column("a", left=True)], [[Markup("[x](y.md)")]]).markdown()
    assert "[x](y.md)" in trusted


def test_terminals_obey_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for boxed in (False, True):
        table(*HOSTILE).show(boxed=boxed)
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said
    assert said.count("my[/b]set [red]x") == 2  # not read as rich's markup
    assert terminal_text("a\x1b[1m\u2028é 中") == "a\\x1b[1m\\u2028é 中"


def test_all_forms_say_the_same(tmp_path: Path) -> None:
    made = table("x", "y")
    made.rows.append(["z", None])
    write_table(tmp_path, "t", made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.html", "t.json", "t.md"]
    assert json.loads((tmp_path / "t.json").read_text())[1:] == [
        {"name": "y", "value": 1 / 3},
        {"name": "z", "value": None},
    ]
    assert "| y | 0.33 |" in (tmp_path / "t.md").read_text()
    assert "| z | - |" in (tmp_path / "t.md").read_text()
    assert (tmp_path / "t.csv").read_text().splitlines()[-1] == "z,"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """Each is a picture with something in it; names are not read as mathematics."""
    points = [(32, 1.0), (576, 3.0)]
    lines = [Line("$a^2", points, low=[0, 2], high=[2, 4]), Line("", points, "x", 3)]
    more = {"x": "tokens", "y": "score", "log_x": True, "ticks": [32, 576], "limits": (0, 5)}
    line_plot({"one": lines, "two_$": lines}, tmp_path / "l.png", title="t", **more)  # type: ignore[arg-type]
    bar_plot({"a": [1.0, None], "b": [0.0, 2.0]}, ["x_$1", "y"], tmp_path / "b.png")
    bar_plot({"a": {"one": [1.0, None], "two": [2.0, 1.0]}}, ["x", "y"], tmp_path / "s.png")
    for name in ("l.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 20
