"""Intervals and paired tests, against scipy and against what they promise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from scipy.stats import bootstrap as scipys

from vlm_prune_ext.experiment.metrics import bleu_of, bleu_parts, bleu_words
from vlm_prune_ext.experiment.statistics import (
    bootstrap,
    holm,
    mcnemar,
    paired_interval,
    wilson,
)


@pytest.mark.parametrize("count", [1, 7, 50, 500])
def test_wilson_is_scipys(count: int) -> None:
    for right in {0, 1, count // 3, count - 1, count}:
        want = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right, count) == pytest.approx((want.low, want.high), abs=1e-12)


def test_no_rows_have_no_interval() -> None:
    for right, count in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match=f"{right} right of {count}"):
            wilson(right, count)


@pytest.mark.parametrize("seed", range(6))
def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ(seed: int) -> None:
    draw = random.Random(seed)
    first = [draw.random() < 0.8 for _ in range(200)]
    second = [a if draw.random() < 0.8 else draw.random() < 0.5 for a in first]
    found = mcnemar(first, second)
    assert found.gained - found.lost == sum(second) - sum(first)
    want = binomtest(found.gained, found.gained + found.lost).pvalue
    assert found.p == pytest.approx(want, abs=1e-12)
    assert mcnemar(second, first).p == found.p


def test_equal_answers_differ_in_nothing() -> None:
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("gained", [0, 3, 40])
def test_paired_interval_is_the_closed_form(gained: int) -> None:
    """Agresti and Min (2005): Wald's interval of the table with half a row more in each cell."""
    lost, count = 11, 90
    low, high = paired_interval(gained, lost, count)
    b, c, n = lost + 0.5, gained + 0.5, count + 2
    error = norm.ppf(0.975) * ((b + c) - (c - b) ** 2 / n) ** 0.5 / n
    assert (low, high) == pytest.approx(((c - b) / n - error, (c - b) / n + error))
    assert paired_interval(0, 0, 5).low < 0 < paired_interval(0, 0, 5).high
    with pytest.raises(ValueError, match="4 gained and 3 lost of 6"):
        paired_interval(4, 3, 6)


def mean(sums: Any) -> Any:
    return sums[:, 0] / sums[:, 1]


def test_bootstrap_is_scipys() -> None:
    draw = np.random.default_rng(1)
    first = draw.random(200)
    second = np.clip(first + draw.normal(0.05, 0.2, 200), 0, 1)
    rows = [np.stack([values, np.ones(200)], axis=1) for values in (first, second)]
    found = bootstrap(*rows, mean, draws=4000, seed=3)
    assert found == bootstrap(*rows, mean, draws=4000, seed=3)
    want = scipys(
        (second - first,), np.mean, n_resamples=4000, method="percentile", random_state=1
    ).confidence_interval
    assert found == pytest.approx((want.low, want.high), abs=0.003)
    assert found.low < np.mean(second - first) < found.high
    assert bootstrap(rows[0], rows[0], mean) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no interval"):
        bootstrap(rows[0], rows[1][:5], mean)


def test_a_score_of_sums_is_bootstrapped_as_of_rows() -> None:
    """BLEU-4 of drawn rows is that of their sums."""
    said = ["a red ring left of a blue cross", "two shapes and a line", "one green star here"]
    right = ["a red ring left of a cross", "two shapes and a line", "one blue star here now"]
    parts = np.array([bleu_parts(a, b) for a, b in zip(said, right, strict=True)])
    for drawn in ([0, 1, 2], [1, 1, 0], [2, 0, 0, 0]):
        want = bleu_words([said[i] for i in drawn], [[right[i]] for i in drawn])
        assert bleu_of(parts[drawn].sum(axis=0).tolist()) == pytest.approx(want)
