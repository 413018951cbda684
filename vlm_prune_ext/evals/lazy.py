"""Answers that are computed a batch at a time, when they are asked for, in the order of requests.

lmms-eval's response cache writes each answer down as it takes it from the sequence that a model
returns. A list would be complete before the first is written, and an interrupted run would lose
all of it; this sequence loses the batch at work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class LazyAnswers(Sequence[T], Generic[T]):
    """A sequence as long as its requests, whose entries are made in batches on demand.

    Args:
        keys: one per request; only requests with equal keys may share a batch.
        size: requests per batch, at most.
        compute: places of one batch -> their answers, in that order.
        twins: place -> an earlier place whose answer it shares (and which is computed instead).
        done: called once, when the last answer has been made.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        size: int,
        compute: Callable[[list[int]], Iterable[T]],
        twins: dict[int, int] | None = None,
        done: Callable[[], Any] | None = None,
    ) -> None:
        self._keys, self._size, self._compute = keys, size, compute
        self._twins, self._done = twins or {}, done
        self._answers: dict[int, T] = {}
        self._left = len(keys) - len(self._twins)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[one] for one in places]
        places = self._twins.get(places, places)
        if places not in self._answers:
            self._make(places)
        return self._answers[places]

    def _make(self, first: int) -> None:
        batch = self._batch_from(first)
        self._answers.update(zip(batch, self._compute(batch), strict=True))
        self._left -= len(batch)
        if not self._left and self._done is not None:
            self._done()

    def _batch_from(self, first: int) -> list[int]:
        """``first``, and the next open requests that may go with it."""
        key, batch = self._keys[first], []
        for place in range(first, len(self)):
            if self._keys[place] == key and place not in self._twins:
                if place not in self._answers:
                    batch.append(place)
                if len(batch) == self._size:
                    break
        return batch
