"""Rows a second through both frameworks, on a checkpoint made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vlmeval")
pytest.importorskip("lmms_eval")

from vlm_prune_ext.bench import end_to_end
from vlm_prune_ext.bench.shapes import _llama
from vlm_prune_ext.cli import main
from vlm_prune_ext.evals.feed import Spent
from vlm_prune_ext.evals.throughput import Run, _fill


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaVA-1.5 with random weights, made small."""
    config = end_to_end.SHAPES["llava-1.5-7b"]()
    config.text_config = _llama(3, 64, 4, 128)
    for name, size in (("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2)):
        setattr(config.vision_config, name, size)
    config.vision_config.num_attention_heads = 2
    monkeypatch.setattr(end_to_end, "SHAPES", {"llava-1.5-tiny": lambda: config})
    return end_to_end.random_checkpoint("llava-1.5-tiny", tmp_path / "tiny", torch.device("cpu"))


def test_both_frameworks_and_their_own_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LMUData", "LMMS_EVAL_DATASETS_CACHE", "LMMS_CACHE_RUN_ID"):
        monkeypatch.setenv(name, "")  # what the run sets is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["bench", "--end-to-end", "--model", str(checkpoint), "--rows", "8", "--questions", "4"]
    words += ["--method", "none", "fastv:9,agg_layer=1", "llava_hf", "--batch-size", "4"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert made["data"] == {"rows": 8, "pictures": 2, "questions": 4}
    runs: list[dict[str, Any]] = made["runs"]
    assert [(run["framework"], run["method"]) for run in runs] == [
        ("VLMEvalKit", "none"),
        ("lmms-eval", "none"),
        ("VLMEvalKit", "fastv_rank9_k1"),
        ("lmms-eval", "fastv_rank9_k1"),
        ("lmms-eval llava_hf", "none"),
    ]
    for run in runs:
        assert (run["error"], run["rows"]) == (None, 8)
        assert 0 < run["answering"] <= run["seconds"]
        assert run["samples_per_second"] == pytest.approx(8 / run["answering"])
    for run in runs[:4]:
        assert run["largest_batch"] == 4 and run["failed"] == 0
        spans = ("wait", "prefill", "decode", "around", "framework")
        added = sum(run["split"][name] for name in spans) * 8
        assert added == pytest.approx(run["answering"], rel=1e-3)
        assert all(seconds >= 0 for seconds in run["split"].values())
        assert 0 < run["in_model"] <= 1
    assert runs[2]["prefill_flops"] < runs[0]["prefill_flops"]


def test_the_second_half_is_its_own_rate() -> None:
    """Two slow batches, then two fast ones of the same size."""
    spent, run = Spent(start=10.0, asked=4.0), Run("x", "none")
    spent.batches = [(12.0, 4), (14.0, 4), (14.5, 4), (15.0, 4)]
    _fill(run, spent, {9.0: 0, 11.0: 50, 14.2: 100, 16.0: 0})
    assert (run.rows, run.answering, run.samples_per_second) == (16, 5.0, 3.2)
    assert (run.steady, run.gpu_busy, run.in_model) == (8.0, 0.75, 0.8)
