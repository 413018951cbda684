"""DivPrune: keep visual tokens that are far apart (max-min diversity).

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models"
(arXiv 2503.02175, CVPR 2025). Code: ``vbdi/divprune``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import unit_rows


def max_min_order(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy max-min choice under the cosine distance, in the order of picking.

    First the token whose nearest other token is farthest, then again and again the one whose
    smallest distance to those picked is largest.

    Args:
        tokens: ``(images, n, D)``, any float dtype (computed in float32).
        count: how many, 1 ... n.

    Returns:
        int64 ``(images, count)``, all different.
    """
    unit = unit_rows(tokens)
    n = unit.shape[1]
    distance = 1.0 - unit @ unit.transpose(1, 2)
    # The second smallest entry of a row: the smallest is the token's distance to itself.
    nearest = distance.kthvalue(min(2, n), dim=2).values
    picks = [nearest.argmax(dim=1, keepdim=True)]
    nearest = torch.full_like(nearest, torch.inf)
    while len(picks) < count:
        last = picks[-1]
        row = distance.gather(1, last[..., None].expand(-1, 1, n))[:, 0]
        nearest = torch.minimum(nearest, row).scatter_(1, last, -torch.inf)
        picks.append(nearest.argmax(dim=1, keepdim=True))
    return torch.cat(picks, dim=1)


@register
@dataclass(frozen=True)
class DivPrune(Method):
    """Keep tokens that are as different from each other as possible, before the language model.

    Looks at projected tokens only: no tower, no attention, no question, so it works on every
    model. Kept tokens stay in their order and positions are consecutive. All tokens of a picture,
    row-end ones included, are one set. A ratio keeps ``round(ratio * n)``, halves to even.

    Deviations from the published code: picked tokens are never picked again (there: identical
    tokens come several times); the picture may stand anywhere in the prompt; each image decides
    for itself; at least one token stays. Models with positions of several axes (Qwen2-VL) keep the
    positions of the tokens that stay.
    """

    name = "divprune"
    paper = "arXiv 2503.02175"
    code = "vbdi/divprune"
    sites = ("features",)
    budget_field = "ratio"

    ratio: Budget = option(
        0.098,
        a_budget(),
        "Visual tokens kept, as a ratio (float in (0, 1]) or a count (int).",
        always=True,
    )

    def feature_stage(self) -> FeatureStage:
        """Needs projected tokens only."""
        return FeatureStage(("projected",), self._rule, over="span", budget=self.ratio)

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.projected is not None
        count = resolve_budget("ratio", self.ratio, evidence.patches)
        return max_min_order(evidence.projected, count).sort(dim=1).values
