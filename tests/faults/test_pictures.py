"""Pictures of every kind: the right pixels, or one sentence, within a bounded memory."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from tests.faults import FULL
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import images
from vlm_prune_ext.models.images import open_image

GREY = np.linspace(0, 255, 64 * 48).reshape(48, 64).round().astype(np.uint8)
WIDE = GREY.astype(np.uint16) * 257  # the same picture in 16 bits
COLOUR = Image.new("RGB", (32, 32), (200, 30, 60))


def stored(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def in_lab() -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(
        COLOUR, ImageCms.buildTransformFromOpenProfiles(srgb, lab, "RGB", "LAB")
    )


@pytest.fixture(autouse=True)
def others_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As both evaluation frameworks leave Pillow behind for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1e9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: stored(Image.fromarray(WIDE), "PNG"),
        lambda: stored(Image.fromarray(WIDE), "PPM"),
        lambda: stored(Image.fromarray(WIDE), "TIFF"),
        lambda: stored(Image.fromarray(WIDE), "JPEG2000"),
        lambda: stored(Image.fromarray(65535 - WIDE), "TIFF", tiffinfo={262: 0}),
        lambda: Image.fromarray(WIDE),
        lambda: Image.fromarray(WIDE.astype(np.int32)),
        lambda: Image.fromarray(GREY.astype(np.int32)),
    ],
    ids=["png", "pgm", "tiff", "jpeg2000", "tiff-white-is-zero", "I;16", "I-16", "I-8"],
)
def test_grey_of_more_bits_equals_the_same_in_eight(make: Callable[[], Any]) -> None:
    seen = np.asarray(open_image(make()))
    assert np.abs(seen.astype(int) - GREY[..., None]).max() <= 1  # JPEG 2000 rounds


def test_twelve_bits_packed_have_white_at_4095() -> None:
    white = bytes([0xFF] * 12)  # 4 x 2 pixels
    tags = [(256, 4), (257, 2), (258, 12), (259, 1), (262, 1), (273, 0), (277, 1), (278, 2)]
    tags.append((279, len(white)))
    start = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", t, 4, 1, start if t == 273 else v) for t, v in tags)
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + white
    assert np.asarray(open_image(file)).min() == 255


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBA", "RGBX", "PA", "LAB"])
def test_colours_of_other_spaces(mode: str) -> None:
    image = in_lab() if mode == "LAB" else COLOUR.convert(mode)
    off = np.asarray(open_image(image)).astype(int)[0, 0] - (200, 30, 60)
    assert np.abs(off).max() <= (25 if mode == "PA" else 2)  # a palette of 216 colours


def test_files_in_print_colours() -> None:
    for file in (stored(COLOUR.convert("CMYK"), "JPEG", quality=95), stored(in_lab(), "TIFF")):
        assert np.abs(np.asarray(open_image(file)).astype(int)[0, 0] - (200, 30, 60)).max() <= 4


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (Image.fromarray(WIDE.astype(np.float32)), "floating-point"),
        (Image.fromarray(WIDE.astype(np.int32) * 1000), "32-bit pixels from 0 to 65535000"),
        (stored(COLOUR, "EPS"), "EPS, which only another program"),
        ("x" * 5000, "does not exist"),
        ("/tmp/" + "y" * 300 + ".png", "does not exist"),
        ("a\0b", "does not exist"),
    ],
    ids=["float", "32-bit", "eps", "long-name", "long-part", "nul"],
)
def test_what_states_no_pixels_is_one_sentence(image: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        open_image(image)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_file_cut_short_is_no_picture_whatever_others_allow() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "TIFF", "BMP"):
        whole = stored(Image.fromarray(noise), form)
        with pytest.raises(InputError, match="does not decode"):
            open_image(whole[: len(whole) * 2 // 3])
    assert ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 1e9  # theirs again


def test_the_pixel_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100 * 100)
    whole = stored(Image.new("1", (100, 100)), "PNG")
    assert open_image(whole).size == (100, 100)
    bomb = stored(Image.new("1", (150, 150)), "PNG")
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb), 22) + bomb
    for image in (bomb, ico, Image.new("1", (150, 150))):
        with pytest.raises(InputError, match="too many pixels"):
            open_image(image)


KINDS = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "DDS", "PCX"]
KINDS += ["SGI", "ICNS", "AVIF", "MPO"]


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Cut short, with a header or a body that has wrong bytes, or with a piece put in."""
    data, kind = bytearray(whole), rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 3:
        place = rng.randrange(len(data))
        data[place : place + rng.randrange(30)] = rng.randbytes(rng.randrange(1, 30))
        return bytes(data)
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(min(len(data), 64) if kind == 1 else len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_pictures_or_one_sentence(kind: str) -> None:
    rng = random.Random(kind)
    whole = stored(
        Image.fromarray(np.frombuffer(rng.randbytes(6000), np.uint8).reshape(40, 50, 3)), kind
    )
    for _ in range(320 if FULL else 25):
        try:
            assert open_image(damaged(whole, rng)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)
