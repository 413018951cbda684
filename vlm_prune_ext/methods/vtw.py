"""VTW: the deeper layers run on text alone.

Paper: Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for
Rapid Inference" (AAAI 2025, arXiv 2405.05803). Code: ``lzhxmu/VTW``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Evidence, Method, Stage, register
from vlm_prune_ext.methods.option import a_layer, option


@register
@dataclass(frozen=True)
class VTW(Method):
    """Withdraw all visual tokens in front of layer ``layer``.

    The text keeps its rotary positions; layers from ``layer`` on cache text only. Which layer is
    deep enough is the paper's search over 20 samples (15 of 32 for LLaVA-1.5-7B); give it here.

    Deviations from the published code, none of which changes a run of one image: places and lengths
    of images are found in the input instead of being fixed at 35 and 576; eager attention works
    behind the withdrawal; batches, paddings and several images do.
    """

    name = "vtw"
    paper = "arXiv 2405.05803"
    code = "lzhxmu/VTW"
    budget_field = "layer"

    layer: int = option(
        15, a_layer(), "Layer in front of which visual tokens go.", tag="k", always=True
    )

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage that looks at nothing."""
        return (Stage(self.layer, (), _nothing, left=lambda total, now: 0),)


def _nothing(evidence: Evidence) -> torch.Tensor:
    return evidence.places[:, :0]
