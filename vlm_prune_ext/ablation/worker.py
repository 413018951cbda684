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
from typing import Any

from vlm_prune_ext.ablation.data import Row
from vlm_prune_ext.ablation.files import Folder, Lines
from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.log import write_json
from vlm_prune_ext.experiment.record import Sample


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
    known = lines.answered()
    rows = [row for row in work.rows if row.index not in known]
    some = bool(known)
    for place in range(0, len(rows), work.batch_size):
        batch = rows[place : place + work.batch_size]
        samples = _answer(batch, answerer, work.max_new_tokens, warm_up=place == 0)
        yield samples
        failed = [sample.failed for sample in samples if sample.failed]
        some = some or len(failed) < len(samples)
        if not some:
            raise EveryRowFailed(failed[0])


def _answer(
    rows: Sequence[Row], answerer: Any, max_new_tokens: int, *, warm_up: bool
) -> list[Sample]:
    """A sample for each row, in order; where a batch fails, its rows one by one."""
    import torch

    try:
        return _ask(rows, answerer, max_new_tokens, warm_up)
    except (InputError, torch.OutOfMemoryError) as error:
        if len(rows) == 1:
            print(f"row {rows[0].index}: {reason_of(error)}", flush=True)
            return [Sample(rows[0].index, "", failed=reason_of(error))]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [
        sample
        for row in rows
        for sample in _answer([row], answerer, max_new_tokens, warm_up=warm_up)
    ]


def _ask(rows: Sequence[Row], answerer: Any, max_new_tokens: int, warm_up: bool) -> list[Sample]:
    from vlm_prune_ext.evals.answer import Query, sample_of
    from vlm_prune_ext.experiment.measure import now

    device = answerer.processor.device
    start = now(device)
    queries = [Query(row.prompt, [row.path], max_new_tokens=max_new_tokens) for row in rows]
    answers = answerer.answer(queries)
    seconds = (now(device) - start) / len(rows)
    return [
        sample_of(row.index, answer, warm_up=warm_up, seconds=seconds, batch=answer.batch)
        for row, answer in zip(rows, answers, strict=True)
    ]
