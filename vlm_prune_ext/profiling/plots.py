"""Plots of a profile, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_prune_ext.profiling.rows import Question, Row

_PARTS = (("vision ms", "vision", "#4c78a8"), ("prefill ms", "prefill", "#f58518"))
_DECODE = ("decode ms", "decode", "#54a24b")


def draw(question: Question, rows: Sequence[Row], path: Path) -> None:
    """Draw what an axis does: latency in parts, arithmetic or energy, and the score.

    Args:
        question: the axis.
        rows: of its table, in order.
        path: of the PNG.
    """
    if question.axis == "method":
        _draw_budgets(rows, path)
    else:
        _draw_bars(question, rows, path)


def _figure(panels: int, height: float = 3.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(4.6 * panels, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _has_energy(rows: Sequence[Row]) -> bool:
    return any(row.figures["J/example"] is not None for row in rows)


def _draw_bars(question: Question, rows: Sequence[Row], path: Path) -> None:
    several = len({row.line.label for row in rows}) > 1
    names = [_name(question, row, several) for row in rows]
    cost = "J/example" if _has_energy(rows) else "GFLOP"
    figure, axes = _figure(3, max(2.4, 0.9 + 0.32 * len(rows)))
    left = [0.0] * len(rows)
    for column, label, colour in (*_PARTS, _DECODE):
        values = [row.figures[column] or 0.0 for row in rows]
        axes[0].barh(names, values, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes[0].set_xlabel("ms per batch (median)")
    axes[0].legend(fontsize=7)
    _bars(axes[1], names, [row.figures[cost] for row in rows], _cost_label(cost))
    _bars(axes[2], names, [row.figures["score"] for row in rows], _score_label(rows))
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    figure.suptitle(question.title, fontsize=11)
    _save(figure, path)


def _name(question: Question, row: Row, several: bool) -> str:
    value = f"{question.column} {row.shown(question.axis) or 'default'}"
    return f"{value}, {row.line.label}" if several else value


def _bars(axis: Any, names: list[str], values: list[float | None], label: str) -> None:
    axis.barh(names, [value or 0.0 for value in values], color="#9d9da1")
    axis.set_xlabel(label)


def _cost_label(name: str) -> str:
    return "joules per example" if name == "J/example" else "GFLOP per example until first token"


def _score_label(rows: Sequence[Row]) -> str:
    return f"{'/'.join(sorted({row.figures['scored by'] for row in rows}))}, %"


def _budget_lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> rows: a line for each method and optimisation, the baseline at its end."""
    optimizations = dict.fromkeys(row.shown("optimization") for row in rows)
    methods = dict.fromkeys(row.line.cell["method"]["name"] for row in rows)
    lines = {}
    for optimization in optimizations:
        for method in [name for name in methods if name != "none"] or methods:
            name = f"{optimization or 'default'}, {method}" if len(optimizations) > 1 else method
            own = [
                row
                for row in rows
                if row.shown("optimization") == optimization
                and row.line.cell["method"]["name"] in (method, "none")
            ]
            if any(row.line.cell["method"]["name"] == method for row in own):
                lines[name] = own
    return lines


def _draw_budgets(rows: Sequence[Row], path: Path) -> None:
    """Everything against the visual tokens that decoder layers hold on average."""
    columns = [("latency ms", "ms per batch"), ("GFLOP", _cost_label("GFLOP"))]
    if _has_energy(rows):
        columns.insert(1, ("J/example", _cost_label("J/example")))
    columns.append(("score", _score_label(rows)))
    figure, axes = _figure(len(columns))
    lines = _budget_lines(rows)
    for axis, (column, label) in zip(axes, columns, strict=True):
        for name, own in lines.items():
            points = sorted(
                (row.figures["kept"], row.figures[column])
                for row in own
                if row.figures[column] is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axis.set_xlabel("visual tokens held, mean over layers")
        axis.set_ylabel(label)
        axis.set_ylim(0, axis.get_ylim()[1])  # with the margin above that plot leaves
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("Pruning budget", fontsize=11)
    _save(figure, path)
