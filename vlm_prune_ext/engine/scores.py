"""Attention that tokens receive, from a few query rows and a layer's keys; never a full map."""

from __future__ import annotations

import torch

# Softmax rows held at once, in float32 elements: 16 Mi elements are 64 MiB, small against the
# activations of any prefill that has so many rows.
BLOCK_ELEMENTS = 1 << 24


def received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor,
    weights: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention each key receives, mean over query heads, summed over weighted query rows.

    Args:
        queries: ``(batch, heads, rows, head_dim)``.
        keys: ``(batch, kv_heads, n, head_dim)``; heads are grouped as in grouped-query attention.
        allowed: bool ``(batch, rows, n)``: what a row may see.
        weights: float32 ``(batch, rows)``, 0 for rows that do not count.
        scaling: factor on the products.

    Returns:
        float32 ``(batch, n)``.
    """
    batch, heads, rows, dim = queries.shape
    groups, count = keys.shape[1:3]
    grouped = queries.reshape(batch * groups, heads // groups * rows, dim)
    # Scaled inside the product, before it is rounded, and in no pass of its own.
    products = torch.baddbmm(
        grouped.new_empty(()),
        grouped,
        keys.flatten(0, 1).transpose(1, 2),
        beta=0,
        alpha=scaling,
    )
    logits = products.view(batch, heads, rows, count)
    logits.masked_fill_(~allowed[:, None], torch.finfo(logits.dtype).min)
    attention = logits.softmax(dim=-1, dtype=torch.float32).view(batch, heads * rows, count)
    return torch.bmm(weights.repeat(1, heads)[:, None], attention)[:, 0] / heads


def rows_per_block(batch: int, heads: int, keys: int) -> int:
    """How many query rows fit one block."""
    return max(1, BLOCK_ELEMENTS // (batch * heads * keys))
