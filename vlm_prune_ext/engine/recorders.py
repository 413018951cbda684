"""Recording hooks that transformers leaves behind, taken off again.

transformers hooks a model the first time that hidden states or attention are asked for, notes it
by a flag on every submodel, and leaves both there. What came while pruning goes when it ends.
"""

from __future__ import annotations

import weakref

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from vlm_prune_ext.engine.parts import ModelParts, Undo

_FLAG = "_output_capturing_hooks_installed"
_HOOK = "install_output_capuring_hook"

_Found = tuple[tuple[int, ...], list["weakref.ref[nn.Module]"]]
_SUBMODELS: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()


def restore_recorders(parts: ModelParts) -> Undo:
    """Remember which submodels are hooked now; the answer takes off what came since.

    Costs a look at a handful of submodels; a submodel is walked only where it was hooked.
    """
    before = {id(module) for module in _submodels(parts) if _FLAG in vars(module)}
    first_new: int = RemovableHandle.next_id

    def undo() -> None:
        fresh = [m for m in _submodels(parts) if _FLAG in vars(m) and id(m) not in before]
        for module in fresh:
            delattr(module, _FLAG)
        for module in _inside(fresh):
            hooks = module._forward_hooks
            for key in [key for key in hooks if key >= first_new] if hooks else ():
                if _HOOK in getattr(hooks[key], "__qualname__", ""):
                    del hooks[key]

    return undo


def _inside(modules: list[nn.Module]) -> list[nn.Module]:
    """These and all that they hold, some of them twice; ``modules()`` would take ten times as
    long."""
    found = list(modules)
    for module in found:  # which grows meanwhile
        found.extend(child for child in module._modules.values() if child is not None)
    return found


def _submodels(parts: ModelParts) -> list[nn.Module]:
    """Every submodel that transformers may flag. Walking 700 modules takes 2 ms, so it is done
    once, and again where decoder, layers or tower are others."""
    tower = parts.vision.tower if parts.vision is not None else None
    token = (id(parts.decoder), id(parts.layers), id(tower))
    known = _SUBMODELS.get(parts.model)
    if known is None or known[0] != token:
        found = [m for m in parts.model.modules() if isinstance(m, PreTrainedModel)]
        known = _SUBMODELS[parts.model] = (token, [weakref.ref(module) for module in found])
    return [module for module in (ref() for ref in known[1]) if module is not None]
