"""The context manager that everybody uses."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from vlm_prune_ext.engine.prune import baseline, run
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
        return baseline(model)
    if not isinstance(method, Method):
        raise InputError(
            f"method={method!r} is not valid: a method such as FastV(attention_rank=100), what "
            "get_method('fastv') returns, or None for the baseline."
        )
    return run(parts_of(model), method, visual_span)
