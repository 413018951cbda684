"""What decoding went wrong over: caches used again, windows, conversations and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

import vlm_prune_ext as vp
from tests import makers
from tests.engine.test_engine import make, prompts

METHODS = {
    "fastv": vp.FastV(agg_layer=2, attention_rank=4),
    "mask": vp.FastV(agg_layer=2, attention_rank=4, mode="mask"),
    "pdrop": vp.PyramidDrop(layers=(1, 3), ratios=(0.6, 0.3)),
    "front": vp.RandomDrop(keep=4),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llava")
    makers.tiny_hf_llava(folder, kv_heads=2)
    model, processor = vp.load(folder, device="cpu", fast=False)
    model.generation_config.eos_token_id = None
    return model, processor


def inputs_of(processor: Any, text: str, seed: int = 1) -> dict[str, Any]:
    return dict(processor.batch([text], [[makers.photo(80, 60, seed)]]))


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_static_cache_used_again_for_text(name: str) -> None:
    model = make("sdpa")
    cache = StaticCache(config=model.config, max_cache_len=64)
    text, step = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9]])
    want = model(input_ids=torch.cat([text, step], dim=1)).logits[0, -1]
    with vp.prune(model, METHODS[name], visual_span=[[(3, 20)]]):
        model(inputs_embeds=prompts()[0], past_key_values=cache)
        cache.reset()
    with vp.prune(model, METHODS[name], visual_span=[[]]):
        model(input_ids=text, past_key_values=cache)
        got = model(input_ids=step, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_static_cache_used_again_within_one_block(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    text = dict(processor.batch(["Is there a dog? Please answer yes or no."], [[]]))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**text, **options)
    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    with vp.prune(model, METHODS["fastv"]):
        model.generate(**inputs_of(processor, "What is this?"), past_key_values=cache, **options)
        cache.reset()
        assert torch.equal(model.generate(**text, past_key_values=cache, **options), want)


@torch.no_grad()
def test_window_in_a_static_mask_is_no_padding() -> None:
    config = MistralConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=11,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(3, 90, (1, 48))
    kept = []
    for cache in (None, "static"):
        method = vp.HiMAP(1, 3, 3, 2, sys_length=8)
        with vp.prune(model, method, visual_span=(8, 12)) as trace:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                cache_implementation=cache,
            )
        kept.append(trace.kept[1])
    assert torch.equal(*kept)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_conversation_goes_on(loaded: tuple[Any, Any], name: str) -> None:
    """The second question, given to generate with the whole conversation and its cache, equals the
    same tokens fed one by one."""
    model, processor = loaded
    first = inputs_of(processor, "What is this?")
    length = first["input_ids"].shape[1]
    options = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [processor.image_token_id]}
    config = model.config.text_config
    with vp.prune(model, METHODS[name]):
        cache = DynamicCache(config=config)
        said = model.generate(**first, past_key_values=cache, max_new_tokens=4, **options)
        ids = torch.cat([said, torch.tensor([[30, 31, 32]])], dim=1)
        got = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        ).logits[0]
        cache = DynamicCache(config=config)
        model(**first, past_key_values=cache)
        for place in range(length, ids.shape[1]):
            want = model(
                input_ids=ids[:, place : place + 1],
                attention_mask=torch.ones(1, place + 1, dtype=torch.int64),
                position_ids=torch.tensor([[place]]),
                past_key_values=cache,
            ).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


ASSISTED = {name: METHODS[name] for name in ("fastv", "pdrop", "front")} | {
    "himap": vp.HiMAP(1, 5, 3, 2),
    "sparsevlm": vp.SparseVLM(stages=((1, 7), (3, 3))),
    "tower": vp.SAINT(start=None, vit=vp.SAINTViT(layers=(1,), keep_num=9)),
}


@pytest.mark.parametrize("name", ASSISTED)
@torch.no_grad()
def test_candidates_behind_the_prompt_change_nothing(loaded: tuple[Any, Any], name: str) -> None:
    """Prompt lookup (as assisted decoding does) feeds candidates with the prompt, and takes those
    that were wrong out of the cache again."""
    model, processor = loaded
    inputs = inputs_of(processor, "What colour is the cat? What colour is the dog? What colour")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["suppress_tokens"] = [processor.image_token_id]
    with vp.prune(model, ASSISTED[name]) as trace:
        want = model.generate(**inputs, **options)
        lengths, kept = list(trace.lengths), {k: v.clone() for k, v in trace.kept.items()}
        got = model.generate(**inputs, **options, prompt_lookup_num_tokens=5)
    assert torch.equal(got, want)
    assert trace.lengths == lengths
    assert all(torch.equal(trace.kept[layer], rows) for layer, rows in kept.items())


@torch.no_grad()
def test_candidates_in_mask_mode_are_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = inputs_of(processor, "What colour is the cat? What colour is the dog? What colour")
    options = {"max_new_tokens": 12, "suppress_tokens": [processor.image_token_id]}
    with vp.prune(model, METHODS["mask"]), pytest.raises(vp.InputError, match="assisted"):
        model.generate(**inputs, **options, prompt_lookup_num_tokens=5)


@pytest.mark.parametrize("name", ["fastv", "front", "pdrop"])
def test_threads_do_not_mix(loaded: tuple[Any, Any], name: str) -> None:
    model, processor = loaded
    asked = [inputs_of(processor, "What is this?" + " Why?" * seed, seed) for seed in range(6)]

    def answer(inputs: dict[str, Any]) -> list[int]:
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return out[0].tolist()

    with vp.prune(model, METHODS[name]):
        alone = [answer(inputs) for inputs in asked]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(answer, asked)) == alone


@pytest.mark.parametrize(
    "method",
    [
        vp.HiMAP(1, 5, 3, 2),
        METHODS["fastv"],
        vp.VTW(layer=1),
        vp.DART(layer=1, max_num_trunction=4, pivot_image_token=2, pivot_text_token=2),
        vp.SparseVLM(stages=((1, 5),)),
        vp.RandomDrop(keep=1),
    ],
    ids=lambda method: method.name,
)
@torch.no_grad()
def test_prompt_that_ends_in_its_image(method: Any) -> None:
    """Its last token predicts the answer: it stays, and stands for the text that asks."""
    model = make("sdpa")
    kept = []
    for seed in range(3):
        torch.manual_seed(seed)
        with vp.prune(model, method, visual_span=(5, 20)) as trace:
            model(inputs_embeds=torch.randn(1, 25, 32))
        layer = min(trace.kept)
        assert trace.kept[layer][0, -1] == 24
        kept.append(trace.kept[layer][0].tolist())
    looks = method.name in ("himap", "fastv", "dart", "sparsevlm")
    assert (kept[0] != kept[1] or kept[1] != kept[2]) == looks
