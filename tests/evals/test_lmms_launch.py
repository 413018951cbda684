"""Real launches of lmms-eval: by our script on two processes, and by hand, killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from tests import makers
from tests.evals.test_lmms import evaluate
from vlm_prune_ext.demo.writers import write_lmms_parquet
from vlm_prune_ext.evals.lmms_launch import TASKS

SCRIPT = Path(__file__).parents[2] / "run_lmms.sh"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.tiny_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    write_lmms_parquet(folder, 0, 24)
    _damage(folder / "yn.parquet", place=3)
    clean = {k: v for k, v in os.environ.items() if k not in ("LMMS_CACHE_RUN_ID", "RANK")}
    return {
        **clean,
        "PYTHON": sys.executable,
        "VLM_PRUNE_DEMO_DATA": str(folder),
        "LMMS_EVAL_DATASETS_CACHE": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _damage(path: Path, place: int) -> None:
    """Cut the file of one image short of its header."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    rows[place]["image"]["bytes"] = b"no image at all"
    parquet.write_table(pa.Table.from_pylist(rows), path)


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_script_on_two_processes(
    checkpoint: Path,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder of its own, one bad image, and the answers and scores of one process."""
    words = [str(SCRIPT), "llava_fastv", "shapes_mcq,shapes_yn", f"pretrained={checkpoint}"]
    words += ["agg_layer=1", "attention_rank=4", "limit=7", "batch_size=2", "device=cpu"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**environment, "NUM_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "logs" / f"{checkpoint.name}-fastv_rank4_k1"
    (results_file,) = folder.rglob("*_results.json")
    assert results_file.relative_to(tmp_path).as_posix() in done.stdout
    results = json.loads(results_file.read_text())
    assert results["throughput"]["avg_processes"] == 2
    assert results["throughput"]["avg_failed_samples"] == 1
    assert results["throughput"]["avg_visual_tokens_after"] == 4
    assert results["config"]["model_args"].endswith("agg_layer=1,attention_rank=4,device=cpu")
    assert done.stdout.count("task shapes_yn, split test, sample 3: not answered") == 1

    monkeypatch.setenv("VLM_PRUNE_DEMO_DATA", environment["VLM_PRUNE_DEMO_DATA"])
    tasks = ["shapes_mcq", "shapes_yn"]
    settings = "agg_layer=1,attention_rank=4"
    alone = evaluate(checkpoint, "llava_fastv", settings, tasks, limit=7)
    assert alone["throughput"]["avg_processes"] == 1
    for task in tasks:
        expected = {one["doc_id"]: one["filtered_resps"] for one in alone["samples"][task]}
        got = {one["doc_id"]: one["filtered_resps"] for one in samples(folder, task)}
        assert got == {doc: answers[0] for doc, answers in expected.items()}
        assert sorted(got) == list(range(7))
        assert _scores(results["results"][task]) == _scores(alone["results"][task])
    assert samples(folder, "shapes_yn")[0]["token_counts"]


def _scores(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if "stderr" not in name}


def test_killed_and_started_again(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The plain command with --use_cache: no sample is answered twice."""
    count = 24
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    command += ["-m", "lmms_eval", "--model", "llava_fastv", "--tasks", "shapes_caption"]
    command += ["--model_args", f"pretrained={checkpoint},agg_layer=1,attention_rank=4,device=cpu"]
    command += ["--include_path", str(TASKS), "--batch_size", "2", "--limit", str(count)]
    command += ["--gen_kwargs", "max_new_tokens=400"]  # slow enough to be met at work
    command += ["--use_cache", str(tmp_path / "cache"), "--log_samples"]
    command += ["--output_path", str(tmp_path / "logs")]
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL}
    quiet["stderr"] = subprocess.DEVNULL
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        _wait_for(lambda: len(answered(tmp_path)) >= 3, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = answered(tmp_path)
    assert 3 <= len(before) < count
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(before)} hits" in done.stdout
    after = Counter((one["task_name"], one["doc_id"]) for one in answered(tmp_path))
    assert set(after) == {("shapes_caption", doc) for doc in range(count)}
    assert set(after.values()) == {1}
    assert len(samples(tmp_path / "logs", "shapes_caption")) == count


def answered(folder: Path) -> list[dict[str, Any]]:
    """What the response cache has noted, over all runs."""
    records = []
    for file in (folder / "cache" / "runs").glob("*/*.audit.jsonl"):
        for line in file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # being written
                continue
    return records


def _wait_for(ready: Any, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run did not answer anything"
        time.sleep(0.05)
