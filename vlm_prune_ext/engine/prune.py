"""Attach a method to a model's parts, and take every trace of it off again."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

from torch import nn

from vlm_prune_ext.engine import kernels
from vlm_prune_ext.engine.compose import FeatureSite, feature_site
from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.engine.recorders import restore_recorders
from vlm_prune_ext.engine.refusals import refuse
from vlm_prune_ext.engine.spans import VisualSpan
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.engine.vision import VisionPruner
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method

# Modules that carry hooks of ours at this moment, and whose. A session holds its modules, so it is
# only referred to here.
_BUSY: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
# Traces of models that nothing is attached to, for what else may answer for them.
_BASELINES: weakref.WeakKeyDictionary[nn.Module, Trace] = weakref.WeakKeyDictionary()


class Session(AbstractContextManager[Trace]):
    """A method on a model: planned once, attached inside ``with`` (or from :meth:`open` to
    :meth:`close`), as often as wanted.

    Args:
        parts: where things are in the model.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None``.

    Raises:
        InputError: the method does not fit the model.
    """

    def __init__(
        self, parts: ModelParts, method: Method, visual_span: VisualSpan | None = None
    ) -> None:
        self.trace = Trace(backend="hooks")
        self.parts, self.method = parts, method
        self.pruners = _pruners(parts, method, visual_span, self.trace)
        self._undos: list[Undo] = []

    def open(self) -> Trace:
        """Attach everything.

        Raises:
            InputError: the model is being pruned already.
        """
        parts, pruners = self.parts, self.pruners
        claimed = self._claimed()
        if any(module in _BUSY for module in claimed):
            raise InputError(
                "This model is being pruned already: leave the first prune() (or turn the attached "
                "method off) before starting another."
            )
        self.trace.clear()
        kernels.leave_out_cudnn()
        self._undos = [kernels.let_in_cudnn, restore_recorders(parts)]
        _BUSY.update({module: weakref.ref(self) for module in claimed})
        try:
            shortens = not all(isinstance(p, DecoderPruner) and p.only_masks for p in pruners)
            self._undos.append(refuse(parts, shortens))
            for pruner in pruners:
                self._undos += pruner.attach()
        except BaseException:
            self.close()
            raise
        return self.trace

    def close(self) -> None:
        """Take everything off. A second call does nothing."""
        if not self._undos:
            return
        while self._undos:
            self._undos.pop()()
        for module in self._claimed():
            _BUSY.pop(module, None)

    def _claimed(self) -> list[nn.Module]:
        """Modules that one session at a time may have."""
        vision = self.parts.vision
        both = (self.parts.decoder, None if vision is None else vision.tower)
        return [module for module in both if module is not None]

    def __enter__(self) -> Trace:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()


def session_on(module: nn.Module) -> Session | None:
    """The session whose hooks a decoder or tower carries at this moment."""
    found = _BUSY.get(module)
    return found() if found is not None else None


def trace_of(model: nn.Module, decoder: nn.Module) -> Trace | None:
    """Where to note what answers for a model; ``None`` outside of any ``with`` block."""
    session = session_on(decoder)
    return session.trace if session is not None else _BASELINES.get(model)


class Baseline(AbstractContextManager[Trace]):
    """Nothing is attached to a model; the trace says what answered."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, list[Trace | None]()

    def __enter__(self) -> Trace:
        self._before.append(_BASELINES.get(self._model))
        trace = _BASELINES[self._model] = Trace()
        kernels.leave_out_cudnn()
        return trace

    def __exit__(self, *error: object) -> None:
        kernels.let_in_cudnn()
        before = self._before.pop()
        if before is None:
            del _BASELINES[self._model]
        else:
            _BASELINES[self._model] = before


def run(
    parts: ModelParts, method: Method | None, visual_span: VisualSpan | None = None
) -> Session | Baseline:
    """Prune inside a ``with`` block; ``method=None`` attaches nothing at all."""
    if method is None:
        return Baseline(parts.model)
    return Session(parts, method, visual_span)


Pruner = DecoderPruner | VisionPruner | FeatureSite


def _pruners(
    parts: ModelParts, method: Method, visual_span: VisualSpan | None, trace: Trace
) -> list[Pruner]:
    pruners: list[Pruner] = []
    site = feature_site(parts, method, trace)
    if "tower" in method.working_sites:
        vision = parts.vision
        if vision is None or not vision.drops:
            raise InputError(f"{method.name} works on the vision tower: {parts.why_no_vision}.")
        tower = VisionPruner(vision, method, trace)
        pruners.append(tower)
        site = FeatureSite(None, tower, trace)
    elif site is not None and site.works_in_tower:
        pruners.append(site)
    if parts.decoder is not None:
        pruners.append(DecoderPruner(parts, method, visual_span, trace, site))
    elif {"decoder", "features"} & set(method.working_sites):
        raise InputError(
            f"{method.name} drops tokens in a language model, but this is a bare vision tower: "
            "only methods that work in the tower (SAINT with vit=..., start=None) apply."
        )
    return pruners
