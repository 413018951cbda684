"""FastV: keep the visual tokens that the last token attends to most in an early layer.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764),
section 4.1. Code: ``pkunlp-icler/FastV``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Stage,
    plain_numbers,
    require,
    require_budget,
    require_int,
    require_layer,
    require_span,
    resolve_budget,
)
from vlm_prune_ext.select import top_k_ascending


@dataclass(frozen=True)
class FastV(Method):
    """Drop visual tokens once, in front of layer ``agg_layer``.

    Score of a visual token: the softmax attention it receives from the last token of the
    sequence in layer ``agg_layer - 1``, averaged over query heads. The ``attention_rank`` highest
    of each image stay.

    Deviations from the published code, none of which changes a single unpadded run: the one
    attention row is recomputed from cached keys, so fused attention kernels stay in use; the KV
    cache works and decoding never selects again in ``drop`` mode; every sample of a batch gets a
    selection of its own; ties go to the lower position.

    Attributes:
        agg_layer: 0-based layer K in front of which tokens go, 1 ... number of layers - 1.
        attention_rank: visual tokens kept per image (int), or ratio (float in (0, 1]).
        sys_length: tokens in front of the image; ``None`` is detected, a wrong one is an error.
        image_token_length: visual tokens of the prompt; ``None`` is detected.
        mode: ``"drop"`` removes tokens; ``"mask"`` (``fast_v_inplace: false`` in the published
            code) hides them as keys from layer K on, saves no time, and selects anew at each
            decode step.

    Raises:
        InputError: for a value outside these ranges.
    """

    agg_layer: int = 3
    attention_rank: Budget = 100
    sys_length: int | None = None
    image_token_length: int | None = None
    mode: Literal["drop", "mask"] = "drop"

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764"
    code: ClassVar[str] = "pkunlp-icler/FastV"
    CONFIG_FLAG: ClassVar[str] = "use_fast_v"
    CONFIG_FIELDS: ClassVar[Mapping[str, str]] = {
        "fast_v_sys_length": "sys_length",
        "fast_v_image_token_length": "image_token_length",
        "fast_v_attention_rank": "attention_rank",
        "fast_v_agg_layer": "agg_layer",
        "fast_v_inplace": "mode",
    }
    BUDGET: ClassVar[str] = "attention_rank"
    LABEL: ClassVar[Mapping[str, str]] = {"attention_rank": "rank", "agg_layer": "k", "mode": ""}

    def __post_init__(self) -> None:
        plain_numbers(self)
        require_int("agg_layer", self.agg_layer, 1)
        require_budget("attention_rank", self.attention_rank)
        require_span(self.sys_length, "image_token_length", self.image_token_length)
        require(self.mode in ("drop", "mask"), "mode", self.mode, "'drop' or 'mask'")

    @property
    def stated_span(self) -> tuple[int | None, int | None]:
        """What the user stated about the layout of the prompt."""
        return self.sys_length, self.image_token_length

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage, in front of ``agg_layer``."""
        model = f"a model of {num_layers} layers"
        require_layer("agg_layer", self.agg_layer, 1, num_layers - 1, model)
        stage = Stage(
            self.agg_layer, ("attention:last",), self._rule, self.mode, self.attention_rank
        )
        return (stage,)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.attention is not None
        keep = resolve_budget("attention_rank", self.attention_rank, evidence.total)
        return top_k_ascending(evidence.attention, keep)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """As in the base, with ``fast_v_inplace`` (true: drop, false: mask) understood."""
        settings = dict(settings)
        inplace = settings.pop("fast_v_inplace", None)
        if inplace is not None:
            require(isinstance(inplace, bool), "fast_v_inplace", inplace, "true or false")
            settings.setdefault("mode", "drop" if inplace else "mask")
        return super().from_settings(settings)
