"""An attention function that receives exactly what FlashAttention-2 receives.

It takes 2-D padding masks or none, aligns the causal triangle to the last key, unpads as the real
one does, and refuses what the real one would silently misread: position ids with gaps, which at
batch 1 mean packed prompts there.
"""

from __future__ import annotations

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fa2_standin"


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of one unpadded sample, ``(heads, tokens, dim)`` each."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    rows, keys = q.shape[1], k.shape[1]
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    logits = (q @ k.transpose(1, 2) * scaling).masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1) @ v


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    assert attention_mask is None or attention_mask.shape == (batch, keys), attention_mask.shape
    positions = kwargs.get("position_ids")
    if batch == 1 and attention_mask is None and positions is not None and rows > 1:
        assert bool((positions.diff(dim=-1) == 1).all()), "would be read as packed prompts"
    causal = getattr(module, "is_causal", True)
    out = torch.zeros_like(query)
    for b in range(batch):
        real = torch.ones(keys, dtype=torch.bool) if attention_mask is None else attention_mask[b]
        real = real.bool()
        asked = real[-rows:]
        if not causal:  # a vision tower
            out[b] = torch.nn.functional.scaled_dot_product_attention(query[b], key[b], value[b])
            continue
        out[b][:, asked] = _one(query[b][:, asked], key[b][:, real], value[b][:, real], scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the stand-in selectable; returns its name."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
    return NAME
