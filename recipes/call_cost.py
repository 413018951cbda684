"""What a call costs beside the model's own work, for LLaVA-1.5-7B's 724 modules.

Entering and leaving ``prune``, and knowing that nothing was changed since pieces of the model were
recorded, are pure Python over the modules: they cost the same whatever the widths are and whatever
device does the work, so the model has its published shape and no weights (device ``meta``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

import vlm_prune_ext as vp
from vlm_prune_ext.bench.shapes import SHAPES
from vlm_prune_ext.fast.unchanged import Unchanged
from vlm_prune_ext.models import parts_of

METHOD = vp.FastV(agg_layer=3, attention_rank=100)


def shape_7b() -> Any:
    """LLaVA-1.5-7B without weights."""
    config: Any = SHAPES["llava-1.5-7b"]()
    with no_init_weights(), torch.device("meta"):
        return LlavaForConditionalGeneration(config).eval()


def costs(model: Any, repeat: int = 200) -> dict[str, float]:
    """What is asked -> milliseconds, median of ``repeat``."""
    pruned = vp.prune(model, METHOD)
    unchanged = Unchanged(model, parts_of(model).layers)

    def enter(how: Callable[[], Any]) -> None:
        with how():
            pass

    asked = {
        "prune, a new one": lambda: enter(lambda: vp.prune(model, METHOD)),
        "prune, entered again": lambda: enter(lambda: pruned),
        "unchanged before a replay": lambda: unchanged.moved() or unchanged.hooked(),
        "unchanged while the device works": unchanged.holds,
    }
    return {name: _milliseconds(ask, repeat) for name, ask in asked.items()}


def _milliseconds(ask: Callable[[], Any], repeat: int) -> float:
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repeat // 2] * 1e3


if __name__ == "__main__":
    for name, cost in costs(shape_7b()).items():
        print(f"{name}: {cost:.3f} ms")
