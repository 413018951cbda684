"""How far a sweep is, from what its files say."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass

from vlm_prune_ext.experiment.grid import DONE, FAILED, SKIPPED
from vlm_prune_ext.experiment.log import LOCK
from vlm_prune_ext.experiment.results import RUNNING, Results


@dataclass(frozen=True)
class Status:
    """Where a sweep stands.

    Attributes:
        counts: status -> cells.
        running: cells under way, in words.
        rows: answered by this start's cells, those under way included.
        seconds: since the last start.
        rate: rows per second since then; ``None``: nothing was answered.
        left: seconds until all cells are done; ``None``: not known.
        alive: whether a process works on it.
    """

    counts: dict[str, int]
    running: list[str]
    rows: int
    seconds: float
    rate: float | None
    left: float | None
    alive: bool

    def text(self) -> str:
        """In words."""
        total = sum(self.counts.values())
        ended = sum(self.counts.get(status, 0) for status in (DONE, FAILED, SKIPPED))
        said = [f"{self.counts.get(DONE, 0)} of {total} cells done"]
        said += [f"{self.counts[s]} {s}" for s in (FAILED, SKIPPED) if self.counts.get(s)]
        said.append(f"{self.rows} rows")
        if self.alive:
            said += [f"running: {'; '.join(self.running)}"] if self.running else []
            said += [f"{self.rate:.1f} rows/s"] if self.rate is not None else []
            said += [f"{self.left:.0f} s left"] if self.left is not None else []
        elif ended < total:
            said.append("stopped: the same command goes on")
        return ", ".join(said) + "."


def status_of(results: Results, now: datetime.datetime) -> Status:
    """Where a sweep stands.

    Args:
        results: as read.
        now: time of day, with its zone.
    """
    counts = Counter(run.status for run in results.runs)
    running = [run for run in results.runs if run.status == RUNNING]
    start = datetime.datetime.fromisoformat(results.started) if results.started else now
    seconds = max((now - start).total_seconds(), 1e-9)
    mine = [r for r in results.done if _date(r.line.host.get("date", "")) >= start]
    rows = sum(r.record.samples for r in mine if r.record) + sum(len(r.answers) for r in running)
    ended = len(mine) + sum(r.status == FAILED for r in results.runs)
    waiting = sum(run.status not in (DONE, FAILED, SKIPPED) for run in results.runs)
    return Status(
        counts=dict(counts),
        running=[f"{r.setting}, {r.data} ({len(r.answers)} rows)" for r in running],
        rows=rows,
        seconds=seconds,
        rate=rows / seconds if rows else None,
        left=seconds / ended * waiting if ended else None,
        alive=_locked(results),
    )


def _date(text: str) -> datetime.datetime:
    if not text:
        return datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)
    return datetime.datetime.fromisoformat(text)


def _locked(results: Results) -> bool:
    """Whether a process holds the folder."""
    import fcntl

    path = results.folder / LOCK
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False
