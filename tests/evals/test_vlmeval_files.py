"""Several processes on one data set, and processes that were killed: no half files."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("vlmeval")

from vlmeval.dataset import image_base
from vlmeval.dataset.utils import multiple_choice
from vlmeval.smp import dump, load

from vlm_prune_ext.evals.vlmeval_rows import _seldom
from vlm_prune_ext.evals.vlmeval_store import own_files


def test_what_the_loop_has_so_far_is_written_seldom_and_whole_at_the_end() -> None:
    """For a fiftieth of the time at most."""
    written = []

    def slow(data: Any, path: str) -> None:
        written.append(len(data))
        time.sleep(0.02)

    dump, began = _seldom(slow, 500), time.perf_counter()
    for done in range(1, 501):
        time.sleep(0.001)
        dump(dict.fromkeys(range(done)), "rows.pkl")
    assert written[0] == 1 and written[-1] == 500
    assert len(written) <= 3 + (time.perf_counter() - began) / (50 * 0.02)


@pytest.fixture
def encoded() -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_is_not_in_its_place_before_it_is_whole(
    encoded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = tmp_path / "1.png", []
    save = Image.Image.save

    def watched(self: Image.Image, path: Any, *args: Any, **kwargs: Any) -> None:
        save(self, path, *args, **kwargs)
        seen.append((Path(path).suffix, target.exists()))

    monkeypatch.setattr(Image.Image, "save", watched)
    with own_files():
        image_base.decode_base64_to_image_file(encoded, str(target))
    assert seen == [(".png", False)]
    assert list(tmp_path.iterdir()) == [target]
    assert Image.open(target).size == (256, 256)


def test_a_writer_that_fails_leaves_nothing(
    encoded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Image.Image, path: Any, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half)
    with own_files(), pytest.raises(OSError, match="no space left"):
        image_base.decode_base64_to_image_file(encoded, str(tmp_path / "1.png"))
    assert not list(tmp_path.iterdir())


def test_scoring_files_of_the_same_second_differ_and_go() -> None:
    with own_files():
        first = multiple_choice.timestr()
        left = Path("/tmp") / f"{first}.xlsx"
        left.touch()
    assert not left.exists()
    with own_files():
        assert multiple_choice.timestr() != first


def test_vlmevalkit_has_its_own_functions_back() -> None:
    before = image_base.decode_base64_to_image_file, multiple_choice.timestr
    with pytest.raises(KeyError), own_files():
        assert image_base.decode_base64_to_image_file is not before[0]
        raise KeyError
    assert (image_base.decode_base64_to_image_file, multiple_choice.timestr) == before


ANSWERS = ["=1+1", '=HYPERLINK("http://x.y","A")', "http://x.y", "+1", "-2", "@SUM(1)", "{=1}"]
ANSWERS += ["NA", "None", "null", "nan", "007", "1e5", "TRUE", "a\r\nb", "A\x1b[31mred", " A ", ""]


def test_answers_in_a_sheet_are_text_and_read_back_equal(tmp_path: Path) -> None:
    path = str(tmp_path / "x.xlsx")
    before = pd.DataFrame.to_excel
    with own_files():
        table = pd.DataFrame({"index": range(len(ANSWERS)), "prediction": ANSWERS, "A": ANSWERS})
        dump(table.assign(hint=None), path)
        back = load(path)
    assert back["prediction"].tolist() == ANSWERS
    assert back["A"].tolist()[:-1] == ANSWERS[:-1] and back["hint"].isna().all()
    cells = [cell for row in openpyxl.load_workbook(path).active for cell in row]
    assert not [cell.value for cell in cells if cell.data_type == "f" or cell.hyperlink]
    assert pd.DataFrame.to_excel is before
