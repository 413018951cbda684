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
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.ablation.data import Row
from vlm_prune_ext.ablation.files import Folder, Lines
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.log import write_json
from vlm_prune_ext.experiment.record import Sample
from vlm_prune_ext.experiment.report import say

if TYPE_CHECKING:
    from vlm_prune_ext.evals.answer import Query
    from vlm_prune_ext.evals.feed import Batch, Outcome


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
    rows: Sequence[Row]
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
        name = cell.settings["name"]
        own_process = multiprocessing.parent_process() is not None
        if own_process:
            _print_to(work.folder, name)
        try:
            result = run(work, cell.settings["source"], cell.settings["asked"], name)
        except InputError:
            if own_process:
                traceback.print_exc()  # into the run's log; people are told one sentence
            raise
        write_json(work.folder.result(name), result)
        return result

    return job


def _print_to(folder: Folder, name: str) -> None:
    """What this process prints is the run's own log."""
    file = folder.log(name).open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file.fileno(), stream.fileno())


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
    lines = Lines(work.folder.lines(name))
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

    known = lines.answered()
    rows = (
        feed.Row(row.index, partial(_query, row, work.max_new_tokens))
        for row in work.rows
        if row.index not in known
    )
    size = feed.BatchSize(work.batch_size, answerer.processor.device)
    warm_up, some = True, bool(known)
    for batch in feed.Feeder(answerer, size).batches(rows):
        yield [_sample(one, batch, warm_up) for one in batch.outcomes]
        warm_up = warm_up and not batch.size
        some = some or any(one.answer is not None for one in batch.outcomes)
        if batch.size and not some:
            raise EveryRowFailed(batch.outcomes[0].why)


def _query(row: Row, max_new_tokens: int) -> Query:
    from vlm_prune_ext.evals.answer import Query

    return Query(row.prompt, [row.path], max_new_tokens=max_new_tokens)


def _sample(one: Outcome, batch: Batch, warm_up: bool) -> Sample:
    from vlm_prune_ext.evals.answer import sample_of

    if one.answer is None:
        say(f"row {one.index}: {one.why}")
        return Sample(one.index, "", failed=one.why)
    seconds, together = batch.seconds / batch.size, one.answer.batch
    return sample_of(one.index, one.answer, warm_up=warm_up, seconds=seconds, batch=together)
