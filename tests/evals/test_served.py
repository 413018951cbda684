"""What an engine is asked is what the model is asked here; what it cannot do is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import family_makers
from tests.makers import photo, tiny_next
from vlm_prune_ext.engine.prompt import runs_of
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.precheck import check_backend, check_served
from vlm_prune_ext.methods.registry import METHODS, parse_method, short_form, standard_method
from vlm_prune_ext.models.checkpoint import Checkpoint

SPELLED = ["divprune:64", "fastv:288,agg_layer=2", "saint:0.8,vit={layers: [2], keep_num: 9}"]


def processor_of(family: str, folder: Path) -> tuple[Any, Any]:
    if family == "llava":
        return vp.load("demo", device="cpu")
    made = folder / family
    tiny_next(made) if family == "llava_next" else getattr(family_makers, family)(made)
    return vp.load(made, device="cpu")


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"]
)
def test_prompts_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    """Token by token, once there is room for each image."""
    _model, processor = processor_of(family, tmp_path)
    images = [photo(120, 60, seed=1), photo(70, 150, seed=2)]
    if family == "llava_onevision":  # tiles a picture only where it is the only one
        images = images[:1]
    text = "What is " + "<image> or " * len(images) + "nothing?"
    wanted = processor.prompt(text, images)["input_ids"][0].tolist()
    ids = processor.unfilled_ids(text, images)
    lengths, token = processor.visual_lengths(images), processor.image_token_id
    assert ids.count(token) == len(images)
    waiting = iter(lengths)
    filled = [[token] * next(waiting) if one == token else [one] for one in ids]
    assert [one for part in filled for one in part] == wanted
    places = [place for place, one in enumerate(wanted) if one == token]
    assert [count for _, count in runs_of(places)] == lengths


def test_pictures_are_resized_as_the_model_sees_them() -> None:
    """What an engine makes of a picture of the right size are the same pixels."""
    _model, processor = vp.load("demo", device="cpu")
    picture = photo(500, 210, seed=1)
    drawn = processor.drawn(picture)
    assert drawn.size == (336, 336) and drawn.mode == "RGB"
    made = [processor.pixels([one])["pixel_values"] for one in (picture, drawn)]
    torch.testing.assert_close(*made, atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [*SPELLED, *METHODS])
def test_a_methods_text_is_the_method(text: str) -> None:
    method = standard_method(text) if text in METHODS else parse_method(text)
    assert parse_method(short_form(method)) == method


def test_a_function_has_no_text() -> None:
    method = vp.CustomSelection(method=lambda seen, keep: seen, kept_tokens=4)
    with pytest.raises(InputError, match="cannot be written as text"):
        short_form(method)


@pytest.mark.parametrize(
    ("backend", "given", "said"),
    [
        ("vlm", {}, "backend='vlm' is not valid"),
        ("vllm", {"device": "cpu"}, "device='cpu' is not possible with vLLM"),
        ("vllm", {"fast": True}, "fast=True is not possible with vLLM"),
        (None, {"tensor_parallel_size": 2}, "tensor_parallel_size=2 is vLLM's"),
    ],
)
def test_settings_of_the_other_backend(
    backend: str | None, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_backend(backend, given)


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, precheck = Checkpoint("demo"), "vlm_prune_ext.evals.precheck"
    monkeypatch.setattr(f"{precheck}.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs vLLM, which is not installed here"):
        check_served(demo, None)
    monkeypatch.setattr(f"{precheck}.find_spec", lambda name: True)
    monkeypatch.setattr(f"{precheck}.vllm_version", lambda: "0.40.1")
    with pytest.raises(InputError, match=r"this is vLLM 0\.40\.1"):
        check_served(demo, None)
    monkeypatch.setattr(f"{precheck}.vllm_version", lambda: "0.32.0")
    with pytest.raises(InputError, match="vlm-prune convert"):
        check_served(demo, None)
    family_makers.qwen2_5_vl(tmp_path)
    source = Checkpoint(tmp_path)
    check_served(source, parse_method("divprune:6"))
    with pytest.raises(InputError, match="methods that fit: divprune, downsample"):
        check_served(source, parse_method("fastv:6"))
    monkeypatch.setitem(source.config, "architectures", ["Qwen2VLForConditionalGeneration"])
    with pytest.raises(InputError, match="not possible with Qwen2VLForConditionalGeneration"):
        check_served(source, None)
