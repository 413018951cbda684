"""torch, imported when it is first used.

Methods are listed, checked and refused without it: it takes a second or two to import, and
command lines and plug-in registries must not wait for that. Files whose functions compute with
torch, but whose import does not, take it from here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        vars(self).update(vars(module))  # later look-ups cost nothing
        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
