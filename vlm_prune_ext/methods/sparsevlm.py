"""SparseVLM: text rates visual tokens. Version 1.0 recycles part of what it drops; version 2.0,
SparseVLM+, takes the rotary embedding's share out of the ratings.

Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference" (ICML 2025, arXiv 2410.04417; extended there for version 2.0). Code:
``Gumpest/SparseVLMs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Need,
    Stage,
    register,
    resolve_budget,
)
from vlm_prune_ext.methods.evidence import Answer, Attention
from vlm_prune_ext.methods.option import Accepts, option, require, some_stages
from vlm_prune_ext.select import text_raters, top_k_ascending

Stages = tuple[tuple[int, Budget], ...]
Noise = tuple[tuple[float, ...], ...]

PUBLISHED: dict[int, Stages] = {
    192: ((2, 300), (6, 200), (15, 110)),
    128: ((2, 303), (6, 110), (15, 36)),
    96: ((2, 238), (6, 48), (15, 26)),
    64: ((2, 66), (6, 30), (15, 17)),
}

PUBLISHED_PLUS: dict[int, Stages] = {
    192: ((2, 300), (6, 200), (15, 118)),
    128: ((2, 238), (6, 108), (15, 60)),
    96: ((2, 246), (6, 54), (15, 28)),
    64: ((2, 66), (6, 34), (15, 20)),
}
HEADS = 14


def _some_noise() -> Accepts:
    """Numbers for each stage, as lists or tensors."""

    def ok(value: Any) -> bool:
        try:
            return value is None or all(0 <= number < 1 for row in value for number in row)
        except (TypeError, RuntimeError):  # no sequence, or a tensor of more than one dimension
            return False

    def plain(value: Any) -> Noise | None:
        return None if value is None else tuple(tuple(map(float, row)) for row in value)

    return Accepts("None, or a list or tensor of numbers in [0, 1) for each stage", ok, plain)


@register
@dataclass(frozen=True)
class SparseVLM(Method):
    """Drop visual tokens behind several layers by the attention of text; merge some that go.

    Raters are the tokens of the text behind the image whose embeddings have most to do with the
    image's (:func:`vlm_prune_ext.select.text_raters`). Behind each stage's layer a visual token's
    score is that layer's attention from the raters, averaged over heads and raters; the highest of
    each image stay, as many as the stage keeps. Of those that go the best 30 % are merged into a
    tenth as many new tokens (:func:`recycled`), which stand behind the kept ones and count as
    visual tokens from then on. Rotary positions are counted anew: a decoded token's position in a
    layer is the length of that layer's cache.

    The keeps are fixed numbers, whatever the image: the paper's rank rule is not in its code. New
    tokens are not among them, so more are used than the settings' names say: with "192" a layer of
    32 holds 206 on average. The published rule cannot keep everything: one token is always merged.

    Deviations from the published code, none of which changes a run that the draw of its noise does
    not change: of rows with equal density the lower one counts as denser (``noise`` reproduces a
    stored draw instead); every image of every sample decides for itself; a text of one token is its
    own rater; a stage that keeps as many tokens as there are does nothing; attention is recomputed
    for the raters' rows in the stages' layers only, so fused attention kernels stay in use; ties go
    to the lower position.
    """

    name = "sparsevlm"
    paper = "arXiv 2410.04417"
    code = "Gumpest/SparseVLMs"
    budget_field = "stages"
    published = {"stages": tuple(PUBLISHED.values())[1:]}  # the first is the default

    stages: Stages = option(
        PUBLISHED[192],
        some_stages(),
        "Pairs of a layer and the visual tokens kept behind it (or their ratio), new ones not "
        "counted.",
        tag="",
        always=True,
    )
    noise: Noise | None = option(
        None,
        _some_noise(),
        "None: ties of density go to the lower row; else the random numbers of each stage.",
        tag=None,
    )

    def check(self) -> None:
        """Stored noise is there for every stage."""
        count = len(self.stages)
        fits = self.noise is None or len(self.noise) == count
        require(fits, "noise", self.noise, f"None, or one list for each of the {count} stages")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One look at the embeddings, and one stage behind each layer."""
        noise: Sequence[tuple[float, ...] | None] = self.noise or [None] * len(self.stages)
        raters = Stage(0, ("hidden", "tail_hidden"), _raters, mode="observe")
        return raters, *(
            Stage(
                layer + 1,
                (Attention("chosen"), "hidden"),
                partial(_rule, budget=keep, noise=drawn),
                left=partial(_left, keep),
                recount=True,
            )
            for (layer, keep), drawn in zip(self.stages, noise, strict=True)
        )

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """``sparsevlm:192``: the stages that the paper calls so."""
        return _called(budget, PUBLISHED)


def _called(budget: Any, published: dict[int, Stages]) -> dict[str, Any]:
    known = ", ".join(map(str, published))
    fits = isinstance(budget, int) and budget in published
    require(fits, "stages", budget, f"one of {known}, or pairs by name")
    return {} if published[budget] == published[192] else {"stages": published[budget]}


def _raters(evidence: Evidence) -> torch.Tensor:
    assert evidence.hidden is not None and evidence.tail_hidden is not None
    assert evidence.tail_real is not None
    return text_raters(evidence.hidden, evidence.tail_hidden, evidence.tail_real)


def _merged(dropped: int) -> tuple[int, int]:
    """Of so many that are dropped, how many are merged, and into how many."""
    merged = int(0.3 * dropped) + 1
    return merged, int(merged / 10) + 1


def _left(budget: Budget, total: int, now: int) -> int:
    keep = resolve_budget("stages", budget, total)
    return now if keep >= now else keep + _merged(now - keep)[1]


def _rule(
    evidence: Evidence, budget: Budget, noise: tuple[float, ...] | None
) -> torch.Tensor | Answer:
    assert evidence.attention is not None and evidence.hidden is not None
    count, keep = evidence.count, resolve_budget("stages", budget, evidence.total)
    if keep >= count:
        return evidence.everything
    merged, into = _merged(count - keep)
    order = evidence.attention.sort(dim=1, descending=True, stable=True).indices
    best = order[:, keep : keep + merged, None].expand(-1, -1, evidence.hidden.shape[-1])
    drawn = None
    if noise is not None:
        accepted = f"at least {merged} numbers, one for each token that a stage merges"
        require(len(noise) >= merged, "noise", f"{len(noise)} numbers", accepted)
        drawn = torch.tensor(noise[:merged], device=best.device)
    rows = recycled(evidence.hidden.gather(1, best), into, drawn)
    return Answer(top_k_ascending(evidence.attention, keep), rows)


def recycled(rows: torch.Tensor, count: int, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Merge rows around density peaks.

    A row's density falls with the mean of its ``count`` smallest squared distances, its reach is
    the distance to the nearest denser row (for the densest, the largest distance of all). The rows
    with the highest product of the two are centres; every row joins its nearest one. Distances are
    Euclidean, over the square root of the width.

    Args:
        rows: ``(batch, k, d)``, any float dtype (computed in float32).
        count: how many to make, at most ``k``.
        noise: float32 ``(k,)`` in [0, 1), what tells equal densities apart; ``None``: of equal ones
            the lower row is denser.

    Returns:
        ``(batch, count, d)`` in the dtype of ``rows``: the sum of each centre's rows over their
        number plus 1e-6, in the order of the centres.
    """
    batch, k, width = rows.shape
    exact = rows.float()
    # Not by matrix products: equal distances must come out equal.
    distances = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / width**0.5
    near = distances.sort(dim=2).values[..., :count]
    density = (-near.square().mean(dim=2)).exp()
    if noise is not None:
        density = density + 1e-6 * noise
    denser = density[:, None, :] > density[:, :, None]
    if noise is None:
        lower = torch.ones(k, k, dtype=torch.bool, device=rows.device).tril(-1)
        denser = denser | ((density[:, None, :] == density[:, :, None]) & lower)
    largest = distances.amax(dim=(1, 2))[:, None].expand(batch, k)
    reach = distances.masked_fill(~denser, float("inf")).amin(dim=2)
    reach = torch.where(denser.any(dim=2), reach, largest)
    peaks = (reach * density).sort(dim=1, descending=True, stable=True).indices[:, :count]
    to_peak = distances.gather(1, peaks[..., None].expand(-1, -1, k))
    joins = to_peak.argmin(dim=1)  # the first at ties
    own = torch.arange(count, device=rows.device).expand(batch, count)
    joins = joins.scatter(1, peaks, own)
    members = torch.nn.functional.one_hot(joins, count).to(exact.dtype)
    sums = members.transpose(1, 2) @ exact
    sizes = members.sum(dim=1)[..., None]
    return (sums / (sizes + 1e-6)).to(rows.dtype)


# -- SparseVLM+ ------------------------------------------------------------------------------------
@register
@dataclass(frozen=True)
class SparseVLMPlus(Method):
    """Drop visual tokens behind several layers by the attention of text, corrected for distance.

    Raters are the tokens of the text behind the image whose embeddings have most to do with the
    image's (:func:`vlm_prune_ext.select.text_raters`). Behind each stage's layer the attention of
    each rater to each visual token is divided by what the rotary embedding alone would give for
    their distance (:func:`rotary_share`); the 14 query heads with the largest sums are averaged,
    then the raters. The highest of each image stay, as many as the stage keeps, with their
    positions. The divisor crosses zero, so scores may be negative or huge, as published.

    Deviations from the published code, none of which changes a run of one image: every image of
    every sample decides for itself; models of fewer than 14 query heads average all; a text of one
    token is its own rater; a stage that keeps more than there is keeps all; attention is recomputed
    for the raters' rows in the stages' layers only, so fused attention kernels stay in use; ties go
    to the lower position.
    """

    name = "sparsevlm_plus"
    paper = "arXiv 2410.04417"
    code = "Gumpest/SparseVLMs"
    budget_field = "stages"
    published = {"stages": tuple(PUBLISHED_PLUS.values())[1:]}  # the first is the default

    stages: Stages = option(
        PUBLISHED_PLUS[192],
        some_stages(),
        "Pairs of a layer and the visual tokens kept behind it, or their ratio.",
        tag="",
        always=True,
    )

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One look at the embeddings, and one stage behind each layer."""
        needs: tuple[Need, ...] = (Attention("chosen", maps=True), "positions", "frequencies")
        raters = Stage(0, ("hidden", "tail_hidden"), _raters, mode="observe")
        return raters, *(
            Stage(layer + 1, needs, partial(_plus_rule, budget=keep), left=partial(_kept, keep))
            for layer, keep in self.stages
        )

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """``sparsevlm_plus:192``: the stages that the paper calls so."""
        return _called(budget, PUBLISHED_PLUS)


def _kept(budget: Budget, total: int, now: int) -> int:
    return min(resolve_budget("stages", budget, total), now)


def _plus_rule(evidence: Evidence, budget: Budget) -> torch.Tensor:
    assert evidence.maps is not None and evidence.chosen is not None
    assert evidence.positions is not None and evidence.tail_positions is not None
    assert evidence.frequencies is not None
    keep = resolve_budget("stages", budget, evidence.total)
    if keep >= evidence.count:
        return evidence.everything
    distances = evidence.tail_positions[:, :, None] - evidence.positions[:, None, :]
    share = rotary_share(distances, evidence.frequencies)
    rates = evidence.chosen > 0
    corrected = torch.where(rates[:, None, :, None], evidence.maps / share[:, None], 0.0)
    by_head = corrected.sum(dim=2)
    order = by_head.sum(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :HEADS]
    chosen = by_head.gather(1, order[..., None].expand(-1, -1, by_head.shape[2]))
    scores = chosen.mean(dim=1) / rates.sum(dim=1, keepdim=True)
    return top_k_ascending(scores, keep)


def rotary_share(distances: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """What the rotary embedding alone gives two tokens at a distance, for queries and keys of ones.

    Args:
        distances: int64, any shape, in positions.
        frequencies: float32 ``(head_dim / 2,)``, angle per position.

    Returns:
        float32 of the same shape: ``2 / sqrt(head_dim)`` times the sum of the cosines.
    """
    # Few distances occur; each is looked up in a table.
    low, high = torch.stack(distances.aminmax()).tolist()
    table = torch.arange(low, high + 1, device=distances.device)[:, None] * frequencies
    return (2 / (2 * len(frequencies)) ** 0.5) * table.cos().sum(dim=1)[distances - low]
