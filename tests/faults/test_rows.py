"""Rows that a model cannot be asked with: each fails alone, and says why."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("vlmeval")

import vlm_prune_ext as vp
from run_vlmeval import main
from tests import family_makers as fm
from tests import makers, vlmeval_files
from vlm_prune_ext.errors import InputError, RowError
from vlm_prune_ext.experiment.record import SampleLog


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 200, 7)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_row_that_a_family_does_not_take_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strip of 1 x 1500 pixels, which Qwen's processor refuses, and text with its placeholder. A
    picture of fewer tokens than are to be kept keeps them all."""
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = vlmeval_files.mcq_rows(4)
    rows[1]["image"] = png(1, 1500)
    rows[2]["question"] = "What is <|image_pad|>?"
    rows[0]["image"], rows[3]["image"] = png(200, 200), png(1, 1)
    vlmeval_files.write(tmp_path, "Mine", rows)
    (tmp_path / "model").mkdir()
    fm.KINDS["qwen2_5_vl"].make(tmp_path / "model")
    words = ["--model-path", str(tmp_path / "model"), "--data", "Mine", "--method", "random:5"]
    words += ["--max-new-tokens", "1", "--mode", "infer", "--work-dir", str(tmp_path / "out")]
    assert main(words) == 1
    (path,) = (tmp_path / "out").rglob("*_results.json")
    record = json.loads(path.read_text())
    failed = {row["index"]: row["reason"] for row in record["failed"]}
    assert record["samples"] == 4 and set(failed) == {"1", "2"}
    (log,) = (tmp_path / "out").rglob("*_samples.jsonl")
    kept = {one.index: one.visual_kept["0"] for one in SampleLog(log).samples()[0] if one.lengths}
    assert kept == {0: 5, 3: 4}
    assert "1 x 1500 pixels" in failed["1"] and "<|image_pad|>" in failed["2"]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
def test_odd_pictures_and_texts_are_answers_or_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "llava":
        makers.tiny_original(folder, layers=2)
    else:
        folder.mkdir()
        {**fm.KINDS, **fm.TABLE}[kind].make(folder)
    _, processor = vp.load(folder, fast=False)
    for size in ((1, 1), (1, 900), (900, 1), (2, 3), (0, 0), (0, 7)):
        try:
            made = processor.prompt("What?", Image.new("RGB", size))
            assert processor.count_visual_tokens(made)[0] > 0 and 0 not in size
        except RowError as error:
            assert f"{size[0]} x {size[1]}" in str(error) and "\n" not in str(error)
    for text in (
        "",
        "\ud800",
        "<video>",
        "<|image_pad|>",
        "<img>",
        "a\0b",
        "\u202e",
        "{{ 7 * 7 }}",
    ):
        try:
            processor.prompt(text, makers.photo(40, 30))
            assert text != "\ud800"
        except InputError as error:
            assert text and "\n" not in str(error)
