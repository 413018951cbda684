"""One model with one method on one task of lmms-eval: its data, prompts, loop and metrics, and the
log and record of a run on a data set of VLMEvalKit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.tasks import TaskManager
from loguru import logger

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.evals.answer import Answerer, Sizes
from vlm_prune_ext.evals.feed import Batch, Stint, sample_in
from vlm_prune_ext.evals.lmms import PruneModel
from vlm_prune_ext.evals.lmms_requests import Task, stored_pictures
from vlm_prune_ext.evals.names import task_file
from vlm_prune_ext.evals.precheck import check_fit
from vlm_prune_ext.evals.rows import keep
from vlm_prune_ext.evals.vlmeval_run import Models, record_of, run_config, share_error
from vlm_prune_ext.evals.vlmeval_store import Files, collect, start_files, write_rows
from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.log import lock, terminable
from vlm_prune_ext.experiment.record import Record, Sample, Score, digest
from vlm_prune_ext.experiment.settings import Settings

Parts = dict[int | str, dict[str, str]]


def run_task(settings: Settings, name: str, models: Models) -> Record:
    """Answer and score.

    Args:
        settings: the run's; its ``max_new_tokens`` goes before the task's.
        name: of the task, as :func:`vlm_prune_ext.evals.names.table_name` gives it.
        models: the checkpoint.

    Returns:
        the record, which is also written beside the log.

    Raises:
        InputError: the task's data cannot be had, its code fails, or it is answered by likelihood.
    """
    check_fit(models.source, settings.method)
    files = Files(settings, name)
    config: dict[str, Any] = {}
    with lock(files.folder):

        def begin(rows: Parts) -> Mapping[int | str, Sample]:
            """Rows that have answers which still hold."""
            version = f"lmms-eval {host.versions().get('lmms-eval')}"
            config.update(run_config(settings, models, rows, version))
            start_files(files, config, rows, reuse=settings.reuse, fresh=settings.fresh)
            return {one.index: one for one in files.log().samples()[0] if one.failed is None}

        answerer = Answerer(*models.loaded, settings.method, video=settings.video_budget)
        model = LoggedModel(settings, answerer, files, begin)
        try:
            with terminable():
                results = _evaluate(settings, name, model)
        finally:
            model.close()
        return _finish(settings, files, models, config, results, model)


def _evaluate(settings: Settings, name: str, model: LoggedModel) -> dict[str, Any]:
    limit = settings.max_new_tokens
    logger.disable("lmms_eval")  # what went wrong is in the log, the scores in the record
    try:
        found = evaluator.simple_evaluate(
            model,
            tasks=[name],
            task_manager=_manager(task_file(name)),
            limit=settings.limit,
            gen_kwargs=f"max_new_tokens={limit}" if limit else None,
            verbosity="ERROR",
            torch_random_seed=settings.seed,
        )
    except InputError:
        raise
    except Exception as error:  # data sets and code of tasks fail in many ways
        raise InputError(f"lmms-eval cannot evaluate {name} ({reason_of(error)}).") from error
    finally:
        logger.enable("lmms_eval")
    assert isinstance(found, dict)
    return found


@cache
def _manager(file: Path | None) -> TaskManager:
    """Knows the tasks beside a file; lmms-eval's own, of which one may include another, all."""
    if file is None or "lmms_eval" in file.parts:
        return TaskManager("ERROR")
    return TaskManager("ERROR", include_path=str(file.parent), include_defaults=False)


class LoggedModel(PruneModel):
    """Writes each answer down when it is made; rows whose answers are known are not asked.

    Args:
        settings: ``batch_size`` and ``keep_positions`` are taken.
        answerer: answers.
        files: of the run.
        begin: fingerprints of what rows' answers depend on -> answers that are known.
    """

    def __init__(
        self,
        settings: Settings,
        answerer: Answerer,
        files: Files,
        begin: Callable[[Parts], Mapping[int | str, Sample]],
    ) -> None:
        usual = "auto" if answerer.processor.device.type == "cuda" else 1
        super().__init__(answerer=answerer, batch_size=settings.batch_size or usual)
        self._begin, self._log = begin, files.log(0)
        self._positions, self._sizes = settings.keep_positions, Sizes.of(answerer.model.config)
        self._stint, self._answered = Stint(answerer), 0
        self.parts: Parts = {}
        self.pictures: dict[int | str, list[str]] = {}

    def generate_until(self, requests: list[Instance]) -> Sequence[GenerationResult]:  # type: ignore[override]
        """Answers in the order of the requests."""
        tasks = [self._reader.task(one) for one in requests]
        pictures = self._reader.pictures([task.source for task in tasks])
        for request, task, seen in zip(requests, tasks, pictures, strict=True):
            asked = digest(request.args[0], str(request.args[2]))
            self.parts[task.source.doc] = {"question": asked, "picture": digest(seen)}
        known = self._begin(self.parts)
        self._keep_pictures(tasks[: self._positions])
        unknown = [n for n, task in enumerate(tasks) if task.source.doc not in known]
        made = super().generate_until([requests[n] for n in unknown])
        fresh = dict(zip(unknown, made, strict=True))
        return [
            fresh[n] if n in fresh else GenerationResult(text=known[task.source.doc].prediction)
            for n, task in enumerate(tasks)
        ]

    def note(self, batch: Batch, tasks: Mapping[int, Task]) -> None:
        """Write a batch down."""
        warm_up, samples = self._answered < self._stint.warm_up, []
        for one in batch.outcomes:
            index = tasks[one.index].source.doc
            if one.answer is None:
                sample = Sample(index, "", failed=one.why)
            else:
                self._answered += 1
                sample = sample_in(batch, self._sizes, index, one.answer, warm_up=warm_up)
                if index >= self._positions:
                    sample = replace(sample, kept={}, patches={})
            samples.append(replace(sample, row=self.parts[index]))
        self._log.add(*samples)

    def close(self) -> None:
        """Note what answering took."""
        if self._answered:
            self._log.add(self._stint.stretch())

    def _keep_pictures(self, tasks: Iterable[Task]) -> None:
        """Files of the rows' pictures, for pages."""
        for task in tasks:
            source = task.source
            with contextlib.suppress(Exception):  # a row without its picture fails, and says so
                data = self._reader.data[source.task][source.split]
                stored = stored_pictures(data, [source.doc])[0]
                paths = [str(keep(one)) if isinstance(one, bytes) else one for one in stored]
                self.pictures[source.doc] = paths


# -- the end ---------------------------------------------------------------------------------------
def _finish(
    settings: Settings,
    files: Files,
    models: Models,
    config: dict[str, Any],
    results: Mapping[str, Any],
    model: LoggedModel,
) -> Record:
    scores = _scores(results["results"][files.dataset])
    rows = {int(one["doc_id"]): one for one in reversed(results["samples"][files.dataset])}
    first = next(iter(scores), "")
    shares = {index: _share(row.get(first)) for index, row in rows.items()}
    every, stretches = collect(files)
    samples = [sample for sample in every if sample.index in model.parts]
    made = record_of(
        settings,
        models,
        config,
        (samples, stretches),
        name=files.name,
        dataset=files.dataset,
        score=_headline(first, scores, list(shares.values())),
        scores=scores,
        without_image=0,
    )
    asked = [_row(rows[index], model.pictures.get(index, [])) for index in sorted(rows)]
    write_rows(
        files.ours("rows.jsonl"), asked, {str(n): s for n, s in shares.items() if s is not None}
    )
    made.write(files.ours("results.json"))
    return made


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by metric, the task's first one first; those of a filter are ``metric/filter``."""
    scores = {}
    for key, value in found.items():
        metric, _, by = key.partition(",")
        if isinstance(value, int | float) and by and not metric.endswith(("_stderr", "_clt")):
            scores[metric if by == "none" else f"{metric}/{by}"] = float(value)
    return scores


def _headline(
    name: str, scores: Mapping[str, float], shares: Sequence[float | None]
) -> Score | None:
    """The task's first metric; in percent, with its standard error, where it is the mean of the
    rows' scores in [0, 1]."""
    if name not in scores:
        return None
    value, known = scores[name], [share for share in shares if share is not None]
    if len(known) < len(shares) or abs(sum(known) / len(known) - value) > 1e-6:
        return Score(name, value)
    return Score(name, 100 * value, share_error(100 * value, len(known)))


def _share(value: Any) -> float | None:
    """A row's score, where its metric is one number in [0, 1]."""
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


def _row(sample: Mapping[str, Any], pictures: list[str]) -> dict[str, Any]:
    """What a row asks, see :func:`vlm_prune_ext.evals.vlmeval_store.what_is_asked`."""
    doc = sample["doc"]
    options = {name: str(doc[name]) for name in doc if len(name) == 1 and name.isupper()}
    category = doc.get("category")
    return {
        "index": str(sample["doc_id"]),
        "question": str(doc.get("question") or sample["arguments"][0]),
        "answer": str(sample["target"]),
        **({"category": str(category)} if category is not None else {}),
        "options": options,
        "pictures": pictures,
    }
