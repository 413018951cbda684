"""One model over two GPUs, and one question set over several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import makers, tables
from vlm_prune_ext.models import parts_of

ROOT = Path(__file__).parents[2]
LAYERS = 6
METHODS: dict[str, Any] = {
    **tables.pick("none", *tables.EVERYWHERE, "saint-vit"),
    "boundary": vp.FastV(agg_layer=LAYERS // 2, attention_rank=0.4),
    "boundary-mask": vp.FastV(agg_layer=LAYERS // 2, attention_rank=0.4, mode="mask"),
    "mask-behind": vp.FastV(agg_layer=5, attention_rank=0.4, mode="mask"),
}
TEXTS = ("What is this?", "How many circles are there in the picture?")


def halves(first: Any, second: Any) -> dict[str, Any]:
    """The decoder's layers on two devices, half of them each."""
    inner = "model.language_model."
    places = {"model.vision_tower": first, "model.multi_modal_projector": first}
    places |= {inner + "embed_tokens": first, inner + "rotary_emb": first}
    for layer in range(LAYERS):
        places[f"{inner}layers.{layer}"] = first if layer < LAYERS // 2 else second
    return places | {inner + "norm": second, "lm_head": second}


def answer(loaded: tuple[Any, Any], method: Any) -> tuple[torch.Tensor, vp.Trace]:
    """New tokens of two prompts of different length, and what was pruned."""
    model, processor = loaded
    inputs = processor.batch(list(TEXTS), [[photo] for photo in makers.photos(2)])
    with vp.prune(model, method) as trace:
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return ids.cpu(), trace


def assert_same(one: tuple[torch.Tensor, vp.Trace], other: tuple[torch.Tensor, vp.Trace]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].lengths == other[1].lengths
    assert one[1].kept.keys() == other[1].kept.keys()
    for layer, kept in one[1].kept.items():
        assert torch.equal(kept.cpu(), other[1].kept[layer].cpu())


@pytest.mark.parametrize("make", [makers.tiny_original, makers.tiny_hf_llava])
def test_a_spread_model_answers_like_a_whole_one(make: Callable[..., Path], tmp_path: Path) -> None:
    """Without two GPUs both halves are on the CPU: the same map, the same loading."""
    two = torch.cuda.device_count() >= 2
    devices = (0, 1) if two else ("cpu", "cpu")
    folder = make(tmp_path / "model", layers=LAYERS)
    whole = vp.load(folder, device="cuda:0" if two else "cpu", dtype="float32", fast=False)
    spread = vp.load(folder, device_map=halves(*devices), dtype="float32")
    used = {next(layer.parameters()).device for layer in parts_of(spread[0]).layers}
    assert len(used) == (2 if two else 1)
    for method in METHODS.values():
        assert_same(answer(spread, method), answer(whole, method))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_automatic_map(tmp_path: Path) -> None:
    folder = makers.tiny_hf_llava(tmp_path / "model", layers=LAYERS)
    whole = vp.load(folder, device="cuda:0", dtype="float32", fast=False)
    spread = vp.load(folder, device_map="auto", dtype="float32")
    for method in METHODS.values():
        assert_same(answer(spread, method), answer(whole, method))


def run_script(*words: str, launcher: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "scripts" / "gpus.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout
    return json.loads(lines[0])


@pytest.mark.slow
def test_two_processes_share_the_questions() -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    words = ["share", "--model", "demo", "--samples", "8", "--batch-size", "2", "--no-fast"]
    words += ["--max-new-tokens", "3"]
    result = run_script(*words, launcher=launcher, CUDA_VISIBLE_DEVICES="")
    assert result["complete"] is True
    assert (result["world"], result["samples"], result["batch"]) == (2, 8, 2)
    assert (result["model"], result["method"], result["fast"]) == ("demo", "fastv:100", False)
    assert len(result["rank_seconds"]) == 2
    assert result["seconds"] > 0 and result["samples_per_second"] > 0


@pytest.mark.slow
def test_one_model_over_what_is_there() -> None:
    result = run_script("split", "--shape", "tiny", "--new-tokens", "4")
    assert all(result["checks"].values())
    assert sum(result["layers"].values()) == 20
    assert result["last_layer_tokens"]["fastv"] == 167
    assert result["tokens_per_second"].keys() >= {"none", "fastv", "himap", "saint"}
