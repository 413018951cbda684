"""Rules behind the tower against the published codes: selection alone, on given tensors."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tests.golden_cases import Case, close, load_case, run_ids, runs
from vlm_prune_ext.methods.cdpruner import cdpruner, relevance
from vlm_prune_ext.methods.divprune import max_min_order
from vlm_prune_ext.methods.fastervlm import fastervlm
from vlm_prune_ext.methods.holov import (
    SCALE,
    holov,
    run_budgets,
    run_scores,
    run_sizes,
    share_surplus,
    take_runs,
)
from vlm_prune_ext.methods.prumerge import prumerge, prumerge_plus
from vlm_prune_ext.methods.scope import coverage_order
from vlm_prune_ext.methods.visionzip import visionzip
from vlm_prune_ext.methods.vispruner import vispruner
from vlm_prune_ext.select import single_head_attention


def items(method: str) -> list[tuple[dict, dict]]:
    found = load_case_info()["items"]
    return [(i, r) for i in found if i["method"] == method for r in i["runs"]]


@lru_cache(maxsize=1)
def load_case_info() -> dict:
    return load_case("vision_pure").info


def ids(pairs: list[tuple[dict, dict]]) -> list[str]:
    return [f"{item['name']}-{run['name']}" for item, run in pairs]


def given(item: dict, name: str) -> torch.Tensor:
    return load_case("vision_pure").tensors[f"{item['name']}.{name}"]


def want(item: dict, run: dict, name: str) -> torch.Tensor:
    return given(item, f"{run['name']}.{name}")


DIVPRUNE, SCOPE = items("divprune"), items("scope")
HOLOV, CDPRUNER, VISPRUNER = items("holov"), items("cdpruner"), items("vispruner")


@pytest.mark.parametrize(("item", "run"), DIVPRUNE, ids=ids(DIVPRUNE))
def test_divprune(item: dict, run: dict) -> None:
    count = round(run["ratio"] * item["N"])
    order = max_min_order(given(item, "features")[None], count)
    assert torch.equal(order[0], want(item, run, "order"))


@pytest.mark.parametrize(("item", "run"), SCOPE, ids=ids(SCOPE))
def test_scope(item: dict, run: dict) -> None:
    saliency = given(item, "attention").sum(dim=1)
    order = coverage_order(given(item, "features"), saliency, run["budget"])
    assert torch.equal(order, want(item, run, "order"))


@pytest.mark.parametrize(("item", "run"), VISPRUNER, ids=ids(VISPRUNER))
def test_vispruner(item: dict, run: dict) -> None:
    features, attention = given(item, "features"), given(item, "attention")
    kept = vispruner(features, attention, run["budget"], run["important_ratio"])
    assert torch.equal(kept, want(item, run, "kept"))


@pytest.mark.parametrize(("item", "run"), CDPRUNER, ids=ids(CDPRUNER))
def test_cdpruner(item: dict, run: dict) -> None:
    """Several images: the reference's answer for each alone."""
    weight = relevance(given(item, "image_embeds"), given(item, "text_embeds")[None])
    kept = cdpruner(given(item, "features"), weight, run["budget"])
    assert torch.equal(kept, want(item, run, "kept_alone" if item["B"] > 1 else "kept"))


@pytest.mark.parametrize(("item", "run"), HOLOV, ids=ids(HOLOV))
def test_holov(item: dict, run: dict) -> None:
    """Steps as published, runs of one token unscaled and no surplus shared out, as there."""
    features, attention = given(item, "features"), given(item, "attention")
    crops, budget = run["crops"], run["budget"]
    sizes = torch.tensor(run_sizes(item["N"], crops))
    scores = run_scores(features, attention, crops)
    scores = torch.where(sizes == 1, scores / SCALE, scores)
    budgets = run_budgets(scores, budget).minimum(sizes)
    expected = want(item, run, "places")
    for image in range(item["B"]):
        places = expected[image][expected[image] >= 0]
        got = take_runs(attention[image, None], budgets[image, None], int(budgets[image].sum()))
        assert torch.equal(got[0, : len(places)], places)
        assert len(places) == min(budget, int(budgets[image].sum()))
    ours = holov(features, attention, budget, crops)
    if run["zero_rows"] == 0 and min(sizes) > 1:
        assert torch.equal(ours, expected)
    for row in ours.tolist():  # exactly the budget, and no rows of zeros
        assert len(set(row)) == budget
        assert min(row) >= 0


def test_holov_shares_the_surplus_in_turns() -> None:
    budgets, sizes = torch.tensor([[9, 1, 0, 2]]), [3, 4, 4, 4]
    scores = torch.tensor([[9.0, 2.0, 1.0, 3.0]])
    assert share_surplus(budgets, scores, sizes).tolist() == [[3, 3, 2, 4]]
    assert share_surplus(torch.tensor([[15, 0, 0, 0]]), scores, sizes).tolist() == [[3, 4, 4, 4]]


# -- the runs on whole models, from what the tower gives -----------------------------------------
METHODS = (
    "fastervlm",
    "vispruner",
    "divprune",
    "cdpruner",
    "scope",
    "visionzip",
    "prumerge",
    "prumerge_plus",
    "holov",
)


def model_runs(*methods: str) -> list[tuple[str, dict]]:
    names = ("small", "576")
    return [
        pair for m in methods for n in names for pair in runs(f"{m}_{n}") if m == method_of(pair[0])
    ]


def method_of(case: str) -> str:
    return case.rpartition("_")[0]


class Given:
    """What the tower gives in one run, and what its images are to become."""

    def __init__(self, name: str, run: dict) -> None:
        case: Case = load_case(name)
        self.model = load_case(case.info["model"])
        self.prefix = "batch_" if "images" in run else ""
        self.wanted = case.of(run["name"])
        self.images = run.get("images", 1)

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.model.tensors[self.prefix + name]

    def want(self, name: str) -> list[torch.Tensor]:
        if not self.prefix:
            return [self.wanted[name]]
        return [self.wanted[f"image{i}.{name}"] for i in range(self.images)]

    @property
    def patches(self) -> torch.Tensor:
        return self.hidden[:, 1:]

    @property
    def projected(self) -> torch.Tensor:
        return self.model.tensors["off.projected"][None]


PLAIN = model_runs("fastervlm", "vispruner", "scope")


@pytest.mark.parametrize(("name", "run"), PLAIN, ids=run_ids(PLAIN))
def test_patches_that_stay(name: str, run: dict) -> None:
    see, method = Given(name, run), method_of(name)
    if method == "fastervlm":
        kept = fastervlm(see.cls_attention, run["budget"])
    elif method == "vispruner":
        ratio = run["important_ratio"]
        kept = vispruner(see.patches, see.cls_attention, run["budget"], ratio)
    else:
        order = coverage_order(see.patches, see.cls_attention.sum(dim=1), run["budget"])
        assert torch.equal(order, torch.stack(see.want("order")))
        kept = order.sort(dim=1).values
    assert torch.equal(kept, torch.stack(see.want("kept")))


PROJECTED = model_runs("divprune", "cdpruner")


@pytest.mark.parametrize(("name", "run"), PROJECTED, ids=run_ids(PROJECTED))
def test_projected_tokens_that_stay(name: str, run: dict) -> None:
    see, method = Given(name, run), method_of(name)
    if method == "divprune":
        order = max_min_order(see.projected, run["tokens"])
        assert torch.equal(order, torch.stack(see.want("order")))
        return
    text = see.model.tensors[f"text_embeds.{run['text']}"]
    kept = cdpruner(see.projected, relevance(see.image_embeds, text[None]), run["budget"])
    assert torch.equal(kept, torch.stack(see.want("kept")))


VISIONZIP = model_runs("visionzip")


@pytest.mark.parametrize(("name", "run"), VISIONZIP, ids=run_ids(VISIONZIP))
def test_visionzip(name: str, run: dict) -> None:
    see = Given(name, run)
    zipped = visionzip(see.hidden, see.cls_attention, see.keys, run["dominant"], run["contextual"])
    assert torch.equal(zipped.kept, torch.stack(see.want("kept")))
    close(zipped.tokens, torch.stack(see.want("features")))


PRUMERGE = model_runs("prumerge", "prumerge_plus")


@pytest.mark.parametrize(("name", "run"), PRUMERGE, ids=run_ids(PRUMERGE))
def test_prumerge(name: str, run: dict) -> None:
    see = Given(name, run)
    attention = single_head_attention(see.last_keys, see.last_query_cls[:, None])
    seen = (see.patches, see.last_keys[:, 1:], attention, run["ratio"], run["neighbours"])
    if method_of(name) == "prumerge_plus":
        merged = prumerge_plus(*seen, stop=run["stop"])
    else:
        merged = prumerge(*seen)
    for image, (centres, features) in enumerate(
        zip(see.want("centres"), see.want("features"), strict=True)
    ):
        count = int(merged.counts[image])
        assert torch.equal(merged.centres[image, :count], centres)
        close(merged.tokens[image, : count + 1], features)


HOLOV_RUNS = [pair for pair in model_runs("holov") if "images" not in pair[1]]


@pytest.mark.parametrize(("name", "run"), HOLOV_RUNS, ids=run_ids(HOLOV_RUNS))
def test_holov_on_models(name: str, run: dict) -> None:
    see = Given(name, run)
    attention = see.cls_attention.mean(dim=1)
    places = holov(see.projected, attention, run["budget"], run["crops"])
    assert torch.equal(places, torch.stack(see.want("places")))
