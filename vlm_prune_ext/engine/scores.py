"""Attention that tokens receive, from a few query rows and a layer's keys; never a full map."""

from __future__ import annotations

import torch

# Attention weights held at once, in float32: 64 MiB, or twice as many elements as the hidden states
# have, which is less than a layer's MLP takes a moment later.
BLOCK_ELEMENTS = 1 << 24


def received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor | None,
    weights: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention each key receives, mean over query heads, summed over weighted query rows.

    Args:
        queries, keys, allowed, scaling: see :func:`attend`.
        weights: see :func:`summed`.

    Returns:
        float32 ``(batch, n)``.
    """
    return summed(attend(queries, keys, allowed, scaling), weights)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention weights, softmax over the keys.

    Args:
        queries: ``(batch, heads, rows, head_dim)``.
        keys: ``(batch, kv_heads, n, head_dim)``; heads are grouped as in grouped-query attention.
        allowed: bool ``(batch, rows, n)``: what a row may see; ``None``: everything.
        scaling: factor on the products.

    Returns:
        float32 ``(batch, heads, rows, n)``.
    """
    batch, heads, rows, dim = queries.shape
    groups, count = keys.shape[1:3]
    grouped = queries.reshape(batch * groups, heads // groups * rows, dim)
    # Scaled inside the product, before it is rounded, and in no pass of its own.
    nothing = grouped.new_empty(())
    keys = keys.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(nothing, grouped, keys, beta=0, alpha=scaling)
    logits = logits.view(batch, heads, rows, count)
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1, dtype=torch.float32)


def summed(attention: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean over heads, sum over rows, in place where rows are weighted.

    Args:
        attention: float32 ``(batch, heads, rows, n)``.
        weights: float32 ``(batch, rows)``, 0 for rows that do not count; ``None``: all count.

    Returns:
        float32 ``(batch, n)``.
    """
    if weights is not None:
        attention = attention.mul_(weights[:, None, :, None])
    return attention.sum(dim=(1, 2)) / attention.shape[1]


def rows_per_block(row: int, hidden: int) -> int:
    """How many query rows fit one block.

    Args:
        row: attention weights of one row of each sample, all heads.
        hidden: elements of the hidden states.
    """
    return max(1, max(BLOCK_ELEMENTS, 2 * hidden) // row)
