"""FLOPs: by formula, before or without a run, and as torch counts them while a model runs.

Conventions of both. A multiply-add counts as two. Matrix products only: norms, rotary embedding,
softmax and activations are below one percent of them. Causal attention counts in full (all
``S x S`` products), as ``torch.utils.flop_counter`` does and as kernels without causal skipping
compute; kernels that skip the upper triangle do about half of that part. The output head counts
for one position, which is all that ``generate`` asks of a prefill. A rule's own arithmetic is in
what is counted, not in the formulas: counted over analytic states its share.

The formulas are pure; lengths come from ``Trace.lengths`` of a run, or from
:func:`planned_lengths` before one. Sizes come from a model's config, counts (images, tiles,
patches, tokens) from the shapes of its inputs; no weight is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Budget, Method, Stage, resolve_budget
from vlm_prune_ext.methods.evidence import FeatureStage

MLP_WIDTH = "intermediate_size"
PLAIN = ("opt", "persimmon")
"""Model types with an MLP of two matrices and as many key/value heads as query heads."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a causal decoder (LLaMA's and its kin: SwiGLU, grouped key/value heads).

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocab: as usually named.
        mlp_matrices: 3 with a gate (SwiGLU, GeGLU), 2 without (OPT, Persimmon).
        own: by layer, where they differ (Gemma 4, Qwen3.5): multiply-adds of a token, and the width
            of its queries, 0 where none attends; empty: as the sizes say.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3
    own: tuple[tuple[float, int], ...] = ()

    @staticmethod
    def from_config(config: Any) -> DecoderShape:
        """Read off a transformers language-model config (or one that has a ``text_config``).

        Raises:
            InputError: a size is missing.
        """
        config = (
            getattr(config, "text_config", None) or getattr(config, "llm_config", None) or config
        )
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        kind = str(getattr(config, "model_type", ""))
        plain, first = kind in PLAIN, _layer_config(config, 0)
        return DecoderShape(
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=heads if plain else getattr(first, "num_key_value_heads", None) or heads,
            head_dim=getattr(first, "head_dim", None) or hidden // heads,
            intermediate=_size(config, "ffn_dim" if hasattr(config, "ffn_dim") else MLP_WIDTH),
            vocab=_size(config, "vocab_size"),
            mlp_matrices=2 if plain else 3,
            own=_LAYERS[kind](config) if kind in _LAYERS else (),
        )

    def layer_flops(self, length: int, layer: int = 0) -> float:
        """Decoder layer ``layer`` over ``length`` tokens."""
        if self.own:
            weights, queries = self.own[layer]
            return 2.0 * weights * length + 4.0 * queries * length**2
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.hidden * queries + 2 * self.hidden * keys
        weights += self.mlp_matrices * self.hidden * self.intermediate
        return 2.0 * weights * length + 4.0 * queries * length**2

    def stack_flops(self, lengths: Sequence[int]) -> float:
        """The first layers, over so many tokens each."""
        return sum(self.layer_flops(length, layer) for layer, length in enumerate(lengths))

    def head_flops(self, positions: int = 1) -> float:
        """The output head over ``positions`` tokens."""
        return 2.0 * self.hidden * self.vocab * positions


def _layer_config(config: Any, layer: int) -> Any:
    """A config as one layer sees it, where sizes differ by layer (Gemma 4)."""
    try:
        config.num_key_value_heads  # noqa: B018 - transformers refuses to answer for all layers
    except RuntimeError:
        return config.per_layer_config[layer]
    except AttributeError:
        pass
    return config


def _qwen3_5_layers(config: Any) -> tuple[tuple[float, int], ...]:
    """Qwen3.5: queries come with a gate; three of four layers are gated delta networks, whose state
    is read, corrected and read again by each token (3 products of key by value, a head)."""
    hidden, mlp = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    full = 3 * hidden * queries + 2 * hidden * config.num_key_value_heads * config.head_dim
    heads = config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    linear = hidden * (2 * keys + 3 * values + 2 * heads)
    linear += config.linear_conv_kernel_dim * (2 * keys + values)
    linear += 3 * heads * config.linear_key_head_dim * config.linear_value_head_dim
    return tuple(
        (full + mlp, queries) if kind == "full_attention" else (linear + mlp, 0)
        for kind in config.layer_types
    )


def _gemma4_layers(config: Any) -> tuple[tuple[float, int], ...]:
    """Gemma 4: heads of another width in layers without a window, whose keys may be their values;
    beside the MLP a few of many experts, where there are any.

    Raises:
        InputError: a small one, with inputs of each layer's own.
    """
    if config.hidden_size_per_layer_input:
        raise InputError(
            f"FLOPs of {type(config).__name__} with hidden_size_per_layer_input="
            f"{config.hidden_size_per_layer_input} are not stated."
        )
    hidden = config.hidden_size
    mlp = 3 * hidden * config.intermediate_size
    if config.enable_moe_block:
        mlp += hidden * config.num_experts
        mlp += config.top_k_experts * 3 * hidden * config.moe_intermediate_size
    found = []
    for layer, kind in enumerate(config.layer_types):
        own = _layer_config(config, layer)
        queries = config.num_attention_heads * own.head_dim
        shared = config.attention_k_eq_v and kind == "full_attention"
        keys = own.num_key_value_heads * own.head_dim * (1 if shared else 2)
        found.append((2.0 * hidden * queries + hidden * keys + mlp, queries))
    return tuple(found)


_LAYERS: Mapping[str, Callable[[Any], tuple[tuple[float, int], ...]]] = {
    "qwen3_5_text": _qwen3_5_layers,
    "gemma4_text": _gemma4_layers,
}


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a CLIP-like tower and of the projector behind it.

    Attributes:
        layers, hidden, heads, intermediate: of the tower.
        patches: per image, CLS not counted.
        patch_inputs: numbers in one patch, ``channels * patch_size ** 2``.
        projector: widths along the projector, e.g. ``(1024, 4096, 4096)``; empty: none.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    patches: int
    patch_inputs: int
    projector: tuple[int, ...] = ()

    @staticmethod
    def from_config(config: Any, text_hidden: int | None = None) -> VisionShape:
        """Read off a CLIP vision config (or a VLM's config, for its ``vision_config``).

        Args:
            config: the config.
            text_hidden: width of the language model, for LLaVA's two-layer projector; ``None``
                takes it from a VLM's ``text_config`` or leaves the projector out.

        Raises:
            InputError: a size is missing.
        """
        text = getattr(config, "text_config", None)
        if text_hidden is None and text is not None:
            text_hidden = _size(text, "hidden_size")
        config = getattr(config, "vision_config", None) or config
        hidden, patch = _size(config, "hidden_size"), _size(config, "patch_size")
        return VisionShape(
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            heads=_size(config, "num_attention_heads"),
            intermediate=_size(config, "intermediate_size"),
            patches=(_size(config, "image_size") // patch) ** 2,
            patch_inputs=getattr(config, "num_channels", 3) * patch**2,
            projector=(hidden, text_hidden, text_hidden) if text_hidden else (),
        )


def decoder_flops(shape: DecoderShape, lengths: Sequence[int], *, head_positions: int = 1) -> float:
    """FLOPs of one prompt's prefill.

    Args:
        shape: sizes of the decoder.
        lengths: tokens that enter each layer, one number per layer.
        head_positions: positions the output head is computed for.

    Raises:
        InputError: not one length per layer.
    """
    if len(lengths) != shape.layers:
        raise InputError(
            f"lengths={list(lengths)!r} is not valid: one length for each of {shape.layers} layers."
        )
    return shape.stack_flops(lengths) + shape.head_flops(head_positions)


def vision_flops(
    shape: VisionShape, patches_after: Mapping[int, int] | None = None, images: int = 1
) -> float:
    """FLOPs of the tower and the projector for ``images`` images.

    Args:
        shape: sizes.
        patches_after: tower layer -> patches left by the drop in it. The layers behind it are
            shorter; its own MLP is not (the engine drops when the layer is done, which leaves
            the same numbers behind); ``None``: no drop.
        images: how many.
    """
    drops = patches_after or {}
    patches = shape.patches
    total = _linear(shape.patch_inputs, shape.hidden) * patches
    for layer in range(shape.layers):
        total += _encoder_layer(shape.hidden, shape.intermediate, patches + 1)
        patches = drops.get(layer, patches)
    return (total + _linear(*shape.projector) * patches) * images


@dataclass(frozen=True)
class PromptFlops:
    """FLOPs of one prompt, pruned and not. Sums over prompts are prompts again (``+``).

    Attributes:
        prefill, prefill_baseline: of the language model with the method and without, text tokens
            and output head included.
        visual, visual_baseline: of its layers over the visual tokens alone.
        vision, vision_baseline: of tower and projector; 0 where what they take depends on the
            picture's own size.
    """

    prefill: float = 0.0
    prefill_baseline: float = 0.0
    visual: float = 0.0
    visual_baseline: float = 0.0
    vision: float = 0.0
    vision_baseline: float = 0.0

    def __add__(self, other: PromptFlops) -> PromptFlops:
        return PromptFlops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def ratio(self) -> float | None:
        """Of the language model's prefill, text included; ``None`` where nothing is known."""
        return self.prefill / self.prefill_baseline if self.prefill_baseline else None

    @property
    def ratio_visual(self) -> float | None:
        """As the pruning papers state it: visual tokens only, no text, no output head (FastV,
        arXiv 2403.06764, section 4.2, there with two MLP matrices; here with those the model has).
        ``None`` for prompts without an image."""
        return self.visual / self.visual_baseline if self.visual_baseline else None

    @property
    def ratio_with_vision(self) -> float | None:
        """Of tower, projector and prefill together; ``None`` where the tower's are not known."""
        if not self.vision_baseline:
            return None
        whole = self.prefill_baseline + self.vision_baseline
        return (self.prefill + self.vision) / whole


@dataclass(frozen=True)
class Sizes:
    """Sizes that FLOPs follow from; ``None`` for parts of another build, whose FLOPs are not
    stated.

    Attributes:
        decoder: of the language model.
        vision: of a CLIP tower.
        tile: FLOPs of another tower, and its projector, for one tile of a picture; ``None`` where
            they depend on the picture's own size (Qwen's towers, Pixtral), which counts of tiles
            do not tell: :func:`prefill_flops` does.
    """

    decoder: DecoderShape | None
    vision: VisionShape | None
    tile: float | None = None

    @staticmethod
    def of(config: Any) -> Sizes:
        """Read off a model's config."""
        tower = getattr(getattr(config, "vision_config", None), "model_type", None)
        vision = VisionShape.from_config(config) if tower == "clip_vision_model" else None
        per_tile = _TILE.get(str(getattr(config, "model_type", "")))
        tile = per_tile(config) if per_tile is not None else None
        try:
            return Sizes(DecoderShape.from_config(config), vision, tile)
        except InputError:  # an encoder-decoder model, or code of a checkpoint's own
            return Sizes(None, vision, tile)

    def prompt(
        self,
        tokens: int,
        visual: int,
        lengths: Sequence[int],
        tower_images: float = 0.0,
        patches_kept: Mapping[int, int] | None = None,
    ) -> PromptFlops:
        """FLOPs of one prompt.

        Args:
            tokens: of the prompt, before anything is dropped.
            visual: of these, visual tokens.
            lengths: tokens that enter each layer; empty: not known, nothing is stated.
            tower_images: images (or tiles) that go through the tower.
            patches_kept: tower layer -> patches of each image left by the drop in it.
        """
        found = PromptFlops()
        if self.decoder is not None and lengths:
            shape, layers, text = self.decoder, self.decoder.layers, tokens - visual
            found += PromptFlops(
                decoder_flops(shape, lengths),
                decoder_flops(shape, [tokens] * layers),
                shape.stack_flops([max(length - text, 0) for length in lengths]),
                shape.stack_flops([visual] * layers),
            )
        if self.vision is not None:
            own, whole = vision_flops(self.vision, patches_kept), vision_flops(self.vision)
            found += PromptFlops(vision=own * tower_images, vision_baseline=whole * tower_images)
        elif self.tile is not None:
            cost = self.tile * tower_images
            found += PromptFlops(vision=cost, vision_baseline=cost)
        return found


def planned_lengths(
    method: Method | None, num_layers: int, text: int, visual: Sequence[int]
) -> list[int]:
    """Tokens that will enter each layer, for methods whose counts do not depend on the data.

    Args:
        method: what prunes; ``None`` is the baseline.
        num_layers: decoder layers.
        text: text tokens of the prompt.
        visual: visual tokens of each image, as they come out of the projector (a method that works
            inside the vision tower is not asked); of a picture in crops, one entry for each.

    Raises:
        InputError: the method's counts depend on the data (SAINT in the language model).
    """
    between = None if method is None else method.feature_stage()
    if between is not None:
        visual = [_behind_tower(method, between, total) for total in visual]
    lengths, now = [text + sum(visual)] * num_layers, list(visual)
    for stage in method.decoder_stages(num_layers) if method is not None else ():
        if stage.mode == "drop":
            now = [_left(method, stage, *image) for image in zip(visual, now, strict=True)]
            lengths[stage.layer :] = [text + sum(now)] * (num_layers - stage.layer)
    return lengths


def _behind_tower(method: Method | None, stage: FeatureStage, total: int) -> int:
    if stage.left is not None:
        return stage.left(total)
    return _kept(method, stage.budget, total)


def _left(method: Method | None, stage: Stage, total: int, now: int) -> int:
    if stage.left is not None:
        return stage.left(total, now)
    return _kept(method, stage.budget, total)


def _kept(method: Method | None, budget: Budget | None, total: int) -> int:
    if budget is None:
        name = getattr(method, "name", "method")
        raise InputError(f"method={name!r} keeps a number of tokens that depends on the picture.")
    return resolve_budget(None, budget, total)


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise InputError(f"{name}={value!r} is not valid: the model's config must state it.")
    return value


# -- a whole prefill, for every family ---------------------------------------------------------
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
    """A layer of self-attention and an MLP over ``length`` rows."""
    weights = 4 * _linear(hidden, hidden) + matrices * _linear(hidden, intermediate)
    return weights * length + 4.0 * hidden * length**2


def _side(value: Any) -> int:
    return int(value[0]) if isinstance(value, list | tuple) else int(value)


def tower_images(
    config: Any, inputs: Mapping[str, Any], images: Sequence[int] | None = None
) -> list[float]:
    """Pictures (or tiles of them) of each sample that go through the tower.

    LLaVA-NeXT pads pictures with fewer tiles than others of the batch; transformers leaves the
    padding out in front of the tower, so it does not count here.

    Args:
        config: of the whole model.
        inputs: what ``generate`` gets.
        images: pictures of each sample, in order; ``None``: all together are one sample.
    """
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    total = sum(images) if images is not None else 1
    if pixels is None or not total:
        return [0.0] * len(images or (0,))
    kind = getattr(config, "model_type", "")
    if kind in ("llava_next", "llava_onevision"):
        each = [float(tiles) for tiles in _tiles(config, inputs)]
    elif inputs.get("pixel_attention_mask") is not None:  # what is filled up is no tile
        rows = inputs["pixel_attention_mask"].flatten(2).any(dim=-1).sum(dim=1).tolist()
        shown = iter(rows)  # the processor leaves samples without a picture out
        by_sample = [float(next(shown, 0)) if count else 0.0 for count in images or rows]
        return by_sample if images is not None else [sum(by_sample)]
    else:
        each = [math.prod(pixels.shape[:-3]) / total] * total
    rest = iter(each)
    return [sum(islice(rest, count)) for count in images] if images is not None else [sum(each)]


def _tiles(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Of each picture, the small view of the whole included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if inputs.get("image_sizes") is None:
        return []
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    sizes = [size.tolist() for size in inputs["image_sizes"]]
    together = inputs.get("batch_num_images")  # LLaVA-OneVision cuts a picture that is alone
    alone = [True] * len(sizes)
    if together is not None:
        alone = [count == 1 for count in together.tolist() for _ in range(count)]
    return [
        image_size_to_num_patches(size, pinpoints, side) if own else 1
        for size, own in zip(sizes, alone, strict=True)
    ]


def _count(config: Any, inputs: Mapping[str, Any]) -> float:
    return tower_images(config, inputs)[0]


# -- towers --------------------------------------------------------------------------------------
def _clip(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    return vision_flops(VisionShape.from_config(config), kept) * _count(config, inputs)


def _qwen(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Qwen's towers: all patches of a picture in one sequence, squares of them make a token.

    Qwen2.5-VL has windows in most layers and a gated MLP; Qwen3-VL a merger more for each layer
    whose features its decoder adds (DeepStack).
    """
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return 0.0
    vision = config.vision_config
    hidden = getattr(vision, "embed_dim", vision.hidden_size)
    out = getattr(vision, "out_hidden_size", vision.hidden_size)
    inside = getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio)
    merge, windowed = vision.spatial_merge_size, hasattr(vision, "window_size")
    inner = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    per_patch = _linear(inner, hidden)
    per_patch += vision.depth * 4 * _linear(hidden, hidden)
    per_patch += vision.depth * (3 if windowed else 2) * _linear(hidden, inside)
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    per_token = mergers * _linear(hidden * merge**2, hidden * merge**2, out)
    whole = len(vision.fullatt_block_indexes) if windowed else vision.depth
    total = 0.0
    for frames, down, across in grids.tolist():
        patches = down * across
        attention = whole * patches**2
        if windowed:
            window = vision.window_size // merge // vision.patch_size
            rows, columns = (_cut(side // merge, window) for side in (down, across))
            squares = sum((a * b * merge**2) ** 2 for a in rows for b in columns)
            attention += (vision.depth - whole) * squares
        one = per_patch * patches + 4.0 * hidden * attention + per_token * patches / merge**2
        total += frames * one
    return total


def _cut(length: int, size: int) -> list[int]:
    """``length`` in pieces of ``size``, the last one shorter."""
    return [min(size, length - start) for start in range(0, length, size)]


def _vit(vision: Any, extra: int = 0, matrices: int = 2) -> tuple[float, int]:
    """A plain vision transformer: its FLOPs for a tile, and its patches; ``extra`` tokens beside
    them (CLS)."""
    side = _side(vision.patch_size)
    patches = (_side(vision.image_size) // side) ** 2
    one = _linear(vision.num_channels * side**2, vision.hidden_size) * patches
    one += vision.num_hidden_layers * _encoder_layer(
        vision.hidden_size, vision.intermediate_size, patches + extra, matrices
    )
    return one, patches


def _siglip(config: Any) -> tuple[float, int]:
    """SigLIP, with a head that runs, though its output is not used."""
    vision = config.vision_config
    one, patches = _vit(vision)
    if getattr(vision, "vision_use_head", True):
        width = vision.hidden_size
        one += _cross_attention(width, width, 1, width, patches)
        one += 2 * _linear(width, vision.intermediate_size)
    return one, patches


def _widths(config: Any) -> tuple[int, int]:
    return config.vision_config.hidden_size, config.text_config.hidden_size


def _gemma3(config: Any) -> float:
    """Patches are pooled, then one matrix."""
    return _siglip(config)[0] + _linear(*_widths(config)) * config.mm_tokens_per_image


def _paligemma(config: Any) -> float:
    one, patches = _siglip(config)
    return one + _linear(*_widths(config)) * patches


def _onevision(config: Any) -> float:
    one, patches = _siglip(config)
    hidden, text = _widths(config)
    return one + _linear(hidden, text, text) * patches


def _aya(config: Any) -> float:
    """Squares of patches become one token in front of a gated projector."""
    one, patches = _siglip(config)
    hidden, text = _widths(config)
    fold, inner = config.downsample_factor**2, getattr(config, "alignment_intermediate_size", text)
    return one + (_linear(hidden * fold, inner) + _linear(inner // 2, text)) * (patches // fold)


def _intern(config: Any) -> float:
    """InternVL: squares of patches become one token in front of a two-layer projector."""
    one, patches = _vit(config.vision_config, extra=1)
    hidden, text = _widths(config)
    fold = int(1 / config.downsample_ratio) ** 2
    return one + _linear(hidden * fold, text, text) * (patches // fold)


def _idefics(config: Any) -> float:
    """Idefics3 and SmolVLM: squares of patches become one token by one matrix."""
    one, patches = _vit(config.vision_config)
    hidden, text = _widths(config)
    fold = config.scale_factor**2
    return one + _linear(hidden * fold, text) * (patches // fold)


def _ovis(config: Any) -> float:
    """Ovis2: squares of patches become weights over a visual vocabulary, and these a mean of its
    embeddings."""
    vision = config.vision_config
    one, patches = _vit(vision, matrices=3)
    fold, words = vision.hidden_stride**2, vision.vocab_size
    known = words - vision.num_visual_indicator_tokens
    made = _linear(vision.hidden_size * fold, known) + _linear(words, config.hidden_size)
    return one + made * (patches // fold)


_TILE: Mapping[str, Callable[[Any], float]] = {
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "llava_onevision": _onevision,
    "aya_vision": _aya,
    "internvl": _intern,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "ovis2": _ovis,
}
"""Model types whose towers take tiles of one size -> FLOPs of a tile, projector included."""


def _pixtral(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Mistral 3: all pictures of a batch in one sequence, whose mask parts them; pixels are filled
    up to the largest."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0.0
    vision, (hidden, text) = config.vision_config, _widths(config)
    side, merge = _side(vision.patch_size), config.spatial_merge_size**2
    grid = len(pixels) * (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
    total = _linear(vision.num_channels * side**2, hidden) * grid
    patches = sum((down // side) * (across // side) for down, across in inputs["image_sizes"])
    patches = int(patches)
    total += vision.num_hidden_layers * _encoder_layer(
        hidden, vision.intermediate_size, patches, matrices=3
    )
    return total + _linear(hidden * merge, hidden, text, text) * (patches // merge)


def _glm(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """GLM-4.1V: as Qwen's towers, with a gated MLP of the language model's width, a convolution
    that joins patches, and a gated merger."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return 0.0
    vision = config.vision_config
    hidden, out, inner = vision.hidden_size, vision.out_hidden_size, vision.intermediate_size
    values = vision.in_channels * vision.temporal_patch_size * _side(vision.patch_size) ** 2
    fold = vision.spatial_merge_size**2
    per_token = _linear(hidden * fold, out, out) + 3 * _linear(out, inner)
    total = 0.0
    for frames, down, across in grids.tolist():
        patches = down * across
        one = _linear(values, hidden) * patches + per_token * patches / fold
        one += vision.depth * _encoder_layer(hidden, out, patches, matrices=3)
        total += frames * one
    return total


def _gemma4(config: Any, inputs: Mapping[str, Any], kept: dict[int, int]) -> float:
    """Gemma 4: patches of a picture, filled up to one number, are pooled by a matrix of weights and
    projected."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0.0
    vision, (hidden, text) = config.vision_config, _widths(config)
    count, patches, values = pixels.shape
    heads = vision.num_attention_heads * vision.head_dim
    keys = vision.num_key_value_heads * vision.head_dim
    weights = 2 * _linear(hidden, heads) + 2 * _linear(hidden, keys)
    weights += 3 * _linear(hidden, vision.intermediate_size)
    one = _linear(values, hidden) * patches
    one += vision.num_hidden_layers * (weights * patches + 4.0 * heads * patches**2)
    pooled = patches // vision.pooling_kernel_size**2
    one += 2.0 * pooled * patches * hidden
    shown = int((inputs["input_ids"] == config.image_token_id).sum())
    return count * one + _linear(hidden, text) * shown


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
    return one * _count(config, inputs)


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


def _by_tile(
    tile: Callable[[Any], float],
) -> Callable[[Any, Mapping[str, Any], dict[int, int]], float]:
    return lambda config, inputs, kept: tile(config) * _count(config, inputs)


_SIGHT: Mapping[str, Callable[[Any, Mapping[str, Any], dict[int, int]], float]] = {
    **{kind: _by_tile(tile) for kind, tile in _TILE.items()},
    "llava": _clip,
    "llava_next": _clip,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _qwen),
    "glm4v": _glm,
    "mistral3": _pixtral,
    "gemma4": _gemma4,
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


# -- counted -------------------------------------------------------------------------------------
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any):  # type: ignore[no-untyped-def]
    """Shapes ``(batch, heads, length, head_dim)``; every query head works, however few keys."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[-2] * (dim + value[-1])


def _packed_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """flash-attn: ``(batch, length, heads, head_dim)``."""
    batch, queries, heads, dim = query
    return 4 * batch * heads * queries * key[1] * dim


def _four_bit(a: Sequence[int], b: Any, shape: Sequence[int], *_: Any, **__: Any) -> int:
    """``a`` ``(..., in)`` times a packed matrix of ``shape`` ``(out, in)``."""
    return 2 * math.prod(a) * shape[0]


def _eight_bit(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """``a`` ``(..., in)`` times ``b`` ``(out, in)``."""
    return 2 * math.prod(a) * b[0]


def _mixed(a: Sequence[int], ca: Any, cb: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * cb[0]


def _formulas() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    wanted: list[tuple[str, str, Callable[..., int]]] = [
        *(("aten", name, _attention) for name in _ATTENTION),
        ("flash_attn", "_flash_attn_forward", _packed_attention),
        ("bitsandbytes", "gemm_4bit", _four_bit),
        ("bitsandbytes", "gemv_4bit", _four_bit),
        ("bitsandbytes", "int8_linear_matmul", _eight_bit),
        ("bitsandbytes", "int8_scaled_mm", _eight_bit),
        ("bitsandbytes", "int8_mixed_scaled_mm", _mixed),
    ]
    for space, name, formula in wanted:
        try:
            found[getattr(getattr(torch.ops, space), name)] = formula
        except AttributeError:  # a library that is not loaded, or another version of it
            continue
    return found


class _Nowhere:
    """In place of the counter's own book of modules, whose hooks on every module in the process
    stumble over parameters used in inference mode (BLIP-2's queries)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class FlopCount:
    """FLOPs counted so far.

    Attributes:
        total: of everything.
        vision: of the modules that were named, e.g. the vision tower.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self._entered: list[int] = []
        self.vision = 0

    @property
    def total(self) -> int:
        """Until now."""
        return int(self._counter.get_total_flops())

    def enter(self, *_: Any) -> None:
        """Hook in front of a named module."""
        self._entered.append(self.total)

    def leave(self, *_: Any) -> None:
        """Hook behind it."""
        self.vision += self.total - self._entered.pop()


@contextmanager
def count_flops(vision: Sequence[torch.nn.Module] = ()) -> Iterator[FlopCount]:
    """Count what runs inside of the ``with`` block.

    Args:
        vision: modules whose part is told apart; none of them inside of another.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    count = FlopCount(counter)
    handles = [module.register_forward_pre_hook(count.enter) for module in vision]
    handles += [module.register_forward_hook(count.leave) for module in vision]
    try:
        # Compiled code would be one opaque operation to the counter.
        with torch.compiler.set_stance("force_eager"), counter:
            yield count
    finally:
        for handle in handles:
            handle.remove()


_VISION = (
    "vision_tower",
    "multi_modal_projector",
    "connector",
    "visual",
    "vision_model",
    "visual_embeddings_table",
    "embed_vision",
    "qformer",
    "language_projection",
    "vision_embed_tokens",
)


def vision_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that turn pixels into visual tokens, by the names all families' classes use; none
    of them holds another."""
    inner = getattr(model, "model", model)
    found = [getattr(inner, name, None) for name in _VISION]
    return [module for module in found if isinstance(module, torch.nn.Module)]
