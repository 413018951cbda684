"""`vlm-prune scienceqa`: reading LLaVA's layout, resuming, and a real run on the demo model."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from vlm_prune_ext import cli
from vlm_prune_ext.commands import scienceqa
from vlm_prune_ext.commands.scienceqa import SINGLE_PREDICTION, read_letter, read_questions
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.pruning import CUSTOM_LINE, OFF_LINE


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C.", "C"),
        ("(D) west", "D"),
        ("A: because", "A"),
        ("The answer is B.", "B"),
        ("Look at the map. The answer is E.\nBECAUSE: so", "E"),
        ("the answer is (C), as said. The answer is C.", "C"),
        ("The answer is A. No, the answer is B.", None),
        ("A cat", None),
        ("Because", None),
        ("F", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    assert read_letter(text) == letter


def entry(name, image=None, letter="A", question="Which one?\nA. red\nB. blue"):
    turns = [
        {"from": "human", "value": ("<image>\n" if image else "") + question},
        {"from": "gpt", "value": f"The answer is {letter}."},
    ]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def data(tmp_path):
    """Five questions: three with an image (one of them broken), two without; ids of both types."""
    folder = tmp_path / "images"
    (folder / "3").mkdir(parents=True)
    Image.new("RGB", (60, 40), "red").save(folder / "3" / "image.png")
    Image.new("L", (40, 60)).save(folder / "gray.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    entries = [
        entry(3, "3/image.png"),
        entry("t", letter="B"),
        entry("broken", "broken.png"),
        entry("gray", "gray.png", "B"),
        entry("u"),
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    return tmp_path


def start(data: Path, *more: str) -> int:
    words = ["--question-file", data / "q.json", "--image-folder", data / "images"]
    words += ["--answers-file", data / "out.jsonl", "--max-new-tokens", "3", *more]
    return cli.main(["scienceqa", *map(str, words)])


def lines(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "out.jsonl").read_text().splitlines()]


def test_reading(data):
    questions = read_questions(data / "q.json", data / "images", single_prediction=True)
    assert [q.id for q in questions] == ["3", "t", "broken", "gray", "u"]
    assert [q.reference for q in questions] == list("ABABA")
    assert questions[0].text == f"Which one?\nA. red\nB. blue\n{SINGLE_PREDICTION}"
    assert questions[0].image == data / "images" / "3" / "image.png"
    assert questions[1].image is None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not a JSON file"),
        ("{}", "list"),
        ("[]", "list"),
        ('[{"id": 1}]', "Question 0"),
        ("[7]", "Question 0"),
        ('[{"id": 1, "conversations": [{"value": "q"}, {"value": "maybe"}]}]', "no letter"),
        (json.dumps([entry("a"), entry("a")]), "'a' is in"),
    ],
)
def test_bad_question_files(content, part, tmp_path):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(InputError, match=part):
        read_questions(tmp_path / "q.json", tmp_path, False)


def test_run_with_a_broken_image_and_again(data, capsys, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        assert start(data, "--baseline") == 1
    assert OFF_LINE in caplog.messages
    captured = capsys.readouterr()
    assert "broken: image cannot be read" in captured.err
    first = lines(data)
    assert [line["question_id"] for line in first] == ["3", "t", "gray", "u"]
    assert [line["visual_tokens"] > 0 for line in first] == [True, False, True, False]
    right = sum(line["correct"] for line in first)
    assert f"{100 * right / 4:.2f} % ({right} right)" in captured.out
    assert all(line["seconds"] > 0 and line["method"] == "baseline" for line in first)

    # Cut off in the middle of the last line, and the broken image repaired: two are answered.
    whole = (data / "out.jsonl").read_text()
    (data / "out.jsonl").write_text(whole[:-20])
    Image.new("RGB", (30, 30)).save(data / "images" / "broken.png")
    assert start(data) == 0
    again = lines(data)
    assert [line["question_id"] for line in again] == ["3", "t", "gray", "broken", "u"]
    assert again[:3] == first[:3]
    assert [again[4][key] for key in ("text", "correct")] == [
        first[3][key] for key in ("text", "correct")
    ]

    # Complete: nothing is loaded, nothing is written.
    monkeypatch.setattr(scienceqa, "load_model", None)
    assert start(data) == 0
    assert lines(data) == again


def test_a_broken_line_or_another_picture_is_asked_again(data, capsys):
    Image.new("RGB", (30, 30)).save(data / "images" / "broken.png")
    assert start(data) == 0
    first = lines(data)
    whole = (data / "out.jsonl").read_text().split("\n")
    whole[1] = whole[1][:30]
    (data / "out.jsonl").write_text("\n".join(whole))
    Image.new("RGB", (30, 30), "red").save(data / "images" / "broken.png")
    capsys.readouterr()
    assert start(data) == 0
    assert "broken: its picture has changed" in capsys.readouterr().err
    again = [line["question_id"] for line in lines(data)]
    kept = [line["question_id"] for line in first if line != first[1]]
    assert again == [*kept, first[1]["question_id"], "broken"]
    assert start(data, "--max-new-tokens", "2") == 2
    assert "max_new_tokens=3, now 2" in capsys.readouterr().err


def test_pruned_batches_equal_single_runs(data, caplog):
    method = ("--method", "custom:16", "--set", "method=norm", "--limit", "4")
    with caplog.at_level(logging.INFO):
        assert start(data, *method) == 1
    assert CUSTOM_LINE in caplog.messages
    single = lines(data)
    (data / "out.jsonl").unlink()
    assert start(data, *method, "--batch-size", "3") == 1
    batched = lines(data)
    keys = ("question_id", "text", "correct", "visual_tokens", "visual_kept")
    assert [[line[key] for key in keys] for line in batched] == [
        [line[key] for key in keys] for line in single
    ]
    assert single[0]["visual_kept"]["3"] == 16 and single[0]["method"].startswith("custom_norm16")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a diary\n", "line 1"),
        ("a diary", "line 1"),
        ('{"question_id": "3"}\n', "line 1"),
    ],
)
def test_a_file_of_something_else_is_left_alone(content, part, data, capsys):
    (data / "out.jsonl").write_text(content)
    assert start(data) == 2
    assert part in capsys.readouterr().err
    assert (data / "out.jsonl").read_text() == content


def test_answers_of_another_run_are_not_mixed(data, capsys):
    said = ("3", "old", "", None, "A", False, 0.1, 0, {}, "demo", "baseline")
    (data / "out.jsonl").write_text(json.dumps(asdict(scienceqa.Record(*said))) + "\n")
    assert start(data, "--method", "fastv:64") == 2
    assert "fastv_rank64" in capsys.readouterr().err
    assert start(data, "--baseline") == 2
    assert "another prompt" in capsys.readouterr().err


def test_bad_places(data, capsys):
    assert start(data, "--answers-file", str(data / "q.json" / "out.jsonl")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert start(data, "--baseline", "--method", "fastv") == 2
    assert "not allowed with" in capsys.readouterr().err
    assert start(data, "--question-file", str(data / "none.json")) == 2
    assert "none.json" in capsys.readouterr().err
    assert not (data / "out.jsonl").exists()
