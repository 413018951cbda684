"""Lines of a log that something else wrote: each costs itself, and is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.log import LOCK, Log, lock, object_of
from vlm_prune_ext.experiment.record import Sample, SampleLog, Stretch, summarise

GOOD = Sample(1, "an answer", prompt_tokens=9, visual_kept={"0": 4}, lengths=[9, 5])
WRONG: list[dict[str, Any]] = [
    {"index": [1]},
    {"index": None},
    {"index": True},
    {"index": 1.5},
    {"prediction": 5},
    {"prediction": None},
    {"lengths": "95"},
    {"lengths": [9, "5"]},
    {"visual_kept": [4]},
    {"visual_kept": {"0": None}},
    {"row": {"question": 3}},
    {"prefill_seconds": float("nan")},
    {"flops": float("inf")},
    {"flops": "1e9"},
    {"warm_up": "yes"},
    {"failed": False},
]
LINES = [
    b"",
    b"null",
    b"[]",
    b"7",
    b'"sample"',
    b'{"sample": 3}',
    b'{"sample": {"index": 1}}',
    b'{"stretch": {"rank": 0}}',
    b'{"sample": {"index": 1, "prediction": "cut sho',
    b"\xff\xfe\x00{",
    b"\0" * 40,
    b"{" * 100_000,
    b'{"sample": {"index": ' + b"9" * 5000 + b', "prediction": "x"}}',
    b"<<<<<<< HEAD",
]


@pytest.mark.parametrize("values", WRONG, ids=lambda values: str(values)[:40])
def test_values_of_another_kind_make_no_sample(values: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(asdict(GOOD)))
    assert object_of(Sample, plain) == GOOD
    assert object_of(Sample, {**plain, "of a later version": 1}) == GOOD
    assert object_of(Sample, {**plain, **json.loads(json.dumps(values))}) is None


def test_broken_lines_cost_themselves_and_are_named(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "log.jsonl")
    log.add(GOOD)
    lines = log.path.read_bytes() + b"\n".join(LINES) + b"\n"
    log.path.write_bytes(lines)
    log.add(Sample(2, "the next"), Stretch(0, 1.0, 5, None, {}))
    samples, stretches = log.samples()
    assert [one.index for one in samples] == [1, 2] and len(stretches) == 1
    assert log.broken == list(range(2, 2 + len(LINES)))
    assert summarise(samples, stretches)["samples"] == 2


@pytest.mark.parametrize("ending", ["\r\n", "\n\n", "\u2028\n"])
def test_other_line_ends(tmp_path: Path, ending: str) -> None:
    """An editor's, or signs that end lines in Unicode inside an answer."""
    log = SampleLog(tmp_path / "log.jsonl")
    said = "one\u2028two\x85three\r\nfour"
    log.add(Sample(1, said))
    log.path.write_bytes(log.path.read_bytes().replace(b"\n", ending.encode()))
    log.add(Sample(2, said))
    assert [one.prediction for one in log.samples()[0]][-1] == said
    assert len(log.samples()[0]) == (1 if ending.startswith("\u2028") else 2)


def test_lines_of_a_grid(tmp_path: Path) -> None:
    log = Log(tmp_path / "grid.jsonl")
    good = grid.Line("key", {}, "label", grid.DONE, {"a": 1})
    entries: list[dict[str, Any]] = [vars(good), {**vars(good), "key": ["key"]}, {"key": "other"}]
    log.append(*entries, {**vars(good), "key": "x", "result": "none"})
    assert grid.read_lines(log) == {"key": good}


def test_a_lock_that_is_a_link_leaves_the_file_it_leads_to_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine")
    with lock(tmp_path / "out"), pytest.raises(InputError, match="in use"), lock(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
