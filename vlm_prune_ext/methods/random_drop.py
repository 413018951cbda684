"""Baseline: keep visual tokens at random.

A baseline that any selection has to beat; reported as surprisingly strong (arXiv 2510.07143).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Stage,
    plain_numbers,
    require_budget,
    require_int,
    require_layer,
    require_seed,
    resolve_budget,
)
from vlm_prune_ext.select import random_places


@dataclass(frozen=True)
class RandomDrop(Method):
    """Keep visual tokens drawn uniformly at random, without replacement.

    The draw depends on the seed and on the number of visual tokens an image has, on nothing else:
    images of equal length keep the same places, in whatever batch they stand. With one seed, a
    smaller budget keeps a subset of a larger one.

    Attributes:
        keep: visual tokens kept per image (int), or ratio (float in (0, 1]).
        layer: 0-based layer in front of which tokens go; 0: before the language model.
        seed: of the draw, from 0 to 2**63 - 1.

    Raises:
        InputError: for a value outside these ranges.
    """

    keep: Budget
    layer: int = 0
    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "arXiv 2510.07143"
    BUDGET: ClassVar[str] = "keep"
    LABEL: ClassVar[Mapping[str, str]] = {"keep": "keep", "layer": "k", "seed": "seed"}

    def __post_init__(self) -> None:
        plain_numbers(self)
        require_budget("keep", self.keep)
        require_int("layer", self.layer, 0)
        require_seed("seed", self.seed)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage, in front of ``layer``, that needs to see nothing."""
        require_layer("layer", self.layer, 0, num_layers - 1, f"a model of {num_layers} layers")
        return (Stage(self.layer, (), self._rule, budget=self.keep),)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        keep = resolve_budget("keep", self.keep, evidence.total)
        places = random_places(evidence.count, keep, self.seed).to(evidence.places.device)
        return places.expand(evidence.places.shape[0], keep)
