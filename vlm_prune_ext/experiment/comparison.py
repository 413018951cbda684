"""Settings side by side: what they score, what they cost, and what a difference is worth.

Everything follows from result files (:mod:`vlm_prune_ext.experiment.results`). Settings answer the
same rows, so each is compared with the unpruned model row by row: exact McNemar where a row is
right or wrong, a paired bootstrap where a score is no share of right rows.
"""

from __future__ import annotations

import ast
import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from vlm_prune_ext.experiment import metrics
from vlm_prune_ext.experiment.coco import Unavailable
from vlm_prune_ext.experiment.grid import DONE
from vlm_prune_ext.experiment.report import Column, Figure, Table, metric_figures
from vlm_prune_ext.experiment.results import Results, Run
from vlm_prune_ext.experiment.statistics import (
    Interval,
    bootstrap,
    holm,
    mcnemar,
    paired_interval,
    wilson,
)


# -- one run ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Scores of a run's rows.

    Attributes:
        shares: index -> score in [0, 1].
    """

    shares: Mapping[str, float]

    @property
    def binary(self) -> bool:
        """Whether each is right or wrong."""
        return set(self.shares.values()) <= {0.0, 1.0}

    @property
    def right(self) -> float | None:
        """Percent of the rows that are right."""
        return 100 * plain.fmean(self.shares.values()) if self.shares else None

    def interval(self) -> Interval | None:
        """95 % interval of it: Wilson's where rows are right or wrong, else by bootstrap."""
        values = list(self.shares.values())
        if not values:
            return None
        if self.binary:
            low, high = wilson(int(sum(values)), len(values))
            return Interval(100 * low, 100 * high)
        parts = [[value, 1.0] for value in values]
        return bootstrap([[0.0, 1.0]] * len(values), parts, _percent)


def _percent(sums: Any) -> Any:
    return 100 * sums[:, 0] / sums[:, 1]


def _bleu(sums: Any) -> Any:
    import numpy as np

    return np.array([metrics.bleu_of(row) for row in sums.tolist()])


def _mean(sums: Any) -> Any:
    return sums[:, 0] / sums[:, 1]


@lru_cache(maxsize=512)
def _caption_parts(run: Run) -> tuple[dict[str, list[float]], Callable[[Any], Any]] | None:
    """What each row of captions adds to the score that the data set is known by."""
    if run.record is None or run.record.score is None:
        return None
    right = {i: _references(q.answer) for i, (q, _) in run.asked.items() if q.answer}
    said = {i: one.prediction for i, one in run.answers.items() if i in right and not one.failed}
    if not said:
        return None
    if run.record.score.name == "Bleu_4":
        parts = {i: metrics.bleu_parts(text, right[i][0]) for i, text in said.items()}
        return {i: list(map(float, own)) for i, own in parts.items()}, _bleu
    if run.record.score.name == "CIDEr":
        try:
            rows = metrics.cider_rows(list(said.values()), [right[i] for i in said])
        except Unavailable:
            return None
        return {i: [row, 1.0] for i, row in zip(said, rows, strict=True)}, _mean
    return None


def _references(cell: str) -> list[str]:
    try:
        found = ast.literal_eval(cell) if cell.startswith("[") else [cell]
    except (ValueError, SyntaxError):
        found = [cell]
    return list(map(str, found))


# -- two runs --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """A run against another on the rows that both have.

    Attributes:
        rows: how many.
        points: difference of the scores; of captions, of the data set's own score.
        gained, lost: rows that only the second, or only the first, got right.
        p: of the exact McNemar test; ``None`` where rows are not right or wrong.
        low, high: 95 % interval of ``points``: closed form where rows are right or wrong, else by
            paired bootstrap.
    """

    rows: int
    points: float
    gained: int | None = None
    lost: int | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None


def difference(first: Run, second: Run) -> Difference | None:
    """``second`` against ``first``; ``None`` where no rows of both have scores."""
    a, b = first.scores, second.scores
    shared = [index for index in a if index in b]
    if shared:
        one, two = ([scores[i] for i in shared] for scores in (a, b))
        points = 100 * (plain.fmean(two) - plain.fmean(one))
        if not {*one, *two} <= {0.0, 1.0}:
            low, high = bootstrap([[x, 1.0] for x in one], [[x, 1.0] for x in two], _percent)
            return Difference(len(shared), points, low=low, high=high)
        found = mcnemar([x == 1.0 for x in one], [x == 1.0 for x in two])
        low, high = (100 * end for end in paired_interval(found.gained, found.lost, len(shared)))
        return Difference(len(shared), points, *found, low=low, high=high)
    mine, theirs = _caption_parts(first), _caption_parts(second)
    if mine is None or theirs is None:
        return None
    shared = [index for index in mine[0] if index in theirs[0]]
    if not shared:
        return None
    before, after = ([parts[i] for i in shared] for parts in (mine[0], theirs[0]))
    low, high = bootstrap(before, after, mine[1])
    points = float(mine[1](_sums(after))[0]) - float(mine[1](_sums(before))[0])
    return Difference(len(shared), points, low=low, high=high)


def _sums(rows: Sequence[Sequence[float]]) -> Any:
    import numpy as np

    return np.asarray(rows, dtype=float).sum(axis=0, keepdims=True)


# -- tables ----------------------------------------------------------------------------------------
FIGURES = (
    Figure("model", left=True, path="model"),
    Figure("method", left=True, path="setting"),
    Figure("data", left=True, path="dataset"),
    Figure("status", left=True, path="status"),
    Figure("score", 2, path="score.value"),
    Figure("score name", left=True, key="score_name", path="score.name"),
    Figure("±", 2, "standard error", key="standard_error", path="score.standard_error"),
    Figure("rows", 0, path="samples"),
    Figure("failed", 0, path="failed_rows"),
    Figure("budget", left=True, path="budget"),
    Figure("visual tokens", left=True, key="visual_tokens", path="token_steps"),
    Figure("kept", 1, "visual tokens of a decoder layer, mean over layers", path="kept"),
    Figure("kept last", 1, "of the last layer", key="kept_last", path="kept_last"),
    Figure(
        "FLOPs", 3, "language model's prefill, over unpruned", key="flops_ratio", path="flops.ratio"
    ),
    Figure(
        "image FLOPs",
        3,
        "the same of visual tokens alone, as papers state it",
        key="flops_ratio_visual",
        path="flops.ratio_visual",
    ),
    Figure(
        "with tower",
        3,
        "the same with the vision tower",
        key="flops_ratio_with_vision",
        path="flops.ratio_with_vision",
    ),
    Figure(
        "TTFT ms",
        1,
        "time to first token, median",
        key="ttft_ms",
        path="seconds.prefill.median",
        scale=1e3,
    ),
    Figure(
        "TPOT ms",
        1,
        "time per output token",
        key="tpot_ms",
        path="seconds.decode_per_token",
        scale=1e3,
    ),
    Figure("peak GiB", 2, key="peak_gib", path="peak_memory_bytes", scale=2**-30),
    Figure("J/row", 2, "energy of the GPU per row", key="joules_per_row", path="joules"),
    Figure("right", 1, "% of rows that are right", path="right"),
    Figure("low", 1, "95 % interval of it: Wilson's, or by bootstrap", path="low"),
    Figure("high", 1, path="high"),
    Figure("Δ", 2, "against the unpruned model on the same rows", key="delta", path="delta.points"),
    Figure("Δ low", 2, "95 % interval of Δ", key="delta_low", path="delta.low"),
    Figure("Δ high", 2, key="delta_high", path="delta.high"),
    Figure("gained", 0, "rows that only this setting has right", path="delta.gained"),
    Figure("lost", 0, "rows that only the unpruned model has right", path="delta.lost"),
    Figure("p", 4, "exact McNemar test of these, two-sided", path="delta.p"),
    Figure("p Holm", 4, "corrected for all tests of this column", key="p_holm", path="p_holm"),
    Figure(
        "hard",
        1,
        "% right of the rows that downsampling at the same budget gets wrong (arXiv 2510.07143)",
        path="hard",
    ),
    Figure("hard rows", 0, key="hard_rows", path="hard_rows"),
    Figure(
        "saved ms", 1, "of the time to first token, choosing included", key="saved_ms", path="saved"
    ),
    Figure(
        "choosing ms",
        1,
        "TTFT beyond what its FLOPs alone would take: above what is saved, pruning does not pay",
        key="choosing_ms",
        path="choosing",
    ),
    Figure(
        "saved FLOPs",
        1,
        "% of the unpruned prefill's FLOPs, tower included",
        key="saved_flops",
        path="saved_flops",
    ),
    Figure(
        "break-even",
        1,
        "% of these that has to be saved until time is: what choosing costs, in the same unit",
        key="break_even",
        path="break_even",
    ),
)
WHY = Figure("why", left=True, note="why a cell was skipped or failed", path="why")


def long_table(results: Results, convention: str = "ours") -> Table:
    """A row per run, with those that were skipped or failed, and all that is known of each.

    Args:
        results: of a sweep.
        convention: how ``tflops`` and their ratio are counted, see
            :mod:`vlm_prune_ext.experiment.conventions`.
    """
    counted = (
        Figure(f"TFLOPs {convention}", 4, key="tflops", path="counted.flops", scale=1e-12),
        Figure(f"ratio {convention}", 3, key="tflops_ratio", path="counted.ratio"),
    )
    columns = [*FIGURES, *counted, *metric_figures(), WHY]
    shown = [{**_figures(results, r), "counted": _counted(r, convention)} for r in results.runs]
    tested = [one for one in shown if (one.get("delta") or {}).get("p") is not None]
    for one, p in zip(tested, holm([one["delta"]["p"] for one in tested]), strict=True):
        one["p_holm"] = p
    return Table(columns, [[c.of(one) for c in columns] for one in shown], title="Sweep")


def _figures(results: Results, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": run.model,
        "setting": run.setting,
        "dataset": run.data,
        "status": run.status,
        "budget": run.budget,
        "why": run.line.why,
    }
    one = run.record
    if one is None:
        return found
    rows, base = Rows(run.scores), results.baseline(run)
    low, high = rows.interval() or (None, None)
    hard = _hard(results, run)
    versus = difference(base, run) if base is not None and base is not run else None
    return {
        **asdict(one),
        **found,
        "failed_rows": len(one.failed),
        "token_steps": one.token_steps,
        "kept": one.mean_visual_tokens,
        "kept_last": one.last_visual_tokens,
        "joules": one.energy_joules / one.samples if one.energy_joules and one.samples else None,
        "right": rows.right,
        "low": low,
        "high": high,
        "delta": asdict(versus) if versus else None,
        "hard": hard.right if hard else None,
        "hard_rows": len(hard.shares) if hard else None,
        **_break_even(run, base),
    }


def _counted(run: Run, convention: str) -> dict[str, float] | None:
    """FLOPs of a mean prompt; ``None`` where the decoder is not known."""
    sizes = run.record.config.get("decoder") if run.record else None
    samples = [one.sample for one in run.answers.values() if one.sample.lengths]
    if run.record is None or not sizes or not samples or not run.record.visual_tokens:
        return None
    from vlm_prune_ext.experiment.conventions import count
    from vlm_prune_ext.experiment.flops import DecoderShape

    groups = run.record.visual_tokens
    visual = [g.after for g in groups for _ in range(g.last - g.first + 1)]
    text = mean_of([one.prompt_tokens - one.visual_tokens for one in samples])
    found = count(convention, DecoderShape(**sizes), visual, text, groups[0].before)
    return {"flops": found.flops, "ratio": found.ratio}


def _hard(results: Results, run: Run) -> Rows | None:
    """Scores of the rows that plain downsampling at the same budget gets wrong (VTC-Bench, arXiv
    2510.07143): those on which a method can show more than a smaller picture has."""
    if not run.budget or run.method == "downsample":
        return None
    mine = (run.model, run.data, run.budget, "downsample")
    every = ((r.model, r.data, r.budget, r.method, r) for r in results.done)
    control = next((r for *its, r in every if tuple(its) == mine), None)
    if control is None or not control.scores:
        return None
    return Rows({i: s for i, s in run.scores.items() if control.scores.get(i, 1.0) < 0.5})


def _break_even(run: Run, base: Run | None) -> dict[str, float]:
    """Time and FLOPs saved, and what choosing costs of either."""
    times = [r.record.seconds.prefill if r and r.record else None for r in (run, base)]
    flops = run.record.flops if run.record else None
    if base is run or flops is None or times[0] is None or times[1] is None:
        return {}
    mine, whole = times[0].median, times[1].median
    ratio = flops.ratio if flops.ratio_with_vision is None else flops.ratio_with_vision
    choosing = mine - ratio * whole
    return {
        "saved": 1e3 * (whole - mine),
        "choosing": 1e3 * choosing,
        "saved_flops": 100 * (1 - ratio),
        "break_even": 100 * choosing / whole,
    }


def pair_table(results: Results) -> Table:
    """Methods against each other, at the same budget, on the same rows."""
    columns = [
        *(Column(name, left=True) for name in ("model", "data", "budget", "first", "second")),
        *(Column("rows", 0), Column("points", 2), Column("low", 2), Column("high", 2)),
        *(Column("gained", 0), Column("lost", 0), Column("p", 4), Column("p_holm", 4)),
    ]
    table = Table(columns, title="Methods against each other")
    found = []
    for first, second in combinations([r for r in results.done if r.method != "none"], 2):
        same = (first.model, first.data, first.budget) == (second.model, second.data, second.budget)
        versus = difference(first, second) if same and first.group != second.group else None
        if versus is not None:
            found.append((first, second, versus))
    tested = [versus.p for _, _, versus in found if versus.p is not None]
    corrected = iter(holm(tested))
    for first, second, v in found:
        holms = next(corrected) if v.p is not None else None
        names = [first.model, first.data, first.budget, first.setting, second.setting]
        figures = [v.rows, v.points, v.low, v.high, v.gained, v.lost, v.p, holms]
        table.rows.append([*names, *figures])
    return table


def category_table(results: Results) -> Table:
    """Percent of right rows by category, of data that have some."""
    columns = [
        *(Column(name, left=True) for name in ("model", "method", "data", "category")),
        *(Column("rows", 0), Column("right"), Column("low"), Column("high")),
    ]
    table = Table(columns, title="By category")
    for run in results.done:
        groups: dict[str, dict[str, float]] = {}
        for index, (question, score) in run.asked.items():
            if question.category and score is not None:
                groups.setdefault(question.category, {})[index] = score
        for name, shares in sorted(groups.items()):
            rows = Rows(shares)
            low, high = rows.interval() or (None, None)
            figures = [len(shares), rows.right, low, high]
            table.rows.append([run.model, run.setting, run.data, name, *figures])
    return table


def summary_table(
    results: Results,
    titles: Mapping[str, str] | None = None,
    title: str = "Visual tokens kept against scores",
) -> Table:
    """A row per setting, a column per data set; seeds of one setting are one row.

    Args:
        results: of a sweep.
        titles: data set -> heading, in order; ``None``: its name.
        title: above.
    """
    heads = titles or {name: name for name in results.data}
    more = metric_figures()
    columns = [Column("setting", left=True), Column("visual tokens"), Column("FLOPs", unit=" %")]
    columns += [Column(head) for head in heads.values()]
    table = Table([*columns, Column("prefill", 0, unit=" ms"), *more], title=title)
    for runs in by_setting(results.done):
        records = [run.record for run in runs if run.record is not None]
        ratios = [one.flops.ratio for one in records if one.flops]
        times = [one.seconds.prefill.median for one in records if one.seconds.prefill]
        some = runs[0]
        name = some.setting if len(results.models) < 2 else records[0].name
        table.rows.append(
            [
                name,
                records[0].token_steps,
                100 * mean_of(ratios) if ratios else None,
                *(_spread([run for run in runs if run.data == data]) for data in heads),
                1000 * mean_of(times) if times else None,
                *(_known([one.metrics.get(figure.key) for one in records]) for figure in more),
            ]
        )
    return table


def by_setting(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one model and setting, whatever their data set and seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return list(found.values())


def mean_of(values: Sequence[float]) -> float:
    """Of at least one."""
    return plain.fmean(values)


def _known(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean_of(there) if there else None


def _spread(runs: Sequence[Run]) -> float | str | None:
    """Score of a setting on a data set; of several seeds mean and standard deviation."""
    scores = [run.record.score.value for run in runs if run.record and run.record.score]
    if len(scores) < 2:
        return scores[0] if scores else None
    return f"{mean_of(scores):.1f} ± {plain.stdev(scores):.1f}"


def failures(results: Results) -> list[str]:
    """A line for each run that is not done, with the reason."""
    ended = [run for run in results.runs if run.status not in (DONE, "waiting", "running")]
    return [f"{r.status.capitalize()}: {r.setting}, {r.data}: {r.line.why}" for r in ended]
