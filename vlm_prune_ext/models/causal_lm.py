"""Bare causal decoders: LLaMA, Mistral and models built like them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import rotary
from vlm_prune_ext.models.base import Family


def find_decoder(model: Any) -> Any:
    """The module that runs the decoder layers, or ``None``."""
    for candidate in (model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and _is_decoder(candidate):
            return candidate
    return None


def _is_decoder(module: Any) -> bool:
    layers = getattr(module, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    attn = getattr(layers[0], "self_attn", None)
    projects = hasattr(attn, "q_proj") and hasattr(attn, "k_proj") and hasattr(attn, "head_dim")
    return projects and isinstance(getattr(module, "norm", None), nn.Module)


def decoder_parts(model: nn.Module, decoder: Any, **more: Any) -> ModelParts:
    """Parts of a model around a LLaMA-like decoder; ``more`` are fields of the result."""
    return ModelParts(
        model=model,
        decoder=decoder,
        layers=decoder.layers,
        final_norm=decoder.norm,
        queries=rotary.queries,
        keys=rotary.keys,
        **more,
    )


def _owns(model: Any) -> bool:
    return find_decoder(model) is not None


def _parts(model: Any) -> ModelParts:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder model: nothing to prune.")
    return decoder_parts(model, find_decoder(model))


FAMILY = Family(name="causal_lm", title="bare causal language model", owns=_owns, parts=_parts)
