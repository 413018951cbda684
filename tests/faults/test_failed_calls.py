"""Calls that fail half-way: nothing of one reaches the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import vlm_prune_ext as vp
from tests import makers

METHODS = {
    "fastv": vp.FastV(agg_layer=2, attention_rank=4),
    "random-0": vp.RandomDrop(keep=4),
    "himap": vp.HiMAP(),
    "tower": vp.SAINT(start=None, vit=vp.SAINTViT(layers=(1,), keep_num=8)),
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("threads") / "llava"
    makers.tiny_hf_llava(folder, kv_heads=2)
    model, processor = vp.load(str(folder), dtype="float32", fast=False)
    prompts = [
        dict(processor.prompt(makers.QUESTIONS[i % 4], makers.photo(40 + 9 * i, 50, seed=i)))
        for i in range(6)
    ]
    return model, [*prompts, dict(processor.prompt("No picture?"))]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["tower", "layer", "logits", "input"])
def test_a_call_that_fails_leaves_nothing(
    asked: tuple[Any, list[dict[str, Any]]], name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a call ends, the next one answers as the first one would have."""
    model, prompts = asked

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError(where)

    class Fails(LogitsProcessor):
        steps = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.steps += 1
            return scores if self.steps < 3 else fail()

    options = dict(OPTIONS)
    if where == "logits":
        options["logits_processor"] = [Fails()]
    with vp.prune(model, METHODS[name]) as trace:
        expected = model.generate(**prompts[1], **OPTIONS)
        lengths = list(trace.lengths)
        with monkeypatch.context() as patched, pytest.raises((MemoryError, ValueError)):
            if where == "tower":
                patched.setattr(model.model.multi_modal_projector, "forward", fail)
            if where == "layer":
                patched.setattr(model.model.language_model.layers[3].mlp, "forward", fail)
            if where == "input":  # as many placeholders as there are no features for
                ids = prompts[0]["input_ids"]
                more = torch.cat([ids, ids[ids == model.config.image_token_id][None, :3]], dim=1)
                model.generate(**{**prompts[0], "input_ids": more}, **options)
                fail()
            model.generate(**prompts[0], **options)
        for inputs in (prompts[-1], prompts[1]):
            found = model.generate(**inputs, **OPTIONS)
        assert torch.equal(found, expected) and trace.lengths == lengths
