"""The CSV of a captioning data set, and captions without what models write beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.tables import BadRow, read_list, read_texts

DEFAULT_PROMPT = "Provide a one-sentence caption for the provided image."
"""Asked where neither the CSV nor ``--prompt`` says what to ask."""

IMAGE_NAMES = ("image", "image_path", "img", "path", "file_name", "filename", "file", "url")
PROMPT_NAMES = ("prompt", "query", "question", "instruction")
REFERENCE_NAMES = ("annotation", "answer", "caption", "reference", "ground_truth")
_PATTERNS = [re.compile(rf"{name}s?[ _-]?\d*", re.IGNORECASE) for name in REFERENCE_NAMES]


@dataclass(frozen=True)
class Row:
    """One picture to describe.

    Attributes:
        index: of the row in the file, from 0.
        image: as the file has it.
        path: where the picture is.
        prompt: what is asked.
        references: right captions, at least one, each on one line.
    """

    index: int
    image: str
    path: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used, and why."""

    index: int
    image: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use; no prompt column is fine."""

    image: str
    prompt: str | None
    references: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        path: the CSV.
        columns: in use.
        rows: that can be used.
        skipped: the others.
    """

    path: Path
    columns: Columns
    rows: list[Row]
    skipped: list[Skipped] = field(default_factory=list)

    def digests(self) -> dict[str, str]:
        """Short texts that change with the pictures, the prompts and the references."""
        pictures, prompts, references = (hashlib.sha256() for _ in range(3))
        for row in self.rows:
            with Path(row.path).open("rb") as file:
                while chunk := file.read(1 << 20):
                    pictures.update(chunk)
            pictures.update(f"|{row.index}\n".encode())
            prompts.update(f"{row.index}:{json.dumps(row.prompt)}\n".encode())
            references.update(f"{row.index}:{json.dumps(row.references)}\n".encode())
        found = {"pictures": pictures, "prompts": prompts, "references": references}
        return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def read_data(
    path: Path,
    *,
    image_column: str | None = None,
    prompt_column: str | None = None,
    reference_columns: Sequence[str] = (),
    image_folder: Path | None = None,
    prompt: str | None = None,
    limit: int | None = None,
) -> Data:
    """Read a captioning CSV (tab-separated where its name ends in ``.tsv``).

    A cell of references may hold a list, ``["one", "two"]``. Relative pictures are looked for
    beside the CSV, or in ``image_folder``; of an address on the web the last part of its path is
    looked for there: nothing is fetched.

    Args:
        path: the file.
        image_column, prompt_column, reference_columns: where the names do not speak for
            themselves.
        image_folder: where relative pictures are.
        prompt: asked of every picture; ``{prompt}`` in it stands for the row's own.
        limit: only the first so many rows.

    Raises:
        InputError: no such file, nothing in it, no usable column, or no row that can be used.
    """
    header, table, broken = _read_table(path)
    columns = _columns(path, header, image_column, prompt_column, tuple(reference_columns))
    folder = image_folder if image_folder is not None else path.parent
    if not folder.is_dir():
        raise InputError(f"--image-folder {str(folder)!r} is not a folder.")
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for index, cells in enumerate(table[:limit]):
        if index in broken:
            skipped.append(Skipped(index, "", f"{broken[index].index} has {broken[index].reason}"))
            continue
        found = _row(index, cells, columns, folder, prompt)
        (rows if isinstance(found, Row) else skipped).append(found)  # type: ignore[arg-type]
    if not rows:
        first = f", e.g. row {skipped[0].index}: {skipped[0].reason}" if skipped else ""
        raise InputError(f"--data {str(path)!r} has no row that can be used{first}.")
    return Data(path, columns, rows, skipped)


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]], dict[int, BadRow]]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        header, table, broken = read_texts(path, separator)
    except InputError as error:
        raise InputError(f"--data {error}") from error
    if not table:
        raise InputError(f"--data {str(path)!r} is empty: a header and rows are needed.")
    return header, table, broken


def _columns(
    path: Path,
    header: list[str],
    image: str | None,
    prompt: str | None,
    references: tuple[str, ...],
) -> Columns:
    for option, named in (
        ("--image-column", [image]),
        ("--prompt-column", [prompt]),
        ("--reference-columns", references),
    ):
        for name in named:
            if name is not None and name not in header:
                raise unknown_name(f"{option} of {str(path)!r}", name, header)
    image = image or _first_of(header, IMAGE_NAMES)
    prompt = prompt or _first_of(header, PROMPT_NAMES)
    references = references or _references(header)
    missing = [
        (what, names)
        for what, names, found in (
            ("image", IMAGE_NAMES, image),
            ("references", REFERENCE_NAMES, references),
        )
        if not found
    ]
    if missing:
        what, names = missing[0]
        option = "--image-column" if what == "image" else "--reference-columns"
        raise InputError(
            f"--data {str(path)!r} has no column for {what} among {', '.join(header)}: "
            f"{', '.join(names)} are known, {option} names another."
        )
    assert image is not None
    return Columns(image, prompt, references)


def _first_of(header: list[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(header)}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _references(header: list[str]) -> tuple[str, ...]:
    """All columns of the first kind that is there: caption, caption_2, captions, ..."""
    for pattern in _PATTERNS:
        found = tuple(name for name in header if pattern.fullmatch(name))
        if found:
            return found
    return ()


def _row(
    index: int, cells: dict[str, Any], columns: Columns, folder: Path, prompt: str | None
) -> Row | Skipped:
    image = str(cells[columns.image] or "").strip()
    if not image:
        return Skipped(index, image, "no image is named")
    path = _find(image, folder)
    if path is None:
        web = urlparse(image).scheme in ("http", "https")
        reason = (
            "an address on the web, and no file of its name is there" if web else "no such file"
        )
        return Skipped(index, image, reason)
    broken = _unreadable(path)
    if broken:
        return Skipped(index, image, broken)
    given = [said for name in columns.references for said in read_list(str(cells[name] or ""))]
    references = [said for said in map(one_line, given) if said]
    if not references:
        return Skipped(index, image, "no reference")
    own = str(cells[columns.prompt] or "").strip() if columns.prompt else ""
    own = own or DEFAULT_PROMPT
    asked = prompt.replace("{prompt}", own) if prompt else own
    return Row(index, image, str(path), asked, tuple(references))


def _find(image: str, folder: Path) -> Path | None:
    address = urlparse(image)
    if address.scheme in ("http", "https"):
        image = unquote(address.path).rpartition("/")[2]
        if not image:
            return None
    path = folder / Path(image).expanduser()
    try:
        return path.resolve() if path.is_file() else None
    except (OSError, ValueError):  # a name that no file system takes
        return None


def _unreadable(path: Path) -> str | None:
    """Why the head of a picture's file cannot be read; the whole is read when it is its turn."""
    from PIL import Image

    try:
        with Image.open(path):
            return None
    except Exception as error:  # decoders raise whatever they like on damaged files
        return f"not a picture ({type(error).__name__})"


# -- clean-up before scoring -----------------------------------------------------------------------
# Only what cannot be part of a caption goes: control tokens, tags around entities with their
# coordinates, and the prompt where it is repeated in front.
# <|im_end|>, <|endoftext|>, ...
_BARS = re.compile(r"<\|[^<>|\s][^<>|]{0,60}\|>")
_WORDS = (
    r"s|pad|unk|bos|eos|sep|cls|mask|image|img|video|IMG_CONTEXT|image_soft_token|im_patch|"
    r"im_start|im_end|start_of_image|end_of_image|start_of_turn|end_of_turn|end_of_utterance|"
    r"fake_token_around_image|global-img|row_\d+_col_\d+|grounding"
)
_SPECIAL = re.compile(rf"</?(?:{_WORDS})\s*/?>|\[/?INST\]|<</?SYS>>")
# Coordinates go with all that is in them; of marks around entities the words between stay.
_BOXES = re.compile(r"<(box|quad|poly)>.*?(?:</\1>|$)", re.DOTALL)
_PLACES = re.compile(r"<(?:patch_index_|loc_?|bbox_|seg_?)\d+>")
_ENTITIES = re.compile(r"</?(?:ref|phrase|p|object|obj|entity|delimiter_of_multi_objects)\s*/?>")

# Around a repeated prompt: who speaks in front of it, and who answers behind it.
_ASKER = re.compile(r"(?:user|human|question)\s*(:?)\s*", re.IGNORECASE)
_ANSWERER = r"(?:assistant|model|(?:short )?answer)"
_OPENING = re.compile(rf"{_ANSWERER}\s*:\s*", re.IGNORECASE)
_OPENING_OF_TURN = re.compile(rf"{_ANSWERER}\b\s*:?\s*", re.IGNORECASE)
_ASSISTANT = re.compile(r"(?:ASSISTANT|Assistant)\s*:\s*")


def clean(text: str, prompt: str = "") -> str:
    """A caption on one line, without control tokens, entity tags and the repeated prompt.

    Cleaning what is clean changes nothing.

    >>> clean("<|im_start|> A <ref>red square</ref><box>[[1, 2, 3, 4]]</box>.</s>")
    'A red square.'
    >>> clean("USER: What is this? ASSISTANT: A cat.", "What is this?")
    'A cat.'
    """
    return drop_prompt(drop_tags(text), prompt)


def drop_tags(text: str) -> str:
    """Without control tokens and entity tags, on one line."""
    before = None
    while before != text:  # taking one out may put the next together
        before = text
        text = _PLACES.sub("", _BOXES.sub("", text))
        text = _SPECIAL.sub(" ", _BARS.sub(" ", _ENTITIES.sub("", text)))
    return one_line(text)


def drop_prompt(text: str, prompt: str) -> str:
    """Without the prompt in front, however often it is repeated there, and without the names of
    the speakers that a chat template puts around it.

    Letter case and blanks may differ. A caption that only begins like the prompt stays.
    """
    text, asked = one_line(text), one_line(drop_tags(prompt))
    while True:
        text = text[_end(_ASSISTANT, text) :]
        rest = _behind(text, asked) if asked else None
        if rest is None:
            return text
        text = rest


def _behind(text: str, prompt: str) -> str | None:
    """What follows the prompt; ``None`` where the text does not begin with it."""
    lead = _end(_ASKER, text)
    for start in dict.fromkeys((0, lead)):
        end = start + len(prompt)
        if text[start:end].lower() != prompt.lower():
            continue
        rest = text[end:]
        if rest and rest[0].isalnum() and prompt[-1].isalnum():
            continue  # "a photo" and "a photograph"
        rest = rest.lstrip()
        opening = _OPENING_OF_TURN if start else _OPENING
        return rest[_end(opening, rest) :].lstrip(" :-" if not start else " ")
    return None


def _end(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found else 0


def one_line(text: str) -> str:
    """Blanks of all kinds, line ends and characters that are not printed become single blanks.

    Tools that read one caption a line would count wrong otherwise.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
