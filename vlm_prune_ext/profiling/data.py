"""A folder of examples: ``images/`` and ``data.csv`` with columns image, question, answer.

``image`` is a path inside ``images/`` (or inside the folder). ``answer`` is one reference or a
JSON list of several.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.tables import BadRow, read_list, read_texts

CSV = "data.csv"
IMAGES = "images"
COLUMNS = ("image", "question", "answer")


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        row: its line in the table, the first one behind the header is 1.
        image: path of the picture.
        question: what is asked.
        answers: references, at least one.
    """

    row: int
    image: Path
    question: str
    answers: tuple[str, ...]

    def picture(self, side: int | None = None) -> Image.Image:
        """The picture in RGB, resized to ``side x side`` pixels (bicubic, shape not kept) where
        that is asked for.

        Raises:
            InputError: it is missing or does not decode.
        """
        from vlm_prune_ext.models.images import open_image

        found = open_image(self.image)
        if side is None:
            return found
        return found.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Failure:
    """A row that cannot be used, and why."""

    row: int
    image: str
    why: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.image}): {self.why}"


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Attributes:
        path: the folder.
        examples: rows that can be used, in order.
        failures: rows that cannot.
        digest: changes when a used row or the bytes of its picture do.
    """

    path: Path
    examples: tuple[Example, ...]
    failures: tuple[Failure, ...]
    digest: str


def read_folder(path: str | Path, samples: int | None = None) -> Folder:
    """Read a folder; every picture is decoded once, so that a broken one is known before anything
    is measured.

    Args:
        path: the folder.
        samples: rows to read, the first ones; ``None``: all.

    Raises:
        InputError: no such folder, no table, no such columns, or no row that can be used.
    """
    path = Path(path)
    rows = _rows(path)
    examples: list[Example] = []
    failures: list[Failure] = []
    digest = hashlib.sha256()
    for number, row in enumerate(rows if samples is None else rows[:samples], 1):
        if isinstance(row, BadRow):
            made: Example | Failure = Failure(number, row.index, row.reason)
        else:
            made = _example(path, number, row)
        if isinstance(made, Failure):
            failures.append(made)
            continue
        examples.append(made)
        digest.update(repr((made.question, made.answers)).encode())
        digest.update(made.image.read_bytes())
    if not examples:
        first = f" The first: {failures[0]}." if failures else ""
        raise InputError(f"Folder {str(path)!r} has no row that can be used.{first}")
    return Folder(path, tuple(examples), tuple(failures), digest.hexdigest()[:16])


def _rows(path: Path) -> list[dict[str, str] | BadRow]:
    table = path / CSV
    if not table.is_file():
        what = "is empty or has no" if path.is_dir() else "does not exist, so it has no"
        raise InputError(
            f"Folder {str(path)!r} {what} {CSV}: a folder with {IMAGES}/ and {CSV} is accepted "
            "(vlm-prune profile-data makes one)."
        )
    columns, rows, broken = read_texts(table, ",")
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise InputError(
            f"{str(table)!r} has no column {', '.join(missing)}: the columns {', '.join(COLUMNS)} "
            f"are needed, found are {', '.join(columns) or 'none'}."
        )
    if not rows:
        raise InputError(f"{str(table)!r} has no rows.")
    return [broken.get(place, row) for place, row in enumerate(rows)]


def _example(path: Path, number: int, row: dict[str, str]) -> Example | Failure:
    name, question = (row["image"] or "").strip(), (row["question"] or "").strip()
    for value, what in ((name, "image"), (question, "question")):
        if not value:
            return Failure(number, name or "?", f"it has no {what}")
    answers = tuple(read_list(row["answer"] or ""))
    if not answers:
        return Failure(number, name, "it has no answer")
    places = [path / IMAGES / name, path / name]
    image = next((place for place in places if place.is_file()), None)
    if image is None:
        return Failure(number, name, f"there is no such picture in {IMAGES}/")
    example = Example(number, image, question, answers)
    try:
        example.picture()
    except InputError as error:
        return Failure(number, name, str(error))
    return example


# -- writing -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """A row to write: the picture's bytes, the question and the references."""

    picture: bytes
    question: str
    answers: Sequence[str]


def check_target(path: str | Path) -> None:
    """Raise InputError where a folder holds examples already."""
    if (Path(path) / CSV).exists():
        raise InputError(f"--out {str(path)!r} has a {CSV} already: name another folder.")


def write_folder(path: str | Path, entries: Iterable[Entry]) -> int:
    """Write a folder; the table comes last, so a folder with a table is whole.

    Returns:
        how many rows it has.

    Raises:
        InputError: there is a table already, or the folder cannot be written.
    """
    path = Path(path)
    check_target(path)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    count = 0
    try:
        (path / IMAGES).mkdir(parents=True, exist_ok=True)
        for count, entry in enumerate(entries, 1):
            name = f"{count - 1:06d}{_ending(entry.picture)}"
            (path / IMAGES / name).write_bytes(entry.picture)
            several = len(entry.answers) > 1
            answer = json.dumps(list(entry.answers), ensure_ascii=False)
            writer.writerow([name, entry.question, answer if several else entry.answers[0]])
        part = path / f".{CSV}.part"
        part.write_text(file.getvalue(), encoding="utf-8")
        part.replace(path / CSV)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {str(path)!r} cannot be written ({reason}).") from error
    return count


def _ending(picture: bytes) -> str:
    if picture.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if picture[8:12] == b"WEBP" else ".jpg"
