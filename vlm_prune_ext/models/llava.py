"""LLaVA-1.5, and LLaVA-NeXT (LLaVA-1.6) on Vicuna and Mistral, in original and Hugging Face format.

Papers: https://arxiv.org/abs/2310.03744 and https://llava-vl.github.io/blog/2024-01-30-llava-next.
Original code: https://github.com/haotian-liu/LLaVA (``process_anyres_image``, ``unpad_image``).
All end up in transformers' classes and get the prompts and pixels that the original code makes,
which differ from those of transformers' processors. Deviations: the original cuts prompts off at
``tokenizer_model_max_length``, and with them the question; here they stay whole. In LLaVA-NeXT,
rows that are padding are counted as transformers counts them; where a product is a hair below a
whole number, the original loses a row.

In LLaVA-NeXT an image becomes one squeezed overview tile and up to four tiles of a fitted grid;
features of padding are cut off and a newline token closes each row of the grid.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from PIL.Image import Image, fromarray
from transformers import CLIPImageProcessor, LlavaConfig, LlavaNextConfig

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import generic
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_a
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint, read_json
from vlm_prune_ext.models.images import (
    ImageLike,
    ReadyImage,
    Size,
    best_resolution,
    fitting,
    open_image,
    pad_square,
    tiles,
)
from vlm_prune_ext.models.loading import check_files, load_model, load_tokenizer
from vlm_prune_ext.models.original import OriginalCheckpoint, is_original
from vlm_prune_ext.models.resize import place, resize

_CLIP_FIELDS = (
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "resample",
)


# --------------------------------------------------------------------------------- LLaVA-1.5


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
        super().__init__(model, tokenizer, image_processor, image_token_id, "llava", "vicuna_v1")
        self.visual_tokens, self.aspect = visual_tokens, aspect

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """``pixel_values``, ``(images, 3, side, side)``."""
        if self.device_pixels:
            return {"pixel_values": self.process(images)["pixel_values"]}
        return {"pixel_values": torch.cat([self._pixels_of(image) for image in images])}

    def _pixels_of(self, image: Image | ReadyImage, **how: bool) -> torch.Tensor:
        if isinstance(image, ReadyImage):
            return image.pixels.to(self.device, non_blocking=True)
        if self.aspect == "pad":
            image = pad_square(image, self._padding)
        made = self.image_processor(image, return_tensors="pt", **how)
        pixels: torch.Tensor = made["pixel_values"]
        return pixels

    @property
    def _padding(self) -> tuple[int, ...]:
        return tuple(int(x * 255) for x in self.image_processor.image_mean)

    def _shown(self, images: list[Image]) -> list[Any]:
        shown = super()._shown(images)
        if self.aspect != "pad" or not self.device_pixels:
            return shown
        sides = [max(image.shape[1:]) for image in shown]
        return [
            place(image, (side, side), self._padding)
            for image, side in zip(shown, sides, strict=True)
        ]

    def ready(self, image: ImageLike) -> ImageLike:
        """On the host with its pixels already."""
        if self.device_pixels:
            return super().ready(image)
        opened = open_image(image)
        pixels = self._pixels_of(opened).to(self.dtype)
        pinned = self.device.type == "cuda"  # a GPU can copy from there while it works
        return ReadyImage(opened.size, pixels.pin_memory() if pinned else pixels)

    def drawn(self, image: ImageLike) -> Image:
        """Resized and cut here, by Pillow: engines resize with torchvision, which is some levels of
        255 apart at edges."""
        made = self._pixels_of(open_image(image), do_rescale=False, do_normalize=False)[0]
        return fromarray(made.permute(1, 2, 0).byte().numpy())

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """The same for every image."""
        return [self.visual_tokens] * len(images)


def visual_tokens(config: Any) -> int:
    """Visual tokens per image of a ``LlavaConfig``."""
    vision = config.vision_config
    whole = config.vision_feature_select_strategy == "full"
    return (vision.image_size // vision.patch_size) ** 2 + int(whole)


# -------------------------------------------------------------------------------- LLaVA-NeXT


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
        super().__init__(
            model, tokenizer, image_processor, config.image_token_id, "llava_next", style
        )
        vision: Any = config.vision_config
        self.side, self.grid = vision.image_size, vision.image_size // vision.patch_size
        self.pinpoints = pinpoints_of(config)

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """``pixel_values`` ``(images, tiles, 3, side, side)``, zeros where an image has fewer
        tiles, and ``image_sizes`` ``(images, 2)``, (height, width)."""
        cut_up = self._tiles_on_device if self.device_pixels else tiles
        cut = [cut_up(image, self.pinpoints, self.side) for image in self._shown(images)]
        flat = [tile for own in cut for tile in own]
        with self._making(images, self.image_processor):
            made = self.image_processor(flat, return_tensors="pt")["pixel_values"]
        stacks = made.split([len(own) for own in cut])
        most = max(len(stack) for stack in stacks)
        padded = [torch.cat([s, s.new_zeros(most - len(s), *s.shape[1:])]) for s in stacks]
        sizes = torch.tensor([[image.height, image.width] for image in images])
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    @staticmethod
    def _tiles_on_device(
        image: torch.Tensor, candidates: Sequence[Size], side: int
    ) -> list[torch.Tensor]:
        """As :func:`tiles`, of uint8 ``(3, height, width)``."""
        size = (image.shape[2], image.shape[1])
        area = best_resolution(size, candidates)
        width, height = fitting(size, area)
        inner = resize(image, (height, width), like="pillow")
        fitted = place(inner, (area[1], area[0]), (0, 0, 0))
        rows = fitted.unfold(1, side, side).unfold(2, side, side)
        cut = rows.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side)
        return [resize(image, (side, side), like="pillow"), *cut]

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """By the shape of each image."""
        return [packed_length(i.size, self.pinpoints, self.side, self.grid) for i in images]


def pinpoints_of(config: Any) -> list[Size]:
    """A configuration's resolutions as (width, height); transformers stores (height, width)."""
    return [(width, height) for height, width in config.image_grid_pinpoints]


# ----------------------------------------------------------------------------------- loading


def _is_next(config: Mapping[str, Any]) -> bool:
    if is_original(config):
        return config.get("image_aspect_ratio") == "anyres"
    return "LlavaNextForConditionalGeneration" in (config.get("architectures") or [])


def _recognises(anyres: bool, config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    ours = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
    known = is_original(config) or any(name in ours for name in names)
    return known and _is_next(config) == anyres


def _style(config: Any) -> str:
    return "mistral_instruct" if config.text_config.model_type == "mistral" else "vicuna_v1"


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    anyres = _is_next(source.config)
    kind = getattr(transformers, f"Llava{'Next' if anyres else ''}ForConditionalGeneration")
    aspect: str | None = "pad"
    if is_original(source.config):
        checkpoint = OriginalCheckpoint(source)
        config = original_config(checkpoint)
        tokenizer, images = load_tokenizer(source), checkpoint.tower.image_processor()
        model = checkpoint.load(kind, config, options)
        aspect = source.config.get("image_aspect_ratio", "square")
    else:
        _check_parts(source, anyres)
        tokenizer, images = load_tokenizer(source), read_clip_pictures(source)
        model = load_model(kind, source, options)
        config = model.config
    if anyres:
        return model, LlavaNextProcessor(model, tokenizer, images, config, _style(config))
    token, count = config.image_token_id, visual_tokens(config)
    return model, LlavaProcessor(model, tokenizer, images, token, count, aspect)


def _check_parts(source: Checkpoint, anyres: bool) -> None:
    """Raise InputError unless the tower is CLIP's, whose pixels and token counts are known here,
    and the language model one whose conversation is."""
    accepted: dict[str, tuple[str, ...]] = {"vision_config": ("clip_vision_model",)}
    if anyres:
        accepted = {"text_config": ("llama", "mistral"), **accepted}
    for part, kinds in accepted.items():
        kind = (source.config.get(part) or {}).get("model_type", kinds[0])
        if kind not in kinds:
            raise InputError(
                f"{part}.model_type={kind!r} of checkpoint {source.name!r} is not supported; "
                f"accepted: {', '.join(kinds)}."
            )


def read_clip_pictures(source: Checkpoint) -> CLIPImageProcessor:
    """Resizing and normalising as the checkpoint states it, without transformers' own padding.

    Raises:
        InputError: neither ``preprocessor_config.json`` nor ``processor_config.json`` has it.
    """
    check_files(source, tokenizer=False)
    what = f"checkpoint {source.name!r}"
    path = source.folder / "preprocessor_config.json"
    stored: Any = read_json(path, what) if path.is_file() else None
    if stored is None:
        stored = read_json(source.folder / "processor_config.json", what).get("image_processor")
    if not isinstance(stored, dict):
        raise InputError(f"{what} has no image processor: preprocessor_config.json is needed.")
    return CLIPImageProcessor(**{n: stored[n] for n in _CLIP_FIELDS if n in stored})


def original_config(checkpoint: OriginalCheckpoint) -> Any:
    """transformers' configuration of an original checkpoint: LLaVA-1.5's or LLaVA-NeXT's.

    Raises:
        InputError: features are put together in a way that transformers does not have.
    """
    if not _is_next(checkpoint.config):
        return LlavaConfig(**checkpoint.multimodal_config())
    merge = checkpoint.config.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise InputError(
            f"mm_patch_merge_type={merge!r} of {checkpoint.what} is not supported with "
            "image_aspect_ratio='anyres'; accepted: 'spatial_unpad'."
        )
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


# ------------------------------------------------------------------------------- live models


def _owns(names: tuple[str, ...], model: Any) -> bool:
    return is_a(model, names) and generic.owns(model)


def _parts(model: Any) -> ModelParts:
    length = visual_tokens(model.config)
    return generic.parts(model, generic.equal_lengths(length))


def _next_parts(model: Any) -> ModelParts:
    config = model.config
    side, pinpoints = config.vision_config.image_size, pinpoints_of(config)
    grid = side // config.vision_config.patch_size

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]] | None:
        sizes = given.get("image_sizes")
        if sizes is None:
            return None
        waiting = [packed_length((w, h), pinpoints, side, grid) for h, w in sizes.tolist()]
        return share_out(waiting, mask.sum(dim=1).tolist())

    return generic.parts(model, lengths)


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


def family_of(line: FamilyLine) -> Family:
    """``llava`` or ``llava_next``."""
    anyres = line.name == "llava_next"
    whole = line.architectures[0]
    names = (whole, whole.replace("ForConditionalGeneration", "Model"))
    return Family(
        line,
        owns=partial(_owns, names),
        parts=_next_parts if anyres else _parts,
        recognises=partial(_recognises, anyres),
        load=_load,
    )
