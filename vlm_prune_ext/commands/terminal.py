"""What commands print: rich tables and bars on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from vlm_prune_ext.experiment.report import Column, Table, bars

Item = TypeVar("Item")

# Without a terminal, one line of progress at most this often (seconds).
_PLAIN_PERIOD = 30.0


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of texts on standard output; the last column may be long."""
    made = Table([Column(name, left=True) for name in columns])
    made.rows.extend([list(map(str, row)) for row in rows])
    made.show()


def track(
    items: Iterable[Item], title: str, *, done: int = 0, total: int | None = None
) -> Iterator[Item]:
    """Go through ``items`` with progress and time left on standard error.

    Args:
        items: what is to do.
        title: what is being done.
        done: how many more were done before this start, counted in what is shown.
        total: of both; ``None``: as many as ``items`` and ``done``.
    """
    if total is None:
        items = list(items)
        total = done + len(items)
    show = _track_rich if sys.stderr.isatty() else _track_plain
    yield from show(items, title, done, total)


def _track_rich(items: Iterable[Item], title: str, done: int, total: int) -> Iterator[Item]:
    with bars() as progress:
        task = progress.add_task(title, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _track_plain(items: Iterable[Item], title: str, done: int, total: int) -> Iterator[Item]:
    start = last = time.monotonic()
    for index, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - last < _PLAIN_PERIOD and index < total:
            continue
        last = now
        left = (now - start) / (index - done) * (total - index)
        print(f"{title}: {index} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
