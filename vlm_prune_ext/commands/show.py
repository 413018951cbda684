"""Make a sweep's page, tables and plots, from its result files alone.

    vlm-prune show outputs_sweep
    vlm-prune show outputs_sweep --format html md csv tex json png pdf

The page (index.html) is one file that needs no network: the Pareto figure, the table of all runs,
and every row's picture, answers and kept patches. Tables: sweep.md, .csv, .json with intervals and
paired tests of all runs; sweep.tex with one row per setting, with booktabs; sweep_pairs and
sweep_categories beside them. Pareto plots: against visual tokens, FLOPs, time to first token and
joules, where these were measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_prune_ext.experiment.report import terminal_text
from vlm_prune_ext.experiment.settings import CONVENTIONS

FORMATS = ("html", "md", "csv", "tex", "json", "png", "pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="what vlm-prune sweep --out named")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=["html"], help="default: html"
    )
    parser.add_argument(
        "--flops-convention",
        choices=CONVENTIONS,
        help="how FLOPs are counted in two columns (default: as the sweep was told, else ours)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the files; their names go to standard output."""
    from vlm_prune_ext.experiment import results, show
    from vlm_prune_ext.pages.show import write_page

    found = results.read(Path(args.folder))
    pages = [write_page(found)] if "html" in args.format else []
    for path in pages + show.write(found, args.format, convention=args.flops_convention):
        print(terminal_text(path))
    return 0
