"""What can run on fixed shapes: models, methods, and calls of ``generate``.

Each answer is a reason in words that fit behind "fast=True is not possible", or ``None``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from transformers import GenerationConfig

from vlm_prune_ext.engine import masks
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.fast.segments import axes
from vlm_prune_ext.methods.base import Method

# Decoders whose forward does nothing around its layers but embedding, rotary positions, the last
# norm and DeepStack: what else one did (Granite scales its embeddings) would be passed over.
KNOWN = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen3Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
    "Glm4vTextModel",
)
# Arguments of greedy decoding, and those that do not matter to it.
INPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "pixel_attention_mask",
        "image_sizes",
        "image_grid_thw",
        "batch_num_images",
        "mm_token_type_ids",
    }
)
_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "use_cache": (True, None),
    "return_dict_in_generate": (False, None),
}
_FREE = frozenset({"temperature", "top_p", "top_k", "max_new_tokens", "pad_token_id"})
_OWN = frozenset({"eos_token_id", "logits_processor", "stopping_criteria"})
# Fields of a model's generation_config that greedy decoding does not read, or that are read here.
_HARMLESS = _FREE | {"bos_token_id", "eos_token_id", "max_length", "transformers_version"}
_HARMLESS |= {"suppress_tokens"}


def why_not(parts: ModelParts, method: Method | None) -> str | None:
    """Why a model with a method cannot run on fixed shapes; ``None`` if it can."""
    decoder: Any = parts.decoder
    if decoder is None:
        return "the model has no language model whose layers are known"
    name = type(decoder).__name__
    if name not in KNOWN or not type(decoder).__module__.startswith("transformers.models."):
        return f"{name} is not one of {', '.join(KNOWN)}"
    config = getattr(decoder, "config", None)
    rotary = parts.plain_rotary or (hasattr(decoder, "rotary_emb") and bool(axes(config)))
    if not rotary or parts.counts_real or not hasattr(decoder, "rotary_emb"):
        return f"{name} does not have one rotary position per token"
    if any(masks.sliding_windows(config, len(parts.layers))):
        return f"{name} has sliding windows"
    if getattr(decoder.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        return f"{name}'s rotary embedding depends on the length"
    if len({parameter.device for parameter in decoder.parameters()}) > 1:
        return "the model is spread over several devices"
    if getattr(parts.model, "hf_quantizer", None) is not None:
        return "the weights are quantised"
    return why_not_now(parts, method)


def why_not_now(parts: ModelParts, method: Method | None) -> str | None:
    """The part of :func:`why_not` that may change while a model lives."""
    attention = getattr(getattr(parts.decoder, "config", None), "_attn_implementation", None)
    if attention != "sdpa":
        return f"attn_implementation={attention!r} (sdpa is needed)"
    return None if method is None else _why_not_method(method, len(parts.layers))


def _why_not_method(method: Method, layers: int) -> str | None:
    for stage in method.decoder_stages(layers):
        if stage.mode == "mask":
            return f"{method.name} with mode='mask' drops nothing"
        if stage.layer == layers:
            return f"{method.name} drops behind the last layer"
    if any(method.decode_position_shift(layer) for layer in range(layers)):
        return f"{method.name} with reference_positions=True shifts decode positions"
    return None


def why_not_options(model: Any, kwargs: Mapping[str, Any]) -> str | None:
    """What of the call asks for more than greedy decoding from a plain prompt."""
    for name, value in kwargs.items():
        if name in _GREEDY:
            if value not in _GREEDY[name]:
                return f"generate was asked for {name}={value!r}"
        elif name not in INPUTS | _FREE | _OWN and value is not None:
            return f"generate was given {name}"
    if not INPUTS & set(kwargs) <= _accepted(type(model).forward):
        return "generate was given inputs that the model does not take"
    reason = _why_not_config(vars(model.generation_config), kwargs)
    if reason is not None:
        return reason
    if token_limit(model, kwargs) < 1:
        return "max_new_tokens is not stated"
    return None


def _why_not_config(config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str | None:
    """What a model's generation_config asks for beyond greedy decoding, where the call does not say
    otherwise."""
    usual = _usual_config()
    for name, value in sorted(config.items()):
        if name.startswith("_") or value is None:
            continue
        if name in _GREEDY:
            if name not in kwargs and value not in _GREEDY[name]:
                return f"the model's generation_config has {name}={value!r}"
        elif name not in _HARMLESS and value is not False and value != usual.get(name):
            return f"the model's generation_config sets {name}"
    return None


@lru_cache
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of a model's inputs."""
    return frozenset(inspect.signature(forward).parameters)


@lru_cache
def _usual_config() -> dict[str, Any]:
    """What transformers takes where a field is not set."""
    return GenerationConfig._get_default_generation_params()


def token_limit(model: Any, kwargs: Mapping[str, Any]) -> int:
    """``max_new_tokens`` of a call or of the model's generation_config; 0: not stated."""
    limit = kwargs.get("max_new_tokens")
    return int(limit if limit is not None else model.generation_config.max_new_tokens or 0)
