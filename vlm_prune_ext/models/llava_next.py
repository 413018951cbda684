"""LLaVA-NeXT (LLaVA-1.6) on Vicuna and Mistral, in its original and in Hugging Face format.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next. Original code:
https://github.com/haotian-liu/LLaVA (``process_anyres_image``, ``unpad_image``).

An image becomes one squeezed overview tile and up to four tiles of a fitted grid; features of
padding are cut off and a newline token closes each row of the grid. Pixels are made as the original
code makes them, for both formats. How many rows are padding is counted as transformers counts it,
which differs from the original where a product is a hair below a whole number: the original then
loses a row.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from transformers import (
    CLIPImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.huggingface import check_tower, load_model, read_image_processor
from vlm_prune_ext.models.images import Size, best_resolution, tiles
from vlm_prune_ext.models.original import OriginalCheckpoint, is_original, load_tokenizer
from vlm_prune_ext.models.placeholders import is_multimodal, multimodal_parts

NAME = "llava_next"


def packed_length(size: Size, pinpoints: Sequence[Size], side: int, grid: int) -> int:
    """Visual tokens that an image becomes: overview, unpadded grid, one newline per row.

    Args:
        size: of the image, (width, height).
        pinpoints: (width, height) that it may be fitted into.
        side: pixels per side of a tile.
        grid: patches per side of a tile.
    """
    width, height = size
    fitted = best_resolution(size, pinpoints)
    columns, rows = (edge // side * grid for edge in fitted)
    if width / height > columns / rows:
        used = int(round(height * (columns / width), 7))
        rows -= (rows - used) // 2 * 2
    else:
        used = int(round(width * (rows / height), 7))
        columns -= (columns - used) // 2 * 2
    return grid * grid + rows * (columns + 1)


class LlavaNextProcessor(PromptProcessor):
    """Prompts, tiles and pixels of LLaVA-NeXT.

    Args:
        model, tokenizer, image_processor: as in :class:`PromptProcessor`.
        config: the model's ``LlavaNextConfig``.
        style: default conversation template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: CLIPImageProcessor,
        config: LlavaNextConfig,
        style: str,
    ) -> None:
        super().__init__(model, tokenizer, image_processor, config.image_token_id, NAME, style)
        vision: Any = config.vision_config
        self.side, self.grid = vision.image_size, vision.image_size // vision.patch_size
        self.pinpoints = pinpoints_of(config)

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """``pixel_values`` ``(images, tiles, 3, side, side)``, zeros where an image has fewer
        tiles, and ``image_sizes`` ``(images, 2)``, (height, width)."""
        stacks = []
        for image in images:
            cut = tiles(image, self.pinpoints, self.side)
            made = [self.image_processor(tile, return_tensors="pt")["pixel_values"] for tile in cut]
            stacks.append(torch.cat(made))
        most = max(len(stack) for stack in stacks)
        padded = [torch.cat([s, s.new_zeros(most - len(s), *s.shape[1:])]) for s in stacks]
        sizes = torch.tensor([[image.height, image.width] for image in images])
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """By the shape of each image."""
        return [packed_length(i.size, self.pinpoints, self.side, self.grid) for i in images]


def pinpoints_of(config: Any) -> list[Size]:
    """A configuration's resolutions as (width, height); transformers stores (height, width)."""
    return [(width, height) for height, width in config.image_grid_pinpoints]


def _recognises(config: Mapping[str, Any]) -> bool:
    if "LlavaNextForConditionalGeneration" in (config.get("architectures") or []):
        return True
    return is_original(config) and config.get("image_aspect_ratio") == "anyres"


def _style(config: Any) -> str:
    return "mistral_instruct" if config.text_config.model_type == "mistral" else "vicuna_v1"


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    if is_original(source.config):
        return _load_original(source, options)
    kind = (source.config.get("text_config") or {}).get("model_type", "llama")
    if kind not in ("llama", "mistral"):
        raise InputError(
            f"text_config.model_type={kind!r} of checkpoint {source.name!r} is not supported; "
            "accepted: llama, mistral."
        )
    check_tower(source)
    tokenizer, images = load_tokenizer(source), read_image_processor(source)
    model = load_model(LlavaNextForConditionalGeneration, source, options)
    config = model.config
    return model, LlavaNextProcessor(model, tokenizer, images, config, _style(config))


def _load_original(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    checkpoint = OriginalCheckpoint(source)
    merge = source.config.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise InputError(
            f"mm_patch_merge_type={merge!r} of checkpoint {source.name!r} is not supported with "
            "image_aspect_ratio='anyres'; accepted: 'spatial_unpad'."
        )
    tokenizer = checkpoint.tokenizer()
    config = next_config(checkpoint)
    model = checkpoint.load(LlavaNextForConditionalGeneration, config, options)
    images = checkpoint.tower.image_processor()
    return model, LlavaNextProcessor(model, tokenizer, images, config, _style(config))


def next_config(checkpoint: OriginalCheckpoint) -> LlavaNextConfig:
    """transformers' configuration of an original checkpoint."""
    pinpoints = read_pinpoints(checkpoint.config, checkpoint.what)
    heights_first = [[height, width] for width, height in pinpoints]
    return LlavaNextConfig(**checkpoint.multimodal_config(), image_grid_pinpoints=heights_first)


def read_pinpoints(config: Mapping[str, Any], what: str) -> list[Size]:
    """``image_grid_pinpoints`` of an original configuration, a list or the text of one.

    Raises:
        InputError: it is neither.
    """
    value = config.get("image_grid_pinpoints")
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        return [(int(width), int(height)) for width, height in value]  # type: ignore[union-attr]
    except (ValueError, SyntaxError, TypeError) as error:
        raise InputError(
            f"image_grid_pinpoints={value!r} of {what} is not valid: a list of [width, height] is "
            "needed."
        ) from error


def _owns(model: Any) -> bool:
    kinds = (LlavaNextForConditionalGeneration, LlavaNextModel)
    return isinstance(model, kinds) and is_multimodal(model)


def _parts(model: Any) -> ModelParts:
    inner, config = getattr(model, "model", model), model.config
    vision_config = config.vision_config
    side, pinpoints = vision_config.image_size, pinpoints_of(config)
    grid = side // vision_config.patch_size

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]] | None:
        sizes = given.get("image_sizes")
        if sizes is None:
            return None
        waiting = [packed_length((w, h), pinpoints, side, grid) for h, w in sizes.tolist()]
        return share_out(waiting, mask.sum(dim=1).tolist())

    return multimodal_parts(model, inner, lengths)


def share_out(lengths: list[int], counts: list[int]) -> list[list[int]] | None:
    """Lengths of consecutive images, by sample, so that each sample's add up to its count.

    Returns:
        ``None`` if they cannot.
    """
    waiting, shared = list(lengths), []
    for count in counts:
        own: list[int] = []
        while sum(own) < count and waiting:
            own.append(waiting.pop(0))
        if sum(own) != count:
            return None
        shared.append(own)
    return shared if not waiting else None


FAMILY = Family(
    name=NAME,
    title="LLaVA-NeXT",
    owns=_owns,
    parts=_parts,
    architectures=(
        "LlavaNextForConditionalGeneration",
        "LlavaLlamaForCausalLM",
        "LlavaMistralForCausalLM",
    ),
    recognises=_recognises,
    load=_load,
    fast=True,
)
