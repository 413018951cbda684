"""What tower and projector give, noted while a picture runs through them.

Nothing is computed but what the rule asked for, and the tower attends as ever. A whole model
expects as many features as its prompt has placeholders, and packs them by their place in the grid
(newline tokens, unpadding of tiles). So it is handed features that carry their address instead.
Where these stand in the decoder's input says which tiles are whose, in which order, and what
padding was cut off; compose.py reads them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import Undo, VisionParts
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.base import Method, VisionStage

# Exact in float32, float16 and bfloat16, and no projector gives it in all channels at once.
MARK = -61440.0
# An address is written in this many channels, each a digit that every float type holds exactly,
# also after the model scaled its features (PaliGemma); all other channels are one number.
_DIGITS, _BASE = 6, 64
BLOCK = 1 << 24  # attention weights held at once


def addresses(count: int, like: torch.Tensor) -> torch.Tensor:
    """``(count, width)``: rows that stand for features 0 ... count - 1."""
    number = torch.arange(count, device=like.device)
    rows = torch.full((count, like.shape[-1]), MARK, dtype=like.dtype, device=like.device)
    for digit in range(_DIGITS):
        rows[:, digit] = (number // _BASE**digit % _BASE).to(like.dtype)
    return rows


def read_addresses(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which feature each row of ``(..., width)`` stands for, int64 ``(...)``, -1: none; and the
    factor that the model put on its features, ``(...)``."""
    factor = rows[..., -1:].float() / MARK
    powers = torch.tensor([_BASE**digit for digit in range(_DIGITS)], device=rows.device)
    is_one = (rows[..., _DIGITS:] == rows[..., -1:]).all(dim=-1) & (factor[..., 0] > 0)
    digits = (rows[..., :_DIGITS].float() / torch.where(is_one[..., None], factor, 1.0)).round()
    number = (digits.long() * powers).sum(dim=-1)
    return torch.where(is_one, number, -1), factor[..., 0]


def mean_received(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention that each key receives, mean over query rows.

    Args:
        queries: ``(..., rows, head_dim)``; keys: ``(..., n, head_dim)``.

    Returns:
        float32 ``(..., n)``.
    """
    queries = queries * queries.shape[-1] ** -0.5
    rows, keys = queries.shape[-2], keys.transpose(-1, -2)
    step = max(1, BLOCK * rows // max(1, queries[..., 0].numel() * keys.shape[-1]))
    total: torch.Tensor | None = None
    for block in queries.split(step, dim=-2):
        found = (block @ keys).softmax(dim=-1, dtype=torch.float32).sum(dim=-2)
        total = found if total is None else total + found
    assert total is not None
    return total / rows


@dataclass
class Seen:
    """What tower and projector gave since the last prompt.

    Attributes:
        named: need -> tensors of several tower calls, each ``(tiles, ...)``.
        projected: outputs of the projector, each ``(tiles, N, D)``.
        packed: all images are one tile, in an order that only the addresses tell.
    """

    named: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    projected: list[torch.Tensor] = field(default_factory=list)
    packed: bool = False

    def note(self, name: str, value: torch.Tensor) -> None:
        """One tower call's tensor."""
        self.named.setdefault(name, []).append(value)

    def all(self, name: str) -> torch.Tensor:
        """Of all calls, ``(tiles, ...)``; what belongs to patches, by tokens."""
        parts = self.projected if name == "projected" else self.named[name]
        dim = (-1 if name == "attention" else -2) if self.packed else 0
        if len(parts) > 1:
            parts[:] = [torch.cat(parts, dim=dim)]
        return parts[0]


class Watch:
    """Notes what the projector makes, and hands on addresses instead.

    Args:
        parts: where the tower's parts are.
        needs: what the rule asked for.
    """

    packed = False

    def __init__(self, parts: VisionParts, needs: tuple[str, ...]) -> None:
        self.parts, self.needs = parts, needs
        self.seen = Seen(packed=self.packed)
        self._addressing = True

    @property
    def cls(self) -> bool:
        """Whether evidence has a row for CLS."""
        return self.parts.cls and not self.packed

    @property
    def feature_layer(self) -> int:
        """Index of the layer whose output is projected; -1 where it is not one of a list."""
        return -1 if self.parts.feature_layer is None else self.parts.feature_layer

    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        self.take()
        handles, projector = self._in_tower(), self.parts.projector
        if projector is not None:
            handles.append(projector.register_forward_hook(self._after_projector))
        return [handle.remove for handle in handles]

    def _in_tower(self) -> list[Any]:
        raise NotImplementedError

    def take(self) -> Seen:
        """What was noted; from now on it is forgotten here."""
        seen, self.seen = self.seen, Seen(packed=self.packed)
        return seen

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tiles, t, C)`` tower features -> ``(tiles, t, D)``."""
        projector: Any = self.parts.projector
        self._addressing = False
        try:
            return projector(rows)
        finally:
            self._addressing = True

    def _after_projector(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self._addressing:
            return None
        # Some give tokens as rows and columns (Aya Vision), some one tile without its dimension.
        tiles = output.flatten(1, -2) if output.dim() > 2 else output[None]
        made = self.hand_on(tiles)
        return made.view_as(output)

    def hand_on(self, tiles: torch.Tensor) -> torch.Tensor:
        """Keep features ``(tiles, N, D)``; returns their addresses."""
        before = sum(part.shape[0] * part.shape[1] for part in self.seen.projected)
        self.seen.projected.append(tiles)
        count = tiles.shape[0] * tiles.shape[1]
        return addresses(before + count, tiles)[before:].view_as(tiles)


class TowerWatch(Watch):
    """On towers that run tile by tile (CLIP, SigLIP, InternViT)."""

    _queries: torch.Tensor | None = None

    def _in_tower(self) -> list[Any]:
        parts, needs = self.parts, self.needs
        handles: list[Any] = []
        layer: Any = parts.layers[self.feature_layer]
        if "features" in needs or "joint" in needs:
            if parts.cls:
                handles.append(layer.register_forward_hook(self._features))
            else:
                assert parts.projector is not None
                handles.append(parts.projector.register_forward_pre_hook(self._projects))
        handles += self._in_attention(layer)
        if "last" in needs:
            queries, keys = _projections(parts.layers[-1])
            handles.append(queries.register_forward_hook(self._last_queries))
            handles.append(keys.register_forward_hook(self._last_keys))
        return handles

    def _in_attention(self, layer: Any) -> list[Any]:
        """Hooks that see queries and keys of the feature layer."""
        queries, keys = _projections(layer)
        handles: list[Any] = []
        if "attention" in self.needs:
            handles.append(queries.register_forward_hook(self._see_queries))
        if "attention" in self.needs or "keys" in self.needs:
            handles.append(keys.register_forward_hook(self._see_keys))
        return handles

    def _features(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.note("features", output[0] if isinstance(output, tuple) else output)

    def _projects(self, module: nn.Module, args: Any) -> None:
        if self._addressing:
            self.seen.note("features", args[0])

    def _see_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._queries = self._asking(output).detach()

    def _asking(self, rows: torch.Tensor) -> torch.Tensor:
        """The row of CLS, or all rows where there is none."""
        return rows[:, :1] if self.parts.cls else rows

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tiles, n, C)`` -> ``(tiles, heads, n, head_dim)``."""
        return rows.unflatten(-1, (self.parts.num_heads, -1)).transpose(1, 2)

    def _see_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        keys = self._heads(output.detach())
        if "keys" in self.needs:
            self.seen.note("keys", keys.float().mean(dim=1))
        if "attention" in self.needs:
            assert self._queries is not None
            received = mean_received(self._heads(self._queries), keys)
            self._queries = None
            self.seen.note("attention", received[..., int(self.parts.cls) :])

    def _last_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.note("last_queries", self._asking(output).detach())

    def _last_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen.note("last_keys", output.detach())


class PackedWatch(Watch):
    """On towers that run all images as one sequence, and join patches in the projector (Qwen)."""

    packed = True

    def _in_tower(self) -> list[Any]:
        packed, projector = self.parts.packed, self.parts.projector
        assert packed is not None and projector is not None
        handles: list[Any] = []
        if "attention" in self.needs:
            see = self._attends
            handles.append(packed.attn.register_forward_pre_hook(see, with_kwargs=True))
        if "features" in self.needs:
            entrance = packed.entrance or projector
            handles.append(entrance.register_forward_pre_hook(self._projects))
        return handles

    @torch.no_grad()
    def _attends(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        packed = self.parts.packed
        assert packed is not None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        queries, keys, lengths = packed.read(hidden, kwargs)
        parts = zip(queries.split(lengths), keys.split(lengths), strict=True)
        received = [mean_received(q.transpose(0, 1), k.transpose(0, 1)) for q, k in parts]
        by_token = torch.cat(received, dim=-1).unflatten(-1, (-1, packed.group)).mean(dim=-1)
        self.seen.note("attention", by_token[None])

    def _projects(self, module: nn.Module, args: Any) -> None:
        packed = self.parts.packed
        assert packed is not None
        patches = args[0].flatten(0, -2)  # an engine may run them as a batch of one
        by_token = patches.unflatten(0, (-1, packed.group)).mean(dim=1)
        self.seen.note("features", by_token[None])


def watch_on(parts: VisionParts, needs: tuple[str, ...]) -> Watch:
    """What notes a rule's needs on a tower."""
    return (TowerWatch if parts.packed is None else PackedWatch)(parts, needs)


def _projections(layer: Any) -> tuple[Any, Any]:
    """Modules whose outputs are a layer's queries and keys."""
    attn = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    norms = hasattr(attn, "q_norm") and hasattr(attn, "k_norm")
    return (attn.q_norm, attn.k_norm) if norms else (attn.q_proj, attn.k_proj)


class VisionPruner(Watch):
    """Carries a method's vision stages out on a CLIP-like tower.

    A layer drops after its attention, by its own keys. Its MLP still runs on the dropped patches
    (it works token by token, so those that stay are not touched by that); every later layer is
    really shorter. The projector's output is put back on the full grid, so that a whole model packs
    it as ever; the gaps are left out of what the decoder is given.

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
            handles.append(layers[index].register_forward_hook(self._hook(stage), prepend=True))
        return handles

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.kept = self.keys = None
        self.trace.vision_kept.clear()

    def _see_keys(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.keys = output.unflatten(-1, (self.parts.num_heads, -1)).transpose(1, 2)

    def _hook(self, stage: VisionStage) -> Callable[..., Any]:
        def after_layer(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._left(stage, output[0]), *output[1:])
            return self._left(stage, output)

        return after_layer

    def _left(self, stage: VisionStage, hidden: torch.Tensor) -> torch.Tensor:
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
