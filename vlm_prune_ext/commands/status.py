"""Where a sweep stands, from another terminal or machine: reads its files, disturbs nothing.

    vlm-prune status outputs_sweep

Cells done, running, failed and skipped, the scores so far, rows per second and the time left.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="what vlm-prune sweep --out named")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from vlm_prune_ext.experiment.comparison import failures, summary_table
    from vlm_prune_ext.experiment.results import read
    from vlm_prune_ext.experiment.status import status_of

    results = read(Path(args.folder))
    if results.done:
        summary_table(results).show(boxed=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    print(status_of(results, now).text())
    for line in failures(results):
        print(line)
    return 0
