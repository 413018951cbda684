"""PyramidDrop: fewer visual tokens from stage to stage, the deeper the fewer.

Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction" (CVPR 2025, arXiv 2410.17247). Code: ``Cooperx521/PyramidDrop``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Stage,
    register,
    resolve_budget,
    say_once,
)
from vlm_prune_ext.methods.evidence import Attention
from vlm_prune_ext.methods.option import a_budget, a_tuple, option, require, some_layers
from vlm_prune_ext.select import top_k_ascending


@register
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Drop visual tokens in front of several layers, down to a ratio of the original number each.

    Score of a visual token: the attention it would receive from the prompt's last token in the
    layer to come, averaged over query heads. Rotary positions are counted anew over what is left
    (so it was published and trained): a decoded token's position in a layer is the length of that
    layer's cache.

    With the published layers of 32 the mean over layers cannot fall to 128 of 576 tokens, however
    small the ratios: the first 8 layers hold them all.

    Deviations from the published code, none of which changes a run that it supports: grouped
    queries, eager attention, batches with left padding and several images work (each image has
    a selection of its own, each sample its own last token and positions); no prompt is cut at 2048
    tokens; a ratio that rounds to no token keeps one; ties go to the lower position.
    """

    name = "pdrop"
    paper = "arXiv 2410.17247"
    code = "Cooperx521/PyramidDrop"
    budget_field = "ratios"

    layers: tuple[int, ...] = option(
        (8, 16, 24), some_layers(1), "Layers in front of which tokens go, ascending."
    )
    ratios: tuple[Budget, ...] = option(
        (0.5, 0.25, 0.125),
        a_tuple(a_budget(), "one or more ratios in (0, 1] or token counts"),
        "For each layer, visual tokens that stay: a ratio of the original number, rounded down, or "
        "a count.",
        tag="r",
        always=True,
    )

    def check(self) -> None:
        """One ratio per layer, none above the one before."""
        count = len(self.layers)
        accepted = f"{count} of them, one for each of layers={self.layers}"
        require(len(self.ratios) == count, "ratios", self.ratios, accepted)
        for before, after in pairwise(self.ratios):
            same_kind = isinstance(before, int) is isinstance(after, int)
            falls = not same_kind or after <= before
            require(falls, "ratios", self.ratios, "numbers that do not grow from layer to layer")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage per layer."""
        return tuple(
            Stage(
                layer,
                (Attention("last", layer="coming"),),
                partial(_rule, ratio=ratio),
                budget=ratio,
                left=partial(_left, ratio),
                recount=True,
            )
            for layer, ratio in zip(self.layers, self.ratios, strict=True)
        )

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """``pdrop:R`` halves from layer to layer as published: R, R / 2, R / 4."""
        a_budget().check("ratios", budget)
        halves = [budget / 2**stage for stage in range(3)]
        if isinstance(budget, int):
            halves = [max(1, int(half)) for half in halves]
        return {"ratios": tuple(halves)}


def _count(ratio: Budget, total: int) -> int:
    """Tokens that stay of ``total``."""
    if isinstance(ratio, int):
        return resolve_budget("ratios", ratio, total)
    if int(total * ratio) < 1:
        say_once(f"ratios={ratio} rounds to no visual token of some images: these keep one.")
    return max(1, int(total * ratio))


def _left(ratio: Budget, total: int, now: int) -> int:
    return min(now, _count(ratio, total))


def _rule(evidence: Evidence, ratio: Budget) -> torch.Tensor:
    assert evidence.attention is not None
    return top_k_ascending(evidence.attention, min(_count(ratio, evidence.total), evidence.count))
