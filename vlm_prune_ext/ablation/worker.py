"""One run, in a process of its own: it loads one model, answers what is not answered yet, and
appends each batch to the predictions. When it ends, all its memory is free, however it ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.log import put_aside, write_json, write_whole
from vlm_prune_ext.experiment.record import Sample, SampleLog
from vlm_prune_ext.experiment.report import say

if TYPE_CHECKING:
    from vlm_prune_ext.evals.examples import Example


# -- files ---------------------------------------------------------------------------------------
_OF_A_RUN = {
    "log": "logs/{}.log",
    "result": "logs/{}.result.json",
    "lines": "{}_predictions.jsonl",
    "predictions": "{}_predictions.csv",
    "metrics": "{}_metrics.json",
}


@dataclass(frozen=True)
class Folder:
    """The output folder of a study: ``all_models_summary.json`` (all runs, failed ones too),
    ``comparison.*`` (finished runs, ranked), ``runs.jsonl`` (the log: a line for each run that came
    to its end, with its record), and the files of each run."""

    path: Path

    @property
    def logs(self) -> Path:
        """What processes printed."""
        return self.path / "logs"

    def of(self, name: str, what: str) -> Path:
        """A file of a run: ``log`` (what its process printed), ``result`` (how that ended),
        ``lines`` (predictions as they come), ``predictions`` (the same beside references) or
        ``metrics`` (scores of a finished run)."""
        return self.path / _OF_A_RUN[what].format(name)

    def put_aside(self, name: str) -> None:
        """Move what a run left into ``previous``, or ``previous-2`` and so on: nothing is lost."""
        parts = ("lines", "predictions", "metrics")
        put_aside(self.path, [self.of(name, part) for part in parts])

    def open(self) -> None:
        """Make it.

        Raises:
            InputError: it cannot be made or written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.logs):
                write_whole(folder / ".written", "")
                (folder / ".written").unlink()
        except (OSError, InputError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"--output-dir {str(self.path)!r} cannot be written ({why}): a folder that can be "
                "made or written is accepted."
            ) from error


class Lines(SampleLog):
    """Predictions of a run, under what decides them."""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start anew."""
        self.replace([{"settings": settings}])

    def settings(self) -> dict[str, Any] | None:
        """What decides them; ``None``: there is no such file, or it is of something else."""
        found = [entry["settings"] for entry in self.read() if "settings" in entry]
        return dict(found[-1]) if found and isinstance(found[-1], dict) else None

    def rows(self) -> dict[int, Sample]:
        """By index; of a row that failed and was asked again, the last line counts."""
        return {int(sample.index): sample for sample in self.samples()[0]}

    def answered(self) -> set[int]:
        """Rows that need not be asked again."""
        return {index for index, sample in self.rows().items() if sample.failed is None}


# -- work ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """What all runs of a study share.

    Attributes:
        folder: where predictions go.
        rows: all of the data set.
        batch_size, max_new_tokens: of ``generate``.
        load: further arguments of :func:`vlm_prune_ext.load`.
        devices: one for each process at a time; empty: as found.
    """

    folder: Folder
    rows: Sequence[Example]
    batch_size: int = 2
    max_new_tokens: int = 64
    load: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ()


class EveryRowFailed(InputError):
    """No row of the first batch could be answered: neither could the others."""


def make_job(work: Work) -> grid.Job:
    """What does a run: a cell with its ``name``, the ``source`` of its model, and its method as it
    was ``asked`` for."""

    def job(cell: grid.Cell) -> dict[str, Any]:
        own, alone = cell.settings, multiprocessing.parent_process() is not None
        if alone:  # what this process prints is the run's own log
            file = work.folder.of(own["name"], "log").open("a", buffering=1)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
        try:
            result = run(work, own["source"], own["asked"], own["name"])
        except InputError:
            if alone:
                traceback.print_exc()  # into the run's log; people are told one sentence
            raise
        write_json(work.folder.of(own["name"], "result"), result)
        return result

    return job


def run(work: Work, source: str, method: str, name: str) -> dict[str, Any]:
    """Load the model and answer; returns what the metrics file says about it."""
    import torch
    from transformers.utils import logging as transformers_logging

    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.experiment.host import commit, hardware, versions
    from vlm_prune_ext.experiment.measure import peak_memory
    from vlm_prune_ext.methods.registry import parse_method
    from vlm_prune_ext.models import load

    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    start = time.perf_counter()
    given = dict(work.load)
    if work.devices:
        given["device"] = work.devices[grid.slot() % len(work.devices)]
    model, processor = load(source, **given)
    answerer = Answerer(model.eval(), processor, parse_method(method))
    loaded = time.perf_counter()
    logging.getLogger("vlm_prune_ext").info("loaded in %.1f s", loaded - start)
    lines = Lines(work.folder.of(name, "lines"))
    for samples in answer(work, answerer, lines):
        lines.add(*samples)
    device = processor.device
    return {
        "load_seconds": loaded - start,
        "answer_seconds": time.perf_counter() - loaded,
        "largest_batch": answerer.largest or work.batch_size,
        "peak_memory_bytes": peak_memory(device),
        "dtype": str(processor.dtype).removeprefix("torch."),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
    }


def answer(work: Work, answerer: Any, lines: Lines) -> Iterator[list[Sample]]:
    """Answer the rows that have no answer yet, batch by batch.

    Args:
        work: what to do.
        answerer: the :class:`vlm_prune_ext.evals.answer.Answerer`.
        lines: answers that are there.

    Raises:
        EveryRowFailed: in the first batch.
    """
    from vlm_prune_ext.evals import feed
    from vlm_prune_ext.evals.answer import Query, sample_of

    known, limit = lines.answered(), work.max_new_tokens

    def row(one: Example) -> feed.Row:
        return feed.Row(one.index, lambda: Query(one.prompt, [one.path], max_new_tokens=limit))

    def sample(one: feed.Outcome, batch: feed.Batch) -> Sample:
        if one.answer is None:
            say(f"row {one.index}: {one.why}")
            return Sample(one.index, "", failed=one.why)
        took = {"seconds": batch.seconds / batch.size, "batch": one.answer.batch}
        return sample_of(one.index, one.answer, warm_up=warm_up, **took)

    rows = (row(one) for one in work.rows if one.index not in known)
    size = feed.BatchSize(work.batch_size, answerer.processor.device)
    warm_up, some = True, bool(known)
    for batch in feed.Feeder(answerer, size).batches(rows):
        yield [sample(one, batch) for one in batch.outcomes]
        warm_up = warm_up and not batch.size
        some = some or any(one.answer is not None for one in batch.outcomes)
        if batch.size and not some:
            raise EveryRowFailed(batch.outcomes[0].why)
