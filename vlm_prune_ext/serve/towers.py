"""Evidence from towers as vLLM builds them: queries, keys and values are one projection, and heads
may be shared out among devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import Packed, VisionParts
from vlm_prune_ext.engine.tower import PackedWatch, TowerWatch, Watch

Gather = Callable[[torch.Tensor], torch.Tensor]
"""``(..., own)`` -> ``(..., all)``: what the devices hold of the last dimension, in their order."""


class FusedWatch(TowerWatch):
    """On CLIP and SigLIP towers whose attention has one ``qkv_proj``.

    Args:
        parts, needs: see :class:`Watch`.
        gather: collects heads.
    """

    def __init__(self, parts: VisionParts, needs: tuple[str, ...], gather: Gather) -> None:
        super().__init__(parts, needs)
        self.gather = gather

    def _in_attention(self, layer: Any) -> list[Any]:
        if not {"attention", "keys"} & set(self.needs):
            return []
        return [layer.self_attn.qkv_proj.register_forward_hook(self._see_both)]

    def _see_both(self, module: nn.Module, args: Any, output: Any) -> None:
        fused = output[0] if isinstance(output, tuple) else output
        queries, keys, _ = fused.chunk(3, dim=-1)
        if "attention" in self.needs:
            self._see_queries(module, args, self.gather(queries))
        self._see_keys(module, args, self.gather(keys))


def tile_parts(tower: Any, projector: nn.Module, num_heads: int) -> VisionParts:
    """A CLIP or SigLIP tower, which vLLM builds up to the feature layer only."""
    body = tower.vision_model
    layers = body.encoder.layers
    return VisionParts(
        tower=tower,
        layers=layers,
        num_heads=num_heads,
        grid=0,
        feature_layer=len(layers) - 1,
        projector=projector,
        cls=hasattr(body.embeddings, "class_embedding"),
        drops=False,
    )


class PackedRead:
    """See :attr:`Packed.read`.

    Args:
        attn: the attention module.
        gather: collects heads.

    Attributes:
        lengths: patches of the images that are being encoded.
    """

    def __init__(self, attn: Any, gather: Gather) -> None:
        self.attn, self.gather = attn, gather
        self.lengths: list[int] = []

    def __call__(
        self, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """What the layer is called with -> queries, keys, lengths."""
        fused, _ = self.attn.qkv(hidden.flatten(0, -2))
        width = self.attn.hidden_size_per_attention_head
        cosines, sines = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]

        def heads(part: torch.Tensor) -> torch.Tensor:
            return self.gather(part.contiguous()).unflatten(-1, (-1, width))

        queries, keys, _ = (heads(part) for part in fused.chunk(3, dim=-1))
        both = torch.stack([queries, keys])
        queries, keys = self.attn.apply_rotary_emb(both, cosines, sines)
        return queries, keys, self.lengths


def packed_parts(tower: Any, read: PackedRead, layer: int, num_heads: int) -> VisionParts:
    """One of Qwen's towers.

    Args:
        tower: vLLM's module.
        read: of the attention of ``layer``.
        layer: the last one in which a patch sees its whole image.
        num_heads: of its attention, on all devices.
    """
    # What vLLM may compile is called without hooks: then those of its parts are used.
    merger, group = tower.merger, int(tower.spatial_merge_size) ** 2
    compiled = hasattr(merger, "do_not_compile")
    return VisionParts(
        tower=tower,
        layers=tower.blocks,
        num_heads=num_heads,
        grid=0,
        feature_layer=layer,
        projector=merger.mlp if compiled else merger,
        cls=False,
        drops=False,
        packed=Packed(read.attn, read, group, merger.ln_q if compiled else None),
    )


def served_watch(gather: Gather) -> Callable[[VisionParts, tuple[str, ...]], Watch]:
    """What notes a rule's needs on a tower of vLLM."""

    def make(parts: VisionParts, needs: tuple[str, ...]) -> Watch:
        return (
            FusedWatch(parts, needs, gather) if parts.packed is None else PackedWatch(parts, needs)
        )

    return make
