"""HiMAP: prune visual tokens twice, by what the text reads and then by what images read.

Paper: Yin, Si and Wang, "Lifting the Veil on Visual Information Flow in MLLMs: Unlocking Pathways
to Faster Inference" (CVPR 2025, arXiv 2503.13108), the section on Hierarchical Modality-Aware
Pruning. Code: ``ustc-hyin/HiMAP``.
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
    require,
    require_budget,
    require_int,
    require_layer,
    require_span,
    resolve_budget,
)
from vlm_prune_ext.select import top_k_ascending


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

    Attributes:
        attn_txt_layer: 0-based layer in front of which stage 1 drops, at least 1.
        attn_txt_rank: visual tokens kept per image by stage 1 (int), or ratio (float in (0, 1]).
        attn_img_layer: layer in front of which stage 2 drops, above attn_txt_layer; None: stage 1
            only.
        attn_img_rank: visual tokens kept per image by stage 2 (int), or ratio of the tokens at
            layer 0; at most attn_txt_rank.
        sys_length: tokens in front of the image; None is detected, a wrong one is an error.
        img_length: visual tokens of the prompt; None is detected, a wrong one is an error.

    Raises:
        InputError: for a value outside these ranges.
    """

    attn_txt_layer: int = 2
    attn_txt_rank: Budget = 288
    attn_img_layer: int | None = 8
    attn_img_rank: Budget | None = 72
    sys_length: int | None = None
    img_length: int | None = None

    name: ClassVar[str] = "himap"
    paper: ClassVar[str] = "arXiv 2503.13108"
    code: ClassVar[str] = "ustc-hyin/HiMAP"
    CONFIG_FLAG: ClassVar[str] = "use_hmap_v"
    CONFIG_FIELDS: ClassVar[Mapping[str, str]] = {
        "hmap_v_sys_length": "sys_length",
        "hmap_v_img_length": "img_length",
        "hmap_v_attn_txt_layer": "attn_txt_layer",
        "hmap_v_attn_txt_rank": "attn_txt_rank",
        "hmap_v_attn_img_layer": "attn_img_layer",
        "hmap_v_attn_img_rank": "attn_img_rank",
    }
    BUDGET: ClassVar[str] = "attn_txt_rank"
    LABEL: ClassVar[Mapping[str, str]] = {
        "attn_txt_rank": "txt",
        "attn_img_rank": "img",
        "attn_txt_layer": "txtlayer",
        "attn_img_layer": "imglayer",
    }
    LABEL_ALWAYS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        plain_numbers(self)
        require_int("attn_txt_layer", self.attn_txt_layer, 1)
        require_budget("attn_txt_rank", self.attn_txt_rank)
        require_span(self.sys_length, "img_length", self.img_length)
        if self.attn_img_layer is None:
            return
        require_int("attn_img_layer", self.attn_img_layer, 1)
        above = f"above attn_txt_layer={self.attn_txt_layer}, or None for stage 1 only"
        require(
            self.attn_img_layer > self.attn_txt_layer, "attn_img_layer", self.attn_img_layer, above
        )
        require_budget("attn_img_rank", self.attn_img_rank)
        assert self.attn_img_rank is not None
        if isinstance(self.attn_img_rank, float) is isinstance(self.attn_txt_rank, float):
            require(
                self.attn_img_rank <= self.attn_txt_rank,
                "attn_img_rank",
                self.attn_img_rank,
                f"at most attn_txt_rank={self.attn_txt_rank}",
            )

    @property
    def stated_span(self) -> tuple[int | None, int | None]:
        """What the user stated about the layout of the prompt."""
        return self.sys_length, self.img_length

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """One or two stages."""
        model = f"a model of {num_layers} layers"
        require_layer("attn_txt_layer", self.attn_txt_layer, 1, num_layers - 1, model)
        text = Stage(
            self.attn_txt_layer, ("attention:text",), self._by_text, budget=self.attn_txt_rank
        )
        if self.attn_img_layer is None:
            return (text,)
        low = self.attn_txt_layer + 1
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
        # A count beside a ratio can only be compared once the image is there.
        left = f"at most the {evidence.count} visual tokens that attn_txt_rank leaves"
        require(keep <= evidence.count, "attn_img_rank", self.attn_img_rank, left)
        return top_k_ascending(evidence.attention, keep)

    def label(self) -> str:
        """As in the base; without the fields of stage 2 where there is none."""
        if self.attn_img_layer is not None:
            return super().label()
        layer = "" if self.attn_txt_layer == 2 else f"_txtlayer{self.attn_txt_layer}"
        return f"{self.name}_txt{self.attn_txt_rank}{layer}"
