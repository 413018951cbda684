"""One model with one method on one data set, through VLMEvalKit's own inference and scoring.

VLMEvalKit hands a model one row after the other and keeps answers in pickles that it writes every
ten rows. Here every answer is also appended to a log as it comes, with what it cost and with
fingerprints of what it depends on. A run goes on from that log, whatever number of processes it
had; rows that are not what they were are asked anew.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from vlmeval.inference import FAIL_MSG, infer_data_job
from vlmeval.smp import dump, get_pred_file_path
from vlmeval.vlm.base import BaseModel

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, make_folder
from vlm_prune_ext.evals.answer import Sizes
from vlm_prune_ext.evals.interrupt import terminable
from vlm_prune_ext.evals.precheck import check_fit, is_untrained
from vlm_prune_ext.evals.rows import Table, open_table
from vlm_prune_ext.evals.vlmeval import PrunedVLM, run_name
from vlm_prune_ext.evals.vlmeval_files import own_files
from vlm_prune_ext.experiment import host, measure, metrics
from vlm_prune_ext.experiment.log import lock, put_aside, read_json, write_json
from vlm_prune_ext.experiment.record import (
    Record,
    Sample,
    SampleLog,
    Score,
    Stretch,
    changed,
    digest,
    read_record,
    summarise,
    weights_fingerprint,
)
from vlm_prune_ext.experiment.settings import Settings, method_as_json
from vlm_prune_ext.models import load
from vlm_prune_ext.models.checkpoint import Checkpoint

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

UNTRAINED = "The weights of this checkpoint are random: scores are those of guessing."

# What decides predictions: where one of these differs, all rows are asked anew.
_DECISIVE = (
    *("method", "seed", "dtype", "attn_implementation", "max_new_tokens", "fast"),
    *("checkpoint", "weights", "prompts", "min_pixels", "max_pixels"),
)
# Column of a row -> part that its answer depends on; further columns are "other".
_PARTS = {"question": "question", "hint": "hint", "image": "picture", "image_path": "picture"}
_NOT_ASKED = {"index", "answer", "category", "l2-category", "split"}


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
        env = os.environ
        return Ranks(
            *(int(env.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        )

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
        limit = timedelta(seconds=int(os.environ.get("DIST_TIMEOUT", "3600")))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
        yield
        dist.barrier()  # nobody leaves while others may still need the connection
        dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


class Models:
    """A checkpoint that is loaded when it is first needed, once.

    Args:
        settings: which, and how.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.model_path or str(CHECKPOINT)
        self._settings = settings

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
        )


# -- files ---------------------------------------------------------------------------------------
class Files:
    """Where a run's files are: ``<work-dir>/<name>_<data>/<name>_<data>...``."""

    def __init__(self, settings: Settings, dataset: str) -> None:
        self.name = run_name(settings.model_path, settings.method)
        self.dataset = dataset
        self.stem = f"{self.name}_{dataset}"
        self.folder = Path(settings.work_dir) / self.stem

    @property
    def predictions(self) -> Path:
        """Written by VLMEvalKit."""
        return Path(get_pred_file_path(str(self.folder), self.name, self.dataset))

    def ours(self, ending: str) -> Path:
        """A file of ours."""
        return self.folder / f"{self.stem}_{ending}"

    def log(self, rank: int | None = None) -> SampleLog:
        """Lines of one process, or of all that ended."""
        return SampleLog(self.ours("samples.jsonl" if rank is None else f"samples_{rank}.jsonl"))

    def logs(self) -> list[SampleLog]:
        """All there are, the oldest lines first."""
        parts = sorted(self.folder.glob(f"{self.stem}_samples_*.jsonl"))
        return [self.log(), *map(SampleLog, parts)]

    def scoring_files(self) -> list[Path]:
        """What VLMEvalKit's scoring left behind, and would take for its own again."""
        mine = {self.predictions, self.ours("results.json"), self.ours("config.json")}
        mine |= {log.path for log in self.logs()}
        return [p for p in self.folder.glob(f"{self.stem}*") if p.is_file() and p not in mine]


def start_files(
    files: Files,
    config: dict[str, Any],
    rows: Mapping[int | str, dict[str, str]] | None = None,
    *,
    reuse: bool = False,
    fresh: bool = False,
) -> None:
    """Make the folder ready: the answers that still hold are there for VLMEvalKit to find, all
    else that was there is put aside.

    Args:
        files: of the run.
        config: as :func:`run_config` makes it.
        rows: index -> fingerprints of what its answer depends on; ``None``: ``config`` alone says
            whether rows have changed.
        reuse: whether it was said that what is there is to be gone on from: then it must be of the
            same settings and rows. Otherwise what differs is named and asked anew.
        fresh: whether nothing is to be gone on from.

    Raises:
        InputError: the folder cannot be written, or ``reuse`` and something differs.
    """
    make_folder(files.folder, "work_dir: ")
    kept, why = ([], "") if fresh else _still_right(files, config, rows)
    if why and reuse:
        raise InputError(
            f"--reuse: {str(files.folder)!r}: {why}; run without --reuse to have it asked anew, "
            "or with --fresh to start anew."
        )
    if why:
        aside = put_aside(files.folder)
        print(f"{files.stem}: {why}: asked anew; what was there is in {aside}.", file=sys.stderr)
        if kept:
            files.log().rewrite(kept)
    elif fresh:
        put_aside(files.folder)
    for path in [*files.folder.glob("*.pkl"), files.predictions]:
        path.unlink(missing_ok=True)
    answers = {s.index: s.prediction for s in kept if isinstance(s, Sample) and s.failed is None}
    try:
        if answers:
            dump(answers, str(files.folder / f"{files.stem}_PREV.pkl"))
    except OSError as error:
        raise InputError(
            f"work_dir: {str(files.folder)!r} cannot be written ({error.strerror}); a folder that "
            "can be made or written is accepted."
        ) from error
    write_json(files.ours("config.json"), config)


def _still_right(
    files: Files, config: dict[str, Any], rows: Mapping[int | str, dict[str, str]] | None
) -> tuple[list[Sample | Stretch], str]:
    """Lines to go on with, and why others are not among them (empty: all are)."""
    path = files.ours("config.json")
    samples, stretches = collect(files)
    before = read_json(path)
    if not path.is_file() and not samples:
        return [], ""
    if not isinstance(before, dict):
        return [], "its settings cannot be read"
    decisive = {name: config.get(name) for name in _DECISIVE}
    if rows is None:
        decisive["rows"] = config.get("rows")
    if different := changed(before, decisive):
        return [], f"made with {'; '.join(different)}"
    kept: list[Sample] = []
    parts: Counter[str] = Counter()
    for sample in samples:
        now = (rows or {}).get(sample.index, sample.row)  # a row beyond --limit stays
        if now == sample.row:
            kept.append(sample)
        parts.update(name for name, value in now.items() if sample.row.get(name) != value)
    count = len(samples) - len(kept)
    what = ", ".join(sorted(parts))
    said = f"{count} {'row has' if count == 1 else 'rows have'} changed ({what})" if count else ""
    return [*kept, *stretches], said


def collect(files: Files) -> tuple[list[Sample], list[Stretch]]:
    """Put the logs of all processes into one, the last line of each row winning."""
    samples: dict[int | str, Sample] = {}
    stretches: list[Stretch] = []
    logs = files.logs()
    for log in logs:
        mine, times = log.samples()
        samples.update({sample.index: sample for sample in mine})
        stretches += times
        if log.broken:
            lines = ", ".join(map(str, log.broken))
            print(f"{log.path.name}: line {lines} cannot be read and is left out.", file=sys.stderr)
    if len(logs) > 1 and (samples or stretches):
        files.log().rewrite([*samples.values(), *stretches])
    for log in logs[1:]:
        log.path.unlink(missing_ok=True)
    return list(samples.values()), stretches


def row_parts(dataset: Any) -> dict[int | str, dict[str, str]]:
    """Fingerprints of what the answer to each row depends on, by index: its question, hint,
    options, picture, and whatever else it has but for the right answer and categories."""
    data, found = dataset.data, {}
    names = {name: _part(name) for name in map(str, data) if name not in _NOT_ASKED}
    root = Path(getattr(dataset, "img_root", "."))
    for row in data.to_dict("records"):
        parts: dict[str, list[Any]] = {}
        for name, part in names.items():
            value = row[name]
            if name == "image_path":
                value = _picture_bytes(value, root)
            parts.setdefault(part, []).append([name, str(value)])
        found[_index(row["index"])] = {part: digest(values) for part, values in parts.items()}
    return found


def _part(column: str) -> str:
    is_option = len(column) == 1 and column.isupper()
    return "options" if is_option else _PARTS.get(column, "other")


def _picture_bytes(value: Any, root: Path) -> str:
    """Pictures that are named by their files, one or a list: what the files hold."""
    text = str(value)
    return digest([text, *(_content(root / name) for name in _texts(text))])


def _content(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except (OSError, ValueError):  # the row will fail, and say why
        return ""


def _index(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)


# -- rows ----------------------------------------------------------------------------------------
class Failure:
    """Stands where a message should, for a row that cannot be asked."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class RowModel(BaseModel):
    """What VLMEvalKit drives: asks a :class:`PrunedVLM` row by row and writes each answer down.

    A row whose image or text cannot be used becomes a failed row, with VLMEvalKit's own mark for
    such as its prediction. Settings that fit no row end the run.

    Args:
        load: makes what answers, once the first row that is open comes by.
        dataset: the data set that rows come from.
        parts: index -> fingerprints of a row.
        log: takes the lines.
        on_sample: called after every row.
    """

    INTERLEAVE = True

    def __init__(
        self,
        load: Callable[[], PrunedVLM],
        dataset: Any,
        parts: Mapping[int | str, dict[str, str]],
        log: SampleLog,
        on_sample: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._load, self._parts = load, parts
        self.dataset, self.log, self.on_sample = dataset, log, on_sample
        self.index: int | str = 0
        self.answered = 0
        # Else VLMEvalKit would ask the data set itself, and we would not learn which row it is.
        self._dataset_first = getattr(dataset, "force_use_dataset_prompt", False)
        if self._dataset_first:
            dataset.force_use_dataset_prompt = False

    @cached_property
    def inner(self) -> PrunedVLM:
        """What answers."""
        model = self._load()
        model.set_dump_image(self.dataset.dump_image)
        self.sizes = Sizes.of(model.model.config)
        self.device = model.processor.device
        self.warm_up = 3 if self.device.type == "cuda" else 1
        measure.reset_peak(self.device)
        self._energy, self._start = measure.EnergyMeter(self.device, None), time.perf_counter()
        return model

    def stretch(self, rank: int) -> Stretch | None:
        """What answering took; ``None`` if nothing was answered."""
        if not self.answered:
            return None
        return Stretch(
            rank=rank,
            seconds=time.perf_counter() - self._start,
            peak_memory_bytes=measure.peak_memory(self.device),
            energy_joules=self._energy.joules(),
            hardware=host.hardware(self.device),
        )

    def use_custom_prompt(self, dataset: str) -> bool:
        """Always: that is how rows come by."""
        return True

    def build_prompt(self, line: Any, dataset: str | None = None) -> Any:
        """The row's message, or a :class:`Failure`."""
        self.index = _index(line["index"])
        inner = self.inner  # a checkpoint that cannot be loaded is no row's fault
        try:
            if not self._dataset_first and inner.use_custom_prompt(dataset or ""):
                return inner.build_prompt(line, dataset)
            return self.dataset.build_prompt(line)
        except OSError as error:
            if error.errno in _NO_PLACE:  # no row's fault
                raise InputError(f"Pictures cannot be unpacked ({error}).") from error
            return Failure(_one_line(error))
        except Exception as error:  # whatever a broken row makes VLMEvalKit's code do
            return Failure(_one_line(error))

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer, or VLMEvalKit's mark for a failed row."""
        query = message if isinstance(message, Failure) else self._query(message, dataset)
        if isinstance(query, Failure):
            return self._write_failure(query.reason)
        try:
            answer = self.inner.answer(query)
        except torch.OutOfMemoryError as error:
            if not self.answered:  # none will fit
                raise InputError(
                    f"Row {self.index} does not fit into the memory of the device: a smaller dtype "
                    "or a larger device is needed."
                ) from error
            return self._write_failure("it does not fit into the memory of the device")
        warm_up = self.answered < self.warm_up
        self.answered += 1
        return self._write(self.sizes.sample(self.index, answer, warm_up=warm_up))

    def _query(self, message: Any, dataset: str | None) -> Any:
        inner = self.inner  # a checkpoint that cannot be loaded is no row's fault
        try:
            return inner.query(_items(message), dataset)
        except Exception as error:  # decoders raise whatever they like on damaged files
            return Failure(_one_line(error))

    def _write_failure(self, reason: str) -> str:
        print(f"Row {self.index} failed: {reason}", file=sys.stderr)
        return self._write(Sample(self.index, f"{FAIL_MSG} {reason}", failed=reason))

    def _write(self, sample: Sample) -> str:
        self.log.add(replace(sample, row=self._parts.get(self.index, {})))
        if self.on_sample is not None:
            self.on_sample()
        return sample.prediction


def _items(message: Any) -> list[dict[str, Any]]:
    """A message as a list of items. VLMEvalKit's own way to make one takes text that is the name of
    a file for the file, and fetches text that is an address."""
    items = [message] if isinstance(message, str | dict) else list(message)
    return [{"type": "text", "value": item} if isinstance(item, str) else item for item in items]


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


# -- the run -------------------------------------------------------------------------------------
def run_dataset(
    settings: Settings,
    dataset: str,
    models: Models,
    on_sample: Callable[[], None] | None = None,
) -> Record | None:
    """Predict and score, as ``settings.mode`` says.

    Args:
        settings: the run's.
        dataset: which of its data sets.
        models: the checkpoint.
        on_sample: called after every row.

    Returns:
        the record, which is also written beside the predictions; ``None`` in processes other than
        the first.

    Raises:
        InputError: data, checkpoint, folder or settings that are not accepted.
    """
    ranks, files = Ranks.here(), Files(settings, dataset)
    if settings.mode == "eval" and not files.predictions.is_file():
        raise InputError(
            f"mode='eval' needs predictions at {str(files.predictions)!r}: make them with mode "
            "'infer' or 'all'."
        )
    table = _open_in_turn(dataset, ranks)
    if settings.limit is not None:
        table.dataset.data = table.dataset.data.iloc[: settings.limit].copy()
    with lock(files.folder) if ranks.rank == 0 else contextlib.nullcontext():
        parts = row_parts(table.dataset)
        config = run_config(settings, models, parts)
        if ranks.world == 1 and (known := finished(settings, files, config, parts)) is not None:
            return known
        if settings.mode != "eval":
            if ranks.rank == 0:
                start_files(files, config, parts, reuse=settings.reuse, fresh=settings.fresh)
            ranks.wait()
            predict(settings, files, table, parts, models, on_sample)
            ranks.wait()
        if ranks.rank != 0:
            return None
        made = finish(settings, files, table, models, config)
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
        same = {name: config[name] for name in (*_DECISIVE, "rows")}
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
    settings: Settings, models: Models, rows: Table | Mapping[int | str, dict[str, str]]
) -> dict[str, Any]:
    """The resolved configuration, and what tells data (its rows, or their fingerprints) and
    checkpoint apart from others."""
    parts = row_parts(rows.dataset) if isinstance(rows, Table) else rows
    return {
        **settings.as_json(),
        "checkpoint": models.source.name,
        "weights": models.weights,
        "prompts": f"VLMEvalKit {_vlmeval_version()}",
        "rows": digest([[str(index), found] for index, found in parts.items()]),
    }


def _vlmeval_version() -> str | None:
    found = host.versions()
    return found.get("ms-vlmeval") or found.get("vlmeval")


def predict(
    settings: Settings,
    files: Files,
    table: Table,
    parts: Mapping[int | str, dict[str, str]],
    models: Models,
    on_sample: Callable[[], None] | None = None,
) -> None:
    """Make the predictions that are not there, with VLMEvalKit's inference."""
    check_fit(models.source, settings.method)
    torch.manual_seed(settings.seed)
    rank = Ranks.here().rank
    log = files.log(rank)

    def model() -> PrunedVLM:
        limit = settings.max_new_tokens
        return PrunedVLM(loaded=models.loaded, method=settings.method, max_new_tokens=limit)

    rows = RowModel(model, table.dataset, parts, log, on_sample)
    try:
        with terminable(), own_files(), _written(files.folder):
            infer_data_job(
                rows,
                work_dir=str(files.folder),
                model_name=files.name,
                dataset=table.dataset,
                verbose=settings.verbose,
            )
    finally:
        stretch = rows.stretch(rank)
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
    present = set(map(_index, table.dataset.data["index"]))
    samples = [sample for sample in every if sample.index in present]
    with _written(files.folder):
        scores, note = ({}, None) if settings.mode == "infer" else score(files, table.dataset)
    notes = [note] if note else []
    if is_untrained(models.source):
        notes.append(UNTRAINED)
    measured = summarise(samples, stretches)
    answered = [sample for sample in samples if not sample.failed]
    values, missing = metrics.score_all(answered, _references(table.dataset, answered))
    bad = [{"index": row.index, "reason": row.reason} for row in table.bad]
    return Record(
        name=files.name,
        dataset=files.dataset,
        model_path=models.path,
        method=method_as_json(settings.method),
        score=headline(table.dataset, files.dataset, scores, len(samples)),
        scores=scores,
        without_image=table.without_image,
        config=config,
        versions=host.versions(),
        commit=host.commit(),
        note=" ".join(notes) or None,
        metrics=values,
        missing=missing,
        **{**measured, "failed": bad + measured["failed"]},
    )


def _references(dataset: Any, samples: Sequence[Sample]) -> list[list[str]] | None:
    """Right answers of some rows; ``None`` where the data set states none."""
    if "answer" not in dataset.data:
        return None
    answers = dict(zip(map(_index, dataset.data["index"]), dataset.data["answer"], strict=True))
    return [_texts(str(answers[sample.index])) for sample in samples]


def _texts(cell: str) -> list[str]:
    """A text, or a list of texts as Python writes it."""
    if cell.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            return list(map(str, ast.literal_eval(cell))) or [""]
    return [cell]


# -- scores --------------------------------------------------------------------------------------
def score(files: Files, dataset: Any) -> tuple[dict[str, float], str | None]:
    """VLMEvalKit's scores, flat, without a judge model; and a note if it has none."""
    for path in files.scoring_files():  # of other predictions
        path.unlink()
    try:
        with own_files():
            result = dataset.evaluate(str(files.predictions), model="exact_matching")
    except Exception as error:  # data sets fail in many ways without a judge
        return {}, (
            f"VLMEvalKit cannot score {files.dataset} by exact matching ({_one_line(error)}); the "
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
    return flat


def headline(dataset: Any, name: str, scores: dict[str, float], count: int) -> Score | None:
    """The score that a data set is known by."""
    if {"perception", "reasoning"} <= set(scores):
        return Score("perception + reasoning", scores["perception"] + scores["reasoning"])
    if getattr(dataset, "TYPE", "") == "Caption":
        known = "Bleu_4" if name.startswith("Shapes_") else "CIDEr"
        return Score(known, scores[known]) if known in scores else None
    key = "Overall" if "Overall" in scores else next((k for k in scores if _overall(k)), None)
    if key is None or math.isnan(scores[key]):
        return None
    value = scores[key]
    is_choice = getattr(dataset, "TYPE", "") == "MCQ"
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
