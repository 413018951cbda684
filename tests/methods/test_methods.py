"""Methods as such: hyper-parameters, their limits, their rules, their names. No model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Evidence, Method
from vlm_prune_ext.methods.custom import CustomSelection
from vlm_prune_ext.methods.downsample import Downsample
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.himap import HiMAP
from vlm_prune_ext.methods.random_drop import RandomDrop
from vlm_prune_ext.methods.registry import (
    METHODS,
    get_method,
    parse_method,
    settings_method,
    standard_method,
)
from vlm_prune_ext.methods.saint import PRUNE_MODE, SAINT, SAINTViT, saint_drop
from vlm_prune_ext.methods.sparsevlm import SparseVLM

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    if not path.name.startswith("profile_")  # grids: see test_profile.py
]
CLASSES = [cls for cls in METHODS.values() if cls is not None]


def evidence(batch: int = 3, n: int = 36, total: int | None = None, seed: int = 0) -> Evidence:
    g = torch.Generator().manual_seed(seed)
    return Evidence(
        total=total or n,
        places=torch.arange(n).expand(batch, n),
        attention=torch.randn(batch, n, generator=g).softmax(-1),
        keys=torch.randn(batch, 2, n, 8, generator=g),
        hidden=torch.randn(batch, n, 16, generator=g),
        sample=tuple(range(batch)),
    )


def row_of(seen: Evidence, row: int) -> Evidence:
    parts = {
        name: getattr(seen, name)[row : row + 1]
        for name in ("places", "attention", "keys", "hidden")
    }
    return Evidence(total=seen.total, sample=(0,), **parts)


def run_rule(method: Method, seen: Evidence, stage: int = 0) -> torch.Tensor:
    return method.decoder_stages(32)[stage].rule(seen)


def pick_first(evidence: Evidence, keep: int) -> torch.Tensor:
    """A user's selection: the first tokens, told backwards."""
    return torch.arange(keep).flip(0).expand(evidence.places.shape[0], keep)


def make(keep: int | float) -> list[Method]:
    """Every method with a count, at one budget."""
    customs = [
        CustomSelection(method=name, kept_tokens=keep)
        for name in ("attention", "sampling", "similarity", "norm", "uniform", "random", pick_first)
    ]
    one_stage = [FastV(attention_rank=keep), RandomDrop(keep)]
    return [*one_stage, HiMAP(attn_txt_rank=keep, attn_img_layer=None), *customs]


# -- rules -----------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [1, 9, 36, 0.25, 1.0])
@pytest.mark.parametrize("index", range(len(make(9))))
def test_rule_keeps_what_the_budget_says(index: int, keep: int | float) -> None:
    method, seen = make(keep)[index], evidence()
    kept = run_rule(method, seen)
    count = keep if isinstance(keep, int) else round(36 * keep)
    assert kept.dtype == torch.int64 and kept.shape == (3, count)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0 and kept.max() < 36


@pytest.mark.parametrize("index", range(len(make(9))))
def test_batch_equals_single_rows(index: int) -> None:
    method, seen = make(9)[index], evidence(batch=4, seed=3)
    kept = run_rule(method, seen)
    for row in range(4):
        assert torch.equal(run_rule(method, row_of(seen, row))[0], kept[row])


def test_saint_batch_equals_single_rows() -> None:
    seen = evidence(batch=4, seed=3)
    method = SAINT(threshold=0.3, min_neighbors=3)
    mask = run_rule(method, seen)
    assert mask.dtype == torch.bool and len(set(mask.sum(1).tolist())) > 1
    for row in range(4):
        assert torch.equal(run_rule(method, row_of(seen, row))[0], mask[row])


@pytest.mark.parametrize("index", range(len(make(9))))
def test_count_above_the_tokens_present(index: int) -> None:
    kept = run_rule(make(37)[index], evidence())
    assert torch.equal(kept, torch.arange(36).expand(3, 36))


def test_attention_rules_keep_the_most_attended() -> None:
    seen = evidence()
    want = seen.attention.topk(7).indices.sort(dim=1).values
    for method in (FastV(attention_rank=7), CustomSelection(kept_tokens=7)):
        assert torch.equal(run_rule(method, seen), want)


def test_norm_keeps_the_largest() -> None:
    seen = evidence()
    seen.hidden[:, [4, 20]] *= 100
    kept = run_rule(CustomSelection(method="norm", kept_tokens=2), seen)
    assert kept.tolist() == [[4, 20]] * 3


def test_similarity_drops_the_crowd() -> None:
    seen = evidence()
    crowd = torch.randn(8, generator=torch.Generator().manual_seed(1))
    loners = [3, 17, 30]
    alone = seen.keys[:, :, loners].clone()
    seen.keys[:] = crowd + 0.01 * seen.keys
    seen.keys[:, :, loners] = alone - 2 * crowd * (alone @ crowd / crowd.dot(crowd))[..., None]
    kept = run_rule(CustomSelection(method="similarity", kept_tokens=3), seen)
    assert kept.tolist() == [loners] * 3


def test_sampling_temperature_and_seed_matter() -> None:
    seen = evidence()

    def draw(**fields: float) -> torch.Tensor:
        return run_rule(CustomSelection(method="sampling", kept_tokens=9, **fields), seen)

    assert torch.equal(draw(temperature=1e-6), run_rule(CustomSelection(kept_tokens=9), seen))
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


def test_random_draw_depends_on_count_and_seed_only() -> None:
    one, two = evidence(batch=1), evidence(batch=5, seed=9)
    method = RandomDrop(9, seed=4)
    assert torch.equal(run_rule(method, one).expand(5, 9), run_rule(method, two))
    assert not torch.equal(run_rule(method, one), run_rule(RandomDrop(9, seed=5), one))
    alike = CustomSelection(method="random", kept_tokens=9, seed=4)
    assert torch.equal(run_rule(alike, one), run_rule(method, one))


def test_himap_stages() -> None:
    method = HiMAP(attn_txt_layer=3, attn_txt_rank=20, attn_img_layer=6, attn_img_rank=0.25)
    text, image = method.decoder_stages(12)
    assert (text.layer, text.needs, image.layer, image.needs) == (
        3,
        ("attention:text",),
        6,
        ("attention:visual",),
    )
    left = evidence(n=20, total=36)
    assert image.rule(left).shape == (3, 9)  # a ratio is of the tokens at layer 0
    assert len(HiMAP(attn_img_layer=None, attn_img_rank=None).decoder_stages(12)) == 1
    more = HiMAP(attn_txt_rank=20, attn_img_rank=0.75).decoder_stages(12)[1].rule(left)
    assert more.tolist() == [list(range(20))] * 3  # more than there is: all of it


def test_saint_stages_and_positions() -> None:
    method = SAINT(start=2, end=4, threshold=0.3)
    assert [stage.layer for stage in method.decoder_stages(6)] == [3, 4, 5]
    assert {stage.needs for stage in method.decoder_stages(6)} == {("keys",)}
    assert SAINT(start=5, end=5).decoder_stages(6)[0].layer == 6
    seen = evidence()
    want = saint_drop(seen.keys.mean(1), 0.3, 5, 10.0)
    assert torch.equal(method.decoder_stages(6)[0].rule(seen), want)
    assert [method.decode_position_shift(i) for i in range(3)] == [0, 0, 0]
    faithful = dataclasses.replace(method, reference_positions=True)
    assert [faithful.decode_position_shift(i) for i in range(3)] == [0, 1, 1]


def test_saint_in_the_tower() -> None:
    method = SAINT(start=None, vit=SAINTViT(layers=(1, 3), keep_num=(14, 8), r=(4, 3)))
    assert method.decoder_stages(2) == ()
    stages = method.vision_stages(6, 4)
    assert [stage.layer for stage in stages] == [1, 3]
    keys = torch.randn(2, 2, 16, 8)
    kept = stages[0].rule(keys)
    assert kept.shape == (2, 13)
    assert stages[1].rule(keys[:, :, :13]).shape == (2, 7)
    for row in range(2):
        assert torch.equal(stages[0].rule(keys[row : row + 1])[0], kept[row])
    everywhere = SAINTViT(layers=None, keep_num=9).stages(6, 4)
    assert [stage.layer for stage in everywhere] == [0]
    one_by_one = SAINTViT(layers=(0, 1, 2, 3, 4), keep_num=9).stages(6, 4)
    kept = everywhere[0].rule(keys)
    assert torch.equal(kept, one_by_one[0].rule(keys))
    assert one_by_one[1].rule(keys[:, :, :8]).tolist() == [list(range(8))] * 2


def test_downsample() -> None:
    grid = torch.randn(2, 24, 24, 8)
    for keep, side in ((144, 12), (100, 10), (99, 9), (1, 1), (0.25, 12)):
        small = Downsample(keep).resize(grid)
        assert small is not None and small.shape == (2, side, side, 8)
    torch.testing.assert_close(Downsample(1).resize(grid)[:, 0, 0], grid.mean((1, 2)))
    assert Downsample(576).resize(grid) is None
    assert Downsample(1.0).resize(grid) is None
    assert Downsample(577).resize(grid) is None


# -- a user's own selection --------------------------------------------------------------------
def test_own_selection_by_name_and_by_function() -> None:
    for own in (pick_first, f"{__name__}:pick_first"):
        kept = run_rule(CustomSelection(method=own, kept_tokens=4), evidence())
        assert kept.tolist() == [[0, 1, 2, 3]] * 3


def test_own_selection_says_what_it_needs() -> None:
    (stage,) = CustomSelection(method=pick_first).decoder_stages(12)
    assert stage.needs == ("attention:last", "keys", "hidden")
    (stage,) = CustomSelection(method=pick_first, agg_layer=0).decoder_stages(12)
    assert stage.needs == ("hidden",)

    def by_text(evidence: Evidence, keep: int) -> torch.Tensor:
        return pick_first(evidence, keep)

    by_text.needs = ("attention:text",)
    (stage,) = CustomSelection(method=by_text).decoder_stages(12)
    assert stage.needs == ("attention:text",)
    with pytest.raises(InputError, match="agg_layer=0"):
        CustomSelection(method=by_text, agg_layer=0)
    by_text.needs = ("key",)
    with pytest.raises(InputError, match=r"'key'\. Did you mean 'keys'"):
        CustomSelection(method=by_text)


WRONG = {
    "returned shape": lambda e, k: torch.zeros(1, k, dtype=torch.int64),
    "returned shape (4,)": lambda e, k: torch.arange(k),
    "dtype torch.float32": lambda e, k: torch.zeros(3, k),
    "dtype torch.bool": lambda e, k: torch.ones(3, e.count, dtype=torch.bool),
    "a place twice": lambda e, k: torch.zeros(3, k, dtype=torch.int64),
    "returned places 33 ... 36": lambda e, k: torch.arange(33, 33 + k).expand(3, k),
    "returned places -1 ... 2": lambda e, k: torch.arange(-1, k - 1).expand(3, k),
    "returned a list": lambda e, k: list(range(k)),
}


@pytest.mark.parametrize("message", WRONG)
def test_own_selection_with_a_wrong_answer(message: str) -> None:
    method = CustomSelection(method=WRONG[message], kept_tokens=4)
    with pytest.raises(InputError) as error:
        run_rule(method, evidence())
    assert message in str(error.value)


# -- bad input: one sentence naming field, value and range --------------------------------------
BAD = [
    (FastV, {"agg_layer": 0}, "agg_layer=0 is not valid: an integer of at least 1."),
    (FastV, {"agg_layer": True}, "agg_layer=True"),
    (FastV, {"attention_rank": 0}, "attention_rank=0"),
    (FastV, {"attention_rank": 1.5}, "attention_rank=1.5"),
    (FastV, {"attention_rank": float("nan")}, "attention_rank=nan"),
    (FastV, {"attention_rank": None}, "attention_rank=None"),
    (FastV, {"mode": "hide"}, "mode='hide' is not valid: 'drop' or 'mask'."),
    (FastV, {"sys_length": -1}, "sys_length=-1"),
    (HiMAP, {"attn_txt_layer": 0}, "attn_txt_layer=0"),
    (
        HiMAP,
        {"attn_txt_layer": 8},
        "attn_img_layer=8 is not valid: above attn_txt_layer=8, or None for stage 1 only.",
    ),
    (HiMAP, {"attn_img_rank": 300}, "attn_img_rank=300 is not valid: at most attn_txt_rank=288."),
    (HiMAP, {"attn_txt_rank": 0.1, "attn_img_rank": 0.2}, "attn_img_rank=0.2"),
    (HiMAP, {"attn_img_rank": None}, "attn_img_rank=None"),
    (HiMAP, {"img_length": 0}, "img_length=0"),
    (SAINT, {"threshold": 1.01}, "threshold=1.01 is not valid: a cosine in [-1, 1]."),
    (SAINT, {"threshold": float("nan")}, "threshold=nan"),
    (SAINT, {"threshold": "high"}, "threshold='high'"),
    (SAINT, {"start": 9, "end": 8}, "end=8 is not valid: at least start=9."),
    (SAINT, {"start": -1}, "start=-1"),
    (SAINT, {"start": None}, "start=None"),
    (SAINT, {"min_neighbors": 0}, "min_neighbors=0"),
    (SAINT, {"gamma": -1.0}, "gamma=-1.0"),
    (SAINT, {"gamma": 41}, "gamma=41"),
    (SAINT, {"vit": 19}, "vit=19"),
    (SAINT, {"vit": {"layer": 19}}, "'layer'. Did you mean 'layers'?"),
    (SAINT, {"reference_positions": 1}, "reference_positions=1"),
    (SAINTViT, {"layers": ()}, "layers=()"),
    (SAINTViT, {"layers": (3, 2)}, "layers=(3, 2)"),
    (SAINTViT, {"layers": (-1,)}, "layers=-1"),
    (SAINTViT, {"keep_num": 1}, "keep_num=1 is not valid: an integer of at least 2."),
    (SAINTViT, {"r": 0}, "r=0"),
    (SAINTViT, {"keep_num": (9, 8)}, "keep_num=(9, 8)"),
    (SAINTViT, {"layers": (1, 3), "keep_num": (8, 9)}, "keep_num=(8, 9)"),
    (SAINTViT, {"layers": None, "keep_num": (8, 9)}, "keep_num=(8, 9)"),
    (CustomSelection, {"method": "attnetion"}, "'attnetion'. Did you mean 'attention'?"),
    (CustomSelection, {"method": 3}, "method=3"),
    (CustomSelection, {"method": "no.such:thing"}, "method='no.such:thing' cannot be imported"),
    (CustomSelection, {"method": "torch:nothing"}, "method='torch:nothing' cannot be imported"),
    (CustomSelection, {"method": "math:pi"}, "method='math:pi'"),
    (CustomSelection, {"method": lambda evidence: None}, "function(evidence, keep)"),
    (CustomSelection, {"agg_layer": 0}, "agg_layer=0 is not valid: at least 1 for method="),
    (CustomSelection, {"agg_layer": 0, "method": "similarity"}, "needs keys"),
    (CustomSelection, {"temperature": 0}, "temperature=0"),
    (CustomSelection, {"temperature": float("inf")}, "temperature=inf"),
    (CustomSelection, {"seed": -1}, "seed=-1"),
    (CustomSelection, {"kept_tokens": 0.0}, "kept_tokens=0.0"),
    (RandomDrop, {"keep": 0}, "keep=0"),
    (RandomDrop, {"keep": 5, "layer": -1}, "layer=-1"),
    (RandomDrop, {"keep": 5, "seed": 1.5}, "seed=1.5"),
    (Downsample, {"keep": "half"}, "keep='half'"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_fields(cls: type, fields: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        cls(**fields)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


TOO_DEEP = [
    (FastV(agg_layer=12), "agg_layer=12 is not valid: 1 ... 11 for a model of 12 layers."),
    (HiMAP(attn_txt_layer=12, attn_img_layer=13), "attn_txt_layer=12"),
    (HiMAP(attn_img_layer=12), "attn_img_layer=12 is not valid: 3 ... 11"),
    (SAINT(7, 16), "end=16 is not valid: 7 ... 11 for a model of 12 layers."),
    (CustomSelection(agg_layer=12), "agg_layer=12"),
    (RandomDrop(5, layer=12), "layer=12 is not valid: 0 ... 11"),
]


@pytest.mark.parametrize(("method", "message"), TOO_DEEP, ids=[m[:20] for _, m in TOO_DEEP])
def test_layers_the_model_does_not_have(method: Method, message: str) -> None:
    with pytest.raises(InputError) as error:
        method.decoder_stages(12)
    assert message in str(error.value)


def test_tower_layers_behind_the_features() -> None:
    method = SAINT(vit=SAINTViT(layers=(5,), keep_num=9))
    assert method.vision_stages(6, None)[0].layer == 5
    with pytest.raises(InputError, match=r"layers=5 is not valid: 0 ... 4 .* after layer 4"):
        method.vision_stages(6, 4)
    with pytest.raises(InputError, match=r"keep_num=9 is not valid: at most 5"):
        method.vision_stages(6, None)[0].rule(torch.randn(1, 2, 4, 8))


def test_default_layers_move_with_the_depth_and_stated_ones_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = SAINT()
    assert [stage.layer for stage in method.decoder_stages(12)] == [4, 5, 6, 7]
    assert [stage.layer for stage in HiMAP().decoder_stages(8)] == [1, 2]
    assert [stage.layer for stage in HiMAP(attn_txt_layer=2).decoder_stages(32)] == [2, 8]
    assert "saint: start=3, end=6, the published depth in 12 layers." in caplog.text
    for copied in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert [stage.layer for stage in copied.decoder_stages(12)] == [4, 5, 6, 7]
    with pytest.raises(InputError, match="end=16"):
        SAINT(end=16).decoder_stages(12)


def test_misspelt_keywords_suggest_the_near_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'attention_rank'"):
        FastV(atention_rank=5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="Did you mean 'keep_num'"):
        SAINTViT(keep_nums=5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="RandomDrop needs a value for keep"):
        RandomDrop()  # type: ignore[call-arg]
    with pytest.raises(InputError, match="takes 1 parameters, got 2"):
        Downsample(5, 6)  # type: ignore[call-arg]


# -- registry, names, files ---------------------------------------------------------------------
def test_registry_names() -> None:
    assert {"none", "fastv", "himap", "saint", "custom", "random", "downsample"} <= set(METHODS)
    assert next(iter(METHODS)) == "none"
    assert all(cls.name == name for name, cls in METHODS.items() if cls)
    assert get_method("none") is None
    assert get_method("fastv", attention_rank=7) == FastV(attention_rank=7)
    with pytest.raises(InputError, match="Did you mean 'himap'"):
        get_method("hima")
    with pytest.raises(InputError, match="Did you mean 'attention_rank'"):
        get_method("fastv", atention_rank=7)
    with pytest.raises(InputError, match="takes no parameters"):
        get_method("none", keep=7)
    with pytest.raises(InputError, match="Unknown method"):
        get_method([])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="random needs a value for keep"):
        get_method("random")
    with pytest.raises(InputError, match="contradicts"):
        get_method("himap", attn_txt_rank=9, hmap_v_attn_txt_rank=8)


PARSED = [
    ("none", None),
    ("fastv", FastV()),
    ("fastv:64", FastV(attention_rank=64)),
    ("fastv:0.25,agg_layer=2", FastV(agg_layer=2, attention_rank=0.25)),
    ("fastv:fast_v_attention_rank=9,mode=mask", FastV(attention_rank=9, mode="mask")),
    ("himap:attn_img_layer=none", HiMAP(attn_img_layer=None)),
    ("himap:192", HiMAP(attn_txt_rank=192, attn_img_rank=72)),
    ("himap:64", HiMAP(attn_txt_rank=64, attn_img_rank=16)),
    ("himap:1", HiMAP(attn_txt_rank=1, attn_img_rank=1)),
    ("himap:0.25", HiMAP(attn_txt_rank=0.25, attn_img_rank=0.0625)),
    ("himap:18,attn_img_rank=5", HiMAP(attn_txt_rank=18, attn_img_rank=5)),
    ("himap:18,hmap_v_attn_img_rank=5", HiMAP(attn_txt_rank=18, attn_img_rank=5)),
    ("saint:0.7,start=1,end=3", SAINT(start=1, end=3, threshold=0.7)),
    (
        "saint:start=none,vit={layers: [2, 4], keep_num: [9, 5]}",
        SAINT(start=None, vit=SAINTViT(layers=(2, 4), keep_num=(9, 5))),
    ),
    ("custom:50,method=norm,agg_layer=0", CustomSelection("norm", 50, 0)),
    (
        f"custom:method={__name__}:pick_first",
        CustomSelection(method=f"{__name__}:pick_first"),
    ),
    ("random:100,seed=2", RandomDrop(100, seed=2)),
    ("downsample:0.25", Downsample(0.25)),
    ("sparsevlm:stages=[[2, 66], [6, 0.1]],noise=none", SparseVLM(stages=((2, 66), (6, 0.1)))),
]


@pytest.mark.parametrize(("text", "method"), PARSED, ids=[text[:30] for text, _ in PARSED])
def test_short_form(text: str, method: Method | None) -> None:
    assert parse_method(text) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv:100,200", "is not a method"),
        ("none:5", "is not a method"),
        ("fastv:seed=1", "Unknown parameter of fastv 'seed'"),
        ("fastv:agg_layer=1,agg_layer=2", "given twice"),
        ("fastv:many", "attention_rank='many'"),
        ("fastvv", "Did you mean 'fastv'?"),
        ("saint:vit={layers: [1}", "vit="),
    ],
)
def test_bad_short_form(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_method(text)
    assert message in str(error.value)


LABELS = {
    "fastv_rank100": FastV(),
    "fastv_rank0.5_k2_mask": FastV(2, 0.5, mode="mask"),
    "himap_txt288_img72": HiMAP(),
    "himap_txt288": HiMAP(attn_img_layer=None),
    "himap_txt288_txtlayer3": HiMAP(attn_txt_layer=3, attn_img_layer=None),
    "himap_txt100_img50_imglayer9": HiMAP(2, 100, 9, 50),
    "saint_s7_e16_t0.83": SAINT(),
    "saint_s7_e16_t1.0": SAINT(threshold=1),
    "saint_s7_e16_t0.83_n3_g5.0_refpos": SAINT(min_neighbors=3, gamma=5, reference_positions=True),
    "saint_vit19_keep376": SAINT(start=None, vit=SAINTViT()),
    "saint_s7_e16_t0.83_vit19_keep376": SAINT(vit=SAINTViT()),
    "saint_vit1-3_keep14-8_r4-3": SAINT(start=None, vit=SAINTViT((1, 3), (14, 8), (4, 3))),
    "saint_vitall_keep376": SAINT(start=None, vit=SAINTViT(layers=None)),
    "custom_attention100": CustomSelection(),
    "custom_sampling0.5_k2_temp0.1_seed4": CustomSelection("sampling", 0.5, 2, 0.1, 4),
    f"custom_{__name__}.pick_first100": CustomSelection(pick_first),
    "random_keep100": RandomDrop(100),
    "random_keep100_k2_seed1": RandomDrop(100, 2, 1),
    "downsample_keep144": Downsample(144),
}


@pytest.mark.parametrize("label", LABELS)
def test_labels(label: str) -> None:
    assert LABELS[label].label() == label


def test_labels_are_file_names() -> None:
    label = CustomSelection(lambda evidence, keep: None).label()
    assert label.replace("_", "").replace(".", "").isalnum()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.name)
def test_described(cls: type[Method]) -> None:
    assert cls.summary().endswith(".") and "\n" not in cls.summary()
    assert list(cls.options()) == [f.name for f in dataclasses.fields(cls)]
    for one in cls.options().values():
        assert one.help.endswith(".") and "\n" not in one.help, one
        assert f"{one.name}: {one.help}" in cls.__doc__
        assert one.required == (one.name not in cls.defaults())
    assert (cls.sites and cls.paper) or cls.name == "custom"
    assert standard_method(cls.name).name == cls.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    method = get_method(settings.pop("method"), **settings)
    assert (method is None) == (path.stem == "baseline")
    if method is not None:
        method.decoder_stages(32)
        method.vision_stages(24, 22)
        assert path.stem.startswith(method.name)


@pytest.mark.parametrize("label", [k for k in LABELS if "lambda" not in k])
def test_frozen_hashable_copied(label: str) -> None:
    method = LABELS[label]
    assert hash(method) == hash(copy.deepcopy(method))
    assert pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"


# -- model.config -------------------------------------------------------------------------------
def test_fields_of_model_config() -> None:
    config = SimpleNamespace(
        use_fast_v=True,
        fast_v_sys_length=None,
        fast_v_image_token_length=576,
        fast_v_attention_rank=64,
        fast_v_agg_layer=2,
        fast_v_inplace=False,
    )
    assert settings_method(FastV, config) == FastV(2, 64, image_token_length=576, mode="mask")
    config.fast_v_inplace = True
    assert settings_method(FastV, config) == FastV(2, 64, image_token_length=576)
    config.use_hmap_v, config.hmap_v_attn_img_rank, config.hmap_v_sys_length = True, 50, 35
    assert settings_method(HiMAP, config) == HiMAP(attn_img_rank=50, sys_length=35)
    config.hmap_v_attn_img_layer = None
    assert len(settings_method(HiMAP, config).decoder_stages(32)) == 1
    custom = SimpleNamespace(
        use_custom_selection=True,
        custom_sys_length=35,
        custom_image_token_length=576,
        custom_kept_tokens=8,
        custom_agg_layer=12,
        custom_selection_method="similarity",
        custom_temperature=0.1,
    )
    want = CustomSelection("similarity", 8, 12, 0.1, sys_length=35, image_token_length=576)
    assert settings_method(CustomSelection, custom) == want


def saint(**fields: object) -> SAINT:
    config = SimpleNamespace(**{f"saint_{key}": value for key, value in fields.items()})
    method = settings_method(SAINT, config)
    assert isinstance(method, SAINT)
    return method


def test_saint_fields_of_model_config() -> None:
    assert saint(start=3, end=5, threshold=0.7, prune_mode=None) == SAINT(3, 5, 0.7)
    assert saint(sys_length=35, image_token_length=576).stated_span == (35, 576)
    modes = [None] * 24
    modes[19] = PRUNE_MODE
    only = SAINT(start=None, vit=SAINTViT())
    assert saint(start=None, prune_mode=modes) == only
    assert saint(start=None, prune_mode=["None"] * 19 + [PRUNE_MODE]) == only
    counts = [None] * 24
    counts[19] = 100
    per_layer = saint(start=None, prune_mode=modes, keep_num=counts, r=8)
    assert per_layer == SAINT(start=None, vit=SAINTViT((19,), (100,), 8))
    modes[21] = PRUNE_MODE
    chosen = saint(start=None, prune_mode=modes, keep_num=[300, 200], r=[16, 8])
    assert chosen.vit == SAINTViT((19, 21), (300, 200), (16, 8))
    assert saint(prune_mode=PRUNE_MODE, keep_num=300).vit == SAINTViT(None, 300)
    listed = saint(prune_mode=PRUNE_MODE, keep_num=[9, 8, 8], r=4).vit
    assert listed == SAINTViT((0, 1, 2), (9, 8, 8), 4)
    assert saint(prune_mode=["None"] * 24, keep_num=5, r=3).vit is None
    with pytest.raises(InputError, match="Did you mean 'iterative_drop_full_graph'"):
        saint(prune_mode="iterative_drop")
    with pytest.raises(InputError, match=r"saint_keep_num=\[1, 2, 3\]"):
        saint(prune_mode=modes, keep_num=[1, 2, 3])
    with pytest.raises(InputError, match="saint_keep_num says nothing without saint_prune_mode"):
        saint(keep_num=300)
    with pytest.raises(InputError, match="one setting"):
        get_method("saint", vit={}, saint_prune_mode=PRUNE_MODE)
    with pytest.raises(InputError, match="start=None"):
        saint(start=None, prune_mode=None)


def test_needs_that_are_no_tuple_are_named() -> None:
    def pick(evidence: object, keep: int) -> None: ...

    pick.needs = "keys"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="needs='keys' is not valid: a tuple of"):
        CustomSelection(method=pick)  # type: ignore[arg-type]
