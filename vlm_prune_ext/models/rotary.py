"""Queries and keys of chosen positions, as a decoder's attention module would compute them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def queries(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Queries of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, "q", hidden, rotary)


def keys(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Keys of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, "k", hidden, rotary)


def _project(attn: Any, which: str, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    flat = getattr(attn, f"{which}_proj")(hidden)
    norm = getattr(attn, f"{which}_norm", None)
    per_head = norm is not None and norm.weight.shape[-1] == attn.head_dim
    if norm is not None and not per_head:
        flat = norm(flat)
    heads = flat.view(*hidden.shape[:-1], -1, attn.head_dim)
    if per_head:
        heads = norm(heads)  # type: ignore[misc]
    return _rotate(attn, heads.transpose(1, 2), rotary)


def _rotate(attn: nn.Module, heads: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Rotary embedding by the function of the module's own family, ``(batch, heads, n, dim)``."""
    if rotary is None:
        return heads
    apply = sys.modules[type(attn).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    cos, sin = rotary
    nothing = heads[:, :0]  # it rotates two tensors at a time
    return apply(heads, nothing, cos, sin)[0]
