"""Attach a method to a model's parts, and take every trace of it off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

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


class Session:
    """A method attached to a model, until :meth:`close`.

    Args:
        parts: where things are in the model.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None``.

    Raises:
        InputError: the method does not fit the model, or the model is being pruned already.
    """

    def __init__(
        self, parts: ModelParts, method: Method, visual_span: VisualSpan | None = None
    ) -> None:
        self.trace = Trace(backend="hooks")
        self.method = method
        self.pruners = pruners = _pruners(parts, method, visual_span, self.trace)
        self._claimed = [m for m in (parts.decoder, parts.vision and parts.vision.tower) if m]
        if any(module in _BUSY for module in self._claimed):
            raise InputError(
                "This model is being pruned already: leave the first prune() (or turn the attached "
                "method off) before starting another."
            )
        kernels.leave_out_cudnn()
        self._undos: list[Undo] = [kernels.let_in_cudnn, restore_recorders(parts)]
        _BUSY.update({module: weakref.ref(self) for module in self._claimed})
        try:
            shortens = not all(isinstance(p, DecoderPruner) and p.only_masks for p in pruners)
            self._undos.append(refuse(parts, shortens))
            for pruner in pruners:
                self._undos += pruner.attach()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take everything off. A second call does nothing."""
        while self._undos:
            self._undos.pop()()
        for module in self._claimed:
            _BUSY.pop(module, None)
        self._claimed = []


def session_on(module: nn.Module) -> Session | None:
    """The session whose hooks a decoder or tower carries at this moment."""
    found = _BUSY.get(module)
    return found() if found is not None else None


def trace_of(model: nn.Module, decoder: nn.Module) -> Trace | None:
    """Where to note what answers for a model; ``None`` outside of any ``with`` block."""
    session = session_on(decoder)
    return session.trace if session is not None else _BASELINES.get(model)


@contextmanager
def baseline(model: nn.Module) -> Iterator[Trace]:
    """Nothing is attached; the trace says what answered."""
    before, trace = _BASELINES.get(model), Trace()
    _BASELINES[model] = trace
    try:
        with kernels.steady_attention():
            yield trace
    finally:
        del _BASELINES[model]
        if before is not None:
            _BASELINES[model] = before


@contextmanager
def run(
    parts: ModelParts, method: Method | None, visual_span: VisualSpan | None = None
) -> Iterator[Trace]:
    """Prune inside a ``with`` block; ``method=None`` attaches nothing at all."""
    if method is None:
        with baseline(parts.model) as trace:
            yield trace
        return
    session = Session(parts, method, visual_span)
    try:
        yield session.trace
    finally:
        session.close()


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
