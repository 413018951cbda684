"""What commands print: rich tables and bars on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

# Without a terminal, one line of progress at most this often (seconds).
_PLAIN_PERIOD = 30.0


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on standard output; the last column may be long text."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells)
    else:
        print(plain_table(columns, cells))


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, no line broken: easy to grep and cut."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", ratio=1 if index == len(columns) - 1 else None)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
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
