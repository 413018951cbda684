"""InternVL, as transformers' own class (checkpoints whose name ends in ``-hf``).

Paper: https://arxiv.org/abs/2412.05271. An image is cut into tiles of a fitted grid, with one
overview tile behind them if there are several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image
from transformers import InternVLForConditionalGeneration

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.causal_lm import decoder_parts, find_decoder
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.hub_processor import HubProcessor, read_pictures
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.placeholders import watch_placeholders
from vlm_prune_ext.models.prompts import IMAGE, STYLES, chatml

NAME = "internvl"
ARCHITECTURE = "InternVLForConditionalGeneration"
REMOTE = "InternVLChatModel"

INTERNVL_STYLES = {"internvl": chatml(f"{IMAGE}\n"), "plain": STYLES["plain"]}


class InternVLProcessor(HubProcessor):
    """Prompts and tiles of InternVL."""

    OPTIONS = {"crop_to_patches": True}
    FRAME = ("<img>", "</img>")

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """By the number of tiles of each image."""
        count = self.image_processor.get_number_of_image_patches
        per_tile = tile_length(self._live_model().config)
        return [count(i.height, i.width, dict(self.OPTIONS)) * per_tile for i in images]


def tile_length(config: Any) -> int:
    """Visual tokens of one tile."""
    vision = config.vision_config
    down, across = (
        int(side // patch * config.downsample_ratio)
        for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return down * across


def _recognises(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    return ARCHITECTURE in names or REMOTE in names


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    if source.architecture == REMOTE:
        raise InputError(
            f"checkpoint {source.name!r} is in InternVL's own format, which needs code from the "
            "checkpoint that is not run here: take one in Hugging Face format, whose name ends in "
            "-hf, e.g. OpenGVLab/InternVL3-2B-hf."
        )
    tokenizer, pictures = load_tokenizer(source), read_pictures(source)
    model = load_model(InternVLForConditionalGeneration, source, options)
    token = model.config.image_token_id
    style = "internvl"
    return model, InternVLProcessor(model, tokenizer, pictures, token, NAME, style, INTERNVL_STYLES)


def _owns(model: Any) -> bool:
    whole = isinstance(model, InternVLForConditionalGeneration)
    return whole and find_decoder(model.model.language_model) is not None


def _parts(model: Any) -> ModelParts:
    inner = model.model

    def lengths(mask: Any, given: dict[str, Any]) -> None:
        return None  # an end token closes each image

    return decoder_parts(
        model,
        find_decoder(inner.language_model),
        why_no_vision=(
            "InternVL's tower gives four patches to one token and is not CLIP-like; methods that "
            "work in the language model apply"
        ),
        watch_spans=watch_placeholders(inner, model.config.image_token_id, lengths),
    )


FAMILY = Family(
    name=NAME,
    title="InternVL",
    owns=_owns,
    parts=_parts,
    architectures=(ARCHITECTURE,),
    recognises=_recognises,
    load=_load,
)
