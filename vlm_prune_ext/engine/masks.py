"""Attention masks for layers that hold only part of the prompt.

The model builds one mask for the whole prompt. A layer that holds fewer tokens gets the rows and
columns that belong to them, so padding, sliding windows and image blocks that see each other stay
what the model meant, whatever the back end: 4-D bool (SDPA), 4-D additive (eager), 2-D padding
(FlashAttention-2) or none at all.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
)

from vlm_prune_ext.engine.layout import Layout, iota, take
from vlm_prune_ext.errors import InputError


def takes_padding_masks(attention: str) -> bool:
    """Does this attention implementation take 2-D masks, as FlashAttention-2 does?

    Asked of the function that makes its masks, so kernels registered under other names count too.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS.get(attention) is flash_attention_mask


def sliding_windows(config: Any, layers: int) -> list[int | None]:
    """Per layer, how many tokens back it sees (itself included); ``None`` where it sees all.

    Asked of the cache that transformers makes for such a model, which has the same rule.
    """
    if config is None:
        return [None] * layers
    made = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return (made + [None] * layers)[:layers]


def hide(mask: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``mask`` with everything forbidden where ``allowed`` (bool, broadcastable) is False."""
    if mask.dtype == torch.bool:
        return mask & allowed
    if mask.is_floating_point():
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    return mask * allowed.to(mask.dtype)


def fresh(
    allowed: torch.Tensor, queries: int, first: int, attention: str, dtype: torch.dtype
) -> torch.Tensor:
    """A causal mask from nothing but keys that may be seen, in the form the back end takes.

    Args:
        allowed: bool ``(batch, keys)``.
        queries: number of queries.
        first: place of the first query among the keys.
        attention: the model's attention implementation.
        dtype: of the hidden states.
    """
    keys = torch.arange(allowed.shape[1], device=allowed.device)
    rows = torch.arange(first, first + queries, device=allowed.device)
    return by_place(keys[None], allowed, rows[None], None, attention, dtype)


def by_place(
    keys: torch.Tensor,
    allowed: torch.Tensor,
    rows: torch.Tensor,
    window: int | None,
    attention: str,
    dtype: torch.dtype,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """A causal mask, with a sliding window or without, from where tokens stood in the prompt.

    Args:
        keys: int64 ``(batch or 1, keys)``, place of each key.
        allowed: bool ``(batch, keys)``.
        rows: int64 ``(batch or 1, queries)``, place of each query.
        window: places back that a query sees, itself included; ``None`` sees all.
        attention: the model's attention implementation.
        dtype: of the hidden states.
        seen: bool ``(batch, queries, keys)``, False at pairs that are forbidden besides.
    """
    if takes_padding_masks(attention):
        if window is None:
            return allowed
        return allowed & (keys > rows[:, -1:] - window)  # causality is its own
    mask = keys[:, None, :] <= rows[..., None]
    if window is not None:
        mask = mask & (keys[:, None, :] > rows[..., None] - window)
    if seen is not None:
        mask = mask & seen
    mask = (mask & allowed[:, None, :])[:, None]
    if ALL_MASK_ATTENTION_FUNCTIONS.get(attention) is eager_mask:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def columns(layout: Layout, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots behind the first ``width`` cached keys of a layer, and which of them are real.

    Returns:
        int64 ``(batch, width)`` and bool ``(batch, width)`` or ``None``.
    """
    batch, extra = layout.slots.shape[0], width - layout.count
    if extra == 0:
        return layout.slots, layout.valid
    later = torch.arange(layout.total, layout.total + extra, device=layout.slots.device)
    slots = torch.cat([layout.slots, later.expand(batch, extra)], dim=1)
    if layout.valid is None:
        return slots, None
    return slots, torch.nn.functional.pad(layout.valid, (0, extra), value=True)


def key_slots(layout: Layout, width: int, entries: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`columns`, for caches that may have let go of their oldest keys.

    Args:
        layout: what the layer holds of the prompt.
        width: keys the layer's attention sees, the last ones of all (or, in a static cache that is
            not full yet, the first ones and room behind them).
        entries: keys the layer was ever given, those of this call included.
    """
    start = max(entries - width, 0)
    slots, valid = columns(layout, max(start + width, layout.count))
    slots = slots[:, start : start + width]
    return slots, None if valid is None else valid[:, start : start + width]


def adapt(
    mask: torch.Tensor | None,
    layout: Layout,
    *,
    queries: int,
    prefill: bool,
    width: int,
    attention: str,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The model's mask for the whole prompt, cut to what a layer holds.

    Args:
        mask: ``None``, ``(batch, keys)`` or ``(batch or 1, heads or 1, queries, keys)``.
        layout: what the layer holds of the prompt.
        queries: queries of this call.
        prefill: the queries are the prompt itself, so rows are cut as well.
        width: keys the layer's attention will see (a static cache is wider than what it holds).
        attention: the model's attention implementation.
        dtype: of the hidden states.
    """
    if mask is None:
        if layout.valid is None:
            return None
        allowed = torch.nn.functional.pad(layout.valid, (0, width - layout.count), value=True)
        first = 0 if prefill else width - queries
        return fresh(allowed, queries, first, attention, dtype)
    if not isinstance(mask, torch.Tensor):
        raise InputError(
            f"attn_implementation={attention!r} hands masks of type {type(mask).__name__} to the "
            "layers, which can't be pruned: use eager, sdpa or flash_attention_2."
        )
    layout = layout.to(mask.device)
    slots, valid = columns(layout, width)
    present = slots < mask.shape[-1]
    allowed = present if valid is None else present & valid
    slots = slots.clamp(max=mask.shape[-1] - 1)
    if mask.dim() == 2:
        return hide(mask.gather(1, slots), allowed)
    if prefill:
        mask = take(mask.transpose(0, 1), layout.slots, -2).transpose(0, 1)
    mask = take(mask.permute(1, 2, 0, 3), slots, -1).permute(2, 0, 1, 3)
    seen = allowed[:, None, None, :]
    if prefill and layout.added:
        seen = seen & in_order(layout, slots)[:, None]
    return hide(mask, seen)


def in_order(layout: Layout, keys: torch.Tensor) -> torch.Tensor:
    """Rows that were added stand at the same slot as their image's last token: among those that
    share a slot, nobody sees who stands behind.

    Args:
        layout: what the layer holds of the prompt.
        keys: int64 ``(batch, width)``, slots of the keys.

    Returns:
        bool ``(batch, n, width)``, False where a key stands behind a query at its slot.
    """
    behind = iota(keys.shape[1], keys.device) > iota(layout.count, keys.device)[:, None]
    return ~(behind & (keys[:, None, :] == layout.slots[:, :, None]))
