"""Time pruned and unpruned prefill, decoding and whole answers, side by side in one process: as
transformers does it, with the eager attention maps that published pruning codes need, with this
package's hooks, and on its fast path. Beside each figure stands the floor that the device sets.

Of a named shape (random weights), of a checkpoint, or of the demo model.

With --serve: vLLM's server on loopback instead, one for each method, under arrivals that do not
wait for answers (needs the environment of `make vllm`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.bench import report
from vlm_prune_ext.commands.common import checkpoint_of, device_for, quiet_transformers
from vlm_prune_ext.errors import InputError, make_folder, unknown_name
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import (
    FLAG,
    WHOLE,
    Declared,
    add_options,
    many,
    named,
    number,
    option,
    shared,
    text,
    whole,
)

if TYPE_CHECKING:
    from vlm_prune_ext.bench.cases import Case, Workload
    from vlm_prune_ext.experiment import grid
    from vlm_prune_ext.methods.base import Method

METHODS = ("none", "fastv:100", "fastv:288,agg_layer=2", "himap")
QUESTION = "Describe this picture."
OWN = "llava_hf"
PROMPTED = ("shape", "model_path")
PIXELS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class BenchSettings(Declared):
    """What is timed, and how often; ``shape`` and ``model_path`` exclude each other."""

    shape: str | None = option(
        None,
        text("a name"),
        "published shape with random weights: llava-1.5-7b, llava-1.5-13b, llava-next-7b, "
        "qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b, gemma-3-4b",
    )
    model_path: str | None = shared("model_path", None, "default: demo model")
    batch_size: Any = option((1, 8), many(WHOLE), "default: 1 8", "--batch-size", "--batch-sizes")
    method: Any = option(
        METHODS,
        many(text("a method", "NAME:BUDGET")),
        f"short forms, none is the baseline; default: {' '.join(METHODS)}",
        *("--method", "--methods"),
    )
    backend: Any = option(
        None,
        many(replace(named(report.BACKENDS), read=lambda it: report.BACKEND_NAMES.get(it, it))),
        "transformers; transformers-attentions: the same with eager attention maps; hooks: ours; "
        "graphs: CUDA graphs (default: all that can be)",
        *("--backend", "--ways"),
    )
    fast: bool = option(False, FLAG, "CUDA graphs only, and an error where they are not")
    new_tokens: int = option(
        32, whole(2), "of long answers; default: 32", "--max-new-tokens", "--new-tokens"
    )
    repeat: int = option(15, WHOLE, "timed prefills, and a third as many answers; default: 15")
    visual: int | None = option(
        None, whole(1), "visual tokens of Qwen's and Gemma's shapes; default: 576"
    )
    min_pixels: int | None = shared("min_pixels")
    max_pixels: int | None = shared("max_pixels")
    end_to_end: bool = option(
        False,
        FLAG,
        "instead: rows a second through VLMEvalKit and lmms-eval, on made-up photographs (methods: "
        "none and fastv:100, batch size: auto on a GPU, unless stated; llava_hf among the methods: "
        "lmms-eval's own model, of a checkpoint in Hugging Face's format)",
    )
    rows: int = option(512, WHOLE, "of --end-to-end; default: 512")
    questions: int = option(8, WHOLE, "about a picture, of --end-to-end; default: 8")
    dtype: str | None = option(
        None, text("a name"), "default: bfloat16 on a GPU, float32 on a CPU; auto: as stored"
    )
    device: str | None = shared("device")
    out: str = option("bench", text("a folder", "DIR"), "default: bench")
    serve: bool = option(False, FLAG, "load test of vLLM's server, of --model and --method")
    rate: Any = option(
        (1.0, 2.0, 4.0),
        many(number("arrivals a second, above 0", above=0.0)),
        "of --serve: arrivals a second; default: 1 2 4",
    )
    requests: int = option(24, WHOLE, "of --serve: questions at each rate; default: 24")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser.add_mutually_exclusive_group(), PROMPTED, BenchSettings)
    rest = [one.name for one in fields(BenchSettings) if one.name not in PROMPTED]
    add_options(parser, rest, BenchSettings)


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    said = BenchSettings.of(vars(args))
    _check(said)
    if said.end_to_end:
        return _end_to_end(said)
    if said.serve:
        return _serve(said)
    from vlm_prune_ext.bench import cases
    from vlm_prune_ext.experiment import grid
    from vlm_prune_ext.experiment.log import Log, put_aside
    from vlm_prune_ext.experiment.measure import measure_roofline
    from vlm_prune_ext.methods.registry import parse_method

    backends = ["graphs"] if said.fast else list(dict.fromkeys(said.backend or report.BACKENDS))
    methods = list(dict.fromkeys(map(parse_method, said.method)))
    quiet_transformers()
    _check_model(said, methods)
    workload = _workload(said)
    wanted = _cases(workload, backends, methods, said)
    cells = [_cell(case, said) for case in wanted]
    folder = Path(said.out)
    make_folder(folder, "--out ")
    roofline = measure_roofline(workload.device, workload.dtype)
    header = _header(workload, roofline, said)

    def job(cell: grid.Cell) -> dict[str, Any]:
        place = cells.index(cell)
        print(f"[{place + 1}/{len(cells)}] {cell.label}", file=sys.stderr, flush=True)
        sizes = {"new_tokens": said.new_tokens, "repeat": said.repeat}
        return asdict(cases.measure_case(workload, wanted[place], roofline, **sizes))

    if kept := put_aside(folder, report.files(folder)):
        print(f"An earlier bench in {folder} is now in {kept}.", file=sys.stderr)
    results: list[dict[str, Any]] = []
    for line in grid.run(cells, lambda: job, log=Log(folder / "bench.jsonl")):
        if line.status == grid.FAILED:
            say(f"Failed: {line.label}: {line.why}", error=True)
            continue
        results.append(dict(line.result or {}))
        report.write(results, header, folder)  # nothing measured is lost
    if not results:
        raise InputError(f"--method {' '.join(said.method)}: no case could be measured.")
    report.table(results, header).show()
    print(report.legend(header))
    print(f"Written to {said.out}: bench.json, bench.md, bench.png, bench.csv, bench.html")
    return 1 if len(results) < len(wanted) else 0


def _end_to_end(said: BenchSettings) -> int:
    from vlm_prune_ext.bench import end_to_end
    from vlm_prune_ext.methods.registry import parse_method

    texts = ("none", "fastv:100") if tuple(said.method) == METHODS else said.method
    methods = list(dict.fromkeys(parse_method(one) for one in texts if one != OWN))
    device, folder = device_for(said), Path(said.out)
    quiet_transformers()
    make_folder(folder, "--out ")
    path = checkpoint_of(said)
    if said.shape is not None:
        path = str(end_to_end.random_checkpoint(said.shape, folder / said.shape, device))
    usual = "bfloat16" if device.type == "cuda" else "float32"
    size = None if tuple(said.batch_size) == (1, 8) else said.batch_size[0]
    plan = end_to_end.Plan(
        path,
        methods,
        rows=said.rows,
        questions=said.questions,
        batch_size=size,
        device=said.device,
        dtype=said.dtype or usual,
        own=OWN in texts,
    )
    runs = end_to_end.run(plan, folder)
    return 1 if any(one.error for one in runs) else 0


def _serve(said: BenchSettings) -> int:
    from importlib.util import find_spec

    from vlm_prune_ext.bench import load

    if said.model_path is None:
        raise InputError("--serve needs --model: a folder or hub name that vLLM loads.")
    if find_spec("vllm") is None:
        raise InputError("--serve needs vLLM, which is not installed here: see docs/serve.md.")
    asked = ("none", "divprune:64") if tuple(said.method) == METHODS else said.method
    return load.run(
        said.model_path,
        list(dict.fromkeys(asked)),
        said.rate,
        device=device_for(said),
        dtype=said.dtype,
        requests=said.requests,
        new_tokens=said.new_tokens,
        folder=Path(said.out),
    )


def _cell(case: Case, said: BenchSettings) -> grid.Cell:
    """A case as the grid runner takes it."""
    from vlm_prune_ext.experiment.grid import Cell
    from vlm_prune_ext.experiment.settings import method_as_json

    names = ("shape", "model_path", "visual", "dtype", "device", "new_tokens", "repeat", *PIXELS)
    shared = {name: getattr(said, name) for name in names}
    own = {"backend": case.backend, "batch_size": case.batch_size}
    settings = {**shared, **own, "method": method_as_json(case.method)}
    return Cell(settings, label=f"batch {case.batch_size}, {case.backend}, {case.label}")


def _check(said: BenchSettings) -> None:
    """What can be known before anything heavy is imported."""
    if said.fast and said.backend not in (None, ["graphs"]):
        raise InputError(
            "--fast and --backend exclude each other: --fast is --backend graphs, or an error."
        )
    for name in PIXELS:
        value, flag = getattr(said, name), f"--{name.replace('_', '-')}"
        if value is not None and (said.shape or said.end_to_end or said.serve):
            raise InputError(
                f"{flag} {value} is not possible: it is of prompts of --model, which --shape, "
                "--end-to-end and --serve do not make."
            )
    if Path(said.out).exists() and not Path(said.out).is_dir():
        raise InputError(f"--out {said.out!r} is a file: a folder is needed.")


def _check_model(said: BenchSettings, methods: list[Method | None]) -> None:
    """The shape, and layers and budgets of methods, before there are any weights."""
    from vlm_prune_ext.bench.shapes import SHAPES
    from vlm_prune_ext.evals.precheck import check_config, check_fit
    from vlm_prune_ext.models.checkpoint import Checkpoint

    if said.shape is not None and said.shape not in SHAPES:
        raise unknown_name("--shape", said.shape, SHAPES)
    if said.visual is not None and (said.shape is None or said.shape.startswith("llava")):
        what = said.shape or said.model_path or "the demo model"
        raise InputError(
            f"--visual {said.visual} is not possible: {what} itself says how many there are."
        )
    source: Any = SHAPES[said.shape]() if said.shape else Checkpoint(checkpoint_of(said))
    for method in filter(None, methods):
        (check_config if said.shape else check_fit)(source, method)


def _workload(said: BenchSettings) -> Workload:
    from vlm_prune_ext.bench.cases import of_checkpoint, of_shape
    from vlm_prune_ext.demo.drawing import make_scene, render
    from vlm_prune_ext.models import dtype_of, load

    device = device_for(said)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    if said.shape is not None:
        from vlm_prune_ext.bench.shapes import random_model

        dtype = dtype_of(usual if said.dtype in (None, "auto") else said.dtype)
        return of_shape(
            said.shape, random_model(said.shape, dtype=dtype, device=device), said.visual
        )
    model, processor = load(
        checkpoint_of(said),
        dtype=said.dtype or usual,
        device=device,
        attn_implementation="sdpa",
        fast=False,
        **{name: value for name in PIXELS if (value := getattr(said, name)) is not None},
    )
    picture = render(make_scene(0))
    return of_checkpoint(said.model_path or "demo model", model, processor, QUESTION, picture)


def _cases(
    workload: Workload, backends: list[str], methods: list[Method | None], said: BenchSettings
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
    for batch, backend, method in product(dict.fromkeys(said.batch_size), backends, methods):
        case = Case(backend, method, batch)
        reason = possible(workload, case)
        if reason is None:
            found.append(case)
            continue
        reasons.add(reason)
        if said.fast:
            raise InputError(f"--fast is not possible: {reason}.")
        if backend in ("graphs", "hooks"):
            left_out.setdefault(f"{backend} ({reason})", set()).add(case.label)
    for what, labels in left_out.items():
        print(f"Left out: {what}: {', '.join(sorted(labels))}", file=sys.stderr)
    if not found:
        named, why = " ".join(backends), "; ".join(sorted(reasons))
        raise InputError(f"--backend {named} leaves nothing to measure: {why}.")
    return found


def _header(workload: Workload, roofline: Any, said: BenchSettings) -> dict[str, Any]:
    from vlm_prune_ext.experiment import host

    dtype, (start, visual) = str(workload.dtype).removeprefix("torch."), workload.span
    prompt = f"{start} + {visual} + {workload.text - start} tokens"
    return {
        "title": host.title(f"{workload.name}, {prompt}, {dtype}", workload.device),
        "prompt": {"text": workload.text, "visual": visual, "start": start},
        "new_tokens": said.new_tokens,
        "ceilings": asdict(roofline),
        **host.origin(workload.device),
    }
