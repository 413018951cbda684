"""Write fresh demo pictures with questions: the sets Shapes_MCQ, Shapes_YN, Shapes_VQA and
Shapes_Caption as VLMEvalKit TSVs, as parquet for lmms-eval, and a captioning CSV with its pictures.

The same seed gives the same data on every machine; another seed gives scenes that nobody has seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_prune_ext.errors import InputError, unknown_name

FORMATS = ("tsv", "parquet", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--samples", type=int, default=500, metavar="M", help="per set, default: 500"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="made if it is not there")
    parser.add_argument(
        "--format",
        default="tsv,parquet",
        metavar="LIST",
        help=f"of {', '.join(FORMATS)}, with commas between; default: tsv,parquet",
    )
    parser.add_argument(
        "--csv", action="store_const", const="csv", dest="format", help="the same as --format csv"
    )


def run(args: argparse.Namespace) -> int:
    """Write what was asked for."""
    formats = tuple(word.strip() for word in args.format.split(","))
    for word in formats:
        if word not in FORMATS:
            raise unknown_name("--format", word, FORMATS)
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is not valid: a whole number of at least 0.")
    if not 1 <= args.samples <= 1_000_000:
        raise InputError(f"--samples {args.samples} is not valid: a whole number, 1 to 1000000.")
    for path in write(Path(args.out), args.seed, args.samples, formats):
        print(path)
    return 0


def write(folder: Path, seed: int, samples: int, formats: tuple[str, ...]) -> list[Path]:
    """Write the sets of the demo into ``folder``; each format is complete or not there.

    Returns:
        the files written (of a captioning set its CSV; the pictures are beside it).

    Raises:
        InputError: the folder cannot be made or written.
    """
    from vlm_prune_ext.demo.writers import write_caption_csv, write_lmms_parquet, write_vlmeval_tsv

    paths: list[Path] = []
    if "tsv" in formats:
        paths += write_vlmeval_tsv(folder, seed, samples).values()
    if "parquet" in formats:
        paths += write_lmms_parquet(folder, seed, samples).values()
    if "csv" in formats:
        paths.append(write_caption_csv(folder, seed, samples))
    return paths
