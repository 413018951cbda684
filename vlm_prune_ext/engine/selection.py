"""A method's stages, carried out one after the other, and the record of what they kept."""

from __future__ import annotations

import torch

from vlm_prune_ext.engine.call import Call
from vlm_prune_ext.engine.evidence import Looker, Seen
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.evidence import Stage


class Selection:
    """Runs stages.

    Args:
        stages: layer -> the stage in front of it.
        parts: where things are in the model.
        trace: to be written to.
    """

    def __init__(self, stages: dict[int, Stage], parts: ModelParts, trace: Trace) -> None:
        self.stages, self.parts, self.trace = stages, parts, trace
        self.num_layers = len(parts.layers)

    def run(self, layer: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Select in front of ``layer``; returns the hidden states that go on."""
        stage, prefill = self.stages[layer], call.state.prefill
        prefill.move(hidden.device)
        look = Looker(stage.needs, self.parts, prefill, hidden, call.take_seen())
        if stage.mode == "observe":
            prefill.observe(stage, look)
            return hidden
        gone, added = prefill.select(stage, look)
        if stage.mode == "mask":
            if gone is not None:
                prefill.hidden_keys[layer] = gone
        elif gone is not None or added is not None:
            index = prefill.drop(layer, gone, added, recount=stage.recount)
            if added is not None:
                hidden = torch.cat([hidden, added.hidden.to(hidden.dtype)], dim=1)
                self.trace.merged[layer] = added.names.shape[1]
            hidden = take(hidden, index, -2)
        self._note(layer, prefill.layout.count)
        prefill.record(layer, self.trace, prefill.hidden_keys.get(layer))
        self._translate(layer, call)
        return hidden

    def _note(self, layer: int, count: int) -> None:
        self.trace.lengths[layer:] = [count] * (self.num_layers - layer)

    def _translate(self, layer: int, call: Call) -> None:
        """Slots -> positions of the sequence that entered layer 0, where layer 0 itself dropped."""
        short = call.state.short
        kept = self.trace.kept.get(layer)  # none where another thread began a prompt
        if kept is not None and short is not None and short.origin is not None:
            self.trace.kept[layer] = torch.where(kept < 0, kept, short.places(kept.clamp(min=0)))

    def write_trace(
        self, layer: int, call: Call, layout: Layout, visual: list[int], merged: int
    ) -> None:
        """Note what another way of running the model (fast/run.py) kept in front of ``layer``, and
        how many rows it added there."""
        self.trace.kept[layer] = layout.kept()
        self.trace.visual_tokens[layer] = visual
        if layout.positions is not None:
            self.trace.positions[layer] = layout.counted()
        if merged:
            self.trace.merged[layer] = merged
        self._note(layer, layout.count)
        self._translate(layer, call)

    def again(self, layer: int, call: Call, rows: list[Seen]) -> None:
        """Mask mode, decode step: choose anew what the layers from ``layer`` on may see.

        Args:
            layer: in front of which.
            call: the run that it is part of.
            rows: what each token of the call is shown.
        """
        stage, prefill = self.stages[layer], call.state.prefill
        looks = [Looker(stage.needs, self.parts, prefill, None, seen) for seen in rows]
        gone = [prefill.select(stage, look)[0] for look in looks]
        prefill.hidden_keys.pop(layer, None)
        if any(one is not None for one in gone):
            nothing = torch.zeros_like(prefill.layout.slots, dtype=torch.bool)
            hidden = torch.stack([nothing if one is None else one for one in gone], dim=1)
            prefill.hidden_keys[layer] = hidden[:, 0] if len(rows) == 1 else hidden
        prefill.record(layer, self.trace, gone[-1])
