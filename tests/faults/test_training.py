"""A training step while tokens are dropped: gradients flow, or one sentence says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import makers
from vlm_prune_ext.errors import InputError

METHODS = {
    "fastv": vp.FastV(agg_layer=2, attention_rank=4),
    "fastv-mask": vp.FastV(agg_layer=2, attention_rank=4, mode="mask"),
    "random": vp.RandomDrop(keep=4),
    "downsample": vp.Downsample(4),
    "visionzip": vp.VisionZip(dominant=5, contextual=2),
    "divprune": vp.DivPrune(ratio=5),
    "prumerge": vp.PruMerge(ratio=0.25),
    "saint-tower": vp.SAINT(start=None, vit=vp.SAINTViT(layers=(1,), keep_num=8)),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("training") / "llava"
    makers.tiny_hf_llava(folder, kv_heads=2)
    model, processor = vp.load(str(folder), dtype="float32", fast=False)
    return model, dict(processor.batch(["What colour is the cat?"], [[makers.photo(80, 60, 1)]]))


@pytest.mark.parametrize("name", METHODS)
@torch.enable_grad()  # importing VLMEvalKit turns gradients off for a whole process
def test_a_training_step(asked: tuple[Any, dict[str, Any]], name: str) -> None:
    model, inputs = copy.deepcopy(asked[0]).train(), asked[1]
    with vp.prune(model, METHODS[name]):
        model(**inputs).logits[0, -1].sum().backward()
        trained = [model.lm_head, model.model.multi_modal_projector]
        for weight in [*trained[0].parameters(), *trained[1].parameters()]:
            assert weight.grad is not None and weight.grad.isfinite().all()
        if name == "fastv-mask":  # all positions are there
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        else:
            with pytest.raises(InputError, match="labels are not accepted"):
                model(**inputs, labels=inputs["input_ids"])
        model.gradient_checkpointing_enable()
        with pytest.raises(InputError, match="Gradient checkpointing"):
            model(**inputs, use_cache=False)
        with torch.no_grad():  # nothing is run a second time
            model(**inputs, use_cache=False)
    assert not model._forward_pre_hooks
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
