"""Latency, energy, FLOPs, memory and answers of a grid of settings, as tables, plots and pages.

Every axis takes several values, and all combinations are measured. The log (OUT/cells.jsonl) has
one line a cell; the same command started again measures only what is missing. Reports are in
OUT/pretty_results: a page a model, index.md, and index.html, which holds everything.

  vlm-prune profile --src-folder data/demo --img-size 224 336 --batch-size 1 4 \\
      --cached --no-cached --method none fastv:100 fastv:32
  vlm-prune profile --src-folder data/coco --model-name llava-hf/llava-1.5-7b-hf --device cuda \\
      --optimization fp16 int8 int4 --method none fastv:100
  vlm-prune profile --src-folder data/coco --config configs/profile_study.yaml

What the figures are:
  latency    of a whole generate call on a prepared batch, waited for at its end; the median, p10
             and p90 of all batches x --repeat, inputs of that shape having run before
  TTFT       time to first token; vision: of it, the vision tower and projector; prefill: the rest
  TPOT       time per output token: of decoding, per step of the batch
  energy     joules per example: NVML's counter on a GPU, RAPL on a CPU where it can be read;
             empty where nothing counts
  FLOPs      per example until the first new token, counted by torch; beside it by formula
  --img-size      pictures are resized to N x N before the model's own processor sees them. Models
                  with a fixed input (LLaVA-1.5: 336) resize again: look at the visual tokens
  --max-input-len text tokens of the prompt, template included: longer questions lose words at
                  their end, shorter prompts get padding in front, which attention does not see
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import FRESH_HELP, METHOD_HELP, TRUST_HELP
from vlm_prune_ext.errors import InputError

if TYPE_CHECKING:
    from vlm_prune_ext.experiment.grid import Line

OPTIMIZATIONS = "fp32 fp16 bf16 int8 int4, flash sdpa eager, compile fast; joined as in bf16+eager"
_AXES = ("model_name", "device", "optimization", "img_size", "max_input_len", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--data", "--src-folder", dest="src_folder", metavar="DIR", help="images/ and data.csv"
    )
    parser.add_argument("--config", metavar="FILE", help=".yaml or .json with the same settings")
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="let --config name code to run (package.module:function)",
    )
    parser.add_argument(
        "--out", default="outputs_profile", metavar="DIR", help="default: outputs_profile"
    )
    parser.add_argument("--fresh", action="store_true", help=FRESH_HELP)
    axes = {
        "model-name": (
            "NAME",
            "folders, repositories, short names, random:llava-1.5-7b (default: demo)",
        ),
        "img-size": ("N", "pixels a side, or none (default: pictures as they are)"),
        "batch-size": ("N", "default: 1"),
        "optimization": ("NAME", f"{OPTIMIZATIONS} (default: as the checkpoint, fp32 on a CPU)"),
        "device": ("DEVICE", "cpu, cuda, cuda:1 (default: as found)"),
        "max-input-len": ("N", "text tokens, or none (default: prompts as they are)"),
        "method": ("NAME", f"none, or {METHOD_HELP}"),
    }
    for name, (metavar, text) in axes.items():
        flags = ("--model", "--model-name") if name == "model-name" else (f"--{name}",)
        dest = name.replace("-", "_")
        parser.add_argument(
            *flags, dest=dest, nargs="+", action="extend", metavar=metavar, help=text
        )
    for flag, value in (("--cached", True), ("--no-cached", False)):
        text = "with a KV cache (default)" if value else "without; both may be given"
        parser.add_argument(flag, action="append_const", const=value, dest="cached", help=text)
    numbers = {
        "samples": "examples, the first ones (default: all)",
        "repeat": "timed runs of each batch (default: 3)",
        "warmup": "runs in front of the first batch (default: 1)",
        "max-new-tokens": "limit of an answer (default: 32)",
        "seed": "default: 0",
        "energy-seconds": "least time that energy is measured over (default: 5; 0: not at all)",
    }
    for name, text in numbers.items():
        flags = ("--limit", "--samples") if name == "samples" else (f"--{name}",)
        parser.add_argument(*flags, dest=name.replace("-", "_"), metavar="N", help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    parser.add_argument(
        "--report-only", action="store_true", help="write the reports of what is in the log"
    )


def run(args: argparse.Namespace) -> int:
    """Measure the grid and write its reports."""
    out = Path(args.out)
    if args.report_only:
        return _report(out)
    settings, source = _settings(args)
    from vlm_prune_ext.commands.common import quiet_transformers
    from vlm_prune_ext.profiling.data import read_folder
    from vlm_prune_ext.profiling.grid import plan
    from vlm_prune_ext.profiling.runner import cells_of, resolved, run_cells

    quiet_transformers()
    chosen = resolved(plan(settings))
    folder = read_folder(source, chosen.shared["samples"])
    for failure in folder.failures:
        _say(f"Left out: {failure}")
    outcome = run_cells(
        cells_of(chosen, folder),
        folder,
        out,
        _track,
        _say,
        trust_remote_code=args.trust_remote_code,
        fresh=args.fresh,
    )
    code = _report(out)
    print(
        f"{outcome.done} cells measured, {outcome.before} were there, {len(outcome.failed)} failed"
    )
    return 1 if outcome.failed or folder.failures else code


def _settings(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Settings of the file, those of the command line over them, and the folder of examples."""
    from vlm_prune_ext.experiment.settings import read_file

    settings = read_file(args.config, allow_code=args.allow_code) if args.config else {}
    names = (*_AXES, "method", "cached", "samples", "repeat", "warmup", "max_new_tokens", "seed")
    for name in (*names, "energy_seconds"):
        value = getattr(args, name)
        if value is not None:
            settings[name] = value
    source = args.src_folder or settings.get("src_folder")
    settings.pop("src_folder", None)
    if not isinstance(source, str):
        raise InputError(
            "--src-folder is needed: a folder with images/ and data.csv (vlm-prune profile-data "
            "makes one)."
        )
    return settings, source


def _track(lines: Iterator[Line], total: int, done: int) -> Iterator[Line]:
    from vlm_prune_ext.commands.terminal import track

    return track(lines, "cells", total=total, done=done)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(out: Path) -> int:
    from vlm_prune_ext.profiling.report import console_tables, write_reports

    pages = write_reports(out)
    for table in console_tables(out):
        table.show()
    for path in pages:
        print(path)
    return 0
