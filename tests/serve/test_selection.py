"""What can be asked of a serving engine, and how many tokens it makes room for. Without vLLM."""

from __future__ import annotations

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.registry import METHODS, standard_method
from vlm_prune_ext.serve.selection import (
    FAMILIES,
    Picture,
    Selection,
    asked_for,
    check_budget,
    check_version,
    selection_for,
)

LLAVA, NEXT, ONEVISION, QWEN, _ = FAMILIES


def selection(text: str, family: str = LLAVA) -> Selection:
    found = selection_for(text, family, 32)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("divprune:64", 64),
        ("divprune:0.25", 144),
        ("fastervlm:64", 64),
        ("visionzip:64", 64),
        ("vispruner:128", 128),
        ("scope:64", 64),
        ("holov:64", 64),
        ("downsample:70", 64),
        ("random:100", 100),
        ("custom:0.5,method=uniform,agg_layer=0", 288),
    ],
)
def test_counts_follow_from_the_size(text: str, count: int) -> None:
    assert selection(text).left(Picture(576)) == count


def test_a_small_image_keeps_what_it_has() -> None:
    assert selection("divprune:64", QWEN).left(Picture(20)) == 20


def test_a_picture_in_tiles() -> None:
    """HoloV's share is of all that the tower made, padding included."""
    picture = Picture(tokens=1500, tiles=5, patches=576)
    assert selection("holov:0.25", NEXT).left(picture) == 720
    assert selection("divprune:0.25", NEXT).left(picture) == 375
    with pytest.raises(InputError, match="2880 tokens of an image that has 1500"):
        selection("holov:1.0", NEXT).left(picture)


@pytest.mark.parametrize(
    ("text", "family", "why"),
    [
        ("fastv:100", LLAVA, "in front of layer 3"),
        ("random:64,layer=2", LLAVA, "in front of layer 2"),
        ("pdrop", LLAVA, "in front of layer 8"),
        ("cdpruner:64", LLAVA, "depends on the question"),
        ("prumerge", LLAVA, "last layer"),
        ("saint:0.8,vit={layers: [2], keep_num: 100},start=null", LLAVA, "inside the vision tower"),
        ("fastervlm:64", NEXT, "padding that this family cuts off"),
        ("downsample:64", NEXT, "padding that this family cuts off"),
        ("scope:64", ONEVISION, "resizes features"),
        ("visionzip:64", QWEN, "one token of several patches"),
    ],
)
def test_unfit_methods_are_said_in_one_sentence(text: str, family: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        selection_for(text, family, 32)
    said = str(caught.value)
    assert FAMILIES[family].title in said and said.endswith(".") and said.count(". ") == 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_fits_or_is_refused(name: str, family: str) -> None:
    """And what fits leaves at least one token, of an image of any size."""
    method = standard_method(name)
    assert method is not None
    budgets = ",".join(f"{field}={getattr(method, field)}" for field in method.budgets())
    try:
        found = selection_for(f"{name}:{budgets}".rstrip(":"), family, 32)
    except InputError:
        return
    assert found is not None
    for tokens in (1, 4, 577, 2880):
        assert 1 <= found.left(Picture(tokens)) <= tokens


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="Did you mean 'divprune'"):
        selection_for("divprun:64", LLAVA, 32)
    with pytest.raises(InputError, match="not possible with LlamaForCausalLM: LLaVA"):
        selection_for("divprune:64", "LlamaForCausalLM", 32)
    assert selection_for("none", LLAVA, 32) is None


def test_what_is_asked_for() -> None:
    assert asked_for("divprune:64", ["vlm_prune"]) == "divprune:64"
    assert asked_for(None, ["max_position_embeddings"]) is None
    with pytest.raises(InputError, match="vlm_prune=64 in hf_overrides is not valid"):
        asked_for(64, ["vlm_prune"])
    with pytest.raises(InputError, match="Did you mean 'vlm_prune'"):
        asked_for(None, ["vlm-prune"])


@pytest.mark.parametrize("text", ["divprune:577", "visionzip:dominant=570,contextual=10"])
def test_a_count_above_the_images_tokens(text: str) -> None:
    with pytest.raises(InputError, match="an image has 576 visual tokens at most"):
        check_budget(selection(text), 576, "LLaVA-1.5")
    check_budget(selection("divprune:576"), 576, "LLaVA-1.5")


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
def test_engine_versions(version: str) -> None:
    check_version("0.32.0+cpu")
    with pytest.raises(InputError, match=f"this is vLLM {version}: from 0.32 to below 0.33"):
        check_version(version)


def test_identities_differ_with_the_method() -> None:
    texts = ["holov:64", "holov:65", "holov:64,crops=4", "divprune:64", "divprune:0.25"]
    assert len({selection(text).identity for text in texts}) == len(texts)
