"""FastV: keep the visual tokens that the last token attends to most in an early layer.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764),
section 4.1. Code: ``pkunlp-icler/FastV``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Budget, Evidence, Method, Stage, register, resolve_budget
from vlm_prune_ext.methods.option import (
    a_budget,
    a_layer,
    image_length,
    one_of,
    option,
    system_length,
)
from vlm_prune_ext.select import top_k_ascending


@register
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
    """

    name = "fastv"
    paper = "arXiv 2403.06764"
    code = "pkunlp-icler/FastV"
    budget_field = "attention_rank"
    config_flag = "use_fast_v"
    config_prefix = "fast_v_"

    agg_layer: int = option(
        3, a_layer(1), "Layer K in front of which tokens go, 1 ... number of layers - 1.", tag="k"
    )
    attention_rank: Budget = option(
        100, a_budget(), "Visual tokens kept per image, or their ratio.", tag="rank", always=True
    )
    sys_length: int | None = system_length()
    image_token_length: int | None = image_length()
    mode: Literal["drop", "mask"] = option(
        "drop",
        one_of("drop", "mask"),
        "Drop removes tokens; mask (fast_v_inplace: false) hides them as keys from layer K on, "
        "saves no time, and selects anew at each decode step.",
        config="fast_v_inplace",
        config_values={True: "drop", False: "mask"},
        tag="",
    )

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage, in front of ``agg_layer``."""
        return (
            Stage(
                self.agg_layer,
                ("attention:last",),
                self._rule,
                self.mode,
                budget=self.attention_rank,
            ),
        )

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.attention is not None
        keep = resolve_budget("attention_rank", self.attention_rank, evidence.total)
        return top_k_ascending(evidence.attention, keep)
