"""Files of a sweep, made of its result files alone: tables in five forms, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_prune_ext.experiment.comparison import (
    category_table,
    long_table,
    pair_table,
    summary_table,
)
from vlm_prune_ext.experiment.log import write_whole
from vlm_prune_ext.experiment.pareto import draw
from vlm_prune_ext.experiment.published import published_table
from vlm_prune_ext.experiment.report import Table, terminal_text, write_table
from vlm_prune_ext.experiment.results import Results

TABLES = ("md", "csv", "tex", "json")
PLOTS = ("png", "pdf")


def write(
    results: Results,
    formats: Sequence[str] = (*TABLES, *PLOTS),
    titles: Mapping[str, str] | None = None,
    convention: str | None = None,
) -> list[Path]:
    """Write ``sweep.<format>`` into the results' folder, and beside the table of all runs those of
    pairs, categories and published figures (``sweep_pairs``, ``sweep_categories``,
    ``sweep_published``) and the plots by cost (``sweep_flops``...).

    Args:
        results: of a sweep.
        formats: of :data:`TABLES` and :data:`PLOTS`.
        titles: data set -> its title.
        convention: how FLOPs are counted in two further columns; ``None``: as the sweep was told.

    Returns:
        the files.

    Raises:
        InputError: the folder cannot be written.
    """
    convention = convention or str(results.settings.get("flops_convention") or "ours")
    tables = {
        "sweep": long_table(results, convention),
        "sweep_pairs": pair_table(results),
        "sweep_categories": category_table(results),
        "sweep_published": published_table(results),
    }
    written = []
    for stem, table in tables.items():
        if not table.rows:
            continue
        for name in [name for name in TABLES if name in formats]:
            path = results.folder / f"{stem}.{name}"
            if name == "tex":  # a page holds one row per setting, not every figure of every run
                short = summary_table(results, titles) if stem == "sweep" else table
                write_whole(path, latex(short))
            else:
                write_table(results.folder, stem, table, [name])
            written.append(path)
    plots = [name for name in PLOTS if name in formats]
    return written + draw(results, results.folder / "sweep", plots, titles)


# -- LaTeX with booktabs ---------------------------------------------------------------------------
_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "…": r"\ldots{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def latex_cell(value: object) -> str:
    """A text that LaTeX prints as it is."""
    return "".join(_SIGNS.get(character, character) for character in terminal_text(value))


def latex(table: Table) -> str:
    """A table as a ``tabular`` of its own; the document needs ``\\usepackage{booktabs}``."""
    sides = "".join("l" if column.left else "r" for column in table.columns)
    head = " & ".join(latex_cell(column.name) for column in table.columns)
    rows = (" & ".join(map(latex_cell, row)) + r" \\" for row in table.cells())
    said = [f"% {latex_cell(text)}" for text in (table.title, table.legend(), *table.notes) if text]
    return "\n".join(
        [
            *said,
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
