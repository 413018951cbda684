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
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import checkpoint_of, device_for, quiet_transformers
from vlm_prune_ext.errors import InputError, make_folder, unknown_name
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import (
    FLAG,
    WHOLE,
    Declared,
    add_options,
    many,
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
        many(text("a name")),
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
        ("1", "2", "4"),
        many(text("a number", "N")),
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
    from vlm_prune_ext.bench import cases, report
    from vlm_prune_ext.experiment import grid
    from vlm_prune_ext.experiment.log import Log, put_aside
    from vlm_prune_ext.experiment.measure import measure_roofline
    from vlm_prune_ext.methods.registry import parse_method

    backends = _backends(said)
    methods = list(dict.fromkeys(map(parse_method, said.method)))
    _check_shape(said)
    quiet_transformers()
    _check_methods(said, methods)
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
    """The load test: servers one after the other, each at all rates."""
    from importlib.util import find_spec

    from vlm_prune_ext.bench import load
    from vlm_prune_ext.experiment import host
    from vlm_prune_ext.experiment.log import write_json
    from vlm_prune_ext.experiment.report import write_table

    if said.model_path is None:
        raise InputError("--serve needs --model: a folder or hub name that vLLM loads.")
    rates = [_rate(value) for value in said.rate]
    if find_spec("vllm") is None:
        raise InputError("--serve needs vLLM, which is not installed here: see docs/serve.md.")
    folder = Path(said.out)
    make_folder(folder, "--out ")
    options = ["--dtype", said.dtype or "auto", "--max-model-len", "1024"]
    device = device_for(said)
    if device.type == "cpu":
        options.append("--enforce-eager")  # compiling takes minutes there
    hardware = host.hardware(device)
    where = hardware.get("gpu") or hardware["cpu"]
    title = f"{said.model_path}, vLLM, {where}, {date.today().isoformat()}"
    results: list[dict[str, Any]] = []
    times: list[Any] = []
    asked = ("none", "divprune:64") if tuple(said.method) == METHODS else said.method
    for method in dict.fromkeys(asked):
        log = folder / f"server_{len(times)}.log"
        with load.server(said.model_path, method, log, options) as address:
            load.measure(address, said.model_path, 2.0, 3, said.new_tokens, 900)  # warms up
            for place, rate in enumerate(rates):
                print(f"{method}, {rate} arrivals a second", file=sys.stderr, flush=True)
                seed = 1000 * (place + 1)
                given = (said.model_path, rate, said.requests, said.new_tokens, seed)
                times.append(load.measure(address, *given))
                results.append(load.summary(method, rate, times[-1]))
                made = load.table(results, title)
                write_table(folder, "serve", made, ("md", "csv"))
                record = {
                    "title": title,
                    "command": "vlm-prune bench " + " ".join(sys.argv[2:]),
                    "hardware": hardware,
                    "versions": host.versions() | load.versions(),
                    "environment": load.environment(),
                    "results": load.as_json(results, times),
                }
                write_json(folder / "serve.json", record)
    made.show()
    print(f"Written to {said.out}: serve.json, serve.md, serve.csv")
    return 1 if any(one["failed"] for one in results) else 0


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < float("inf"):
        raise InputError(f"--rate {value} is not valid: arrivals a second, above 0.")
    return rate


def _cell(case: Case, said: BenchSettings) -> grid.Cell:
    """A case as the grid runner takes it."""
    from vlm_prune_ext.experiment.grid import Cell
    from vlm_prune_ext.experiment.settings import method_as_json

    names = ("shape", "model_path", "visual", "dtype", "device", "new_tokens", "repeat")
    shared = {name: getattr(said, name) for name in names}
    own = {"backend": case.backend, "batch_size": case.batch_size}
    settings = {**shared, **own, "method": method_as_json(case.method)}
    return Cell(settings, label=f"batch {case.batch_size}, {case.backend}, {case.label}")


def _check(said: BenchSettings) -> None:
    """What can be known before anything heavy is imported."""
    if said.fast and said.backend not in (None, ["graphs"], ["fast"]):
        raise InputError(
            "--fast and --backend exclude each other: --fast is --backend graphs, or an error."
        )
    if Path(said.out).exists() and not Path(said.out).is_dir():
        raise InputError(f"--out {said.out!r} is a file: a folder is needed.")


def _backends(said: BenchSettings) -> list[str]:
    from vlm_prune_ext.bench.cases import BACKENDS
    from vlm_prune_ext.bench.report import BACKEND_NAMES

    if said.fast:
        return ["graphs"]
    named = [BACKEND_NAMES.get(name, name) for name in said.backend or BACKENDS]
    for name in named:
        if name not in BACKENDS:
            raise unknown_name("--backend", name, BACKENDS)
    return list(dict.fromkeys(named))


def _check_shape(said: BenchSettings) -> None:
    if said.shape is not None:
        from vlm_prune_ext.bench.shapes import SHAPES

        if said.shape not in SHAPES:
            raise unknown_name("--shape", said.shape, SHAPES)
    if said.visual is None:
        return
    if said.shape is None or said.shape.startswith("llava"):
        what = said.shape or said.model_path or "the demo model"
        raise InputError(
            f"--visual {said.visual} is not possible: {what} itself says how many there are."
        )


def _check_methods(said: BenchSettings, methods: list[Method | None]) -> None:
    """Layers and budgets, before there are any weights."""
    from vlm_prune_ext.bench.shapes import SHAPES
    from vlm_prune_ext.evals.precheck import check_config, check_fit
    from vlm_prune_ext.models.checkpoint import Checkpoint

    check: Callable[[Method], None]
    if said.shape is not None:
        check = partial(check_config, SHAPES[said.shape]())
    else:
        check = partial(check_fit, Checkpoint(checkpoint_of(said)))
    for method in methods:
        if method is not None:
            check(method)


def _workload(said: BenchSettings) -> Workload:
    from vlm_prune_ext.bench.cases import of_checkpoint, of_shape
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
    )
    return of_checkpoint(said.model_path or "demo model", model, processor, QUESTION, _picture())


def _picture() -> Any:
    from vlm_prune_ext.demo.drawing import make_scene, render

    return render(make_scene(0))


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
    for batch in dict.fromkeys(said.batch_size):
        for backend in backends:
            for method in methods:
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

    hardware = host.hardware(workload.device)
    where = hardware.get("gpu") or hardware["cpu"]
    dtype = str(workload.dtype).removeprefix("torch.")
    prompt = f"{workload.span[0]} + {workload.span[1]} + {workload.text - workload.span[0]} tokens"
    return {
        "title": f"{workload.name}, {prompt}, {dtype}, {where}, {date.today().isoformat()}",
        "command": "vlm-prune bench " + " ".join(sys.argv[2:]),
        "prompt": {"text": workload.text, "visual": workload.span[1], "start": workload.span[0]},
        "new_tokens": said.new_tokens,
        "ceilings": asdict(roofline),
        "hardware": hardware,
        "versions": host.versions(),
        "commit": host.commit(),
    }
