"""Compare methods at budgets, on one model or several, on any data: one command, one table.

    vlm-prune sweep --method fastv random --budget 0.5 0.25 0.1 --data Shapes_MCQ Shapes_VQA

Every model with every method at every budget on every data set; the unpruned model is always among
them. Each checkpoint is loaded once per process. A start with the same --out goes on where the last
one ended, however it ended. OUT has sweep.csv, .md, .html, .json and .png, and a folder per cell as
run_vlmeval.py makes it. A method that cannot have a budget costs its cell, not the sweep.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import METHOD_HELP, MODEL, add_options

SHARED = ("data", "limit", "batch_size", "max_new_tokens", "seed", "fresh", *MODEL[1:])
"""Settings that all cells share."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "--model", "--model-path", nargs="+", metavar="NAME_OR_PATH", help="default: the demo model"
    )
    add("--method", nargs="+", required=True, metavar="NAME[:BUDGET]", help=METHOD_HELP)
    add("--budget", nargs="+", default=[], metavar="N", help="visual tokens, or ratios such as 0.5")
    add("--out", default="outputs_sweep", metavar="DIR", help="default: outputs_sweep")
    add("--workers", type=int, metavar="N", help="processes (default: one per GPU, 2 on a CPU)")
    add_options(parser, SHARED)


def run(args: argparse.Namespace) -> int:
    """Run the sweep."""
    from vlm_prune_ext.evals import sweep
    from vlm_prune_ext.evals.names import SHAPES, check_by_sight, keep_out_of_lmudata
    from vlm_prune_ext.experiment.settings import Settings

    start = time.perf_counter()
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers} is not valid: an integer of at least 1.")
    choices = sweep.choices_of(["none", *args.method], args.budget)
    data = tuple(dict.fromkeys(args.data or SHAPES))
    for name in data:
        check_by_sight(name)
    if set(data) <= set(SHAPES):
        keep_out_of_lmudata()
    stated = {name: getattr(args, name) for name in SHARED}
    stated = {name: value for name, value in stated.items() if value is not None}
    base = Settings(**{**stated, "data": data, "work_dir": args.out})
    models = [None if name == "demo" else name for name in args.model or ["demo"]]
    made = sweep.plan(base, list(dict.fromkeys(models)), choices)
    shown = sweep.Shown({name: name for name in data})
    lines = sweep.carry_out(made, Path(args.out), args.workers, shown)
    return sweep.finish(lines, Path(args.out), shown, start)
