"""Many rows through VLMEvalKit's loop: memory does not grow with them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

pytest.importorskip("vlmeval")

import vlm_prune_ext as vp
from tests import makers, vlmeval_files
from tests.faults import FULL
from vlm_prune_ext.evals.vlmeval_run import Models, run_dataset
from vlm_prune_ext.experiment.settings import Settings


def test_many_rows_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMEvalKit's loop over a table whose rows refer to a few pictures, on a tiny model."""
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count, start = (10_000, 1_000) if FULL else (400, 100)
    rows, table = vlmeval_files.mcq_rows(8), []
    for place in range(count):
        image = rows[place]["image"] if place < 8 else str(place % 8)
        table.append({**rows[place % 8], "index": place, "image": image})
    vlmeval_files.write(tmp_path, "Long", table)
    settings = Settings(
        model_path=str(makers.tiny_original(tmp_path / "model", layers=2)),
        method=vp.RandomDrop(keep=4),
        max_new_tokens=1,
        mode="infer",
        work_dir=str(tmp_path / "out"),
        data=("Long",),
        device="cpu",
    )
    sizes: list[int] = []
    record = run_dataset(
        settings,
        "Long",
        Models(settings),
        lambda: sizes.append(psutil.Process().memory_info().rss),
    )
    assert record is not None and record.samples == count and not record.failed
    print(f"resident after {start} rows {sizes[start]}, after {count} {sizes[-1]} bytes")
    assert sizes[-1] < sizes[start] * 1.01
