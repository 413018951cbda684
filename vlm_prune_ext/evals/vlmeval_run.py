"""One model with one method on one data set, through VLMEvalKit's own inference and scoring.

What a run leaves and goes on from: :mod:`vlm_prune_ext.evals.vlmeval_store`; how rows are answered:
:mod:`vlm_prune_ext.evals.vlmeval_rows`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from vlmeval.inference import infer_data_job
from vlmeval.inference_video import infer_data_job_video

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.names import table_name
from vlm_prune_ext.evals.precheck import check_fit, decoder_of, is_untrained
from vlm_prune_ext.evals.rows import Table, open_table
from vlm_prune_ext.evals.served import make_answerer
from vlm_prune_ext.evals.vlmeval import PrunedVLM
from vlm_prune_ext.evals.vlmeval_rows import Parts, RowModel, shown_in_order
from vlm_prune_ext.evals.vlmeval_store import (
    DECISIVE,
    SHARES,
    Files,
    adopt,
    collect,
    index_of,
    own_files,
    row_parts,
    row_scores,
    start_files,
    texts,
    what_is_asked,
    write_rows,
)
from vlm_prune_ext.experiment import host, metrics
from vlm_prune_ext.experiment.log import lock, terminable
from vlm_prune_ext.experiment.record import (
    Record,
    Sample,
    Score,
    Stretch,
    changed,
    digest,
    read_record,
    summarise,
    weights_fingerprint,
)
from vlm_prune_ext.experiment.settings import ENGINE, MODEL, Settings, method_as_json
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models import load
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.tables import BadRow

UNTRAINED = "The weights of this checkpoint are random: scores are those of guessing."


# -- processes -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is, as torchrun says it."""

    rank: int
    local: int
    world: int

    @staticmethod
    def here() -> Ranks:
        """This process."""
        names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        return Ranks(*(_from_environment(name, default) for name, default in names))

    def device(self, asked: str | None) -> str | None:
        """The device of this process: each gets a GPU of its own where there are several."""
        if self.world > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return asked

    @contextlib.contextmanager
    def connected(self, device: str | None) -> Iterator[None]:
        """Processes that wait for each other: NCCL on GPUs, gloo on CPUs."""
        if self.world == 1 or dist.is_initialized():
            yield
            return
        on_gpu = torch.cuda.is_available() and device != "cpu"
        if on_gpu:
            torch.cuda.set_device(self.device(device))
        # The first process may download data or score for long while the others wait.
        limit = timedelta(seconds=max(1, _from_environment("DIST_TIMEOUT", 3600)))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
        yield
        dist.barrier()  # nobody leaves while others may still need the connection
        dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def _from_environment(name: str, default: int) -> int:
    """A number that the environment states.

    Raises:
        InputError: something else is there.
    """
    stated = os.environ.get(name, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", stated):
        raise InputError(f"{name}={stated!r} in the environment is not valid: a whole number.")
    return int(stated)


class Models:
    """A checkpoint that is loaded when it is first needed, once.

    Args:
        settings: which, and how.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.model_path or str(CHECKPOINT)
        self._settings = settings
        self._served: Answerer | None = None

    @cached_property
    def source(self) -> Checkpoint:
        """Its files."""
        return Checkpoint(self.path)

    @cached_property
    def weights(self) -> str:
        """Their fingerprint."""
        return weights_fingerprint(self.source.folder)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and processor."""
        given = self._settings
        return load(
            self.path,
            dtype=given.dtype,
            device=Ranks.here().device(given.device),
            attn_implementation=given.attn_implementation,
            fast=given.fast,
            trust_remote_code=given.trust_remote_code,
            min_pixels=given.min_pixels,
            max_pixels=given.max_pixels,
            preprocess=given.preprocess,
            frames=given.frames,
            fps=given.fps,
        )

    def answerer(self, method: Method | None) -> Answerer:
        """What answers with a method. An engine is one method's: the newest stays."""
        given = self._settings
        if given.backend is None:
            return Answerer(*self.loaded, method, video=given.video_budget)
        if self._served is None or self._served.method != method:
            self.close()
            self._served = make_answerer(
                self.path,
                method,
                given.backend,
                seed=given.seed,
                **{
                    name: getattr(given, name) for name in (*MODEL, *ENGINE) if name != "model_path"
                },
            )
        return self._served

    def close(self) -> None:
        """Stop an engine that was started."""
        if self._served is not None:
            self._served.close()
            self._served = None


# -- the run -------------------------------------------------------------------------------------
def run_dataset(
    settings: Settings,
    dataset: str,
    models: Models,
    on_sample: Callable[[], None] | None = None,
    share: Sequence[int] | None = None,
) -> Record | None:
    """Predict and score, as ``settings.mode`` says.

    Args:
        settings: the run's.
        dataset: which of its data sets.
        models: the checkpoint.
        on_sample: called after every row.
        share: ``(k, n)``: only predict, and that the ``k``-th of ``n`` equal parts of the rows,
            into a folder of its own; a run of all rows goes on from there.

    Returns:
        the record, which is also written beside the predictions; ``None`` in processes other than
        the first.

    Raises:
        InputError: data, checkpoint, folder or settings that are not accepted.
    """
    dataset = table_name(dataset)
    if share is not None:
        folder = Path(settings.work_dir) / SHARES / f"{share[0]}_of_{share[1]}"
        settings = replace(settings, mode="infer", work_dir=str(folder))
    ranks, files = Ranks.here(), Files(settings, dataset)
    if settings.mode == "eval" and not files.predictions.is_file():
        raise InputError(
            f"mode='eval' needs predictions at {str(files.predictions)!r}: make them with mode "
            "'infer' or 'all'."
        )
    table = _open_in_turn(dataset, ranks)
    if settings.limit is not None:
        table.dataset.data = table.dataset.data.iloc[: settings.limit].copy()
    if share is not None:
        ends = [len(table.dataset.data) * k // share[1] for k in (share[0], share[0] + 1)]
        table.dataset.data = table.dataset.data.iloc[slice(*ends)].copy()
        if table.dataset.data.empty:
            return None
    with lock(files.folder) if ranks.rank == 0 else contextlib.nullcontext():
        parts = row_parts(table.dataset)
        config = run_config(settings, models, parts)
        if ranks.world == 1 and (known := finished(settings, files, config, parts)) is not None:
            if not files.ours("rows.jsonl").is_file():  # of a version that did not write it
                write_row_file(files, what_is_asked(table.dataset))
            return known
        asked = what_is_asked(table.dataset) if ranks.rank == 0 else []
        if settings.mode != "eval":
            if ranks.rank == 0:
                start_files(files, config, parts, reuse=settings.reuse, fresh=settings.fresh)
                if adopt(files, config, parts):
                    start_files(files, config, parts)
            ranks.wait()
            predict(settings, files, table, parts, models, on_sample)
            ranks.wait()
        if ranks.rank != 0:
            return None
        made = finish(settings, files, table, models, config)
        write_row_file(files, asked)
        made.write(files.ours("results.json"))
        return made


def finished(
    settings: Settings, files: Files, config: Mapping[str, Any], parts: Mapping[int | str, Any]
) -> Record | None:
    """The record of a run of the same settings on the same rows, where all of these have answers
    and a score: there is nothing to do then."""
    path = files.ours("results.json")
    if settings.mode != "all" or settings.fresh or not path.is_file():
        return None
    with contextlib.suppress(InputError):
        known = read_record(path)
        same = {name: config[name] for name in (*DECISIVE, "rows")}
        whole = known.samples == len(parts) and known.score is not None
        if whole and not known.failed and not changed(known.config, same):
            return known
    return None


def _open_in_turn(dataset: str, ranks: Ranks) -> Table:
    """The first process downloads or makes what is missing; the others find it there."""
    if ranks.rank != 0:
        ranks.wait()
    table = open_table(dataset)
    if ranks.rank == 0:
        ranks.wait()
    return table


def run_config(
    settings: Settings,
    models: Models,
    rows: Table | Mapping[int | str, dict[str, str]],
    prompts: str | None = None,
) -> dict[str, Any]:
    """The resolved configuration, and what tells data (its rows, or their fingerprints), checkpoint
    and what makes ``prompts`` (not stated: VLMEvalKit) apart from others."""
    parts = row_parts(rows.dataset) if isinstance(rows, Table) else rows
    return {
        **settings.as_json(),
        "checkpoint": models.source.name,
        "weights": models.weights,
        "prompts": prompts or f"VLMEvalKit {_vlmeval_version()}",
        "rows": digest([[str(index), found] for index, found in parts.items()]),
    }


def _vlmeval_version() -> str | None:
    found = host.versions()
    return found.get("ms-vlmeval") or found.get("vlmeval")


def predict(
    settings: Settings,
    files: Files,
    table: Table,
    parts: Parts,
    models: Models,
    on_sample: Callable[[], None] | None = None,
) -> None:
    """Make the predictions that are not there, with VLMEvalKit's inference."""
    check_fit(models.source, settings.method)
    torch.manual_seed(settings.seed)
    ranks = Ranks.here()
    log = files.log(ranks.rank)
    known = {sample.index for sample in files.log().samples()[0] if sample.failed is None}

    def model() -> PrunedVLM:
        limit = settings.max_new_tokens
        return PrunedVLM(answerer=models.answerer(settings.method), max_new_tokens=limit)

    rows = RowModel(
        model, table.dataset, parts, log, settings.batch_size, on_sample, settings.keep_positions
    )
    shown = shown_in_order(rows, known, ranks.rank, ranks.world)
    try:
        with terminable(), own_files(), _written(files.folder), shown:
            given = {"model_name": files.name, "dataset": table.dataset}
            given |= {"work_dir": str(files.folder), "verbose": settings.verbose}
            if rows.has_videos:
                infer_data_job_video(rows, result_file=str(files.predictions), **given)
            else:
                infer_data_job(rows, **given)
    finally:
        stretch = rows.stretch(ranks.rank)
        if stretch is not None:
            log.add(stretch)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """VLMEvalKit writes files of its own; where that fails, one sentence says so."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"work_dir: {str(folder)!r} cannot be written ({error.strerror or error}): the answers "
            "made so far are kept where they were written."
        ) from error


def finish(
    settings: Settings, files: Files, table: Table, models: Models, config: dict[str, Any]
) -> Record:
    """Score the predictions and put the record together."""
    every, stretches = collect(files)
    present = set(map(index_of, table.dataset.data["index"]))
    samples = [sample for sample in every if sample.index in present]
    with _written(files.folder):
        scores, note = ({}, None) if settings.mode == "infer" else score(files, table.dataset)
    return record_of(
        settings,
        models,
        config,
        (samples, stretches),
        name=files.name,
        dataset=files.dataset,
        score=headline(table.dataset, files.dataset, scores, len(samples)),
        scores=scores,
        references=_references(table.dataset, [one for one in samples if not one.failed]),
        bad=table.bad,
        without_image=table.without_image,
        note=note,
    )


def record_of(
    settings: Settings,
    models: Models,
    config: Mapping[str, Any],
    log: tuple[Sequence[Sample], Sequence[Stretch]],
    *,
    references: list[list[str]] | None = None,
    bad: Sequence[BadRow] = (),
    note: str | None = None,
    **scored: Any,
) -> Record:
    """The record of a run, whoever scored it.

    Args:
        settings, models: of the run.
        config: as :func:`run_config` makes it.
        log: samples and stretches of the run's rows.
        references: right answers of the rows that were answered; ``None``: there are none.
        bad: rows that could not be asked.
        note: what a reader must know.
        **scored: name, data set, scores and what else the record has of these.
    """
    notes = [note] if note else []
    if is_untrained(models.source):
        notes.append(UNTRAINED)
    measured = summarise(*log)
    answered = [sample for sample in log[0] if not sample.failed]
    values, missing = metrics.score_all(answered, references)
    unasked = [{"index": row.index, "reason": row.reason} for row in bad]
    return Record(
        model_path=models.path,
        method=method_as_json(settings.method),
        config={**config, "decoder": decoder_of(models.source)},
        versions=host.versions(),
        commit=host.commit(),
        note=" ".join(notes) or None,
        metrics=values,
        missing=missing,
        **scored,
        **{**measured, "failed": unasked + measured["failed"]},
    )


def write_row_file(files: Files, asked: Sequence[dict[str, Any]]) -> None:
    """What was asked, and how each answer was scored."""
    write_rows(files.ours("rows.jsonl"), asked, row_scores(files.scoring_files()))


def _references(dataset: Any, samples: Sequence[Sample]) -> list[list[str]] | None:
    """Right answers of some rows; ``None`` where the data set states none."""
    if "answer" not in dataset.data:
        return None
    answers = dict(zip(map(index_of, dataset.data["index"]), dataset.data["answer"], strict=True))
    return [texts(str(answers[sample.index])) for sample in samples]


# -- scores ----------------------------------------------------------------------------------------
def score(files: Files, dataset: Any) -> tuple[dict[str, float], str | None]:
    """VLMEvalKit's scores, flat, without a judge model; and a note if it has none."""
    for path in files.scoring_files():  # of other predictions
        path.unlink()
    try:
        with own_files():
            result = dataset.evaluate(str(files.predictions), model="exact_matching")
    except Exception as error:  # data sets fail in many ways without a judge
        return {}, (
            f"VLMEvalKit cannot score {files.dataset} by exact matching ({reason_of(error)}); the "
            f"predictions are in {files.predictions.name}."
        )
    return flatten(result), None


def flatten(result: Any) -> dict[str, float]:
    """Numbers of what ``evaluate`` returned, by name.

    Columns of text name the rows of a table: ``random/acc``. The only row, and rows called
    ``none`` or ``Overall``, need no name.
    """
    if isinstance(result, pd.DataFrame):
        text = [c for c in result if result[c].dtype.kind not in "iufb"]
        flat: dict[str, float] = {}
        for _, row in result.iterrows():
            names = [str(row[c]) for c in text if str(row[c]) not in ("none", "Overall", "nan")]
            start = "/".join(names) + "/" if names and len(result) > 1 else ""
            flat |= {f"{start}{c}": float(row[c]) for c in result if c not in text}
        return flat
    flat = {}
    for key, value in (result or {}).items():
        if isinstance(value, list | tuple):
            flat |= {f"{key}_{i}": float(v) for i, v in enumerate(value, 1)}
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": v for name, v in flatten(value).items()}
        elif isinstance(value, int | float):
            flat[str(key)] = float(value)
        elif isinstance(value, str):  # as some write their numbers
            with contextlib.suppress(ValueError):
                flat |= {str(key): float(value)} if math.isfinite(float(value)) else {}
    return flat


def headline(dataset: Any, name: str, scores: dict[str, float], count: int) -> Score | None:
    """The score that a data set is known by."""
    if {"perception", "reasoning"} <= set(scores):
        return Score("perception + reasoning", scores["perception"] + scores["reasoning"])
    if getattr(dataset, "TYPE", "") == "Caption":
        usual = "Bleu_4" if name.startswith("Shapes_") else "CIDEr"
        return Score(usual, scores[usual]) if usual in scores else None
    known = [key for key in scores if _overall(key)]
    known.sort(key=lambda key: (key != "Overall", not key.lower().startswith("overall")))
    key = known[0] if known else None
    if key is None or math.isnan(scores[key]):
        return None
    value = scores[key]
    is_choice = getattr(dataset, "TYPE", "") in ("MCQ", "Video-MCQ")
    if is_choice and value <= 1.0:  # VLMEvalKit gives shares for these, percent for others
        value *= 100.0
    single = name.startswith("Shapes_") or (is_choice and "mmbench" not in name.lower())
    return Score(key, value, share_error(value, count) if single and count else None)


def share_error(percent: float, count: int) -> float:
    """Standard error of a share in percent, after Agresti and Coull: not 0 if all are right."""
    share = (percent / 100.0 * count + 2.0) / (count + 4.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / (count + 4.0))


def _overall(key: str) -> bool:
    return bool(re.search(r"overall|(^|/)acc(uracy)?$", key, re.IGNORECASE))
