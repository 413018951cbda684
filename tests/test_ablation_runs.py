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
from vlm_prune_ext.demo.writers import write_caption_csv

pytest.importorskip("sacrebleu")
SCRIPT = Path(__file__).parent.parent / "scripts" / "run_vlm_ablation.sh"
BASH, DIRNAME = shutil.which("bash"), shutil.which("dirname")


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def row_indices(path: Path) -> list[int]:
    """Of a file of predictions, in order, the failed ones left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [line["row"]["index"] for line in lines if line["row"]["failed"] is None]


def state_of(folder: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """Age and content of a run's files."""
    files = [path for path in folder.glob(f"{name}_*") if path.is_file()]
    assert len(files) == 3
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.usefixtures("without_java")
def test_a_model_that_fails_and_a_second_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    command = ["ablate", "--data", str(data), "--output-dir", str(out), "--max-new-tokens", "4"]
    command += ["--models", f"bad={tmp_path / 'qwen'}", f"good={tmp_path / 'good'}"]

    assert cli.main([*command, "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "✗ [1/2] bad failed" in said and "✓ [2/2] good done" in said
    assert "done 1/2, failed 1" in said and "gone.jpg" in said
    summary = read(out / "all_models_summary.json")
    assert (summary["done"], summary["failed"]) == (1, 1)
    assert [row["index"] for row in summary["skipped_rows"]] == [4]
    bad, good = summary["models"]
    assert bad["status"] == "failed" and "cannot be read" in bad["reason"]
    assert "Traceback" in Path(bad["log"]).read_text()
    assert not (out / "bad_metrics.json").exists()

    record = read(out / "good_metrics.json")
    assert record["model_name"] == "good" and record["num_samples"] == 4
    assert list(record["metrics"]) == ["bleu4", "meteor", "rougeL", "spice", "cider"]
    assert record["metrics"]["bleu4"] == record["raw"]["bleu4"] / 100
    assert record["metrics"]["meteor"] is None and "Java" in record["missing"]["meteor"]
    assert record["seconds_per_sample"] > 0 and record["peak_memory_bytes"] > 2**20
    assert record["tokens"]["new_total"] > 0 and "sacrebleu" in record["versions"]
    assert good["metrics"] == record["metrics"]
    with (out / "good_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["index"] for row in table] == ["0", "1", "2", "3"]
    assert all(row["reference"] for row in table)
    with (out / "comparison.csv").open(newline="") as file:
        assert [row["model_name"] for row in csv.DictReader(file)] == ["good"]
    with Image.open(out / "comparison.png") as picture:
        picture.load()

    before = state_of(out, "good")
    weights.write_bytes(whole)
    assert cli.main([*command, "--device", "cpu", "--lang", "ko"]) == 0
    said = capsys.readouterr().out
    assert "✓ [2/2] good 이미 완료됨" in said and "완료 2/2, 실패 0" in said
    assert state_of(out, "good") == before
    assert row_indices(out / "bad_predictions.jsonl") == [0, 1, 2, 3]
    assert read(out / "all_models_summary.json")["done"] == 2

    changed = [word if word != "4" else "5" for word in command]
    assert cli.main(changed) == 2
    assert "max_new_tokens=4, now it is 5" in capsys.readouterr().err
    assert state_of(out, "good") == before


@pytest.mark.usefixtures("without_java")
def test_killed_and_started_again(tmp_path: Path) -> None:
    """After `kill -9` of the study its process ends too, so that nothing is predicted twice."""
    psutil = pytest.importorskip("psutil")
    data = write_caption_csv(tmp_path / "data", 2, 4)
    makers.tiny_hf_llava(tmp_path / "tiny")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vlm_prune_ext.cli", "ablate", "--data", str(data)]
    command += ["--models", str(tmp_path / "tiny"), "--output-dir", str(out), "--device", "cpu"]
    command += ["--batch-size", "1", "--max-new-tokens", "400"]
    lines = out / "tiny_predictions.jsonl"
    with (tmp_path / "log").open("wb") as log:
        study = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 600
        while not (lines.exists() and row_indices(lines)):
            assert time.monotonic() < end and study.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(study.pid).children(recursive=True)
        study.kill()
        study.wait(300)
    assert not psutil.wait_procs(workers, timeout=300)[1]
    first = row_indices(lines)
    kept = lines.read_bytes()
    with lines.open("ab") as file:
        file.write(b'{"row": {"index": 3, "te')  # as a crash leaves it

    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(first)} of 4 rows are there already" in again.stdout
    assert lines.read_bytes().startswith(kept)
    assert row_indices(lines) == [0, 1, 2, 3]

    record = read(out / "tiny_metrics.json")
    assert record["num_samples"] == 4


@pytest.mark.skipif(DIRNAME is None or BASH is None, reason="needs bash and coreutils")
def test_demo_model_with_methods_by_the_script(tmp_path: Path) -> None:
    """The trained model is right where it sees, less so with 8 of 576 visual tokens."""
    write_caption_csv(tmp_path / "data", 5, 6)
    settings = {
        "DATA_CSV": "data/captions.csv",
        "OUTPUT_DIR": "out",
        "BATCH_SIZE": "3",
        "MAX_NEW_TOKENS": "24",
        "MODELS": "demo",
        "METHODS": "random:8 none",
        "PYTHON": sys.executable,
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(DIRNAME or "")
    given = {**os.environ, **settings, "PATH": str(tmp_path / "bin")}
    done = subprocess.run(
        [str(BASH), str(SCRIPT), "--device", "cpu"],
        env=given,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model_name"] for row in rows] == ["demo", "demo-random8"]
    assert float(rows[0]["bleu4"]) > 0.5 > float(rows[1]["bleu4"])
    kept = read(tmp_path / "out" / "demo-random8_metrics.json")["tokens"]["visual_kept_mean"]
    assert kept["0"] == 8.0
