"""Tables of examples in text files (TSV, CSV): cells are text, and a broken row costs that row.

pandas parses; in front of it every row's cells are counted, because pandas fills short rows up
without a word and stops at long ones.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError, first_line

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "nan", "NaN", "<NA>", "#N/A")
"""What stands for no value. ``None``, ``NA`` and ``null``, which pandas takes for such as well, are
words that options and answers may be."""

TEXT_CELLS: dict[str, Any] = {"keep_default_na": False, "na_values": list(MISSING)}
"""Options of pandas' readers."""


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used.

    Attributes:
        index: of the row, or ``line N`` of the file.
        reason: why.
        place: which row of the file it is, from 0; ``None`` where that was not counted.
    """

    index: str
    reason: str
    place: int | None = None


def read_leniently(
    path: Path, separator: str = "\t", **options: Any
) -> tuple[pd.DataFrame, list[BadRow]]:
    """Read a table; rows whose number of cells differs from the header's are left out and named.

    Args:
        path: of a file in UTF-8, with or without a byte order mark.
        separator: of cells.
        options: further ones of ``pandas.read_csv`` (``dtype=str``: cells stay as written).

    Raises:
        InputError: it cannot be read, or is empty.
    """
    import pandas as pd

    try:
        source, bad = _screened(path, separator)
        return pd.read_csv(
            source, sep=separator, encoding="utf-8-sig", **TEXT_CELLS, **options
        ), bad
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{str(path)!r} is empty: a header and rows are needed.") from error
    except ValueError as error:  # as pandas' own errors are
        raise InputError(f"{str(path)!r} is not a table: {first_line(error)}.") from error


def read_as_written(path: Path, separator: str) -> tuple[pd.DataFrame, list[BadRow]]:
    """As :func:`read_leniently`, but all cells are the texts that were written (``007``, ``1.0``,
    ``TRUE``).

    Raises:
        InputError: as there, and where two columns have one name.
    """
    names = [name.strip() for name in read_header(path, separator) if name.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{str(path)!r} has column {twice[0]!r} twice: once is accepted.")
    return read_leniently(path, separator, dtype=str)


def read_texts(
    path: Path, separator: str
) -> tuple[list[str], list[dict[str, str]], dict[int, BadRow]]:
    """A table of text alone.

    Args:
        path, separator: as in :func:`read_leniently`.

    Returns:
        names of the columns, without blanks around them; all rows, the broken ones empty; and the
        broken ones by their place.

    Raises:
        InputError: as :func:`read_leniently`.
    """
    data, bad = read_as_written(path, separator)
    data.columns = [str(name).strip() for name in data]
    broken = {row.place: row for row in bad if row.place is not None}
    whole = iter(data.fillna("").to_dict("records"))
    count = len(data) + len(broken)
    rows: list[Any] = [{} if place in broken else next(whole) for place in range(count)]
    return list(data), rows, broken


def read_header(path: Path, separator: str = "\t") -> list[str]:
    """Names of a table's columns.

    Raises:
        InputError: as :func:`read_leniently`.
    """
    try:
        with _open(path) as file:
            header = next(_rows(file, separator), None)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a table: {error}.") from error
    if header is None:
        raise InputError(f"{str(path)!r} is empty: a header and rows are needed.")
    return header.cells


def _open(path: Path) -> Any:
    # Undecodable bytes become lone surrogates: the row that holds one is named. `newline=""` splits
    # at line ends only and leaves them as they are.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _screened(path: Path, separator: str) -> tuple[Any, list[BadRow]]:
    """What pandas can parse: the path where all rows are whole, else the whole rows' text."""
    with _open(path) as file:
        if not any(row.reason for row in _rows(file, separator)):
            return path, []
        file.seek(0)
        lines = list(file)
    good, bad = [], []
    for place, row in enumerate(_rows(lines, separator), -1):
        if row.reason:
            bad.append(BadRow(f"line {row.line}", row.reason, place))
        else:
            good.append(row.cells)
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(good)  # with "\n" it would not quote "\r"
    text.seek(0)
    return text, bad


@dataclass(frozen=True)
class _Row:
    line: int  # its first one, from 1
    cells: list[str]
    reason: str = ""


def _rows(file: Any, separator: str) -> Iterator[_Row]:
    """All rows, the header first; empty lines are none."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        width = None
        for line, cells in _parsed(_Lines(file), separator):
            if width is None:
                width = len(cells or [])
                if any("\0" in cell or _odd(cell) for cell in cells or []):
                    raise ValueError("its header is no UTF-8 text (UTF-16 is not): save it as such")
            if cells is None:
                yield _Row(line, [], "it holds a NUL byte")
            elif len(cells) != width:
                yield _Row(line, cells, f"{len(cells)} cells where {width} belong")
            elif any("\udc80" <= sign <= "\udcff" for cell in cells for sign in _odd(cell)):
                yield _Row(line, cells, "bytes that are not UTF-8")
            else:
                yield _Row(line, cells)
    finally:
        csv.field_size_limit(limit)


def _odd(cell: str) -> str:
    """The cell where it holds a surrogate; encoding finds that faster than looking at signs."""
    if cell.isascii():
        return ""
    try:
        cell.encode()
    except UnicodeEncodeError:
        return cell
    return ""


class _Lines:
    """Lines with a way back to where a row began."""

    def __init__(self, lines: Any) -> None:
        self._lines, self._again, self.taken = iter(lines), list[str](), list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self.taken.append(line)
        return line

    def begin(self) -> None:
        self.taken = []

    def back(self) -> None:
        """Give all lines of this row but the first to the rows to come."""
        self._again += reversed(self.taken[1:])
        del self.taken[1:]


def _parsed(lines: _Lines, separator: str) -> Iterator[tuple[int, list[str] | None]]:
    """Line number (from 1) and cells of each row. A quote that is never closed swallows what
    follows it: a row over several lines that has the wrong length is read again line by line."""
    line, width = 1, None
    while True:
        lines.begin()
        try:
            row: list[str] | None = next(csv.reader(lines, delimiter=separator))
        except StopIteration:
            return
        except csv.Error:
            row = None
        if width is None:
            width = len(row or [])
        elif len(lines.taken) > 1 and (row is None or len(row) != width):
            lines.back()
            row = lines.taken[0].rstrip("\r\n").split(separator)
            row = row if len(row) != width else [*row, ""]  # the open quote makes it broken
        if row is None or row:
            yield line, row
        line += len(lines.taken)


def read_list(cell: Any) -> list[str]:
    """What a cell holds: one text, or those of a list, also as JSON or Python writes it; what is
    empty is left out."""
    found: Any = cell
    if isinstance(cell, str) and (text := cell.strip()).startswith("[") and text.endswith("]"):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(text)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    values = found if isinstance(found, list) else [cell]
    # VQA's answers come as mappings with an `answer`; NaN is none.
    values = [one.get("answer") if isinstance(one, dict) else one for one in values]
    return [said for one in values if one is not None and one == one and (said := str(one).strip())]
