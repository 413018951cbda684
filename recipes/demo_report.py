"""Measures the demo model on fresh scenes: `python recipes/demo_report.py --out DIR`.

What it answers unpruned, what it guesses when the picture is noise, every method that has a budget
at 64 of 576 visual tokens, two of them at seven budgets, and whether a second evaluation seed
orders the methods alike. Four sets as people ask them, and three strata of short answers that need
different amounts of the picture. What is done is in `DIR/cells.jsonl`: the same command goes on
from there. Writes `report.md` and `report.png`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import vlm_prune_ext as vp
from vlm_prune_ext.demo.questions import samples
from vlm_prune_ext.evals import scenes
from vlm_prune_ext.experiment import grid, host
from vlm_prune_ext.experiment.log import Log, write_whole
from vlm_prune_ext.experiment.report import Column, Line, Markup, Table, line_plot
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import parse_method

SETS = {
    **scenes.TITLES,
    "vqa count": "counting",
    "vqa text": "reading",
    "vqa relation": "relations",
}
FOUR = tuple(scenes.TITLES)
ALL_TOKENS, BUDGET = 576, 64
BUDGETS = (288, 144, 100, 64, 32, 16, 8)
CONTROLS = ("random", "downsample")
METHODS = (
    *("fastv", "himap", "pdrop", "dart", "sparsevlm", "sparsevlm_plus", "visionzip", "fastervlm"),
    *("vispruner", "divprune", "cdpruner", "scope", "holov"),
)
CURVES = {"fastv": "FastV, in front of layer 3", "random": "random, in front of layer 0"}


# -- cells -----------------------------------------------------------------------------------------
def cells(seeds: Sequence[int], rows: int, curve_rows: int, order_rows: int) -> Iterator[grid.Cell]:
    """Everything that is measured, what matters most first."""

    def cell(seed: int, name: str, setting: str, count: int) -> grid.Cell:
        settings = {"seed": seed, "set": name, "setting": setting, "rows": count}
        return grid.Cell(settings, label=f"seed {seed}, {SETS[name]}, {setting}")

    first = seeds[0]
    at_budget = [f"{name}:{BUDGET}" for name in (*METHODS, *CONTROLS)]
    for name in SETS:
        yield from (cell(first, name, setting, rows) for setting in ("none", "noise"))
    strata = [name for name in SETS if name not in FOUR]
    for name in strata:
        yield from (cell(first, name, setting, rows) for setting in at_budget)
    for seed in seeds:
        for name in FOUR:
            for setting in ("none", *at_budget):
                yield cell(seed, name, setting, rows if setting == "none" else order_rows)
    for name in FOUR:
        for budget in BUDGETS:
            yield from (cell(first, name, f"{one}:{budget}", curve_rows) for one in CURVES)


def cases(seed: int, name: str, rows: int, *, blind: bool = False) -> list[scenes.Case]:
    """Questions of a set, about fresh pictures or about noise."""
    kind, _, category = name.partition(" ")
    made = samples(kind, seed, rows, category or None)
    picture = scenes.noise if blind else scenes.picture
    return [scenes.case(sample, picture(sample)) for sample in made]


class Measure:
    """Does cells, with one model in float32.

    Args:
        device: of it.
    """

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)  # processes share the cores
        self.loaded = vp.load(dtype="float32", device=device)
        self.device = device
        self.cases = lru_cache(1)(cases)

    def __call__(self, cell: grid.Cell) -> dict[str, Any]:
        """The score, and of what share each constant answer would be right."""
        setting, name = str(cell.settings["setting"]), str(cell.settings["set"])
        blind = setting == "noise"
        asked = self.cases(cell.settings["seed"], name, cell.settings["rows"], blind=blind)
        method = None if blind else parse_method(setting)
        model, processor = self.loaded
        given = scenes.ask(model, processor, asked, lambda batch: seeded(method, batch))
        (_, most), *_ = Counter(one.answer for one in asked).most_common(1)
        constant = scenes.share(most, len(asked))
        return {**scenes.score(asked, given), "constant": constant, "host": host.host(self.device)}


def seeded(method: Method | None, batch: int) -> Method | None:
    """The method for a batch: what draws at random does not draw the same for all."""
    return replace(method, seed=batch) if isinstance(method, vp.RandomDrop) else method


# -- what is written -------------------------------------------------------------------------------
Found = Mapping[tuple[int, str, str], dict[str, Any]]
"""Result of a seed, set and setting."""


def read(log: Log) -> Found:
    """What the log has; of runs over different numbers of rows the largest."""
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for line in grid.read_lines(log).values():
        if line.result is not None:
            key = (line.cell["seed"], line.cell["set"], line.cell["setting"])
            if key not in found or found[key]["count"] < line.result["count"]:
                found[key] = line.result
    return found


def cell_text(entry: Mapping[str, Any] | None) -> str:
    """A share with its 95 % Wilson interval."""
    if entry is None:
        return ""
    text = f"{entry['value']:.1f} ({entry['low']:.1f}–{entry['high']:.1f})"
    return text + (f", BLEU-4 {entry['bleu_4']:.1f}" if "bleu_4" in entry else "")


def table(found: Found, seed: int, rows: Mapping[str, str], sets: Sequence[str]) -> Table:
    """Settings by sets, right in %; ``rows``: setting -> what stands in front."""
    columns = [Column("", left=True), *(Column(SETS[name], left=True) for name in sets)]
    lines: list[Any] = []
    for setting, title in rows.items():
        entries = [found.get((seed, name, setting)) for name in sets]
        if setting == "constant":
            entries = [(found.get((seed, name, "none")) or {}).get("constant") for name in sets]
        if any(entries):
            counts = sorted({entry["count"] for entry in entries if entry})
            lines.append([Markup(title), "/".join(map(str, counts)), *map(cell_text, entries)])
    return Table([columns[0], Column("n", left=True), *columns[1:]], lines)


def mean(found: Found, seed: int, setting: str, sets: Sequence[str]) -> float | None:
    """Mean share over sets; ``None`` where one is missing."""
    entries = [found.get((seed, name, setting)) for name in sets]
    values = [entry["value"] for entry in entries if entry is not None]
    return sum(values) / len(values) if len(values) == len(sets) else None


def losses(found: Found, seed: int) -> Iterator[str]:
    """What 64 tokens cost on the strata: the methods' mean, random dropping, the best lead."""
    leads: list[tuple[float, str]] = []
    for name in SETS:
        whole, random = (mean(found, seed, s, [name]) for s in ("none", f"random:{BUDGET}"))
        values = {m: mean(found, seed, f"{m}:{BUDGET}", [name]) for m in METHODS}
        scores = {m: value for m, value in values.items() if value is not None}
        if whole is None or random is None or len(scores) < len(METHODS):
            continue
        high, best = max((value, m) for m, value in scores.items())
        leads.append((high - random, f"{best} on {SETS[name]}"))
        average = sum(scores.values()) / len(scores)
        yield (
            f"{SETS[name]}: {len(scores)} methods lose {whole - average:.1f} points in the mean, "
            f"random dropping {whole - random:.1f}; `{best}` leads random by {high - random:.1f}."
        )
    if leads:
        lead, where = max(leads)
        yield f"Largest lead over random dropping: {lead:.1f} points ({where})."


def order(found: Found, seeds: Sequence[int]) -> Table:
    """Methods by seeds: mean of the four sets, and Kendall's tau between the seeds' orders."""
    from scipy.stats import kendalltau

    lines: list[Sequence[Any]] = []
    for name in ("none", *(f"{name}:{BUDGET}" for name in (*METHODS, *CONTROLS))):
        values = [mean(found, seed, name, FOUR) for seed in seeds]
        if None not in values:
            lines.append([name, *values])
    ranked = [line[1:] for line in lines if line[0] != "none"]
    columns = [Column("method", left=True), *(Column(f"seed {seed}") for seed in seeds)]
    if len(ranked) < 2:
        return Table(columns, [])
    tau = kendalltau(*zip(*ranked, strict=True)).statistic
    note = f"Kendall's tau between the orders of {len(ranked)} methods: {tau:.2f}."
    return Table(columns, lines, notes=[note])


def draw(found: Found, seed: int, path: Path) -> None:
    """Share of right answers against visual tokens kept, one panel per set."""
    panels = {}
    for kind in FOUR:
        curves = []
        for color, (name, title) in enumerate(CURVES.items()):
            points = {ALL_TOKENS: (seed, kind, "none")}
            points |= {budget: (seed, kind, f"{name}:{budget}") for budget in BUDGETS}
            known = [(tokens, found[key]) for tokens, key in points.items() if key in found]
            low, high = ([entry[end] for _, entry in known] for end in ("low", "high"))
            values = [(tokens, entry["value"]) for tokens, entry in known]
            curves.append(Line(title, values, color=color, low=low, high=high))
        blind = found[(seed, kind, "noise")]["value"]
        ends = [(min(BUDGETS), blind), (ALL_TOKENS, blind)]
        panels[SETS[kind]] = [*curves, Line("image is noise", ends, ":", 7)]
    line_plot(panels, path, x="visual tokens kept", y="right, %", log_x=True)


def categories(found: Found, seed: int) -> Iterator[str]:
    """Unpruned, by category."""
    for kind in FOUR:
        shares = found.get((seed, kind, "none"), {}).get("categories", {})
        if shares:
            said = ", ".join(f"{name} {value:.1f}" for name, value in shares.items())
            yield f"- {SETS[kind]}: {said}"


def write_report(found: Found, seeds: Sequence[int], folder: Path) -> None:
    """`report.md` and `report.png` of what is there so far."""
    first = seeds[0]
    controls = {
        "none": f"all {ALL_TOKENS}",
        "noise": "image replaced by noise",
        "constant": "most frequent answer",
    }
    at_budget = {f"{name}:{BUDGET}": f"`{name}:{BUDGET}`" for name in (*METHODS, *CONTROLS)}
    curve = {
        f"{name}:{budget}": f"{budget}, {title}"
        for budget in BUDGETS
        for name, title in CURVES.items()
    }
    parts = [
        table(found, first, controls, list(SETS)).markdown(),
        "\n".join(categories(found, first)) + "\n",
        table(found, first, at_budget, list(SETS)).markdown(),
        "\n".join(f"- {line}" for line in losses(found, first)) + "\n",
        table(found, first, curve, FOUR).markdown(),
        order(found, seeds).markdown(),
    ]
    write_whole(folder / "report.md", "\n".join(parts))
    if all((first, kind, "noise") in found for kind in FOUR):
        draw(found, first, folder / "report.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=500, help="of a set or stratum")
    parser.add_argument("--curve-rows", type=int, help="for each budget (default: --rows)")
    parser.add_argument("--order-rows", type=int, help="of a set, for methods (default: --rows)")
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2), help="of the scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, also on one GPU")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    log = Log(given.out / "cells.jsonl")
    curve, ordered = given.curve_rows or given.rows, given.order_rows or given.rows
    wanted = {one.key: one for one in cells(given.seeds, given.rows, curve, ordered)}
    lines = grid.run(
        list(wanted.values()), Measure, (given.device,), workers=given.workers, log=log
    )
    try:
        for line in lines:
            print(f"{line.label}: {cell_text(line.result) or line.why}", flush=True)
    finally:
        write_report(read(log), given.seeds, given.out)


if __name__ == "__main__":
    main()
