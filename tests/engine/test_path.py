"""How much of this package one prompt goes through: what a layer is handed is worked out once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

import vlm_prune_ext as vp
from tests.engine.test_engine import PROMPTS, make, prompts

HOME = str(Path(vp.__file__).parent)


def calls_of(work: Any) -> Counter[str]:
    """How often functions of this package are entered."""
    seen: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            seen[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


@torch.no_grad()
def prompt_and_step(layers: int) -> tuple[Counter[str], Counter[str]]:
    """Calls of a prompt, and of a decode step behind it, in a model of so many layers."""
    config = make("sdpa").config
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config).eval()
    front, image, _ = PROMPTS[0]
    embeds, cache = prompts()[0], DynamicCache(config=config)
    with vp.prune(model, vp.FastV(agg_layer=2, attention_rank=7), visual_span=(front, image)):
        prompt = calls_of(lambda: model(inputs_embeds=embeds, past_key_values=cache))
        step = calls_of(lambda: model(inputs_embeds=embeds[:, -1:], past_key_values=cache))
    return prompt, step


def test_a_layer_more_costs_five_calls() -> None:
    for few, many in zip(prompt_and_step(6), prompt_and_step(26), strict=True):
        assert few["_changes"] == many["_changes"] == 1  # LayerArguments'
        assert many.total() - few.total() <= 5 * 20
