"""Qwen2.5-VL.

Paper: https://arxiv.org/abs/2502.13923. Images keep their shape (dynamic resolution); rotary
positions have three axes (time, height, width), all of which kept tokens keep.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from vlm_prune_ext.models.hub_processor import HubProcessor, hub_family
from vlm_prune_ext.models.prompts import IMAGE, STYLES, chatml

NAME = "qwen2_5_vl"

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


def _processor(model: Any, tokenizer: Any, pictures: Any) -> QwenProcessor:
    token = model.config.image_token_id
    return QwenProcessor(model, tokenizer, pictures, token, NAME, "qwen2_vl", QWEN_STYLES)


FAMILY = hub_family(
    NAME,
    "Qwen2.5-VL",
    Qwen2_5_VLForConditionalGeneration,
    _processor,
    decoder=lambda model: model.model.language_model,
    plain_rotary=False,
    why_no_vision=(
        "Qwen2.5-VL's tower looks through windows at images of any shape and is not CLIP-like; "
        "methods that work in the language model apply"
    ),
)
