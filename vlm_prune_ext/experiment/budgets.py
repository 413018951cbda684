"""Budgets that mean the same for all methods.

Papers call different things a budget: what is left behind the last drop, the mean over layers, or
the FLOPs that remain. Here a method's own budget field is set so that one of these is met as near
as the method can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.flops import DecoderShape, planned_lengths
from vlm_prune_ext.methods.base import REGISTERED, Budget, Method

TOLERANCE = 0.1
"""How far, over what was asked for, a method may be from it at its nearest."""

_RATIOS = 200


@dataclass(frozen=True)
class Prompt:
    """What budgets are worked out for.

    Attributes:
        shape: of the decoder.
        visual: visual tokens of a picture.
        fixed: whether all pictures have so many; else budgets are ratios.
    """

    shape: DecoderShape
    visual: int
    fixed: bool = True


def measure(method: Method, by: str, prompt: Prompt) -> float:
    """What a method leaves of a picture.

    Args:
        method: what prunes.
        by: ``"tokens"``, those that enter the last layer; ``"mean"`` over layers of those that
            enter each; ``"flops"`` of the layers over the visual tokens, over the same unpruned.
        prompt: what it works on.

    Raises:
        InputError: it depends on the picture.
    """
    layers = prompt.shape.layers
    lengths = planned_lengths(method, layers, 0, [prompt.visual])
    if by == "tokens":
        return float(lengths[-1])
    if by == "mean":
        return fmean(lengths)
    return prompt.shape.stack_flops(lengths) / _whole(prompt)


def _whole(prompt: Prompt) -> float:
    return prompt.shape.stack_flops([prompt.visual] * prompt.shape.layers)


def wanted(budget: Budget, by: str, prompt: Prompt) -> float:
    """A budget as :func:`measure` states it. A ratio is of the visual tokens, or of the FLOPs; a
    count, with FLOPs, stands for those of so many tokens in every layer."""
    if by == "flops":
        if isinstance(budget, float):
            return budget
        return prompt.shape.stack_flops([budget] * prompt.shape.layers) / _whole(prompt)
    return budget * prompt.visual if isinstance(budget, float) else float(budget)


def solve(cls: type[Method], budget: Budget, by: str, prompt: Prompt) -> Method:
    """The method with the budget of its own that comes nearest to a budget; of two as near, the
    smaller.

    Raises:
        InputError: its counts depend on the picture, or its nearest is more than
            :data:`TOLERANCE` away.
    """
    goal = wanted(budget, by, prompt)
    found = _every(cls.name, by, prompt)
    method, met = min(found, key=lambda found: abs(found[1] - goal))
    if abs(met - goal) > TOLERANCE * goal:
        raise InputError(
            f"{by}={budget} is not possible for {cls.name} (its budget {cls.budget_field}): the "
            f"nearest that it can have is {met:.4g}, asked for is {goal:.4g}."
        )
    return method


@lru_cache(maxsize=256)
def _every(name: str, by: str, prompt: Prompt) -> list[tuple[Method, float]]:
    found, cls = [], REGISTERED[name]
    for own in _budgets(prompt):
        try:
            method = cls.from_settings({**cls.standard, **cls.budget_settings(own)})
        except InputError:  # not each number is a budget of each method
            continue
        found.append((method, measure(method, by, prompt)))
    if not found:
        raise InputError(f"{cls.name} has no budget that could be worked out.")
    return found


def _budgets(prompt: Prompt) -> Iterator[Any]:
    if prompt.fixed:
        yield from range(1, prompt.visual + 1)
    else:
        yield from (n / _RATIOS for n in range(1, _RATIOS + 1))
