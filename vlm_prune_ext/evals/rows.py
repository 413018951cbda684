"""Building a VLMEvalKit data set so that a broken row costs that row and not the run.

VLMEvalKit reads a whole TSV with pandas and stops at the first row it cannot use. Here such rows
are named and left out, and the rest is the data set that VLMEvalKit would have built from them.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import vlmeval.dataset
from vlmeval.dataset.image_base import ImageBaseDataset

from vlm_prune_ext.errors import InputError, reason_of, unknown_name
from vlm_prune_ext.evals.shapes import LMUDATA

# A cell of the image column that is shorter refers to the row that has the image.
_REFERENCE = 64


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used: its index (or ``line N`` of the file), and why."""

    index: str
    reason: str


@dataclass
class Table:
    """A data set that was built.

    Attributes:
        dataset: VLMEvalKit's object, of its own class (or a subclass that screens rows).
        bad: rows that were left out because they are broken.
        without_image: rows that VLMEvalKit leaves out because they have no image.
    """

    dataset: Any
    bad: list[BadRow]
    without_image: int = 0


def class_of(name: str) -> type:
    """VLMEvalKit's class for a data set; for a user's own TSV the one it takes for such.

    Raises:
        InputError: neither it nor a TSV of that name is there.
    """
    for cls in vlmeval.dataset.DATASET_CLASSES:
        if name in cls.supported_datasets():
            return cls
    path = data_root() / f"{name}.tsv"
    if not path.is_file():
        error = unknown_name("dataset", name, _all_names())
        short = str(error).split(" Accepted: ")[0]
        raise InputError(
            f"{short} Accepted: VLMEvalKit's data sets, Shapes_MCQ, Shapes_YN, Shapes_VQA, "
            f"Shapes_Caption, or a TSV of your own at {str(path)!r}."
        )
    with path.open(encoding="utf-8", errors="replace") as file:
        header = set(file.readline().rstrip("\r\n").split("\t"))
    if not {"A", "B"} <= header:
        return vlmeval.dataset.CustomVQADataset
    if header & {"image", "image_path"}:
        return vlmeval.dataset.CustomMCQDataset
    return vlmeval.dataset.CustomTextMCQDataset


def data_root() -> Path:
    """VLMEvalKit's data folder, without making it."""
    named = os.environ.get(LMUDATA)
    return Path(named) if named and Path(named).is_dir() else Path("~/LMUData").expanduser()


def _all_names() -> set[str]:
    names = set(vlmeval.dataset.SUPPORTED_DATASETS)
    return {name for name in names if isinstance(name, str)}


def check_name(name: str, mode: str) -> None:
    """Refuse what cannot be run, before anything is loaded.

    Raises:
        InputError: an unknown data set, one of another kind than images with questions, or one
            that VLMEvalKit cannot score.
    """
    cls = class_of(name)
    if cls is vlmeval.dataset.CustomVQADataset and mode != "infer":
        raise InputError(
            f"data={name!r} is a TSV of your own without columns A and B, which VLMEvalKit cannot "
            "score: mode 'infer' is accepted, or a file with multiple choice."
        )
    modality, kind = getattr(cls, "MODALITY", "IMAGE"), getattr(cls, "TYPE", None)
    if modality == "VIDEO" or kind == "MT":
        what = "videos" if modality == "VIDEO" else "conversations of several turns"
        raise InputError(
            f"data={name!r} is not valid: it has {what}; data sets of images with single questions "
            "are accepted."
        )


def open_table(name: str) -> Table:
    """Build a data set.

    Raises:
        InputError: an unknown data set, or its data cannot be had.
    """
    cls = class_of(name)
    try:
        if issubclass(cls, ImageBaseDataset):
            dataset: Any = type(cls.__name__, (_Screening, cls), {})(dataset=name)
        else:
            dataset = cls(dataset=name)
    except InputError:
        raise
    except Exception as error:  # downloads, archives and parsers fail in many ways
        raise InputError(
            f"Data of {name} cannot be had ({reason_of(error)}): put the right "
            f"{name}.tsv into {str(data_root())!r}, or let VLMEvalKit download it."
        ) from error
    if dataset is None or not len(dataset):
        raise InputError(f"Data of {name} has no row that can be used.")
    bad = getattr(dataset, "bad_rows", [])
    return Table(dataset, bad, getattr(dataset, "without_image", 0))


class _Screening:
    """Put in front of a data set's class: looks at its rows before the class does."""

    bad_rows: list[BadRow]
    without_image: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.bad_rows, self.without_image = [], 0
        super().__init__(*args, **kwargs)

    def prepare_tsv(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """As in the class."""
        return self._whole(lambda: super(_Screening, self).prepare_tsv(*args, **kwargs))  # type: ignore[misc]

    def load_data(self, dataset: str) -> pd.DataFrame:
        """As in the class, without rows that it could not use."""
        data = self._whole(lambda: super(_Screening, self).load_data(dataset))  # type: ignore[misc]
        kept, bad, self.without_image = screen(data)
        self.bad_rows += bad
        return kept

    def _whole(self, read: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """What ``read`` returns; a file with rows of a wrong length is read again row by row."""
        try:
            data = read()
        except pd.errors.ParserError:
            data = None
        # A first row that is too long makes pandas take its first column for row names.
        if data is not None and isinstance(data.index, pd.RangeIndex):
            return data
        own = data_root() / f"{self.dataset_name}.tsv"  # type: ignore[attr-defined]
        data, bad = read_leniently(Path(getattr(self, "data_path", own)))
        self.bad_rows += bad
        return data


# -- reading a file with broken lines ------------------------------------------------------------
def read_leniently(path: Path) -> tuple[pd.DataFrame, list[BadRow]]:
    """Read a TSV row by row; rows whose number of cells differs from the header's are left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = _parsed(lines)
    _, header = next(rows)
    good, bad = [header], []
    for line, row in rows:
        if len(row) == len(header):
            good.append(row)
        else:
            bad.append(BadRow(f"line {line}", f"{len(row)} cells where {len(header)} belong"))
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(good)
    text.seek(0)
    return pd.read_csv(text, sep="\t"), bad


def _parsed(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and cells of each row. A quote that is never closed swallows what
    follows it: a row over several lines that has the wrong length is read again line by line."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        place, width = 0, None
        while place < len(lines):
            reader = csv.reader(iter(lines[place:]), delimiter="\t")
            row = next(reader)
            taken = reader.line_num
            width = len(row) if width is None else width
            if len(row) != width and taken > 1:
                row, taken = lines[place].rstrip("\r\n").split("\t"), 1
                row = row if len(row) != width else [*row, ""]  # the open quote makes it broken
            if row:
                yield place + 1, row
            place += taken
    finally:
        csv.field_size_limit(limit)


# -- looking at rows -----------------------------------------------------------------------------
def screen(data: pd.DataFrame) -> tuple[pd.DataFrame, list[BadRow], int]:
    """Sort out rows that VLMEvalKit's classes would fail on.

    Args:
        data: as read from a file.

    Returns:
        the rows to go on with, the broken ones, and how many have no image but are whole otherwise
        (VLMEvalKit leaves those out by itself).
    """
    if "index" not in data:
        raise InputError(f"column 'index' is missing; there are {', '.join(map(str, data))}.")
    reasons: dict[int, str] = {}
    whole = _mostly_whole_numbers(data["index"])
    wanted = [name for name in ("question", "answer") if name in data and _mostly_there(data[name])]
    images = data["image"].astype(object) if "image" in data else None
    long = _long_images(data) if images is not None else set()
    for place, index in enumerate(data["index"]):
        missing = [name for name in wanted if pd.isna(data[name].iloc[place])]
        if pd.isna(index):
            reasons[place] = "no index"
        elif whole and not _is_whole(index):
            reasons[place] = "the index is no number"
        elif missing:
            reasons[place] = f"no {' and no '.join(missing)}"
        elif images is not None and not pd.isna(images.iloc[place]):
            image = str(images.iloc[place])
            if len(image) <= _REFERENCE and image not in long:
                reasons[place] = "the image is neither base64 data nor the index of a row with some"
    bad = [BadRow(_name(data, place), reason) for place, reason in reasons.items()]
    kept = data.drop(index=data.index[list(reasons)]) if reasons else data
    if whole and kept["index"].dtype != "int64" and len(kept):
        kept = kept.assign(index=[int(float(x)) for x in kept["index"]])
    without = int(kept["image"].isna().sum()) if images is not None else 0
    return kept.reset_index(drop=True) if reasons else kept, bad, without


def _name(data: pd.DataFrame, place: int) -> str:
    index = data["index"].iloc[place]
    if pd.isna(index):
        return f"row {place + 1}"
    return str(int(float(index))) if _is_whole(index) else str(index)


def _mostly_there(column: pd.Series) -> bool:
    return bool(column.notna().mean() > 0.5)


def _mostly_whole_numbers(column: pd.Series) -> bool:
    if column.dtype.kind in "iu":
        return True
    return sum(map(_is_whole, column)) > len(column) / 2


def _is_whole(value: Any) -> bool:
    try:
        return float(value).is_integer()
    except (TypeError, ValueError):
        return False


def _long_images(data: pd.DataFrame) -> set[str]:
    """Indices of rows that have an image of their own, as text."""
    long = data["image"].astype(str).str.len() > _REFERENCE
    indices = data["index"][long & data["index"].notna()]
    return {str(int(float(x))) if _is_whole(x) else str(x) for x in indices}
