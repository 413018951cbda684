"""Baseline: shrink the grid of image features before the language model.

A baseline that any selection has to beat; reported as surprisingly strong (arXiv 2510.07143).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Budget, Method, register, resolve_budget
from vlm_prune_ext.methods.evidence import FeatureEvidence, FeatureStage, NewTokens
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import shrink_grid


@register
@dataclass(frozen=True)
class Downsample(Method):
    """Average-pool each image's feature grid to the largest square grid within the budget.

    ``keep`` tokens of a 24 x 24 grid: 144 gives 12 x 12, 100 gives 10 x 10, and 99 gives 9 x 9,
    the largest square that is not above it. Each new token is the mean of the features its area
    touches (adaptive average pooling). The language model sees a shorter prompt with consecutive
    positions, as if the picture had been smaller. A grid that is not square gives a square as well.
    With several crops per image each crop's grid is pooled, and row-end tokens stay.
    """

    name = "downsample"
    paper = "arXiv 2510.07143"
    sites = ("features",)
    budget_field = "keep"
    standard = {"keep": 144}

    keep: Budget = option(
        ..., a_budget(), "Visual tokens per image grid, at most, or their ratio.", always=True
    )

    def feature_stage(self) -> FeatureStage:
        """Needs projected tokens only."""
        return FeatureStage(
            ("projected",), self._rule, merges=True, row_ends=True, left=self._tokens
        )

    def _tokens(self, patches: int) -> int:
        return math.isqrt(resolve_budget("keep", self.keep, patches)) ** 2

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor | NewTokens:
        assert evidence.projected is not None
        if evidence.grid is None:
            raise InputError(
                f"downsample averages over a grid, and {evidence.patches} visual tokens of this "
                "model are none that is known."
            )
        grid = evidence.projected.unflatten(1, evidence.grid)
        small = self.resize(grid)
        if small is None:
            places = torch.arange(evidence.patches, device=grid.device)
            return places.expand(len(grid), -1)
        places = cell_centres(small.shape[1], evidence.grid, grid.device).expand(len(grid), -1)
        rows = small.flatten(1, 2)
        return NewTokens(places, places, rows=rows, projected=True, added=rows.shape[1])

    def resize(self, grid: torch.Tensor) -> torch.Tensor | None:
        """``(images, rows, columns, hidden)`` -> a smaller square grid; ``None`` if it fits."""
        height, width = grid.shape[1:3]
        side = math.isqrt(resolve_budget("keep", self.keep, height * width))
        return None if side >= max(height, width) else shrink_grid(grid, side)


def cell_centres(side: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Places nearest the centres of ``side * side`` cells of a grid, int64, in raster order."""
    middles = torch.arange(side, device=device) + 0.5
    down, across = ((middles * size / side).long() for size in grid)
    return (down[:, None] * grid[1] + across).flatten()
