"""Compare methods at budgets, on one model or several, on any data: one command, one table.

    vlm-prune sweep --method fastv pdrop --budget 0.5 0.25 0.1 --data Shapes_MCQ ./mine.tsv

Every model with every method at every budget on every data set; the unpruned model is always among
them, and so are random dropping and downsampling at each budget. Each checkpoint is loaded once per
process. A start with the same --out goes on where the last one ended, however it ended; vlm-prune
status OUT says meanwhile where it stands. OUT has sweep.csv, .md, .tex, .json, .png and .pdf, one
page, index.html (vlm-prune show makes them again), and a folder per cell as run_vlmeval.py makes
it. A method that cannot have a budget costs its cell, not the sweep. Under torchrun or accelerate,
and with --launcher ray, processes elsewhere share the cells.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.choices import BY, check_names
from vlm_prune_ext.experiment.settings import CONVENTIONS, METHOD_HELP, MODEL, add_options

if TYPE_CHECKING:
    from vlm_prune_ext.evals.choices import Choice

SHARED = (
    *("data", "limit", "batch_size", "max_new_tokens", "keep_positions", "seed", "fresh"),
    *MODEL[1:],
)
"""Settings that all cells share."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "--model", "--model-path", nargs="+", metavar="NAME_OR_PATH", help="default: the demo model"
    )
    add("--method", nargs="+", required=True, metavar="NAME[:BUDGET]", help=METHOD_HELP)
    add("--budget", nargs="+", default=[], metavar="N", help="visual tokens, or ratios such as 0.5")
    add(
        "--budget-by",
        choices=BY,
        help="what a budget is for all methods: visual tokens behind the last drop, their mean "
        "over layers, or FLOPs (default: what each method's short form means by it)",
    )
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="random and downsample at each budget (default: yes)",
    )
    add("--seeds", nargs="+", type=int, default=[], metavar="N", help="of methods that draw lots")
    add(
        "--flops-convention",
        choices=CONVENTIONS,
        default="ours",
        help="how FLOPs are counted in two columns: as this package does, or as a paper does",
    )
    add("--out", default="outputs_sweep", metavar="DIR", help="default: outputs_sweep")
    add("--workers", type=int, metavar="N", help="processes (default: one per GPU, 2 on a CPU)")
    add(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="parts of each cell's rows that are answered side by side (default: 1)",
    )
    add("--launcher", choices=("local", "ray"), default="local", help="default: local")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster (default: the environment's)")
    add_options(parser, SHARED)


def run(args: argparse.Namespace) -> int:
    """Run the sweep."""
    start = time.perf_counter()
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers} is not valid: an integer of at least 1.")
    if args.shards < 1:
        raise InputError(f"--shards {args.shards} is not valid: an integer of at least 1.")
    if args.budget_by and not args.budget:
        raise InputError(f"--budget-by {args.budget_by} needs --budget: tokens, or ratios.")
    if args.launcher == "ray":
        from vlm_prune_ext.experiment.cluster import needs_ray

        needs_ray()
    wrong = [_why(check_names, args.method), _why(_check_data, args.data)]
    if any(wrong):
        raise InputError("\n".join(filter(None, wrong)))

    from vlm_prune_ext.evals import sweep
    from vlm_prune_ext.evals.choices import choices_of
    from vlm_prune_ext.evals.names import SHAPES, is_ours, keep_out_of_lmudata
    from vlm_prune_ext.evals.precheck import prompt_of
    from vlm_prune_ext.experiment.budgets import solve
    from vlm_prune_ext.experiment.report import say, terminal_text
    from vlm_prune_ext.experiment.settings import Settings
    from vlm_prune_ext.pages.show import write_page

    data = tuple(dict.fromkeys(args.data or SHAPES))
    if all(map(is_ours, data)):
        keep_out_of_lmudata()
    stated = {name: getattr(args, name) for name in SHARED}
    stated = {name: value for name, value in stated.items() if value is not None}
    base = Settings(**{**stated, "data": data, "work_dir": args.out})

    def choices(source: Any) -> list[Choice]:
        prompt = prompt_of(source) if args.budget_by else None
        return choices_of(
            ["none", *args.method],
            args.budget,
            controls=args.controls,
            seeds=args.seeds or [base.seed],
            solve=(lambda cls, n: solve(cls, n, args.budget_by, prompt)) if prompt else None,
        )

    models = [None if name == "demo" else name for name in args.model or ["demo"]]
    made = sweep.plan(base, list(dict.fromkeys(models)), choices)
    launch = sweep.Launch(args.workers, args.launcher, args.address, args.shards)
    results = sweep.carry_out(made, Path(args.out), launch, settings=vars(args))
    if results is None:
        return 0
    code = sweep.finish(results, start)
    try:
        print(f"Page: {terminal_text(write_page(results))}")
    except InputError as error:  # the extra is not installed: all else is there
        say(error, error=True)
    return code


def _why(check: Callable[[Any], None], value: Any) -> str:
    try:
        check(value)
    except InputError as error:
        return str(error)
    return ""


def _check_data(names: Sequence[str] | None) -> None:
    from vlm_prune_ext.evals.names import check_by_sight

    wrong = [said for name in names or () if (said := _why(check_by_sight, name))]
    if wrong:
        raise InputError("\n".join(wrong))
