"""vlm-prune sweep: every combination once, on models loaded once, going on after anything."""

from __future__ import annotations

import csv
import json
import os
import shutil
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
from vlm_prune_ext.evals import sweep
from vlm_prune_ext.evals.choices import choices_of
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.record import SampleLog, read_record
from vlm_prune_ext.experiment.report import plain_cell
from vlm_prune_ext.experiment.results import read
from vlm_prune_ext.experiment.settings import Settings
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
    line = ["sweep", "--model", *models, "--method", "fastv", "random:3", "vtw:99"]
    line += ["--budget", "5", "0.25", "17", "--no-controls"]
    line += ["--data", "Mine", "--max-new-tokens", "3"]
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
    assert len(after) == len(set(after)) == 2 * 5 * 6 and set(before) <= set(after)

    one_go = start(place, tmp_path / "one", "--workers", "1")
    one_go.communicate(timeout=300)
    assert one_go.returncode == 0
    assert scores(out) == scores(tmp_path / "one")
    log = (tmp_path / "one" / "logs" / "process-1.log").read_text()
    assert log.count("Loading weights: 100%") <= 2  # each checkpoint once

    rows = scores(out)
    done_rows = [row for row in rows if row["status"] == "done"]
    assert len(done_rows) == 10 and len(rows) == 12
    kept = {row["method"]: row["kept"] for row in done_rows}
    assert kept["baseline"] == 16 and kept["random_keep3"] == 3
    assert kept["fastv_rank5"] == (3 * 16 + 3 * 5) / 6
    skipped = {row["method"]: row["why"] for row in rows if row["status"] == "skipped"}
    assert kept["fastv_rank17"] == 16  # more than there are: all
    assert set(skipped) == {"vtw:99"}
    assert "Skipped" in errors and "fastv_rank5" in said
    header, *table = list(csv.reader((out / "sweep.csv").open(newline="")))
    assert len(table) == 12
    by_name = dict(zip(header, map(plain_cell, table[0]), strict=True))
    assert by_name["status"] == "done" and float(by_name["flops_ratio"]) == 1.0
    assert (out / "sweep.png").stat().st_size > 10_000
    rows_and_files_again(out, tmp_path / "copy")


def rows_and_files_again(out: Path, copy: Path) -> None:
    """Result files alone give all tables again; and what each setting said to each row."""
    shutil.copytree(out, copy)
    for path in copy.glob("sweep*.*"):
        if path.suffix != ".jsonl":
            path.unlink()
    formats = ["md", "csv", "tex", "json", "png", "pdf"]
    assert cli.main(["show", str(copy), "--format", *formats]) == 0
    for ending in ("md", "csv", "json", "tex"):
        for path in out.glob(f"sweep*.{ending}"):
            assert path.read_bytes() == (copy / path.name).read_bytes(), path.name
    assert (copy / "sweep.pdf").read_bytes().startswith(b"%PDF")
    results = read(copy)
    asked = results.questions("Mine")
    assert asked["1"].question == "Which letter is number 1?" and asked["1"].options["B"] == "two"
    assert asked["1"].category == "counting" and Path(asked["1"].pictures[0]).is_file()
    for run in results.done:
        assert set(run.answers) == set(asked) == set(run.scores)
        right = sum(run.scores.values()) / 6 * 100
        assert run.record is not None and run.record.score is not None
        assert run.record.score.value == pytest.approx(right)
        for answer in run.answers.values():
            for layer, count in answer.sample.visual_kept.items():
                if int(layer) in answer.kept:
                    assert len(answer.kept[int(layer)]) == count
    (fastv,) = (
        r for r in results.done if r.setting == "fastv_rank5" and r.model == results.models[0]
    )
    assert all(len(answer.kept[3]) == 5 for answer in fastv.answers.values())
    (random,) = (r for r in results.done if r.method == "random" and r.model == results.models[0])
    assert all(len(answer.kept[0]) == 3 for answer in random.answers.values())


def test_status_reads_the_log_alone(place: Path, tmp_path: Path) -> None:
    """While a sweep is at work, and once it was ended."""
    out = tmp_path / "out"
    work = start(place, out, "--workers", "1")
    while len(answered(out)) < 3:
        assert work.poll() is None, work.communicate()
        time.sleep(0.02)
    status = [sys.executable, "-m", "vlm_prune_ext.cli", "status", str(out)]
    said = subprocess.run(status, env=environment(place), capture_output=True, text=True)
    assert "of 12 cells done" in said.stdout and "running: " in said.stdout, said
    assert "2 skipped" in said.stdout and "rows/s" in said.stdout
    work.send_signal(signal.SIGKILL)
    work.communicate()
    time.sleep(1.0)
    said = subprocess.run(status, env=environment(place), capture_output=True, text=True)
    assert "stopped: the same command goes on" in said.stdout and "running" not in said.stdout


@pytest.mark.slow
def test_parts_of_a_cell_are_taken_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is asked once, in its part; the whole cell asks nothing, and is as if undivided."""
    from vlm_prune_ext.evals.answer import Answerer

    monkeypatch.setenv("LMUData", str(place / "LMUData"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    answer, asked = Answerer.answer, list[int]()
    monkeypatch.setattr(
        Answerer, "answer", lambda self, some: asked.append(len(some)) or answer(self, some)
    )
    job, found = sweep.Evaluate(), []
    for folder in ("divided", "whole"):
        base = Settings(
            data=("Mine",), limit=5, max_new_tokens=3, device="cpu", work_dir=str(tmp_path / folder)
        )
        model = str(place / "llava-v1.5-7b")
        (cell,) = sweep.plan(base, [model], lambda _: choices_of(["fastv:5"])).cells
        for part, of in sweep.shares_of([cell], 2 if folder == "divided" else 0).values():
            job(part)
            assert of is cell
        before = len(asked)
        record = read_record(tmp_path / folder / job(cell)["record"])
        assert len(asked) == (before if folder == "divided" else before + 5)
        log = SampleLog(next((tmp_path / folder).glob("*/*_samples.jsonl")))
        said = sorted((one.index, one.prediction, one.kept) for one in log.samples()[0])
        found.append((record.score, record.visual_tokens, record.samples, said))
    assert found[0] == found[1] and len(asked) == 10
    assert sweep.shares_of([cell], 2) == {}  # it is done


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
    with pytest.raises(InputError, match=r"'fastv'.*\n.*'himap'"):  # all of them in one go
        choices_of(["random:9", "fastvv", "himapp"], ["5"])
    with pytest.raises(InputError, match="attention_rank=0"):
        choices_of(["fastv:0"], ["5"])


def test_a_process_of_torchruns_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing inside of a cell is to wait for the others, so it does not find their number."""
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(grid, "_slot", 0)
    assert sweep._rank() == (5, 8) and grid.slot() == 1
    assert "WORLD_SIZE" not in os.environ and sweep._rank() == (0, 1)


def test_controls_and_seeds_come_along() -> None:
    made = choices_of(["none", "fastv", "pdrop:0.5"], ["8"], controls=True, seeds=[0, 4])
    found = {(one.text, getattr(one.method, "seed", None)): one.budget for one in made}
    assert found == {
        ("none", None): "",
        ("fastv:8", None): "8",
        ("pdrop:0.5", None): "0.5",
        ("random:8", 0): "8",
        ("random:8", 4): "8",
        ("downsample:8", None): "8",
        ("random:0.5", 0): "0.5",
        ("random:0.5", 4): "0.5",
        ("downsample:0.5", None): "0.5",
    }
    custom = choices_of(["custom", "custom:8,method=random"], ["8"], seeds=[1, 2])
    assert len(custom) == 3  # attention draws no lots


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "Shapes_MCK"], "'Shapes_MCQ'"),
        (["--method", "fastvv"], "'fastv'"),
        (["--model", "no/where/at/all"], "no/where/at/all"),
        (["--limit", "0"], "limit=0"),
        (["--workers", "0"], "--workers 0"),
        (["--shards", "0"], "--shards 0"),
        (["--budget-by", "means"], "'means'"),
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
