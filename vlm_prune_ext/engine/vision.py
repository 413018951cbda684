"""Dropping patches inside a CLIP-like tower.

A tower layer drops after its attention, by its own keys. The MLP of that layer still runs on the
dropped patches (it works token by token, so the patches that stay are not touched by that); every
later layer is really shorter. The projector's output is put back on the full grid, so that a whole
model packs it as ever; compose.py leaves the gaps out of what the decoder is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.features import Watch
from vlm_prune_ext.engine.parts import VisionParts
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.base import Method, VisionStage


class VisionPruner(Watch):
    """Carries a method's vision stages out on a tower.

    Args:
        parts: where the tower's parts are.
        method: what to do.
        trace: ``vision_kept`` is filled at each run of the tower.
    """

    def __init__(self, parts: VisionParts, method: Method, trace: Trace) -> None:
        super().__init__(parts, ())
        self.trace = trace
        stages = method.vision_stages(len(parts.layers), parts.feature_layer)
        self.stages = {stage.layer: stage for stage in stages}
        self.keys: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None  # grid indices of the patches still there
        self.patches = 0

    def _in_tower(self) -> list[Any]:
        tower, layers = self.parts.tower, self.parts.layers
        handles: list[Any] = [tower.register_forward_pre_hook(self._begin)]
        for index, stage in self.stages.items():
            attn: Any = layers[index].self_attn
            handles.append(attn.k_proj.register_forward_hook(self._see_keys))
            # In front of any hook that records the layer's output: it must record what is left.
            hook = _LayerHook(self, stage)
            handles.append(layers[index].register_forward_hook(hook, prepend=True))
        return handles

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.kept = self.keys = None
        self.trace.vision_kept.clear()

    def _see_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.keys = output.unflatten(-1, (self.parts.num_heads, -1)).transpose(1, 2)

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

    def _after_projector(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The features on the full grid again, with nothing in the gaps."""
        tiles = output if output.dim() == 3 else output[None]
        kept = self.kept
        assert kept is not None
        self.seen.note("kept", kept)
        full = tiles.new_zeros(tiles.shape[0], self.patches, tiles.shape[-1])
        full.scatter_(1, kept[..., None].expand(tiles.shape), tiles)
        made = self.hand_on(full)
        return made if output.dim() == 3 else made[0]


class _LayerHook:
    """Forward hook of one tower layer, whose output may be a tensor or a tuple."""

    def __init__(self, pruner: VisionPruner, stage: VisionStage) -> None:
        self.pruner, self.stage = pruner, stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.pruner.after_layer(self.stage, output[0]), *output[1:])
        return self.pruner.after_layer(self.stage, output)
