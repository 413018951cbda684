"""Baseline: shrink the grid of image features before the language model.

A baseline that any selection has to beat; reported as surprisingly strong (arXiv 2510.07143).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Budget, Method, register, resolve_budget
from vlm_prune_ext.methods.option import a_budget, option
from vlm_prune_ext.select import shrink_grid


@register
@dataclass(frozen=True)
class Downsample(Method):
    """Average-pool each image's feature grid to the largest square grid within the budget.

    ``keep`` tokens of a 24 x 24 grid: 144 gives 12 x 12, 100 gives 10 x 10, and 99 gives 9 x 9,
    the largest square that is not above it. Each new token is the mean of the features its area
    touches (adaptive average pooling). The language model sees a shorter prompt with consecutive
    positions, as if the picture had been smaller.
    """

    name = "downsample"
    paper = "arXiv 2510.07143"
    sites = ("features",)
    budget_field = "keep"
    standard = {"keep": 144}

    keep: Budget = option(
        ..., a_budget(), "Visual tokens per image grid, at most, or their ratio.", always=True
    )

    def resize(self, grid: torch.Tensor) -> torch.Tensor | None:
        """``(images, side, side, hidden)`` -> a smaller square grid; ``None`` if it fits."""
        height, width = grid.shape[1:3]
        side = math.isqrt(resolve_budget("keep", self.keep, height * width))
        return None if side >= max(height, width) else shrink_grid(grid, side)
