"""Tables for a paper, in LaTeX with ``booktabs``."""

from __future__ import annotations

from vlm_prune_ext.experiment.report import Table, terminal_text

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
