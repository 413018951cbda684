"""One run of the decoder, and what decoding must remember of its prompt."""

from __future__ import annotations

from typing import Any

import torch

from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.engine.shorten import Shortened


class State:
    """What decoding must remember of a prompt."""

    def __init__(self, prefill: Prefill, short: Shortened | None) -> None:
        self.prefill, self.short = prefill, short

    @property
    def misses_tokens(self) -> bool:
        """Whether any layer's cache holds less than the prompt."""
        cut = any(layout.count < layout.total for layout in self.prefill.segments.values())
        return cut or (self.short is not None and not self.short.whole)


class Call:
    """One run of the decoder."""

    def __init__(self, state: State, prefill: bool) -> None:
        self.state, self.prefill = state, prefill
        self.cache: Any = None
        self.masks: dict[Any, tuple[Any, Any]] = {}
        self.positions: dict[Any, tuple[Any, Any]] = {}
        self.attention: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None

    def forget_evidence(self) -> None:
        """Scores serve one stage only."""
        self.attention = self.keys = None

    def gaps(self, cut: bool) -> bool:
        """Do this layer's positions have gaps?"""
        short = self.state.short
        return self.prefill and (cut or (short is not None and not short.whole))

    def cut_positions(self, name: str, value: Any, layout: Layout) -> Any:
        """Positions of the tokens a layer holds; computed once for all layers that hold them."""
        key = (name, id(layout), id(value))
        if key not in self.positions:
            if name == "position_ids":
                made: Any = take(value, layout.slots, -1)
            else:
                made = tuple(take(part, layout.slots, -2) for part in value)
            self.positions[key] = (value, made)
        return self.positions[key][1]
