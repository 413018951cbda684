"""Measures the demo model: `python recipes/demo_report.py --samples 500 --seed 1 --out DIR`.

Four sets of fresh scenes; the model as it is, two controls that cannot see, and FastV beside random
dropping at the same budgets. Writes `report.json`, `report.md` and `report.png`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import vlm_prune_ext as vp
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo.questions import KINDS, check_count
from vlm_prune_ext.evals.scenes import TITLES, Case, ask, cases, noise, score, share
from vlm_prune_ext.experiment.log import write_json, write_whole
from vlm_prune_ext.experiment.report import Column, Line, Table, line_plot

BUDGETS = (288, 144, 100, 64, 32, 16, 8)
ALL_TOKENS = 576
ROWS = {
    "baseline": f"all {ALL_TOKENS}",
    "baseline part": f"all {ALL_TOKENS}, the samples of the budgets",
    "noise": "image replaced by noise",
    "majority": "most frequent answer",
}
CURVES = {"fastv": "FastV, agg_layer 3", "random": "random, before layer 0"}


def methods(budgets: Sequence[int]) -> dict[str, Callable[[int], Any]]:
    """Name -> number of a batch -> method."""

    def fastv(budget: int) -> Callable[[int], Any]:
        return lambda batch: vp.FastV(agg_layer=3, attention_rank=budget)

    def random(budget: int) -> Callable[[int], Any]:
        return lambda batch: vp.RandomDrop(keep=budget, layer=0, seed=batch)

    made = {"fastv": fastv, "random": random}
    return {f"{name} {budget}": made[name](budget) for budget in budgets for name in made}


def majority(items: Sequence[Case]) -> dict[str, Any]:
    """The score of the one answer that is right most often."""
    (_, count), *_ = Counter(one.answer for one in items).most_common(1)
    return share(count, len(items))


def measure(
    model: Any,
    processor: Any,
    *,
    seed: int,
    count: int,
    kinds: Sequence[str] = KINDS,
    budgets: Sequence[int] = BUDGETS,
    sweep_count: int | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything in the report, as plain data.

    Args:
        model, processor: as `vlm_prune_ext.load` returns them.
        seed: of the evaluation scenes.
        count: samples per set for baseline and controls.
        kinds: which sets.
        budgets: visual tokens kept.
        sweep_count: samples per set for the budgets (default: `count`); the first of the same.
        progress: called with a line after each setting.
    """
    check_count("samples", count)
    result: dict[str, Any] = {}
    for kind in kinds:
        items = cases(kind, seed, count)
        part = items[: sweep_count or count]
        mine: dict[str, Any] = {"majority": majority(items)}

        def run(name: str, asked: Sequence[Case], method: Callable[[int], Any]) -> Any:
            begun = time.monotonic()
            given = ask(model, processor, asked, method)
            mine[name] = score(asked, given)  # noqa: B023  # called in this round only
            mine[name]["seconds"] = round(time.monotonic() - begun, 1)  # noqa: B023
            progress(f"{TITLES[kind]} {name}: {cell(mine[name])}")  # noqa: B023
            return given

        given = run("baseline", items, lambda batch: None)
        if len(part) < len(items):
            # What the budgets' figures are to be compared with: the very same samples.
            mine["baseline part"] = score(part, given[: len(part)])
        run("noise", cases(kind, seed, count, noise), lambda batch: None)
        for name, method in methods(budgets).items():
            run(name, part, method)
        result[kind] = mine
    return result


def cell(entry: dict[str, Any] | None) -> str:
    """A score with its interval."""
    if entry is None:
        return ""
    text = f"{entry['value']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"
    return text + (f"; BLEU-4 {entry['bleu_4']:.1f}" if "bleu_4" in entry else "")


def table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    sets = report["sets"]
    rows = {name: title for name, title in ROWS.items() if any(name in sets[k] for k in sets)}
    for name, title in CURVES.items():
        rows |= {f"{name} {budget}": f"{budget}, {title}" for budget in report["budgets"]}
    columns = [Column("visual tokens", left=True), *(Column(TITLES[k], left=True) for k in sets)]
    note = (
        f"Evaluation seed {report['seed']}, {report['samples']} samples a set "
        f"({report['sweep_samples']} for each budget); percent right with 95 % Wilson intervals. "
        "Captions: percent of images with every coloured shape named, and BLEU-4."
    )
    lines: list[Sequence[Any]] = [
        [title, *(cell(sets[k].get(name)) for k in sets)] for name, title in rows.items()
    ]
    return Table(columns, lines, notes=[note])


def draw(report: dict[str, Any], path: Path) -> None:
    """Score against visual tokens kept, one panel per set."""
    panels = {}
    for kind, mine in report["sets"].items():
        whole = (ALL_TOKENS, mine.get("baseline part", mine["baseline"]))
        curves = []
        for color, (name, title) in enumerate(CURVES.items()):
            found = [whole, *((b, mine[f"{name} {b}"]) for b in report["budgets"])]
            points = [(tokens, entry["value"]) for tokens, entry in found]
            low, high = ([entry[end] for _, entry in found] for end in ("low", "high"))
            curves.append(Line(title, points, color=color, low=low, high=high))
        blind = mine["noise"]["value"]
        ends = [(min(report["budgets"]), blind), (ALL_TOKENS, blind)]
        panels[TITLES[kind]] = [*curves, Line("image is noise", ends, ":", 7)]
    line_plot(panels, path, x="visual tokens kept", y="right, %", log_x=True)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    write_whole(folder / "report.md", table(report).markdown())
    draw(report, folder / "report.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=500, help="per set")
    parser.add_argument("--sweep-samples", type=int, help="per set and budget (default: --samples)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--sets", default=",".join(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    model, processor = vp.load(given.model, dtype=given.dtype, device=given.device)
    sets = measure(
        model,
        processor,
        seed=given.seed,
        count=given.samples,
        kinds=tuple(given.sets.split(",")),
        sweep_count=given.sweep_samples,
        progress=lambda line: print(line, flush=True),
    )
    report = {
        "seed": given.seed,
        "samples": given.samples,
        "sweep_samples": given.sweep_samples or given.samples,
        "dtype": given.dtype,
        "budgets": list(BUDGETS),
        "sets": sets,
    }
    write_report(report, given.out)


if __name__ == "__main__":
    main()
