"""SCOPE: keep patches that are salient and cover the others.

Paper: Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs"
(arXiv 2510.24214, NeurIPS 2025). Code: ``kinredon/SCOPE``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import unit_rows


def coverage_order(features: torch.Tensor, saliency: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy choice of the patch that adds most coverage times its saliency.

    A patch is covered as far as its largest cosine with a pick (0 at first, so negative cosines
    never count). A candidate's gain is what it would add over all patches, times its saliency.

    Args:
        features: ``(images, N, C)``, any float dtype (computed in float32).
        saliency: ``(images, N)``, not negative.
        count: how many, at most N.

    Returns:
        int64 ``(images, count)``, all different, in the order of picking.
    """
    unit = unit_rows(features)
    cosines = unit @ unit.transpose(1, 2)
    covered = torch.zeros_like(cosines[:, :, :1])
    saliency = saliency.float().clone()
    picks = []
    for _ in range(count):
        gains = (cosines - covered).clamp_(min=0).sum(dim=1)
        chosen = torch.where(saliency < 0, -1.0, gains * saliency).argmax(dim=1, keepdim=True)
        picks.append(chosen)
        saliency.scatter_(1, chosen, -1.0)  # never again
        column = cosines.gather(2, chosen[:, None].expand(-1, cosines.shape[1], 1))
        covered = torch.maximum(covered, column)
    return torch.cat(picks, dim=1)


@register
@dataclass(frozen=True)
class SCOPE(Method):
    """Keep patches by saliency times coverage, before the language model.

    Saliency is the CLS attention of the feature layer, summed over heads; coverage is by cosines of
    unprojected features. Kept tokens stay in grid order (CLS goes) and positions are consecutive.

    Deviations from the published code: the budget is per image (there: shared by all images of a
    call); crops of one image share it equally, ``budget // crops`` each, at least one; any grid.
    Towers without CLS: mean attention received from all patches.
    """

    name = "scope"
    paper = "arXiv 2510.24214"
    code = "kinredon/SCOPE"
    sites = ("features",)
    budget_field = "budget"

    budget: Budget = option(
        64, a_budget(), "Visual tokens kept per image, or their ratio.", tag="keep", always=True
    )

    def feature_stage(self) -> FeatureStage:
        """Needs features and CLS attention."""
        return FeatureStage(("features", "attention"), self._rule, budget=self.budget)

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.attention is not None
        whole = resolve_budget("budget", self.budget, evidence.patches * evidence.crops)
        saliency = evidence.attention.float().sum(dim=1)
        count = max(1, whole // evidence.crops)
        return coverage_order(evidence.patch_features, saliency, count).sort(dim=1).values
