"""One table of methods for every test that takes them in turn: a new method is a line here.

Settings fit decoders of five or more layers, towers of five, and images of 14 or more visual
tokens (of the CLIP towers: 16 patches, 17 tokens with CLS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vlm_prune_ext as vp
from tests import makers

VIT = vp.SAINTViT(layers=(1, 3), keep_num=(13, 10), r=3)


def custom(name: str) -> vp.CustomSelection:
    return vp.CustomSelection(method=name, kept_tokens=0.5, agg_layer=2)


METHODS: dict[str, Any] = {
    "fastv": vp.FastV(agg_layer=2, attention_rank=0.4),
    "fastv-count": vp.FastV(agg_layer=3, attention_rank=7),
    "fastv-mask": vp.FastV(agg_layer=2, attention_rank=0.4, mode="mask"),
    "himap": vp.HiMAP(attn_txt_layer=1, attn_txt_rank=0.6, attn_img_layer=3, attn_img_rank=0.3),
    "himap-one-stage": vp.HiMAP(attn_txt_layer=2, attn_txt_rank=6, attn_img_layer=None),
    "saint": vp.SAINT(start=1, end=3, threshold=0.1, min_neighbors=1),
    "saint-last": vp.SAINT(start=4, end=4, threshold=0.1, min_neighbors=2),
    "custom-attention": custom("attention"),
    "custom-sampling": custom("sampling"),
    "custom-similarity": custom("similarity"),
    "custom-norm": custom("norm"),
    "custom-uniform": custom("uniform"),
    "custom-random": custom("random"),
    "random": vp.RandomDrop(keep=0.5),
    "random-count": vp.RandomDrop(keep=9),
    "random-later": vp.RandomDrop(keep=0.5, layer=3),
    "vtw": vp.VTW(layer=2),
    "pdrop": vp.PyramidDrop(layers=(1, 3), ratios=(0.6, 0.3)),
    "dart": vp.DART(layer=2, max_num_trunction=6, pivot_image_token=2, pivot_text_token=1),
    "sparsevlm": vp.SparseVLM(stages=((1, 9), (3, 4))),
    "sparsevlm_plus": vp.SparseVLMPlus(stages=((1, 9), (3, 4))),
    "feather": vp.FEATHER(layers=(1, 3), reduction_ratio=0.4),
    "saint-vit": vp.SAINT(start=None, vit=VIT),
    "saint-hybrid": vp.SAINT(start=1, end=3, threshold=0.1, min_neighbors=1, vit=VIT),
    "downsample": vp.Downsample(keep=0.25),
    "visionzip": vp.VisionZip(dominant=5, contextual=3),
    "fastervlm": vp.FasterVLM(budget=6),
    "vispruner": vp.VisPruner(budget=7),
    "divprune": vp.DivPrune(ratio=0.4),
    "cdpruner": vp.CDPruner(budget=5, text_tower=makers.text_tower()),
    "prumerge": vp.PruMerge(ratio=0.25),
    "prumerge_plus": vp.PruMergePlus(),
    "scope": vp.SCOPE(budget=8),
    "holov": vp.HoloV(budget=6, crops=3),
}

KEEP_ALL: dict[str, Any] = {
    "fastv": vp.FastV(agg_layer=2, attention_rank=1.0),
    "fastv-mask": vp.FastV(agg_layer=2, attention_rank=1.0, mode="mask"),
    "himap": vp.HiMAP(attn_txt_layer=1, attn_txt_rank=1.0, attn_img_layer=3, attn_img_rank=1.0),
    "saint": vp.SAINT(start=1, end=3, threshold=1.0, min_neighbors=10**6),
    "custom-attention": vp.CustomSelection(kept_tokens=1.0, agg_layer=2),
    "random": vp.RandomDrop(keep=1.0),
    "random-later": vp.RandomDrop(keep=1.0, layer=3),
    "pdrop": vp.PyramidDrop(layers=(1, 3), ratios=(1.0, 1.0)),
    "dart": vp.DART(layer=2, max_num_trunction=999),
    "sparsevlm": vp.SparseVLM(stages=((1, 999),)),
    "sparsevlm_plus": vp.SparseVLMPlus(stages=((1, 999),)),
    "feather": vp.FEATHER(layers=(1, 3), reduction_ratio=0.0),
    "saint-hybrid": vp.SAINT(
        start=1,
        end=3,
        threshold=1.0,
        min_neighbors=10**6,
        vit=vp.SAINTViT(layers=(2,), keep_num=17),
    ),
    "downsample": vp.Downsample(keep=1.0),
    "divprune": vp.DivPrune(ratio=1.0),
}
"""The same, keeping everything. VTW, VisionZip and PruMerge cannot: they drop all, hand on CLS, or
hand on sums of patches."""

KEEP_ALL_OF_ONE_CROP: dict[str, Any] = {
    "fastervlm": vp.FasterVLM(budget=1.0),
    "vispruner": vp.VisPruner(budget=1.0),
    "cdpruner": vp.CDPruner(budget=1.0, text_tower=makers.text_tower()),
    "scope": vp.SCOPE(budget=1.0),
    "holov": vp.HoloV(budget=1.0, crops=3),
}
"""Of a picture in crops these leave out row-end tokens, as published."""


def share(ratio: float) -> Callable[[int], int]:
    return lambda visual: round(ratio * visual)


def count(tokens: int) -> Callable[[int], int]:
    return lambda visual: tokens


LEFT: dict[str, Callable[[int], int]] = {
    "fastv": share(0.4),
    "fastv-count": count(7),
    "fastv-mask": share(0.4),
    "himap": share(0.3),
    "himap-one-stage": count(6),
    **dict.fromkeys([name for name in METHODS if name.startswith("custom")], share(0.5)),
    "random": share(0.5),
    "random-count": count(9),
    "random-later": share(0.5),
    "vtw": count(0),
    "pdrop": lambda visual: int(0.3 * visual),  # rounds down, as published
    "dart": count(8),
    "sparsevlm": count(5),
    "sparsevlm_plus": count(4),
    "divprune": share(0.4),
}
"""Visual tokens of one image behind the last drop, of as many in front of the first."""

LEFT_OF_A_CROP = {
    "saint-vit": 9,
    "downsample": 4,
    "visionzip": 8,
    "fastervlm": 6,
    "vispruner": 7,
    "cdpruner": 5,
    "prumerge": 5,
    "scope": 8,
    "holov": 6,
}
"""The same of those that work on each crop of 16 patches."""


def pick(*names: str) -> dict[str, Any]:
    """Some of the methods, in this order; ``none`` is the unpruned model."""
    return {name: None if name == "none" else METHODS[name] for name in names}


DECODER = {name: m for name, m in METHODS.items() if set(m.working_sites) == {"decoder"}}
"""Those that need no tower."""
TOWER = {name: method for name, method in METHODS.items() if name not in DECODER}
"""Those that work in it or right behind it."""
EVERYWHERE = ("fastv", "himap", "saint", "custom-attention", "random")
"""The main kinds, for tests that are slow or of many models."""
