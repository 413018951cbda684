"""FEATHER: early scores without positions beside an even grid, then a strict choice deeper.

Paper: Endo, Wang and Yeung-Levy, "Feather the Throttle: Revisiting Visual Token Pruning for
Vision-Language Model Acceleration" (ICCV 2025, arXiv 2412.13180). Code: ``markendo/FEATHER``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Evidence, Method, Stage, register
from vlm_prune_ext.methods.evidence import Attention
from vlm_prune_ext.methods.option import a_number, an_integer, option, some_layers
from vlm_prune_ext.select import top_k_ascending


@register
@dataclass(frozen=True)
class FEATHER(Method):
    """Drop visual tokens twice, by attention of the last token without rotary embedding.

    Score of a visual token: softmax over the image's tokens alone of the products of the last
    token's query with their keys in the layer before, both without rotary embedding, averaged over
    query heads. In front of the first layer the ``int(n r)`` highest of ``n`` stay, with ``r = 1 -
    reduction_ratio``, and beside them every ``stride``-th row and column of the image's grid; in
    front of the second the ``int(n r r)`` highest of what is left. Positions are kept.

    Deviations from the published code, none of which changes a run of one square image: batches and
    several images work, each image with a softmax and a grid of its own; an image whose tokens form
    no square is taken as rows of the next larger square's width, the last of them incomplete; at
    least one token stays; ties go to the lower position.
    """

    name = "feather"
    paper = "arXiv 2412.13180"
    code = "markendo/FEATHER"
    budget_field = "reduction_ratio"

    layers: tuple[int, ...] = option(
        (8, 16), some_layers(1, count=2), "The two layers in front of which tokens go."
    )
    reduction_ratio: float = option(
        0.7,
        a_number(0.0, 0.999, "a number from 0 to 0.999"),
        "Share of visual tokens that the scores drop, once at the first layer and squared at the "
        "second.",
        tag="r",
        always=True,
    )
    stride: int = option(3, an_integer(1), "Step of the grid that stays at the first layer.")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """Two stages."""
        needs = (Attention("last", rotary=False, over="image"),)
        first, second = self.layers
        return Stage(first, needs, self._with_grid), Stage(second, needs, self._highest)

    def _with_grid(self, evidence: Evidence) -> torch.Tensor:
        keep = max(1, int(evidence.count * (1 - self.reduction_ratio)))
        return _top(evidence, keep) | on_grid(evidence.places, evidence.total, self.stride)

    def _highest(self, evidence: Evidence) -> torch.Tensor:
        ratio = 1 - self.reduction_ratio
        assert evidence.attention is not None
        keep = max(1, int(evidence.count * ratio * ratio))
        return top_k_ascending(evidence.attention, keep)


def _top(evidence: Evidence, keep: int) -> torch.Tensor:
    assert evidence.attention is not None
    stays = torch.zeros_like(evidence.places, dtype=torch.bool)
    return stays.scatter_(1, top_k_ascending(evidence.attention, keep), True)


def on_grid(places: torch.Tensor, total: int, stride: int) -> torch.Tensor:
    """Which places of an image of ``total`` tokens are in rows and columns 0, ``stride``, ...

    Args:
        places: int64, any shape.
        total: tokens of the image.
        stride: step in both directions.

    Returns:
        bool, of the same shape.
    """
    side = math.isqrt(total - 1) + 1
    return (places // side % stride == 0) & (places % side % stride == 0)
