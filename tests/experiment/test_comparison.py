"""Tables of a sweep from its files: a folder is written by hand, with answers that are known."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from vlm_prune_ext.experiment.comparison import (
    category_table,
    long_table,
    pair_table,
    summary_table,
)
from vlm_prune_ext.experiment.grid import DONE, Cell, line_of
from vlm_prune_ext.experiment.log import Log
from vlm_prune_ext.experiment.metrics import bleu_words
from vlm_prune_ext.experiment.pareto import COSTS, curves, front
from vlm_prune_ext.experiment.published import published_table
from vlm_prune_ext.experiment.record import (
    Flops,
    LayerGroup,
    Record,
    Sample,
    SampleLog,
    Score,
    Seconds,
    Spread,
    places,
    ranges,
)
from vlm_prune_ext.experiment.results import LOG, Results, read
from vlm_prune_ext.experiment.show import latex
from vlm_prune_ext.experiment.statistics import holm

ROWS = 60
SENTENCE = "a red ring left of a blue cross {}"
SETTINGS = {  # label -> method, budget, share of rows right, mean TTFT in s
    "baseline": ("none", "", 0.9, 0.100),
    "fastv_rank64": ("fastv", "64", 0.8, 0.060),
    "visionzip_64": ("visionzip", "64", 0.75, 0.050),
    "downsample_keep64": ("downsample", "64", 0.5, 0.040),
    "random_keep64": ("random", "64", 0.5, 0.040),
    "random_keep64_seed1": ("random", "64", 0.6, 0.040),
}


def right(label: str) -> list[bool]:
    draw = random.Random(label)
    return [draw.random() < SETTINGS[label][2] for _ in range(ROWS)]


def write(folder: Path, data: str = "MME", captions: bool = False) -> Results:
    log, cells = Log(folder / LOG), []
    folder.mkdir()
    for label, (method, budget, _, ttft) in SETTINGS.items():
        seed = {"seed": int(label.endswith("seed1"))} if method == "random" else {}
        chosen = {"name": method, "parameters": {"budget": budget, **seed}}
        settings = {"model_path": "llava-v1.5-7b", "method": chosen, "data": [data]}
        stem = f"llava-{label}_{data}"
        (folder / stem).mkdir()
        truths = right(label)
        score = 100 * sum(truths) / ROWS
        said = [
            f"a red ring left of a blue cross {n}" if ok else "a" for n, ok in enumerate(truths)
        ]
        if captions:
            score = bleu_words(
                said, [[f"a red ring left of a blue cross {n}"] for n in range(ROWS)]
            )
        kept = 576.0 if method == "none" else 64.0
        record = Record(
            name=f"llava-{label}",
            dataset=data,
            model_path="llava-v1.5-7b",
            method=chosen,
            score=Score("Bleu_4" if captions else "Overall", score),
            scores={},
            samples=ROWS,
            failed=[],
            without_image=0,
            visual_tokens=[LayerGroup(0, 31, 576.0, kept)],
            flops=Flops(kept, 576.0, kept / 576.0, None, None, None),
            seconds=Seconds(Spread(ttft, ttft, ttft, ROWS), None, None, 0, 0.0),
            peak_memory_bytes=None,
            energy_joules=None,
            wall_seconds=1.0,
            config={},
            versions={},
            commit=None,
            hardware=[],
        )
        record.write(folder / stem / f"{stem}_results.json")
        samples = [Sample(n, text, visual_tokens=576) for n, text in enumerate(said)]
        SampleLog(folder / stem / f"{stem}_samples.jsonl").add(*samples)
        Log(folder / stem / f"{stem}_rows.jsonl").replace(
            {
                "index": str(n),
                "score": None if captions else float(ok),
                "question": f"question {n}",
                "answer": SENTENCE.format(n),
                "category": "even" if n % 2 == 0 else "odd",
                "options": {},
                "pictures": [],
            }
            for n, ok in enumerate(truths)
        )
        cell = Cell(settings, label=label)
        result = {"record": f"{stem}/{stem}_results.json"}
        log.append(asdict(line_of(cell, DONE, result=result)))
        cells.append({"key": cell.key, "cell": settings, "label": label, "budget": budget})
    log.append({"start": {"date": "", "settings": {}, "cells": cells}})
    return read(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write(tmp_path_factory.mktemp("comparison") / "sweep")


def by_label(results: Results) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in long_table(results).records()}


def test_intervals_and_tests_are_scipys(results: Results) -> None:
    rows, whole = by_label(results), right("baseline")
    tested = []
    for label in SETTINGS:
        mine, row = right(label), rows[label]
        want = binomtest(sum(mine), ROWS).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((100 * want.low, 100 * want.high))
        if label == "baseline":
            assert row["p"] is None and row["delta"] is None
            continue
        gained = sum(b and not a for a, b in zip(whole, mine, strict=True))
        lost = sum(a and not b for a, b in zip(whole, mine, strict=True))
        assert (row["gained"], row["lost"]) == (gained, lost)
        assert row["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
        assert row["delta"] == pytest.approx(100 * (gained - lost) / ROWS)
        assert row["delta_low"] < row["delta"] < row["delta_high"]
        tested.append(row)
    assert [row["p_holm"] for row in tested] == holm([row["p"] for row in tested])
    assert any(row["p_holm"] > row["p"] for row in tested)


def test_hard_rows_are_those_that_downsampling_gets_wrong(results: Results) -> None:
    rows, control = by_label(results), right("downsample_keep64")
    mine = [ok for ok, easy in zip(right("fastv_rank64"), control, strict=True) if not easy]
    assert rows["fastv_rank64"]["hard_rows"] == len(mine)
    assert rows["fastv_rank64"]["hard"] == pytest.approx(100 * sum(mine) / len(mine))
    assert rows["downsample_keep64"]["hard"] is None and rows["baseline"]["hard"] is None


def test_break_even(results: Results) -> None:
    """TTFT fell from 100 to 60 ms; a ninth of the FLOPs alone would take 11.1 ms."""
    row = by_label(results)["fastv_rank64"]
    assert row["saved_ms"] == pytest.approx(40)
    assert row["choosing_ms"] == pytest.approx(60 - 100 * 64 / 576)
    assert row["saved_flops"] == pytest.approx(100 - 100 * 64 / 576)
    assert row["saved_flops"] - row["break_even"] == pytest.approx(40)  # % of the time, too


def test_methods_against_each_other(results: Results) -> None:
    found = {(row["first"], row["second"]): row for row in pair_table(results).records()}
    assert ("random_keep64", "random_keep64_seed1") not in found  # two draws are one method
    row = found["fastv_rank64", "visionzip_64"]
    first, second = right("fastv_rank64"), right("visionzip_64")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    assert row["gained"] == gained and row["points"] == pytest.approx(
        100 * (sum(second) - sum(first)) / ROWS
    )
    values = [row["p"] for row in found.values()]
    assert [row["p_holm"] for row in found.values()] == holm(values) and len(found) == 9


def test_categories_and_seeds(results: Results) -> None:
    found = {(row["method"], row["category"]): row for row in category_table(results).records()}
    mine = right("fastv_rank64")[::2]
    assert found["fastv_rank64", "even"]["rows"] == 30
    assert found["fastv_rank64", "even"]["right"] == pytest.approx(100 * sum(mine) / 30)
    rows = {row["setting"]: row for row in summary_table(results).records()}
    scores = [100 * sum(right(f"random_keep64{end}")) / ROWS for end in ("", "_seed1")]
    spread = abs(scores[0] - scores[1]) / 2**0.5
    assert rows["random_keep64"]["MME"] == f"{sum(scores) / 2:.1f} ± {spread:.1f}"
    assert "random_keep64_seed1" not in rows and len(rows) == 5


def test_ours_beside_theirs(results: Results) -> None:
    """MME at 64 tokens stands in three sources for VisionZip."""
    rows = [r for r in published_table(results).records() if r["method"] == "visionzip"]
    assert {(row["theirs"], row["tokens"]) for row in rows} == {(1690, 64), (1693, 64)}
    mine = 100 * sum(right("visionzip_64")) / ROWS
    assert all(row["ours"] == pytest.approx(mine) for row in rows)
    assert rows[0]["theirs, % of unpruned"] == pytest.approx(100 * 1690 / 1862)


def test_captions_are_bootstrapped_by_their_own_score(tmp_path: Path) -> None:
    results = write(tmp_path / "sweep", "Shapes_Caption", captions=True)
    rows = by_label(results)
    for label in list(SETTINGS)[1:]:
        row = rows[label]
        assert row["p"] is None and row["right"] is None
        assert row["delta"] == pytest.approx(row["score"] - rows["baseline"]["score"])
        assert row["delta_low"] < row["delta"] < row["delta_high"]


def test_pareto(results: Results) -> None:
    lines = {line.name: line for line in curves(results, "MME", COSTS[0])}
    score = 100 * sum(right("fastv_rank64")) / ROWS
    whole = 100 * sum(right("baseline")) / ROWS
    assert lines["fastv"].points == [(64.0, score), (576.0, whole)]
    assert lines["fastv"].low is not None and lines["fastv"].low[0] < score
    assert front([(1, 5), (2, 4), (3, 7), (3, 6), (4, 7)]) == [(1, 5), (3, 7)]


def test_latex_prints_what_stands_there(results: Results) -> None:
    text = latex(summary_table(results))
    assert r"\toprule" in text and r"fastv\_rank64" in text and r"$\pm$" in text
    assert text.count(r"\\") == 6  # the heading and a row per setting


def test_places_in_short() -> None:
    for some in ([], [3], [0, 1, 2, 7], [1, 3, 4, 5, 9, 10]):
        assert places(ranges(some)) == some
    assert ranges([0, 1, 2, 7]) == "0-2,7"
