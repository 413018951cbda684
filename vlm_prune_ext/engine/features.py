"""What tower and projector give, noted while a picture runs through them.

Nothing is computed but what the rule asked for, and the tower attends as ever. A whole model
expects as many features as its prompt has placeholders, and packs them by their place in the grid
(newline tokens, unpadding of tiles). So it is handed features that carry their address instead.
Where these stand in the decoder's input says which tiles are whose, in which order, and what
padding was cut off; compose.py reads them there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import Undo, VisionParts
from vlm_prune_ext.engine.shorten import DROPPED

# An address is written in this many channels, each a digit that every float type holds exactly; all
# other channels say that it is one.
_DIGITS, _BASE = 4, 256


def addresses(count: int, like: torch.Tensor) -> torch.Tensor:
    """``(count, width)``: rows that stand for features 0 ... count - 1."""
    number = torch.arange(count, device=like.device)
    rows = torch.full((count, like.shape[-1]), DROPPED, dtype=like.dtype, device=like.device)
    for digit in range(_DIGITS):
        rows[:, digit] = (number // _BASE**digit % _BASE).to(like.dtype)
    return rows


def read_addresses(rows: torch.Tensor) -> torch.Tensor:
    """Int64 ``(...)``: which feature each row of ``(..., width)`` stands for, -1: none."""
    powers = torch.tensor([_BASE**digit for digit in range(_DIGITS)], device=rows.device)
    number = (rows[..., :_DIGITS].long() * powers).sum(dim=-1)
    return torch.where((rows[..., _DIGITS:] == DROPPED).all(dim=-1), number, -1)


@dataclass
class Seen:
    """What tower and projector gave since the last prompt, tile by tile.

    Attributes:
        named: need -> tensors of several tower calls, each ``(tiles, ...)``.
        projected: outputs of the projector, each ``(tiles, N, D)``.
    """

    named: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    projected: list[torch.Tensor] = field(default_factory=list)

    def note(self, name: str, value: torch.Tensor) -> None:
        """One tower call's tensor."""
        self.named.setdefault(name, []).append(value.detach())

    def all(self, name: str) -> torch.Tensor:
        """Of all calls, ``(tiles, ...)``."""
        parts = self.projected if name == "projected" else self.named[name]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0]


class TowerWatch:
    """Notes what a rule needs of a tower.

    Args:
        parts: where the tower's parts are.
        needs: what the rule asked for.
    """

    def __init__(self, parts: VisionParts, needs: tuple[str, ...]) -> None:
        self.parts, self.needs = parts, needs
        self.seen = Seen()
        self._queries: torch.Tensor | None = None
        self._addressing = True

    @property
    def feature_layer(self) -> int:
        """Index of the layer whose output is projected."""
        assert self.parts.feature_layer is not None
        return self.parts.feature_layer

    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        parts, needs = self.parts, self.needs
        assert parts.projector is not None
        handles: list[Any] = []
        layer: Any = parts.layers[self.feature_layer]
        if "features" in needs or "joint" in needs:
            handles.append(layer.register_forward_hook(self._features))
        if "attention" in needs:
            handles.append(layer.self_attn.q_proj.register_forward_hook(self._see_queries))
        if "attention" in needs or "keys" in needs:
            handles.append(layer.self_attn.k_proj.register_forward_hook(self._see_keys))
        if "last" in needs:
            attn: Any = parts.layers[-1].self_attn
            handles.append(attn.q_proj.register_forward_hook(self._last_queries))
            handles.append(attn.k_proj.register_forward_hook(self._last_keys))
        handles.append(parts.projector.register_forward_hook(self._after_projector))
        return [handle.remove for handle in handles]

    def take(self) -> Seen:
        """What was noted; from now on it is forgotten here."""
        seen, self.seen = self.seen, Seen()
        return seen

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tiles, t, C)`` tower features -> ``(tiles, t, D)``."""
        projector: Any = self.parts.projector
        self._addressing = False
        try:
            return projector(rows)
        finally:
            self._addressing = True

    # -- hooks -------------------------------------------------------------------------------
    def _features(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.note("features", output[0] if isinstance(output, tuple) else output)

    def _see_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._queries = self._asking(output)

    def _asking(self, rows: torch.Tensor) -> torch.Tensor:
        """The row of CLS, or all rows where there is none."""
        return rows[:, :1] if self.parts.cls else rows

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tiles, n, C)`` -> ``(tiles, heads, n, head_dim)``."""
        return rows.unflatten(-1, (self.parts.num_heads, -1)).transpose(1, 2)

    def _see_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        keys = self._heads(output)
        if "keys" in self.needs:
            self.seen.note("keys", keys.float().mean(dim=1))
        if "attention" in self.needs:
            assert self._queries is not None
            queries, self._queries = self._heads(self._queries), None
            scale = keys.shape[-1] ** -0.5
            # Rounded as the tower's own softmax rounds it: in float32, of products in its dtype.
            logits = (queries * scale) @ keys.transpose(2, 3)
            received = logits.softmax(dim=-1, dtype=torch.float32).mean(dim=2)
            self.seen.note("attention", received[..., int(self.parts.cls) :])

    def _last_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.note("last_queries", self._asking(output))

    def _last_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.note("last_keys", output)

    def _after_projector(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self._addressing:
            return None
        tiles = output if output.dim() == 3 else output[None]
        before = sum(part.shape[0] * part.shape[1] for part in self.seen.projected)
        self.seen.projected.append(tiles)
        count = tiles.shape[0] * tiles.shape[1]
        return addresses(before + count, output)[before:].view_as(output)
