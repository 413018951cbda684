"""Budgets that mean the same for all methods: met as near as each can, or said why not."""

from __future__ import annotations

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.choices import BY, choices_of, has_keep_budget
from vlm_prune_ext.experiment.budgets import TOLERANCE, Prompt, measure, solve, wanted
from vlm_prune_ext.experiment.flops import DecoderShape
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.pdrop import PyramidDrop
from vlm_prune_ext.methods.registry import classes

SHAPE = DecoderShape(32, 4096, 32, 32, 128, 11008, 32000)
PROMPT = Prompt(SHAPE, 576)
SWEPT = [cls for cls in classes() if has_keep_budget(cls)]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("cls", SWEPT, ids=[cls.name for cls in SWEPT])
def test_each_method_meets_a_budget_or_says_what_is_nearest(cls: type, by: str) -> None:
    met = 0
    for budget in (192, 64, 0.25):
        goal = wanted(budget, by, PROMPT)
        try:
            found = measure(solve(cls, budget, by, PROMPT), by, PROMPT)
        except InputError as error:
            assert f"{by}={budget}" in str(error) and "nearest" in str(error)
            continue
        assert abs(found - goal) <= TOLERANCE * goal
        met += 1
    # SparseVLM has four published settings alone, HiMAP's short form one second rank.
    assert met or cls.name in ("sparsevlm", "sparsevlm_plus", "himap")


def test_a_mean_counts_the_layers_in_front_of_the_drop() -> None:
    method = solve(FastV, 192, "mean", PROMPT)
    assert method == FastV(attention_rank=152)
    assert measure(method, "mean", PROMPT) == (3 * 576 + 29 * 152) / 32
    assert measure(method, "tokens", PROMPT) == 152
    for rank in (151, 153):  # no other is nearer
        other = measure(FastV(attention_rank=rank), "mean", PROMPT)
        assert abs(other - 192) >= abs(measure(method, "mean", PROMPT) - 192)


def test_flops_of_a_count_are_those_of_so_many_tokens_everywhere() -> None:
    whole = 32 * SHAPE.layer_flops(576)
    assert wanted(128, "flops", PROMPT) == 32 * SHAPE.layer_flops(128) / whole
    found = measure(solve(FastV, 128, "flops", PROMPT), "flops", PROMPT)
    assert found == (3 * SHAPE.layer_flops(576) + 29 * SHAPE.layer_flops(81)) / whole


def test_what_cannot_be_is_a_reason() -> None:
    """Eight of 32 layers hold all 576 tokens whatever PyramidDrop drops behind them."""
    with pytest.raises(InputError, match=r"mean=128 .*pdrop .*144.8"):
        solve(PyramidDrop, 128, "mean", PROMPT)
    chosen = choices_of(
        ["pdrop", "fastv"], ["128"], solve=lambda cls, n: solve(cls, n, "mean", PROMPT)
    )
    assert "144.8" in chosen[0].why and chosen[0].method is None
    assert chosen[1].method == FastV(attention_rank=82) and chosen[1].budget == "128"


def test_pictures_of_any_size_have_ratios() -> None:
    """What fits one number of tokens would fit no other."""
    method = solve(FastV, 0.25, "mean", Prompt(SHAPE, 1000, fixed=False))
    assert isinstance(method, FastV) and isinstance(method.attention_rank, float)
    for visual in (400, 1000, 2500):
        found = measure(method, "mean", Prompt(SHAPE, visual))
        assert found == pytest.approx(0.25 * visual, rel=0.02)
