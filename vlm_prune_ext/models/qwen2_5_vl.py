"""Qwen2.5-VL.

Paper: https://arxiv.org/abs/2502.13923. Images keep their shape (dynamic resolution); rotary
positions have three axes (time, height, width), all of which kept tokens keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.causal_lm import decoder_parts
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.hub_processor import HubProcessor, read_pictures
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.placeholders import watch_placeholders
from vlm_prune_ext.models.prompts import IMAGE, STYLES, chatml

NAME = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

QWEN_STYLES = {
    "qwen2_vl": chatml(IMAGE, system="You are a helpful assistant."),
    "plain": STYLES["plain"],
}


class QwenProcessor(HubProcessor):
    """Prompts and pixels of Qwen2.5-VL."""

    INPUTS = ("pixel_values", "image_grid_thw")
    FRAME = ("<|vision_start|>", "<|vision_end|>")
    TOKEN_TYPES = "mm_token_type_ids"

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """By the shape of each image: patches, of which each square of four becomes a token."""
        count = self.image_processor.get_number_of_image_patches
        merged = self.image_processor.merge_size**2
        return [count(image.height, image.width, {}) // merged for image in images]


def _recognises(config: Mapping[str, Any]) -> bool:
    return ARCHITECTURE in (config.get("architectures") or [])


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    tokenizer, pictures = load_tokenizer(source), read_pictures(source)
    model = load_model(Qwen2_5_VLForConditionalGeneration, source, options)
    token = model.config.image_token_id
    processor = QwenProcessor(model, tokenizer, pictures, token, NAME, "qwen2_vl", QWEN_STYLES)
    return model, processor


def _owns(model: Any) -> bool:
    return isinstance(model, Qwen2_5_VLForConditionalGeneration)


def _parts(model: Any) -> ModelParts:
    inner = model.model

    def lengths(mask: Any, given: dict[str, Any]) -> None:
        return None  # a start and an end token stand between images

    return decoder_parts(
        model,
        inner.language_model,
        plain_rotary=False,
        why_no_vision=(
            "Qwen2.5-VL's tower looks through windows at images of any shape and is not CLIP-like; "
            "methods that work in the language model apply"
        ),
        watch_spans=watch_placeholders(inner, model.config.image_token_id, lengths),
    )


FAMILY = Family(
    name=NAME,
    title="Qwen2.5-VL",
    owns=_owns,
    parts=_parts,
    architectures=(ARCHITECTURE,),
    recognises=_recognises,
    load=_load,
)
