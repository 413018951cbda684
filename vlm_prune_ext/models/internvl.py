"""InternVL, as transformers' own class (checkpoints whose name ends in ``-hf``).

Paper: https://arxiv.org/abs/2412.05271. An image is cut into tiles of a fitted grid, with one
overview tile behind them if there are several. The published format: :mod:`.internvl_chat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL.Image import Image
from transformers import InternVLForConditionalGeneration

from vlm_prune_ext.models.causal_lm import find_decoder
from vlm_prune_ext.models.hub_processor import HubProcessor, hub_family
from vlm_prune_ext.models.prompts import IMAGE, STYLES, Style, chatml

NAME = "internvl"
CONTEXT = "<IMG_CONTEXT>"
WHY_NO_VISION = (
    "InternVL's tower gives four patches to one token and is not CLIP-like; methods that work in "
    "the language model apply"
)

INTERNVL_STYLES = {"internvl": chatml(f"{IMAGE}\n"), "plain": STYLES["plain"]}


class InternVLProcessor(HubProcessor):
    """Prompts and tiles of InternVL.

    Args:
        model, tokenizer, image_processor, image_token_id, family, default_style, styles: as in
            :class:`HubProcessor`.
        per_tile: visual tokens of one tile.
    """

    OPTIONS = {"crop_to_patches": True}
    FRAME = ("<img>", "</img>")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        family: str,
        default_style: str,
        styles: Mapping[str, Style],
        per_tile: int,
    ) -> None:
        super().__init__(
            model, tokenizer, image_processor, image_token_id, family, default_style, styles
        )
        self.per_tile = per_tile

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """By the number of tiles of each image."""
        count = self.image_processor.get_number_of_image_patches
        return [count(i.height, i.width, dict(self.OPTIONS)) * self.per_tile for i in images]


def tile_length(config: Any) -> int:
    """Visual tokens of one tile."""
    vision = config.vision_config
    down, across = (
        int(side // patch * config.downsample_ratio)
        for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return down * across


def _processor(model: Any, tokenizer: Any, pictures: Any) -> InternVLProcessor:
    token, per_tile = model.config.image_token_id, tile_length(model.config)
    return InternVLProcessor(
        model, tokenizer, pictures, token, NAME, "internvl", INTERNVL_STYLES, per_tile
    )


_HUB = hub_family(
    NAME,
    "InternVL",
    InternVLForConditionalGeneration,
    _processor,
    decoder=lambda model: find_decoder(model.model.language_model),
    why_no_vision=WHY_NO_VISION,
)
FAMILY = replace(_HUB, fast=True)
