"""Tables of examples: what is whole is read as it is written, what is broken costs its row."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("vlmeval")

import vlmeval.smp as vlmeval_smp

from tests.vlmeval_files import mcq_rows, picture
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import rows as rows_of
from vlm_prune_ext.evals.examples import read_data
from vlm_prune_ext.evals.rows import class_of, keep, open_table, unpack
from vlm_prune_ext.evals.vlmeval_store import own_reading
from vlm_prune_ext.profiling.data import entries_from, read_folder
from vlm_prune_ext.tables import MISSING, read_leniently

HEADER = ["index", "question", "answer"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, rows: list[list[Any]], encoding: str = "utf-8", **options: Any) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", **options).writerows([HEADER, *rows])
    path = folder / "t.tsv"
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def own(tmp_path: Path, rows: list[dict[str, Any]], name: str = "Mine", **options: Any) -> Any:
    pd.DataFrame(rows).to_csv(tmp_path / "data" / f"{name}.tsv", sep="\t", index=False, **options)
    return open_table(name)


# -- reading ---------------------------------------------------------------------------------------
WORDS = ["None", "NA", "null", "N/A", "n/a", "NULL", "none", "=1+1", "+a", "-b", "@c", "'d", " e "]
BREAKS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"]


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "with-a-broken-row"])
def test_words_and_odd_breaks_stay_in_their_cell(tmp_path: Path, broken: bool) -> None:
    said = [*WORDS, *(f"a{mark}b" for mark in BREAKS), "two\nlines", 'a "quoted" word']
    said += ["carriage\rreturn", "both\r\nof them"]
    rows: list[list[Any]] = [[i, text, "x"] for i, text in enumerate(said)]
    data, bad = read_leniently(write(tmp_path, rows + [[99, "x", "y", "z"]] * broken))
    assert list(data["question"]) == said and list(data["index"]) == list(range(len(said)))
    assert [row.reason for row in bad] == ["4 cells where 3 belong"] * broken


def test_what_stands_for_no_value_is_missing(tmp_path: Path) -> None:
    data, _ = read_leniently(write(tmp_path, [[i, text, "x"] for i, text in enumerate(MISSING)]))
    assert data["question"].isna().all()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_headers_with_a_mark_or_quotes(tmp_path: Path, encoding: str, quoting: Any) -> None:
    data, bad = read_leniently(write(tmp_path, [[0, "q", "a"]], encoding, quoting=quoting))
    assert list(data) == HEADER and not bad
    table = own(tmp_path, mcq_rows(2), encoding=encoding, quoting=quoting)
    assert class_of("Mine").__name__ == "CustomMCQDataset"
    assert len(table.dataset) == 2 and not table.bad


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"7\tq", "2 cells where 3 belong"),
        (b"7\tq\ta\tb", "4 cells where 3 belong"),
        (b'7\t"never closed\ta', "3 belong"),
        (b"7\tq\xff\ta", "not UTF-8"),
    ],
    ids=["short", "long", "open-quote", "bytes"],
)
def test_a_broken_line_costs_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, [[0, "one", "a"], [1, "two", "b"]])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    data, bad = read_leniently(path)
    assert list(data["question"]) == ["one", "two"]
    assert [row.index for row in bad] == ["line 3"] and reason in bad[0].reason


@pytest.mark.parametrize("content", [b"", b"\n\n", None])
def test_no_table_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.tsv'"):
        read_leniently(path)


# -- rows ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spelling", ["1", "01", "1.0", " 1", "1e0"])
def test_one_index_is_one_row_in_any_spelling(tmp_path: Path, spelling: str) -> None:
    rows = mcq_rows(4)
    rows[3]["index"] = spelling
    table = own(tmp_path, rows)
    assert list(table.dataset.data["index"]) == [0, 1, 2]
    assert [(bad.index, bad.reason) for bad in table.bad] == [
        ("1", "row 2 of the file has this index already")
    ]


def test_large_indices_keep_apart(tmp_path: Path) -> None:
    rows = mcq_rows(2)
    rows[0]["index"], rows[1]["index"] = 2**53, 2**53 + 1
    assert list(own(tmp_path, rows).dataset.data["index"]) == [2**53, 2**53 + 1]


@pytest.mark.parametrize("value", ["", None, "[]", "[1]", "[__import__('os')]", "[" * 5000])
def test_a_path_that_is_none_costs_its_row(tmp_path: Path, value: Any) -> None:
    rows = [{**row, "image_path": f"{i}.png"} for i, row in enumerate(mcq_rows(3))]
    rows[1]["image_path"] = value
    table = own(tmp_path, rows)
    assert list(table.dataset.data["index"]) == [0, 2]
    assert "image_path" in table.bad[0].reason


def test_a_cell_is_never_run_as_python(tmp_path: Path) -> None:
    """VLMEvalKit evaluates cells that begin like a list."""
    code = f"[open({str(tmp_path / 'planted')!r}, 'w').write('x') or 'a' * 99]"
    for name in ("image", "image_path"):
        rows = [{**row, "image_path": "a.png"} for row in mcq_rows(2)]
        rows[1][name] = code
        table = own(tmp_path, rows)
        assert "is no list of texts" in table.bad[0].reason
        assert not (tmp_path / "planted").exists()


def test_a_reference_leads_to_the_picture_of_a_broken_row(tmp_path: Path) -> None:
    rows = mcq_rows(3)
    rows[0]["question"], rows[2]["image"] = None, "0"
    table = own(tmp_path, rows)
    assert [bad.reason for bad in table.bad] == ["no question"]
    data = table.dataset.data
    assert data["image"].iloc[1] == picture(0)


NO_NUMBERS = [["01", "02", "010", "1.0"], ["TRUE", "FALSE", "TRUE", ""], ["1", "2", "3", ""]]
NO_NUMBERS += [["1e5", "-inf", "inf", "0x10"], ["2024-01-01", "1/2", "NULL", "N/A"]]
NAMES = [["1_12", "11_2", "1_1", "2_1"], ["1.1", "1.10", "1.2", "2.1"], ["TRUE", "true", "1", "x"]]
NAMES += [["0x10", "0x20", "0o7", "0b1"], ["12e4x", "a", "012", "12"]]


@pytest.mark.parametrize("said", NO_NUMBERS)
def test_cells_of_ones_own_table_are_what_was_written(tmp_path: Path, said: list[str]) -> None:
    """Not numbers, dates and truth values that some of them could be read as."""
    rows = mcq_rows(4)
    for row, text in zip(rows, said, strict=True):
        row |= {"D": text, "hint": text, "answer": "A"}
    data = own(tmp_path, rows).dataset.data
    for name in ("D", "hint"):
        assert [None if pd.isna(x) else x for x in data[name]] == [text or None for text in said]


@pytest.mark.parametrize("names", NAMES)
def test_indices_that_are_names_keep_apart(tmp_path: Path, names: list[str]) -> None:
    rows = [{**row, "index": name} for row, name in zip(mcq_rows(4), names, strict=True)]
    table = own(tmp_path, rows)
    assert list(table.dataset.data["index"]) == names and not table.bad


def test_large_indices_keep_apart_beside_a_row_without_one(tmp_path: Path) -> None:
    rows = mcq_rows(3)
    for row, index in zip(rows, (2**53, 2**53 + 1, ""), strict=True):
        row["index"] = index
    table = own(tmp_path, rows)
    assert list(table.dataset.data["index"]) == [2**53, 2**53 + 1]
    assert [bad.reason for bad in table.bad] == ["no index"]


def test_an_index_is_never_run_as_python(tmp_path: Path) -> None:
    """VLMEvalKit evaluates indices to see whether they are numbers."""
    code = f"open({str(tmp_path / 'planted')!r}, 'w').write('x')"
    rows = [{**row, "index": f"{code} or {i}"} for i, row in enumerate(mcq_rows(2))]
    assert len(own(tmp_path, rows).dataset) == 2
    assert not (tmp_path / "planted").exists()


def test_a_caption_is_never_run_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMEvalKit evaluates the references of captions when it scores."""
    code = f"open({str(tmp_path / 'planted')!r}, 'w').write('x')"
    rows: list[list[Any]] = [[0, "x", "['a', 'b']"], [1, "x", code]]
    kept, bad = rows_of._with_literal_answers(read_leniently(write(tmp_path, rows))[0])
    assert list(kept["index"]) == [0] and bad[0].reason == "the answer is no list of texts"
    assert not (tmp_path / "planted").exists()


def test_an_answer_without_its_option_costs_its_row(tmp_path: Path) -> None:
    rows = mcq_rows(2)
    rows[1] |= {"A": "nan", "answer": "A"}
    table = own(tmp_path, rows)
    assert [bad.reason for bad in table.bad] == ["option A, its answer, is empty"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_one_sentence(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "data" / "Mine.tsv").write_text("index\tquestion\timage\n1\ta\tb\n", encoding)
    with pytest.raises(InputError, match="no UTF-8 text"):
        open_table("Mine")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("index\tquestion\tquestion\timage", "column 'question' twice"),
        ("index\tquestion", "'image', 'image_path' or 'video' is missing"),
        ("index\tanswer\timage", "'question' is missing"),
    ],
)
def test_columns_that_are_not_there_are_one_sentence(
    tmp_path: Path, header: str, sentence: str
) -> None:
    (tmp_path / "data" / "Mine.tsv").write_text(f"{header}\n" + "1\t" * header.count("\t") + "1\n")
    with pytest.raises(InputError, match=sentence):
        open_table("Mine")


def test_a_sheet_of_numerals_reads_back_as_they_were_said(tmp_path: Path) -> None:
    """A column that could be one of numbers."""
    said = ["007", "1e5", "12", "-inf", "1.50", "0x10", "TRUE"][:5]
    path = str(tmp_path / "x.xlsx")
    with own_reading([]):
        vlmeval_smp.dump(pd.DataFrame({"index": range(5), "prediction": said}), path)
        found = vlmeval_smp.load(path)
    assert list(found["prediction"]) == said and list(found["index"]) == list(range(5))
    assert found["index"].dtype == "int64"


# -- pictures --------------------------------------------------------------------------------------
def opened(table: Any, place: int) -> bytes:
    (path,) = table.dataset.dump_image(table.dataset.data.iloc[place])
    return Path(path).read_bytes()


def test_an_edited_table_is_seen_with_its_new_pictures(tmp_path: Path) -> None:
    before = [opened(own(tmp_path, mcq_rows(2)), i) for i in range(2)]
    rows = mcq_rows(2)
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    assert [opened(own(tmp_path, rows), i) for i in range(2)] == before[::-1]


def test_rows_that_share_a_name_do_not_share_a_picture(tmp_path: Path) -> None:
    rows = [{**row, "image_path": "same.png"} for row in mcq_rows(3)]
    table = own(tmp_path, rows)
    seen = [opened(table, place) for place in range(3)]
    assert seen == [base64.b64decode(row["image"]) for row in rows]


@pytest.mark.parametrize("column", ["index", "image_path"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, column: str) -> None:
    for name in (f"../../../{tmp_path}/planted", f"{tmp_path}/planted", "../../planted"):
        rows = [{**row, column: f"{name}{i}.png"} for i, row in enumerate(mcq_rows(2))]
        table = own(tmp_path, rows)
        assert [opened(table, i) for i in range(2)] == [base64.b64decode(r["image"]) for r in rows]
    assert not list(tmp_path.rglob("*planted*"))


def test_pictures_elsewhere_are_not_read_unasked(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (tmp_path / "data" / "images" / "Mine").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "images" / "Mine" / "in.png")
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mcq_rows(5)]
    paths = [str(secret), "../../../secret.png", "in.png", "gone.png", "http://127.0.0.1:9/x.png"]
    table = own(tmp_path, [{**row, "image_path": p} for row, p in zip(rows, paths, strict=True)])
    assert [bad.index for bad in table.bad] == ["0", "1"]
    assert all("leads out of" in bad.reason for bad in table.bad)
    message = table.dataset.build_prompt(table.dataset.data.iloc[0])
    assert Image.open(message[0]["value"]).size == (9, 9)


def test_a_half_written_picture_is_written_again(tmp_path: Path) -> None:
    encoded = picture(3)
    path = Path(unpack(encoded))
    whole = path.read_bytes()
    for other in (whole[:50], bytes(len(whole))):
        path.write_bytes(other)
        assert Path(unpack(encoded)) == path and path.read_bytes() == whole
    assert Path(unpack(encoded.translate(str.maketrans("+/", "-_")))) == path
    assert Path(unpack(f"data:image/png;base64,{encoded[:50]}\n {encoded[50:]}")) == path
    assert keep(whole) == path and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(InputError, match="not base64"):
        unpack("not base64!" * 9)


# -- the other readers -----------------------------------------------------------------------------
BROKEN = b"1.png\tonly two\n"


def texts_file(tmp_path: Path, header: str, ending: str) -> Path:
    """Four rows: whole, too short, with an odd line break, with words for nothing."""
    mark = "\t" if ending == "tsv" else ","
    lines = [header, "0.png|What?|a", "1.png|What?", "2.png|What\u2028?|None", "3.png|NA|null"]
    path = tmp_path / f"data.{ending}"
    path.write_text("".join(f"{line.replace('|', mark)}\n" for line in lines), "utf-8-sig")
    (tmp_path / "images").mkdir()
    for name in range(4):
        wide = np.full((40, 40), 32896, dtype=np.uint16)  # a 16-bit grey
        Image.fromarray(wide).save(tmp_path / "images" / f"{name}.png")
    return path


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_ablate_reads_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = texts_file(tmp_path, "image|prompt|caption", ending)
    data = read_data(path, image_folder=tmp_path / "images")
    assert [row.index for row in data.rows] == [0, 2, 3]
    assert [row.references for row in data.rows] == [("a",), ("None",), ("null",)]
    assert data.rows[2].prompt == "NA"
    assert [(s.index, s.reason) for s in data.skipped] == [(1, "line 3 has 2 cells where 3 belong")]


def test_profile_reads_the_same_rows(tmp_path: Path) -> None:
    texts_file(tmp_path, "image|question|answer", "csv")
    folder = read_folder(tmp_path)
    assert [example.index for example in folder.rows] == [0, 2, 3]
    assert [example.references for example in folder.rows] == [("a",), ("None",), ("null",)]
    assert [str(row) for row in folder.skipped] == ["row 2: line 3 has 2 cells where 3 belong"]
    assert folder.rows[0].picture().getpixel((3, 3)) == (128, 128, 128)


def test_profile_draws_from_tables_with_broken_rows(tmp_path: Path) -> None:
    rows = mcq_rows(3)
    rows[1]["A"] = "None"
    path = tmp_path / "data" / "x.tsv"
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    path.write_bytes(path.read_bytes() + BROKEN)
    entries, failures = entries_from(str(path), 4, seed=0)
    assert len(entries) == 3 and any("\nA. None\n" in entry.question for entry in entries)
    assert [str(f) for f in failures] == ["row 4: line 5 has 2 cells where 12 belong"]
