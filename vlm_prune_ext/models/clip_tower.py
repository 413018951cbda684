"""CLIP vision towers: bare, or inside a vision-language model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, VisionParts
from vlm_prune_ext.models.base import Family
from vlm_prune_ext.models.catalogue import FamilyLine

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
