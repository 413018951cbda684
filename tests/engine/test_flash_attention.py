"""Real FlashAttention: kept sets and answers are those of SDPA, for every method there is.

Needs a GPU and an installed FlashAttention (2, 3 or 4); in bf16, which its kernels are made for.
Kernels round differently there, so that near ties fall the other way now and then: nearly all
places kept must be the same, and of the demo model's answers (short, and sure of themselves) all
but one. Greedy rules go another way from the first near tie on, so only their answers are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.utils import import_utils

import vlm_prune_ext as vp
from tests.fast.test_fast import demo_queries
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.methods.registry import METHODS, get_method
from vlm_prune_ext.models.clip_text import TextTower

QUESTIONS, BATCH = 16, 4
SAME_KEPT = 0.95
GREEDY = ("cdpruner", "divprune", "scope", "vispruner")
KERNELS = [
    f"flash_attention_{version}"
    for version in (2, 3, 4)
    if torch.cuda.is_available()
    and getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)()
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not KERNELS, reason="needs an installed FlashAttention"),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        kernel: vp.load(
            CHECKPOINT,
            device="cuda",
            dtype="bfloat16",
            attn_implementation=kernel,
            fast=False,
        )
        for kernel in ("sdpa", *KERNELS)
    }


def answers(loaded: Any, method: Any, queries: list[Query]) -> tuple[list[str], list[dict]]:
    """Texts, and what was kept by layer, batch by batch."""
    who = Answerer(*loaded, method)
    texts: list[str] = []
    kept: list[dict] = []
    for first in range(0, len(queries), BATCH):
        batch = queries[first : first + BATCH]
        texts += [answer.text for answer in who.answer(batch)]
        model, processor = loaded
        inputs = processor.batch([q.text for q in batch], [list(q.images) for q in batch])
        with torch.inference_mode(), vp.prune(model, method) as trace:
            model(**inputs)
        kept.append({**trace.kept, **{f"vision {k}": v for k, v in trace.vision_kept.items()}})
    return texts, kept


def agreement(one: list[dict], other: list[dict]) -> float:
    """Share of places that both keep; rules that decide by thresholds keep different numbers."""
    same = total = 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for layer, places in mine.items():
            for row, counterpart in zip(places, theirs[layer], strict=True):
                same += int(torch.isin(row, counterpart).sum())
                total += max(row.numel(), counterpart.numel())
    return same / total if total else 1.0


def method_of(name: str) -> Any:
    """A method with its own defaults, or what it is usually asked for."""
    cls = METHODS[name]
    if cls is None:
        return None
    method = get_method(name, **cls.standard)
    return replace(method, text_tower=text_tower()) if name == "cdpruner" else method


def text_tower() -> TextTower:
    """The demo's CLIP has no text half: one with random weights."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
    )
    projection = torch.nn.Linear(128, 32, bias=False)
    text = CLIPTextModelWithProjection(config).eval()
    parts = (part.to("cuda", torch.bfloat16) for part in (text, projection))
    return TextTower(*parts, question=[49406, 320, 1125, 49407])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", METHODS)
def test_as_with_sdpa(models: dict[str, Any], name: str, kernel: str) -> None:
    method, queries = method_of(name), demo_queries(QUESTIONS)
    expected, kept = answers(models["sdpa"], method, queries)
    found, also_kept = answers(models[kernel], method, queries)
    share = agreement(kept, also_kept)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    print(f"{kernel}, {name}: {100 * share:.2f} % of kept places, {same} of {QUESTIONS} answers")
    assert name in GREEDY or share >= SAME_KEPT
    assert same >= QUESTIONS - 1
