"""What rules see of a layer: attention rows recomputed from its keys, and gathers of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine import scores
from vlm_prune_ext.engine.call import Call
from vlm_prune_ext.engine.kernels import triton_kernels
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prefill import Group, Prefill
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Evidence, Need


class Looker:
    """Shows a rule the evidence about one group of images.

    Args:
        needs: what the rule asks for; it is shown nothing else.
        attention: ``(batch, n)``; keys: ``(batch, kv_heads, n, head_dim)``; hidden:
            ``(batch, n, hidden)``; each may be ``None`` where nobody asked for it.
    """

    def __init__(
        self,
        needs: Sequence[Need],
        attention: torch.Tensor | None,
        keys: torch.Tensor | None,
        hidden: torch.Tensor | None,
    ) -> None:
        self.attention, self.keys = attention, keys
        self.hidden = hidden if "hidden" in needs else None

    def __call__(self, group: Group, places: torch.Tensor) -> Evidence:
        """``places`` ``(rows, n)``: where the group's tokens are in the sequence."""
        rows = group.samples[:, None]
        attention, keys = self.attention, self.keys
        return Evidence(
            total=group.total,
            places=group.places,
            attention=None if attention is None else attention[rows, places],
            keys=None if keys is None else keys.transpose(1, 2)[rows, places].transpose(1, 2),
            hidden=None if self.hidden is None else self.hidden[rows, places],
            sample=group.names,
        )


def read(
    needs: Sequence[Need], reader: AttentionReader
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(attention, keys)`` of a layer as :class:`Looker` takes them: what a stage needs of it."""
    rows = [need for need in needs if need.startswith("attention:")]
    attention = reader.attention(rows[-1]) if rows else None
    return attention, reader.keys if "keys" in needs else None


def cached_keys(cache: Any, layer: int, queries: int, call: Call) -> torch.Tensor | None:
    """Keys a layer has just attended to, ``(batch, kv_heads, n, head_dim)``.

    Args:
        cache: of the whole model, or ``None``.
        layer: 0-based.
        queries: tokens of this call.
        call: the run that it is part of.

    Returns:
        ``None`` where a prompt's keys are not, or not all, in the cache.

    Raises:
        InputError: a decode step whose earlier keys the cache has let go of.
    """
    if cache is None:
        return None
    keys = cache.layers[layer].keys
    if call.prefill:
        return keys[..., :queries, :] if keys.shape[-2] >= queries else None
    if keys.shape[-2] < int(cache.get_seq_length(layer)):
        raise InputError(
            f"mode='mask' chooses anew at each decode step from the keys of layer "
            f"{layer}, but that layer caches only its sliding window: use mode='drop', "
            "or a layer behind one that sees all tokens."
        )
    return keys[..., : int(cache.get_seq_length(layer)), :]


class AttentionReader:
    """Reads attention rows and keys of a layer that has just attended.

    Args:
        parts: where things are in the model.
        attn: the layer's attention module.
        hidden: ``(batch, n, hidden)``, what it received.
        prefill: state of the prompt.
        layout: what the layer holds of the prompt.
        keys: ``(batch, kv_heads, keys, head_dim)``, all it attended to; ``None``: projected anew.
        mask: the layer's attention mask, in any of its forms.
        rotary: the layer's ``position_embeddings``.
        prompt: the rows are the prompt itself, not a decode step.
    """

    def __init__(
        self,
        parts: ModelParts,
        attn: nn.Module,
        hidden: torch.Tensor,
        prefill: Prefill,
        layout: Layout,
        *,
        keys: torch.Tensor | None,
        mask: torch.Tensor | None,
        rotary: Any,
        prompt: bool,
    ) -> None:
        self.parts, self.attn, self.hidden, self.prefill = parts, attn, hidden, prefill
        self.mask, self.rotary, self.prompt = mask, rotary, prompt
        self.layout = layout.to(hidden.device)
        if keys is None:
            assert parts.keys is not None
            keys = parts.keys(attn, hidden, rotary)
        self.keys = keys

    def attention(self, need: str) -> torch.Tensor:
        """Attention every token received from the rows ``need`` names, float32 ``(batch, n)``."""
        rows, weights = self._rows(need)
        batch, count = rows.shape
        width = self.keys.shape[-2]
        queries = self._queries(rows)
        kernels = triton_kernels(queries.device) if self.mask is None else None
        if kernels is not None and _fits(queries, self.keys):
            limits = rows + (width - self.hidden.shape[1])
            scaling = self.parts.scaling(self.attn)
            return kernels.received(queries, self.keys, limits, weights, scaling)
        step = scores.rows_per_block(batch * queries.shape[1] * width, self.hidden.numel())
        total: torch.Tensor | None = None
        for first in range(0, count, step):
            block = slice(first, first + step)
            found = scores.received(
                queries[:, :, block],
                self.keys,
                self._allowed(rows[:, block], need),
                None if weights is None else weights[:, block],
                self.parts.scaling(self.attn),
            )
            total = found if total is None else total + found
        assert total is not None
        return total

    def _queries(self, rows: torch.Tensor) -> torch.Tensor:
        rotary = self.rotary
        if rotary is not None:
            rotary = tuple(take(part, rows, -2) for part in rotary)
        projection = self.parts.queries
        assert projection is not None
        return projection(self.attn, take(self.hidden, rows, -2), rotary)

    def _real(self) -> torch.Tensor | None:
        """Bool ``(batch, n)``, False at padding and empty slots of the prompt."""
        prefill, layout = self.prefill, self.layout
        real = prefill.real
        if real is not None:
            real = real.gather(1, layout.slots)
        if layout.valid is not None:
            real = layout.valid if real is None else real & layout.valid
        return real

    def _rows(self, need: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query rows (places in this call's input) and their weights, ``(batch, rows)`` each;
        ``None``: all count."""
        batch, count = self.hidden.shape[:2]
        device = self.hidden.device
        real = self._real() if self.prompt else None
        iota = torch.arange(count, device=device)
        if need == "attention:last":
            if real is None:
                rows = torch.full((batch, 1), count - 1, device=device)
            else:
                rows = (real * iota).argmax(dim=1, keepdim=True)
            return rows, None
        if need == "attention:text":
            return self._text_rows(real, iota)
        return self._visual_rows()

    def _text_rows(
        self, real: torch.Tensor | None, iota: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text behind the last visual token."""
        prefill = self.prefill
        batch, count = self.hidden.shape[:2]
        last = torch.zeros(batch, dtype=torch.int64, device=iota.device)
        for group in prefill.groups:
            ends = self.layout.places_of(group.slots[:, -1:], group.samples)[:, 0]
            last = last.scatter_reduce(0, group.samples, ends, "amax")
        # Where the first of them may be, without asking the device: visual tokens are in front.
        first = min(number for number in prefill.visual_counts() if number)
        rows = iota[first:].expand(batch, count - first)
        weights = rows > last[:, None]
        if real is not None:
            weights = weights & real[:, first:]
        return rows, weights.float()

    def _visual_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All visual tokens that are left; samples with fewer are filled with weight 0."""
        prefill = self.prefill
        counts = prefill.visual_counts()
        batch = self.hidden.shape[0]
        here = torch.zeros(
            batch, self.hidden.shape[1], dtype=torch.int32, device=self.hidden.device
        )
        for group in prefill.groups:
            places = self.layout.places_of(group.slots, group.samples)
            here[group.samples[:, None], places] = 1
        rows = here.argsort(dim=1, stable=True)[:, here.shape[1] - max(counts) :]
        return rows, None if min(counts) == max(counts) else here.gather(1, rows).float()

    def _allowed(self, rows: torch.Tensor, need: str) -> torch.Tensor | None:
        """What the rows may see, bool ``(batch, rows, keys)``; ``None``: everything."""
        width = self.keys.shape[-2]
        plain = self.mask is None and self.prompt and self._real() is None
        if plain and need == "attention:last" and width == self.hidden.shape[1]:
            return None
        batch = rows.shape[0]
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[:, 0, :, :width].expand(batch, -1, -1)
            mask = take(mask, rows, -2)
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        offset = width - self.hidden.shape[1]
        allowed = torch.arange(width, device=rows.device) <= (rows + offset)[..., None]
        if self.mask is not None:
            return allowed & self.mask.bool()[:, None, :width]
        return allowed


def _fits(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Can the kernel read these?"""
    dim = queries.shape[-1]
    return (
        dim >= 16
        and dim & (dim - 1) == 0
        and queries.stride(-1) == keys.stride(-1) == 1
        and queries.dtype == keys.dtype
    )
