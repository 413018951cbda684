"""The process of one run: ``python -m vlm_prune_ext.ablation.worker JOB.json``.

It loads one model, answers what is not answered yet, and appends each batch to the predictions.
When it ends, all its memory is free, however it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_prune_ext.ablation.data import Row
from vlm_prune_ext.ablation.files import Lines, Prediction, write_json
from vlm_prune_ext.errors import InputError, first_line, reason_of

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        source: what :func:`vlm_prune_ext.load` takes.
        method: short form; ``none`` is the baseline.
        rows: all of the data set.
        lines: file of predictions, begun already.
        result: file that says how it ended.
        batch_size, max_new_tokens: of ``generate``.
        load: further arguments of :func:`vlm_prune_ext.load`.
        parent: the process that waits for this one.
    """

    source: str
    method: str
    rows: list[Row]
    lines: str
    result: str
    batch_size: int
    max_new_tokens: int
    load: dict[str, Any]
    parent: int

    def write(self, path: Path) -> None:
        """For :meth:`read`."""
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> Job:
        """What :meth:`write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{**row, "references": tuple(row["references"])}) for row in data["rows"]]
        return Job(**{**data, "rows": rows})


class RunFailed(Exception):
    """A run did not come to its end; the message is the reason."""


class EveryRowFailed(RunFailed):
    """No row of the first batch could be answered: neither could the others."""


def main(arguments: Sequence[str]) -> int:
    """Do a job; 0: done, 1: failed, and the result file says why."""
    job = Job.read(Path(arguments[0]))
    _end_with(job.parent)
    try:
        result = run(job)
    except Exception as error:
        traceback.print_exc()
        write_json(Path(job.result), {"reason": why_failed(error)})
        return 1
    write_json(Path(job.result), result)
    return 0


def _end_with(parent: int) -> None:
    """End when the study ends, also when it is killed: nobody would wait for the answers, and a
    second start would give them again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def run(job: Job) -> dict[str, Any]:
    """Load the model and answer; returns what the metrics file says about it."""
    import torch
    from transformers.utils import logging

    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.experiment.host import commit, hardware, versions
    from vlm_prune_ext.methods.registry import parse_method
    from vlm_prune_ext.models import load

    logging.disable_progress_bar()
    torch.manual_seed(0)
    start = time.perf_counter()
    method = parse_method(job.method)
    model, processor = load(job.source, **job.load)
    answerer = Answerer(model.eval(), processor, method)
    loaded = time.perf_counter()
    print(f"loaded in {loaded - start:.1f} s", flush=True)
    lines = Lines(Path(job.lines))
    lines.repair()
    for predictions in answer(job, answerer, lines):
        lines.append(predictions)
        if os.getppid() != job.parent:  # where prctl is not known
            os._exit(1)
    device = processor.device
    return {
        "load_seconds": loaded - start,
        "answer_seconds": time.perf_counter() - loaded,
        "largest_batch": answerer.largest or job.batch_size,
        "dtype": str(processor.dtype).removeprefix("torch."),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
    }


def answer(job: Job, answerer: Any, lines: Lines) -> Iterator[list[Prediction]]:
    """Answer the rows that have no answer yet, batch by batch.

    Args:
        job: what to do.
        answerer: the :class:`vlm_prune_ext.evals.answer.Answerer`.
        lines: answers that are there.

    Raises:
        EveryRowFailed: in the first batch.
    """
    known = {index for index, row in lines.read()[1].items() if row.failed is None}
    rows = [row for row in job.rows if row.index not in known]
    some = bool(known)
    for place in range(0, len(rows), job.batch_size):
        batch = _Batch(answerer, job.max_new_tokens, warm_up=place == 0)
        predictions = batch.answer(rows[place : place + job.batch_size])
        yield predictions
        failed = [row.failed for row in predictions if row.failed]
        some = some or len(failed) < len(predictions)
        if not some:
            raise EveryRowFailed(failed[0])


class _Batch:
    """One batch; where it fails, its rows one by one."""

    def __init__(self, answerer: Any, max_new_tokens: int, *, warm_up: bool) -> None:
        self.answerer, self.max_new_tokens, self.warm_up = answerer, max_new_tokens, warm_up

    def answer(self, rows: Sequence[Row]) -> list[Prediction]:
        """A prediction for each row, in order."""
        import torch

        try:
            return self._ask(rows)
        except (InputError, torch.OutOfMemoryError) as error:
            if len(rows) == 1:
                print(f"row {rows[0].index}: {why_failed(error)}", flush=True)
                return [Prediction(rows[0].index, "", failed=why_failed(error))]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [prediction for row in rows for prediction in self.answer([row])]

    def _ask(self, rows: Sequence[Row]) -> list[Prediction]:
        from vlm_prune_ext.evals.answer import Query
        from vlm_prune_ext.experiment.measure import now, peak_memory

        device = self.answerer.processor.device
        start = now(device)
        queries = [
            Query(row.prompt, [row.path], max_new_tokens=self.max_new_tokens) for row in rows
        ]
        answers = self.answerer.answer(queries)
        seconds = (now(device) - start) / len(rows)
        peak = peak_memory(device)
        return [
            Prediction(
                index=row.index,
                text=answer.text,
                seconds=seconds,
                warm_up=self.warm_up,
                batch=answer.batch,
                prompt_tokens=answer.prompt_tokens,
                new_tokens=answer.new_tokens,
                visual_tokens=answer.visual_tokens,
                visual_kept={str(layer): n for layer, n in answer.visual_kept.items()},
                peak_memory_bytes=peak,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]


def why_failed(error: BaseException) -> str:
    """One line that says why a run did not end well."""
    return first_line(error) if isinstance(error, RunFailed) else reason_of(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
