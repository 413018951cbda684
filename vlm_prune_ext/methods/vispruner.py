"""VisPruner: keep attended patches, then the least similar of the rest.

Paper: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
Pruning in VLMs" (arXiv 2412.01818, version 2 on, ICCV 2025). Code: ``Theia-4869/VisPruner``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
from vlm_prune_ext.methods.option import a_budget, a_number, option
from vlm_prune_ext.select import falling, unit_rows

ROUND = 8
"""Patches that one round drops, at most."""


def vispruner(
    features: torch.Tensor, attention: torch.Tensor, budget: int, important_ratio: float
) -> torch.Tensor:
    """Important patches by attention, then a diverse rest.

    The pool of patches that are not important, in order of falling attention, shrinks round by
    round: every second one, starting with the first, is a candidate, and the candidates with the
    highest cosine with any of the others go. The survivors go to the front in order of falling
    similarity, which decides who is a candidate in the next round.

    Args:
        features: ``(images, N, C)``, any float dtype (computed in float32).
        attention: ``(images, heads, N)``.
        budget: how many patches stay, at most N.
        important_ratio: share of them that attention alone decides, rounded down.

    Returns:
        int64 ``(images, budget)`` ascending.
    """
    order = falling(attention.float().mean(dim=1))
    important = int(budget * important_ratio)
    kept, pool = order[:, :important], order[:, important:]
    if budget > important:
        unit = unit_rows(features)
        cosines = unit @ unit.transpose(1, 2)
        kept = torch.cat([kept, _shrink(pool, cosines, budget - important)], dim=1)
    return kept.sort(dim=1).values


def _shrink(pool: torch.Tensor, cosines: torch.Tensor, target: int) -> torch.Tensor:
    """``pool`` ``(images, n)`` of places -> ``(images, target)``; cosines ``(images, N, N)``."""
    rows = torch.arange(len(pool), device=pool.device)[:, None, None]
    while pool.shape[1] > target:
        candidates, partners = pool[:, ::2], pool[:, 1::2]
        drop = min(ROUND, pool.shape[1] - target, candidates.shape[1])
        similar = cosines[rows, candidates[:, :, None], partners[:, None, :]].amax(dim=2)
        kept = falling(similar)[:, drop:]
        pool = torch.cat([candidates.gather(1, kept), partners], dim=1)
    return pool


@register
@dataclass(frozen=True)
class VisPruner(Method):
    """Keep the most attended patches and a diverse rest, before the language model.

    Attention of CLS in the feature layer, mean over heads; similarity of unprojected features. Kept
    tokens stay in grid order and positions are consecutive. With several crops per image the budget
    is per crop.

    The rule is chaotic: with 576 patches, changing the features by 1e-6 often changes some of the
    kept patches. Half precision, another device or another batch size never match token for token.

    Deviations from the published code: pools of odd size and small budgets work (there: an index
    error); each image of a batch is chosen for by itself. Towers without CLS: mean attention
    received from all patches.
    """

    name = "vispruner"
    paper = "arXiv 2412.01818"
    code = "Theia-4869/VisPruner"
    sites = ("features",)
    budget_field = "budget"

    budget: Budget = option(
        128,
        a_budget(),
        "Visual tokens kept per image or crop, or their ratio.",
        tag="keep",
        always=True,
    )
    important_ratio: float = option(
        0.5,
        a_number(0.0, 1.0, "a number in [0, 1]"),
        "Share of the budget that attention alone decides, in [0, 1].",
        tag="important",
    )

    def feature_stage(self) -> FeatureStage:
        """Needs features and CLS attention."""
        return FeatureStage(("features", "attention"), self._rule, budget=self.budget)

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.attention is not None
        budget = resolve_budget("budget", self.budget, evidence.patches)
        return vispruner(evidence.patch_features, evidence.attention, budget, self.important_ratio)
