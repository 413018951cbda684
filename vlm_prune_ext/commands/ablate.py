"""Caption one data set with many models and compare them: BLEU-4, METEOR, ROUGE-L, SPICE, CIDEr.

Each model runs in a process of its own; one that fails is reported and the others go on. The same
command continues where it was stopped, and leaves finished models alone. Models are short names
(vlm-prune models), demo, folders, name=folder, or owner/name on the Hugging Face hub.

In --output-dir: <model>_metrics.json, <model>_predictions.csv, all_models_summary.json,
comparison.csv (ranked by BLEU-4) and comparison.png; <model>-<method><budget> for pruned runs.
Exit code 0: all done; 1: a model (or some of its rows) failed; 2: wrong input, nothing was run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_prune_ext.commands.common import FRESH_HELP, METHOD_HELP, device_for
from vlm_prune_ext.errors import InputError, unknown_name

LANGUAGES = ("en", "ko")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--data", required=True, metavar="CSV", help="pictures and captions")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--model",
        "--models",
        dest="models",
        nargs="+",
        metavar="MODEL",
        help="default: --preset all",
    )
    chosen.add_argument(
        "--preset", metavar="NAME", help="all (eight), quick or latest (three each)"
    )
    parser.add_argument(
        "--method",
        "--methods",
        dest="methods",
        nargs="+",
        default=["none"],
        metavar="METHOD",
        help=f"none, or {METHOD_HELP}",
    )
    parser.add_argument(
        "--out",
        "--output-dir",
        dest="output_dir",
        default="results",
        metavar="DIR",
        help="default: results",
    )
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="asked of every picture; {prompt} is the CSV's own"
    )
    parser.add_argument(
        "--rerun", nargs="+", default=[], metavar="NAME", help="models or runs to do anew"
    )
    parser.add_argument("--fresh", action="store_true", help=FRESH_HELP)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--image-column", metavar="NAME", help="default: image, image_path, url")
    parser.add_argument("--prompt-column", metavar="NAME", help="default: query, prompt, question")
    parser.add_argument(
        "--reference-columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="default: annotation, answer, caption or reference, with numbers behind",
    )
    parser.add_argument("--image-folder", metavar="DIR", help="default: the CSV's folder")
    parser.add_argument(
        "--device",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="cpu, cuda, cuda:1; of several each does a run at a time (default: as found)",
    )
    parser.add_argument("--dtype", metavar="NAME", help="float32, float16 or bfloat16")
    parser.add_argument(
        "--attn-implementation", metavar="NAME", help="eager, sdpa or flash_attention_2"
    )
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="CUDA graphs with fixed shapes, or an error (default: on a GPU, where possible)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accept checkpoints that bring code of their own (internvl2-2b)",
    )
    parser.add_argument("--lang", default="en", metavar="LANG", help="en (default) or ko")


def run(args: argparse.Namespace) -> int:
    """Check everything, then run the study."""
    _check(args)
    from vlm_prune_ext.ablation.data import read_data

    data = read_data(
        Path(args.data),
        image_column=args.image_column,
        prompt_column=args.prompt_column,
        reference_columns=args.reference_columns,
        image_folder=Path(args.image_folder) if args.image_folder else None,
        prompt=args.prompt,
        limit=args.limit,
    )
    from vlm_prune_ext.ablation.files import Folder
    from vlm_prune_ext.ablation.plan import plan, to_redo
    from vlm_prune_ext.ablation.study import Options, Study
    from vlm_prune_ext.evals.interrupt import terminable

    runs = plan(_models(args), args.methods)
    options = Options(
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        prompt=args.prompt,
        load=_load_arguments(args),
        devices=tuple(args.device),
        redo=frozenset(run.name for run in runs) if args.fresh else to_redo(args.rerun, runs),
        language=args.lang,
    )
    for device in args.device or [None]:  # asked here, not by every run's own process
        device_for(argparse.Namespace(device=device, fast=args.fast))
    study = Study(runs, data, Folder(Path(args.output_dir)), options)
    with terminable():
        return study.carry_out()


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {value} is not valid: an integer of at least 1.")
    if args.lang not in LANGUAGES:
        raise unknown_name("--lang", args.lang, LANGUAGES)
    if args.dtype is not None and args.dtype not in DTYPES:
        raise unknown_name("--dtype", args.dtype, DTYPES)
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt '' is not valid: a text, or leave it out.")


def _models(args: argparse.Namespace) -> list[str]:
    from vlm_prune_ext.ablation.plan import PRESETS

    if args.models:
        return list(args.models)
    preset = args.preset or "all"
    if preset not in PRESETS:
        raise unknown_name("--preset", preset, PRESETS)
    return list(PRESETS[preset])


def _load_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`vlm_prune_ext.load` is given; only what was said."""
    given = {
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "fast": args.fast,
        "trust_remote_code": args.trust_remote_code or None,
    }
    return {name: value for name, value in given.items() if value is not None}
