"""HiMAP: prune visual tokens twice, by what the text reads and then by what images read.

Paper: Yin, Si and Wang, "Lifting the Veil on Visual Information Flow in MLLMs: Unlocking Pathways
to Faster Inference" (CVPR 2025, arXiv 2503.13108), the section on Hierarchical Modality-Aware
Pruning. Code: ``ustc-hyin/HiMAP``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Stage,
    register,
    require_layer,
    resolve_budget,
    say_once,
)
from vlm_prune_ext.methods.option import (
    a_budget,
    a_layer,
    image_length,
    option,
    require,
    system_length,
)
from vlm_prune_ext.select import top_k_ascending


@register
@dataclass(frozen=True)
class HiMAP(Method):
    """Drop visual tokens by text attention in a shallow layer, then by image attention deeper.

    Stage 1, in front of layer ``attn_txt_layer``: a visual token's score is the attention it
    receives in layer ``attn_txt_layer - 1``, averaged over query heads and summed over the text
    behind the image; the ``attn_txt_rank`` highest of each image stay. Stage 2, in front of
    ``attn_img_layer``, the same with the remaining visual tokens as the queries, down to
    ``attn_img_rank``.

    Deviations from the published code, none of which changes a single unpadded prefill: attention
    rows are recomputed from cached keys, so fused attention kernels stay in use (stage 2 needs
    many rows; they are summed in blocks); the KV cache works and decoding never selects again,
    where the published code runs the whole sequence at each step; every sample of a batch gets a
    selection of its own and padding takes no part; with several images, the text behind the last
    one is the text, and all remaining visual tokens are the queries of stage 2; ties go to the
    lower position.
    """

    name = "himap"
    paper = "arXiv 2503.13108"
    code = "ustc-hyin/HiMAP"
    budget_field = "attn_txt_rank"
    config_flag = "use_hmap_v"
    config_prefix = "hmap_v_"
    resets = ("reset_hmapv",)

    attn_txt_layer: int = option(
        2, a_layer(1), "Layer in front of which stage 1 drops, at least 1.", tag="txtlayer"
    )
    attn_txt_rank: Budget = option(
        288,
        a_budget(),
        "Visual tokens kept per image by stage 1, or their ratio.",
        tag="txt",
        always=True,
    )
    attn_img_layer: int | None = option(
        8,
        a_layer(1).optional(),
        "Layer in front of which stage 2 drops, above attn_txt_layer; None: stage 1 only.",
        tag="imglayer",
    )
    attn_img_rank: Budget | None = option(
        72,
        a_budget().optional(),
        "Visual tokens kept per image by stage 2, at most attn_txt_rank, or their ratio at "
        "layer 0.",
        tag="img",
        always=True,
    )
    sys_length: int | None = system_length()
    img_length: int | None = image_length()

    def check(self) -> None:
        """Stage 2 comes behind stage 1 and keeps no more."""
        if self.attn_img_layer is None:
            return
        above = f"above attn_txt_layer={self.attn_txt_layer}, or None for stage 1 only"
        behind = self.attn_img_layer > self.attn_txt_layer
        require(behind, "attn_img_layer", self.attn_img_layer, above)
        stated = self.attn_img_rank is not None
        require(stated, "attn_img_rank", None, "a keep budget, where there is a stage 2")
        assert self.attn_img_rank is not None
        if isinstance(self.attn_img_rank, float) is isinstance(self.attn_txt_rank, float):
            most = f"at most attn_txt_rank={self.attn_txt_rank}"
            fits = self.attn_img_rank <= self.attn_txt_rank
            require(fits, "attn_img_rank", self.attn_img_rank, most)

    @classmethod
    def budget_defaults(cls, budget: Any) -> dict[str, Any]:
        """``himap:N``: stage 2 keeps 72, as published; behind a ratio or fewer than 72 the quarter
        of stage 1 that this is."""
        if isinstance(budget, float):
            return {"attn_img_rank": budget / 4}
        return {"attn_img_rank": max(1, budget // 4)} if budget < 72 else {}

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One or two stages."""
        model = f"a model of {num_layers} layers"
        text = Stage(
            self.attn_txt_layer, ("attention:text",), self._by_text, budget=self.attn_txt_rank
        )
        if self.attn_img_layer is None:
            return (text,)
        low = self.attn_txt_layer + 1
        require_layer("attn_txt_layer", self.attn_txt_layer, 1, num_layers - 1, model)
        require_layer("attn_img_layer", self.attn_img_layer, low, num_layers - 1, model)
        image = Stage(
            self.attn_img_layer, ("attention:visual",), self._by_image, budget=self.attn_img_rank
        )
        return text, image

    def _by_text(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.attention is not None
        keep = resolve_budget("attn_txt_rank", self.attn_txt_rank, evidence.total)
        return top_k_ascending(evidence.attention, keep)

    def _by_image(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.attention is not None and self.attn_img_rank is not None
        keep = resolve_budget("attn_img_rank", self.attn_img_rank, evidence.total)
        if keep > evidence.count:  # a count beside a ratio, compared once the image is there
            say_once(
                f"attn_img_rank={self.attn_img_rank} is above what attn_txt_rank="
                f"{self.attn_txt_rank} leaves of some images: these keep all of that."
            )
        return top_k_ascending(evidence.attention, min(keep, evidence.count))

    def label(self) -> str:
        """As in the base; without the fields of stage 2 where there is none."""
        if self.attn_img_layer is not None:
            return super().label()
        layer = "" if self.attn_txt_layer == 2 else f"_txtlayer{self.attn_txt_layer}"
        return f"{self.name}_txt{self.attn_txt_rank}{layer}"
