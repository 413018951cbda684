"""KV caches that outlive the pruning they were made under.

Layers of such a cache hold different tokens. Only the pruner that dropped them knows which; a model
without it would count positions and masks from layer 0 and decode on, silently wrong or with an
error about shapes. So the cache itself refuses more tokens; nothing is put on the model.
"""

from __future__ import annotations

from typing import Any

from vlm_prune_ext.errors import InputError


def seal(cache: Any) -> None:
    """Have a cache raise when tokens are appended to it.

    Caches of fixed size are left alone: transformers empties and uses them again.
    """
    if not getattr(cache, "is_compileable", False):
        cache.update = _Refusal(cache)


class _Refusal:
    """Stands in for a cache's ``update``."""

    def __init__(self, cache: Any) -> None:
        self.kind = type(cache)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"This {self.kind.__name__} was filled while pruning, which has ended, and its layers "
            "hold different tokens: decode inside the with block, or start anew from the whole "
            "prompt."
        )
