"""One model with one method on one data set, through VLMEvalKit's own inference and scoring.

VLMEvalKit hands a model one row after the other and keeps answers in pickles that it writes every
ten rows. Here every answer is also appended to a log as it comes, with what it cost; an
interrupted run goes on from that log, whatever number of processes it had.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import record as records
from vlm_prune_ext.evals.interrupt import terminable
from vlm_prune_ext.evals.precheck import check_fit, is_untrained
from vlm_prune_ext.evals.record import Record, Sample, SampleLog, Score, Sizes, Stretch
from vlm_prune_ext.evals.rows import Table, open_table
from vlm_prune_ext.evals.vlmeval import PrunedVLM, run_name
from vlm_prune_ext.evals.vlmeval_files import own_files
from vlm_prune_ext.experiment import host, measure
from vlm_prune_ext.models import load
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.settings import Settings, method_as_json

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

UNTRAINED = "The weights of this checkpoint are random: scores are those of guessing."

# Settings that change predictions: --reuse goes on only where they are the same.
_DECISIVE = ("method", "seed", "dtype", "attn_implementation", "max_new_tokens", "fast")


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
        dist.init_process_group("nccl" if on_gpu else "gloo")
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


def start_files(files: Files, config: dict[str, Any], *, reuse: bool) -> None:
    """Make the folder ready: empty, or with the answers that are there for VLMEvalKit to find.

    Raises:
        InputError: the folder cannot be written, or what is there was made with other settings.
    """
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        if not reuse:
            _put_away(files.folder)
        elif files.ours("config.json").exists():
            _check_same(files, config)
        samples = collect(files) if reuse else []
        for path in [*files.folder.glob("*.pkl"), files.predictions]:
            path.unlink(missing_ok=True)
        if samples:
            answers = {s.index: s.prediction for s in samples if s.failed is None}
            dump(answers, str(files.folder / f"{files.stem}_PREV.pkl"))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        files.ours("config.json").write_text(text, "utf-8")
    except OSError as error:
        raise InputError(
            f"work_dir: {str(files.folder)!r} cannot be written ({error.strerror}); a folder that "
            "can be made or written is accepted."
        ) from error


def _put_away(folder: Path) -> None:
    """Move an earlier run's files aside (replacing those of the run before it)."""
    old = [path for path in folder.iterdir() if path.name != "previous"]
    if not old:
        return
    aside = folder / "previous"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)


def _check_same(files: Files, config: dict[str, Any]) -> None:
    path = files.ours("config.json")
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is not JSON: run without --reuse to start anew."
        ) from error
    for key in (*_DECISIVE, "checkpoint", "rows"):
        if key == "rows" and None in (before.get(key), config.get(key)):
            continue  # one of them saw the first rows only
        if before.get(key) != config.get(key):
            raise InputError(
                f"--reuse: answers in {str(files.folder)!r} were made with {key}="
                f"{before.get(key)!r}, this run has {config.get(key)!r}: take the same, or run "
                "without --reuse to start anew."
            )


def collect(files: Files) -> list[Sample]:
    """Put the logs of all processes into one, the last line of each row winning."""
    samples: dict[int | str, Sample] = {}
    stretches: list[Stretch] = []
    logs = files.logs()
    for log in logs:
        mine, times = log.read()
        samples.update({sample.index: sample for sample in mine})
        stretches += times
    if samples or stretches:
        files.log().replace([*samples.values(), *stretches])
    for log in logs[1:]:
        log.path.unlink(missing_ok=True)
    return list(samples.values())


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
        model: answers.
        dataset: the data set that rows come from.
        log: takes the lines.
        on_sample: called after every row.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model: PrunedVLM,
        dataset: Any,
        log: SampleLog,
        on_sample: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.inner, self.dataset, self.log, self.on_sample = model, dataset, log, on_sample
        self.sizes = Sizes.of(model.model.config)
        self.index: int | str = 0
        self.answered = 0
        self.warm_up = 3 if model.processor.device.type == "cuda" else 1
        # Else VLMEvalKit would ask the data set itself, and we would not learn which row it is.
        self._dataset_first = getattr(dataset, "force_use_dataset_prompt", False)
        if self._dataset_first:
            dataset.force_use_dataset_prompt = False

    def set_dump_image(self, dump_image_func: Callable[[Any], Any]) -> None:
        """Given by VLMEvalKit: writes a row's images to files."""
        self.inner.set_dump_image(dump_image_func)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Always: that is how rows come by."""
        return True

    def build_prompt(self, line: Any, dataset: str | None = None) -> Any:
        """The row's message, or a :class:`Failure`."""
        index = line["index"]
        self.index = index if isinstance(index, str) else int(index)
        try:
            if not self._dataset_first and self.inner.use_custom_prompt(dataset or ""):
                return self.inner.build_prompt(line, dataset)
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
        sample = self.sizes.sample(self.index, answer, warm_up=self.answered < self.warm_up)
        self.answered += 1
        return self._write(sample)

    def _query(self, message: Any, dataset: str | None) -> Any:
        try:
            return self.inner.query(_items(message), dataset)
        except Exception as error:  # decoders raise whatever they like on damaged files
            return Failure(_one_line(error))

    def _write_failure(self, reason: str) -> str:
        print(f"Row {self.index} failed: {reason}", file=sys.stderr)
        return self._write(Sample(self.index, f"{FAIL_MSG} {reason}", failed=reason))

    def _write(self, sample: Sample) -> str:
        self.log.append(sample)
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
    config = run_config(settings, models, table)
    if settings.mode != "eval":
        if ranks.rank == 0:
            start_files(files, config, reuse=settings.reuse)
        ranks.wait()
        predict(settings, files, table, models, ranks, on_sample)
    if ranks.rank != 0:
        return None
    collect(files)
    made = finish(settings, files, table, models, config)
    made.write(files.ours("results.json"))
    return made


def _open_in_turn(dataset: str, ranks: Ranks) -> Table:
    """The first process downloads or makes what is missing; the others find it there."""
    if ranks.rank != 0:
        ranks.wait()
    table = open_table(dataset)
    if ranks.rank == 0:
        ranks.wait()
    return table


def run_config(settings: Settings, models: Models, table: Table) -> dict[str, Any]:
    """The resolved configuration, and what tells data and checkpoint apart from others."""
    data = table.dataset.data
    columns = [name for name in ("index", "question", "answer") if name in data]
    whole = settings.limit is None
    return {
        **settings.as_json(),
        "checkpoint": models.source.name,
        # With --limit a run may be continued with another limit, so rows are not compared then.
        "rows": int(pd.util.hash_pandas_object(data[columns].astype(str)).sum()) if whole else None,
    }


def predict(
    settings: Settings,
    files: Files,
    table: Table,
    models: Models,
    ranks: Ranks,
    on_sample: Callable[[], None] | None = None,
) -> None:
    """Make the predictions that are not there, with VLMEvalKit's inference."""
    check_fit(models.source, settings.method)
    torch.manual_seed(settings.seed)
    model = PrunedVLM(
        loaded=models.loaded, method=settings.method, max_new_tokens=settings.max_new_tokens
    )
    device = model.processor.device
    log = files.log(ranks.rank)
    rows = RowModel(model, table.dataset, log, on_sample)
    measure.reset_peak(device)
    energy, start = measure.EnergyMeter(device, None), time.perf_counter()
    try:
        with terminable(), own_files():
            infer_data_job(
                rows,
                work_dir=str(files.folder),
                model_name=files.name,
                dataset=table.dataset,
                verbose=settings.verbose,
            )
    finally:
        if rows.answered:
            log.append(
                Stretch(
                    rank=ranks.rank,
                    seconds=time.perf_counter() - start,
                    peak_memory_bytes=measure.peak_memory(device),
                    energy_joules=energy.joules(),
                    hardware=host.hardware(device),
                )
            )
    ranks.wait()


def finish(
    settings: Settings, files: Files, table: Table, models: Models, config: dict[str, Any]
) -> Record:
    """Score the predictions and put the record together."""
    every, stretches = files.log().read()
    present = set(table.dataset.data["index"])
    samples = [sample for sample in every if sample.index in present]
    scores, note = ({}, None) if settings.mode == "infer" else score(files, table.dataset)
    notes = [note] if note else []
    if is_untrained(models.source):
        notes.append(UNTRAINED)
    failed = [{"index": row.index, "reason": row.reason} for row in table.bad]
    failed += [{"index": str(s.index), "reason": s.failed or ""} for s in samples if s.failed]
    energies = [s.energy_joules for s in stretches if s.energy_joules is not None]
    hardware = {json.dumps(s.hardware, sort_keys=True): s.hardware for s in stretches}
    return Record(
        name=files.name,
        dataset=files.dataset,
        model_path=models.path,
        method=method_as_json(settings.method),
        score=headline(table.dataset, files.dataset, scores, len(samples)),
        scores=scores,
        samples=len(samples),
        failed=failed,
        without_image=table.without_image,
        visual_tokens=records.layer_groups(samples),
        flops=records.mean_flops(samples),
        seconds=records.timing(samples),
        peak_memory_bytes=max((s.peak_memory_bytes for s in stretches), default=None),
        energy_joules=sum(energies) if energies else None,
        wall_seconds=sum(s.seconds for s in stretches),
        config=config,
        versions=host.versions(),
        commit=host.commit(),
        hardware=list(hardware.values()),
        note=" ".join(notes) or None,
    )


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
