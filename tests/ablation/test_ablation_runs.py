"""The ablation as a user starts it: real processes, small models.

Java is hidden from most of these runs: METEOR takes many seconds to start, and a metric without
its tool must be null with a reason. `test_ablation.py` has the metrics themselves.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import family_makers, makers
from vlm_prune_ext import cli
from vlm_prune_ext.ablation import study, worker
from vlm_prune_ext.demo.writers import write_caption_csv
from vlm_prune_ext.experiment.record import SampleLog

pytest.importorskip("sacrebleu")
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_vlm_ablation.sh"


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def row_indices(path: Path) -> list[int]:
    """Of a file of predictions, in order, the failed ones left out."""
    samples = SampleLog(path).samples()[0]
    return [int(sample.index) for sample in samples if sample.failed is None]


def state_of(folder: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """Age and content of a run's files."""
    files = [path for path in folder.glob(f"{name}_*") if path.is_file()]
    assert len(files) == 3
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def killed(command: list[str], lines: Path, log: Path) -> list[int]:
    """Start a study, end it with SIGKILL once a row of ``lines`` is answered; the rows that are."""
    psutil = pytest.importorskip("psutil")
    with log.open("wb") as file:
        study = subprocess.Popen(command, stdout=file, stderr=file)
        end = time.monotonic() + 600
        while not (lines.exists() and row_indices(lines)):
            assert time.monotonic() < end and study.poll() is None, log.read_text()
            time.sleep(0.02)
        workers = psutil.Process(study.pid).children(recursive=True)
        study.kill()
        study.wait(300)
    assert not psutil.wait_procs(workers, timeout=300)[1]
    return row_indices(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("without_java")
def test_killed_then_one_model_fails_then_all_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_caption_csv(tmp_path / "data", 1, 4)
    with data.open("a") as file:
        file.write("images/gone.jpg,What?,A caption.\n")
    makers.tiny_hf_llava(tmp_path / "good")
    family_makers.qwen2_5_vl(tmp_path / "qwen")
    weights = tmp_path / "qwen" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    command = ["ablate", "--data", str(data), "--output-dir", str(out), "--device", "cpu"]
    command += ["--models", f"good={tmp_path / 'good'}", f"bad={tmp_path / 'qwen'}"]
    command += ["--batch-size", "1", "--max-new-tokens", "100"]

    # The process of a killed study ends too, so that nothing is predicted twice.
    lines = out / "good_predictions.jsonl"
    program = [sys.executable, "-m", "vlm_prune_ext.cli", *command]
    first = killed(program, lines, tmp_path / "log")
    kept = lines.read_bytes()
    with lines.open("ab") as file:
        file.write(b'{"sample": {"index": 3, "te')  # as a crash leaves it

    # It goes on, and a model that fails is only that model's.
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert f"{len(first)} of 4 rows are there already" in said
    assert "✓ [1/2] good done" in said and "✗ [2/2] bad failed" in said
    assert "done 1/2, failed 1" in said and "gone.jpg" in said
    assert lines.read_bytes().startswith(kept) and row_indices(lines) == [0, 1, 2, 3]
    check_failed(out)
    check_finished(out)

    # Started again, only what is not finished is done; no process is needed to see that.
    monkeypatch.setattr(study, "PROCESSES", False)
    before = state_of(out, "good")
    weights.write_bytes(whole)
    assert cli.main([*command, "--lang", "ko"]) == 0
    said = capsys.readouterr().out
    assert "✓ [1/2] good 이미 완료됨" in said and "완료 2/2, 실패 0" in said
    assert state_of(out, "good") == before
    assert row_indices(out / "bad_predictions.jsonl") == [0, 1, 2, 3]
    assert read(out / "all_models_summary.json")["done"] == 2

    # Other settings would mix what cannot be compared.
    assert cli.main([*command, "--max-new-tokens", "5"]) == 2
    assert "max_new_tokens=100, now it is 5" in capsys.readouterr().err
    assert state_of(out, "good") == before


def check_failed(out: Path) -> None:
    """One of two models failed, one row has no picture."""
    summary = read(out / "all_models_summary.json")
    assert (summary["done"], summary["failed"]) == (1, 1)
    assert [row["index"] for row in summary["skipped_rows"]] == [4]
    good, bad = summary["models"]
    assert good["metrics"] == read(out / "good_metrics.json")["metrics"]
    assert bad["status"] == "failed" and "cannot be read" in bad["reason"]
    assert "Traceback" in Path(bad["log"]).read_text()
    assert not (out / "bad_metrics.json").exists()


def check_finished(out: Path) -> None:
    """All files of the model that is done."""
    record = read(out / "good_metrics.json")
    assert record["model_name"] == "good" and record["num_samples"] == 4
    assert list(record["metrics"]) == ["bleu4", "meteor", "rougeL", "spice", "cider"]
    assert record["metrics"]["bleu4"] == record["raw"]["bleu4"] / 100
    assert record["metrics"]["meteor"] is None and "Java" in record["missing"]["meteor"]
    assert record["seconds_per_sample"] > 0 and record["peak_memory_bytes"] > 2**20
    assert record["tokens"]["new_total"] > 0 and "sacrebleu" in record["versions"]
    with (out / "good_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["index"] for row in table] == ["0", "1", "2", "3"]
    assert all(row["reference"] for row in table)
    with (out / "comparison.csv").open(newline="") as file:
        assert [row["model_name"] for row in csv.DictReader(file)] == ["good"]
    with Image.open(out / "comparison.png") as picture:
        picture.load()


@pytest.mark.slow
@pytest.mark.usefixtures("without_java")
def test_demo_model_with_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model is right where it sees, less so with 8 of 576 visual tokens."""
    data = write_caption_csv(tmp_path / "data", 5, 4)
    out = tmp_path / "out"
    command = ["ablate", "--data", str(data), "--models", "demo", "--methods", "random:8", "none"]
    command += ["--output-dir", str(out), "--batch-size", "4", "--max-new-tokens", "24"]
    assert cli.main([*command, "--device", "cpu", "cpu"]) == 0  # both runs at the same time
    said = capsys.readouterr().out
    assert said.index("[2/2] demo starts") < said.index("[1/2] demo-random8 done")
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model_name"] for row in rows] == ["demo", "demo-random8"]
    assert float(rows[0]["bleu4"]) > 0.5 > float(rows[1]["bleu4"])
    kept = read(out / "demo-random8_metrics.json")["tokens"]["visual_kept_mean"]
    assert kept["0"] == 8.0


@pytest.fixture
def here(without_java: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a run's process is done in this one, which saves starting it."""

    monkeypatch.setattr(study, "PROCESSES", False)


@pytest.mark.usefixtures("here")
def test_rerun_redoes_what_it_names(tmp_path: Path) -> None:
    data = write_caption_csv(tmp_path / "data", 1, 3)
    for name in ("a", "b"):
        makers.tiny_hf_llava(tmp_path / name)
    out = tmp_path / "out"
    command = ["ablate", "--data", str(data), "--output-dir", str(out), "--device", "cpu"]
    command += ["--models", str(tmp_path / "a"), str(tmp_path / "b"), "--max-new-tokens"]
    assert cli.main([*command, "4"]) == 0
    before = {name: state_of(out, name) for name in ("a", "b")}
    assert cli.main([*command, "4"]) == 0
    assert {name: state_of(out, name) for name in ("a", "b")} == before
    assert cli.main([*command, "4", "--rerun", "b"]) == 0
    assert state_of(out, "a") == before["a"]
    after = state_of(out, "b")
    assert after["b_metrics.json"] != before["b"]["b_metrics.json"]
    assert after["b_predictions.csv"][1] == before["b"]["b_predictions.csv"][1]
    assert row_indices(out / "b_predictions.jsonl") == [0, 1, 2]
    aside = {path.name: path.read_bytes() for path in (out / "previous").iterdir()}
    assert aside == {name: content for name, (_, content) in before["b"].items()}
    assert cli.main([*command, "6", "--fresh"]) == 0
    assert read(out / "a_metrics.json")["settings"]["max_new_tokens"] == 6


@pytest.mark.usefixtures("here")
def test_a_row_that_fails_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_caption_csv(tmp_path / "data", 1, 4)
    picture = tmp_path / "data" / "images" / "shapes_1_00002.jpg"
    picture.write_bytes(picture.read_bytes()[:3000])  # its head is whole
    makers.tiny_hf_llava(tmp_path / "tiny")
    out = tmp_path / "out"
    command = ["ablate", "--data", str(data), "--output-dir", str(out), "--device", "cpu"]
    command += ["--models", str(tmp_path / "tiny"), "--max-new-tokens", "4"]
    assert cli.main(command) == 1
    assert "rows without an answer: 1" in capsys.readouterr().out
    record = read(out / "tiny_metrics.json")
    assert record["num_samples"] == 3 and record["failed_rows"][0]["index"] == 2
    with (out / "tiny_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [bool(row["failed"]) for row in table] == [False, False, True, False]


def test_an_interrupted_study_says_what_is_open(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_caption_csv(tmp_path / "data", 1, 2)
    for name in ("a", "b"):
        makers.tiny_hf_llava(tmp_path / name)
    out = tmp_path / "out"
    real = worker.run

    def run(work: worker.Work, source: str, method: str, name: str) -> dict[str, Any]:
        if name == "b":
            raise KeyboardInterrupt
        return real(work, source, method, name)

    monkeypatch.setattr(worker, "run", run)
    command = ["ablate", "--data", str(data), "--output-dir", str(out), "--device", "cpu"]
    command += ["--models", str(tmp_path / "a"), str(tmp_path / "b"), "--max-new-tokens", "4"]
    assert cli.main(command) == 130
    states = [entry["status"] for entry in read(out / "all_models_summary.json")["models"]]
    assert states == ["done", "open"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            "--data data/quic360/test.csv --output-dir results --batch-size 2 --max-new-tokens 64",
        ),
        (
            {"DATA_CSV": "a b.csv", "OUTPUT_DIR": "o", "BATCH_SIZE": "4", "MAX_NEW_TOKENS": "9"},
            "--data a b.csv --output-dir o --batch-size 4 --max-new-tokens 9",
        ),
        ({"MODELS": "demo x=y", "METHODS": "none fastv:9"}, "--models demo x=y --methods none fas"),
        ({"PRESET": "quick"}, "--preset quick"),
    ],
)
def test_script_says_it_by_variables(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    """A program in Python's place shows what it is called with."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$@"\n')
    show.chmod(0o755)
    known = ("DATA_CSV", "OUTPUT_DIR", "BATCH_SIZE", "MAX_NEW_TOKENS", "MODELS", "PRESET")
    clean = {k: v for k, v in os.environ.items() if k not in (*known, "METHODS")}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--lang", "ko"],
        env={**clean, **given, "PYTHON": str(show)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.startswith("-m vlm_prune_ext.cli ablate --data ")
    assert expected in done.stdout and done.stdout.endswith("--lang ko\n")
