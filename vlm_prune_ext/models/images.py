"""Opening images, padding them to a square, and cutting them into tiles."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, UnidentifiedImageError

from vlm_prune_ext.errors import InputError

ImageLike: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes"
Size = tuple[int, int]


def open_image(image: Any) -> Image.Image:
    """An RGB image.

    Args:
        image: PIL image, path of a file, or the bytes of one.

    Raises:
        InputError: missing file, or one that does not decode.
    """
    source = image
    name = f"image {str(image)!r}" if isinstance(image, str | os.PathLike) else "image"
    if isinstance(image, bytes):
        source = io.BytesIO(image)
    elif isinstance(image, str | os.PathLike):
        source = Path(image)
        if not source.is_file():
            raise InputError(f"{name} does not exist: give the path of an image file.")
    elif not isinstance(image, Image.Image):
        raise InputError(
            f"image of type {type(image).__name__} is not valid: give a PIL image, a path or bytes."
        )
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(
            f"{name} does not decode ({type(error).__name__}): a complete file in a format that "
            "Pillow reads is needed."
        ) from error


def pad_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of that colour; an odd rest goes right or below."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The candidate that shows most of an image, with the least waste among equals.

    Args:
        size: of the image, (width, height).
        candidates: (width, height) of each.
    """
    width, height = size

    def merit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - candidate[0] * candidate[1]

    return max(candidates, key=merit)  # the first of equals, as LLaVA takes it


def fit_into(image: Image.Image, size: Size) -> Image.Image:
    """The image as large as fits into (width, height), in the middle of black."""
    scale_x, scale_y = size[0] / image.width, size[1] / image.height
    if scale_x < scale_y:
        inner = (size[0], min(math.ceil(image.height * scale_x), size[1]))
    else:
        inner = (min(math.ceil(image.width * scale_y), size[0]), size[1])
    canvas = Image.new("RGB", size, (0, 0, 0))
    canvas.paste(image.resize(inner), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas


def tiles(image: Image.Image, candidates: Sequence[Size], side: int) -> list[Image.Image]:
    """The whole image squeezed into one tile, then its tiles row by row.

    Args:
        image: RGB.
        candidates: (width, height) that it may be fitted into, multiples of ``side``.
        side: of a tile.
    """
    fitted = fit_into(image, best_resolution(image.size, candidates))
    corners = [(x, y) for y in range(0, fitted.height, side) for x in range(0, fitted.width, side)]
    cut = [fitted.crop((x, y, x + side, y + side)) for x, y in corners]
    return [image.resize((side, side)), *cut]
