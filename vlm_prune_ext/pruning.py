"""What everybody uses: pruning inside a ``with`` block, and the ``reset_*()`` calls.

Wrappers of other suites, and users of the published codes, set ``model.config.use_fast_v = True``
and call ``model.model.reset_fastv()``: :func:`attach` gives any supported model these calls.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prompt import VisualSpan
from vlm_prune_ext.engine.prune import Baseline, Session
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.option import require
from vlm_prune_ext.methods.registry import METHODS, classes, settings_method
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.models.generic import path_to

logger = logging.getLogger("vlm_prune_ext")

OFF_LINE = "NO TOKEN PRUNING TECHNIQUE WILL BE USED ------"
CUSTOM_LINE = "CUSTOM TOKEN SELECTION TECHNIQUE WILL BE USED ------"


def prune(
    model: nn.Module,
    method: Method | None,
    *,
    visual_span: VisualSpan | None = None,
    video: str = "frame",
) -> AbstractContextManager[Trace]:
    """Prune visual tokens while the ``with`` block runs.

    On leaving, also by exception, the model is what it was: no hook, attribute or patched method
    is left. ``method=None`` is the baseline and attaches nothing.

    ``vp.prune`` session reuse: one block may hold any number of prompts, which costs nothing in
    between. Where the model must be free in between, what this returns may be entered again: the
    plan is made once, and anew only where a module was replaced. It yields the same ``Trace``,
    emptied; the method's settings and the model's configuration are those of the first time::

        pruned = vp.prune(model, method)
        for inputs in prompts:
            with pruned as trace:
                model.generate(**inputs)

    Args:
        model: a vision-language model, a bare causal language model or a bare ``CLIPVisionModel``.
        method: what to drop and where, e.g. ``FastV(agg_layer=3, attention_rank=100)``.
        visual_span: where visual tokens are, ``(start, length)`` for all samples or a list with
            one such pair, or a list of pairs, per sample. Needed where a bare language model is
            fed ``inputs_embeds``; otherwise they are found from the inputs.
        video: what a method chooses from, and its budget is of: each ``"frame"`` of a video (of
            Qwen's models: each pair), or the whole ``"video"``. Methods that compare frames see
            whole videos either way.

    Returns:
        a context manager that yields the :class:`Trace` of what is kept.

    Raises:
        InputError: a model of unknown form, a method that does not fit it, or a model that is
            being pruned already.
    """
    if method is None:
        return Baseline(model)
    if not isinstance(method, Method):
        raise InputError(
            f"method={method!r} is not valid: a method such as FastV(attention_rank=100), what "
            "get_method('fastv') returns, or None for the baseline."
        )
    if video not in ("frame", "video"):
        raise unknown_name("video budget", video, ("frame", "video"))
    return _Pruning(model, method, visual_span, video == "video")


class _Pruning(AbstractContextManager[Trace]):
    """See :func:`prune`."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        visual_span: VisualSpan | None,
        whole_videos: bool = False,
    ) -> None:
        self._given = (model, method, visual_span, whole_videos)
        self._plan()

    def _plan(self) -> None:
        model, method, visual_span, whole_videos = self._given
        parts = parts_of(model)
        self._session = Session(parts, method, visual_span, whole_videos=whole_videos)
        self._children = _children_on_the_way(parts)

    def __enter__(self) -> Trace:
        # While these are the same modules, the plan still fits: a few microseconds to know.
        if any(list(now.values()) != then for now, then in self._children):
            self._plan()
        return self._session.open()

    def __exit__(self, *error: object) -> None:
        self._session.close()


def _children_on_the_way(parts: ModelParts) -> list[tuple[dict[str, Any], list[Any]]]:
    """Of all modules that lead to a model's parts, the children: as they are held, and were."""
    modules = [*path_to(parts.model, parts.decoder), parts.layers]
    if parts.vision is not None:
        tower = parts.vision.tower
        modules += [*path_to(parts.model, tower), *path_to(tower, parts.vision.layers)]
    return [(module._modules, list(module._modules.values())) for module in modules]


# -- reset calls ----------------------------------------------------------------------------------
def reset_calls() -> dict[str, str]:
    """Name of a call -> registry name of the method it turns on or off: ``reset_<name>`` of every
    method, and the names that users of the published codes know."""
    return {call: cls.name for cls in classes() for call in (f"reset_{cls.name}", *cls.resets)}


class Attachment:
    """What is attached to one model: the reset calls, and at most one running method.

    Attributes:
        method: the method that is on, or ``None``.
        trace: what the last prefill kept (empty while nothing is on).
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = parts_of(model)
        self._session: Session | None = None
        self._announced: str | None = None

    @property
    def method(self) -> Method | None:
        """The method that is on."""
        return self._session.method if self._session else None

    @property
    def trace(self) -> Trace:
        """Record of the method that is on."""
        return self._session.trace if self._session else Trace()

    def switch(self, method: Method | None) -> None:
        """Turn ``method`` on in place of whatever is on; ``None`` turns everything off.

        Raises:
            InputError: the method does not fit the model; then nothing is on.
        """
        if self._session is not None:
            self._session.close()
            self._session = None
        if method is not None:
            session = Session(self._parts, method)
            session.open()
            self._session = session
        if self._announced != announcement(method):
            announce(method)
        self._announced = announcement(method)

    def reset(self, name: str) -> None:
        """Turn the method ``name`` on or off as ``model.config`` says."""
        cls = METHODS[name]
        assert cls is not None
        config = self._parts.model.config
        flag = getattr(config, cls.flag(), None)
        accepted = "true or false"  # a text such as "false" would count as true
        require(flag in (None, True, False), cls.flag(), flag, accepted)
        if flag:
            self.switch(settings_method(cls, config))
        elif self.method is None or isinstance(self.method, cls):
            self.switch(None)


def announcement(method: Method | None) -> str | None:
    """The line that programs reading logs know for this method, if there is one."""
    if method is None:
        return OFF_LINE
    return CUSTOM_LINE if method.name == "custom" else None


def announce(method: Method | None) -> None:
    """Log :func:`announcement`, if the method has one."""
    line = announcement(method)
    if line is not None:
        logger.warning(line)


# Where a model keeps its attachment. On the model itself: a table of ours would keep it alive.
_PLACE = "_vlm_prune_attachment"


def attach(model: nn.Module) -> Attachment:
    """Add ``reset_<name>()`` for every method to a model and to its inner ``.model``, and beside it
    the names of the published codes: ``reset_hmapv()`` (= ``reset_himap()``), ``set_saint()``
    (= ``reset_saint()``), ``reset_custom_selection()``.

    Each reads its method's fields off ``model.config`` and turns the method on, or off where the
    ``use_*`` flag is false or missing; turning one on turns the others off. A second call returns
    the same :class:`Attachment`.

    Raises:
        InputError: a model of unknown form.
    """
    known = getattr(model, "__dict__", {}).get(_PLACE)
    if known is not None:
        return known
    attachment = Attachment(model)
    for module in _holders(model):
        for call, name in reset_calls().items():
            # Straight into __dict__: nn.Module would take a bound method of a module for a child.
            vars(module)[call] = partial(_reset, weakref.ref(model), name)
    vars(model)[_PLACE] = attachment
    return attachment


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: the running method and all reset calls go. Harmless if not attached."""
    attachment = getattr(model, "__dict__", {}).pop(_PLACE, None)
    if attachment is None:
        return
    if attachment._session is not None:
        attachment._session.close()
    for module in _holders(model):
        for call in reset_calls():
            vars(module).pop(call, None)


def _holders(model: nn.Module) -> list[nn.Module]:
    inner = getattr(model, "model", None)
    return [model, inner] if isinstance(inner, nn.Module) else [model]


def _reset(model: Any, name: str) -> None:
    attachment = vars(model()).get(_PLACE)
    if attachment is None:
        raise InputError("This model is not attached any more: call attach(model) first.")
    attachment.reset(name)
