"""Analytic FLOPs of everything that happens until the first new token, for every family.

The conventions are those of :mod:`vlm_prune_ext.flops`: two per multiply-add, matrix products
only, attention in full. Sizes come from a model's config, counts (images, tiles, patches, tokens)
from the shapes of its inputs; no weight is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vlm_prune_ext.flops import DecoderShape, VisionShape, decoder_flops, vision_flops


@dataclass(frozen=True)
class PrefillFlops:
    """FLOPs of a batch until its first new tokens.

    Attributes:
        vision: tower, Q-Former and projector.
        language: the language model, its output head for one position a sample.
    """

    vision: float
    language: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.vision + self.language


def prefill_flops(
    config: Any,
    inputs: Mapping[str, Any],
    lengths: Sequence[int] = (),
    patches_kept: Mapping[int, int] | None = None,
) -> PrefillFlops | None:
    """FLOPs of a batch's prefill.

    Args:
        config: of the whole model.
        inputs: what ``generate`` gets; only shapes (and grids of patches) are read.
        lengths: tokens, padding included, that enter each decoder layer; empty: the whole prompt
            enters all.
        patches_kept: tower layer -> patches of each image left by the drop in it.

    Returns:
        ``None`` for a model whose sizes are not known here.
    """
    sight = _SIGHT.get(str(getattr(config, "model_type", "")))
    if sight is None:
        return None
    batch, width = inputs["input_ids"].shape
    vision = sight(config, inputs, dict(patches_kept or {}))
    if getattr(config, "is_encoder_decoder", False) or _is_t5(config):
        return PrefillFlops(vision, batch * _t5(config.text_config, width))
    shape = DecoderShape.from_config(config)
    own = list(lengths) or [width] * shape.layers
    return PrefillFlops(vision, batch * decoder_flops(shape, own))


# -- building blocks -----------------------------------------------------------------------------
def _linear(*widths: int) -> float:
    """A chain of linear layers, per row."""
    return sum(2.0 * a * b for a, b in pairwise(widths))


def _encoder_layer(hidden: int, intermediate: int, length: int, matrices: int = 2) -> float:
    """A layer of self-attention and MLP over ``length`` rows."""
    weights = 4 * _linear(hidden, hidden) + matrices * _linear(hidden, intermediate)
    return weights * length + 4.0 * hidden * length**2


def _side(value: Any) -> int:
    return int(value[0]) if isinstance(value, list | tuple) else int(value)


def _count(inputs: Mapping[str, Any]) -> int:
    """Pictures (or tiles) that go through the tower."""
    pixels = inputs.get("pixel_values")
    return math.prod(pixels.shape[:-3]) if pixels is not None else 0


# -- towers --------------------------------------------------------------------------------------
def _clip(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    return vision_flops(VisionShape.from_config(config), kept) * _count(inputs)


def _clip_tiles(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """LLaVA-NeXT: pictures with fewer tiles than others of the batch are padded, and the padding
    is left out in front of the tower."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if inputs.get("image_sizes") is None:
        return 0.0
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    sizes = [size.tolist() for size in inputs["image_sizes"]]
    tiles = sum(image_size_to_num_patches(size, pinpoints, side) for size in sizes)
    return vision_flops(VisionShape.from_config(config), kept) * tiles


def _qwen(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Qwen2.5-VL: most layers look through windows; a gated MLP; four patches make one token."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return 0.0
    vision = config.vision_config
    hidden, merge = vision.hidden_size, vision.spatial_merge_size
    inner = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    per_patch = _linear(inner, hidden)
    per_patch += vision.depth * 4 * _linear(hidden, hidden)
    per_patch += vision.depth * 3 * _linear(hidden, vision.intermediate_size)
    whole = len(vision.fullatt_block_indexes)
    window = vision.window_size // merge // vision.patch_size
    total = 0.0
    for frames, down, across in grids.tolist():
        patches = down * across
        spans = [a * b for a in _cut(down // merge, window) for b in _cut(across // merge, window)]
        squares = sum((span * merge**2) ** 2 for span in spans)
        attention = whole * patches**2 + (vision.depth - whole) * squares
        merged = _linear(hidden * merge**2, hidden * merge**2, vision.out_hidden_size)
        one = per_patch * patches + 4.0 * hidden * attention + merged * patches / merge**2
        total += frames * one
    return total


def _cut(length: int, size: int) -> list[int]:
    """``length`` in pieces of ``size``, the last one shorter."""
    return [min(size, length - start) for start in range(0, length, size)]


def _siglip(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Gemma 3: SigLIP without a class token, patches pooled, then one matrix."""
    vision = config.vision_config
    patches = (_side(vision.image_size) // _side(vision.patch_size)) ** 2
    one = _linear(vision.num_channels * _side(vision.patch_size) ** 2, vision.hidden_size) * patches
    one += vision.num_hidden_layers * _encoder_layer(
        vision.hidden_size, vision.intermediate_size, patches
    )
    if getattr(vision, "vision_use_head", True):  # runs, though its output is not used
        width = vision.hidden_size
        one += _cross_attention(width, width, 1, width, patches)
        one += 2 * _linear(width, vision.intermediate_size)
    one += _linear(vision.hidden_size, config.text_config.hidden_size) * config.mm_tokens_per_image
    return one * _count(inputs)


def _intern(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """InternVL: patches of a square become one token in front of a two-layer projector."""
    vision, text = config.vision_config, config.text_config.hidden_size
    hidden, fold = vision.hidden_size, int(1 / config.downsample_ratio) ** 2
    patches = (_side(vision.image_size) // _side(vision.patch_size)) ** 2
    one = _linear(vision.num_channels * _side(vision.patch_size) ** 2, hidden) * patches
    one += vision.num_hidden_layers * _encoder_layer(hidden, vision.intermediate_size, patches + 1)
    one += _linear(hidden * fold, text, text) * (patches // fold)
    return one * _count(inputs)


def _qformer(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """BLIP-2 and InstructBLIP: a tower, then a Q-Former whose queries look at its output."""
    vision, former = config.vision_config, config.qformer_config
    side, patch = _side(vision.image_size), _side(vision.patch_size)
    patches = (side // patch) ** 2
    one = _linear(3 * patch**2, vision.hidden_size) * patches
    one += vision.num_hidden_layers * _encoder_layer(
        vision.hidden_size, vision.intermediate_size, patches + 1
    )
    read = inputs.get("qformer_input_ids")
    rows = config.num_query_tokens + (read.shape[1] if read is not None else 0)
    one += former.num_hidden_layers * _encoder_layer(
        former.hidden_size, former.intermediate_size, rows
    )
    looking = -(-former.num_hidden_layers // former.cross_attention_frequency)
    one += looking * _cross_attention(
        former.hidden_size,
        former.hidden_size,
        config.num_query_tokens,
        former.encoder_hidden_size,
        patches + 1,
    )
    one += _linear(former.hidden_size, config.text_config.hidden_size) * config.num_query_tokens
    return one * _count(inputs)


def _cross_attention(width: int, inner: int, queries: int, source_width: int, keys: int) -> float:
    return (
        (_linear(width, inner) + _linear(inner, width)) * queries
        + 2 * _linear(source_width, inner) * keys
        + 4.0 * inner * queries * keys
    )


def _patches(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Fuyu: one matrix from pixels to tokens."""
    patches = inputs.get("image_patches")
    if patches is None:
        return 0.0
    values = config.num_channels * config.patch_size**2
    return _linear(values, config.text_config.hidden_size) * math.prod(patches.shape[:-1])


_SIGHT: Mapping[str, Callable[[Any, Mapping[str, Any], dict[int, int]], float]] = {
    "llava": _clip,
    "llava_next": _clip_tiles,
    "qwen2_5_vl": _qwen,
    "gemma3": _siglip,
    "internvl": _intern,
    "blip-2": _qformer,
    "instructblip": _qformer,
    "fuyu": _patches,
}


# -- encoder-decoder -----------------------------------------------------------------------------
def _is_t5(config: Any) -> bool:
    return getattr(getattr(config, "text_config", None), "model_type", "") == "t5"


def _t5(config: Any, width: int) -> float:
    """T5: the encoder over ``width`` positions, the decoder over its start token."""
    model, inner, inside = config.d_model, config.num_heads * config.d_kv, config.d_ff
    matrices = 3 if config.is_gated_act else 2
    attention = 4 * _linear(model, inner)
    mlp = matrices * _linear(model, inside)
    encoder = config.num_layers * ((attention + mlp) * width + 4.0 * inner * width**2)
    decoder = config.num_decoder_layers * (
        attention + mlp + 4.0 * inner + _cross_attention(model, inner, 1, model, width)
    )
    return encoder + decoder + _linear(model, config.vocab_size)
