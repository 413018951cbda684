"""Table of all methods at about 50 %, 25 % and 11 % of the visual tokens, as Markdown.

    python recipes/method_table.py --samples 100 --out docs/results/methods_demo.md

Each row is one method at one budget, on the same samples of the four Shapes sets (drawn from
``--seed``, so anyone can make fresh ones): score, prefill FLOPs over the unpruned ones, and visual
tokens that enter the decoder layers, averaged within groups of layers. Rows are logged as they are
made (OUT with .jsonl behind it): a second start goes on.

How budgets are matched. A budget is ``share * visual tokens``, for the layers behind the first
drop. Every registered method that has a keep budget takes it as it is; one that has none stands
once, as published. HiMAP's two ranks keep its default proportion of 4 : 1, at the scale that makes
their mean over the layers behind stage 1 the budget. SAINT's threshold is found by bisection on a
few extra pictures, so that the layers behind its last drop get about the budget; hybrid leaves half
of the drop to the tower. Downsample takes the largest square grid that is not above the budget.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vlm_prune_ext as vp
from vlm_prune_ext.commands.terminal import track
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.precheck import check_config
from vlm_prune_ext.evals.scenes import TITLES, ask, cases, score
from vlm_prune_ext.evals.sweep import has_keep_budget
from vlm_prune_ext.experiment import grid, host
from vlm_prune_ext.experiment.log import Log, write_whole
from vlm_prune_ext.experiment.metrics import bleu
from vlm_prune_ext.experiment.record import held, mean_flops
from vlm_prune_ext.experiment.report import Column, Markup, Table
from vlm_prune_ext.experiment.settings import method_as_json
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import METHODS, get_method, parse_method, standard_method
from vlm_prune_ext.models import parts_of

SHARES = (1 / 2, 1 / 4, 1 / 9)
GROUPS = 4  # groups of decoder layers in the table
CALIBRATION = 6  # pictures for SAINT's threshold


@dataclass(frozen=True)
class Sizes:
    """What budgets and layers are scaled to."""

    layers: int
    feature_layer: int
    visual: int


Left = Callable[[Method], float]
"""Visual tokens that a method leaves in the last layer, measured."""


# -- methods at a budget -----------------------------------------------------------------------
def methods_at(keep: int, names: Sequence[str], sizes: Sizes, left: Left) -> Iterator[Method]:
    """Those of some methods that have one, at a budget of ``keep`` visual tokens."""
    for name in names:
        if name in MATCHED:
            yield from MATCHED[name](keep, sizes, left)
        elif has_keep_budget(METHODS[name]):
            try:
                method = parse_method(f"{name}:{keep}")
            except InputError as error:  # some are defined at their papers' budgets only
                print(f"{name}:{keep} is left out: {error}", file=sys.stderr)
                continue
            assert method is not None
            yield method


def himap_at(keep: int, sizes: Sizes, left: Left) -> Iterator[Method]:
    """HiMAP whose mean over the layers behind its first stage is ``keep``."""
    first, second = 2, sizes.layers // 2
    shallow, deep = second - first, sizes.layers - second
    text = min(keep * (shallow + deep) / (shallow + deep / 4), float(sizes.visual))
    # What the cap takes from stage 1, stage 2 gets back.
    image = (keep * (shallow + deep) - text * shallow) / deep
    yield vp.HiMAP(
        attn_txt_layer=first,
        attn_txt_rank=round(text),
        attn_img_layer=second,
        attn_img_rank=max(1, round(image)),
    )


def saint_at(keep: int, sizes: Sizes, left: Left) -> Iterator[Method]:
    """SAINT in the language model, in the tower, and in both."""
    start, end = round(7 / 32 * sizes.layers), round(16 / 32 * sizes.layers)
    yield threshold_at(keep, vp.SAINT(start=start, end=end), left)
    tower = round(19 / 22 * sizes.feature_layer)
    vit = vp.SAINTViT(layers=(tower,), keep_num=keep + 1)
    yield vp.SAINT(start=None, vit=vit)
    half = replace(vit, keep_num=(keep + sizes.visual) // 2 + 1)
    yield threshold_at(keep, vp.SAINT(start=start, end=end, vit=half), left)


def threshold_at(keep: int, method: vp.SAINT, left: Left) -> Method:
    """``method`` with the threshold that leaves about ``keep`` tokens, to two decimals."""
    low, high = -1.0, 1.0
    while high - low > 0.005:
        middle = (low + high) / 2
        if left(replace(method, threshold=middle)) < keep:
            low = middle
        else:
            high = middle
    return replace(method, threshold=round(high, 3))


def custom_at(keep: int, sizes: Sizes, left: Left) -> Iterator[Method]:
    """The rules that are no method of their own (``attention`` is FastV, ``random`` RandomDrop)."""
    for name in ("sampling", "similarity", "norm", "uniform"):
        # Attention of one token sums to one over hundreds of tokens: at temperature 1 sampling
        # would be uniform.
        more = {"temperature": 0.01} if name == "sampling" else {}
        yield vp.CustomSelection(method=name, kept_tokens=keep, agg_layer=3, **more)


def random_at(keep: int, sizes: Sizes, left: Left) -> Iterator[Method]:
    """In front of the model, and where FastV drops."""
    yield vp.RandomDrop(keep=keep, layer=0)
    yield vp.RandomDrop(keep=keep, layer=3)


MATCHED: dict[str, Callable[[int, Sizes, Left], Iterator[Method]]] = {
    "himap": himap_at,
    "saint": saint_at,
    "custom": custom_at,
    "random": random_at,
}


# -- running -----------------------------------------------------------------------------------
class Measure:
    """Does cells: one method on all sets."""

    def __init__(self, model: Any, processor: Any, args: argparse.Namespace) -> None:
        self.model, self.processor, self.batch = model, processor, args.batch_size
        self.sets = {kind: cases(kind, args.seed, args.samples) for kind in TITLES}

    def __call__(self, cell: grid.Cell) -> dict[str, Any]:
        """Scores, FLOPs and tokens per group of layers."""
        stated = cell.settings["method"]
        method = get_method(stated["name"], **stated.get("parameters", {}))
        scores, every = {}, []
        for kind, items in self.sets.items():
            given = ask(self.model, self.processor, items, lambda batch: method, self.batch)
            said = [one.prediction for one in given]
            if kind == "caption":
                scores[kind] = bleu(said, [[one.answer] for one in items])[0]
            else:
                scores[kind] = score(items, given)["value"]
            every += given
        layers = range(len(every[0].lengths))
        tokens = [sum(held(one, layer) for one in every) / len(every) for layer in layers]
        flops = mean_flops(every)
        assert flops is not None
        return {
            "scores": scores,
            "flops": flops.ratio_with_vision or flops.ratio,
            "tokens": grouped(tokens),
            "layers": len(layers),
            "host": {**host.hardware(self.processor.device), "versions": host.versions()},
        }


def grouped(tokens: Sequence[float]) -> list[float]:
    """Means over :data:`GROUPS` groups of layers."""
    size = math.ceil(len(tokens) / GROUPS)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [sum(part) / len(part) for part in parts]


def plan(model: Any, processor: Any, args: argparse.Namespace) -> list[grid.Cell]:
    """The baseline, every method at every budget, and those without one as published."""
    vision = parts_of(model).vision
    assert vision is not None
    probes = [
        processor.prompt(one.query.text, list(one.query.images))
        for one in cases("vqa", args.seed, CALIBRATION)
    ]
    last = len(vision.layers) - 1
    sizes = Sizes(
        layers=len(parts_of(model).layers),
        feature_layer=last if vision.feature_layer is None else vision.feature_layer,
        visual=processor.count_visual_tokens(probes[0])[0],
    )

    def left(method: Method) -> float:
        counts = []
        for inputs in probes:
            with torch.inference_mode(), vp.prune(model, method) as trace:
                model(**inputs)
            counts.append(trace.visual_tokens[max(trace.visual_tokens)][0])
        return sum(counts) / len(counts)

    names = args.only.split(",") if args.only else [name for name in METHODS if METHODS[name]]
    shares: list[tuple[str, Method | None]] = [("100 %", None)]
    for share in SHARES:
        for method in methods_at(round(share * sizes.visual), names, sizes, left):
            shares.append((f"{100 * share:.0f} %", method))
    for name in names:
        if name not in MATCHED and not has_keep_budget(METHODS[name]):
            shares.append(("published", standard_method(name)))
    found = []
    for text, one in shares:
        if one is None or fits(model, one):
            label = one.label() if one is not None else "baseline"
            more = {"samples": args.samples, "seed": args.seed, "batch": args.batch_size}
            settings = {"share": text, "method": method_as_json(one), "model": args.model, **more}
            found.append(grid.Cell({**settings, "dtype": args.dtype}, label=label))
    return found


def fits(model: Any, method: Method) -> bool:
    """Whether a model can have a method; one that it cannot is named and left out."""
    try:
        check_config(model.config, method)
    except InputError as error:
        print(f"{method.label()} is left out: {error}", file=sys.stderr)
        return False
    return True


# -- the table ---------------------------------------------------------------------------------
def table(lines: Sequence[grid.Line], samples: int, command: str) -> Table:
    """The table with what it was measured on."""
    done = [line for line in lines if line.result]
    result, found = done[0].result, done[0].host
    assert result is not None
    size = math.ceil(result["layers"] / GROUPS)
    columns = [Column("tokens", left=True), Column("method", left=True)]
    columns += [Column(TITLES[kind].removeprefix("Shapes_")) for kind in TITLES]
    columns.append(Column("FLOPs", 3))
    for i in range(0, result["layers"], size):
        columns.append(Column(f"layers {i}-{min(i + size, result['layers']) - 1}", 0))
    rows: list[Sequence[Any]] = [
        [
            line.cell["share"],
            Markup(f"`{line.label}`"),
            *line.result["scores"].values(),
            line.result["flops"],
            *line.result["tokens"],
        ]
        for line in done
        if line.result
    ]
    versions = found["versions"]
    notes = [
        f"{samples} samples per set (95 % interval at most ± {196 * math.sqrt(0.25 / samples):.1f} "
        "points); MCQ, YN and VQA in % right, Caption is BLEU-4 (sacrebleu); FLOPs: prefill with "
        "vision tower, over the baseline's; layers a-b: visual tokens that enter them, mean.",
        Markup(
            f"{datetime.date.today()}, {found.get('gpu', found['cpu'])} ({found['cores']} cores), "
            f"{found['threads']} threads, Python {versions['python']}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}. Command: {command}"
        ),
    ]
    return Table(columns, rows, notes=notes)


def main() -> int:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="default: the demo checkpoint")
    parser.add_argument("--samples", type=int, default=100, help="per set")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--only", help="names of methods, with commas between")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: float32 on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="the page, Markdown")
    args = parser.parse_args()
    if args.samples < 1:
        raise InputError(f"--samples {args.samples} is not valid: at least 1.")
    model, processor = vp.load(args.model, dtype=args.dtype)
    todo = plan(model.eval(), processor, args)
    log = Log(args.out.with_suffix(".jsonl"))
    lines = grid.run(todo, lambda: Measure(model, processor, args), log=log)
    found = [line for _, line in zip(track(todo, "methods"), lines, strict=True)]
    places = {cell.key: place for place, cell in enumerate(todo)}
    found.sort(key=lambda line: places[line.key])
    command = f"`{' '.join(['python', *sys.argv])}`"
    write_whole(args.out, table(found, args.samples, command).markdown())
    return 0 if all(line.status == grid.DONE for line in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"{error}")
