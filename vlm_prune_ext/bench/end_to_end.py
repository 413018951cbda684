"""Rows a second as a user of either framework gets them, and where the time goes.

A made-up data set in the manner of POPE (pictures like photographs, several short questions about
each, answers of four tokens at most) goes through VLMEvalKit and lmms-eval, each as its own command
runs it, and through lmms-eval's own LLaVA where that loads.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_prune_ext.bench.shapes import SHAPES
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.throughput import TASK, Run, lmms, lmms_own, vlmeval, write_data
from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.log import write_json
from vlm_prune_ext.experiment.measure import measure_roofline
from vlm_prune_ext.experiment.report import Figure, Table, write_table
from vlm_prune_ext.experiment.settings import Settings
from vlm_prune_ext.methods.base import Method

NEW_TOKENS = 4
OWN_ROWS = 64  # of a model that answers one at a time


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        path: of the checkpoint, in Hugging Face's format for ``own``.
        methods: ``None`` is the baseline.
        rows: at least; every picture gets all its questions.
        questions: about each picture.
        batch_size: see :class:`~vlm_prune_ext.experiment.settings.Settings`.
        device, dtype: of the model.
        own: lmms-eval's own model as well.
    """

    path: str
    methods: Sequence[Method | None]
    rows: int
    questions: int
    batch_size: int | str | None
    device: str | None
    dtype: str | None
    own: bool


def run(plan: Plan, folder: Path) -> list[Run]:
    """Run everything, print a table and write ``runs.json`` after each run.

    Returns:
        the runs; those that failed say why.
    """
    data = folder / "data"
    os.environ["LMUData"] = str(data.resolve())  # noqa: SIM112  # VLMEvalKit's name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vlm_prune_ext.evals.names import import_quietly

    import_quietly()
    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.evals.vlmeval_run import Models

    pictures = -(-plan.rows // plan.questions)
    rows = write_data(data, pictures, plan.questions)
    settings = Settings(
        model_path=plan.path,
        device=plan.device,
        dtype=plan.dtype,
        batch_size=plan.batch_size,
        max_new_tokens=NEW_TOKENS,
        work_dir=str(folder / "answers"),
    )
    models = Models(settings)
    model, processor = models.loaded
    roofline = measure_roofline(processor.device, processor.dtype)
    header = {
        "data": {"rows": rows, "pictures": pictures, "questions": plan.questions},
        "new_tokens": NEW_TOKENS,
        "ceilings": asdict(roofline),
        **host.origin(processor.device),
    }
    runs: list[Run] = []

    def note(one: Run) -> None:
        runs.append(one)
        said = f"{one.samples_per_second:.1f} samples/s" if one.error is None else one.error
        print(f"{one.framework}, {one.method}: {said}", file=sys.stderr, flush=True)
        write_json(folder / "runs.json", {**header, "runs": [asdict(run) for run in runs]})

    for method in plan.methods:
        one = vlmeval(replace(settings, method=method), TASK, models)
        note(one)
        other = lmms(Answerer(model, processor, method), data, plan.batch_size, rows)
        other.prefill_flops = one.prefill_flops  # of the same prompts but for their wording
        note(other)
    if plan.own:
        note(lmms_own(plan.path, processor.device, data, min(rows, OWN_ROWS)))
    table = table_of(runs, roofline.flops)
    table.show()
    write_table(folder, "end_to_end", table)
    print(
        f"{rows} rows, {pictures} pictures; floor: arithmetic of whole prompts, nothing shared. "
        "ms of a sample: read, open and tokenise in threads, the others one after the other."
    )
    return runs


_PARTS = ("read", "open", "tokenise", "wait", "prefill", "decode", "around", "framework")
FIGURES = (
    Figure("framework", left=True, path="framework"),
    Figure("method", left=True, path="method"),
    Figure("rows", 0, path="rows"),
    Figure("samples/s", 1, path="samples_per_second"),
    Figure("second half", 1, path="steady"),
    Figure("seconds in all", 1, path="seconds"),
    Figure("batch", 0, path="largest_batch"),
    Figure("GPU busy", 0, unit=" %", path="gpu_busy", scale=100),
    Figure("in model", 0, unit=" %", path="in_model", scale=100),
    *(Figure(f"{name} ms", 2, path=f"split.{name}", scale=1e3) for name in _PARTS),
    Figure("floor ms", 2, path="floor", scale=1e3),
    Figure("why not", left=True, path="error"),
)


def table_of(runs: Sequence[Run], flops: float) -> Table:
    """A row per run; ``flops``: of the device, per second."""
    floors = [one.prefill_flops / flops if one.prefill_flops else None for one in runs]
    results = [{**asdict(one), "floor": floor} for one, floor in zip(runs, floors, strict=True)]
    return Table.of(FIGURES, results, title="End to end")


def random_checkpoint(shape: str, folder: Path, device: torch.device) -> Path:
    """A LLaVA-1.5 of a published shape with random weights, in Hugging Face's format, with the
    demo's tokenizer and picture settings: what speed depends on.

    Raises:
        InputError: another shape.
    """
    from transformers import AutoConfig, LlavaForConditionalGeneration

    from vlm_prune_ext.models.convert import convert_to_hf

    if not shape.startswith("llava-1.5"):
        known = ", ".join(name for name in SHAPES if name.startswith("llava-1.5"))
        raise InputError(f"--shape {shape} is not valid with --end-to-end: {known}.")
    if (folder / "config.json").is_file():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    convert_to_hf(CHECKPOINT, part)
    config: Any = AutoConfig.from_pretrained(part)
    wanted: Any = SHAPES[shape]()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
        setattr(config.text_config, name, getattr(wanted.text_config, name))
    config.text_config.head_dim = (
        config.text_config.hidden_size // wanted.text_config.num_attention_heads
    )
    for name in sizes:
        setattr(config.vision_config, name, getattr(wanted.vision_config, name))
    for weights in part.glob("*.safetensors*"):
        weights.unlink()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        made = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    made.save_pretrained(part, max_shard_size="5GB")
    part.rename(folder)
    return folder
