"""A folder of examples, ``images/`` and ``data.csv`` with columns image, question, answer: reading
it, writing it, and where its rows come from.

``image`` is a path inside ``images/`` (or inside the folder). ``answer`` is one reference or a
JSON list of several.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vlm_prune_ext.errors import InputError, first_line, unknown_name
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


# -- sources ---------------------------------------------------------------------------------------
# Where folders of examples come from: VLMEvalKit TSVs, lmms-eval parquet files, the demo.


LETTERS = "ABCDEFGHIJ"
CHOOSE = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."
DEMO_SETS = ("mcq", "yn", "vqa", "caption")
# A cell of a TSV this short is no picture but the index of the row that has it.
_SHORTEST = 64


def entries_from(
    source: str, samples: int, seed: int, prompt: str | None = None
) -> tuple[list[Entry], list[Failure]]:
    """Draw rows from a source.

    Args:
        source: ``demo`` (or ``demo:mcq``, ``demo:yn``, ``demo:vqa``, ``demo:caption``), a
            ``.tsv`` file, a ``.parquet`` file, or a folder of parquet files.
        samples: how many; fewer where the source has fewer.
        seed: of the draw.
        prompt: one question for all rows instead of their own.

    Returns:
        the rows, and those that were drawn but cannot be used.

    Raises:
        InputError: no such source, or one that is not of its kind or has no usable row.
    """
    if source.partition(":")[0] == "demo":
        return _demo(source, samples, seed, prompt), []
    path = Path(source)
    if path.suffix == ".tsv" and path.is_file():
        rows = _tsv_rows(path)
    elif path.suffix == ".parquet" and path.is_file():
        rows = _parquet_rows([path])
    elif path.is_dir() and sorted(path.glob("*.parquet")):
        rows = _parquet_rows(sorted(path.glob("*.parquet")))
    else:
        raise InputError(
            f"--from {source!r} is not valid: demo, an existing .tsv or .parquet file, or a folder "
            "of .parquet files is accepted."
        )
    entries, failures = _draw(rows, samples, seed, prompt)
    if not entries:
        first = f" The first: {failures[0]}." if failures else ""
        raise InputError(f"--from {source!r} has no row that can be used.{first}")
    return entries, failures


Row: TypeAlias = "Mapping[str, Any] | BadRow"


def _draw(
    rows: Sequence[Row], samples: int, seed: int, prompt: str | None
) -> tuple[list[Entry], list[Failure]]:
    """Rows in an order drawn by lot, until there are enough usable ones."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    entries: list[Entry] = []
    failures: list[Failure] = []
    for place in order:
        if len(entries) == samples:
            break
        row = rows[place]
        if isinstance(row, BadRow):
            failures.append(Failure(place + 1, row.index, row.reason))
            continue
        try:
            entries.append(_entry(row, prompt))
        except _Unusable as error:
            failures.append(Failure(place + 1, str(row.get("index", "?")), str(error)))
    return entries, failures


class _Unusable(Exception):
    """A row that cannot be used."""


def _entry(row: Mapping[str, Any], prompt: str | None) -> Entry:
    picture = _picture(row.get("image"))
    answers = _answers(row)
    if not answers:
        raise _Unusable("it has no answer")
    return Entry(picture, prompt or _question(row), answers)


# -- pictures ------------------------------------------------------------------------------------
def _picture(value: Any) -> bytes:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _Unusable("its picture is not base64") from error
    if not isinstance(value, bytes) or not value:
        raise _Unusable("it has no picture")
    from vlm_prune_ext.models.images import open_image

    try:
        open_image(value)
    except InputError as error:
        raise _Unusable(str(error)) from error
    return value


# -- questions and answers -------------------------------------------------------------------------
def _question(row: Mapping[str, Any]) -> str:
    """A row's question with its context and options, worded as LLaVA's evaluation words them."""
    asked = _text(row.get("question"))
    options = _options(row)
    hint = _text(row.get("hint"))
    if not asked:
        return CAPTION
    lines = [f"Context: {hint}"] if hint else []
    lines.append(asked)
    lines += [f"{letter}. {said}" for letter, said in options.items()]
    if options and CHOOSE not in asked:
        lines.append(CHOOSE)
    elif not options and isinstance(row.get("answers"), list | tuple):
        lines.append(SHORT)
    return "\n".join(lines)


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Options by letter: columns A, B, ... or a list of choices."""
    choices = row.get("choices")
    choices = choices if choices is not None else row.get("options")
    if isinstance(choices, list | tuple):
        return dict(zip(LETTERS, map(str, choices), strict=False))
    found = {letter: _text(row.get(letter)) for letter in LETTERS}
    return {letter: said for letter, said in found.items() if said}


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    for name in ("answers", "answer", "captions", "caption"):
        value = row.get(name)
        if isinstance(value, list | tuple):
            found = tuple(said for entry in value if (said := _text(_inner(entry))))
        elif isinstance(value, int) and not isinstance(value, bool) and _options(row):
            found = (LETTERS[value],)  # ScienceQA's answers are places
        else:
            found = tuple(read_list(_text(value)))
        if found:
            return found
    return ()


def _inner(value: Any) -> Any:
    """VQA's answers come as mappings with an ``answer``."""
    return value.get("answer") if isinstance(value, Mapping) else value


def _text(value: Any) -> str:
    """A cell as text; what stands for nothing is empty."""
    if value is None or value != value:  # NaN
        return ""
    said = str(value).strip()
    return "" if said.lower() == "nan" else said


# -- files ---------------------------------------------------------------------------------------
def _tsv_rows(path: Path) -> list[Row]:
    try:
        columns, rows, broken = read_texts(path, "\t")
    except InputError as error:
        raise InputError(f"--from {error}") from error
    _require(path, columns, ("image",))
    whole = [row for place, row in enumerate(rows) if place not in broken]
    by_index = {row.get("index", ""): row["image"] for row in reversed(whole)}
    for row in whole:
        if len(row["image"]) <= _SHORTEST:  # the picture of another row
            row["image"] = by_index.get(row["image"], row["image"])
    return [broken.get(place, row) for place, row in enumerate(rows)]


def _parquet_rows(paths: Sequence[Path]) -> list[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = pa.concat_tables([parquet.read_table(path) for path in paths])
    except (pa.ArrowException, OSError) as error:
        said = first_line(error)
        raise InputError(f"--from {str(paths[0])!r} is not a parquet file: {said}.") from error
    names = {"images": "image"} if "image" not in table.column_names else {}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    _require(paths[0], table.column_names, ("image",))
    return _ArrowRows(table)  # type: ignore[return-value]


class _ArrowRows:
    """Rows of a table, read when asked for: pictures of a whole data set are large."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        return self._table.slice(place, 1).to_pylist()[0]


def _require(path: Path, columns: Any, needed: Sequence[str]) -> None:
    names = list(columns)
    missing = [name for name in needed if name not in names]
    if not missing and not {"answer", "answers", "caption", "captions"} & set(names):
        missing = ["answer"]
    if missing:
        raise InputError(
            f"--from {str(path)!r} has no column {', '.join(missing)}; found are "
            f"{', '.join(names[:12])}."
        )


# -- the demo ------------------------------------------------------------------------------------
def _demo(source: str, count: int, seed: int, prompt: str | None) -> list[Entry]:
    kinds = source.partition(":")[2] or "vqa"
    if kinds not in DEMO_SETS:
        raise unknown_name("demo set", kinds, DEMO_SETS)
    return list(_demo_entries(kinds, count, seed, prompt))


def _demo_entries(kind: str, count: int, seed: int, prompt: str | None) -> Iterator[Entry]:
    from vlm_prune_ext.demo.drawing import make_scene, render
    from vlm_prune_ext.demo.questions import samples

    for sample in samples(kind, seed, count):
        file = io.BytesIO()
        render(make_scene(sample["scene_seed"])).save(file, format="PNG")
        options = list(sample.get("options", ()))
        row = {"question": sample["question"], "choices": options or None}
        question = prompt or _question(row)
        if kind == "vqa" and prompt is None:
            question = f"{question}\n{SHORT}"
        yield Entry(file.getvalue(), question, (sample["answer"],))
