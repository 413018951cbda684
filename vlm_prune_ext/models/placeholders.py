"""Models of transformers that are tower, projector and decoder, with one placeholder in the prompt
per visual token: their parts, and telling the engine where placeholders are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.models.causal_lm import decoder_parts, find_decoder
from vlm_prune_ext.models.clip_tower import is_clip, vision_parts

Lengths = Callable[[torch.Tensor, dict[str, Any]], "list[list[int]] | None"]
"""``(mask, keyword arguments of the call) -> visual tokens of each image, per sample``."""


def is_multimodal(model: Any) -> bool:
    """Whether a model, or the one inside it, has a LLaMA-like ``language_model``."""
    inner = getattr(model, "model", model)
    return find_decoder(getattr(inner, "language_model", None)) is not None


def multimodal_parts(model: nn.Module, inner: Any, lengths: Lengths) -> ModelParts:
    """Parts of such a model.

    Args:
        model: what the user passed.
        inner: the module with ``vision_tower``, ``multi_modal_projector``, ``language_model``.
        lengths: visual tokens of each image in a call of ``inner``.
    """
    config, tower = inner.config, inner.vision_tower
    vision = None
    if is_clip(tower):
        vision = vision_parts(
            tower, feature=config.vision_feature_layer, projector=inner.multi_modal_projector
        )
    return decoder_parts(
        model,
        find_decoder(inner.language_model),
        vision=vision,
        why_no_vision=f"its vision tower, a {type(tower).__name__}, is not CLIP-like",
        watch_spans=watch_placeholders(inner, config.image_token_id, lengths),
    )


def watch_placeholders(
    inner: Any, image_token_id: int, lengths: Lengths
) -> Callable[[SpanSink], list[Undo]]:
    """What :attr:`ModelParts.watch_spans` asks for: a hook in front of ``inner``, the module that
    puts image features into the embedded prompt."""

    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {"input_ids": args[0], **kwargs} if args else kwargs
            mask = _placeholders(module, given, image_token_id)
            if mask is not None and mask.shape[1] > 1:
                sink(mask, lengths(mask, given))

        return [inner.register_forward_pre_hook(see, with_kwargs=True).remove]

    return watch


def _placeholders(module: Any, given: dict[str, Any], image_token_id: int) -> torch.Tensor | None:
    """Bool ``(batch, seq)``; ``None`` where the call has no tokens."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        return ids == image_token_id
    if embeds is None or embeds.shape[1] == 1:
        return None
    # The way transformers itself finds them where only embeddings are given.
    table = module.get_input_embeddings()
    placeholder = torch.tensor(image_token_id, device=table.weight.device)
    return (embeds == table(placeholder).to(embeds.device)).all(dim=-1)
