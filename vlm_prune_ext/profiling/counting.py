"""FLOPs as torch counts them while a model runs.

``torch.utils.flop_counter`` sees matrix products, convolutions and the fused attention kernels of
GPUs. Three things are added here: the CPU's fused attention, grouped key/value heads inside fused
attention (torch's own formula takes equally many heads for granted), and the kernels of
bitsandbytes and flash-attn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any):  # type: ignore[no-untyped-def]
    """Shapes ``(batch, heads, length, head_dim)``; every query head works, however few keys."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[-2] * (dim + value[-1])


def _packed_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """flash-attn: ``(batch, length, heads, head_dim)``."""
    batch, queries, heads, dim = query
    return 4 * batch * heads * queries * key[1] * dim


def _four_bit(a: Sequence[int], b: Any, shape: Sequence[int], *_: Any, **__: Any) -> int:
    """``a`` ``(..., in)`` times a packed matrix of ``shape`` ``(out, in)``."""
    return 2 * math.prod(a) * shape[0]


def _eight_bit(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """``a`` ``(..., in)`` times ``b`` ``(out, in)``."""
    return 2 * math.prod(a) * b[0]


def _mixed(a: Sequence[int], ca: Any, cb: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * cb[0]


def _formulas() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    wanted: list[tuple[str, str, Callable[..., int]]] = [
        *(("aten", name, _attention) for name in _ATTENTION),
        ("flash_attn", "_flash_attn_forward", _packed_attention),
        ("bitsandbytes", "gemm_4bit", _four_bit),
        ("bitsandbytes", "gemv_4bit", _four_bit),
        ("bitsandbytes", "int8_linear_matmul", _eight_bit),
        ("bitsandbytes", "int8_scaled_mm", _eight_bit),
        ("bitsandbytes", "int8_mixed_scaled_mm", _mixed),
    ]
    for space, name, formula in wanted:
        try:
            found[getattr(getattr(torch.ops, space), name)] = formula
        except AttributeError:  # a library that is not loaded, or another version of it
            continue
    return found


class _Nowhere:
    """In place of the counter's own book of modules, whose hooks on every module in the process
    stumble over parameters used in inference mode (BLIP-2's queries)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class FlopCount:
    """FLOPs counted so far.

    Attributes:
        total: of everything.
        vision: of the modules that were named, e.g. the vision tower.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self._entered: list[int] = []
        self.vision = 0

    @property
    def total(self) -> int:
        """Until now."""
        return int(self._counter.get_total_flops())

    def enter(self, *_: Any) -> None:
        """Hook in front of a named module."""
        self._entered.append(self.total)

    def leave(self, *_: Any) -> None:
        """Hook behind it."""
        self.vision += self.total - self._entered.pop()


@contextmanager
def count_flops(vision: Sequence[torch.nn.Module] = ()) -> Iterator[FlopCount]:
    """Count what runs inside of the ``with`` block.

    Args:
        vision: modules whose part is told apart; none of them inside of another.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    count = FlopCount(counter)
    handles = [module.register_forward_pre_hook(count.enter) for module in vision]
    handles += [module.register_forward_hook(count.leave) for module in vision]
    try:
        # Compiled code would be one opaque operation to the counter.
        with torch.compiler.set_stance("force_eager"), counter:
            yield count
    finally:
        for handle in handles:
            handle.remove()


_VISION = (
    "vision_tower",
    "multi_modal_projector",
    "visual",
    "vision_model",
    "qformer",
    "language_projection",
    "vision_embed_tokens",
)


def vision_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that turn pixels into visual tokens, by the names all families' classes use; none
    of them holds another."""
    inner = getattr(model, "model", model)
    found = [getattr(inner, name, None) for name in _VISION]
    return [module for module in found if isinstance(module, torch.nn.Module)]
