"""Triton kernels of what stands between a LLaMA layer's matrix products.

They round where transformers' own operations round (after the norm and after the weight, after each
product of the rotary embedding, after the activation), so that results differ from it by the order
of one sum and no more. Import needs Triton; :mod:`vlm_prune_ext.engine.evidence` knows whether it
works.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

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
    with torch.cuda.device_of(x):  # Triton launches on the current device
        grid = (x.numel() // width,)
        _rms_norm[grid](x, weight, out, width, eps, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def _silu_times(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_times(both: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        both: ``(..., 2 * width)``, contiguous: gate, and up behind it.

    Returns:
        ``(..., width)``.
    """
    width, block = both.shape[-1] // 2, 1024
    out = both.new_empty(*both.shape[:-1], width)
    grid = (out.numel() // width, triton.cdiv(width, block))
    with torch.cuda.device_of(both):
        _silu_times[grid](both, out, width, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _rotated(first, second, cosine, sine, kind: tl.constexpr):
    """``first * cosine + second * sine``, both products rounded."""
    one = (first * cosine).to(kind).to(tl.float32)
    other = (second * sine).to(kind).to(tl.float32)
    return (one + other).to(kind)


@triton.jit
def _rotate_and_keep(
    states,
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
    kind: tl.constexpr = states.dtype.element_ty
    at = tl.arange(0, HALF)[None, :]
    angle = token * 2 * HALF + at
    cosine = tl.load(cosines + angle).to(tl.float32)
    cosine_2 = tl.load(cosines + angle + HALF).to(tl.float32)
    sine = tl.load(sines + angle).to(tl.float32)
    sine_2 = tl.load(sines + angle + HALF).to(tl.float32)
    row = states + token * (query_heads + 2 * key_heads) * 2 * HALF
    if group < query_groups:
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < query_heads) & (at < HALF)
        place = row + head * 2 * HALF + at
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, _rotated(first, -second, cosine, sine, kind), mask=inside)
        tl.store(place + HALF, _rotated(second, first, cosine_2, sine_2, kind), mask=inside)
    else:
        head = (group - query_groups) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < key_heads) & (at < HALF)
        keys = row + (query_heads + head) * 2 * HALF + at
        values = keys + key_heads * 2 * HALF
        goal = token // count * key_heads + head
        goal = (goal * width + tl.load(slot) + token % count) * 2 * HALF + at
        first = tl.load(keys, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(keys + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(held_keys + goal, _rotated(first, -second, cosine, sine, kind), mask=inside)
        second_half = _rotated(second, first, cosine_2, sine_2, kind)
        tl.store(held_keys + goal + HALF, second_half, mask=inside)
        for half in tl.static_range(2):
            part = tl.load(values + half * HALF, mask=inside, other=0.0)
            tl.store(held_values + goal + half * HALF, part, mask=inside)


def rotate_and_keep(
    states: torch.Tensor,
    heads: int,
    rotary: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    slot: torch.Tensor,
) -> None:
    """LLaMA's rotary embedding of queries, in place, and of keys, into the KV cache; values too.

    Args:
        states: ``(batch, n, (heads + 2 kv_heads) head_dim)``, contiguous: queries, keys, values.
        heads: query heads.
        rotary: cosines and sines, each ``(batch, n, head_dim)``, contiguous; head_dim is a power
            of two.
        held: keys and values of the cache, each ``(batch, kv_heads, width, head_dim)``, contiguous.
        slot: int64 ``(1,)``, where the first of the n tokens goes; they are written from there on.
    """
    batch, count = states.shape[:2]
    kv_heads, width, dim = held[0].shape[1:]
    block = 16
    groups = triton.cdiv(heads, block) + triton.cdiv(kv_heads, block)
    with torch.cuda.device_of(states):
        _rotate_and_keep[(batch * count, groups)](
            states,
            *rotary,
            *held,
            slot,
            count,
            width,
            heads,
            kv_heads,
            HALF=dim // 2,
            HEADS=block,
            num_warps=4,
            enable_fp_fusion=False,  # both products are rounded before they are added
        )
