"""Which methods a sweep compares: as they were asked for, at budgets, with controls and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import read_value
from vlm_prune_ext.methods.base import Budget, Method
from vlm_prune_ext.methods.registry import method_class, parse_method, standard_method

BY = ("tokens", "mean", "flops")
"""What ``--budget-by`` knows, see :mod:`vlm_prune_ext.experiment.budgets`."""

CONTROLS = ("random", "downsample")
"""What any selection has to beat (arXiv 2510.07143)."""

Solve = Callable[[type[Method], Budget], Method]
"""A class and a budget -> the method that meets it."""


@dataclass(frozen=True)
class Choice:
    """A method that was asked for.

    Attributes:
        text: as it was asked for.
        method: it; ``None`` is the baseline.
        why: why there is no such method (the text's budget is none that it can have).
        budget: the budget among those that are swept, as a text; empty: it has one of its own.
    """

    text: str
    method: Method | None
    why: str = ""
    budget: str = ""


def choices_of(
    names: Sequence[str],
    budgets: Sequence[str] = (),
    *,
    controls: bool = False,
    seeds: Sequence[int] = (),
    solve: Solve | None = None,
) -> list[Choice]:
    """Methods at budgets.

    Args:
        names: short forms; one that states no parameters is taken at each of ``budgets``, if it
            has a keep budget, else as published.
        budgets: counts or ratios, as texts.
        controls: whether :data:`CONTROLS` come along at each budget, stated ones included.
        seeds: of methods that draw lots, one choice each; empty: as they are.
        solve: sets a method's budget; ``None``: as its short form means it.

    Raises:
        InputError: unknown names, each with the near one, before anything else is looked at.
    """
    check_names(names)
    found: dict[str, Choice] = {}

    def add(choice: Choice) -> None:
        for one in _at_seeds(choice, seeds):
            key = repr(one.method) if not one.why else one.text
            found.setdefault(key, one)

    for name in names:
        for choice in _at_budgets(name, budgets, solve):
            add(choice)
    stated = [choice.budget for choice in found.values() if choice.budget]
    for budget in dict.fromkeys([*budgets, *stated]) if controls else ():
        for name in CONTROLS:
            add(_choice(name, budget, solve if budget in budgets else None))
    return list(found.values())


def check_names(names: Sequence[str]) -> None:
    """Refuse short forms of methods that are not there, all of them in one go.

    Raises:
        InputError: a sentence for each.
    """
    wrong = []
    for name in names:
        try:
            method_class(name.partition(":")[0].strip())
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(dict.fromkeys(wrong)))


def _at_budgets(name: str, budgets: Sequence[str], solve: Solve | None) -> list[Choice]:
    cls = method_class(name.partition(":")[0].strip())
    if ":" in name:
        own = name.partition(":")[2].strip()
        is_budget = has_keep_budget(cls) and _number(own) is not None
        return [Choice(name, parse_method(name), budget=own if is_budget else "")]
    if budgets and has_keep_budget(cls):
        return [_choice(name, budget, solve) for budget in budgets]
    return [Choice(name, standard_method(name))]


def _choice(name: str, budget: str, solve: Solve | None) -> Choice:
    text = f"{name}:{budget}"
    try:
        if solve is None:
            return Choice(text, parse_method(text), budget=budget)
        cls, value = method_class(name), _number(budget)
        if cls is None or value is None:
            raise InputError(f"--budget {budget!r} is not valid: visual tokens, or a ratio.")
        return Choice(text, solve(cls, value), budget=budget)
    except InputError as error:
        return Choice(text, None, str(error), budget)


def _number(text: str) -> Any:
    value = read_value(text)
    return value if type(value) in (int, float) else None


def _at_seeds(choice: Choice, seeds: Sequence[int]) -> list[Choice]:
    method: Any = choice.method
    if method is None or not seeds or "seed" in choice.text or not draws_lots(method):
        return [choice]
    return [replace(choice, method=replace(method, seed=seed)) for seed in seeds]


def draws_lots(method: Method) -> bool:
    """Whether what a method keeps depends on a seed."""
    return "seed" in method.options() and getattr(method, "method", "random") in (
        "random",
        "sampling",
    )


def has_keep_budget(cls: type[Method] | None) -> bool:
    """Whether a method's short form states how much stays (VTW's states a layer, SAINT's a
    threshold: in a sweep these run once, as published)."""
    if cls is None:
        return False
    own = cls.budget_settings.__func__ is not Method.budget_settings.__func__  # type: ignore[attr-defined]
    return own or cls.budget_field in cls.budgets()
