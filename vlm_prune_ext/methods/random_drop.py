"""Baseline: keep visual tokens at random.

A baseline that any selection has to beat; reported as surprisingly strong (arXiv 2510.07143).
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Budget, Evidence, Method, Stage, register, resolve_budget
from vlm_prune_ext.methods.option import a_budget, a_layer, a_seed, option
from vlm_prune_ext.select import random_places


@register
@dataclass(frozen=True)
class RandomDrop(Method):
    """Keep visual tokens drawn uniformly at random, without replacement.

    The draw depends on the seed and on the number of visual tokens an image has, on nothing else:
    images of equal length keep the same places, in whatever batch they stand. With one seed, a
    smaller budget keeps a subset of a larger one.
    """

    name = "random"
    paper = "arXiv 2510.07143"
    budget_field = "keep"
    standard = {"keep": 100}

    keep: Budget = option(
        ..., a_budget(), "Visual tokens kept per image, or their ratio.", always=True
    )
    layer: int = option(
        0, a_layer(), "Layer in front of which tokens go; 0: before the language model.", tag="k"
    )
    seed: int = option(0, a_seed(), "Seed of the draw, from 0 to 2**63 - 1.")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage, in front of ``layer``, that needs to see nothing."""
        return (Stage(self.layer, (), self._rule, budget=self.keep),)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        keep = resolve_budget("keep", self.keep, evidence.total)
        places = random_places(evidence.count, keep, self.seed).to(evidence.places.device)
        return places.expand(evidence.places.shape[0], keep)
