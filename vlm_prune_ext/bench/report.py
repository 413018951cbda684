"""The bench's figures as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm_prune_ext.bench.cases import Cell
from vlm_prune_ext.errors import InputError

ENDINGS = ("json", "md", "png")
COLUMNS = (
    "batch",
    "way",
    "method",
    "FLOPs ratio",
    "visual FLOPs",
    "prefill ms",
    "time ratio",
    "time/FLOPs",
    "floor ms",
    "first token ms",
    "decode ms",
    "decode floor ms",
    "samples/s",
    "long/s",
    "new length/s",
    "peak GiB",
    "J/sample",
    "same kept",
)


def unpruned(cells: Sequence[Cell], cell: Cell) -> Cell | None:
    """The baseline of the same way and batch; for hooks also transformers' own."""
    ways = (cell.way, "hf") if cell.way == "ordinary" else (cell.way,)
    for way in ways:
        for other in cells:
            if other.way == way and other.method == "none" and other.batch == cell.batch:
                return other
    return None


def table(cells: Sequence[Cell], title: str) -> Table:
    """One row a cell."""
    made = Table(title=title, title_justify="left")
    for column in COLUMNS:
        side = "left" if column in ("way", "method") else "right"
        made.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for before, cell in zip([None, *cells], cells, strict=False):
        if before is not None and before.batch != cell.batch:
            made.add_section()
        made.add_row(*row(cells, cell))
    return made


def row(cells: Sequence[Cell], cell: Cell) -> list[str]:
    """A cell as text, in the order of :data:`COLUMNS`."""
    base = unpruned(cells, cell)
    ratio = cell.prefill.median / base.prefill.median if base is not None else None
    return [
        str(cell.batch),
        cell.way,
        cell.method,
        f"{cell.flops_ratio:.3f}",
        _number(cell.flops_ratio_visual, 3),
        _milliseconds(cell.prefill.median),
        _number(ratio, 3),
        _number(ratio / cell.flops_ratio if ratio is not None else None, 3),
        _milliseconds(cell.prefill_floor),
        _milliseconds(cell.first_token.median if cell.first_token else None),
        _milliseconds(cell.decode),
        _milliseconds(cell.decode_floor),
        _number(cell.samples_per_second, 2),
        _number(cell.long_samples_per_second, 2),
        _number(cell.unseen_samples_per_second, 2),
        _number(cell.peak_bytes / 2**30 if cell.peak_bytes else None, 2),
        _number(cell.joules, 2),
        _number(cell.same_kept, 4),
    ]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(cells: Sequence[Cell], header: dict[str, Any]) -> str:
    """The table for a README, between what it is of and what its columns are."""
    lines = [header["title"], ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(cells, cell)) + " |" for cell in cells]
    return "\n".join([*lines, "", legend(header), ""])


def legend(header: dict[str, Any]) -> str:
    """What the columns are."""
    ceilings = header["ceilings"]
    return (
        f"Ceilings: {ceilings['flops'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']}), "
        f"{ceilings['bytes'] / 1e12:.3g} TB/s. FLOPs: of the prefill, text included, over the "
        "unpruned one; visual FLOPs: of its layers over visual tokens alone, as papers state it; "
        "a rule's own arithmetic is in neither; time: "
        "the same, over the unpruned row of the same way (of hf, where hooks have none). "
        f"samples/s: answers of one token; long/s: of {header['new_tokens']}; new length/s: these, "
        "to prompts of a length not seen before. decode: per token and batch. Medians."
    )


def put_aside(folder: Path) -> str:
    """Rename what an earlier bench left. Returns the new name, empty if there was nothing."""
    names = [f"bench.{ending}" for ending in ENDINGS]
    if not any((folder / name).exists() for name in names):
        return ""
    number = 1
    while any((folder / f"bench-{number}.{ending}").exists() for ending in ENDINGS):
        number += 1
    for name, ending in zip(names, ENDINGS, strict=True):
        if (folder / name).exists():
            (folder / name).rename(folder / f"bench-{number}.{ending}")
    return f"bench-{number}.*"


def write(cells: Sequence[Cell], header: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` and ``bench.png``.

    Raises:
        InputError: the folder cannot be written.
    """
    data = {**header, "cells": [asdict(cell) for cell in cells]}
    paths = [folder / f"bench.{ending}" for ending in ENDINGS]
    try:
        paths[0].write_text(json.dumps(data, indent=2) + "\n", "utf-8")
        paths[1].write_text(markdown(cells, header), "utf-8")
        draw(cells, header["title"], paths[2])
    except OSError as error:
        raise InputError(f"--out {str(folder)!r} cannot be written ({error.strerror}).") from error
    return paths


def draw(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Prefill per sample: a bar a cell, its arithmetic floor as a line, a panel a batch size."""
    from matplotlib.figure import Figure

    batches = sorted({cell.batch for cell in cells})
    rows = max(sum(cell.batch == batch for cell in cells) for batch in batches)
    size = (3.4 + 2.4 * len(batches), 1.4 + 0.24 * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    shown: list[str] = []
    for axes, batch in zip(panels, batches, strict=True):
        mine = [cell for cell in cells if cell.batch == batch]
        places = range(len(mine))
        values = [1000 * cell.prefill.median / batch for cell in mine]
        floors = [1000 * cell.prefill_floor / batch for cell in mine]
        axes.barh(places, values, color="tab:blue", alpha=0.75)
        axes.plot(floors, places, "|", color="black", ms=11, mew=2, label="arithmetic floor")
        labels = [f"{cell.way}  {cell.method}" for cell in mine]
        axes.set_yticks(places, labels if labels != shown else [""] * len(labels), fontsize=7)
        shown = labels  # the same rows as to the left need no names
        axes.invert_yaxis()
        axes.set_title(f"batch {batch}", fontsize=9)
        axes.set_xlabel("prefill, ms per sample", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)
