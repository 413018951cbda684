"""Numbers of other libraries and seeds as parameters of methods."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import vlm_prune_ext as vp
from vlm_prune_ext.experiment.settings import method_as_json, resolve
from vlm_prune_ext.select import random_places


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (vp.RandomDrop(keep=np.int64(100), seed=np.int32(3)), vp.RandomDrop(keep=100, seed=3)),
        (vp.RandomDrop(keep=np.float32(0.5)), vp.RandomDrop(keep=0.5)),
        (vp.FastV(np.int8(2), np.uint16(64)), vp.FastV(2, 64)),
        (vp.HiMAP(attn_txt_rank=np.int64(288)), vp.HiMAP(attn_txt_rank=288)),
        (vp.Downsample(keep=np.int64(64)), vp.Downsample(keep=64)),
        (vp.CustomSelection(kept_tokens=np.int64(9)), vp.CustomSelection(kept_tokens=9)),
        (
            vp.SAINT(start=np.int64(3), vit=vp.SAINTViT(layers=[np.int64(3)], keep_num=np.int8(5))),
            vp.SAINT(start=3, vit=vp.SAINTViT(layers=(3,), keep_num=5)),
        ),
    ],
)
def test_numpy_numbers_are_what_python_s_are(given: Any, plain: Any) -> None:
    assert given == plain and given.label() == plain.label()
    assert json.dumps(method_as_json(given)) == json.dumps(method_as_json(plain))


@pytest.mark.parametrize("value", [np.int64(0), np.float64(1.5), np.bool_(True), np.float32("nan")])
def test_numpy_numbers_are_checked_as_well(value: object) -> None:
    with pytest.raises(vp.InputError, match=r"keep=.* is not valid: an integer of at least 1"):
        vp.RandomDrop(keep=value)


def test_seeds_end_where_torch_s_do() -> None:
    last = 2**63 - 1
    assert vp.RandomDrop(keep=2, seed=last).seed == last
    assert random_places(5, 2, last).shape == (2,)
    for seed in (last + 1, 2**70, -1, 1.0, True):
        for make in (vp.RandomDrop, vp.CustomSelection):
            with pytest.raises(vp.InputError, match=r"seed=.* from 0 to 9223372036854775807"):
                make(2, seed=seed) if make is vp.RandomDrop else make(seed=seed)
        with pytest.raises(vp.InputError, match=r"seed=.* \(2\*\*63 - 1\)"):
            resolve({"seed": seed})
