"""Visual-token pruning for vision-language models, on unmodified transformers.

>>> import vlm_prune_ext as vp
>>> model, processor = vp.load("liuhaotian/llava-v1.5-7b")  # doctest: +SKIP
>>> with vp.prune(model, vp.FastV(agg_layer=3, attention_rank=100)) as trace:  # doctest: +SKIP
...     out = model.generate(**processor.prompt("What is this?", image))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module that has it. Resolved on first use, so that `import vlm_prune_ext` costs nothing
# (lmms-eval imports every plug-in at start, whether it is used or not).
_HOMES = {
    "load": "models",
    "prune": "pruning",
    "attach": "resets",
    "detach": "resets",
    "Trace": "engine.trace",
    "METHODS": "methods.registry",
    "get_method": "methods.registry",
    "FastV": "methods.fastv",
    "HiMAP": "methods.himap",
    "SAINT": "methods.saint",
    "SAINTViT": "methods.saint",
    "CustomSelection": "methods.custom",
    "RandomDrop": "methods.random_drop",
    "Downsample": "methods.downsample",
    "InputError": "errors",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
