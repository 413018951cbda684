"""Our figures beside published ones: LLaVA-1.5-7B, by benchmark, method and visual tokens.

``published_figures.csv`` holds facts with their sources. Sources disagree about one method at one
budget (other codes, prompts, versions of a benchmark), so each stands for itself.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from vlm_prune_ext.experiment.report import Column, Table
from vlm_prune_ext.experiment.results import Results, Run

MODEL = "LLaVA-1.5-7B"
_NAMES = ("llava-1.5-7b", "llava-v1.5-7b", "llava-1.5-7b-hf")  # folders and repositories
BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "gqa": ("GQA_TestDev_Balanced", "gqa"),
    "mmb": ("MMBench_DEV_EN", "mmbench_en_dev_static", "mmbench_en_dev"),
    "mmb_cn": ("MMBench_DEV_CN", "mmbench_cn_dev"),
    "mme": ("MME", "mme"),
    "pope": ("POPE", "pope"),
    "sqa": ("ScienceQA_TEST", "scienceqa_img"),
    "vqav2": ("vqav2_val", "vqav2_test"),
    "textvqa": ("TextVQA_VAL", "textvqa_val"),
    "seed": ("SEEDBench_IMG", "seedbench"),
}
"""Column of the file -> names of the data set in VLMEvalKit and lmms-eval."""


@dataclass(frozen=True)
class Published:
    """What a source states of one method at one budget.

    Attributes:
        method: registry name; of a method that is not here, as the source calls it.
        tokens: visual tokens, as the source counts them.
        scores: benchmark -> score.
        relative: mean of the scores over the unpruned ones, in percent, as stated.
        source: where it stands.
    """

    method: str
    tokens: int
    scores: Mapping[str, float]
    relative: float | None
    source: str


@cache
def published() -> tuple[Published, ...]:
    """All there are."""
    with Path(__file__).with_name("published_figures.csv").open(newline="") as file:
        return tuple(
            Published(
                row["method"].lower(),
                int(row["tokens"]),
                {name: float(row[name]) for name in BENCHMARKS if row[name]},
                float(row["rel"]) if row["rel"] else None,
                row["source"],
            )
            for row in csv.DictReader(file)
        )


def unpruned(source: str) -> Published | None:
    """What a source states of the model as it is."""
    return next((one for one in published() if one.source == source and one.method == "none"), None)


def relative_mean(scores: Mapping[str, float], whole: Mapping[str, float]) -> float | None:
    """Mean over benchmarks of a score over the unpruned one, in percent, as the papers state it;
    ``None`` where no benchmark is in both."""
    shares = [100 * scores[name] / whole[name] for name in scores if whole.get(name)]
    return fmean(shares) if shares else None


def published_table(results: Results) -> Table:
    """Ours beside theirs wherever benchmark, method and budget are the same; a row
    ``relative mean`` closes each, over the benchmarks that both have. Empty for other models."""
    columns = [
        *(Column(name, left=True) for name in ("method", "benchmark")),
        Column("tokens", 0),
        *(Column("ours", 1), Column("theirs", 1)),
        *(Column("ours, % of unpruned", 1), Column("theirs, % of unpruned", 1)),
        Column("source", left=True),
    ]
    table = Table(columns, title=f"Beside published figures of {MODEL}")
    runs = [run for run in results.done if _is_the_model(run)]
    whole = _scores([run for run in runs if run.method == "none"])
    for one in published():
        mine = _scores([r for r in runs if r.method == one.method and _at(r, one)], one.source)
        theirs = {name: score for name, score in one.scores.items() if name in mine}
        base = unpruned(one.source)
        rows: list[Sequence[object]] = []
        for name, score in theirs.items():
            shares = [_share(mine, whole, name), _share(theirs, base.scores if base else {}, name)]
            rows.append([one.method, name, one.tokens, mine[name], score, *shares, one.source])
        if len(rows) > 1:
            ours = relative_mean({n: mine[n] for n in theirs}, whole)
            means = [ours, relative_mean(theirs, base.scores if base else {})]
            rows.append([one.method, "relative mean", one.tokens, None, None, *means, one.source])
        table.rows += rows
    return table


def _is_the_model(run: Run) -> bool:
    return Path(run.model).name.lower() in _NAMES


def _at(run: Run, one: Published) -> bool:
    """Whether a run's budget is a source's: as it was asked for, behind the drop, or on average."""
    if one.method == "none":
        return True
    if run.budget:
        return run.budget == str(one.tokens)
    if run.record is None:
        return False
    found = (run.record.last_visual_tokens, run.record.mean_visual_tokens)
    return one.tokens in {round(tokens or 0) for tokens in found}


def _scores(runs: Sequence[Run], source: str = "") -> dict[str, float]:
    """Benchmark -> score of the first run on it."""
    names = {data: name for name, known in BENCHMARKS.items() for data in known}
    found: dict[str, float] = {}
    for run in runs:
        if run.data in names and run.record and run.record.score:
            name, score = names[run.data], run.record.score.value
            if name == "mme" and "perception only" in source:
                score = run.record.scores.get("perception", score)
            found.setdefault(name, score)
    return found


def _share(scores: Mapping[str, float], whole: Mapping[str, float], name: str) -> float | None:
    return 100 * scores[name] / whole[name] if name in scores and whole.get(name) else None
