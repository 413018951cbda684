"""What decoding went wrong over: caches used again, windows, conversations and threads."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.cache_utils import QuantizedLayer

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


@pytest.mark.parametrize("name", [*ASSISTED, "mask"])
@torch.no_grad()
def test_asking_for_several_logits_changes_nothing(loaded: tuple[Any, Any], name: str) -> None:
    """Assisted decoding does so too, for tokens that are guesses; here all are the prompt's."""
    model, processor = loaded
    inputs = inputs_of(processor, "What colour is the cat? What colour is the dog?")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with vp.prune(model, {**ASSISTED, **METHODS}[name]) as trace:
        want = model(**inputs).logits
        kept = {k: v.clone() for k, v in trace.kept.items()}
        got = model(**inputs, past_key_values=DynamicCache(), logits_to_keep=5).logits
        torch.testing.assert_close(got, want[:, -5:], atol=1e-5, rtol=1e-4)
        assert all(torch.equal(trace.kept[layer], rows) for layer, rows in kept.items())
        said = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, logits_to_keep=3), said)


@torch.no_grad()
def test_candidates_in_mask_mode_are_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = inputs_of(processor, "What colour is the cat? What colour is the dog? What colour")
    options = {"max_new_tokens": 12, "suppress_tokens": [processor.image_token_id]}
    with vp.prune(model, METHODS["mask"]), pytest.raises(vp.InputError, match="assisted"):
        model.generate(**inputs, **options, prompt_lookup_num_tokens=5)


def step(model: Any, cache: Any, places: list[int], token: int = 30) -> torch.Tensor:
    """Logits of one more token behind conversations of these lengths."""
    rows, width = len(places), max(places) + 1
    mask = torch.ones(rows, width, dtype=torch.int64)
    for row, place in enumerate(places):
        mask[row, : width - 1 - place] = 0
    return model(
        input_ids=torch.full((rows, 1), token),
        attention_mask=mask,
        position_ids=torch.tensor(places)[:, None],
        past_key_values=cache,
    ).logits


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_copied_cache_goes_on_as_the_first(loaded: tuple[Any, Any], name: str) -> None:
    """The prompt is read once, and each question about it gets a copy of its cache."""
    model, processor = loaded
    inputs = inputs_of(processor, "What is this?")
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[30, 31, 32]])], dim=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options["suppress_tokens"] = [processor.image_token_id]
    with vp.prune(model, METHODS[name]):
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        said = [
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one, **options
            ).tolist()
            for one in (*copies, cache)
        ]
        assert said[0] == said[1] == said[2]
        with pytest.raises(vp.InputError, match="cannot be saved"):
            pickle.dumps(cache)
        with pytest.raises(vp.InputError, match="deepcopy"):
            copy.copy(cache)
        left = copy.deepcopy(cache)
    assert type(cache) is DynamicCache and type(left) is DynamicCache
    if name != "mask":
        with pytest.raises(vp.InputError, match="was filled while pruning"):
            step(model, left, [length])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("absolute", [True, False])
@torch.no_grad()
def test_a_cropped_cache_forgets_what_was_cropped(
    loaded: tuple[Any, Any], name: str, absolute: bool
) -> None:
    model, processor = loaded
    inputs = inputs_of(processor, "What is this?")
    length = inputs["input_ids"].shape[1]
    with vp.prune(model, METHODS[name]):
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        want = step(model, cache, [length])
        step(model, cache, [length + 1], token=31)
        cache.crop(length if absolute else -2)
        torch.testing.assert_close(step(model, cache, [length]), want)
        with pytest.raises(vp.InputError, match="cannot be taken out"):
            cache.crop(length - 1 if absolute else -2)
        with pytest.raises(vp.InputError, match="attention_mask has"):
            step(model, cache, [length - 1])


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_rows_of_a_cache_move_with_their_prompts_or_not_at_all(
    loaded: tuple[Any, Any], name: str
) -> None:
    model, processor = loaded
    one = inputs_of(processor, "What is this?")
    length = one["input_ids"].shape[1]
    two = dict(
        processor.batch(["What is this?", "Why?"], [[makers.photo(80, 60, 1)], [makers.photo()]])
    )
    with vp.prune(model, METHODS[name]):
        cache = DynamicCache(config=model.config.text_config)
        model(**two, past_key_values=cache)
        for move in ("reorder_cache", "batch_select_indices"):
            with pytest.raises(vp.InputError, match="Rows of a cache"):
                getattr(cache, move)(torch.tensor([1, 0]))
        with pytest.raises(vp.InputError, match="Rows of a cache"):
            cache.batch_repeat_interleave(2)
        cache = DynamicCache(config=model.config.text_config)
        model(**one, past_key_values=cache)
        want = step(model, copy.deepcopy(cache), [length])
        cache.reorder_cache(torch.tensor([0]))
        if name == "mask":
            return
        cache.batch_repeat_interleave(3)
        torch.testing.assert_close(
            step(model, cache, [length] * 3), want.expand(3, -1, -1), atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_a_cache_made_anew_from_tensors_is_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = inputs_of(processor, "What is this?")
    with vp.prune(model, METHODS["pdrop"]):
        filled = model(**inputs, use_cache=True).past_key_values
        made = DynamicCache(tuple((layer.keys, layer.values) for layer in filled.layers))
        with pytest.raises(vp.InputError, match="made anew from its tensors"):
            step(model, made, [inputs["input_ids"].shape[1]])


class Quantised(QuantizedLayer):
    """transformers' layer of quantised keys, whose ``keys`` do not hold the prompt's; the numbers
    stay as they are, so that answers can be compared."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("name", ASSISTED)
@torch.no_grad()
def test_quantised_caches_answer_alike(loaded: tuple[Any, Any], name: str) -> None:
    model, processor = loaded
    inputs = inputs_of(processor, "What colour is the cat?")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = DynamicCache(config=model.config.text_config)
    cache.layers = [Quantised(residual_length=5) for _ in cache.layers]
    with vp.prune(model, ASSISTED[name]):
        want = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), want)


def test_a_model_is_not_copied_with_its_hooks(loaded: tuple[Any, Any]) -> None:
    with vp.prune(loaded[0], METHODS["fastv"]), pytest.raises(vp.InputError, match="copied"):
        copy.deepcopy(loaded[0])
    assert not copy.deepcopy(loaded[0])._forward_pre_hooks


@torch.no_grad()
def test_compiled_models_are_refused(loaded: tuple[Any, Any]) -> None:
    """Graphs know nothing of hooks: they would answer unpruned."""
    model, processor = loaded
    inputs = inputs_of(processor, "What is this?")
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(vp.InputError, match=r"torch\.compile"),
        vp.prune(compiled, METHODS["fastv"]),
    ):
        pass
    with vp.prune(model, METHODS["fastv"]), pytest.raises(vp.InputError, match=r"torch\.compile"):
        compiled(**inputs)
    for part in (model.model.language_model, model.model.language_model.layers[1]):
        part.forward = torch.compile(part.forward, backend="eager")
        with (
            pytest.raises(vp.InputError, match=r"torch\.compile"),
            vp.prune(model, METHODS["pdrop"]),
        ):
            pass
        del part.forward
    whole = model.model.language_model
    model.model.language_model = torch.compile(whole, backend="eager")
    with pytest.raises(vp.InputError, match=r"torch\.compile"), vp.prune(model, METHODS["fastv"]):
        pass
    model.model.language_model = whole
    mlp = model.model.language_model.layers[1].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")  # no hook is on it
    with vp.prune(model, METHODS["fastv"]) as trace:
        model(**inputs)
    assert trace.visual_tokens[2] == [4]
    del mlp.forward


@torch.no_grad()
def test_embeddings_alone_are_said_to_be_unpruned(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    monkeypatch.setattr("vlm_prune_ext.methods.base._SAID", set())
    with vp.prune(model, METHODS["fastv"]) as trace:
        model(inputs_embeds=torch.randn(1, 30, model.config.text_config.hidden_size))
    assert not trace.kept and "visual_span" in caplog.text


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


def test_images_that_overlap_are_refused(loaded: tuple[Any, Any]) -> None:
    """One token would be chosen for two images."""
    model, processor = loaded
    inputs = inputs_of(processor, "What is this?")
    for spans in ([(5, 8), (8, 4)], [(12, 4), (5, 8)], [(5, 8), (5, 8)]):
        with (
            vp.prune(model, METHODS["fastv"], visual_span=[spans]),
            pytest.raises(vp.InputError, match="overlap"),
        ):
            model(**inputs)


@pytest.mark.parametrize("ids", [torch.ones(1, 3), torch.full((1, 3), -200)])
def test_what_are_no_ids_is_not_decoded(loaded: tuple[Any, Any], ids: torch.Tensor) -> None:
    with pytest.raises(vp.InputError, match="token ids are whole numbers"):
        loaded[1].decode(ids, {})
