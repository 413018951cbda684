"""The log of a grid: one JSON line a cell, written as soon as it is measured.

A cell that failed has a line too; it is tried again by the next start. Of several lines of one cell
the last one counts. A line that a killed process left unfinished is not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.jsonl import cut_unfinished, whole_lines

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        key: of the cell.
        cell: its settings, plain.
        label: the method's short name.
        status: ``"done"`` or ``"failed"``.
        result: figures, plain (of a cell that is done).
        why: of a cell that failed.
        host: hardware, versions, commit, idle power and date.
    """

    key: str
    cell: dict[str, Any]
    label: str
    status: str
    result: dict[str, Any] | None
    why: str | None
    host: dict[str, Any]


class Log:
    """A JSONL file.

    Args:
        path: the file; made with its folder at the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line) -> None:
        """Write one line, at once.

        Raises:
            InputError: the file cannot be written.
        """
        text = json.dumps(vars(line), ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_unfinished(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"--out {str(self.path)!r} cannot be written ({reason}).") from error

    def read(self) -> list[Line]:
        """The last whole line of each cell, in the order of their first ones.

        Raises:
            InputError: a line that is none of these.
        """
        found: dict[str, Line] = {}
        for number, text in enumerate(whole_lines(self.path), 1):
            try:
                line = Line(**json.loads(text))
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {str(self.path)!r} is not a cell of vlm-prune profile: give "
                    "another --out."
                ) from error
            found[line.key] = line
        return list(found.values())
