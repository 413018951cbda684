"""What a study prints while it runs: banners, one line at start and end of a run, a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from vlm_prune_ext.ablation.files import metric_names
from vlm_prune_ext.ablation.messages import Messages
from vlm_prune_ext.experiment.metrics import METRICS

WIDTH = 78
LISTED = 20
"""Skipped rows that are listed one by one."""
_PLAIN_PERIOD = 30.0  # seconds between lines of progress where there is no terminal
_POLL = 0.2


class Console:
    """Prints to standard output; progress goes to standard error.

    Args:
        language: see :class:`Messages`.
    """

    def __init__(self, language: str = "en") -> None:
        self.text = Messages(language)

    # -- lines -----------------------------------------------------------------------------------
    def say(self, line: str = "") -> None:
        """Print a line, whatever the terminal's encoding can show of it."""
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), flush=True)

    def banner(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """A title and facts under it, between two rules."""
        self.say("=" * WIDTH)
        self.say(title)
        for name, value in facts:
            self.say(f"  {name}: {value}")
        self.say("=" * WIDTH)

    def starts(self, place: str, name: str, done: int, rows: int) -> None:
        """A run starts; ``done`` of its rows are there."""
        self.say()
        self.say(f"{place} {self.text('starts', name=name, time=clock())}")
        if done:
            self.say(f"  {self.text('known', done=done, rows=rows)}")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """The lines of a finished run's scores."""
        for name in metric_names():
            value, title = record["metrics"].get(name), METRICS[name].title
            if value is None:
                reason = record["missing"].get(name, "?")
                self.say(f"  {self.text('missing', metric=title, reason=reason)}")
                continue
            raw = record["raw"].get(name)
            self.say(f"  {title:8} {value:.4f}" + (f" ({raw:.2f})" if raw is not None else ""))
        peak = gib(record["peak_memory_bytes"])
        seconds = record["seconds_per_sample"]
        self.say(f"  {self.text('per_sample', seconds=seconds, peak=peak)}")
        memory = record.get("gpu_memory")
        if memory:
            before, after = (", ".join(map(gib, memory[key].values())) for key in memory)
            self.say(f"  {self.text('gpu', before=before, after=after)}")
        if record["failed_rows"]:
            self.say(f"  {self.text('rows_failed', count=len(record['failed_rows']))}")

    # -- progress --------------------------------------------------------------------------------
    def watch(
        self, name: str, done: int, rows: int, count: Callable[[], int], ended: Callable[[], bool]
    ) -> None:
        """Show how far a run is until its process has ended.

        Args:
            name: of the run.
            done: rows that were there at its start.
            rows: all.
            count: rows that are there now.
            ended: whether its process has.
        """
        if sys.stderr.isatty():
            self._watch_bar(name, done, rows, count, ended)
            return
        start = last = time.monotonic()
        while not ended():
            time.sleep(_POLL)
            now = time.monotonic()
            if now - last >= _PLAIN_PERIOD:
                last, here = now, count()
                left = seconds_left(now - start, here - done, rows - here)
                line = self.text("left", name=name, done=here, rows=rows, left=left)
                print(line, file=sys.stderr, flush=True)

    def _watch_bar(
        self, name: str, done: int, rows: int, count: Callable[[], int], ended: Callable[[], bool]
    ) -> None:
        from rich.console import Console as Terminal
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
        with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=rows, completed=done)
            while not ended():
                time.sleep(_POLL)
                bar.update(task, completed=count())


def clock() -> str:
    """The time of day."""
    return datetime.now().strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    """``45 s``, ``3:20`` (minutes) or ``2:05:00`` (hours)."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_left(spent: float, done: int, rest: int) -> str:
    """Time left at the pace so far; ``?`` before anything is done."""
    return duration(spent / done * rest) if done > 0 else "?"


def gib(size: int | None) -> str:
    """Bytes in GiB."""
    return "?" if size is None else f"{size / 2**30:.2f} GiB"
