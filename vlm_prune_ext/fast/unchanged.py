"""Whether a model is still the one that was recorded."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class _Seen:
    """One module as it was: its children, its tensors and where they were, its own forward."""

    module: weakref.ref[nn.Module]
    children: list[tuple[str, weakref.ref[nn.Module]]]
    tensors: list[tuple[Any, str, weakref.ref[Any], int]]
    forward: int

    @staticmethod
    def of(module: nn.Module) -> _Seen:
        children = [(n, weakref.ref(m)) for n, m in module._modules.items() if m is not None]
        holders: list[Any] = [module._parameters, module._buffers]
        tensors = [
            (held, name, weakref.ref(tensor), tensor.data_ptr())
            for held in holders
            for name, tensor in held.items()
            if tensor is not None
        ]
        return _Seen(weakref.ref(module), children, tensors, id(vars(module).get("forward")))

    def same(self, module: nn.Module) -> bool:
        """Is it as it was?"""
        if id(vars(module).get("forward")) != self.forward:
            return False
        if any(module._modules.get(name) is not child() for name, child in self.children):
            return False
        for held, name, before, place in self.tensors:
            tensor, old = held.get(name), before()
            if tensor is not old or old is None or old.data_ptr() != place:
                return False
        return True


class Unchanged:
    """Remembers a model's modules, weights and where they are in memory.

    A recording goes on with what it was made with: a module that was replaced, a weight that was
    moved or cast, an adapter or a hook would be passed over in silence.

    Args:
        model: as it is recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = [_Seen.of(module) for module in model.modules()]

    def holds(self) -> bool:
        """Is everything as it was?"""
        for seen in self._seen:
            module = seen.module()
            if module is None or not seen.same(module):
                return False
        return True

    def hooked(self) -> bool:
        """Are there hooks of others: not this package's, nor those that transformers leaves?"""
        for seen in self._seen:
            module: Any = seen.module()
            if module is None:
                continue
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if hooks and not all(_is_known(hook) for hook in hooks.values()):
                    return True
        return False


def _is_known(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or ""
    return where.partition(".")[0] in ("transformers", "vlm_prune_ext")
