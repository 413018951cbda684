"""Every field of transformers' GenerationConfig on the fast path: honoured, or handed over."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import vlm_prune_ext as vp
from tests import makers
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.models import parts_of

# A value that asks for something else than what is done where the field is not set.
VALUES: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[5], [463]],
    "begin_suppress_tokens": [463],
    "bos_token_id": 7,
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "compile_config": None,
    "constraints": [],
    "continuous_batching_config": None,
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "do_sample": True,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 3.0,
    "eos_token_id": [463, 421, 44],
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "exponential_decay_length_penalty": (2, 9.0),
    "force_words_ids": [[[5]]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 0,
    "guidance_scale": 0.0,
    "is_assistant": True,
    "length_penalty": 2.0,
    "low_memory": True,
    "max_cache_len": 90,
    "max_length": 42,
    "max_matching_ngram_size": 2,
    "max_new_tokens": 3,
    "max_time": 0.0,
    "min_length": 60,
    "min_new_tokens": 5,
    "min_p": 0.1,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 9,
    "penalty_alpha": 0.5,
    "prefill_chunk_size": 8,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 5.0,
    "return_dict_in_generate": True,
    "sequence_bias": {(5,): 99.0},
    "speculation_type": None,
    "stop_strings": ["a"],
    "suppress_tokens": [463],
    "target_lookbehind": 3,
    "temperature": 0.5,
    "token_healing": True,
    "top_h": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "transformers_version": "4.0.0",
    "typical_p": 0.5,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"greenlist_ratio": 0.3},
}
METHOD = vp.FastV(agg_layer=2, attention_rank=4)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fields") / "llava"
    makers.tiny_hf_llava(folder, kv_heads=2)
    model, processor = vp.load(str(folder), dtype="float32", fast=False)
    texts = ["What colour is the cat?", "Describe this image please."]
    inputs = dict(processor.batch(texts, [[makers.photo(80, 60, 1)], [makers.photo(50, 70, 2)]]))
    return model, inputs


def outcome(function: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """Ids, or the kind of error."""
    torch.manual_seed(0)
    try:
        output = function(**inputs, **options)
    except Exception as error:
        return type(error)
    return (output if isinstance(output, torch.Tensor) else output.sequences).tolist()


@contextlib.contextmanager
def config_with(model: Any, **fields: Any) -> Any:
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = before


def test_the_table_has_every_field_and_the_fast_path_is_taken_without_any(
    asked: tuple[Any, dict[str, Any]],
) -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields == set(VALUES)
    model, inputs = asked
    with vp.prune(model, METHOD) as trace:
        FastGenerate(model, parts_of(model), capture=False)(**inputs, max_new_tokens=2)
    assert trace.backend == "graphs"


@pytest.mark.parametrize("name", sorted(VALUES))
def test_fields_of_the_configuration_and_of_the_call(
    asked: tuple[Any, dict[str, Any]], name: str
) -> None:
    model, inputs = asked
    usual = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    rest = {key: value for key, value in usual.items() if key != name}
    fast = FastGenerate(model, parts_of(model), capture=False)
    theirs = type(model).generate.__get__(model)
    with vp.prune(model, METHOD):
        with config_with(model, **rest):
            options = {name: VALUES[name]}
            assert outcome(fast, inputs, options) == outcome(theirs, inputs, options)
        with config_with(model, **rest, **{name: VALUES[name]}):
            assert outcome(fast, inputs, {}) == outcome(theirs, inputs, {})


def test_holes_in_a_prompt(asked: tuple[Any, dict[str, Any]]) -> None:
    """Zeros of attention_mask inside an image or a text, not in front of the prompt."""
    model, inputs = asked
    fast = FastGenerate(model, parts_of(model), capture=False)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    for places in (image[3:6], image[-1:] + 2, image[:1] - 1):
        mask = inputs["attention_mask"].clone()
        mask[0, places] = 0
        holed, options = (
            {**inputs, "attention_mask": mask},
            {"max_new_tokens": 6, "pad_token_id": 0},
        )
        with vp.prune(model, METHOD) as trace:
            one = outcome(fast, holed, options)
            kept = trace.kept[2].tolist()
            other = outcome(type(model).generate.__get__(model), holed, options)
        assert one == other and kept == trace.kept[2].tolist()


def test_a_prompt_in_chunks_is_refused(asked: tuple[Any, dict[str, Any]]) -> None:
    """A rule would see the first chunk alone."""
    model, inputs = asked
    with vp.prune(model, METHOD), pytest.raises(InputError, match="whole prompt at once"):
        model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=8)


@pytest.mark.parametrize("method", [METHOD, vp.RandomDrop(keep=4)], ids=["fastv", "random-0"])
def test_guessed_tokens_do_not_choose(asked: tuple[Any, dict[str, Any]], method: Any) -> None:
    """Assisted and prompt-lookup decoding feed guesses too: the rule sees the prompt."""
    model, inputs = asked
    one = {name: value[1:] for name, value in inputs.items()}
    usual = {"max_new_tokens": 12, "suppress_tokens": [model.config.image_token_id]}
    theirs = type(model).generate.__get__(model)
    for guess in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}):
        alone = theirs(**one, **usual, **guess)
        assert torch.equal(alone, theirs(**one, **usual))
        with vp.prune(model, method):
            expected = theirs(**one, **usual)
            assert torch.equal(theirs(**one, **usual, **guess), expected)
            assert torch.equal(theirs(**one, **usual), expected)
