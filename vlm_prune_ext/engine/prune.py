"""Attach a method to a model's parts, and take every trace of it off again.

While anything runs under this package, cuDNN is kept out of scaled-dot-product attention: it plans
anew for every new shape, and a growing KV cache has a new shape at every token (65 to 96 ms each on
an H200, where the other kernels need 21; LLaVA-1.5-7B, bf16, batch 1).

Training: gradients flow through a drop as through any gather. A loss over labels does not work,
since logits have lost the positions that were dropped; nor does gradient checkpointing, which runs
layers a second time in the backward pass, when the prompt they belonged to is gone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from vlm_prune_ext.engine.compose import FeatureSite, feature_site
from vlm_prune_ext.engine.decoder import COMPILED, DecoderPruner, refuse_compiled
from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.engine.prompt import VisualSpan
from vlm_prune_ext.engine.tower import VisionPruner
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method

# Modules that carry hooks of ours at this moment, and whose. A session holds its modules, so it is
# only referred to here.
_BUSY: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
# Traces of models that nothing is attached to, for what else may answer for them.
_BASELINES: weakref.WeakKeyDictionary[nn.Module, Trace] = weakref.WeakKeyDictionary()

Pruner = DecoderPruner | VisionPruner | FeatureSite


class Session(AbstractContextManager[Trace]):
    """A method on a model: planned once, attached inside ``with`` (or from :meth:`open` to
    :meth:`close`), as often as wanted.

    Args:
        parts: where things are in the model.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None``.
        whole_videos: rules see a video as one image, not each of its frames.

    Raises:
        InputError: the method does not fit the model.
    """

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        visual_span: VisualSpan | None = None,
        *,
        whole_videos: bool = False,
    ) -> None:
        self.trace = Trace(backend="hooks")
        self.parts, self.method = parts, method
        self.pruners = _pruners(parts, method, visual_span, self.trace, whole_videos)
        self._undos: list[Undo] = []
        # What one session at a time may have.
        vision = parts.vision
        claimed = (parts.decoder, None if vision is None else vision.tower)
        self._claimed = [module for module in claimed if module is not None]

    def open(self) -> Trace:
        """Attach everything.

        Raises:
            InputError: the model is being pruned already.
        """
        if any(module in _BUSY for module in self._claimed):
            raise InputError(
                "This model is being pruned already: leave the first prune() (or turn the attached "
                "method off) before starting another."
            )
        self.trace.clear()
        leave_out_cudnn()
        self._undos = [let_in_cudnn, _restore_recorders(self.parts)]
        _BUSY.update({module: weakref.ref(self) for module in self._claimed})
        try:
            shortens = not all(isinstance(p, DecoderPruner) and p.only_masks for p in self.pruners)
            self._undos.append(_refuse(self.parts, shortens))
            for pruner in self.pruners:
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
        for module in self._claimed:
            _BUSY.pop(module, None)

    def __enter__(self) -> Trace:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()


class Baseline(AbstractContextManager[Trace]):
    """Nothing is attached to a model; the trace says what answered."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, list[Trace | None]()

    def __enter__(self) -> Trace:
        self._before.append(_BASELINES.get(self._model))
        trace = _BASELINES[self._model] = Trace()
        leave_out_cudnn()
        return trace

    def __exit__(self, *error: object) -> None:
        let_in_cudnn()
        before = self._before.pop()
        if before is None:
            del _BASELINES[self._model]
        else:
            _BASELINES[self._model] = before


def run(
    parts: ModelParts, method: Method | None, visual_span: VisualSpan | None = None
) -> Session | Baseline:
    """Prune inside a ``with`` block; ``method=None`` attaches nothing at all."""
    return Baseline(parts.model) if method is None else Session(parts, method, visual_span)


def session_on(module: nn.Module) -> Session | None:
    """The session whose hooks a decoder or tower carries at this moment."""
    found = _BUSY.get(module)
    return found() if found is not None else None


def trace_of(model: nn.Module, decoder: nn.Module) -> Trace | None:
    """Where to note what answers for a model; ``None`` outside of any ``with`` block."""
    session = session_on(decoder)
    return session.trace if session is not None else _BASELINES.get(model)


def _pruners(
    parts: ModelParts,
    method: Method,
    visual_span: VisualSpan | None,
    trace: Trace,
    whole_videos: bool,
) -> list[Pruner]:
    """What carries the method out, at each site where it works."""
    pruners: list[Pruner] = []
    site, between = None, method.feature_stage()
    if "tower" in method.working_sites:
        vision = parts.vision
        if vision is None or not vision.drops:
            raise InputError(f"{method.name} works on the vision tower: {parts.why_no_vision}.")
        tower = VisionPruner(vision, method, trace)
        pruners.append(tower)
        site = FeatureSite(None, tower, trace)
    elif between is not None:
        site = feature_site(parts, method, between, trace)
        pruners += [site] if site.works_in_tower else []
    if parts.decoder is not None:
        whole_videos = whole_videos or method.compares_frames
        pruners.append(DecoderPruner(parts, method, visual_span, trace, site, whole_videos))
    elif {"decoder", "features"} & set(method.working_sites):
        raise InputError(
            f"{method.name} drops tokens in a language model, but this is a bare vision tower: "
            "only methods that work in the tower (SAINT with vit=..., start=None) apply."
        )
    return pruners


# -- attention kernels ----------------------------------------------------------------------------
_LOCK = threading.Lock()
_holders, _restore = 0, False


def leave_out_cudnn() -> None:
    """Keep cuDNN out of attention until :func:`let_in_cudnn` was called as often as this."""
    global _holders, _restore
    with _LOCK:
        _holders += 1
        if _holders == 1 and torch.backends.cuda.cudnn_sdp_enabled():
            torch.backends.cuda.enable_cudnn_sdp(False)
            _restore = True


def let_in_cudnn() -> None:
    """Undo one :func:`leave_out_cudnn`; the last one puts the setting back as it was."""
    global _holders, _restore
    with _LOCK:
        _holders -= 1
        if _holders == 0 and _restore:
            torch.backends.cuda.enable_cudnn_sdp(True)
            _restore = False


@contextmanager
def steady_attention() -> Iterator[None]:
    """Both of the above around a block."""
    leave_out_cudnn()
    try:
        yield
    finally:
        let_in_cudnn()


# -- what cannot work while tokens are dropped ----------------------------------------------------
def _refuse(parts: ModelParts, shortens: bool) -> Undo:
    """A hook in front of the model that raises InputError for labels and for checkpointed layers.

    Args:
        parts: of the model.
        shortens: whether logits lose positions; masks alone leave them all.

    Returns:
        what takes it off.
    """
    tower = parts.vision.layers if parts.vision is not None else ()
    layers = [*parts.layers, *tower]
    if "torch._dynamo.eval_frame" in sys.modules:  # else nothing was compiled
        whole = [parts.model, *parts.model.children(), *layers]
        if parts.decoder is not None:
            whole.append(parts.decoder)
        for module in whole:
            own = vars(module)
            if (
                type(module).__name__ == "OptimizedModule"
                or own.get("_compiled_call_impl") is not None
                or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
            ):
                raise InputError(COMPILED)

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        refuse_compiled()
        if shortens and kwargs.get("labels") is not None:
            raise InputError(
                "labels are not accepted while pruning: logits have lost the positions that were "
                "dropped. Compute the loss of the logits that are left (Trace.kept says which), or "
                "train outside of prune()."
            )
        if not torch.is_grad_enabled():
            return
        if any(
            getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
        ):
            raise InputError(
                "Gradient checkpointing is not possible while pruning: layers would run a second "
                "time without their prompt. Call gradient_checkpointing_disable() or train outside "
                "of prune()."
            )

    return parts.model.register_forward_pre_hook(look, with_kwargs=True).remove


# -- what transformers leaves behind --------------------------------------------------------------
_FLAG = "_output_capturing_hooks_installed"
_HOOK = "install_output_capuring_hook"

_Found = tuple[tuple[int, ...], list["weakref.ref[nn.Module]"]]
_SUBMODELS: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()


def _restore_recorders(parts: ModelParts) -> Undo:
    """transformers hooks a model the first time that hidden states or attention are asked for,
    notes it by a flag on every submodel, and leaves both there. The answer takes off what came
    since: a look at a handful of submodels, which are walked only where they were hooked."""
    before = {id(module) for module in _submodels(parts) if _FLAG in vars(module)}
    first_new: int = RemovableHandle.next_id

    def undo() -> None:
        fresh = [m for m in _submodels(parts) if _FLAG in vars(m) and id(m) not in before]
        for module in fresh:
            delattr(module, _FLAG)
        inside = list(fresh)  # some twice; `modules()` would take ten times as long
        for module in inside:  # which grows meanwhile
            inside.extend(child for child in module._modules.values() if child is not None)
            hooks = module._forward_hooks
            for key in [key for key in hooks if key >= first_new]:
                if _HOOK in getattr(hooks[key], "__qualname__", ""):
                    del hooks[key]

    return undo


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
