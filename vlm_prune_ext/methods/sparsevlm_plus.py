"""SparseVLM+ (version 2.0): text rates visual tokens, with the rotary embedding's share taken out.

Paper: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference" (arXiv 2410.04417, extended). Code: ``Gumpest/SparseVLMs``, version 2.0.
"""

from __future__ import annotations

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
from vlm_prune_ext.methods.evidence import Attention
from vlm_prune_ext.methods.option import option, require, some_stages
from vlm_prune_ext.select import text_raters, top_k_ascending

Stages = tuple[tuple[int, Budget], ...]

PUBLISHED: dict[int, Stages] = {
    192: ((2, 300), (6, 200), (15, 118)),
    128: ((2, 238), (6, 108), (15, 60)),
    96: ((2, 246), (6, 54), (15, 28)),
    64: ((2, 66), (6, 34), (15, 20)),
}
HEADS = 14


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
    published = {"stages": tuple(PUBLISHED.values())[1:]}  # the first is the default

    stages: Stages = option(
        PUBLISHED[192],
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
            Stage(layer + 1, needs, partial(_rule, budget=keep), left=partial(_left, keep))
            for layer, keep in self.stages
        )

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """``sparsevlm_plus:192``: the stages that the paper calls so."""
        known = ", ".join(map(str, PUBLISHED))
        require(
            isinstance(budget, int) and budget in PUBLISHED,
            "stages",
            budget,
            f"one of {known}, or pairs by name",
        )
        return {} if PUBLISHED[budget] == PUBLISHED[192] else {"stages": PUBLISHED[budget]}


def _raters(evidence: Evidence) -> torch.Tensor:
    assert evidence.hidden is not None and evidence.tail_hidden is not None
    assert evidence.tail_real is not None
    return text_raters(evidence.hidden, evidence.tail_hidden, evidence.tail_real)


def _left(budget: Budget, total: int, now: int) -> int:
    return min(resolve_budget("stages", budget, total), now)


def _rule(evidence: Evidence, budget: Budget) -> torch.Tensor:
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
