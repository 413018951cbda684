"""What passes between a rule and the engine: what a rule may ask to see, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Budget = int | float
Need = Literal["attention:last", "attention:text", "attention:visual", "keys", "hidden"]


@dataclass
class Evidence:
    """What a rule sees: one group of images (a batch) with equally many visual tokens each.

    Attributes:
        total: visual tokens each image had when it entered layer 0 (what a ratio refers to).
        places: ``(batch, n)`` int64, which of those ``total`` tokens are still there, ascending.
        attention: ``(batch, n)`` float32, the attention each token received in the layer before,
            mean over query heads, summed over the query rows the stage asked for (``None`` if it
            asked for none).
        keys: ``(batch, kv_heads, n, head_dim)``, that layer's keys after rotary embedding.
        hidden: ``(batch, n, hidden)``, the hidden states that would enter the layer.
        sample: index in the batch of the forward pass, per row (for messages only; a rule must
            not let its answer depend on it, or a batch would differ from single runs).
    """

    total: int
    places: torch.Tensor
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    sample: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Visual tokens of each image that are still there, ``n``."""
        return self.places.shape[1]


Rule = Callable[[Evidence], torch.Tensor]
"""Evidence -> what stays: int64 ``(batch, k)`` places 0...n-1 in ascending order, or, where the
number may differ between rows, a bool mask ``(batch, n)``."""


@dataclass(frozen=True)
class Stage:
    """One selection in the language model.

    Attributes:
        layer: 0-based decoder layer in front of which tokens go; ``num_layers`` means after the
            last. Evidence about attention and keys is that of layer ``layer - 1``.
        needs: what the rule wants to see.
        rule: the pure selection.
        mode: ``"drop"`` removes tokens from the sequence; ``"mask"`` hides them as keys only and
            selects anew at each decode step.
        budget: what the rule keeps per image, for error messages and FLOPs (``None``: unknown
            before it runs, as with thresholds).
    """

    layer: int
    needs: tuple[Need, ...]
    rule: Rule
    mode: Literal["drop", "mask"] = "drop"
    budget: Budget | None = None


@dataclass(frozen=True)
class VisionStage:
    """One selection inside a CLIP-like vision tower, after the attention of ``layer``.

    ``rule(keys) -> kept``: ``keys`` ``(batch, heads, patches, head_dim)`` without CLS, as
    the layer's key projection gives them; returns int64 ``(batch, k)`` places among the patches
    that entered the layer, ascending.
    """

    layer: int
    rule: Callable[[torch.Tensor], torch.Tensor]
