"""Time pruned and unpruned prefill, decoding and whole answers, side by side in one process: as
transformers does it, with the eager attention maps that published pruning codes need, with this
package's hooks, and on its fast path. Beside each figure stands the floor that the device sets.

Of a named shape (random weights), of a checkpoint, or of the demo model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import checkpoint_of, device_for, quiet_transformers
from vlm_prune_ext.errors import InputError, make_folder, unknown_name

if TYPE_CHECKING:
    from vlm_prune_ext.bench.cases import Case
    from vlm_prune_ext.bench.workload import Workload
    from vlm_prune_ext.experiment import grid
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
    what.add_argument(
        "--model",
        "--model-path",
        dest="model_path",
        metavar="NAME_OR_PATH",
        help="default: demo model",
    )
    add = parser.add_argument
    add(
        "--batch-size",
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 8],
        metavar="N",
        help="default: 1 8",
    )
    add(
        "--method",
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="NAME:BUDGET",
        help=f"short forms, none is the baseline; default: {' '.join(METHODS)}",
    )
    add(
        "--backend",
        "--ways",
        nargs="+",
        metavar="NAME",
        help="transformers; transformers-attentions: the same with eager attention maps; hooks: "
        "ours; graphs: CUDA graphs (default: all that can be)",
    )
    add("--fast", action="store_true", help="CUDA graphs only, and an error where they are not")
    add(
        "--max-new-tokens",
        "--new-tokens",
        dest="new_tokens",
        type=int,
        default=32,
        metavar="N",
        help="of long answers; default: 32",
    )
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
    from vlm_prune_ext.bench.roofline import measure_roofline
    from vlm_prune_ext.experiment import grid
    from vlm_prune_ext.experiment.log import Log

    backends = _backends(args)
    methods = list(dict.fromkeys(_method(text) for text in args.method))
    _check_shape(args)
    quiet_transformers()
    _check_methods(args, methods)
    workload = _workload(args)
    wanted = _cases(workload, backends, methods, args)
    cells = [_cell(case, args) for case in wanted]
    folder = Path(args.out)
    make_folder(folder, "--out ")
    roofline = measure_roofline(workload.device, workload.dtype)
    header = _header(workload, roofline, args)

    def job(cell: grid.Cell) -> dict[str, Any]:
        place = cells.index(cell)
        print(f"[{place + 1}/{len(cells)}] {cell.label}", file=sys.stderr, flush=True)
        sizes = {"new_tokens": args.new_tokens, "repeat": args.repeat}
        return asdict(cases.measure_case(workload, wanted[place], roofline, **sizes))

    if kept := report.put_aside(folder):
        print(f"An earlier bench in {folder} is now {kept}.", file=sys.stderr)
    results: list[dict[str, Any]] = []
    for line in grid.run(cells, lambda: job, log=Log(folder / "bench.jsonl")):
        if line.status == grid.FAILED:
            print(f"Failed: {line.label}: {line.why}", file=sys.stderr)
            continue
        results.append(dict(line.result or {}))
        report.write(results, header, folder)  # nothing measured is lost
    if not results:
        raise InputError(f"--method {' '.join(args.method)}: no case could be measured.")
    report.table(results, header).show()
    print(report.legend(header))
    print(f"Written to {args.out}: bench.json, bench.md, bench.png, bench.csv, bench.html")
    return 1 if len(results) < len(wanted) else 0


def _cell(case: Case, args: argparse.Namespace) -> grid.Cell:
    """A case as the grid runner takes it."""
    from vlm_prune_ext.experiment.grid import Cell
    from vlm_prune_ext.experiment.settings import method_as_json

    names = ("shape", "model_path", "visual", "dtype", "device", "new_tokens", "repeat")
    shared = {name: getattr(args, name) for name in names}
    own = {"backend": case.backend, "batch_size": case.batch_size}
    settings = {**shared, **own, "method": method_as_json(case.method)}
    return Cell(settings, label=f"batch {case.batch_size}, {case.backend}, {case.label}")


def _check(args: argparse.Namespace) -> None:
    """What can be known before anything heavy is imported."""
    for name, values in (("--batch-size", args.batch_size), ("--repeat", [args.repeat])):
        for value in values:
            if value < 1:
                raise InputError(f"{name} {value} is not valid: an integer of at least 1.")
    if args.new_tokens < 2:
        raise InputError(f"--max-new-tokens {args.new_tokens} is not valid: at least 2.")
    if args.fast and args.backend not in (None, ["graphs"], ["fast"]):
        raise InputError(
            "--fast and --backend exclude each other: --fast is --backend graphs, or an error."
        )
    for name, text in (("out", args.out), ("dtype", args.dtype)):
        if text is not None and not text.strip():
            raise InputError(f"--{name} {text!r} is not valid: it is empty.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out!r} is a file: a folder is needed.")


def _backends(args: argparse.Namespace) -> list[str]:
    from vlm_prune_ext.bench.cases import BACKENDS
    from vlm_prune_ext.bench.report import BACKEND_NAMES

    if args.fast:
        return ["graphs"]
    named = [BACKEND_NAMES.get(name, name) for name in args.backend or BACKENDS]
    for name in named:
        if name not in BACKENDS:
            raise unknown_name("--backend", name, BACKENDS)
    return list(dict.fromkeys(named))


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


def _workload(args: argparse.Namespace) -> Workload:
    from vlm_prune_ext.bench.workload import of_checkpoint, of_shape
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
    workload: Workload, backends: list[str], methods: list[Method | None], args: argparse.Namespace
) -> list[Case]:
    """All that can be; of the others one line each says why not."""
    from vlm_prune_ext.bench.cases import Case, possible
    from vlm_prune_ext.pruning import prune

    for method in methods:  # a method that does not fit the model costs nothing
        with prune(workload.model, method):
            pass
    found: list[Case] = []
    left_out: dict[str, set[str]] = {}
    reasons = set()
    for batch in dict.fromkeys(args.batch_size):
        for backend in backends:
            for method in methods:
                case = Case(backend, method, batch)
                reason = possible(workload, case)
                if reason is None:
                    found.append(case)
                    continue
                reasons.add(reason)
                if args.fast:
                    raise InputError(f"--fast is not possible: {reason}.")
                if backend in ("graphs", "hooks"):
                    left_out.setdefault(f"{backend} ({reason})", set()).add(case.label)
    for what, labels in left_out.items():
        print(f"Left out: {what}: {', '.join(sorted(labels))}", file=sys.stderr)
    if not found:
        named, why = " ".join(backends), "; ".join(sorted(reasons))
        raise InputError(f"--backend {named} leaves nothing to measure: {why}.")
    return found


def _header(workload: Workload, roofline: Any, args: argparse.Namespace) -> dict[str, Any]:
    from vlm_prune_ext.experiment import host

    hardware = host.hardware(workload.device)
    where = hardware.get("gpu") or hardware["cpu"]
    dtype = str(workload.dtype).removeprefix("torch.")
    prompt = f"{workload.span[0]} + {workload.span[1]} + {workload.text - workload.span[0]} tokens"
    return {
        "title": f"{workload.name}, {prompt}, {dtype}, {where}, {date.today().isoformat()}",
        "command": "vlm-prune bench " + " ".join(sys.argv[2:]),
        "prompt": {"text": workload.text, "visual": workload.span[1], "start": workload.span[0]},
        "new_tokens": args.new_tokens,
        "ceilings": asdict(roofline),
        "hardware": hardware,
        "versions": host.versions(),
        "commit": host.commit(),
    }
