"""vlm-prune sweep: every combination once, on models loaded once, going on after anything."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import vlmeval_files as files
from tests.makers import tiny_original
from vlm_prune_ext import cli
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.sweep import choices_of
from vlm_prune_ext.experiment.report import plain_cell
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.random_drop import RandomDrop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny checkpoints (16 visual tokens, 6 layers) and a table of one's own."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("llava-v1.5-7b", "other"):
        tiny_original(folder / name)
    (folder / "LMUData").mkdir()
    files.write(folder / "LMUData", "Mine", files.mcq_rows(6))
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    models = [str(place / "llava-v1.5-7b"), str(place / "other")]
    line = ["sweep", "--model", *models, "--method", "fastv", "random:3", "himap:99"]
    line += ["--budget", "5", "0.25", "17", "--data", "Mine", "--max-new-tokens", "3"]
    return [*line, "--out", str(out), "--device", "cpu", *more]


def environment(place: Path) -> dict[str, str]:
    places = {"LMUData": str(place / "LMUData"), "XDG_CACHE_HOME": str(place / "cache")}
    return {**os.environ, **places, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(place: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_prune_ext.cli", *words(place, out, *more)],
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answered(out: Path) -> list[str]:
    """Every answer in the logs of all cells, with the cell's name."""
    found = []
    for path in out.glob("*/*_samples*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [f"{path.parent.name} {x['sample']['index']}" for x in lines if "sample" in x]
    return found


def scores(out: Path) -> list[dict[str, Any]]:
    keys = ("model", "method", "data", "status", "score", "kept", "flops_ratio", "why")
    return [{key: row[key] for key in keys} for row in json.loads((out / "sweep.json").read_text())]


@pytest.mark.slow
def test_killed_and_gone_on_with_is_the_same_as_in_one_go(place: Path, tmp_path: Path) -> None:
    """kill -9 of the first process (its workers end too), then the rest: no answer twice."""
    out = tmp_path / "out"
    first = start(place, out)
    while len(answered(out)) < 8:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(1.5)
    before = answered(out)
    done = start(place, out)
    said, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    after = answered(out)
    assert len(after) == len(set(after)) == 2 * 4 * 6 and set(before) <= set(after)

    one_go = start(place, tmp_path / "one", "--workers", "1")
    one_go.communicate(timeout=300)
    assert one_go.returncode == 0
    assert scores(out) == scores(tmp_path / "one")
    log = (tmp_path / "one" / "logs" / "process-1.log").read_text()
    assert log.count("Loading weights: 100%") <= 2  # each checkpoint once

    rows = scores(out)
    done_rows = [row for row in rows if row["status"] == "done"]
    assert len(done_rows) == 8 and len(rows) == 12
    kept = {row["method"]: row["kept"] for row in done_rows}
    assert kept["baseline"] == 16 and kept["random_keep3"] == 3
    assert kept["fastv_rank5"] == (3 * 16 + 3 * 5) / 6
    skipped = {row["method"]: row["why"] for row in rows if row["status"] == "skipped"}
    assert "at most 16" in skipped["fastv:17"] and "himap:99" in skipped
    assert "Skipped" in errors and "fastv_rank5" in said
    header, *table = list(csv.reader((out / "sweep.csv").open(newline="")))
    assert len(table) == 12
    by_name = dict(zip(header, map(plain_cell, table[0]), strict=True))
    assert by_name["status"] == "done" and float(by_name["flops_ratio"]) == 1.0
    assert (out / "sweep.png").stat().st_size > 10_000


def test_methods_at_budgets() -> None:
    made = choices_of(["none", "fastv", "random:9", "fastv:5,agg_layer=2"], ["5", "0.5", "0"])
    assert [one.method for one in made] == [
        None,
        FastV(attention_rank=5),
        FastV(attention_rank=0.5),
        None,
        RandomDrop(keep=9),
        FastV(attention_rank=5, agg_layer=2),
    ]
    assert "attention_rank=0" in made[3].why
    assert [one.text for one in choices_of(["vtw", "saint", "pdrop"], ["0.5"])] == [
        "vtw",
        "saint",
        "pdrop:0.5",
    ]
    with pytest.raises(InputError, match="'fastv'"):
        choices_of(["random:9", "fastvv"], ["5"])
    with pytest.raises(InputError, match="attention_rank=0"):
        choices_of(["fastv:0"], ["5"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "Shapes_MCK"], "'Shapes_MCQ'"),
        (["--method", "fastvv"], "'fastv'"),
        (["--model", "no/where/at/all"], "no/where/at/all"),
        (["--limit", "0"], "limit=0"),
        (["--workers", "0"], "--workers 0"),
        (["--buget", "5"], "'--budget'"),
    ],
)
def test_wrong_input_is_one_sentence(
    place: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LMUData", str(place / "LMUData"))
    assert cli.main(words(place, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
