"""Analytic FLOPs of a prefill: what pruning saves in arithmetic, before anything is run.

A multiply-add counts as two. Matrix products only: norms, rotary embedding, softmax and
activations are below one percent of them. Causal attention counts in full (all ``S x S``
products), as ``torch.utils.flop_counter`` does and as kernels without causal skipping compute;
kernels that skip the upper triangle do about half of that part. The output head counts for one
position, which is all that ``generate`` asks of a prefill.

All functions are pure; lengths come from ``Trace.lengths`` of a run, or from
:func:`planned_lengths` before one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method, Stage, resolve_budget

MLP_WIDTH = "intermediate_size"
PLAIN = ("opt", "persimmon")
"""Model types with an MLP of two matrices and as many key/value heads as query heads."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a causal decoder (LLaMA's and its kin: SwiGLU, grouped key/value heads).

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocab: as usually named.
        mlp_matrices: 3 with a gate (SwiGLU, GeGLU), 2 without (OPT, Persimmon).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3

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
        plain = getattr(config, "model_type", "") in PLAIN
        return DecoderShape(
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=heads if plain else getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=_size(config, "ffn_dim" if hasattr(config, "ffn_dim") else MLP_WIDTH),
            vocab=_size(config, "vocab_size"),
            mlp_matrices=2 if plain else 3,
        )

    def layer_flops(self, length: int) -> float:
        """One decoder layer over ``length`` tokens."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.hidden * queries + 2 * self.hidden * keys
        weights += self.mlp_matrices * self.hidden * self.intermediate
        return 2.0 * weights * length + 4.0 * queries * length**2

    def head_flops(self, positions: int = 1) -> float:
        """The output head over ``positions`` tokens."""
        return 2.0 * self.hidden * self.vocab * positions


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
    return sum(map(shape.layer_flops, lengths)) + shape.head_flops(head_positions)


def vision_flops(
    shape: VisionShape, patches_after: dict[int, int] | None = None, images: int = 1
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
    total = 2.0 * shape.hidden * shape.patch_inputs * patches
    for layer in range(shape.layers):
        length = patches + 1
        total += 8.0 * shape.hidden**2 * length + 4.0 * shape.hidden * length**2
        total += 4.0 * shape.hidden * shape.intermediate * length
        patches = drops.get(layer, patches)
    for before, after in zip(shape.projector, shape.projector[1:], strict=False):
        total += 2.0 * before * after * patches
    return total * images


def flops_ratio(
    shape: DecoderShape, lengths: Sequence[int], baseline: Sequence[int] | int | None = None
) -> float:
    """Prefill FLOPs with ``lengths`` over those of the unpruned prompt (decoder and head).

    Args:
        shape: sizes of the decoder.
        lengths: tokens that enter each layer.
        baseline: the same without pruning, or the prompt's length; ``None``: ``lengths[0]``, for
            methods that leave layer 0 whole.
    """
    whole = lengths[0] if baseline is None else baseline
    full = [whole] * shape.layers if isinstance(whole, int) else whole
    return decoder_flops(shape, lengths) / decoder_flops(shape, full)


def planned_lengths(
    method: Method | None, num_layers: int, text: int, visual: Sequence[int]
) -> list[int]:
    """Tokens that will enter each layer, for methods whose counts do not depend on the data.

    Args:
        method: what prunes; ``None`` is the baseline.
        num_layers: decoder layers.
        text: text tokens of the prompt.
        visual: visual tokens of each image, as they come out of the projector (a method that works
            in or behind the vision tower is not asked).

    Raises:
        InputError: the method's counts depend on the data (SAINT in the language model).
    """
    lengths = [text + sum(visual)] * num_layers
    for stage in method.stages(num_layers) if method is not None else ():
        count = text + sum(_kept(method, stage, total) for total in visual)
        if stage.mode == "drop":
            lengths[stage.layer :] = [count] * (num_layers - stage.layer)
    return lengths


def _kept(method: Method | None, stage: Stage, total: int) -> int:
    if stage.budget is None:
        name = getattr(method, "name", "method")
        raise InputError(f"method={name!r} keeps a number of tokens that depends on the picture.")
    return resolve_budget("budget", stage.budget, total)


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise InputError(f"{name}={value!r} is not valid: the model's config must state it.")
    return value
