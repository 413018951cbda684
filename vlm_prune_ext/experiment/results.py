"""What a folder of results holds: settings, records, and every row of every setting.

Tables, plots and pages are made of this alone, so they can be made again at any time, from a copy
of the folder or while a sweep is still at work::

    results = read(Path("outputs_sweep"))
    for run in results.done:
        print(run.setting, run.record.dataset, run.record.score)
        for answer in run.answers.values():
            print(results.questions(run.data)[answer.index].question, answer.prediction)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import DONE, Line, read_lines
from vlm_prune_ext.experiment.log import Log
from vlm_prune_ext.experiment.record import Record, Sample, SampleLog, places, read_record

LOG = "sweep.jsonl"
"""What a sweep did: a line ``{"start": ...}`` for each start, with its cells; a line for each cell
that came to an end; and a line ``{"running": [keys]}`` whenever other cells are under way."""

WAITING, RUNNING = "waiting", "running"


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        index: of the row.
        question, hint, answer: texts; empty where there is none.
        options: letter -> text, of multiple choice.
        category: of the row; empty where the data set has none.
        pictures: files, as they were when it was asked; they may be gone.
    """

    index: str
    question: str = ""
    hint: str = ""
    answer: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    category: str = ""
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class RowAnswer:
    """What one setting said to one row.

    Attributes:
        index: of the row.
        prediction: the answer.
        score: in [0, 1]; ``None`` where rows have none (captions), or it failed.
        failed: why there is no answer; ``None``: there is.
        visual_tokens: of the prompt, before anything was dropped.
        kept: decoder layer -> visual tokens that enter it, numbered as they entered layer 0; empty
            where that was not logged or nothing is dropped there.
        patches: tower layer (-1: behind the tower) -> patches that stay, in raster order of the
            first tile's grid.
        sample: all that the log has.
    """

    index: str
    prediction: str
    score: float | None
    failed: str | None
    visual_tokens: int
    kept: Mapping[int, list[int]]
    patches: Mapping[int, list[int]]
    sample: Sample


@dataclass(frozen=True, eq=False)
class Run:
    """One model with one method on one data set.

    Attributes:
        line: what the sweep's log says about it.
        folder: of its files; of the sweep where it has none.
        record: its record; ``None`` where it is not done.
        budget: as it was asked for; empty where the method ran as published or as stated.
        group: the same for runs that differ in the seed alone.
        name: of the data set.
    """

    line: Line
    folder: Path
    record: Record | None
    budget: str = ""
    group: str = ""
    name: str = ""

    @property
    def status(self) -> str:
        """``done``, ``failed``, ``skipped``, ``running`` or ``waiting``."""
        return self.line.status

    @property
    def model(self) -> str:
        """The checkpoint, as it was asked for."""
        return str(self.line.cell.get("model_path") or "demo")

    @property
    def method(self) -> str:
        """The method's registry name; ``none`` is the baseline."""
        return str(self.line.cell["method"]["name"])

    @property
    def data(self) -> str:
        """The data set, by its name in records."""
        return self.name or str(self.line.cell["data"][0])

    @property
    def setting(self) -> str:
        """Method and parameters in short, as in file names."""
        return self.line.label

    @cached_property
    def _stem(self) -> str:
        return self.folder.name

    @cached_property
    def asked(self) -> dict[str, tuple[Question, float | None]]:
        """Index -> what was asked, and how the answer was scored. Empty where the run was made by a
        version that did not write it."""
        found = {}
        for row in Log(self.folder / f"{self._stem}_rows.jsonl").read():
            texts = {k: row[k] for k in ("question", "hint", "answer", "category") if k in row}
            question = Question(
                row["index"], options=row["options"], pictures=row["pictures"], **texts
            )
            found[row["index"]] = (question, row["score"])
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """Index -> score in [0, 1], of rows that have one."""
        return {index: score for index, (_, score) in self.asked.items() if score is not None}

    @cached_property
    def answers(self) -> dict[str, RowAnswer]:
        """Index -> answer; the last one given to a row."""
        logs = sorted(self.folder.glob(f"{self._stem}_samples*.jsonl"))  # of each process, and all
        samples = [sample for path in logs for sample in SampleLog(path).samples()[0]]
        return {str(one.index): self._answer(one) for one in samples}

    def _answer(self, sample: Sample) -> RowAnswer:
        index = str(sample.index)
        return RowAnswer(
            index,
            sample.prediction,
            None if sample.failed else self.scores.get(index),
            sample.failed,
            sample.visual_tokens,
            {int(layer): places(text) for layer, text in sample.kept.items()},
            {int(layer): places(text) for layer, text in sample.patches.items()},
            sample,
        )


@dataclass(frozen=True)
class Results:
    """All runs of a folder.

    Attributes:
        folder: it.
        settings: of the last start, by the names of the command's options.
        runs: of the last start's plan, in its order.
        started: when the last start was, ISO 8601; empty: not known.
    """

    folder: Path
    settings: Mapping[str, Any]
    runs: Sequence[Run]
    started: str = ""

    @property
    def done(self) -> list[Run]:
        """Runs that have a record."""
        return [run for run in self.runs if run.record is not None]

    @property
    def data(self) -> list[str]:
        """Data sets, in order."""
        return list(dict.fromkeys(run.data for run in self.runs))

    @property
    def models(self) -> list[str]:
        """Checkpoints, in order."""
        return list(dict.fromkeys(run.model for run in self.runs))

    def baseline(self, run: Run) -> Run | None:
        """The unpruned run of the same model on the same data."""
        same = (r for r in self.done if (r.model, r.data) == (run.model, run.data))
        return next((r for r in same if r.method == "none"), None)

    def questions(self, data: str) -> dict[str, Question]:
        """Index -> what the rows of a data set ask."""
        runs = (run for run in self.done if run.data == data and run.asked)
        found = next(runs, None)
        return {} if found is None else {i: question for i, (question, _) in found.asked.items()}


def read(folder: Path) -> Results:
    """Read a sweep's folder, done or under way.

    Raises:
        InputError: there is no sweep's log in it.
    """
    log = Log(folder / LOG)
    entries = log.read()
    if not entries:
        raise InputError(
            f"{str(folder)!r} has no {LOG}: the folder that `vlm-prune sweep --out` names is "
            "accepted."
        )
    start: dict[str, Any] = next((e["start"] for e in reversed(entries) if "start" in e), {})
    lines = read_lines(log)
    running: list[str] = next((e["running"] for e in reversed(entries) if "running" in e), [])
    runs = []
    for cell in start.get("cells") or [_planned(line) for line in lines.values()]:
        line = lines.get(cell["key"]) or Line(
            cell["key"], cell["cell"], cell["label"], RUNNING if cell["key"] in running else WAITING
        )
        runs.append(_run(folder, line, cell))
    return Results(folder, start.get("settings", {}), runs, start.get("date", ""))


def _planned(line: Line) -> dict[str, Any]:
    return {"key": line.key, "cell": line.cell, "label": line.label}


def _run(folder: Path, line: Line, cell: Mapping[str, Any]) -> Run:
    path = folder / line.result["record"] if line.status == DONE and line.result else None
    record = read_record(path) if path is not None else None
    method = line.cell["method"]
    parameters = {k: v for k, v in method.get("parameters", {}).items() if k != "seed"}
    group = json.dumps([line.cell.get("model_path"), method["name"], parameters], sort_keys=True)
    where = path.parent if path is not None else folder / cell.get("folder", "")
    name = record.dataset if record is not None else cell.get("data", "")
    return Run(line, where, record, cell.get("budget", ""), group, name)
