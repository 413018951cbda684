"""From the log to what reports show: flat rows, questions, notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_prune_ext.profiling.log import DONE, FAILED, Line


@dataclass(frozen=True)
class Question:
    """One question of the study: what does this axis do?

    Attributes:
        axis: name of a cell's field.
        title: of its table.
        column: heading of its values.
    """

    axis: str
    title: str
    column: str


QUESTIONS = (
    Question("img_size", "Image size", "image"),
    Question("batch_size", "Batch size", "batch"),
    Question("max_input_len", "Prompt length", "text limit"),
    Question("optimization", "Optimisation", "optimisation"),
    Question("cached", "KV cache", "KV cache"),
    Question("method", "Pruning budget", "pruning"),
    Question("device", "Device", "device"),
)


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        name: heading.
        digits: behind the point.
        note: what it is, for the legend.
    """

    name: str
    digits: int
    note: str


FIGURES = (
    Column("visual", 0, "visual tokens of the prompt, mean per example"),
    Column("kept", 0, "of these, held by a decoder layer, mean over layers"),
    Column("text", 1, "text tokens, template included, padding not"),
    Column("width", 0, "positions of the prompt that are computed, padding included"),
    Column("new", 1, "generated tokens"),
    Column("latency ms", 1, "of a batch, median"),
    Column("p10", 1, "of the latency"),
    Column("p90", 1, "of the latency"),
    Column("vision ms", 1, "vision tower and projector, median of runs of their own"),
    Column("prefill ms", 1, "the rest until the first new token"),
    Column("decode ms", 1, "behind the first new token, median"),
    Column("ms/token", 2, "of decoding, per step of the batch"),
    Column("examples/s", 2, "batch size over latency"),
    Column("score", 1, "see the column beside it, in percent"),
    Column("scored by", 0, "vqa: VQA accuracy; accuracy: exact match; bleu4: BLEU-4"),
    Column("WER", 2, "word error rate, 1 is as many errors as reference words"),
    Column("J/example", 2, "energy; empty where nothing counts it"),
    Column("GFLOP", 3, "per example until the first new token, counted by torch"),
    Column("GFLOP analytic", 3, "the same by formula"),
    Column("peak GiB", 2, "memory: tensors on a GPU, the process on a CPU"),
)


@dataclass(frozen=True)
class Row:
    """A cell as a table shows it.

    Attributes:
        line: from the log.
        figures: name of a column -> value; ``None`` where there is none.
    """

    line: Line
    figures: dict[str, Any]

    def setting(self, axis: str) -> Any:
        """The value of an axis, as it sorts."""
        return self.line.label if axis == "method" else self.line.cell[axis]

    def shown(self, axis: str) -> str:
        """The value of an axis, as it reads."""
        value = self.setting(axis)
        if axis == "cached":
            return "yes" if value else "no"
        if axis == "optimization":
            precision = (self.line.result or {}).get("precision", "")
            return value if precision in value or not value else f"{value} ({precision})"
        if axis in ("img_size", "max_input_len"):
            return "as is" if value is None else str(value)
        return str(value)


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """Cells that are done."""
    return [Row(line, _figures(line)) for line in lines if line.status == DONE]


def failures_of(lines: Iterable[Line]) -> list[Line]:
    """Cells that failed."""
    return [line for line in lines if line.status == FAILED]


def _figures(line: Line) -> dict[str, Any]:
    result = line.result or {}
    latency, tokens, flops = result["latency"], result["tokens"], result["flops"]
    quality, total = result["quality"], result["latency"]["total"]
    return {
        "visual": tokens["visual"],
        "kept": tokens["visual_kept"],
        "text": tokens["text"],
        "width": tokens["width"],
        "new": tokens["new"],
        "latency ms": _times(total["median"], 1e3),
        "p10": _times(total["p10"], 1e3),
        "p90": _times(total["p90"], 1e3),
        "vision ms": _times(latency["vision"], 1e3),
        "prefill ms": _times(latency["prefill"], 1e3),
        "decode ms": _times(latency["decode"]["median"], 1e3),
        "ms/token": _times(latency["per_token"], 1e3),
        "examples/s": result["examples_per_second"],
        "J/example": result["energy"]["counted"],
        "GFLOP": _times(_sum(flops["vision"], flops["prefill"]), 1e-9),
        "GFLOP analytic": _times(_sum(flops["analytic_vision"], flops["analytic_prefill"]), 1e-9),
        "peak GiB": result["peak_memory"] / 2**30,
        "WER": quality["wer"],
        "score": quality["value"],
        "scored by": quality["name"],
    }


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def cell_text(column: Column, value: Any) -> str:
    """A figure as a table shows it; empty where there is none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.{column.digits}f}"


def varying(rows: Sequence[Row]) -> list[Question]:
    """Axes with several values among these rows."""
    return [q for q in QUESTIONS if len({repr(row.setting(q.axis)) for row in rows}) > 1]


def answer_to(question: Question, rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in this axis (and in the method) only.

    Of the groups of cells that share everything else, the one with the most values of the axis is
    taken; of equals, the first. The pruning budget is answered for every optimisation: what it
    saves depends on that most.
    """
    free = {question.axis, "method"}
    best = max(_alike(rows, free), key=lambda group: _values(question, group), default=[])
    if question.axis == "method" and best:
        inside = _but(best[0], free | {"optimization"})
        near = [row for row in rows if _but(row, free | {"optimization"}) == inside]
        groups = [group for group in _alike(near, free) if _values(question, group) > 1]
        best = [row for group in groups for row in group]
        return sorted(best, key=lambda r: (order(r, "optimization")[:2], order(r, "method")))
    return sorted(best, key=lambda row: order(row, question.axis))


def _but(row: Row, axes: set[str]) -> str:
    """A cell without some of its axes."""
    return repr({k: v for k, v in row.line.cell.items() if k not in axes})


def _alike(rows: Sequence[Row], free: set[str]) -> list[list[Row]]:
    """Groups of rows that share everything but some axes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_but(row, free), []).append(row)
    return list(groups.values())


def _values(question: Question, group: Sequence[Row]) -> int:
    return len({repr(row.setting(question.axis)) for row in group})


def order(row: Row, axis: str) -> tuple[Any, ...]:
    """Rows by the value of an axis (true before false), then from most visual tokens to fewest."""
    value = row.setting(axis)
    if isinstance(value, bool):  # what people run first
        value = not value
    number = value if isinstance(value, int | float) else float("inf")
    last = (-row.figures["kept"], row.line.label)
    return last if axis == "method" else (number, str(value), *last)


def held_fixed(question: Question, rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """What the other axes are in a question's table, where they vary elsewhere."""
    if not rows:
        return ""
    said = [
        f"{other.column} {rows[0].shown(other.axis)}"
        for other in varying(all_rows)
        if other.axis not in (question.axis, "method") and other not in varying(rows)
    ]
    return ", ".join(said)


def image_note(rows: Sequence[Row]) -> str:
    """What a model made of pictures of several sizes."""
    sizes = {row.setting("img_size") for row in rows}
    shapes = {tuple((row.line.result or {})["tokens"]["pixels"][1:]) for row in rows}
    if len(sizes) < 2 or len(shapes) != 1:
        return ""
    shape = next(iter(shapes))
    if len(shape) < 3:
        return ""
    return (
        f"This model's processor resizes every picture to {shape[-1]} x {shape[-2]} pixels itself, "
        "so the size in front of it changes neither the visual tokens nor their cost."
    )


def energy_note(rows: Sequence[Row]) -> str:
    """How energy was measured, or that nothing counts it."""
    if all(row.figures["J/example"] is None for row in rows):
        return "No energy counter could be read on this hardware, so energy is left empty."
    found = {row.line.host.get("idle_watts") for row in rows}
    watts = sorted(value for value in found if value is not None)
    idle = f" Idle power: {', '.join(f'{value:.0f} W' for value in watts)}." if watts else ""
    return f"Energy is that of the hardware's counter, idle power included.{idle}"


def hosts_of(lines: Sequence[Line]) -> list[str]:
    """Sentences about hardware and software, each different one once."""
    said: dict[str, list[str]] = {}
    for line in lines:
        host = line.host
        hardware, versions = host["hardware"], host["versions"]
        where = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s)"
        if "gpu" in hardware:
            where = f"{hardware['gpu']} ({hardware['gpu_memory_gib']} GiB), {where}"
        names = ("python", "torch", "transformers", "vlm-prune-ext", "bitsandbytes")
        software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        commit = f", commit {_short(host['commit'])}" if host.get("commit") else ""
        said.setdefault(f"{where}; {software}{commit}", []).append(host["date"][:10])
    return [f"{text} ({_dates(dates)})" for text, dates in said.items()]


def _short(commit: str) -> str:
    head, dash, state = commit.partition("-")
    return head[:12] + dash + state


def _dates(dates: list[str]) -> str:
    first, last = min(dates), max(dates)
    return first if first == last else f"{first} to {last}"


def shared_settings(rows: Sequence[Row]) -> str:
    """Samples, repeats and the like, where all cells share them."""
    names = ("samples", "repeat", "warmup", "max_new_tokens", "seed")
    said = []
    for name in names:
        values = sorted({row.line.cell[name] for row in rows})
        said.append(f"{name.replace('_', ' ')} {' / '.join(map(str, values))}")
    return ", ".join(said)
