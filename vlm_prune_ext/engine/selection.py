"""A method's stages, carried out one after the other, and the record of what they kept."""

from __future__ import annotations

import torch

from vlm_prune_ext.engine.call import Call
from vlm_prune_ext.engine.evidence import Looker
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.base import Stage


class Selection:
    """Runs stages.

    Args:
        stages: layer -> the stage in front of it.
        num_layers: of the decoder.
        trace: to be written to.
    """

    def __init__(self, stages: dict[int, Stage], num_layers: int, trace: Trace) -> None:
        self.stages, self.num_layers, self.trace = stages, num_layers, trace

    def run(self, layer: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Select in front of ``layer``; returns the hidden states that go on."""
        stage = self.stages[layer]
        prefill = call.state.prefill
        prefill.move(hidden.device)
        gone = prefill.select(stage, Looker(stage.needs, call.attention, call.keys, hidden))
        call.forget_evidence()
        if gone is not None and stage.mode == "drop":
            index = prefill.drop(layer, gone)
            hidden = take(hidden, index, -2)
            for later in range(layer, self.num_layers):
                self.trace.lengths[later] = prefill.layout.count
        elif gone is not None:
            prefill.hidden_keys[layer] = gone
        prefill.record(layer, self.trace, prefill.hidden_keys.get(layer))
        self._translate(layer, call)
        return hidden

    def _translate(self, layer: int, call: Call) -> None:
        """Slots -> positions of the sequence that entered layer 0, where layer 0 itself dropped."""
        short = call.state.short
        if short is not None and short.origin is not None:
            kept = self.trace.kept[layer]
            real = short.origin.to(kept.device).gather(1, kept.clamp(min=0))
            self.trace.kept[layer] = torch.where(kept < 0, kept, real)

    def write_trace(self, layer: int, call: Call, layout: Layout, visual: list[int]) -> None:
        """Note what another way of running the model (fast.py) kept in front of ``layer``."""
        self.trace.kept[layer] = layout.positions()
        self.trace.visual_tokens[layer] = visual
        for later in range(layer, self.num_layers):
            self.trace.lengths[later] = layout.count
        self._translate(layer, call)

    def again(self, layer: int, call: Call) -> None:
        """Mask mode, decode step: choose anew what the layers from ``layer`` on may see."""
        stage = self.stages[layer]
        prefill = call.state.prefill
        gone = prefill.select(stage, Looker(stage.needs, call.attention, call.keys, None))
        call.forget_evidence()
        prefill.hidden_keys.pop(layer, None)
        if gone is not None:
            prefill.hidden_keys[layer] = gone
        prefill.record(layer, self.trace, gone)
