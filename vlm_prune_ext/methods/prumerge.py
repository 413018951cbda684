"""LLaVA-PruMerge: attended patches take in the patches that resemble them; PruMerge+: a uniform
sample of patches is among those that do.

Paper: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
Models" (arXiv 2403.15388, ICCV 2025). Code: ``42Shawn/LLaVA-PruMerge``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register
from vlm_prune_ext.methods.evidence import FeatureEvidence, FeatureStage, NewTokens
from vlm_prune_ext.methods.option import a_number, an_integer, option
from vlm_prune_ext.select import (
    Merged,
    centre_counts,
    falling,
    first_of_each,
    merge_around,
    per_image,
    single_head_attention,
)


def prumerge(
    features: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    ratio: float | None = None,
    neighbours: int = 32,
) -> Merged:
    """Centres by attention, each taking in its neighbours (``select.merge_around``).

    Args:
        features: ``(images, N, C)``; keys: ``(images, N, d)`` of the last layer; attention:
            ``(images, N)`` of :func:`single_head_attention`.
        ratio: share of patches that are centres; ``None``: the share of outliers of each image.
        neighbours: patches that a centre takes in.
    """
    counts = centre_counts(attention, ratio)
    centres = first_of_each(falling(attention), counts)
    tokens = merge_around(features, keys, attention, centres, counts, neighbours)
    return Merged(centres, counts, tokens)


@register
@dataclass(frozen=True)
class PruMerge(Method):
    """Merge patches into those that CLS attends to most, before the language model.

    CLS attention in the tower's **last** layer with all heads taken as one; centres are outliers of
    it (their number depends on the picture) or a fixed ratio. Each takes in, weighted by attention,
    the patches with the most similar last-layer keys. Tokens come in order of falling attention,
    not grid order, then one more for all patches that are no centres; positions are consecutive.
    Even ``ratio=1`` is not the unpruned input: every token has its neighbours added.

    Deviations from the published code: the adaptive number is each image's own (there: that of all
    images of a call together); fewer patches than ``neighbours + 1`` work; a picture without
    outliers keeps one centre. Towers without CLS: mean attention of all patches. With several
    crops per image each crop is merged, and crops follow each other.
    """

    name = "prumerge"
    paper = "arXiv 2403.15388"
    code = "42Shawn/LLaVA-PruMerge"
    sites = ("features",)
    budget_field = "ratio"

    ratio: float | None = option(
        None,
        a_number(1e-9, 1.0, "a ratio in (0, 1]").optional("None (adaptive)"),
        "Share of the patches that become centres, in (0, 1]; None: adaptive.",
        always=True,
    )
    neighbours: int = option(
        32, an_integer(1), "Patches that a centre takes in, at least 1.", tag="near"
    )

    def feature_stage(self) -> FeatureStage:
        """Needs features, and keys and CLS query of the last layer."""
        return FeatureStage(
            ("features", "last"), self._rule, merges=True, left=self._tokens if self.ratio else None
        )

    def _tokens(self, patches: int) -> int:
        return max(1, int(patches * (self.ratio or 0))) + 1

    def _rule(self, evidence: FeatureEvidence) -> NewTokens:
        assert evidence.last_keys is not None and evidence.last_queries is not None
        keys, cls = evidence.last_keys, int(evidence.cls)
        attention = single_head_attention(keys, evidence.last_queries, evidence.cls)
        merged = self._merge(evidence.patch_features, keys[:, cls:], attention)
        return NewTokens.after_merging(*merged)

    def _merge(self, features: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor) -> Merged:
        return prumerge(features, keys, attention, self.ratio, self.neighbours)


def prumerge_plus(
    features: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    ratio: float | None = None,
    neighbours: int = 32,
    stop: int | None = None,
) -> Merged:
    """PruMerge's centres, then every g-th patch that is none yet, ``g = int(int(1 / ratio) / 3)``.

    Args:
        features, keys, attention, ratio, neighbours: as in
            :func:`prumerge`.
        stop: the uniform sample ends in front of this place; ``None``: N - 1, as published (so the
            last patch is never sampled).
    """
    n = attention.shape[1]
    stop = n - 1 if stop is None else stop
    order, counts = falling(attention), centre_counts(attention, ratio)
    steps = per_image(attention, ratio, lambda share: max(1, int(int(1 / share) / 3)))
    place = torch.arange(n, device=attention.device).expand_as(attention)
    is_centre = torch.zeros_like(order).scatter(1, order, (place < counts[:, None]).long()).bool()
    sampled = (place % steps[:, None] == 0) & (place < stop) & ~is_centre
    # Centres in their order, then the sample in rising order, then all others.
    position = torch.where(sampled, n + place, 2 * n + place)
    rank = torch.empty_like(order).scatter(1, order, place)
    order = torch.where(is_centre, rank, position).argsort(dim=1)
    counts = counts + sampled.sum(dim=1)
    centres = first_of_each(order, counts)
    tokens = merge_around(features, keys, attention, centres, counts, neighbours)
    return Merged(centres, counts, tokens)


@register
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with an even sample of further patches as centres, before the language model.

    As PruMerge; behind its centres come the places 0, g, 2g, ... that are not centres yet, in grid
    order, g = int(int(1 / ratio) / 3). Even ``ratio=1`` is not the unpruned input: every token has
    its neighbours added.

    Deviations from the published code: as PruMerge's; any number of images and patches; g is at
    least 1 (there: a division by zero); a fixed ratio lists no patch twice. The last patch is never
    sampled, as there, unless ``stop`` says so.
    """

    name = "prumerge_plus"

    stop: int | None = option(
        None,
        an_integer(0).optional(),
        "The even sample ends in front of this place, at least 0; None: the last patch.",
    )

    def feature_stage(self) -> FeatureStage:
        """As PruMerge's; how many tokens there are depends on the picture."""
        return replace(super().feature_stage(), left=None)

    def _merge(self, features: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor) -> Merged:
        return prumerge_plus(features, keys, attention, self.ratio, self.neighbours, self.stop)
