"""Dropping patches inside a CLIP-like tower, and resizing what it hands on.

A tower layer drops after its attention, by its own keys. The MLP of that layer still runs on the
dropped patches (it works token by token, so the patches that stay are not touched by that); every
later layer is really shorter.

A whole model expects as many image features as its prompt has placeholders, and packs them by
their place in the grid (newline tokens, unpadding of tiles). So the projector's output is put
back on the full grid with rows of a marker in the gaps, the model packs it as ever, and the
decoder is given the sequence without the marked rows (shorten.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import Undo, VisionParts
from vlm_prune_ext.engine.shorten import DROPPED
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.base import Method, VisionStage


class VisionPruner:
    """Carries a method's vision stages (or its resizing) out on a tower.

    Args:
        parts: where the tower's parts are.
        method: what to do.
        trace: ``vision_kept`` is filled at each run of the tower.
    """

    def __init__(self, parts: VisionParts, method: Method, trace: Trace) -> None:
        self.parts, self.method, self.trace = parts, method, trace
        stages = method.vision_stages(len(parts.layers), parts.feature_layer)
        self.stages = {stage.layer: stage for stage in stages}
        self.keys: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None  # grid indices of the patches still there
        self.patches = 0

    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        tower, layers = self.parts.tower, self.parts.layers
        handles: list[Any] = [tower.register_forward_pre_hook(self._begin)]
        for index, stage in self.stages.items():
            attn = layers[index].self_attn
            handles.append(attn.k_proj.register_forward_hook(self._see_keys))  # type: ignore[union-attr,operator]
            # In front of any hook that records the layer's output: it must record what is left.
            hook = _LayerHook(self, stage)
            handles.append(layers[index].register_forward_hook(hook, prepend=True))
        if self.parts.projector is not None:
            handles.append(self.parts.projector.register_forward_hook(self._after_projector))
        return [handle.remove for handle in handles]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.kept = self.keys = None
        self.trace.vision_kept.clear()

    def _see_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        batch, tokens, width = output.shape
        heads = self.parts.num_heads
        self.keys = output.view(batch, tokens, heads, width // heads).transpose(1, 2)

    def after_layer(self, stage: VisionStage, hidden: torch.Tensor) -> torch.Tensor:
        """What is left of a layer's output ``(images, 1 + patches, dim)``, CLS first."""
        assert self.keys is not None
        batch, tokens = hidden.shape[:2]
        if self.kept is None:
            self.patches = tokens - 1
            self.kept = torch.arange(self.patches, device=hidden.device).expand(batch, -1)
        picked = stage.rule(self.keys[:, :, 1:])
        self.keys = None
        if picked.shape[1] < tokens - 1:
            self.kept = self.kept.gather(1, picked)
            rows = torch.arange(batch, device=hidden.device)[:, None]
            hidden = torch.cat([hidden[:, :1], hidden[rows, picked + 1]], dim=1)
        self.trace.vision_kept[stage.layer] = self.kept
        return hidden

    def _after_projector(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        features = output if output.dim() == 3 else output[None]
        side = self.parts.grid
        if self.stages:
            places, total = self.kept, self.patches
            if places is None or places.shape[1] == total:
                return None
        else:
            if features.shape[1] != side * side:
                return None
            grid = features.unflatten(1, (side, side))
            small = self.method.resize(grid)
            if small is None or small.shape[1:3] == grid.shape[1:3]:
                return None
            features = small.flatten(1, 2)
            places, total = _centres(small.shape[1], small.shape[2], side, features), side * side
        full = features.new_full((features.shape[0], total, features.shape[-1]), DROPPED)
        index = places[..., None].expand(features.shape)
        full.scatter_(1, index, features)
        return full if output.dim() == 3 else full[0]


class _LayerHook:
    """Forward hook of one tower layer, whose output may be a tensor or a tuple."""

    def __init__(self, pruner: VisionPruner, stage: VisionStage) -> None:
        self.pruner, self.stage = pruner, stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.pruner.after_layer(self.stage, output[0]), *output[1:])
        return self.pruner.after_layer(self.stage, output)


def _centres(rows: int, columns: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """Grid places nearest the centres of a coarser grid's cells, ``(images, rows * columns)``."""
    down = ((torch.arange(rows, device=like.device) + 0.5) * side / rows).long()
    across = ((torch.arange(columns, device=like.device) + 0.5) * side / columns).long()
    places = (down[:, None] * side + across).flatten()
    return places.expand(like.shape[0], -1)
