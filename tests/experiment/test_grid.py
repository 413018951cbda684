"""The grid runner: every cell once, models loaded once, and no worker's end is the grid's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import DONE, FAILED, Cell, Held, Line, product, read_lines, run
from vlm_prune_ext.experiment.log import Log

ROOT = Path(__file__).parents[2]


def cells(*groups: str, each: int = 3) -> list[Cell]:
    return [Cell({"group": g, "n": n}, g, f"{g}{n}") for n in range(each) for g in groups]


class Job:
    """Counts what it loads and does in files, so that other processes can be asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held = Held(self.load)

    def load(self, name: str) -> str:
        self.note("loaded", name)
        if name == "broken":
            raise InputError("model 'broken' is not there: others are accepted.")
        return name

    def note(self, kind: str, what: str) -> None:
        with (self.folder / kind).open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def __call__(self, cell: Cell) -> dict[str, Any]:
        model = self.held(cell.group)
        self.note("did", cell.label)
        if cell.settings.get("deadly") and not (self.folder / "died").exists():
            if cell.settings["deadly"] == "once":
                (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.settings.get("wrong"):
            raise RuntimeError("no\nsuch luck")
        return {"answer": f"{model}!", "host": {"pid": os.getpid()}}


def noted(folder: Path, kind: str) -> list[str]:
    path = folder / kind
    return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("workers", [0, 2])
def test_each_cell_once_each_model_once_per_process(tmp_path: Path, workers: int) -> None:
    todo = sorted(cells("a", "b"), key=lambda cell: cell.group)
    lines = list(run(todo, Job, (tmp_path,), workers=workers))
    assert sorted(noted(tmp_path, "did")) == sorted(cell.label for cell in todo)
    assert {line.label: line.result for line in lines} == {
        cell.label: {"answer": f"{cell.group}!"} for cell in todo
    }
    assert len(noted(tmp_path, "loaded")) <= 2 * max(1, workers)
    if not workers:
        assert noted(tmp_path, "loaded") == ["a", "b"]
        assert [line.label for line in lines] == [cell.label for cell in todo]


def test_a_worker_gets_cells_of_the_model_it_holds(tmp_path: Path) -> None:
    list(run(cells("a", "b", each=4), Job, (tmp_path,), workers=1))
    assert noted(tmp_path, "loaded") == ["a", "b"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cell_that_fails_fails_alone(tmp_path: Path, workers: int) -> None:
    todo = [Cell({"n": 0, "wrong": True}, "a"), Cell({"n": 1}, "a"), *cells("broken", each=2)]
    lines = list(run(todo, Job, (tmp_path,), workers=workers))
    assert [line.status for line in lines] == [FAILED, DONE, FAILED, FAILED]
    assert lines[0].why == "RuntimeError: no"
    assert lines[2].why == "model 'broken' is not there: others are accepted."
    assert noted(tmp_path, "loaded").count("broken") == 1


def test_a_worker_that_dies_costs_its_cell_a_retry(tmp_path: Path) -> None:
    todo = [*cells("a"), Cell({"deadly": "once"}, "a", "x")]
    lines = list(run(todo, Job, (tmp_path,), workers=2))
    assert {line.status for line in lines} == {DONE}
    assert noted(tmp_path, "did").count("x") == 2
    (tmp_path / "died").unlink()
    lines = list(
        run([Cell({"deadly": "always"}, "a", "y"), *cells("a")], Job, (tmp_path,), workers=1)
    )
    by_label = {line.label: line for line in lines}
    assert by_label["y"].status == FAILED and "signal 9" in str(by_label["y"].why)
    assert sum(line.status == DONE for line in lines) == 3


def test_what_the_log_has_is_not_done_again(tmp_path: Path) -> None:
    log = Log(tmp_path / "cells.jsonl")
    todo = cells("a", each=4)
    first = run(todo, Job, (tmp_path,), log=log)
    kept = [next(first), next(first)]
    first.close()
    log.append({"key": "of another command"})
    again = list(run(todo, Job, (tmp_path,), log=log))
    assert again[:2] == kept
    assert sorted(noted(tmp_path, "did")) == sorted(cell.label for cell in todo)
    assert list(read_lines(log).values()) == again
    assert all(isinstance(line, Line) and line.host["date"] for line in again)


def test_failed_cells_are_tried_again_by_the_next_start(tmp_path: Path) -> None:
    log = Log(tmp_path / "cells.jsonl")
    bad = [Cell({"wrong": True}, "a", "bad")]
    for _ in range(2):
        list(run(bad, Job, (tmp_path,), log=log))
    assert noted(tmp_path, "did") == ["bad", "bad"]
    assert len(read_lines(log)) == 1


PARENT = """
import sys
from pathlib import Path
from tests.experiment.test_grid import Slow, cells
from vlm_prune_ext.experiment.grid import run
if __name__ == "__main__":
    list(run(cells("a", each=50), Slow, (Path(sys.argv[1]),), workers=1))
"""


class Slow(Job):
    def __call__(self, cell: Cell) -> dict[str, Any]:
        self.note("did", cell.label)
        time.sleep(0.2)
        return {}


def test_workers_end_with_the_first_process(tmp_path: Path) -> None:
    """Killed with -9, it cannot tell them; they notice, also in the middle of a cell."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    while not noted(tmp_path, "did"):
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1.0)
    count = len(noted(tmp_path, "did"))
    time.sleep(1.0)
    assert len(noted(tmp_path, "did")) == count < 50


def test_product_varies_the_last_axis_first() -> None:
    assert list(product({"a": [1, 2], "b": "xy"})) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_keys_differ_where_settings_do() -> None:
    assert Cell({"a": 1, "b": None}).key == Cell({"b": None, "a": 1}, "other", "name").key
    assert len({Cell({"a": value}).key for value in (1, 1.5, "1", None, True, [1])}) == 6
