"""Kernels for what stands between a LLaMA layer's matrix products, each one pass over memory.

They round where transformers' own operations round (after the norm and after the weight, after each
product of the rotary embedding, after the activation), so that results differ from it by the
order of one sum and no more. Import needs Triton; :mod:`vlm_prune_ext.engine.fused` decides.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (normed * weights).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32.

    Args:
        x: ``(..., width)``, contiguous.
        weight: ``(width,)``.
        eps: added to the mean.
    """
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 512))
    _rms_norm[(x.numel() // width,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def _silu_times(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    activated = (values / (1.0 + tl.exp(-values))).to(out.dtype.element_ty).to(tl.float32)
    others = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (activated * others).to(out.dtype.element_ty), mask=inside)


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, element by element; both contiguous and of one shape."""
    out = torch.empty_like(gate)
    block = 1024
    grid = (triton.cdiv(gate.numel(), block),)
    _silu_times[grid](gate, up, out, gate.numel(), BLOCK=block, num_warps=4)
    return out


@triton.jit
def _rotated(first, second, cosine, sine, kind: tl.constexpr):
    """``first * cosine + second * sine``, both products rounded."""
    one = (first * cosine).to(kind).to(tl.float32)
    other = (second * sine).to(kind).to(tl.float32)
    return (one + other).to(kind)


@triton.jit
def _rotate_and_keep(
    queries,
    keys,
    values,
    cosines,
    sines,
    held_keys,
    held_values,
    slot,
    count,
    width,
    query_heads,
    key_heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(query_heads, HEADS)
    kind: tl.constexpr = queries.dtype.element_ty
    at = tl.arange(0, HALF)[None, :]
    angle = token * 2 * HALF + at
    cosine = tl.load(cosines + angle).to(tl.float32)
    cosine_2 = tl.load(cosines + angle + HALF).to(tl.float32)
    sine = tl.load(sines + angle).to(tl.float32)
    sine_2 = tl.load(sines + angle + HALF).to(tl.float32)
    if group < query_groups:
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < query_heads) & (at < HALF)
        place = queries + (token * query_heads + head) * 2 * HALF + at
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, _rotated(first, -second, cosine, sine, kind), mask=inside)
        tl.store(place + HALF, _rotated(second, first, cosine_2, sine_2, kind), mask=inside)
    else:
        head = (group - query_groups) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < key_heads) & (at < HALF)
        offset = (token * key_heads + head) * 2 * HALF + at
        row = token // count * key_heads + head
        goal = (row * width + tl.load(slot) + token % count) * 2 * HALF + at
        first = tl.load(keys + offset, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(keys + offset + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(held_keys + goal, _rotated(first, -second, cosine, sine, kind), mask=inside)
        second_half = _rotated(second, first, cosine_2, sine_2, kind)
        tl.store(held_keys + goal + HALF, second_half, mask=inside)
        for half in tl.static_range(2):
            part = tl.load(values + offset + half * HALF, mask=inside, other=0.0)
            tl.store(held_values + goal + half * HALF, part, mask=inside)


def rotate_and_keep(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    slot: torch.Tensor,
) -> None:
    """LLaMA's rotary embedding of queries, in place, and of keys, into the KV cache; values too.

    Args:
        queries: ``(batch, n, heads, head_dim)``, contiguous.
        keys, values: ``(batch, n, kv_heads, head_dim)``, contiguous; left as they are.
        rotary: cosines and sines, each ``(batch, n, head_dim)``, contiguous; head_dim is a power
            of two.
        held: keys and values of the cache, each ``(batch, kv_heads, width, head_dim)``, contiguous.
        slot: int64 ``(1,)``, where the first of the n tokens goes; they are written from there on.
    """
    batch, count, heads, dim = queries.shape
    kv_heads, block = keys.shape[2], 16
    groups = triton.cdiv(heads, block) + triton.cdiv(kv_heads, block)
    _rotate_and_keep[(batch * count, groups)](
        queries,
        keys,
        values,
        *rotary,
        *held,
        slot,
        count,
        held[0].shape[2],
        heads,
        kv_heads,
        HALF=dim // 2,
        HEADS=block,
        num_warps=4,
    )
