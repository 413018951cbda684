"""VisionZip: keep dominant tokens, merge the rest into contextual ones.

Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
(arXiv 2412.04467, CVPR 2025). Code: ``dvlab-research/VisionZip``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import (
    CLS,
    MERGED,
    Budget,
    FeatureEvidence,
    FeatureNeed,
    FeatureStage,
    NewTokens,
)
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import take_rows, top_k_ascending, unit_rows


class Zipped(NamedTuple):
    """What :func:`visionzip` answers.

    Attributes:
        kept: int64 ``(images, dominant)``, rows that stay as they are, ascending.
        centres: int64 ``(images, contextual)``, rows that the rest is merged into, ascending.
        tokens: ``(images, dominant + contextual, C)``, dominant rows, then contextual tokens.
    """

    kept: torch.Tensor
    centres: torch.Tensor
    tokens: torch.Tensor


def visionzip(
    features: torch.Tensor,
    attention: torch.Tensor,
    keys: torch.Tensor,
    dominant: int,
    contextual: int,
    cls: bool = True,
) -> Zipped:
    """Dominant rows by attention, then the left-over rows merged around evenly spread centres.

    A contextual token is its centre's row **plus the mean** of the rows assigned to it (the centre
    alone if there are none): a sum of two, so about twice as long as a token.

    Args:
        features: ``(images, rows, C)``; row 0 is CLS if ``cls``.
        attention: ``(images, heads, N)``, attention of CLS to the N patches.
        keys: ``(images, rows, d)``, what assignment compares (mean over heads).
        dominant: rows that stay, CLS counted (it always is one of them), 1 ... rows.
        contextual: merged tokens, from 0; no more than there are rows left.
        cls: whether row 0 is CLS.

    Returns:
        rows and tokens; tokens in the dtype of ``features``.
    """
    batch, count = features.shape[:2]
    kept = top_k_ascending(attention.float().sum(dim=1), dominant - int(cls)) + int(cls)
    if cls:
        kept = torch.nn.functional.pad(kept, (1, 0))  # CLS is row 0
    stays = torch.zeros(batch, count, dtype=torch.int32, device=features.device)
    stays.scatter_(1, kept, 1)
    rest = stays.argsort(dim=1, stable=True)[:, : count - dominant]
    contextual = min(contextual, rest.shape[1])
    tokens = take_rows(features, kept)
    if not contextual:
        return Zipped(kept, rest[:, :0], tokens)
    step = rest.shape[1] // contextual
    column = torch.arange(rest.shape[1], device=features.device)
    is_centre = (column % step == 0) & (column < step * contextual)
    # Sizes are known: sorting by a flag needs no transfer, a bool index would.
    columns = (~is_centre).int().argsort(stable=True)
    centres, others = rest[:, columns[:contextual]], rest[:, columns[contextual:]]
    merged = _merge(features, unit_rows(keys), centres, others)
    return Zipped(kept, centres, torch.cat([tokens, merged], dim=1))


def _merge(
    features: torch.Tensor, unit: torch.Tensor, centres: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    cosines = take_rows(unit, others) @ take_rows(unit, centres).transpose(1, 2)
    owner = torch.nn.functional.one_hot(cosines.argmax(dim=2), centres.shape[1]).float()
    total = owner.transpose(1, 2) @ take_rows(features, others).float()
    mean = total / owner.sum(dim=1).clamp(min=1)[..., None]
    return (take_rows(features, centres).float() + mean).to(features.dtype)


@register
@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the most attended tokens and merge the others, before the language model.

    CLS and the ``dominant - 1`` patches with the highest CLS attention (feature layer, summed over
    heads) stay; the others are merged into ``contextual`` tokens by cosines of the feature layer's
    keys. The language model gets CLS, dominant patches in grid order, contextual tokens in the
    order of their centres, with consecutive positions. As published, a contextual token is a sum
    (centre plus the mean of its rows), not an average, and CLS, on which the projector was never
    trained, is one of the tokens: so no setting keeps the model's own input.

    Deviations from the published code: the feature layer is found by its place from the end (there:
    towers of 24 layers only); ``contextual=0`` merges nothing; no more tokens come out than the
    image has patches; only the one model is changed. Towers without CLS: mean attention received
    from all patches, and ``dominant`` patches. With several crops per image each crop is zipped:
    first the base crop, then dominant patches of the mosaic in raster order, the other crops' CLS
    tokens, and their contextual tokens.
    """

    name = "visionzip"
    paper = "arXiv 2412.04467"
    code = "dvlab-research/VisionZip"
    sites = ("features",)
    budget_field = "dominant"

    dominant: Budget = option(
        54, a_budget(), "Tokens that stay, CLS counted, or their ratio.", always=True
    )
    contextual: Budget = option(
        10, a_budget(zero=True), "Merged tokens, or their ratio.", always=True
    )

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """Published settings are 54 + 10, 108 + 20 and 162 + 30: ten of 64 are contextual."""
        a_budget().check("budget", budget)
        merged = budget * 10 / 64
        contextual = merged if isinstance(budget, float) else round(merged)
        return {"dominant": budget - contextual, "contextual": contextual}

    def feature_stage(self) -> FeatureStage:
        """Needs features, CLS attention and keys."""
        needs: tuple[FeatureNeed, ...] = ("features", "attention", "keys")
        return FeatureStage(needs, self._rule, merges=True, left=self._tokens)

    def _tokens(self, patches: int) -> int:
        return sum(self._split(patches))

    def _split(self, patches: int) -> tuple[int, int]:
        """Dominant and contextual tokens; together no more than there are patches."""
        dominant = resolve_budget("dominant", self.dominant, patches)
        contextual = resolve_budget("contextual", self.contextual, patches)
        return dominant, min(contextual, patches - dominant)

    def _rule(self, evidence: FeatureEvidence) -> NewTokens:
        assert evidence.features is not None
        assert evidence.attention is not None and evidence.keys is not None
        dominant, contextual = self._split(evidence.patches)
        zipped = visionzip(
            evidence.features,
            evidence.attention,
            evidence.keys,
            dominant,
            contextual,
            evidence.cls,
        )
        places = torch.nn.functional.pad(
            zipped.kept - int(evidence.cls), (0, contextual), value=MERGED
        )
        if evidence.cls:
            places[:, 0] = CLS
        added = contextual + int(evidence.cls)
        return NewTokens(zipped.kept, places, rows=zipped.tokens, added=added)
