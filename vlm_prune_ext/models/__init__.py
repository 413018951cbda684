"""Models: loading them, and telling the engine where their parts are.

Families and checkpoints by short name are data (:mod:`.catalogue`); what is heavy is imported when
it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_prune_ext.models.adapters import device_of, dtype_of, families, load, parts_of
    from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
    from vlm_prune_ext.models.convert import convert_to_hf

_HOMES = {
    "Family": "base",
    "LoadOptions": "base",
    "PromptProcessor": "base",
    "convert_to_hf": "convert",
    "device_of": "adapters",
    "dtype_of": "adapters",
    "families": "adapters",
    "load": "adapters",
    "parts_of": "adapters",
}

__all__ = [
    "Family",
    "LoadOptions",
    "PromptProcessor",
    "convert_to_hf",
    "device_of",
    "dtype_of",
    "families",
    "load",
    "parts_of",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
