"""Answers that are made when they are asked for, in the order of requests.

lmms-eval's response cache writes each answer down as it takes it from the sequence that a model
returns. A list would be complete before the first is written, and an interrupted run would lose
all of it; this sequence loses what was made ahead of the answer that was taken last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class LazyAnswers(Sequence[T], Generic[T]):
    """A sequence as long as its requests, whose entries are made on demand.

    Args:
        length: requests.
        made: places and their answers, in the order in which they are made.
        twins: place -> another place whose answer it shares (and which is made instead).
    """

    def __init__(
        self, length: int, made: Iterator[tuple[int, T]], twins: dict[int, int] | None = None
    ) -> None:
        self._length, self._made, self._twins = length, made, twins or {}
        self._answers: dict[int, T] = {}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(self._length)[place]
        if isinstance(places, range):
            return [self[one] for one in places]
        places = self._twins.get(places, places)
        while places not in self._answers:
            made, answer = next(self._made)
            self._answers[made] = answer
        if len(self._answers) == self._length - len(self._twins):
            for _ in self._made:  # what is to be done behind the last one
                pass
        return self._answers[places]
