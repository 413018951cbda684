"""FasterVLM: keep the patches that CLS attends to most.

Paper: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning"
(arXiv 2412.01818, version 1). Code: ``Theia-4869/FasterVLM``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import top_k_ascending


def fastervlm(attention: torch.Tensor, budget: int) -> torch.Tensor:
    """Places of the patches with the highest attention, mean over heads.

    Args:
        attention: ``(images, heads, N)``, attention of CLS to the patches.
        budget: how many, at most N.

    Returns:
        int64 ``(images, budget)`` ascending.
    """
    return top_k_ascending(attention.float().mean(dim=1), budget)


@register
@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the patches with the highest CLS attention, before the language model.

    The attention is that of the feature layer (the one whose output is projected), mean over heads.
    Kept tokens stay in grid order and positions are consecutive. With several crops per image the
    budget is per crop.

    Deviation: only that one row of attention is computed; the tower's attention implementation
    stays. Towers without CLS: mean attention received from all patches.
    """

    name = "fastervlm"
    paper = "arXiv 2412.01818v1"
    code = "Theia-4869/FasterVLM"
    sites = ("features",)
    budget_field = "budget"

    budget: Budget = option(
        144,
        a_budget(),
        "Visual tokens kept per image or crop, or their ratio.",
        tag="keep",
        always=True,
    )

    def feature_stage(self) -> FeatureStage:
        """Needs CLS attention only."""
        return FeatureStage(("attention",), self._rule, budget=self.budget)

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.attention is not None
        return fastervlm(
            evidence.attention, resolve_budget("budget", self.budget, evidence.patches)
        )
