"""Published figures: what papers state of FLOPs and relative means comes out of the formulas."""

from __future__ import annotations

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.conventions import count
from vlm_prune_ext.experiment.flops import DecoderShape, planned_lengths
from vlm_prune_ext.experiment.published import published, relative_mean, unpruned
from vlm_prune_ext.methods.registry import METHODS, parse_method

SHAPES = {
    "7b": DecoderShape(32, 4096, 32, 32, 128, 11008, 32000),
    "13b": DecoderShape(40, 5120, 40, 40, 128, 13824, 32000),
}


def flops(convention: str, shape: str, method: str, text: int) -> tuple[float, float]:
    layers = SHAPES[shape].layers
    visual = planned_lengths(parse_method(method), layers, 0, [576])
    return count(convention, SHAPES[shape], visual, text, 576)


def test_fastv_states_45_percent_less_for_13b() -> None:
    """arXiv 2403.06764, abstract (K=2, R=50 %), with the text of LLaVA's prompt."""
    pruned, whole = flops("fastv", "13b", "fastv:0.5,agg_layer=2", 35)
    assert round(100 * (1 - pruned / whole)) == 45
    alone, all_of_it = flops("fastv", "13b", "fastv:0.5,agg_layer=2", 0)
    assert round(100 * (1 - alone / all_of_it)) != 45  # text is counted there


@pytest.mark.parametrize(
    ("method", "stated"),
    [("pdrop", "1.78"), ("pdrop:layers=[10,20],ratios=[0.5,0.25]", "2.13"), ("none", "3.82")],
)
def test_pyramiddrop_states_teraflops_of_7b(method: str, stated: str) -> None:
    """arXiv 2410.17247v2, ablation of stages."""
    assert f"{flops('macs', '7b', method, 0)[0] / 1e12:.2f}" == stated


def test_sparsevlm_states_54_percent_less() -> None:
    """arXiv 2410.04417v4, abstract; with texts of 110 to 122 tokens and with no other."""
    lengths = []
    for text in range(300):
        pruned, whole = flops("sparsevlm", "7b", "sparsevlm:192", text)
        if round(100 * (1 - pruned / whole)) == 54:
            lengths.append(text)
    assert lengths == list(range(110, 123))


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(InputError, match="'fastv'"):
        count("fasttv", SHAPES["7b"], [576] * 32, 0, 576)


def test_relative_means_are_those_that_sources_state() -> None:
    """To their digit, but for a rounding of it; each source has its unpruned model in the file."""
    checked = 0
    for one in published():
        base = unpruned(one.source)
        if base is None or one.relative is None or len(one.scores) < 8:
            continue
        found = relative_mean(one.scores, base.scores)
        assert found is not None
        checked += abs(found - one.relative) < 0.16
    assert len(published()) == 65 and checked > 40


def test_methods_of_the_file_are_ours_or_named() -> None:
    others = {one.method for one in published()} - set(METHODS)
    assert others == {"pio-fvlm", "occamtoken"}
