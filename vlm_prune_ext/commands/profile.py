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
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import add_config, add_options, read_file
from vlm_prune_ext.profiling.grid import ProfileSettings

if TYPE_CHECKING:
    from vlm_prune_ext.experiment.grid import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = [one.name for one in fields(ProfileSettings) if one.name != "cached"]
    add_options(parser, names, ProfileSettings)
    for flag, value in (("--cached", True), ("--no-cached", False)):
        text = "with a KV cache (default)" if value else "without; both may be given"
        parser.add_argument(flag, action="append_const", const=value, dest="cached", help=text)
    add_config(parser)
    parser.add_argument(
        "--report-only", action="store_true", help="write the reports of what is in the log"
    )


def run(args: argparse.Namespace) -> int:
    """Measure the grid and write its reports."""
    if args.report_only:
        return _report(Path(args.out or ProfileSettings.out))
    file = read_file(args.config, allow_code=args.allow_code) if args.config else {}
    said = ProfileSettings.of(vars(args), file)
    source = said.src_folder
    if source is None:
        raise InputError(
            "--src-folder is needed: a folder with images/ and data.csv (vlm-prune profile-data "
            "makes one)."
        )
    from vlm_prune_ext.commands.common import quiet_transformers
    from vlm_prune_ext.profiling.data import read_folder
    from vlm_prune_ext.profiling.runner import cells_of, resolved, run_cells

    quiet_transformers()
    said, out = resolved(said), Path(said.out)
    folder = read_folder(source, said.samples)
    for row in folder.skipped:
        _say(f"Left out: {row}")
    cells = cells_of(said, folder)
    outcome = run_cells(cells, folder, out, _track, _say, load=said.load(), fresh=said.fresh)
    code = _report(out)
    print(
        f"{outcome.done} cells measured, {outcome.before} were there, {len(outcome.failed)} failed"
    )
    return 1 if outcome.failed or folder.skipped else code


def _track(lines: Iterator[Line], total: int, done: int) -> Iterator[Line]:
    from vlm_prune_ext.commands.common import track

    return track(lines, "cells", total=total, done=done)


def _say(line: str) -> None:
    say(line, error=True)


def _report(out: Path) -> int:
    from vlm_prune_ext.profiling.report import console_tables, write_reports

    pages = write_reports(out)
    for table in console_tables(out):
        table.show()
    for path in pages:
        print(path)
    return 0
