"""Vision towers of transformers' models, as methods behind the tower read them."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, Packed, VisionParts
from vlm_prune_ext.models.base import Family
from vlm_prune_ext.models.catalogue import FamilyLine

_TOWERS = ("vision_tower", "vision_model", "visual")
_PROJECTORS = ("multi_modal_projector", "connector")
_APPLY = "methods that work in the language model apply"
_POOLS = ("vision_resampler", "apply_pooling")  # what makes frames of videos smaller


def find_tower(inner: Any) -> tuple[VisionParts | None, str]:
    """The tower of a model, and why methods cannot drop patches inside it.

    Args:
        inner: the module that holds tower and projector.

    Returns:
        its parts, ``None`` where it is not one that is known; and a sentence for messages.
    """
    tower = next((getattr(inner, name) for name in _TOWERS if hasattr(inner, name)), None)
    if tower is None:
        return None, f"the model has no vision tower that is known; {_APPLY}"
    projector = next((getattr(inner, n) for n in _PROJECTORS if hasattr(inner, n)), None)
    feature = getattr(inner.config, "vision_feature_layer", None)
    pools = any(hasattr(inner, name) for name in _POOLS)
    if is_clip(tower) and projector is not None and feature is not None:
        found = vision_parts(tower, feature=feature, projector=projector)
        why = f"frames are pooled between it and the projector; {_APPLY}" if pools else ""
        return replace(found, drops=not pools, pools_videos=pools), why
    why = f"its vision tower, a {type(tower).__name__}, is not CLIP-like; {_APPLY}"
    by_tile = _packed(tower) or _by_tile(tower, projector, feature)
    return by_tile and replace(by_tile, pools_videos=pools), why


def _by_tile(tower: Any, projector: nn.Module | None, feature: Any) -> VisionParts | None:
    """A tower that runs tile by tile, in front of a projector that is a module."""
    body = getattr(tower, "vision_model", tower)
    encoder = getattr(body, "encoder", None)
    layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
    if projector is None or not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    attn: Any = getattr(layers[0], "self_attn", getattr(layers[0], "attention", None))
    if not hasattr(attn, "q_proj") or not hasattr(attn, "k_proj"):
        return None
    embeddings: Any = body.embeddings
    last = feature if isinstance(feature, int) else -1
    return VisionParts(
        tower=tower,
        layers=layers,
        num_heads=attn.num_heads,
        grid=0,
        feature_layer=(last if last >= 0 else len(layers) + 1 + last) - 1,
        projector=projector,
        cls=hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token"),
        drops=False,
    )


def _packed(tower: Any) -> VisionParts | None:
    """Qwen's towers: all images in one sequence, attention within windows in most layers."""
    blocks, merger = getattr(tower, "blocks", None), getattr(tower, "merger", None)
    if merger is None or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    attn: Any = getattr(blocks[-1], "attn", None)
    rotate = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb_vision", None)
    if rotate is None or not hasattr(attn, "qkv"):
        return None
    whole = getattr(tower, "fullatt_block_indexes", None) or [len(blocks) - 1]
    index = max(whole)
    group = int(tower.spatial_merge_size) ** 2
    # GLM-4.1V's merger is handed tokens: what it has of patches stands in front of a convolution.
    entrance = tower.post_layernorm if hasattr(tower, "downsample") else None
    packed = Packed(blocks[index].attn, _Rotated(blocks[index].attn, rotate), group, entrance)
    return VisionParts(
        tower=tower,
        layers=blocks,
        num_heads=attn.num_heads,
        grid=0,
        feature_layer=index,
        projector=merger,
        cls=False,
        drops=False,
        packed=packed,
    )


class _Rotated:
    """See :attr:`Packed.read`."""

    def __init__(self, attn: Any, rotate: Any) -> None:
        self.attn, self.rotate = attn, rotate

    def __call__(
        self, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        made = self.attn.qkv(hidden).unflatten(-1, (3, self.attn.num_heads, -1))
        queries, keys = self.rotate(made[:, 0], made[:, 1], *kwargs["position_embeddings"])
        return queries, keys, kwargs["cu_seqlens"].diff().tolist()


# -- clip tower ------------------------------------------------------------------------------------
# CLIP vision towers: bare, or inside a vision-language model.


_CAME_FROM: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def came_from(tower: nn.Module, name: str) -> None:
    """Remember the folder or hub name of the checkpoint that a tower was read from."""
    _CAME_FROM[tower] = name


def checkpoint_of(tower: nn.Module) -> str | None:
    """What :func:`came_from` was told of a tower."""
    return _CAME_FROM.get(tower)


def clip_body(tower: Any) -> Any:
    """The module that has ``encoder.layers``: the tower itself, or what it wraps."""
    return getattr(tower, "vision_model", tower)


def is_clip(tower: object) -> bool:
    """Whether a module is a CLIP vision transformer of transformers."""
    body = clip_body(tower)
    layers = getattr(getattr(body, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(body, "pre_layrnorm"):
        return False
    return len(layers) > 0 and hasattr(getattr(layers[0], "self_attn", None), "k_proj")


def vision_parts(
    tower: Any, *, feature: int | list[int] | None = None, projector: nn.Module | None = None
) -> VisionParts:
    """Parts of a CLIP tower.

    Args:
        tower: a ``CLIPVisionModel``.
        feature: which entries of its list of hidden states the language model is given (entry 0
            is the embeddings, negative ones count from the end); ``None`` for a bare tower.
        projector: what maps them to the language model's width.
    """
    layers = clip_body(tower).encoder.layers
    config = tower.config
    return VisionParts(
        tower=tower,
        layers=layers,
        num_heads=config.num_attention_heads,
        grid=config.image_size // config.patch_size,
        feature_layer=None if feature is None else _last_layer(feature, len(layers)),
        projector=projector,
    )


def _last_layer(feature: int | list[int], layers: int) -> int:
    entries = [feature] if isinstance(feature, int) else list(feature)
    return max(entry if entry >= 0 else layers + 1 + entry for entry in entries) - 1


def _parts(model: Any) -> ModelParts:
    return ModelParts(model=model, vision=vision_parts(model))


def family_of(line: FamilyLine) -> Family:
    """Bare towers."""
    return Family(line, is_clip, _parts)
