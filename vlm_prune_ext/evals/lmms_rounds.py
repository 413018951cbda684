"""Samples answered in several rounds, where the task makes the next question of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from vlm_prune_ext.evals.decoding import Decoding
from vlm_prune_ext.evals.lmms_requests import Prompt, Source

MakePrompt: TypeAlias = "Callable[[], Prompt]"


@dataclass(frozen=True)
class Step:
    """What a task says to the answers so far.

    Attributes:
        prompt: makes the next prompt; ``None``: it was the last round.
        answers: the answers as the task wants them kept; ``None``: as they are.
        info: what the task wants to be handed back.
    """

    prompt: MakePrompt | None
    answers: Sequence[str] | None = None
    info: Any = None


Follow: TypeAlias = "Callable[[int, list[str], Any], Step]"
"""``follow(round, answers, info)``: what comes after ``round`` rounds."""


@dataclass
class Talk:
    """One sample on its way through the rounds.

    Attributes:
        source: where it comes from.
        decoding: how each round is answered.
        prompt: makes the prompt of the round to come.
        follow: asks the task what comes next.
        answers: one per round.
        over: whether the task has ended it.
    """

    source: Source
    decoding: Decoding
    prompt: MakePrompt
    follow: Follow
    answers: list[str] = field(default_factory=list)
    over: bool = False
    _rounds: int = 0
    _info: Any = None

    def advance(self, answer: str) -> None:
        """Take the answer of this round and ask the task for the next. A task that fails here
        fails the run: its code, not the sample, decides what comes next."""
        self.answers.append(answer)
        self._rounds += 1
        step = self.follow(self._rounds, list(self.answers), self._info)
        self._info = step.info
        if step.answers is not None:
            self.answers = [str(one) for one in step.answers]
        if step.prompt is None:
            self.over = True
        else:
            self.prompt = step.prompt
