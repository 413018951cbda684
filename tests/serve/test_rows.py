"""Rows of a step's images, with transformers' towers in place of an engine's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests.makers import photo
from vlm_prune_ext.methods.registry import parse_method
from vlm_prune_ext.serve.rows import RowPruner
from vlm_prune_ext.serve.selection import Picture, selection_for

LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return vp.load("demo", dtype="float32", device="cpu")


def entering(model: Any, inputs: Any, method: str) -> torch.Tensor:
    """Rows that enter layer 0 of a pruned model."""
    seen: list[torch.Tensor] = []
    layer = vp.models.parts_of(model).layers[0]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.inference_mode(), vp.prune(model, parse_method(method)):
        model(**inputs)
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize(
    "method",
    [
        "divprune:64",
        "fastervlm:64",
        "visionzip:64",
        "scope:64",
        "holov:64",
        "downsample:64",
        "random:64",
        "custom:64,method=norm,agg_layer=0",
    ],
)
def test_batched_rows_are_those_of_single_prompts(demo: tuple[Any, Any], method: str) -> None:
    model, processor = demo
    selection = selection_for(method, LLAVA, 12)
    assert selection is not None
    parts = vp.models.parts_of(model)
    pruner = RowPruner(selection, model, parts.vision if selection.uses_tower else None)
    inputs = [processor.prompt("What is this?", photo(seed=seed)) for seed in range(3)]
    pixels = torch.cat([one["pixel_values"] for one in inputs])
    with torch.inference_mode():
        with pruner.watching():
            images = model.get_image_features(pixels).pooler_output
        left = pruner.prune(list(images))
    for one, prompt in zip(left, inputs, strict=True):
        ids = prompt["input_ids"][0]
        start = int((ids == processor.image_token_id).int().argmax())
        wanted = entering(model, prompt, method)[start : start + len(one.rows)]
        assert len(one.rows) == len(one.places) == selection.left(Picture(576))
        torch.testing.assert_close(one.rows, wanted, atol=1e-4, rtol=1e-4)


def test_further_channels_follow_their_token() -> None:
    """As Qwen3-VL's features for deeper layers do."""
    selection = selection_for("divprune:3", QWEN, 12)
    assert selection is not None
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(rows * columns, 8, generator=generator) for rows, columns in [(2, 4), (3, 3)]
    ]
    marked = [
        torch.cat([image, torch.arange(len(image))[:, None].float()], dim=1) for image in images
    ]
    pruner = RowPruner(selection, torch.nn.Module(), None)
    for left, image in zip(pruner.prune(marked, [(2, 4), (3, 3)], 8), images, strict=True):
        assert torch.equal(left.rows[:, 8].long(), left.places)
        assert torch.equal(left.rows[:, :8], image[left.places])
