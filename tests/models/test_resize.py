"""Resizing by matrix products gives the pixels that Pillow and torchvision give, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

import vlm_prune_ext as vp
from tests import makers
from tests.models.conftest import FAMILIES, Folders
from tests.pruning_checks import check_preprocessing_on_the_device
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import resize as module
from vlm_prune_ext.models.images import pad_square
from vlm_prune_ext.models.resize import AsOnCpu, place, resize

# (height, width): down, up, both, tiny, one pixel, by a hair, prime, and a whole multiple
SIZES = [
    ((480, 640), (336, 336)),
    ((320, 240), (168, 224)),
    ((30, 47), (336, 224)),
    ((500, 33), (60, 200)),
    ((1, 7), (28, 28)),
    ((2, 2), (1, 3)),
    ((335, 337), (336, 336)),
    ((211, 397), (7, 13)),
    ((224, 224), (112, 112)),
    ((900, 600), (336, 336)),
]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def noise(size: tuple[int, int], hard: bool) -> torch.Tensor:
    """Uint8 ``(3, *size)``; hard: black and white, where sums leave 0..255."""
    values = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    values = np.where(values > 127, 255, 0).astype(np.uint8) if hard else values
    return torch.from_numpy(values).permute(2, 0, 1)


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("before, after", SIZES)
def test_pixels_are_those_of_the_libraries(
    before: tuple[int, int], after: tuple[int, int], mode: str
) -> None:
    for hard in (False, True):
        picture = noise(before, hard)
        with AsOnCpu():
            found = tv.resize(picture, list(after), InterpolationMode(mode), antialias=True)
        assert found.dtype == torch.uint8
        if mode == "bicubic" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            theirs = tv.resize(picture, list(after), InterpolationMode(mode), antialias=True)
            assert torch.equal(found, theirs)
        # On a GPU torchvision hands whole numbers on as float32, and rounds what it gets.
        with AsOnCpu():
            floats = tv.resize(picture.float(), list(after), InterpolationMode(mode))
        assert torch.equal(floats.to(torch.uint8), found)
        pillow = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
            after[::-1], FILTERS[mode]
        )
        mine = resize(picture, after, mode, "pillow")
        assert torch.equal(mine.permute(1, 2, 0), torch.from_numpy(np.asarray(pillow).copy()))


def test_nothing_else_is_changed_inside() -> None:
    picture = noise((20, 30), False).float()[None]
    plain = torch.nn.functional.interpolate(picture, (9, 9), mode="bilinear")
    with AsOnCpu():
        assert torch.equal(plain, torch.nn.functional.interpolate(picture, (9, 9), mode="bilinear"))


def test_large_pictures_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a pass is bounded; several pictures are resized together."""
    pictures = torch.stack([noise((40, 50), hard) for hard in (False, True)])
    whole = resize(pictures, (20, 20))
    monkeypatch.setattr(module, "_AT_ONCE", 40 * 50)
    assert torch.equal(resize(pictures, (20, 20)), whole)
    assert torch.equal(whole[1], resize(pictures[1], (20, 20)))


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (6, 6), (1, 4)])
def test_padding_is_pillows(size: tuple[int, int]) -> None:
    picture, color = noise(size, False), (122, 116, 104)
    theirs = pad_square(Image.fromarray(picture.permute(1, 2, 0).numpy()), color)
    mine = place(picture, (max(size), max(size)), color)
    assert torch.equal(mine.permute(1, 2, 0), torch.from_numpy(np.asarray(theirs).copy()))


@pytest.mark.parametrize(
    "make",
    [
        makers.tiny_original,
        makers.tiny_next,
        lambda folder: makers.tiny_original(folder, image_aspect_ratio="square"),
    ],
    ids=["padded", "in tiles", "cropped"],
)
def test_llava_on_the_device(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Other families: where their inputs are compared with transformers'."""
    make(tmp_path)
    model, processor = vp.load(tmp_path)
    assert model.device.type == "cpu" and not processor.device_pixels  # where that is slower
    check_preprocessing_on_the_device(processor, makers.photos(6))
    del model
    with pytest.raises(InputError, match=r"'devcie'.*device"):
        vp.load(tmp_path, preprocess="devcie")


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_on_a_gpu(name: str, folders: Folders) -> None:
    model, processor = vp.load(folders[name], device="cuda", fast=False, trust_remote_code=True)
    assert model.device.type == "cuda"
    check_preprocessing_on_the_device(processor, makers.photos(4))
