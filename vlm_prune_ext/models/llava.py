"""LLaVA-1.5, in its original and in Hugging Face format.

Paper: https://arxiv.org/abs/2310.03744. Original code: https://github.com/haotian-liu/LLaVA.
Both formats end up in transformers' ``LlavaForConditionalGeneration`` and get the same prompts and
pixels as the original code makes them. One deviation: the original cuts prompts off at
``tokenizer_model_max_length``, and with them the question; here they stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.huggingface import check_tower, load_model, read_image_processor
from vlm_prune_ext.models.images import pad_square
from vlm_prune_ext.models.original import OriginalCheckpoint, is_original, load_tokenizer
from vlm_prune_ext.models.placeholders import is_multimodal, multimodal_parts

NAME = "llava"


class LlavaProcessor(PromptProcessor):
    """Prompts and pixels of LLaVA-1.5.

    Args:
        model, tokenizer, image_processor, image_token_id: as in :class:`PromptProcessor`.
        visual_tokens: per image.
        aspect: ``"pad"`` pads to a square with the mean colour first; anything else leaves that to
            the image processor (which crops).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: CLIPImageProcessor,
        image_token_id: int,
        visual_tokens: int,
        aspect: str | None = "pad",
    ) -> None:
        super().__init__(model, tokenizer, image_processor, image_token_id, NAME, "vicuna_v1")
        self.visual_tokens, self.aspect = visual_tokens, aspect

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """``pixel_values``, ``(images, 3, side, side)``."""
        if self.aspect == "pad":
            mean = tuple(int(x * 255) for x in self.image_processor.image_mean)
            images = [pad_square(image, mean) for image in images]
        made = [self.image_processor(image, return_tensors="pt") for image in images]
        return {"pixel_values": torch.cat([one["pixel_values"] for one in made])}

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """The same for every image."""
        return [self.visual_tokens] * len(images)


def visual_tokens(config: Any) -> int:
    """Visual tokens per image of a ``LlavaConfig``."""
    vision = config.vision_config
    whole = config.vision_feature_select_strategy == "full"
    return (vision.image_size // vision.patch_size) ** 2 + int(whole)


def _recognises(config: Mapping[str, Any]) -> bool:
    if "LlavaForConditionalGeneration" in (config.get("architectures") or []):
        return True
    return is_original(config) and config.get("image_aspect_ratio") != "anyres"


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    if is_original(source.config):
        return _load_original(source, options)
    check_tower(source)
    tokenizer, images = load_tokenizer(source), read_image_processor(source)
    model = load_model(LlavaForConditionalGeneration, source, options)
    processor = LlavaProcessor(
        model,
        tokenizer,
        images,
        model.config.image_token_id,
        visual_tokens(model.config),
    )
    return model, processor


def _load_original(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    checkpoint = OriginalCheckpoint(source)
    tokenizer = checkpoint.tokenizer()
    config = LlavaConfig(**checkpoint.multimodal_config())
    model = checkpoint.load(LlavaForConditionalGeneration, config, options)
    processor = LlavaProcessor(
        model,
        tokenizer,
        checkpoint.tower.image_processor(),
        checkpoint.image_token_id,
        visual_tokens(config),
        source.config.get("image_aspect_ratio", "square"),
    )
    return model, processor


def _owns(model: Any) -> bool:
    kinds = (LlavaForConditionalGeneration, LlavaModel)
    return isinstance(model, kinds) and is_multimodal(model)


def _parts(model: Any) -> ModelParts:
    inner, config = getattr(model, "model", model), model.config
    length = visual_tokens(config)

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]]:
        return [[length] * (count // length) for count in mask.sum(dim=1).tolist()]

    return multimodal_parts(model, inner, lengths)


FAMILY = Family(
    name=NAME,
    title="LLaVA-1.5",
    owns=_owns,
    parts=_parts,
    architectures=(
        "LlavaForConditionalGeneration",
        "LlavaLlamaForCausalLM",
        "LlavaMistralForCausalLM",
    ),
    recognises=_recognises,
    load=_load,
    fast=True,
)
