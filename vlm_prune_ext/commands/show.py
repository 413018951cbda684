"""Make a sweep's tables, plots and page again, from its result files alone.

    vlm-prune show outputs_sweep --format md csv tex json png pdf

Tables (sweep.md, .csv, .json: all runs with intervals and paired tests; sweep.tex: one row per
setting, with booktabs; sweep_pairs and sweep_categories beside them) and Pareto plots against
visual tokens, FLOPs, time to first token and joules, where these were measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_prune_ext.experiment.report import terminal_text
from vlm_prune_ext.experiment.settings import CONVENTIONS

FORMATS = ("md", "csv", "tex", "json", "png", "pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="what vlm-prune sweep --out named")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all of them"
    )
    parser.add_argument(
        "--flops-convention",
        choices=CONVENTIONS,
        help="how FLOPs are counted in two columns (default: as the sweep was told, else ours)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the files; their names go to standard output."""
    from vlm_prune_ext.experiment import results, show

    found = results.read(Path(args.folder))
    for path in show.write(found, args.format, convention=args.flops_convention):
        print(terminal_text(path))
    return 0
