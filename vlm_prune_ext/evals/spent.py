"""Where the time of rows goes, for whoever watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vlm_prune_ext.evals.answer import Answer


@dataclass
class Spent:
    """Where the time of rows went, in seconds: ``read``, ``opened`` and ``tokenised`` in threads,
    added up over these; ``waited`` for them; ``asked`` the model, beside a GPU in a
    thread of its own, of that ``prefill`` and ``decode``; ``blocked`` until it had answered.
    ``batches``: when each ended, and its rows; ``fast``: rows on the fast path."""

    start: float = 0.0
    read: float = 0.0
    opened: float = 0.0
    tokenised: float = 0.0
    waited: float = 0.0
    asked: float = 0.0
    blocked: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    batches: list[tuple[float, int]] = field(default_factory=list)
    fast: int = 0
    failed: int = 0

    def note(self, outcomes: Sequence[Answer | None], ended: float = 0.0) -> None:
        """Take a batch and when it ended; ``None``: a row that failed."""
        answers = [one for one in outcomes if one is not None]
        self.failed += len(outcomes) - len(answers)
        self.prefill += sum(answer.prefill_seconds for answer in answers)
        self.decode += sum(answer.decode_seconds for answer in answers)
        self.fast += sum(answer.fast for answer in answers)
        if answers:
            self.batches.append((ended, len(answers)))


_watches: list[Spent] = []


def current() -> Spent:
    """What the time of a feeder that is made now is added to."""
    return _watches[-1] if _watches else Spent()


@contextmanager
def watched() -> Iterator[Spent]:
    """Add up where the time of feeders goes that are made inside."""
    spent = Spent()
    _watches.append(spent)
    try:
        yield spent
    finally:
        _watches.remove(spent)
