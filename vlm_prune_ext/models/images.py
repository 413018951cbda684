"""Opening images, padding them to a square, and cutting them into tiles."""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import Image, ImageCms, ImageFile

from vlm_prune_ext.errors import InputError

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ReadyImage:
    """An opened picture with what was done ahead of its batch: see ``PromptProcessor.ready``.

    Attributes:
        size: (width, height) of the picture.
        pixels: what its processor made of it, ``(1, ...)``, in the model's dtype; or, where the
            model's device is to make that, the picture itself, uint8 ``(height, width, 3)``.
    """

    size: Size
    pixels: torch.Tensor

    @property
    def width(self) -> int:
        """Of the picture."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Of the picture."""
        return self.size[1]


def on_device(image: Image.Image | ReadyImage, device: torch.device) -> torch.Tensor:
    """A picture's pixels there, uint8 ``(3, height, width)``; a copy that nobody waits for, where
    its memory is pinned."""
    raw = image.pixels if isinstance(image, ReadyImage) else bytes_of(image)
    return raw.to(device, non_blocking=True).permute(2, 0, 1)


def bytes_of(image: Image.Image, pinned: bool = False) -> torch.Tensor:
    """An RGB picture, uint8 ``(height, width, 3)``; pinned: where a GPU can copy from while it
    works."""
    import torch

    shape = (image.height, image.width, 3)
    made = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    np.copyto(made.numpy(), np.frombuffer(image.tobytes(), np.uint8).reshape(shape))
    return made


class Video:
    """A video, opened or not: see :mod:`vlm_prune_ext.models.clips`."""

    def digest(self) -> str:
        """See :func:`digest_of`."""
        raise NotImplementedError


ImageLike: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | ReadyImage | Video"


MAX_PIXELS = 89_478_485
"""Pixels of a picture at most: a quarter GiB of RGB, where Pillow begins to warn of decompression
bombs. Said here, because other packages lift Pillow's own limit for the whole process."""

_MOST = f"{MAX_PIXELS} are accepted at most"
_WHITE_16 = 65535


def open_image(image: Any) -> Image.Image:
    """An RGB image of 8 bits per channel.

    Grey values of more bits are scaled so that white stays white; LAB goes through sRGB's profile.
    A PIL image in RGB stays the object that it is.

    Args:
        image: PIL image, path of a file, or the bytes of one. What ``PromptProcessor.ready`` made
            stays as it is.

    Raises:
        InputError: missing file, one that does not decode, more than :data:`MAX_PIXELS`, or
            pixels that do not say which value is white (32-bit integers beyond 16 bits, floats).
    """
    if isinstance(image, ReadyImage):  # of the processor that it was made by, and is for
        return cast(Image.Image, image)
    name = f"image {_shown(image)}" if isinstance(image, str | os.PathLike) else "image"
    source = image
    if isinstance(image, bytes):
        source = io.BytesIO(image)
    elif isinstance(image, str | os.PathLike):
        source = Path(image)
        if not _is_file(source):
            raise InputError(f"{name} does not exist: give the path of an image file.")
    elif not isinstance(image, Image.Image):
        raise InputError(
            f"image of type {type(image).__name__} is not valid: give a PIL image, a path or bytes."
        )
    try:
        return _decode(source, name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels: {_MOST}.") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise InputError(
            f"{name} does not decode ({type(error).__name__}): a complete file in a format that "
            "Pillow reads is needed."
        ) from error


def digest_of(image: Any) -> str:
    """A picture by its content: equal digests are equal pictures (a file and its pixels differ).

    Args:
        image: as for :func:`open_image`. Of a file or bytes the encoded content counts, of a PIL
            image its pixels in RGB.

    Raises:
        InputError: see :func:`open_image`.
    """
    if isinstance(image, Video):
        return image.digest()
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, str | os.PathLike) and _is_file(Path(image)):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        digest.update(image)
    else:
        picture = open_image(image)
        digest.update(repr(("RGB", picture.size)).encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def _decode(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        _check_pixels(source, name)
        with _own_limits():
            return _rgb(source, name)
    with _own_limits(), Image.open(source) as opened:
        if opened.format in _REFUSED:
            raise InputError(f"{name} is {opened.format}, {_REFUSED[opened.format]}.")
        _check_pixels(opened, name)
        opened.load()
        _check_pixels(opened, name)  # ICO and ICNS know their size only now
        return _rgb(opened, name)


_REFUSED = {"EPS": "which only another program (Ghostscript) can draw: convert it to PNG"}
_GUARD = threading.Lock()
_inside: list[tuple[Any, bool]] = []


@contextmanager
def _own_limits() -> Iterator[None]:
    """Pillow's two switches as they should be, whatever other packages set for the process: large
    pictures inside pictures are errors, and so are files cut short, which both evaluation
    frameworks have Pillow fill with grey. Threads may be in here together."""
    with _GUARD:
        _inside.append((Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES))
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MAX_PIXELS, False
    try:
        yield
    finally:
        with _GUARD:
            before = _inside.pop()  # the last one out finds what the first one in left
            if not _inside:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_pixels(image: Image.Image, name: str) -> None:
    if not image.width * image.height:
        raise InputError(f"{name} has no pixels: it is {image.width} x {image.height}.")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{name} has too many pixels ({image.width} x {image.height}): {_MOST}.")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in RGB; what Pillow's ``convert`` would cut off at 255 is scaled first."""
    if image.mode == "F":
        raise InputError(
            f"{name} has floating-point pixels, which do not say which value is white: convert it "
            "to 8 or 16 bits."
        )
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransformFromOpenProfiles(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        return cast(Image.Image, ImageCms.applyTransform(image, to_rgb))
    if image.mode == "La":  # premultiplied, which Pillow turns into LA only
        image = image.convert("LA")
    if image.mode == "I" or image.mode.startswith("I;"):
        return _grey(image, name).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _grey(image: Image.Image, name: str) -> Image.Image:
    """8 bits of a grey picture with more."""
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    white = _WHITE_16
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two are always 16 bits
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > _WHITE_16:
            raise InputError(
                f"{name} has 32-bit pixels from {low} to {high}, which do not say which value is "
                "white: convert it to 8 or 16 bits."
            )
        white = _WHITE_16 if high > 255 else 255
    elif tags.get(_BITS_PER_SAMPLE) == (12,):
        white = 4095
    scaled = (values * 255 + white // 2) // white
    if image.mode != "I" and tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow leaves so
        scaled = 255 - scaled
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF's tags


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _shown(path: Any) -> str:
    """A path in quotes; of a very long one, its two ends."""
    said = repr(os.fspath(path))
    return said if len(said) <= 200 else f"{said[:100]}...{said[-60:]}"


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


def fitting(inner: Size, size: Size) -> Size:
    """(width, height) that an image is drawn with as large as fits into another size."""
    scale_x, scale_y = size[0] / inner[0], size[1] / inner[1]
    if scale_x < scale_y:
        return size[0], min(math.ceil(inner[1] * scale_x), size[1])
    return min(math.ceil(inner[0] * scale_y), size[0]), size[1]


def fit_into(image: Image.Image, size: Size) -> Image.Image:
    """The image as large as fits into (width, height), in the middle of black."""
    inner = fitting(image.size, size)
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
