"""`vlm-prune show`'s page in a real browser: figure, table, rows, and texts that stay texts."""

from __future__ import annotations

import json
import re

import pytest

from tests.pages.conftest import fits
from tests.pages.folder import EVIL, write_folder
from vlm_prune_ext import cli
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.results import read
from vlm_prune_ext.pages import show
from vlm_prune_ext.pages.show import content, page, write_page

pytest.importorskip("vl_convert", reason="the extra `show` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sweep") / "results")


@pytest.fixture(scope="module")
def address(folder):
    return write_page(read(folder)).as_uri()


# -- the file --------------------------------------------------------------------------------------
def test_no_text_is_markup(folder):
    """What data sets and models say is in one place, as JSON without a single angle bracket."""
    written = page(read(folder), "const library = '</script><!--';")
    assert EVIL not in written and "<img src=x" not in written
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', written)
    assert "<" not in found and EVIL in json.loads(found)["data"][0]["rows"][1]["question"]
    assert written.count("</script>") == 3 and "<!--" not in written


def test_everything_is_inside(folder, address):
    written = page(read(folder), "")
    assert not re.search(r"<(?:script|img|link)\b[^>]+(?:src|href)=(?!\"data:)", written)
    assert "default-src 'none'" in written and (folder / "index.html").stat().st_size < 3 << 20


def test_pictures_stay_below_their_limit_and_rows_below_theirs(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "many", data=["Set_A"], rows=12)
    monkeypatch.setattr(show, "MAX_ROWS", 5)
    found = content(read(folder))
    assert len(found["pictures"]) == 2  # each once; the third's rows are not among them
    rows = found["data"][0]["rows"]
    assert (len(rows), found["data"][0]["total"]) == (5, 12)
    assert all(len({a["score"] for a in row["answers"]}) == 2 for row in rows)  # who disagrees
    monkeypatch.setattr(show, "PICTURE_BYTES", 2000)
    tight = content(read(folder))
    assert sum(map(len, tight["pictures"])) <= 2000
    assert -1 in {place for row in tight["data"][0]["rows"] for place in row["pictures"]}


def test_a_picture_that_is_gone_costs_itself_alone(tmp_path):
    folder = write_folder(tmp_path / "gone")
    for path in folder.glob("picture_*.png"):
        path.write_bytes(b"no picture")
    found = content(read(folder))
    assert found["pictures"] == [] and found["data"][0]["rows"][0]["pictures"] == [-1]


# -- the command -----------------------------------------------------------------------------------
def test_command(tmp_path, capsys):
    folder = write_folder(tmp_path / "results")
    assert cli.main(["show", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert (folder / "index.html").stat().st_size > 500_000


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_folders_without_results(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["show", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1
    assert not (tmp_path / name / "index.html").exists()


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(InputError, match=r"vlm-prune-ext\[show\]"):
        show.library()


# -- the page --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("phone", "dark")])
def test_it_fits_and_draws(visit, address, size, scheme):
    window = visit(address, size, scheme)
    window.wait_for_selector("#plots[data-ready='tokens']")
    assert window.locator(".plot svg").count() == 2
    assert window.locator("#rows .detail .panels img").count() >= 2
    assert fits(window)
    window.locator("#columns summary").click()
    assert fits(window)
    assert window.locator("#facts").inner_text().startswith("8 of 9 runs")


def test_hover_and_costs(visit, address):
    window = visit(address)
    window.wait_for_selector("#plots[data-ready='tokens']")
    window.locator(".plot").first.locator("path[aria-label*='fastv_rank64']").first.hover()
    tip = window.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "fastv_rank64" in tip.inner_text() and "576 → 64" in tip.inner_text()
    assert re.search(r"66\.7\s+\[20\.8, 93\.9\]", tip.inner_text())  # Wilson's, 2 of 3
    window.locator("#cost").select_option("ttft")
    window.wait_for_selector("#plots[data-ready='ttft']")
    assert "time to first token" in window.locator(".plot svg").first.inner_html()
    # Joules were not measured.
    assert window.locator("#cost option").count() == 3


def test_methods_are_switched_off(visit, address):
    window = visit(address)
    window.wait_for_selector("#plots[data-ready]")
    marks = window.locator(".plot").first.locator("path[aria-label*='random_keep64']")
    assert marks.count() == 1
    window.get_by_role("button", name="random", exact=True).click()
    marks.wait_for(state="detached")


def column(window, name):
    place = window.locator("#table th").all_inner_texts().index(name)
    cells = window.locator("#table tbody tr").all()
    return [row.locator("td").nth(place).inner_text() for row in cells]


def test_table_sorts_filters_and_hides(visit, address):
    window = visit(address)
    heading = window.get_by_role("button", name="FLOPs", exact=True)
    heading.click()
    rising = column(window, "FLOPs")
    assert rising[0] == "1.000" and rising[-1] == "–" and sorted(rising[:-1])[::-1] == rising[:-1]
    window.keyboard.press("Enter")  # the heading still has the focus
    falling = column(window, "FLOPs")
    assert falling[:-1] == rising[:-1][::-1] and falling[-1] == "–"
    assert window.locator("th[aria-sort='ascending']").inner_text() == "FLOPs"
    window.locator("#find-run").fill("fastv Set_B")
    assert set(column(window, "data")) == {"Set_B"} and len(column(window, "method")) == 2
    window.locator("#columns summary").click()
    window.get_by_label("FLOPs", exact=True).uncheck()
    window.get_by_label("peak GiB").check()
    heads = window.locator("#table th").all_inner_texts()
    assert "FLOPs" not in heads and "peak GiB" in heads


def test_rows_are_found(visit, address):
    window = visit(address)
    shown = window.locator("#list li")
    assert shown.count() == 3
    for which, count in {"differ": 2, "lost": 2, "gained": 0, "wrong": 0, "failed": 0}.items():
        window.locator("#which").select_option(which)
        assert shown.count() == count, which
    window.locator("#which").select_option("all")
    window.locator("#category").select_option("colour")
    assert shown.count() == 1
    window.locator("#category").select_option("")
    window.locator("#find-row").fill("STAR")
    assert shown.count() == 1 and "2 of 4 right" in shown.first.inner_text()
    assert window.locator("#detail h3").inner_text() == "Which colour is the star?"
    assert window.locator("#detail .mark.wrong").count() == 2
    window.locator("#find-row").fill("nothing of the kind")
    assert shown.count() == 0 and "No row" in window.locator("#detail").inner_text()


def test_patches_of_each_setting(visit, address):
    window = visit(address)
    veils = window.locator("#detail img.veil")
    caption = window.locator("#detail figcaption").last
    assert veils.count() == 1 and "entering layer 3\n64 of 576" in caption.inner_text()
    before = veils.first.get_attribute("src")
    window.locator("[data-setting='fastv_rank192']").click()
    assert "192 of 576" in caption.inner_text()
    assert veils.first.get_attribute("src") != before
    dropped = """async (veil) => {
        await veil.decode();
        const canvas = new OffscreenCanvas(veil.naturalWidth, veil.naturalHeight);
        const paper = canvas.getContext('2d');
        paper.drawImage(veil, 0, 0);
        const pixels = paper.getImageData(0, 0, canvas.width, canvas.height).data;
        return [pixels.length / 4, pixels.filter((_, n) => n % 4 === 3 && pixels[n] > 0).length];
    }"""
    assert veils.first.evaluate(dropped) == [576, 576 - 192]


def test_by_keyboard(visit, address):
    window = visit(address)
    window.locator("#list button").first.focus()
    window.keyboard.press("ArrowDown")
    assert "What is" in window.locator("#detail h3").inner_text()
    window.locator("#detail [data-step='1']").focus()
    window.keyboard.press("Enter")
    assert "star" in window.locator("#detail h3").inner_text()
    window.locator("#columns summary").focus()
    window.keyboard.press("Enter")
    assert window.locator("#columns").get_attribute("open") is not None
    window.keyboard.press("Escape")
    assert window.locator("#columns").get_attribute("open") is None


def test_scripts_are_text(visit, address):
    """In questions, answers, reasons and settings; a dialog or an error would fail every test."""
    window = visit(address)
    window.locator("#list button").nth(1).click()
    assert EVIL in window.locator("#detail h3").inner_text()
    window.locator("#list button").first.click()
    assert f"no {EVIL}" in window.locator("#detail td.text").last.inner_text()
    assert EVIL in window.locator("#table").inner_text()
    window.locator("details.settings summary").click()
    assert EVIL in window.locator("#settings").inner_text()
    assert window.locator("main script, main img[src='x']").count() == 0


def test_theme(visit, address):
    window = visit(address)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = window.evaluate(paper)
    window.locator("#theme").click()
    window.locator("#theme").click()
    assert window.locator("#theme").inner_text() == "Theme: dark"
    assert window.evaluate(paper) != light
