"""A folder of examples, ``images/`` and ``data.csv`` with columns image, question, answer: reading
it, writing it, and where its rows come from.

``image`` is a path inside ``images/`` (or inside the folder). ``answer`` is one reference or a
JSON list of several.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vlm_prune_ext.errors import InputError, first_line, unknown_name
from vlm_prune_ext.evals.examples import DEFAULT_PROMPT, Data, Skipped, read_data
from vlm_prune_ext.experiment.log import write_whole
from vlm_prune_ext.tables import BadRow, read_header, read_list, read_texts

CSV = "data.csv"
IMAGES = "images"
COLUMNS = ("image", "question", "answer")


def read_folder(path: str | Path, samples: int | None = None) -> Data:
    """Read a folder; every picture is decoded once, so that a broken one is known before anything
    is measured.

    Args:
        path: the folder.
        samples: rows to read, the first ones; ``None``: all.

    Raises:
        InputError: no such folder, no table, no such columns, or no row that can be used.
    """
    path = Path(path)
    table = path / CSV
    if not table.is_file():
        what = "is empty or has no" if path.is_dir() else "does not exist, so it has no"
        raise InputError(
            f"Folder {str(path)!r} {what} {CSV}: a folder with {IMAGES}/ and {CSV} is accepted "
            "(vlm-prune profile-data makes one)."
        )
    columns = [name.strip() for name in read_header(table, ",")]
    if missing := [name for name in COLUMNS if name not in columns]:
        raise InputError(
            f"{str(table)!r} has no column {', '.join(missing)}: the columns {', '.join(COLUMNS)} "
            f"are needed, found are {', '.join(columns) or 'none'}."
        )
    image, question, answer = COLUMNS
    return read_data(
        table,
        image_column=image,
        prompt_column=question,
        reference_columns=[answer],
        image_folder=path / IMAGES,
        limit=samples,
        whole=True,
    )


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
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {str(path)!r} cannot be written ({reason}).") from error
    write_whole(path / CSV, file.getvalue())
    return count


def _ending(picture: bytes) -> str:
    if picture.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if picture[8:12] == b"WEBP" else ".jpg"


# -- sources: VLMEvalKit's TSVs, lmms-eval's parquet files, the demo -------------------------------
LETTERS = "ABCDEFGHIJ"
CHOOSE = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
DEMO_SETS = ("mcq", "yn", "vqa", "caption")
# A cell of a TSV this short is no picture but the index of the row that has it.
_SHORTEST = 64


def entries_from(
    source: str, samples: int, seed: int, prompt: str | None = None
) -> tuple[list[Entry], list[Skipped]]:
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
        return list(_demo(source, samples, seed, prompt)), []
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
    entries, skipped = _draw(rows, samples, seed, prompt)
    if not entries:
        first = f" The first: {skipped[0]}." if skipped else ""
        raise InputError(f"--from {source!r} has no row that can be used.{first}")
    return entries, skipped


Row: TypeAlias = "Mapping[str, Any] | BadRow"


def _draw(
    rows: Sequence[Row], samples: int, seed: int, prompt: str | None
) -> tuple[list[Entry], list[Skipped]]:
    """Rows in an order drawn by lot, until there are enough usable ones."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for place in order:
        if len(entries) == samples:
            break
        row = rows[place]
        try:
            if isinstance(row, BadRow):
                raise InputError(f"{row.index} has {row.reason}")
            entries.append(_entry(row, prompt))
        except InputError as error:
            index = "" if isinstance(row, BadRow) else str(row.get("index", ""))
            skipped.append(Skipped(place, index, str(error)))
    return entries, skipped


def _entry(row: Mapping[str, Any], prompt: str | None) -> Entry:
    picture, answers = _picture(row.get("image")), _answers(row)
    if not answers:
        raise InputError("it has no answer")
    return Entry(picture, prompt or _question(row), answers)


def _picture(value: Any) -> bytes:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("its picture is not base64") from error
    if not isinstance(value, bytes) or not value:
        raise InputError("it has no picture")
    from vlm_prune_ext.models.images import open_image

    open_image(value)
    return value


def _question(row: Mapping[str, Any]) -> str:
    """A row's question with its context and options, worded as LLaVA's evaluation words them."""
    asked = _text(row.get("question"))
    options = _options(row)
    hint = _text(row.get("hint"))
    if not asked:
        return DEFAULT_PROMPT
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
        if isinstance(value, int) and not isinstance(value, bool) and _options(row):
            return (LETTERS[value],)  # ScienceQA's answers are places
        if found := read_list(value):
            return tuple(found)
    return ()


def _text(value: Any) -> str:
    """A cell as text; what stands for nothing is empty."""
    if value is None or value != value:  # NaN
        return ""
    said = str(value).strip()
    return "" if said.lower() == "nan" else said


def _tsv_rows(path: Path) -> list[Row]:
    try:
        columns, rows, broken = read_texts(path, "\t")
    except InputError as error:
        raise InputError(f"--from {error}") from error
    _check_columns(path, columns)
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
    _check_columns(paths[0], table.column_names)
    return _ArrowRows(table)  # type: ignore[return-value]


class _ArrowRows:
    """Rows of a table, read when asked for: pictures of a whole data set are large."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        return self._table.slice(place, 1).to_pylist()[0]


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [] if "image" in names else ["image"]
    if not missing and not {"answer", "answers", "caption", "captions"} & set(names):
        missing = ["answer"]
    if missing:
        raise InputError(
            f"--from {str(path)!r} has no column {', '.join(missing)}; found are "
            f"{', '.join(names[:12])}."
        )


def _demo(source: str, count: int, seed: int, prompt: str | None) -> Iterator[Entry]:
    from vlm_prune_ext.demo.drawing import make_scene, render
    from vlm_prune_ext.demo.questions import samples

    kind = source.partition(":")[2] or "vqa"
    if kind not in DEMO_SETS:
        raise unknown_name("demo set", kind, DEMO_SETS)
    for sample in samples(kind, seed, count):
        file = io.BytesIO()
        render(make_scene(sample["scene_seed"])).save(file, format="PNG")
        asked = _question({"question": sample["question"], "choices": sample.get("options")})
        if kind == "vqa":
            asked = f"{asked}\n{SHORT}"
        yield Entry(file.getvalue(), prompt or asked, (sample["answer"],))
