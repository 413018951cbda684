"""LLaMA layers with fewer and larger kernels, while they are recorded.

Queries, keys and values come from one matrix product, and so do the two inputs of the activation:
few tokens fill a GPU better that way. For this, weights that are used together are laid one behind
the other in memory; the parameters stay the same objects with the same values. Norms, rotary
embedding with writing the KV cache, and activation are one Triton kernel each; they are a third of
a layer's kernels at batch 1 and, at large batches, of its time. Only layers that are known to
compute exactly this are touched; others, and machines without Triton, run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_prune_ext.engine.evidence import triton_kernels

_KINDS = ("Llama", "Mistral", "Qwen2")


class FusedLayers:
    """The layers of one decoder.

    Args:
        decoder: where to look for them; it must be on a GPU.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        device = next(decoder.parameters()).device
        if triton_kernels(device) is None:
            return
        from vlm_prune_ext.fast import kernels

        for module in decoder.modules():
            forward = _forward_for(module, kernels) if "forward" not in vars(module) else None
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Use them inside the block. Attention modules must be given the KV caches of
        :mod:`vlm_prune_ext.fast.segments`."""
        try:
            for module, forward in self._forwards:
                module.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for module, _ in self._forwards:
                vars(module).pop("forward", None)


def _known(module: nn.Module, part: str) -> bool:
    """Is it exactly transformers' own (no subclass, which may do something else)?"""
    cls = type(module)
    names = {kind + part for kind in _KINDS}
    return cls.__module__.startswith("transformers.models.") and cls.__name__ in names


def _forward_for(module: Any, kernels: ModuleType) -> Callable[..., Any] | None:
    if _known(module, "RMSNorm"):
        return partial(_norm, module, kernels)
    if _known(module, "MLP") and module.config.hidden_act in ("silu", "swish"):
        packed = pack((module.gate_proj, module.up_proj))
        return None if packed is None else partial(_mlp, module, kernels, *packed)
    if _known(module, "Attention") and module.head_dim & (module.head_dim - 1) == 0:
        packed = pack((module.q_proj, module.k_proj, module.v_proj))
        return None if packed is None else partial(_attention, module, kernels, *packed)
    return None


def pack(
    linears: Sequence[nn.Module],
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Lay the weights of some linear layers one behind the other in memory.

    Args:
        linears: with equally many inputs.

    Returns:
        weight and bias (``None``: they have none) of all of them as one; ``None`` where one is not
        a plain linear layer. The layers' own parameters are parts of these tensors from now on.
    """
    if any(type(linear) is not nn.Linear or "forward" in vars(linear) for linear in linears):
        return None
    biases = [linear.bias for linear in linears]
    if any((bias is None) is not (biases[0] is None) for bias in biases):
        return None
    weight = _joined([linear.weight for linear in linears])  # type: ignore[misc]
    return weight, None if biases[0] is None else _joined(biases)  # type: ignore[arg-type]


def _joined(parameters: list[nn.Parameter]) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.data for parameter in parameters])
        parts = whole.split([len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            # By way of DLPack each is a storage of its own at that place, which keeps the memory
            # alive: as views of one storage they would be saved as one tensor, or not at all.
            parameter.data = torch.from_dlpack(part)
        if whole.is_cuda and whole.dim() > 1:
            torch.cuda.empty_cache()  # the old pieces are too small for the next layer's
        return whole


# -- what the modules do instead ------------------------------------------------------------------
def _norm(module: Any, kernels: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return kernels.rms_norm(hidden_states.contiguous(), module.weight, module.variance_epsilon)


def _mlp(
    module: Any, kernels: Any, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    return module.down_proj(kernels.silu_times(F.linear(x, weight, bias)))


def _attention(
    module: Any,
    kernels: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    batch, count = hidden_states.shape[:2]
    states = F.linear(hidden_states, weight, bias)
    heads, dim = module.q_proj.out_features // module.head_dim, module.head_dim
    held = past_key_values.buffers(module.layer_idx)
    rotary = tuple(part.expand(batch, count, dim).contiguous() for part in position_embeddings)
    kernels.rotate_and_keep(states, heads, rotary, held, past_key_values.slot)
    keys, values = past_key_values.seen(held)
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module,
        states[..., : heads * dim].view(batch, count, heads, dim).transpose(1, 2),
        keys,
        values,
        attention_mask,
        dropout=0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return module.o_proj(output.reshape(batch, count, heads * dim)), None
