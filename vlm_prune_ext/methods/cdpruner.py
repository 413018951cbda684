"""CDPruner: a diverse choice of visual tokens that matter to the question (a DPP).

Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
Pruning in MLLMs" (arXiv 2506.10967, NeurIPS 2025). Code: ``Theia-4869/CDPruner``. Greedy inference
for determinantal point processes: Chen, Zhang and Zhou (arXiv 1709.05135).
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, label_text, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage
from vlm_prune_ext.methods.option import a_budget, anything, option
from vlm_prune_ext.select import unit_rows

EXHAUSTED = 1e-5
"""Share of a token's own diagonal entry below which its gain is rounding noise."""


def relevance(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """How much each patch matters to the question, scaled to about 0 ... 1 in each image.

    **Minus** the mean cosine between patch and text segments, as published.

    Args:
        image_embeds: ``(images, N, P)``; text_embeds: ``(images or 1, M, P)``.
        segments: bool ``(images or 1, M)``, the segments that count; ``None``: all.

    Returns:
        float32 ``(images, N)``; ones where all patches of an image matter alike.
    """
    cosines = unit_rows(image_embeds) @ unit_rows(text_embeds).transpose(1, 2)
    if segments is None:
        raw = -cosines.mean(dim=2)
    else:
        raw = -(cosines * segments[:, None]).sum(dim=2) / segments.sum(dim=1, keepdim=True)
    low, high = raw.amin(dim=1, keepdim=True), raw.amax(dim=1, keepdim=True)
    return torch.where(high > low, (raw - low + 1e-6) / (high - low), torch.ones_like(raw))


def dpp_order(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy maximum a posteriori choice of a determinantal point process.

    Where the kernel's rank is exhausted, so that what is left of the gains is rounding noise, the
    largest diagonal entries follow. Each pick takes what it explains out of the whole kernel (a
    Schur complement): more arithmetic than Chen et al.'s rows of a factor, and far fewer steps.

    Args:
        kernel: float32 ``(images, n, n)``, symmetric, positive semidefinite.
        count: how many, at most n.

    Returns:
        int64 ``(images, count)``, all different, in the order of picking.
    """
    left = kernel.clone()  # what the picks so far do not explain
    gains = left.diagonal(dim1=1, dim2=2)
    floor = EXHAUSTED * gains
    # Any gain above its floor comes before any entry of the diagonal; a pick's own gain is gone.
    later = gains - gains.amax(dim=1, keepdim=True) - 1.0
    picks = []
    for _ in range(count):
        chosen = torch.where(gains > floor, gains, later).argmax(dim=1, keepdim=True)
        picks.append(chosen)
        later.scatter_(1, chosen, -torch.inf)
        row = left.gather(1, chosen[..., None].expand(-1, 1, left.shape[2]))
        gain = gains.gather(1, chosen)
        weight = torch.where(gain > floor.gather(1, chosen), gain.reciprocal(), 0.0)
        left.baddbmm_((row * weight[..., None]).transpose(1, 2), row, alpha=-1)
    return torch.cat(picks, dim=1)


def cdpruner(projected: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    """Tokens picked by a DPP with kernel ``r_i * cosine(i, j) * r_j``.

    Args:
        projected: ``(images, N, D)``, any float dtype (computed in float32).
        weight: ``(images, N)``, relevance r.
        budget: how many, at most N.

    Returns:
        int64 ``(images, budget)`` ascending.
    """
    unit = unit_rows(projected)
    kernel = weight[:, :, None] * (unit @ unit.transpose(1, 2)) * weight[:, None, :]
    return dpp_order(kernel, budget).sort(dim=1).values


@register
@dataclass(frozen=True)
class CDPruner(Method):
    """Keep tokens that are diverse given the question, before the language model.

    Relevance compares patches and question in CLIP's joint space, so the text half of the CLIP
    checkpoint that the tower came from is needed. Kept tokens stay in grid order and positions are
    consecutive. With several crops per image the budget is per crop.

    Deviations from the published code: relevance is scaled in each image (there: over all images of
    a call); exactly ``budget`` tokens, none twice, also above the kernel's rank (there: NaN,
    duplicates); each image of a batch has its own sample's question; no CUDA is needed. A question
    longer than the text tower is cut into segments; as published, all but the last lack an end
    token, and the first is read at its start token, so its words do not count
    (``text_tower`` says how to mend that).
    """

    name = "cdpruner"
    paper = "arXiv 2506.10967"
    code = "Theia-4869/CDPruner"
    sites = ("features",)
    budget_field = "budget"

    budget: Budget = option(
        64,
        a_budget(),
        "Visual tokens kept per image or crop, or their ratio.",
        tag="keep",
        always=True,
    )
    text_tower: Any = option(
        None,
        anything(),
        "CLIP with its text half. None: the checkpoint the tower came from; a folder; a hub name; "
        "or a vlm_prune_ext.models.clip_text.TextTower.",
        tag=None,
    )

    def label(self) -> str:
        """As ever; a text tower of its own by its name, or by what kind of object it is."""
        if self.text_tower is None:
            return super().label()
        named = isinstance(self.text_tower, str | PathLike)
        shown = self.text_tower if named else type(self.text_tower).__name__
        return f"{super().label()}_text{label_text(shown)}"

    def feature_stage(self) -> FeatureStage:
        """Needs projected tokens, and patches and question in the joint space."""
        return FeatureStage(
            ("projected", "joint"), self._rule, budget=self.budget, text_tower=self.text_tower
        )

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.projected is not None
        assert evidence.image_embeds is not None and evidence.text_embeds is not None
        weight = relevance(evidence.image_embeds, evidence.text_embeds, evidence.segments)
        budget = resolve_budget("budget", self.budget, evidence.patches)
        return cdpruner(evidence.projected, weight, budget)
