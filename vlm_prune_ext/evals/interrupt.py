"""SIGTERM, which schedulers end a job with, taken as Ctrl-C is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises ``KeyboardInterrupt``.

    Not to be used around code that forks workers and ends them with SIGTERM (VLMEvalKit's scoring
    does): they would inherit the handler, and one that hangs in a lock would not end.
    """

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
