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
    "Clip": "models.clips",
    "prune": "pruning",
    "ask": "evals.answer",
    "attach": "pruning",
    "detach": "pruning",
    "Trace": "engine.trace",
    "METHODS": "methods.registry",
    "get_method": "methods.registry",
    "register": "methods.base",
    "InputError": "errors",
}


def _registry() -> Any:
    return importlib.import_module(f"{__name__}.methods.registry")


def __getattr__(name: str) -> Any:
    """Names of :data:`_HOMES`, and the classes of all methods."""
    if name == "__all__":
        return [*sorted(_HOMES), *_registry().PUBLIC, "__version__"]
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name[:1].isupper():  # a module of this package is no class, and costs no look-up
        found = _registry().PUBLIC.get(name)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
