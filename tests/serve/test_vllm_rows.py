"""Counts and rows inside vLLM are those of this package with the same method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import vlm_prune_ext as vp
from tests.family_makers import QWEN_IMAGE
from tests.makers import photo
from vlm_prune_ext.methods.registry import parse_method

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from tests.serve.engine import Served  # noqa: E402


@contextmanager
def entering(model: Any) -> Iterator[list[Any]]:
    """Rows and positions that enter layer 0."""
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    layer = vp.models.parts_of(model).layers[0]
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.inference_mode()
def ours(
    model: Any, processor: Any, method: str | None, picture: Image.Image, pixels: torch.Tensor
) -> torch.Tensor:
    """Rows of one picture that enter the language model, ``(n, D)``. The engine resizes with
    torchvision and LLaVA's processors here with Pillow, a few levels of 255 apart at edges: its
    pixels are taken, where it has not left normalising to its model."""
    inputs = processor.prompt("What is this?", picture)
    own = inputs["pixel_values"]
    if pixels.is_floating_point() and own.dim() > 2:
        pixels = pixels[None] if own.dim() == 4 else pixels[None, : own.shape[1]]
        assert (pixels - own).abs().mean() < 0.01
        inputs["pixel_values"] = pixels
    ids = inputs["input_ids"][0]
    is_image = ids == processor.image_token_id
    start, behind = int(is_image.int().argmax()), int((~is_image).sum())
    with entering(model) as seen, vp.prune(model, method and parse_method(method)):
        model(**inputs)
    hidden = seen[0][0]
    return hidden[start : start + len(hidden) - behind]


def same_rows(folder: Path, method: str | None, pictures: list[Image.Image], marker: str) -> None:
    model, processor = vp.load(folder, dtype="float32", device="cpu")
    served = Served(folder, method)
    inputs = served.inputs(marker * len(pictures) + "What is this?", pictures)
    places = [place.get_num_embeds() for place in inputs["mm_placeholders"]["image"]]
    rows = served.rows(inputs)
    pixels = [item["pixel_values"].data for item in inputs["mm_kwargs"]["image"]]
    wanted = [ours(model, processor, method, *one) for one in zip(pictures, pixels, strict=True)]
    assert places == [len(one) for one in rows] == [len(one) for one in wanted]
    width = wanted[0].shape[1]
    for one, other in zip(rows, wanted, strict=True):
        torch.testing.assert_close(one[:, :width], other, atol=1e-4, rtol=1e-4)


TILE = [
    None,
    "divprune:64",
    "fastervlm:64",
    "fastervlm:0.25",
    "visionzip:64",
    "vispruner:64,important_ratio=1.0",
    "scope:64",
    "holov:64",
    "downsample:64",
    "random:64",
    "custom:64,method=uniform,agg_layer=0",
]


@pytest.mark.parametrize("method", TILE)
def test_llava(demo: Path, method: str | None) -> None:
    same_rows(demo, method, [photo(seed=seed) for seed in range(3)], "<image>")


def test_a_chaotic_rule_keeps_rows_of_the_image(demo: Path) -> None:
    """VisPruner's second half turns over with differences of 1e-6 (as its file says), so its rows
    are checked to be the image's, as many as asked for, all different."""
    picture = photo(seed=4)
    whole, kept = Served(demo, None), Served(demo, "vispruner:64")
    rows = kept.rows(kept.inputs("<image>What?", [picture]))[0]
    every = whole.rows(whole.inputs("<image>What?", [picture]))[0]
    nearest = torch.cdist(rows, every).min(dim=1)
    assert len(rows) == 64 == len(set(nearest.indices.tolist()))
    torch.testing.assert_close(rows, every[nearest.indices], atol=1e-4, rtol=1e-4)


OTHERS = [
    *((family, None) for family in ("llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")),
    ("llava_next", "divprune:20"),
    ("llava_next", "holov:20"),
    ("llava_next", "holov:0.25"),
    ("llava_next", "random:20"),
    ("llava_onevision", "divprune:10"),
    ("llava_onevision", "custom:0.5,method=norm,agg_layer=0"),
    ("qwen2_5_vl", "divprune:6"),
    ("qwen2_5_vl", "fastervlm:5"),
    ("qwen2_5_vl", "scope:0.5"),
    ("qwen2_5_vl", "holov:5"),
    ("qwen2_5_vl", "downsample:5"),
    ("qwen2_5_vl", "random:5"),
    ("qwen3_vl", "divprune:6"),
    ("qwen3_vl", "fastervlm:5"),
    ("qwen3_vl", "downsample:5"),
]
MARKERS = {
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen2_5_vl": QWEN_IMAGE,
    "qwen3_vl": QWEN_IMAGE,
}


@pytest.mark.parametrize(("family", "method"), OTHERS)
def test_other_families(tiny: Callable[[str], Path], family: str, method: str | None) -> None:
    pictures = [photo(120, 60, seed=1), photo(80, 80, seed=2), photo(60, 150, seed=3)]
    same_rows(tiny(family), method, pictures, MARKERS[family])
