"""Folders of examples and the scores of answers."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tests.makers import photo
from vlm_prune_ext.cli import main
from vlm_prune_ext.demo.writers import write_lmms_parquet, write_vlmeval_tsv
from vlm_prune_ext.experiment.metrics import (
    bleu,
    fitting,
    is_right,
    vqa_score,
    word_error_rate,
)
from vlm_prune_ext.profiling.data import CHOOSE, CSV, SHORT, entries_from, read_folder
from vlm_prune_ext.profiling.measuring import quality_of


def picture_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    photo(40, 30, seed=seed).save(file, format="PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------ sources


def test_demo_data_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("mcq", "yn", "vqa", "caption"):
        out = tmp_path / kind
        arguments = ["--from", f"demo:{kind}", "--samples", "4", "--seed", "2", "--out", str(out)]
        assert main(["profile-data", *arguments]) == 0
        assert "4 examples" in capsys.readouterr().out
        folder = read_folder(out)
        assert len(folder.rows) == 4 and not folder.skipped
        assert folder.rows[0].picture().size == (336, 336)
        assert folder.rows[0].picture(50).size == (50, 50)
        asked = folder.rows[0].prompt
        assert (CHOOSE in asked) == (kind == "mcq") and (SHORT in asked) == (kind == "vqa")
        if kind == "mcq":
            assert all(e.references[0] in "ABCD" for e in folder.rows)
            assert "\nA. " in asked


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    path = write_vlmeval_tsv(tmp_path, 0, 12)["vqa"]
    drawn = [entries_from(str(path), 5, seed, None)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    everything, _ = entries_from(str(path), 99, 0, None)
    assert len({entry.picture for entry in everything}) == 12


@pytest.mark.parametrize("kind", ["mcq", "yn", "vqa", "caption"])
def test_vlmeval_tsv(kind: str, tmp_path: Path) -> None:
    path = write_vlmeval_tsv(tmp_path, 0, 6)[kind]
    table = pd.read_csv(path, sep="\t", dtype=str)
    entries, failures = entries_from(str(path), 6, 0, None)
    assert len(entries) == 6 and not failures
    by_picture = {base64.b64decode(row.image): row for row in table.itertuples()}
    for entry in entries:
        row = by_picture[entry.picture]
        if kind == "vqa":
            assert entry.answers == tuple(eval(row.answer)) and len(entry.answers) == 10
        elif kind == "caption":
            assert entry.answers == tuple(eval(row.answer))
            assert "caption" in entry.question
        else:
            assert entry.answers == (row.answer,)
            assert entry.question.startswith(row.question)


def test_vlmeval_tsv_with_shared_pictures_and_hints(tmp_path: Path) -> None:
    """Rows may name another row's picture; ScienceQA has a context."""
    encoded = base64.b64encode(picture_bytes(0)).decode()
    rows = [
        {"index": "0", "image": encoded, "question": "Which?", "hint": "Look.", "answer": "B"},
        {"index": "1", "image": "0", "question": "And?", "hint": "", "answer": "A"},
        {"index": "2", "image": "!!", "question": "No?", "hint": "", "answer": "A"},
    ]
    options = {"A": "left", "B": "right", "C": ""}
    path = tmp_path / "data.tsv"
    pd.DataFrame([{**row, **options} for row in rows]).to_csv(path, sep="\t", index=False)
    entries, failures = entries_from(str(path), 9, 0, None)
    assert {entry.question for entry in entries} == {
        f"Context: Look.\nWhich?\nA. left\nB. right\n{CHOOSE}",
        f"And?\nA. left\nB. right\n{CHOOSE}",
    }
    assert {entry.picture for entry in entries} == {picture_bytes(0)}
    assert [row.index for row in failures] == [2]


def test_lmms_parquet(tmp_path: Path) -> None:
    paths = write_lmms_parquet(tmp_path / "demo", 0, 6)
    vqa, _ = entries_from(str(paths["vqa"]), 6, 0, None)
    assert all(len(entry.answers) == 10 and SHORT in entry.question for entry in vqa)
    captions, _ = entries_from(str(paths["caption"]), 6, 0, "A photo of")
    assert {entry.question for entry in captions} == {"A photo of"}
    choices, _ = entries_from(str(paths["mcq"]), 6, 0, None)
    assert all(entry.answers[0] in "ABCD" and CHOOSE in entry.question for entry in choices)


def test_science_qa_and_vqa_parquet_in_shards(tmp_path: Path) -> None:
    """ScienceQA's answers are places among choices, and some rows have no picture."""
    image: dict[str, Any] = {"bytes": picture_bytes(1), "path": "a.png"}
    rows = [
        {"image": image, "question": "Which?", "choices": ["x", "y", "z"], "answer": 2},
        {"image": None, "question": "Read?", "choices": ["x", "y"], "answer": 0},
    ]
    for number, row in enumerate(rows):
        schema = pa.table({k: [v] for k, v in rows[0].items()}).schema
        table = pa.Table.from_pylist([row], schema=schema)
        parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    entries, failures = entries_from(str(tmp_path), 5, 0, None)
    assert [entry.answers for entry in entries] == [("C",)]
    assert len(failures) == 1 and "no picture" in failures[0].reason
    people = [{"answer": "cat", "answer_id": 1}, {"answer": "a cat", "answer_id": 2}]
    table = pa.Table.from_pylist([{"image": image, "question": "What?", "answers": people}])
    parquet.write_table(table, tmp_path / "vqa.parquet")
    entries, _ = entries_from(str(tmp_path / "vqa.parquet"), 5, 0, None)
    assert entries[0].answers == ("cat", "a cat")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_vlmeval_tsv(tmp_path, 0, 3)["vqa"]
    out = tmp_path / "out"
    assert main(["profile-data", "--from", str(path), "--out", str(out), "--samples", "3"]) == 0
    entries, _ = entries_from(str(path), 3, 0, None)
    folder = read_folder(out)
    assert [(e.prompt, e.references) for e in folder.rows] == [
        (entry.question, tuple(entry.answers)) for entry in entries
    ]
    rows = list(csv.DictReader((out / CSV).open()))
    assert json.loads(rows[0]["answer"]) == list(entries[0].answers)
    digest = folder.digests()
    assert read_folder(out).digests() == digest != read_folder(out, 2).digests()
    Image.new("RGB", (9, 9)).save(folder.rows[0].path)
    assert read_folder(out).digests() != digest


def test_bad_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]

    def refused(*arguments: str) -> str:
        assert main(["profile-data", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "'nothing.tsv' is not valid" in refused("--from", "nothing.tsv", *out)
    assert "Did you mean 'vqa'" in refused("--from", "demo:vq", *out)
    assert "--samples 0 is not valid" in refused("--from", "demo", "--samples", "0", *out)
    table = tmp_path / "data.tsv"
    table.write_text("index\tquestion\n1\tWhat?\n")
    assert "has no column image" in refused("--from", str(table), *out)
    table.write_text("index\timage\tanswer\n1\tAAAA\tb\n")
    assert "no row that can be used" in refused("--from", str(table), *out)
    broken = tmp_path / "data.parquet"
    broken.write_bytes(b"no parquet")
    assert "is not a parquet file" in refused("--from", str(broken), *out)
    assert not (tmp_path / "out").exists()
    assert main(["profile-data", "--from", "demo", "--samples", "2", *out]) == 0
    assert "has a data.csv already" in refused("--from", "demo", *out)


# ------------------------------------------------------------------------------------- scores


def test_word_error_rate() -> None:
    # One word changed of three, one left out of two, two put in.
    answers = ["a red Cat!", "yes", "one two three"]
    references = [["a red dog"], ["yes it"], ["one"]]
    assert word_error_rate(answers, references) == pytest.approx((1 + 1 + 2) / 6)
    # The reference with the fewest errors counts.
    assert word_error_rate(["a cat"], [["a very big dog", "a cat"]]) == 0
    assert word_error_rate([""], [["two words"]]) == 1
    assert word_error_rate(["anything"], [["?!"]]) == 1


def test_accuracy() -> None:
    assert is_right("The red square.", ["red square"])
    assert not is_right("red", ["red square"])
    assert is_right("B. right", ["B"]) and is_right("(b)", ["B"]) and is_right("B", ["B"])
    assert not is_right("Because", ["B"]) and not is_right("C", ["B"])


def test_vqa_accuracy() -> None:
    """Leaving one out at a time: two of ten who agree make (2 x 1/3 + 8 x 2/3) / 10."""
    people = ["cat"] * 2 + ["dog"] * 8
    assert vqa_score("cat", people) == pytest.approx((2 / 3 + 16 / 3) / 10)
    assert vqa_score("a dog", people) == 1
    assert vqa_score("bird", people) == 0


def test_the_score_that_fits() -> None:
    caption = "a red square is left of a blue circle"
    assert fitting([[caption], [caption, caption]]) == "bleu4_lower"
    assert fitting([["cat"] * 10, ["dog"] * 10]) == "vqa"
    assert fitting([["cat"], ["dog"]]) == "accuracy"
    found = quality_of(["cat", "bird"], [["cat"], ["dog"]])
    assert (found.name, found.value, found.samples) == ("accuracy", 50.0, 2)
    other = ["no overlap whatsoever here at all friend"]
    found = quality_of([caption, caption], [[caption], other])
    assert found.name == "bleu4" and 0 < found.value < 100
    two = [[caption.upper(), "something else entirely, longer by far"]]
    assert bleu([caption], two, lowercase=True)[0] == pytest.approx(100)
    assert bleu([caption], two)[0] < 1  # letter case kept
