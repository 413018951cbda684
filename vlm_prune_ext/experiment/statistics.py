"""What a difference between two settings is worth: intervals, paired tests, corrections.

Two settings answer the same rows, so their scores are compared row by row: what both get right or
wrong says nothing. All functions take plain numbers, one entry per row, and know no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """A 95 % interval of a share or of a mean."""

    low: float
    high: float


def wilson(right: int, count: int, z: float = Z95) -> Interval:
    """Wilson's score interval of ``right`` out of ``count``, in [0, 1].

    Unlike the plain one it stays inside [0, 1] and means something at 0 and at ``count``.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).

    Raises:
        ValueError: ``count`` is 0, or ``right`` is outside 0 ... ``count``.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} right of {count} rows have no interval.")
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return Interval(max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


class Paired(NamedTuple):
    """Two settings on the same rows.

    Attributes:
        gained: rows that only the second got right.
        lost: rows that only the first got right.
        p: two-sided p-value of the exact McNemar test: how likely gains and losses are this
            uneven where a row is as likely to be gained as to be lost.
    """

    gained: int
    lost: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact McNemar test (Q. McNemar, Psychometrika 12, 1947): a binomial test of the rows on
    which the two settings differ.

    Raises:
        ValueError: they have other numbers of rows.
    """
    pairs = list(zip(first, second, strict=True))
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    return Paired(gained, lost, _two_sided(min(gained, lost), gained + lost))


def paired_interval(gained: int, lost: int, count: int, z: float = Z95) -> Interval:
    """95 % interval of the difference of two shares over the same ``count`` rows, in [-1, 1].

    Wald's, with half a row added to each cell of the two by two table (A. Agresti and Y. Min,
    Stat. Med. 24, 2005), so that it has a width where no row differs.

    Raises:
        ValueError: more rows differ than there are.
    """
    if gained + lost > count or min(gained, lost) < 0:
        raise ValueError(f"{gained} gained and {lost} lost of {count} rows have no interval.")
    b, c, n = lost + 0.5, gained + 0.5, count + 2
    middle, spread = (c - b) / n, z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return Interval(max(-1.0, middle - spread), min(1.0, middle + spread))


def _two_sided(fewer: int, count: int) -> float:
    """Twice the probability of at most ``fewer`` heads in ``count`` fair throws, at most 1."""
    heads = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * heads / 2**count)


def bootstrap(
    first: Any,
    second: Any,
    score: Callable[[Any], Any],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % interval of ``score(second) - score(first)`` by drawing rows with replacement, the same
    rows for both (percentiles of B. Efron, Ann. Stat. 7, 1979): for scores that follow from sums
    over rows, as means, BLEU-4 and CIDEr do, but are no share of right ones.

    Args:
        first, second: ``(rows, parts)``, what each row adds to the sums, in one order.
        score: sums ``(draws, parts)`` -> scores ``(draws,)``.
        draws: how many times rows are drawn.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: they have other numbers of rows, or none.
    """
    import numpy as np

    a, b = (np.asarray(rows, dtype=float) for rows in (first, second))
    count = len(a)
    if a.shape != b.shape or not count:
        raise ValueError(f"Rows of shapes {a.shape} and {b.shape} have no interval.")
    times = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws)
    low, high = np.percentile(score(times @ b) - score(times @ a), [2.5, 97.5])
    return Interval(float(low), float(high))


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for the number of comparisons (S. Holm, Scand. J. Stat. 6, 1979): below
    0.05 in the answer means that none of them is expected to be there by chance in 19 of 20 tables.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected
