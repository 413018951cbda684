"""Selections alone against the published reference codes: attention maps and keys, no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_prune_ext.methods.base import Evidence, Method
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.himap import HiMAP
from vlm_prune_ext.methods.saint import (
    SAINT,
    SaintRanking,
    SAINTViT,
    iterative_keep,
    saint_drop,
    saint_ranking,
)
from vlm_prune_ext.select import mean_over_heads, top_k_ascending

FOLDER = Path(__file__).parents[1] / "golden"


def saint_kept_raw(metric: torch.Tensor, ranking: SaintRanking) -> torch.Tensor:
    """The published code's answer: one drop count for a batch (the average of the rows' counts,
    rounded down), surviving even places by falling rank, then the odd ones."""
    batch, n = metric.shape[:2]
    places = torch.arange(n).expand(batch, n)
    drop = int(ranking.counts.sum()) // batch
    return torch.cat([ranking.order[:, drop:], places[:, 1::2]], dim=1) if drop else places


def items(name: str, kind: str) -> list[dict]:
    found = json.loads((FOLDER / f"{name}.json").read_text())["items"]
    return [item for item in found if item["kind"] == kind]


@pytest.fixture(scope="module")
def maps() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "pure_attention.safetensors")


@pytest.fixture(scope="module")
def keys() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "pure_keys.safetensors")


def with_text(kept: torch.Tensor, item: dict, image: int) -> torch.Tensor:
    """Places in the image -> absolute indices with all text, as the golden files have them."""
    start, end = item["sys"], item["sys"] + image
    text = [torch.arange(start), torch.arange(end, end + item["tail"])]
    return torch.cat([text[0], kept + start, text[1]])


def seen(total: int, attention: torch.Tensor, places: torch.Tensor | None = None) -> Evidence:
    if places is None:
        places = torch.arange(total)[None]
    return Evidence(total=total, places=places, attention=attention[None])


def only_rule(method: Method, layer: int, evidence: Evidence) -> torch.Tensor:
    stage = next(stage for stage in method.decoder_stages(32) if stage.layer == layer)
    return stage.rule(evidence)


FASTV = [(item, rank) for item in items("pure_attention", "fastv") for rank in item["ranks"]]


@pytest.mark.parametrize(("item", "rank"), FASTV, ids=[f"{i['index']}-{r}" for i, r in FASTV])
def test_fastv(item: dict, rank: int, maps: dict[str, torch.Tensor]) -> None:
    name, image = f"fastv.{item['index']}", item["img"]
    last = maps[f"{name}.attention"].mean(0)[-1, item["sys"] : item["sys"] + image]
    want = maps[f"{name}.rank{rank}.kept"]
    assert torch.equal(with_text(top_k_ascending(last[None], rank)[0], item, image), want)
    kept = only_rule(FastV(agg_layer=3, attention_rank=rank), 3, seen(image, last))
    assert torch.equal(with_text(kept[0], item, image), want)


HIMAP = [(item, *ranks) for item in items("pure_attention", "himap") for ranks in item["ranks"]]


@pytest.mark.parametrize(
    ("item", "txt", "img"), HIMAP, ids=[f"{i['index']}-{t}-{v}" for i, t, v in HIMAP]
)
def test_himap(item: dict, txt: int, img: int, maps: dict[str, torch.Tensor]) -> None:
    name, image, start = f"himap.{item['index']}", item["img"], item["sys"]
    method = HiMAP(attn_txt_rank=txt, attn_img_rank=img)
    received = maps[f"{name}.attention_txt"].mean(0)[start + image :].sum(0)[start : start + image]
    kept = only_rule(method, method.attn_txt_layer, seen(image, received))
    want = maps[f"{name}.rank{txt}_{img}.kept_txt"]
    assert torch.equal(with_text(kept[0], item, image), want)

    block = maps[f"{name}.rank{txt}_{img}.attention_img"].mean(0)[start : start + txt]
    received = block.sum(0)[start : start + txt]
    assert method.attn_img_layer is not None
    places = only_rule(method, method.attn_img_layer, seen(image, received, kept))
    want = maps[f"{name}.rank{txt}_{img}.kept_img"]
    assert torch.equal(with_text(kept.gather(1, places)[0], item, image), want)


DROP = [(item, q) for item in items("pure_keys", "saint_drop") for q in range(len(item["params"]))]


@pytest.mark.parametrize(("item", "q"), DROP, ids=[f"{i['index']}-{q}" for i, q in DROP])
def test_saint_drop(item: dict, q: int, keys: dict[str, torch.Tensor]) -> None:
    name, params = f"saint_drop.{item['index']}", item["params"][q]
    metric = mean_over_heads(keys[f"{name}.keys"])
    ranking = saint_ranking(metric, *params)
    raw = saint_kept_raw(metric, ranking)
    assert torch.equal(raw, keys[f"{name}.params{q}.kept_raw"])
    sorted_kept = keys[f"{name}.params{q}.kept_sorted"]
    assert torch.equal(raw.sort(dim=1).values, sorted_kept)

    mask = saint_drop(metric, *params)
    assert torch.equal((~mask).sum(dim=1), ranking.counts)
    for row in range(item["B"]):
        if item["B"] == 1:
            want = sorted_kept[0]
        else:  # each row has its own count here: the same ranking, cut at that count
            dropped = ranking.order[row, : ranking.counts[row]]
            want = torch.tensor([i for i in range(item["N"]) if i not in dropped.tolist()])
        assert torch.equal(mask[row].nonzero()[:, 0], want)


@pytest.mark.parametrize(("item", "q"), DROP, ids=[f"{i['index']}-{q}" for i, q in DROP])
def test_saint_rule(item: dict, q: int, keys: dict[str, torch.Tensor]) -> None:
    """The rule through the method, each row alone: what the reference does for one sample."""
    threshold, neighbors, gamma = item["params"][q]
    method = SAINT(start=4, end=4, threshold=threshold, min_neighbors=neighbors, gamma=gamma)
    for row in keys[f"saint_drop.{item['index']}.keys"].split(1):
        places = torch.arange(item["N"])[None]
        mask = only_rule(method, 5, Evidence(total=item["N"], places=places, keys=row))
        metric = mean_over_heads(row)
        alone = saint_kept_raw(metric, saint_ranking(metric, *item["params"][q]))
        assert torch.equal(mask[0].nonzero()[:, 0], alone[0].sort().values)


ROUNDS = [
    (item, q)
    for item in items("pure_keys", "iterative_drop_full_graph")
    for q in range(len(item["params"]))
]


@pytest.mark.parametrize(("item", "q"), ROUNDS, ids=[f"{i['index']}-{q}" for i, q in ROUNDS])
def test_iterative(item: dict, q: int, keys: dict[str, torch.Tensor]) -> None:
    name, (keep_num, r) = f"iterative.{item['index']}", item["params"][q]
    patches = keys[f"{name}.keys"][None, :, 1:]
    want = keys[f"{name}.params{q}.kept_patches"]
    kept, rounds = iterative_keep(mean_over_heads(patches), keep_num, r)
    assert torch.equal(kept[0], want)
    assert rounds == item["dropped_per_round"][q]
    (stage,) = SAINTViT(layers=(2,), keep_num=keep_num, r=r).stages(6, 4)
    assert torch.equal(stage.rule(patches)[0], want)


def test_known_schedule(keys: dict[str, torch.Tensor]) -> None:
    metric = mean_over_heads(keys["iterative.2.keys"][None, :, 1:])
    assert iterative_keep(metric, 376, 16)[1] == [36, 15, 35, 14, 34, 13, 33, 12, 9]


VIT = [
    (path.stem, run, layer, keep_num, r)
    for path in sorted(FOLDER.glob("saint_vit_*.json"))
    for run in json.loads(path.read_text())["runs"]
    for layer, keep_num, r in zip(
        run.get("layers", []), run.get("keep_num", []), run.get("r", []), strict=True
    )
]


@pytest.mark.parametrize(
    ("case", "run", "layer", "keep_num", "r"),
    VIT,
    ids=[f"{c}-{r['name']}-{i}" for c, r, i, *_ in VIT],
)
def test_iterative_on_tower_keys(case: str, run: dict, layer: int, keep_num: int, r: int) -> None:
    tensors = load_file(FOLDER / f"{case}.safetensors")
    event = f"run.{run['name']}.event.{layer}"
    kept, rounds = iterative_keep(tensors[f"{event}.metric"][None, 1:], keep_num, r)
    assert torch.equal(kept[0], tensors[f"{event}.kept_relative"])
    assert rounds == tensors[f"{event}.dropped_per_round"].tolist()


LLM = [
    (path.stem, run, layer)
    for path in sorted(FOLDER.glob("saint_llm_*.json"))
    if path.stem != "saint_llm_large"  # its metrics are not stored
    for run in json.loads(path.read_text())["runs"]
    if run["mode"] == "saint"
    for layer in range(run["start"], run["end"] + 1)
]


@pytest.mark.parametrize(
    ("case", "run", "layer"), LLM, ids=[f"{c}-{r['name']}-{i}" for c, r, i in LLM]
)
def test_saint_drop_on_model_keys(case: str, run: dict, layer: int) -> None:
    tensors = load_file(FOLDER / f"{case}.safetensors")
    event = f"run.{run['name']}.event.{layer}"
    metric = tensors[f"{event}.metric"][None]
    raw = saint_kept_raw(metric, saint_ranking(metric, run["threshold"], 5, 10.0))
    assert torch.equal(raw[0], tensors[f"{event}.kept_image_relative_raw"])
