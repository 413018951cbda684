"""FasterVLM: keep the patches that CLS attends to most.

Paper: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning"
(arXiv 2412.01818, version 1). Code: ``Theia-4869/FasterVLM``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune_ext.methods.base import Method, plain_numbers, require_budget, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
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


@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the patches with the highest CLS attention, before the language model.

    The attention is that of the feature layer (the one whose output is projected), mean over heads.
    Kept tokens stay in grid order and positions are consecutive. With several crops per image the
    budget is per crop.

    Deviation: only that one row of attention is computed; the tower's attention implementation
    stays. Towers without CLS: mean attention received from all patches.

    Attributes:
        budget: visual tokens kept per image or crop (int), or ratio (float in (0, 1]).

    Raises:
        InputError: for a value outside these ranges.
    """

    budget: Budget = 144

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "arXiv 2412.01818v1"
    code: ClassVar[str] = "Theia-4869/FasterVLM"
    BUDGET: ClassVar[str] = "budget"
    LABEL: ClassVar[Mapping[str, str]] = {"budget": "keep"}

    def __post_init__(self) -> None:
        plain_numbers(self)
        require_budget("budget", self.budget)

    def feature_stage(self) -> FeatureStage:
        """Needs CLS attention only."""
        return FeatureStage(("attention",), self._rule, budget=self.budget)

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.attention is not None
        return fastervlm(
            evidence.attention, resolve_budget("budget", self.budget, evidence.patches)
        )
