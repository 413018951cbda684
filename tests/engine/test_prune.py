"""`vp.prune` entered again: planned once, and nothing of one time is left in the next."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vlm_prune_ext as vp
from tests import makers, tables

METHODS = tables.pick("fastv", "himap", "saint-vit", "downsample", "visionzip", "vtw")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("llava")
    makers.tiny_hf_llava(folder)
    return vp.load(folder, device="cpu", fast=False)


def answer(model: Any, inputs: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                          return_dict_in_generate=True).logits  # fmt: skip


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def state_of(model: Any) -> dict[str, Any]:
    """Everything that hooks and patches would change."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in own.items()}
        for name, own in ((name, vars(module)) for name, module in model.named_modules())
    }


@pytest.mark.parametrize("name", METHODS)
def test_entering_again_is_entering_anew(loaded: tuple[Any, Any], name: str) -> None:
    model, processor = loaded
    prompts = [processor.prompt(text, makers.photo()) for text in ("What is this?", "Red?")]
    plain = [answer(model, inputs) for inputs in prompts]
    before = state_of(model)
    again = vp.prune(model, METHODS[name])
    for _ in range(2):
        for inputs, unpruned in zip(prompts, plain, strict=True):
            with vp.prune(model, METHODS[name]) as expected:
                logits = answer(model, inputs)
            with again as trace:
                assert same(answer(model, inputs), logits)
            assert trace.lengths == expected.lengths and trace.merged == expected.merged
            for field in ("kept", "vision_kept", "positions"):
                now, then = getattr(trace, field), getattr(expected, field)
                assert now.keys() == then.keys()
                assert all(torch.equal(now[layer], then[layer]) for layer in now)
            assert state_of(model) == before
            assert same(answer(model, inputs), unpruned)


def test_a_prompt_that_failed_leaves_nothing(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    again = vp.prune(model, METHODS["visionzip"])
    with again:
        expected = answer(model, inputs)
    embeds = model.get_input_embeddings()
    broken = embeds.register_forward_hook(lambda *_: 1 / 0)  # behind the tower, or in front of it
    with pytest.raises(ZeroDivisionError), again:
        model(**inputs)
    broken.remove()
    layer = model.model.language_model.layers[0]
    broken = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), again:
        model(**inputs)
    broken.remove()
    with again as trace:
        assert trace.lengths == [] and trace.kept == {}
        assert same(answer(model, inputs), expected)


def test_it_is_entered_once_at_a_time(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    again = vp.prune(model, METHODS["fastv"])
    with again as trace:
        with pytest.raises(vp.InputError, match="already"), again:
            pass
        answer(model, inputs)  # still attached
        assert trace.lengths[-1] < trace.lengths[0]
    with vp.prune(model, METHODS["vtw"]), pytest.raises(vp.InputError, match="already"), again:
        pass
    with again:
        answer(model, inputs)


@pytest.mark.parametrize("part", ["layer", "layers", "decoder", "tower", "projector"])
def test_a_module_that_was_replaced_is_noticed(loaded: tuple[Any, Any], part: str) -> None:
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    inputs = processor.prompt("What is this?", makers.photo())
    again = {name: vp.prune(model, METHODS[name]) for name in ("fastv", "saint-vit", "visionzip")}
    for one in again.values():
        with one:
            answer(model, inputs)
    inner = model.model
    if part == "layer":
        inner.language_model.layers[1] = copy.deepcopy(inner.language_model.layers[1])
    elif part == "layers":
        inner.language_model.layers = copy.deepcopy(inner.language_model.layers)
    else:
        name = {"decoder": "language_model", "tower": "vision_tower"}.get(
            part, "multi_modal_projector"
        )
        setattr(inner, name, copy.deepcopy(getattr(inner, name)))
    for weight in model.parameters():
        weight.data = weight.data.flip(0)
    for name, one in again.items():
        with vp.prune(model, METHODS[name]) as expected:
            logits = answer(model, inputs)
        with one as trace:
            assert same(answer(model, inputs), logits)
        assert trace.lengths == expected.lengths


def test_the_baseline_too(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    expected, before = answer(model, inputs), state_of(model)
    again = vp.prune(model, None)
    for _ in range(2):
        with again as trace, again:
            assert state_of(model) == before
            assert same(answer(model, inputs), expected)
        assert trace.backend == "transformers"


# -- KV caches that outlive the pruning they were made under --------------------------------------
def filled(loaded: tuple[Any, Any], method: Any) -> tuple[Any, torch.Tensor]:
    """A cache with a prompt and one decoded token in it, and the next token."""
    model, processor = loaded
    inputs = processor.prompt("What is this?", makers.photo())
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), vp.prune(model, method):
        token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return cache, token


CACHED = tables.pick("fastv", "random", "saint-vit", "downsample", "visionzip")


@pytest.mark.parametrize("name", CACHED)
def test_a_pruned_cache_refuses_tokens_outside(loaded: tuple[Any, Any], name: str) -> None:
    model, _ = loaded
    before = {key: len(vars(module)) for key, module in model.named_modules()}
    cache, token = filled(loaded, CACHED[name])
    lengths = [cache.get_seq_length(layer) for layer in range(len(cache))]
    for one in (cache, copy.deepcopy(cache)):
        with pytest.raises(vp.InputError, match=r"DynamicCache was filled while.*with block"):
            model(input_ids=token, past_key_values=one)
        with (
            pytest.raises(vp.InputError, match="filled while pruning"),
            vp.prune(model, CACHED[name]),
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
    with vp.prune(model, CACHED["fastv"]):
        model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
