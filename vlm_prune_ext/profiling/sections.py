"""What a report says about one model, before it is Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_prune_ext.profiling.log import Line
from vlm_prune_ext.profiling.rows import Question, Row, varying


@dataclass(frozen=True)
class Section:
    """One question's table.

    Attributes:
        question: the axis.
        rows: of the table.
        fixed: what the other axes are.
        note: what a reader must know.
        plot: file name of the PNG.
    """

    question: Question
    rows: list[Row]
    fixed: str
    note: str
    plot: str


@dataclass(frozen=True)
class ModelReport:
    """All about one model.

    Attributes:
        name: as it was given.
        stem: of file names.
        rows: all cells that are done.
        sections: a question each.
        failed: cells that failed.
        hosts: hardware and software.
    """

    name: str
    stem: str
    rows: list[Row]
    sections: list[Section]
    failed: list[Line]
    hosts: list[str] = field(default_factory=list)


def columns_of(section: Section) -> list[Question]:
    """The axis, and what else differs among the rows."""
    return list(dict.fromkeys([section.question, *varying(section.rows)]))


def failed_text(line: Line) -> str:
    """A failed cell in a line."""
    cell = line.cell
    settings = [
        f"optimisation {cell['optimization'] or 'default'}",
        f"image {cell['img_size'] or 'as is'}",
        f"batch {cell['batch_size']}",
        f"text limit {cell['max_input_len'] or 'as is'}",
        f"KV cache {'yes' if cell['cached'] else 'no'}",
        line.label,
    ]
    return f"{', '.join(settings)}: {line.why}"
