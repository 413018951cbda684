"""The context manager that everybody uses."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from vlm_prune_ext.engine.prune import Baseline, Session
from vlm_prune_ext.engine.spans import VisualSpan
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models import parts_of


def prune(
    model: nn.Module, method: Method | None, *, visual_span: VisualSpan | None = None
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
    return _Pruning(model, method, visual_span)


class _Pruning(AbstractContextManager[Trace]):
    """See :func:`prune`."""

    def __init__(self, model: nn.Module, method: Method, visual_span: VisualSpan | None) -> None:
        self._given = (model, method, visual_span)
        self._plan()

    def _plan(self) -> None:
        model, method, visual_span = self._given
        parts = parts_of(model)
        self._session = Session(parts, method, visual_span)
        self._structure = parts.structure()

    def __enter__(self) -> Trace:
        if not self._structure.holds():
            self._plan()
        return self._session.open()

    def __exit__(self, *error: object) -> None:
        self._session.close()
