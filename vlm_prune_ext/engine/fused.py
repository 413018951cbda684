"""LLaMA layers with the work between their matrix products fused, while they are recorded.

Norms, rotary embedding and activation are a third of the kernels of a layer at batch 1 and, at
large batches, of its time. Here each is one Triton kernel. Only layers that are known to compute
exactly this are touched; others, and machines without Triton, run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_KINDS = ("Llama", "Mistral", "Qwen2")


def _known(module: nn.Module, part: str) -> bool:
    """Is it exactly transformers' own (no subclass, which may do something else)?"""
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and cls.__name__ in {
        kind + part for kind in _KINDS
    }


@cache
def kernels() -> ModuleType | None:
    """The kernels; ``None`` without Triton."""
    try:
        from vlm_prune_ext.engine import triton_kernels
    except ImportError:
        return None
    return triton_kernels


@contextmanager
def fused(modules: nn.Module) -> Iterator[None]:
    """Have the norms, attentions and MLPs in ``modules`` use the kernels inside the block.

    Attention modules must be given one of :mod:`vlm_prune_ext.engine.static`'s writers.
    """
    changed: list[nn.Module] = []
    try:
        for module in modules.modules() if kernels() is not None else ():
            forward = _forward_for(module)
            if forward is not None and "forward" not in vars(module):
                module.forward = forward  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward")


def _forward_for(module: Any) -> Any:
    if _known(module, "RMSNorm"):
        return partial(_norm, module)
    if _known(module, "MLP") and module.config.hidden_act in ("silu", "swish"):
        return partial(_mlp, module)
    if _known(module, "Attention") and (module.head_dim & (module.head_dim - 1)) == 0:
        return partial(_attention, module)
    return None


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _kernels().rms_norm(hidden_states.contiguous(), module.weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_kernels().silu_times(module.gate_proj(x), module.up_proj(x)))


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As the module's own forward, with rotary embedding and KV cache in one kernel."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    queries = module.q_proj(hidden_states).view(shape)
    keys = module.k_proj(hidden_states).view(shape)
    values = module.v_proj(hidden_states).view(shape)
    held = past_key_values.buffers(keys.transpose(1, 2), module.layer_idx)
    rotary = tuple(part.contiguous() for part in position_embeddings)
    _kernels().rotate_and_keep(queries, keys, values, rotary, held, past_key_values.slot)
    keys, values = past_key_values.seen(held, keys.shape[1])
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _ = attend(
        module,
        queries.transpose(1, 2),
        keys,
        values,
        attention_mask,
        dropout=0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return module.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None


def _kernels() -> Any:
    return kernels()
