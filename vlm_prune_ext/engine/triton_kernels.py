"""Triton kernels of attention that is read: what keys receive, with no attention map in memory.

Import needs Triton; :mod:`vlm_prune_ext.engine.evidence` asks.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _scores(
    queries, keys, limit, row, place, rows, count, scaling, q_row, k_row, DIM: tl.constexpr
):
    """``(rows, keys)`` products of a block, minus infinity where a row may not see a key."""
    dim = tl.arange(0, DIM)
    at = queries + row[:, None] * q_row + dim[None, :]
    query = tl.load(at, mask=(row < rows)[:, None], other=0.0)
    at = keys + place[None, :] * k_row + dim[:, None]
    key = tl.load(at, mask=(place < count)[None, :], other=0.0)
    products = tl.dot(query, key, input_precision="ieee") * scaling
    seen = (place[None, :] <= limit[:, None]) & (place < count)[None, :]
    return tl.where(seen, products, float("-inf"))


@triton.jit
def _row_sums(
    queries,
    keys,
    limits,
    sums,
    scaling,
    rows,
    count,
    heads,
    group,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Logarithm of each row's sum of exponentials."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    limit = tl.load(limits + sample * rows + row, mask=row < rows, other=0)
    mine = queries + sample * q_batch + head * q_head
    theirs = keys + sample * k_batch + head // group * k_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = 0
    while first < count:
        place = first + tl.arange(0, KEYS)
        block = _scores(mine, theirs, limit, row, place, rows, count, scaling, q_row, k_row, DIM)
        above = tl.maximum(top, tl.max(block, axis=1))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(block - above[:, None]), axis=1)
        top = above
        first += KEYS
    goal = sums + (sample * heads + head) * rows + row
    tl.store(goal, top + tl.log(total), mask=row < rows)


@triton.jit
def _key_sums(
    queries,
    keys,
    limits,
    sums,
    weights,
    out,
    scaling,
    rows,
    count,
    heads,
    group,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    WEIGHTED: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attention that a block of keys receives from all rows of one head."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    mine = queries + sample * q_batch + head * q_head
    theirs = keys + sample * k_batch + head // group * k_head
    received = tl.zeros((KEYS,), tl.float32)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)
        limit = tl.load(limits + sample * rows + row, mask=row < rows, other=-1)
        log_sum = tl.load(sums + (sample * heads + head) * rows + row, mask=row < rows, other=0.0)
        block = _scores(mine, theirs, limit, row, place, rows, count, scaling, q_row, k_row, DIM)
        attention = tl.exp(block - log_sum[:, None])
        if WEIGHTED:
            weight = tl.load(weights + sample * rows + row, mask=row < rows, other=0.0)
            attention = attention * weight[:, None]
        received += tl.sum(attention, axis=0)
        first += ROWS
    goal = out + (sample * heads + head) * count + place
    tl.store(goal, received, mask=place < count)


def received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    limits: torch.Tensor,
    weights: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """As :func:`vlm_prune_ext.engine.evidence.received`, with no attention weights in memory: rows
    are summed in a first pass, keys in a second.

    Args:
        queries: ``(batch, heads, rows, head_dim)``, the last dimension contiguous.
        keys: ``(batch, kv_heads, n, head_dim)``, likewise; head_dim is a power of two, at least 16.
        limits: int64 ``(batch, rows)``: a row sees keys 0 ... its limit, which is at least 0.
        weights: float32 ``(batch, rows)``; ``None``: all 1.
        scaling: factor on the products.

    Returns:
        float32 ``(batch, n)``.
    """
    batch, heads, rows, dim = queries.shape
    count = keys.shape[2]
    sums = torch.empty(batch, heads, rows, dtype=torch.float32, device=queries.device)
    out = torch.empty(batch, heads, count, dtype=torch.float32, device=queries.device)
    limits = limits.contiguous()
    weights = weights if weights is None else weights.contiguous()
    sizes = (scaling, rows, count, heads, heads // keys.shape[1])
    strides = (*queries.stride()[:3], *keys.stride()[:3])
    blocks = {"DIM": dim, "ROWS": 64 if rows > 16 else 16, "KEYS": 64}
    with torch.cuda.device_of(queries):
        grid = (batch * heads, triton.cdiv(rows, blocks["ROWS"]))
        _row_sums[grid](queries, keys, limits, sums, *sizes, *strides, **blocks, num_warps=4)
        grid = (batch * heads, triton.cdiv(count, blocks["KEYS"]))
        _key_sums[grid](
            queries,
            keys,
            limits,
            sums,
            sums if weights is None else weights,
            out,
            *sizes,
            *strides,
            WEIGHTED=weights is not None,
            **blocks,
            num_warps=4,
        )
    return out.sum(dim=1) / heads
