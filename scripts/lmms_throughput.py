"""Throughput of our lmms-eval models against lmms-eval's own ``llava_hf``, in one process.

    python scripts/lmms_throughput.py --samples 32

Both answer the same requests of the same task with the same weights (ours from the original-format
checkpoint, theirs from its Hugging Face conversion), after a warm-up each. ``llava_hf`` takes one
sample at a time; that is all it can do. Wall time is what counts on an idle machine, processor
time what can be compared on a busy one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager, get_task_dict

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.evals.lmms_launch import TASKS
from vlm_prune_ext.models.convert import convert_to_hf

RUNS = (
    ("llava_hf", "", 1),
    ("llava_baseline", "", 1),
    ("llava_baseline", "", 16),
    ("llava_fastv", "attention_rank=100", 16),
)


def requests_of(task: str, count: int) -> tuple[list[Any], dict[str, Any]]:
    """The first requests of a task in the simple interface, and its data."""
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
    made = get_task_dict([task], manager, "simple")[task]
    made.set_config(key="num_fewshot", value=0)
    made.build_all_requests(limit=count, rank=0, world_size=1)
    return made.instances, {task: made.dataset}


def fresh(requests: list[Any]) -> list[Any]:
    """The same requests; llava_hf changes the generation arguments of those it is given."""
    copies = []
    for request in requests:
        text, given, *rest = request.arguments
        copy = type(request)(
            request_type=request.request_type,
            arguments=(text, deepcopy(given), *rest),
            idx=request.idx,
            metadata=request.metadata,
        )
        copies.append(copy)
    return copies


def measure(
    model: str, settings: str, batch: int, requests: list[Any], data: dict[str, Any]
) -> tuple[list[str], float, float]:
    """Answers, wall seconds and processor seconds of one model."""
    lm = get_model(model, True).create_from_arg_string(
        settings, {"batch_size": batch, "device": "cpu"}
    )
    lm.task_dict = data
    list(lm.generate_until(fresh(requests[: min(batch, 2)])))
    wall, cpu = time.perf_counter(), time.process_time()
    answers = list(lm.generate_until(fresh(requests)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [getattr(answer, "text", answer).strip() for answer in answers], wall, cpu


def main() -> None:
    """Run all of :data:`RUNS` and print a table; ratios are to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--task", default="shapes_mcq")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    requests, data = requests_of(args.task, args.samples)
    base: tuple[list[str], float, float] | None = None
    print(f"{args.samples} samples of {args.task}, {args.threads} thread(s)")
    head = ("batch", 6), ("samples/s", 11), ("ratio", 8), ("CPU s/sample", 14), ("ratio", 8)
    print("model".ljust(34) + "".join(name.rjust(width) for name, width in head) + "  same")
    with tempfile.TemporaryDirectory() as folder:
        converted = convert_to_hf(CHECKPOINT, Path(folder) / "hf")
        for model, settings, batch in RUNS:
            given = settings
            if model == "llava_hf":
                given = f"pretrained={converted},device_map=cpu,dtype=float32"
            answers, wall, cpu = measure(model, given, batch, requests, data)
            if base is None:
                base = answers, wall, cpu
            same = sum(a == b for a, b in zip(answers, base[0], strict=True))
            count = len(answers)
            print(
                f"{model + ' ' + settings:34}{batch:6}{count / wall:11.2f}{base[1] / wall:8.2f}"
                f"{cpu / count:14.3f}{base[2] / cpu:8.2f}  {same}/{count}",
                flush=True,
            )


if __name__ == "__main__":
    main()
