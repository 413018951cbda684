"""A sweep's folder, written by the classes that sweeps write theirs with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_prune_ext.experiment.grid import DONE, SKIPPED, Cell, line_of
from vlm_prune_ext.experiment.log import Log
from vlm_prune_ext.experiment.record import (
    Flops,
    LayerGroup,
    Record,
    Sample,
    SampleLog,
    Score,
    Seconds,
    Spread,
    ranges,
)
from vlm_prune_ext.experiment.results import LOG

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
QUESTIONS = ("How many shapes are there?", f"What is {EVIL}?", "Which colour is the star?")
SETTINGS = (("none", "", 576), ("fastv", "fastv_rank64", 64), ("fastv", "fastv_rank192", 192))
SETTINGS += (("random", "random_keep64", 64),)
RIGHT = {"baseline": (1, 1, 1), "fastv_rank64": (1, 1, 0), "fastv_rank192": (1, 1, 1)}
RIGHT |= {"random_keep64": (0, 1, 0)}


def write_folder(
    folder: Path, data: Sequence[str] = ("Set_A", "Set_B"), rows: int = 3, evil: bool = True
) -> Path:
    """A sweep of four settings on some data sets, and a cell that was skipped."""
    pictures = [_picture(folder / f"picture_{n}.png", n) for n in range(3)]
    log = Log(folder / LOG)
    cells, lines = [], []
    for name in data:
        for method, setting, left in SETTINGS:
            label = setting or "baseline"
            cell = Cell(_settings(method, left, name), label=label)
            stem = f"demo-{label}_{name}"
            (folder / stem).mkdir()
            right = [RIGHT[label][n % 3] for n in range(rows)]
            _record(method, label, name, left, right).write(folder / stem / f"{stem}_results.json")
            SampleLog(folder / stem / f"{stem}_samples.jsonl").add(
                *(_sample(n, method, left, ok, evil) for n, ok in enumerate(right))
            )
            Log(folder / stem / f"{stem}_rows.jsonl").append(
                *(_row(n, ok, pictures[n % 3]) for n, ok in enumerate(right))
            )
            result = {"record": f"{stem}/{stem}_results.json", "metrics": {}}
            lines.append(vars(line_of(cell, DONE, result=result)))
            budget = "" if method == "none" else str(left)
            plain = {"cell": dict(cell.settings), "label": label, "budget": budget}
            cells.append({"key": cell.key, **plain})
    skipped = Cell({**_settings("vtw", 0, data[0]), "asked": "vtw"}, label="vtw")
    cells.append({"key": skipped.key, "cell": dict(skipped.settings), "label": "vtw"})
    lines.append(vars(line_of(skipped, SKIPPED, why=f"no such layer {EVIL}")))
    settings = {"method": ["fastv", "random"], "data": list(data), "note": EVIL}
    log.append({"start": {"date": "2026-11-27T00:00:00", "settings": settings, "cells": cells}})
    log.append(*lines)
    return folder


def _picture(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((336, 336), Image.Resampling.NEAREST).save(path)
    return str(path)


def _settings(method: str, left: int, data: str) -> dict:
    parameters = {} if method == "none" else {"budget": left}
    return {
        "model_path": None,
        "method": {"name": method, "parameters": parameters},
        "data": [data],
    }


def _record(method: str, label: str, data: str, left: int, right: Sequence[int]) -> Record:
    share = left / 576
    spread = Spread(0.1 + share / 10, 0.1 + share / 10, 0.2, len(right), 0.1)
    groups = [LayerGroup(0, 2, 576, 576), LayerGroup(3, 11, 576, left)]
    return Record(
        name=f"demo-{label}",
        dataset=data,
        model_path="demo",
        method={"name": method},
        score=Score("Overall", 100 * sum(right) / len(right), 5.0),
        scores={},
        samples=len(right),
        failed=[],
        without_image=0,
        visual_tokens=groups,
        flops=Flops(5e9 * (0.2 + share), 6e9, 0.2 + 0.8 * share, None, None, None),
        seconds=Seconds(spread, spread, 0.01, 1, 0.0),
        peak_memory_bytes=1 << 30,
        energy_joules=None,
        wall_seconds=1.0,
        config={"model_path": None, "checkpoint": "x", "label": label},
        versions={"torch": "2"},
        commit=None,
        hardware=[{"cpu": "a processor"}],
    )


def _sample(number: int, method: str, left: int, right: int, evil: bool) -> Sample:
    places = range(number, 576, 576 // left)[:left]
    return Sample(
        index=number,
        prediction="yes" if right else f"no {EVIL if evil else ''}".strip(),
        visual_tokens=576,
        visual_kept={"0": 576} if method == "none" else {"0": 576, "3": left},
        lengths=[600] * 12,
        kept={} if method == "none" else {"3": ranges(places)},
    )


def _row(number: int, right: int, picture: str) -> dict:
    return {
        "index": str(number),
        "score": float(right),
        "question": QUESTIONS[number % 3] if number < 3 else f"Question {number}?",
        "answer": "yes",
        "category": ("count", "colour")[number % 2],
        "options": {},
        "pictures": [picture],
    }
