"""HoloV: a budget for each part of the picture, attention within it.

Paper: Zou et al., "Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic
Context Retention" (arXiv 2510.02912, NeurIPS 2025). Code: ``obananas/HoloV``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import Budget, FeatureEvidence, FeatureStage, NewTokens
from vlm_prune_ext.methods.option import a_budget, an_integer, option
from vlm_prune_ext.select import falling

SCALE, WEIGHT, TINY = 1000.0, 0.09, 1e-6


def run_sizes(n: int, runs: int) -> list[int]:
    """Lengths of ``runs`` consecutive runs of n tokens; the first ``n % runs`` have one more."""
    return [n // runs + (run < n % runs) for run in range(runs)]


def run_scores(features: torch.Tensor, attention: torch.Tensor, crops: int) -> torch.Tensor:
    """Score of each run of tokens, float32 ``(images, crops)``.

    Published formula: mean over the run of ``1000 * attention + 0.09 * spread * balance``, where
    spread is how much a token's cosines within its run vary and balance scales the spreads to the
    attentions. Averaged over the run, the spreads cancel: what comes out is 1.09 times the mean
    scaled attention, up to 1e-6, whatever the tokens hold.

    Args:
        features: ``(images, N, D)``; attention: ``(images, N)``.
        crops: number of runs, at most N.
    """
    sizes = run_sizes(features.shape[1], crops)
    runs = zip(features.float().split(sizes, 1), attention.float().split(sizes, 1), strict=True)
    return torch.stack([_run_score(tokens, scores) for tokens, scores in runs], dim=1)


def _run_score(tokens: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    n = tokens.shape[1]
    scaled = SCALE * attention
    if n == 1:
        return scaled[:, 0]
    unit = tokens / (tokens.norm(dim=-1, keepdim=True) + TINY)
    cosines = unit @ unit.transpose(1, 2)
    cosines = cosines - torch.diag_embed(cosines.diagonal(dim1=1, dim2=2))
    mean = cosines.sum(dim=2, keepdim=True) / (n - 1)
    spread = (cosines - mean).square().sum(dim=2) / (n - 1)
    size = (scaled.abs().mean(dim=1) / (spread.abs().mean(dim=1) + TINY))[:, None]
    return (scaled + WEIGHT * spread * size).mean(dim=1)


def run_budgets(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Tokens of each run: its share of the budget rounded down, and what is missing one by one to
    the largest shares. Int64 ``(images, crops)``; may exceed what a run has."""
    shares = scores / (scores.sum(dim=1, keepdim=True) + TINY)
    whole = (shares * budget).floor().long()
    missing = budget - whole.sum(dim=1, keepdim=True)
    rank = ranks(shares)
    return whole + (rank < missing).long()


def share_surplus(budgets: torch.Tensor, scores: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """What runs got beyond what they have goes to the others, in turns, best score first.

    Args:
        budgets: int64 ``(images, crops)``; scores: ``(images, crops)``; sizes: tokens of each run.

    Returns:
        int64 ``(images, crops)``, each at most its run's size, with the sum of ``budgets`` (or all
        tokens).
    """
    size = torch.tensor(sizes, device=budgets.device)
    given = torch.minimum(budgets, size)
    surplus = (budgets - given).sum(dim=1, keepdim=True)
    room = size - given
    # After t full turns run r has got min(room, t); the last turn may not reach all of them.
    turns = torch.arange(max(sizes) + 1, device=budgets.device)[:, None]
    spent = torch.minimum(room[:, None], turns).sum(dim=2)  # (images, turns)
    full = (spent <= surplus).sum(dim=1, keepdim=True) - 1
    left = surplus - spent.gather(1, full)
    waiting = room > full
    rank = ranks(scores.masked_fill(~waiting, -torch.inf))
    return given + torch.minimum(room, full) + (waiting & (rank < left)).long()


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Place of each entry of a row in order of falling score, ties to the lower place."""
    return falling(scores).argsort(dim=-1)


def holov(features: torch.Tensor, attention: torch.Tensor, budget: int, crops: int) -> torch.Tensor:
    """Places in the order of their tokens: run after run, in a run by falling attention.

    A run that keeps all of its tokens keeps them in grid order.

    Args:
        features: ``(images, N, D)``, any float dtype (computed in float32).
        attention: ``(images, N)``, mean over heads.
        budget: how many, at most N.
        crops: number of runs; no more than N.

    Returns:
        int64 ``(images, budget)``, all different.
    """
    n = attention.shape[1]
    crops = min(crops, n)
    sizes = run_sizes(n, crops)
    scores = run_scores(features, attention, crops)
    return take_runs(attention, share_surplus(run_budgets(scores, budget), scores, sizes), budget)


def take_runs(attention: torch.Tensor, budgets: torch.Tensor, budget: int) -> torch.Tensor:
    """The tokens of each run with the highest attention, see :func:`holov`.

    Args:
        attention: ``(images, N)``; budgets: int64 ``(images, crops)``, tokens of each run.
        budget: their sum, for every image.
    """
    images, n = attention.shape
    sizes = run_sizes(n, budgets.shape[1])
    device = attention.device
    starts = [0, *accumulate(sizes)]
    run = torch.tensor([r for r, size in enumerate(sizes) for _ in range(size)], device=device)
    start = torch.tensor([starts[r] for r, size in enumerate(sizes) for _ in range(size)])
    start = start.to(device)
    place = torch.arange(n, device=device)
    # By attention, then (stable) by run: a token's rank in its run is its place less the run's.
    order = falling(attention.float())
    order = order.gather(1, run[order].argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter(1, order, (place - start).expand(images, n))
    limit = budgets[:, run]
    whole = limit >= torch.tensor(sizes, device=device)[run]
    rank = torch.where(whole, place - start, rank)
    position = torch.where(rank < limit, start + rank, n)
    return position.argsort(dim=1, stable=True)[:, :budget]


@register
@dataclass(frozen=True)
class HoloV(Method):
    """Give each run of consecutive tokens a share of the budget, before the language model.

    The tokens are cut into ``crops`` runs (consecutive in raster order, not squares); a run's share
    follows its score, and in a run the tokens with the highest CLS attention stay, in order of
    falling attention; a run that keeps all stays in grid order. Positions are consecutive. All
    crops of a high-resolution picture are one sequence with one budget.

    Known finding: the diversity term of the published score cancels when a run is averaged, so
    only attention decides; tokens' contents have no say.

    Deviations from the published code: what a run gets beyond what it has goes to other runs
    (there: rows of zeros are handed on as tokens); a run of one token is scaled like the others
    (there: it scores 1000 times less); any grid. Where positions have several
    axes (Qwen2-VL) or text stands between tiles, tokens stay where they stood. Towers without CLS:
    mean attention received from all patches.
    """

    name = "holov"
    paper = "arXiv 2510.02912"
    code = "obananas/HoloV"
    sites = ("features",)
    budget_field = "budget"

    budget: Budget = option(
        64, a_budget(), "Visual tokens kept per image, or their ratio.", tag="keep", always=True
    )
    crops: int = option(16, an_integer(1), "Runs that the tokens are cut into, at least 1.")

    def feature_stage(self) -> FeatureStage:
        """Needs projected tokens and CLS attention."""
        return FeatureStage(
            ("projected", "attention"), self._rule, over="picture", budget=self.budget
        )

    def _rule(self, evidence: FeatureEvidence) -> NewTokens:
        assert evidence.projected is not None and evidence.attention is not None
        budget = resolve_budget("budget", self.budget, evidence.patches)
        attention = evidence.attention.float().mean(dim=1)
        places = holov(evidence.projected, attention, budget, self.crops)
        return NewTokens(places, places)
