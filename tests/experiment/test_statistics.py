"""Intervals and paired tests, against scipy and against what they promise."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from vlm_prune_ext.experiment.statistics import bootstrap, holm, mcnemar, wilson


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


def test_bootstrap_covers_a_difference_and_repeats() -> None:
    draw = random.Random(1)
    first = [float(draw.random() < 0.5) for _ in range(300)]
    second = [1.0 if draw.random() < 0.3 else a for a in first]

    def mean(rows: object) -> float:
        values = list(rows)  # type: ignore[call-overload]
        return sum(values) / len(values)

    found = bootstrap(first, second, mean, seed=3)
    assert found == bootstrap(first, second, mean, seed=3)
    assert found.low < mean(second) - mean(first) < found.high
    assert found.low > 0
    assert bootstrap(first, first, mean) == (0.0, 0.0)
