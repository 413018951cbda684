"""One data set through both frameworks as a user runs it, timed: samples a second, and where the
time of a sample goes."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.feed import Spent, watched
from vlm_prune_ext.experiment.settings import Settings
from vlm_prune_ext.methods.base import Method

TASK = "pictures"


@dataclass
class Run:
    """One run.

    Attributes:
        framework, method: which.
        rows, failed: of the data set.
        seconds: of the whole run: data, answers, results.
        answering: seconds from the first row's preparation to the last answer.
        samples_per_second: rows over ``answering``.
        steady: the same over the second half of the rows.
        largest_batch: of all.
        gpu_busy: share of ``answering`` in which a kernel ran, by NVML's sampling (its ``gpu``
            utilisation, read 20 times a second); ``None`` without it.
        in_model: share of ``answering`` in which the model was asked.
        split: seconds of a sample, mean: ``read`` (row to question), ``open`` (pictures, with
            padding, resizing, normalising) and ``tokenise`` in threads; ``wait`` for these,
            ``prefill``, ``decode``, ``around`` generate, and the ``framework``'s own.
        fast: share of the rows on the fast path.
        prefill_flops: of a row without sharing, language model and tower, mean.
        error: why there are no figures.
    """

    framework: str
    method: str
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0
    answering: float = 0.0
    samples_per_second: float = 0.0
    steady: float = 0.0
    largest_batch: int = 1
    gpu_busy: float | None = None
    in_model: float = 0.0
    split: dict[str, float] = field(default_factory=dict)
    fast: float = 0.0
    prefill_flops: float | None = None
    error: str | None = None


def vlmeval(settings: Settings, data: str, models: Any) -> Run:
    """A run as ``run_vlmeval.py --mode infer`` makes it.

    Args:
        settings: with method and folder.
        data: name of the data set.
        models: :class:`vlm_prune_ext.evals.vlmeval_run.Models`, which load once.
    """
    from vlm_prune_ext.evals.vlmeval_run import run_dataset

    made: list[Any] = []
    settings = replace(settings, mode="infer", fresh=True, data=(data,))
    models.loaded  # noqa: B018  # not part of the run
    run = _timed(
        "VLMEvalKit", settings.method, lambda: made.append(run_dataset(settings, data, models))
    )
    if made and made[0].flops is not None:
        flops = made[0].flops
        run.prefill_flops = flops.prefill + (flops.vision or 0.0)
    return run


def lmms(answerer: Answerer, folder: Path, batch_size: int | str | None, rows: int) -> Run:
    """A run as ``python -m lmms_eval`` makes it, with a model that is there already.

    Args:
        answerer: answers.
        folder: of the task's file.
        batch_size: as ``--batch_size``; ``None``: ``auto`` on a GPU, else 1.
        rows: the first ones.
    """
    from vlm_prune_ext.evals.lmms import PruneModel

    if batch_size is None:
        batch_size = "auto" if answerer.processor.device.type == "cuda" else 1
    model = PruneModel(batch_size=batch_size, answerer=answerer)
    return _timed("lmms-eval", answerer.method, lambda: _evaluate(model, folder, rows))


def lmms_own(path: str, device: torch.device, folder: Path, rows: int) -> Run:
    """lmms-eval's own ``llava_hf``, one row at a time, which is what it does."""
    run = Run("lmms-eval llava_hf", "none")
    try:
        from lmms_eval.models import get_model

        dtype = "bfloat16" if device.type == "cuda" else "float32"
        given = f"pretrained={path},device_map={device.type},dtype={dtype}"
        options = {"batch_size": 1, "device": str(device)}
        model = get_model("llava_hf", True).create_from_arg_string(given, options)
        answer, took = model.generate_until, list[float]()

        def timed(requests: Any) -> Any:
            start = time.perf_counter()
            made = answer(requests)
            took.append(time.perf_counter() - start)
            return made

        model.generate_until = timed
        start = time.perf_counter()
        _evaluate(model, folder, rows)
        run.seconds, run.answering = time.perf_counter() - start, sum(took)
        run.rows, run.samples_per_second = rows, rows / run.answering
    except Exception as error:  # another package's model, which may not load at all
        run.error = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return run


def _evaluate(model: Any, folder: Path, rows: int) -> None:
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False)
    evaluator.simple_evaluate(
        model=model,
        tasks=[TASK],
        limit=rows,
        task_manager=manager,
        cli_args=Namespace(process_with_media=False, output_path=None),
        bootstrap_iters=0,
    )


def _timed(framework: str, method: Method | None, call: Callable[[], Any]) -> Run:
    run = Run(framework, method.label() if method is not None else "none")
    start = time.perf_counter()
    with watched() as spent, _busy() as samples:
        call()
    run.seconds = time.perf_counter() - start
    if not spent.batches:
        run.error = "nothing was answered"
        return run
    _fill(run, spent, samples)
    return run


def _fill(run: Run, spent: Spent, samples: Mapping[float, int]) -> None:
    run.rows = sum(size for _, size in spent.batches)
    run.failed, run.largest_batch = spent.failed, max(size for _, size in spent.batches)
    last = spent.batches[-1][0]
    run.answering = last - spent.start
    run.samples_per_second = run.rows / run.answering
    middle, done = spent.start, 0
    for end, size in spent.batches:
        if 2 * done >= run.rows:
            break
        middle, done = end, done + size
    left = run.rows - done
    run.steady = left / (last - middle) if left else run.samples_per_second
    within = [busy for moment, busy in samples.items() if spent.start <= moment <= last]
    run.gpu_busy = sum(within) / len(within) / 100 if within else None
    run.in_model = spent.asked / run.answering
    parts = {
        "read": spent.read,
        "open": spent.opened,
        "tokenise": spent.tokenised,
        "wait": spent.waited,
        "prefill": spent.prefill,
        "decode": spent.decode,
        "around": spent.asked - spent.prefill - spent.decode,
        "framework": run.answering - spent.waited - spent.blocked,
    }
    run.split = {name: seconds / run.rows for name, seconds in parts.items()}
    run.fast = spent.fast / run.rows


@contextlib.contextmanager
def _busy() -> Iterator[dict[float, int]]:
    """Moment -> percent of the time before it in which the GPU ran a kernel."""
    found: dict[float, int] = {}
    stop = threading.Event()
    thread = None
    with contextlib.suppress(Exception):  # no GPU, or no NVML
        import pynvml

        pynvml.nvmlInit()
        bus = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bus}")

        def look() -> None:
            while not stop.wait(0.05):
                found[time.perf_counter()] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        if thread is not None:
            thread.join()


# -- the data --------------------------------------------------------------------------------------
_THINGS = "dog cat person cup spoon table chair car tree book phone bottle laptop bird boat"


def write_data(folder: Path, pictures: int, questions: int) -> int:
    """A data set in the manner of POPE: pictures like photographs (JPEG, 640 x 480 or 480 x 640,
    about 90 kB), several questions about each, in rounds, so that rows with one picture are far
    from each other. Both for VLMEvalKit (``pictures.tsv``) and lmms-eval (``pictures.yaml``).

    Returns:
        rows.
    """
    import base64
    import csv

    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    shown = [_picture(seed) for seed in range(pictures)]
    things = _THINGS.split()
    rows: list[dict[str, Any]] = []
    for number in range(questions):
        for picture in range(pictures):
            thing = f"{things[(picture + number) % len(things)]}{number // len(things) or ''}"
            text = f"Is there a {thing} in the image? Please answer yes or no."
            rows.append({"index": len(rows), "question": text, "picture": picture})
    with (folder / f"{TASK}.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for row in rows:  # the first row of a picture has it, the others name that row
            first = row["index"] < pictures
            image = base64.b64encode(shown[row["picture"]]).decode() if first else row["picture"]
            table.writerow([row["index"], image, row["question"], "Yes"])
    made = datasets.Dataset.from_list(
        [
            {"question": row["question"], "image": {"bytes": shown[row["picture"]], "path": None}}
            for row in rows
        ]
    )
    made.cast_column("image", datasets.Image()).to_parquet(str(folder / f"{TASK}.parquet"))
    (folder / "task.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n\n"
        "def nothing(doc, results):\n    return {'answered': 1.0}\n"
    )
    (folder / f"{TASK}.yaml").write_text(
        f"""task: {TASK}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder.resolve() / TASK}.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function task.visual
doc_to_text: !function task.text
doc_to_target: question
process_results: !function task.nothing
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: answered
    aggregation: mean
    higher_is_better: true
"""
    )
    return len(rows)


def _picture(seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    size = (640, 480) if seed % 3 else (480, 640)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    areas = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-12, 13, areas.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((areas + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
