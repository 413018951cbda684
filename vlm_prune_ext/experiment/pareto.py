"""Pareto plots: score against what it costs, a panel per data set, a line per method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_prune_ext.experiment.comparison import Rows, by_setting, mean_of
from vlm_prune_ext.experiment.report import Line, line_plot
from vlm_prune_ext.experiment.results import Results, Run


@dataclass(frozen=True)
class Cost:
    """What a plot's x axis shows.

    Attributes:
        name: in the file's name; empty: the main plot.
        label: of the axis.
        of: its value for a run; ``None``: not known.
        log: whether the axis is logarithmic.
    """

    name: str
    label: str
    of: Callable[[Run], float | None]
    log: bool = False


def _tokens(run: Run) -> float | None:
    return run.record.mean_visual_tokens or None if run.record else None


def _flops(run: Run) -> float | None:
    return run.record.flops.ratio if run.record and run.record.flops else None


def _ttft(run: Run) -> float | None:
    spread = run.record.seconds.prefill if run.record else None
    return 1e3 * spread.median if spread else None


def _joules(run: Run) -> float | None:
    one = run.record
    return one.energy_joules / one.samples if one and one.energy_joules and one.samples else None


COSTS = (
    Cost("", "visual tokens, mean over decoder layers", _tokens, log=True),
    Cost("flops", "FLOPs of the prefill over unpruned", _flops),
    Cost("ttft", "time to first token, ms", _ttft),
    Cost("joules", "joules per row", _joules),
)


def draw(
    results: Results, stem: Path, formats: Sequence[str], titles: Mapping[str, str] | None = None
) -> list[Path]:
    """Draw all plots that there are figures for.

    Args:
        results: of a sweep.
        stem: path without ending: ``DIR/sweep`` gives ``sweep.png``, ``sweep_flops.png``...
        formats: ``png``, ``pdf``.
        titles: data set -> title of its panel.

    Returns:
        the files.
    """
    written = []
    for cost in COSTS:
        panels = {
            (titles or {}).get(data, data): lines
            for data in results.data
            if (lines := curves(results, data, cost))
        }
        for ending in formats if panels else ():
            path = stem.with_name(f"{stem.name}{'_' if cost.name else ''}{cost.name}.{ending}")
            ticks = _powers(panels) if cost.log else None
            x = cost.label
            line_plot(panels, path, x=x, y="score", log_x=cost.log, ticks=ticks, share_y=False)
            written.append(path)
    return written


def _powers(panels: Mapping[str, Sequence[Line]]) -> list[float]:
    """Powers of two between the least and the most of an axis."""
    xs = [x for lines in panels.values() for line in lines for x, _ in line.points]
    low, high = math.ceil(math.log2(min(xs))), math.floor(math.log2(max(xs)))
    return [2.0**power for power in range(low, high + 1)]


@dataclass(frozen=True)
class Point:
    """A setting on a data set.

    Attributes:
        runs: one, or one per seed.
        score: mean over them.
        low, high: ends of its error bar.
        costs: name of a :class:`Cost` -> mean over the runs; those that are known.
    """

    runs: Sequence[Run]
    score: float
    low: float
    high: float
    costs: Mapping[str, float]


def points(results: Results, data: str) -> list[Point]:
    """Settings that have a score on a data set, in order."""
    found = []
    for runs in by_setting(run for run in results.done if run.data == data):
        scores = [run.record.score.value for run in runs if run.record and run.record.score]
        if not scores:
            continue
        known = {c.name: [v for run in runs if (v := c.of(run)) is not None] for c in COSTS}
        costs = {name: mean_of(values) for name, values in known.items() if values}
        score = mean_of(scores)
        found.append(Point(runs, score, *_ends(runs, score), costs))
    return found


def curves(results: Results, data: str, cost: Cost) -> list[Line]:
    """A panel's lines: each method from the unpruned model on, with 95 % intervals, and which
    settings no other beats in both."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    several = len(results.models) > 1
    for point in points(results, data):
        if cost.name in point.costs:
            run = point.runs[0]
            name = f"{Path(run.model).name} {run.method}" if several else run.method
            place = (point.costs[cost.name], point.score, point.low, point.high)
            lines.setdefault(name, []).append(place)
    names = [name for name in lines if not name.endswith("none")]
    found = []
    for number, name in enumerate(names):
        whole = lines.get(f"{name.rpartition(' ')[0]} none" if several else "none", [])
        mine = sorted([*lines[name], *whole])
        xs_ys = [(x, y) for x, y, _, _ in mine]
        low, high = [p[2] for p in mine], [p[3] for p in mine]
        found.append(Line(name, xs_ys, color=number, low=low, high=high, bars=True))
    every = [(x, y) for own in lines.values() for x, y, _, _ in own]
    if len(every) > 2:
        found.append(Line("no other is better", front(every), ":", color=7))
    return found or [Line("none", every)] if every else []


def _ends(runs: Sequence[Run], score: float) -> tuple[float, float]:
    """Ends of the error bar: the rows' interval, where the score is their mean, or the spread of
    seeds; else none."""
    rows = Rows(runs[0].scores)
    interval = rows.interval() if rows.right is not None and len(runs) == 1 else None
    if interval is not None and rows.right is not None and abs(rows.right - score) < 0.1:
        return interval.low, interval.high
    scores = [run.record.score.value for run in runs if run.record and run.record.score]
    return min(scores), max(scores)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: none is as cheap and scores more."""
    best, found = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            found.append((x, y))
    return found
