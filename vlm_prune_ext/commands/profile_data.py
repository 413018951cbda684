"""Make a folder of examples for `vlm-prune profile`: images/ and data.csv with columns image,
question, answer, drawn by lot from a VLMEvalKit TSV, an lmms-eval parquet file (or a folder of
them) or the demo's scenes.

  vlm-prune profile-data --from COCO_VAL.tsv --samples 300 --out data/coco --prompt "A photo of"
  vlm-prune profile-data --from ScienceQA_TEST.tsv --samples 300 --out data/scienceqa
  vlm-prune profile-data --from textvqa/ --samples 300 --out data/textvqa
  vlm-prune profile-data --from demo:vqa --samples 16 --out data/demo
"""

from __future__ import annotations

import argparse

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.report import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--from",
        required=True,
        dest="source",
        metavar="SOURCE",
        help="a .tsv or .parquet file, a folder of .parquet files, demo, demo:mcq, demo:yn, "
        "demo:vqa or demo:caption",
    )
    parser.add_argument("--samples", type=int, default=300, metavar="N", help="default: 300")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw, default: 0")
    parser.add_argument("--out", required=True, metavar="DIR", help="made if it is not there")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="one question for all rows instead of their own"
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    if not 1 <= args.samples <= 1_000_000:
        raise InputError(f"--samples {args.samples} is not valid: a whole number, 1 to 1000000.")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is not valid: a whole number of at least 0.")
    from vlm_prune_ext.profiling.data import check_target, entries_from, write_folder

    check_target(args.out)
    entries, failures = entries_from(args.source, args.samples, args.seed, args.prompt)
    count = write_folder(args.out, entries)
    for failure in failures:
        say(f"Left out: {failure}", error=True)
    short = f" (the source has no more than {count})" if count < args.samples else ""
    print(f"{args.out}: {count} examples{short}")
    return 0
