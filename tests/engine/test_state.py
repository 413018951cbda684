"""KV caches that outlive the pruning they were made under."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vlm_prune_ext as vp
from tests import makers, tables


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("llava")
    makers.tiny_hf_llava(folder)
    return vp.load(folder, device="cpu", fast=False)


def filled(loaded: tuple[Any, Any], method: Any) -> tuple[Any, torch.Tensor]:
    """A cache with a prompt and one decoded token in it, and the next token."""
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), vp.prune(model, method):
        token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return cache, token


METHODS = tables.pick("fastv", "random", "saint-vit", "downsample", "visionzip")


@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_cache_refuses_tokens_outside(loaded: tuple[Any, Any], name: str) -> None:
    model, _ = loaded
    before = {key: len(vars(module)) for key, module in model.named_modules()}
    cache, token = filled(loaded, METHODS[name])
    lengths = [cache.get_seq_length(layer) for layer in range(len(cache))]
    for one in (cache, copy.deepcopy(cache)):
        with pytest.raises(vp.InputError, match=r"DynamicCache was filled while.*with block"):
            model(input_ids=token, past_key_values=one)
        with (
            pytest.raises(vp.InputError, match="filled while pruning"),
            vp.prune(model, METHODS[name]),
        ):
            model(input_ids=token, past_key_values=one)
        assert [one.get_seq_length(layer) for layer in range(len(one))] == lengths
    assert {key: len(vars(module)) for key, module in model.named_modules()} == before


@pytest.mark.parametrize("method", [None, vp.FastV(1, 1.0), vp.RandomDrop(keep=1.0)])
def test_a_whole_cache_goes_on(loaded: tuple[Any, Any], method: Any) -> None:
    model, _ = loaded
    cache, token = filled(loaded, method)
    plain, same = filled(loaded, None)
    assert torch.equal(token, same)
    with torch.no_grad():
        out = model(input_ids=token, past_key_values=cache).logits
        assert torch.equal(out, model(input_ids=same, past_key_values=plain).logits)


def test_caches_of_fixed_size_are_used_again(loaded: tuple[Any, Any]) -> None:
    """transformers keeps them on the model for the next call of `generate`."""
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **options)
    with vp.prune(model, METHODS["fastv"]):
        model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
