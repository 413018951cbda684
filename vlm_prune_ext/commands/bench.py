"""Time pruned and unpruned prefill, decoding and whole answers, side by side in one process: as
transformers does it, with the eager attention maps that published pruning codes need, with this
package's hooks, and on its fast path. Beside each figure stands the floor that the device sets.

Of a named shape (random weights), of a checkpoint, or of the demo model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import checkpoint_of, device_for, quiet_transformers
from vlm_prune_ext.errors import InputError, make_folder, reason_of, unknown_name

if TYPE_CHECKING:
    from vlm_prune_ext.bench.cases import Case
    from vlm_prune_ext.bench.subject import Subject
    from vlm_prune_ext.methods.base import Method

METHODS = ("none", "fastv:100", "fastv:288,agg_layer=2", "himap")
QUESTION = "Describe this picture."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape",
        metavar="NAME",
        help="published shape with random weights: llava-1.5-7b, llava-1.5-13b, llava-next-7b, "
        "qwen2.5-vl-3b, gemma-3-4b",
    )
    what.add_argument("--model-path", metavar="NAME_OR_PATH", help="default: demo model")
    add = parser.add_argument
    add("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="default: 1 8")
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="NAME:BUDGET",
        help=f"short forms, none is the baseline; default: {' '.join(METHODS)}",
    )
    add(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="hf: transformers; hf-attentions: the same with eager attention maps; ordinary: our "
        "hooks; fast: CUDA graphs (default: all that can be)",
    )
    add("--fast", action="store_true", help="the fast path only, and an error where it is not")
    add("--new-tokens", type=int, default=32, metavar="N", help="of long answers; default: 32")
    add(
        "--repeat",
        type=int,
        default=15,
        metavar="N",
        help="timed prefills, and a third as many answers; default: 15",
    )
    add(
        "--visual",
        type=int,
        metavar="N",
        help="visual tokens of qwen2.5-vl-3b, gemma-3-4b; default: 576",
    )
    add(
        "--dtype",
        default=None,
        help="default: bfloat16 on a GPU, float32 on a CPU; auto: as stored",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: as found)")
    add("--out", default="bench", metavar="DIR", help="default: bench")


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    _check(args)
    from vlm_prune_ext.bench import cases, report
    from vlm_prune_ext.bench.floors import measure_ceilings

    ways = _ways(args)
    methods = list(dict.fromkeys(_method(text) for text in args.methods))
    _check_shape(args)
    quiet_transformers()
    _check_methods(args, methods)
    subject = _subject(args)
    wanted = _cases(subject, ways, methods, args)
    folder = Path(args.out)
    make_folder(folder, "--out ")
    ceilings = measure_ceilings(subject.device, subject.dtype)
    cells: list[Any] = []
    header = _header(subject, ceilings, args)
    failed = 0
    for number, case in enumerate(wanted, 1):
        text = f"[{number}/{len(wanted)}] batch {case.batch}, {case.way}, {case.label}"
        print(text, file=sys.stderr, flush=True)
        try:
            cell = cases.measure_case(
                subject, case, ceilings, new_tokens=args.new_tokens, repeat=args.repeat
            )
        except Exception as error:  # whatever it is, the other cases are still to be measured
            failed += 1
            print(f"Failed: {text}: {reason_of(error)}", file=sys.stderr)
            continue
        if not cells and (kept := report.put_aside(folder)):
            print(f"An earlier bench in {folder} is now {kept}.", file=sys.stderr)
        cells.append(cell)
        report.write(cells, header, folder)  # nothing measured is lost
    if not cells:
        raise InputError(f"--methods {' '.join(args.methods)}: no case could be measured.")
    _print(cells, header, args)
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """What can be known before anything heavy is imported."""
    for name, values in (("--batch-sizes", args.batch_sizes), ("--repeat", [args.repeat])):
        for value in values:
            if value < 1:
                raise InputError(f"{name} {value} is not valid: an integer of at least 1.")
    if args.new_tokens < 2:
        raise InputError(f"--new-tokens {args.new_tokens} is not valid: at least 2.")
    if args.fast and args.ways not in (None, ["fast"]):
        raise InputError(
            "--fast and --ways exclude each other: --fast is --ways fast, or an error."
        )
    for name, text in (("out", args.out), ("dtype", args.dtype)):
        if text is not None and not text.strip():
            raise InputError(f"--{name} {text!r} is not valid: it is empty.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out!r} is a file: a folder is needed.")


def _ways(args: argparse.Namespace) -> list[str]:
    from vlm_prune_ext.bench.cases import WAYS

    if args.fast:
        return ["fast"]
    for way in args.ways or ():
        if way not in WAYS:
            raise unknown_name("--ways", way, WAYS)
    return list(dict.fromkeys(args.ways or WAYS))


def _method(text: str) -> Method | None:
    from vlm_prune_ext.methods.registry import parse_method

    return parse_method(text)


def _check_shape(args: argparse.Namespace) -> None:
    if args.shape is not None:
        from vlm_prune_ext.bench.shapes import SHAPES

        if args.shape not in SHAPES:
            raise unknown_name("--shape", args.shape, SHAPES)
    if args.visual is None:
        return
    if args.shape is None or args.shape.startswith("llava"):
        what = args.shape or args.model_path or "the demo model"
        raise InputError(
            f"--visual {args.visual} is not possible: {what} itself says how many there are."
        )
    if args.visual < 1:
        raise InputError(f"--visual {args.visual} is not valid: an integer of at least 1.")


def _check_methods(args: argparse.Namespace, methods: list[Method | None]) -> None:
    """Layers and budgets, before there are any weights."""
    from vlm_prune_ext.bench.shapes import SHAPES
    from vlm_prune_ext.evals.precheck import check_config, check_fit
    from vlm_prune_ext.models.checkpoint import Checkpoint

    check: Callable[[Method], None]
    if args.shape is not None:
        check = partial(check_config, SHAPES[args.shape]())
    else:
        check = partial(check_fit, Checkpoint(checkpoint_of(args)))
    for method in methods:
        if method is not None:
            check(method)


def _subject(args: argparse.Namespace) -> Subject:
    from vlm_prune_ext.bench.subject import of_checkpoint, of_shape
    from vlm_prune_ext.models import dtype_of, load

    device = device_for(args)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    if args.shape is not None:
        from vlm_prune_ext.bench.shapes import random_model

        dtype = dtype_of(usual if args.dtype in (None, "auto") else args.dtype)
        return of_shape(
            args.shape, random_model(args.shape, dtype=dtype, device=device), args.visual
        )
    model, processor = load(
        checkpoint_of(args),
        dtype=args.dtype or usual,
        device=device,
        attn_implementation="sdpa",
        fast=False,
    )
    return of_checkpoint(args.model_path or "demo model", model, processor, QUESTION, _picture())


def _picture() -> Any:
    from vlm_prune_ext.demo.drawing import make_scene, render

    return render(make_scene(0))


def _cases(
    subject: Subject, ways: list[str], methods: list[Method | None], args: argparse.Namespace
) -> list[Case]:
    """All that can be; of the others one line each says why not."""
    from vlm_prune_ext.bench.cases import Case, possible
    from vlm_prune_ext.pruning import prune

    for method in methods:  # a method that does not fit the model costs nothing
        with prune(subject.model, method):
            pass
    found: list[Case] = []
    left_out: dict[str, set[str]] = {}
    reasons = set()
    for batch in dict.fromkeys(args.batch_sizes):
        for way in ways:
            for method in methods:
                case = Case(way, method, batch)
                reason = possible(subject, case)
                if reason is None:
                    found.append(case)
                    continue
                reasons.add(reason)
                if args.fast:
                    raise InputError(f"--fast is not possible: {reason}.")
                if way in ("fast", "ordinary"):
                    left_out.setdefault(f"{way} ({reason})", set()).add(case.label)
    for what, labels in left_out.items():
        print(f"Left out: {what}: {', '.join(sorted(labels))}", file=sys.stderr)
    if not found:
        raise InputError(
            f"--ways {' '.join(ways)} leaves nothing to measure: {'; '.join(sorted(reasons))}."
        )
    return found


def _header(subject: Subject, ceilings: Any, args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from vlm_prune_ext.experiment import host

    hardware = host.hardware(subject.device)
    where = hardware.get("gpu") or hardware["cpu"]
    dtype = str(subject.dtype).removeprefix("torch.")
    prompt = f"{subject.span[0]} + {subject.span[1]} + {subject.text - subject.span[0]} tokens"
    return {
        "title": f"{subject.name}, {prompt}, {dtype}, {where}, {date.today().isoformat()}",
        "command": "vlm-prune bench " + " ".join(sys.argv[2:]),
        "prompt": {"text": subject.text, "visual": subject.span[1], "start": subject.span[0]},
        "new_tokens": args.new_tokens,
        "ceilings": asdict(ceilings),
        "hardware": hardware,
        "versions": host.versions(),
        "commit": host.commit(),
    }


def _print(cells: list[Any], header: dict[str, Any], args: argparse.Namespace) -> None:
    from rich.console import Console

    from vlm_prune_ext.bench import report

    Console(width=None if sys.stdout.isatty() else 230).print(report.table(cells, header["title"]))
    print(report.legend(header))
    print(f"Written to {args.out}: bench.json, bench.md, bench.png")
