"""Custom selection: one drop, by a built-in score or by a function of your own.

The fields are those of ``custom_*`` in ``model.config`` as codes built on HiMAP's use them; the
named selections are common yardsticks rather than one paper's method (``attention`` is FastV's
score, arXiv 2403.06764).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias, cast, get_args

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import (
    Budget,
    Evidence,
    Method,
    Need,
    Stage,
    label_text,
    register,
    resolve_budget,
)
from vlm_prune_ext.methods.evidence import Attention, Named
from vlm_prune_ext.methods.option import (
    a_budget,
    a_layer,
    a_number,
    a_seed,
    anything,
    image_length,
    option,
    require,
    system_length,
)
from vlm_prune_ext.select import (
    mean_over_heads,
    random_places,
    redundancy,
    sample_ascending,
    top_k_ascending,
    uniform_places,
    unit_rows,
)

Selection: TypeAlias = "Callable[[Evidence, int], torch.Tensor]"
"""``(evidence, keep) -> int tensor (batch, keep)`` of places 0 ... evidence.count - 1."""

NEEDS: dict[str, tuple[Need, ...]] = {
    "attention": ("attention:last",),
    "sampling": ("attention:last",),
    "similarity": ("keys",),
    "norm": ("hidden",),
    "uniform": (),
    "random": (),
}
"""Selection name -> what it has to see."""


def _of_a_layer(need: Need) -> str:
    """What a need reads off a layer's attention, which nothing has run in front of layer 0."""
    if isinstance(need, Attention) or need.startswith("attention:"):
        return "attention"
    return "keys" if need in ("keys", "tail_keys") else ""


@register
@dataclass(frozen=True)
class CustomSelection(Method):
    """Drop visual tokens once, in front of ``agg_layer``, by a named score or your own function.

    Selections: ``attention`` keeps the tokens that the last token attends to most (mean over
    heads, layer ``agg_layer - 1``); ``sampling`` draws without replacement with probabilities
    softmax(that attention / ``temperature``); ``similarity`` keeps those whose keys have the
    least mean cosine with all the others; ``norm`` keeps the largest hidden states (L2 norm);
    ``uniform`` keeps an even grid; ``random`` draws uniformly.

    Your own: a function, or ``"package.module:function"``, called as ``function(evidence, keep)``
    for each group of images with equally many visual tokens. It returns an integer tensor
    ``(batch, keep)`` of different places, 0 ... ``evidence.count - 1``, in any order;
    ``evidence`` is a :class:`vlm_prune_ext.methods.base.Evidence`. It sees the attention of the
    last token, the keys and the hidden states; an attribute ``needs`` on the function, e.g.
    ``("keys",)``, narrows that to what it uses, which is cheaper.
    """

    name = "custom"
    budget_field = "kept_tokens"
    config_flag = "use_custom_selection"
    resets = ("reset_custom_selection",)

    method: str | Selection = option(
        "attention",
        anything(),
        "Attention, sampling, similarity, norm, uniform, random, a function, or "
        '"package.module:function".',
        config="custom_selection_method",
        tag=None,
    )
    kept_tokens: Budget = option(
        100, a_budget(), "Visual tokens kept per image, or their ratio.", tag=None
    )
    agg_layer: int = option(
        3,
        a_layer(),
        "Layer in front of which tokens go, at least 1 where attention or keys are needed (they "
        "are those of the layer before), else at least 0.",
        tag="k",
    )
    temperature: float = option(
        1.0,
        a_number(1e-6, 1e30, "a finite number of at least 1e-6"),
        "Of sampling, at least 1e-6; high is close to random, low is close to attention.",
        tag="temp",
    )
    seed: int = option(
        0,
        a_seed(),
        "Of sampling and random, from 0 to 2**63 - 1; the same draw noise for every image.",
    )
    sys_length: int | None = system_length()
    image_token_length: int | None = image_length()

    def check(self) -> None:
        """The selection exists, can be called, and finds what it needs at its layer."""
        function = self._function()
        if function is not None:
            _check_signature(function, self.method)
        before = list(dict.fromkeys(filter(None, map(_of_a_layer, self._needs()))))
        accepted = (
            f"at least 1 for method={label_text(self.method)!r}, which needs "
            f"{' and '.join(before)} of the layer in front of it"
        )
        require(self.agg_layer > 0 or not before, "agg_layer", self.agg_layer, accepted)

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage, in front of ``agg_layer``."""
        return (Stage(self.agg_layer, self._needs(), self._rule, budget=self.kept_tokens),)

    def label(self) -> str:
        """Short text for file names, e.g. ``custom_attention100``."""
        first, *rest = super().label().split("_", 1)
        return "_".join([f"{first}_{label_text(self.method)}{self.kept_tokens}", *rest])

    # -- what the selection is ---------------------------------------------------------------
    def _function(self) -> Selection | None:
        """The user's function, or ``None`` for a named selection."""
        if callable(self.method):
            return self.method
        require(isinstance(self.method, str), "method", self.method, _ACCEPTED)
        if self.method in NEEDS:
            return None
        if ":" not in self.method:
            raise unknown_name("selection method", self.method, NEEDS)
        return _import_function(self.method)

    def _needs(self) -> tuple[Need, ...]:
        function = self._function()
        if function is None:
            return NEEDS[cast(str, self.method)]
        declared = getattr(function, "needs", None)
        if declared is None:
            return ("attention:last", "keys", "hidden") if self.agg_layer > 0 else ("hidden",)
        is_list = isinstance(declared, tuple | list)
        names = get_args(Named)
        require(is_list, "needs", declared, f"a tuple of Attention(...), {', '.join(names)}")
        for need in declared:
            if not isinstance(need, Attention) and need not in names:
                raise unknown_name("entry of needs", need, names)
        return tuple(declared)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        keep = resolve_budget("kept_tokens", self.kept_tokens, evidence.total)
        function = self._function()
        if function is not None:
            return _checked(function(evidence, keep), evidence, keep, label_text(self.method))
        return self._named(evidence, keep)

    def _named(self, evidence: Evidence, keep: int) -> torch.Tensor:
        if self.method in ("uniform", "random"):
            return self._same_for_all(evidence, keep)
        if self.method == "norm":
            assert evidence.hidden is not None
            return top_k_ascending(evidence.hidden.float().norm(dim=-1), keep)
        if self.method == "similarity":
            assert evidence.keys is not None
            return top_k_ascending(-_mean_cosine(mean_over_heads(evidence.keys)), keep)
        assert evidence.attention is not None
        if self.method == "sampling":
            return sample_ascending(evidence.attention, keep, self.temperature, self.seed)
        return top_k_ascending(evidence.attention, keep)

    def _same_for_all(self, evidence: Evidence, keep: int) -> torch.Tensor:
        if self.method == "uniform":
            places = torch.tensor(uniform_places(evidence.count, keep))
        else:
            places = random_places(evidence.count, keep, self.seed)
        return places.to(evidence.places.device).expand(evidence.places.shape[0], keep)


_ACCEPTED = f"one of {', '.join(NEEDS)}, a function, or 'package.module:function'"


def _mean_cosine(metric: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each token with the others, ``(batch, n)``."""
    itself = unit_rows(metric).square().sum(dim=-1)
    return (redundancy(metric) - itself) / max(metric.shape[1] - 1, 1)


_NAMED: ContextVar[tuple[str, ...] | None] = ContextVar("named", default=None)


@contextmanager
def only_code_named_in(texts: Iterable[str]) -> Iterator[None]:
    """Inside, ``package.module:function`` is imported only where one of these texts holds it: a
    command line may name code to run, a file that came from somewhere may not."""
    before = _NAMED.set(tuple(texts))
    try:
        yield
    finally:
        _NAMED.reset(before)


def _import_function(name: str) -> Selection:
    named = _NAMED.get()
    if named is not None and not any(name in text for text in named):
        raise InputError(
            f"method={name!r} in a config file names code to run: --allow-code on the command line "
            "accepts that."
        )
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"method={name!r} cannot be imported ({error}): {_ACCEPTED} is accepted."
        raise InputError(message) from error
    require(callable(found), "method", name, "the name of a function, which this is not")
    return cast(Selection, found)


def _check_signature(function: Selection, name: object) -> None:
    """A function that cannot take ``(evidence, keep)`` is refused before a model is loaded."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables have none to inspect
        return
    try:
        signature.bind(None, 0)
    except TypeError as error:
        raise InputError(
            f"method={label_text(name)!r} is not valid: a function called as "
            f"function(evidence, keep), and this one takes {signature}."
        ) from error


def _checked(kept: object, evidence: Evidence, keep: int, name: str) -> torch.Tensor:
    """A user's answer, ascending, or an error that says what is wrong with it."""
    expected = f"an integer tensor of shape {(evidence.places.shape[0], keep)}"
    if not isinstance(kept, torch.Tensor):
        raise InputError(f"method={name!r} returned a {type(kept).__name__}, not {expected}.")
    if kept.is_floating_point() or kept.is_complex() or kept.dtype == torch.bool:
        raise InputError(f"method={name!r} returned dtype {kept.dtype}, not {expected}.")
    if tuple(kept.shape) != (evidence.places.shape[0], keep):
        raise InputError(f"method={name!r} returned shape {tuple(kept.shape)}, not {expected}.")
    kept = kept.to(evidence.places.device, torch.int64).sort(dim=1).values
    low, high = int(kept.min()), int(kept.max())
    if low < 0 or high >= evidence.count:
        raise InputError(
            f"method={name!r} returned places {low} ... {high}, accepted are "
            f"0 ... {evidence.count - 1}, the visual tokens present."
        )
    if bool((kept[:, 1:] == kept[:, :-1]).any()):
        raise InputError(f"method={name!r} returned a place twice: places must differ in a row.")
    return kept
