"""Tables of pictures with questions and right answers, as ``ablate`` and ``profile`` read them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlparse

from PIL import Image

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.tables import read_list, read_texts

DEFAULT_PROMPT = "Provide a one-sentence caption for the provided image."
"""Asked where neither the table nor ``--prompt`` says what to ask."""

IMAGE_NAMES = ("image", "image_path", "img", "path", "file_name", "filename", "file", "url")
PROMPT_NAMES = ("prompt", "query", "question", "instruction")
REFERENCE_NAMES = ("annotation", "answer", "caption", "reference", "ground_truth")
_PATTERNS = [re.compile(rf"{name}s?[ _-]?\d*", re.IGNORECASE) for name in REFERENCE_NAMES]


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        index: in the file, from 0.
        image: as the file has it.
        path: where the picture is.
        prompt: what is asked.
        references: right answers, at least one.
    """

    index: int
    image: str
    path: str
    prompt: str
    references: tuple[str, ...]

    def picture(self, side: int | None = None) -> Image.Image:
        """The picture in RGB, resized to ``side x side`` pixels (bicubic, shape not kept) where
        that is asked for.

        Raises:
            InputError: it is missing or does not decode.
        """
        from vlm_prune_ext.models.images import open_image

        found = open_image(self.path)
        return found if side is None else found.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used, and why."""

    index: int
    image: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.index + 1}{f' ({self.image})' if self.image else ''}: {self.reason}"


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
        path: the table.
        columns: in use.
        rows: that can be used.
        skipped: the others.
    """

    path: Path
    columns: Columns
    rows: list[Example]
    skipped: list[Skipped] = field(default_factory=list)

    def digests(self) -> dict[str, str]:
        """Short texts that change with the pictures, the prompts and the references."""
        found = {name: hashlib.sha256() for name in ("pictures", "prompts", "references")}
        for row in self.rows:
            with Path(row.path).open("rb") as file:
                while chunk := file.read(1 << 20):
                    found["pictures"].update(chunk)
            found["pictures"].update(f"|{row.index}\n".encode())
            found["prompts"].update(f"{row.index}:{json.dumps(row.prompt)}\n".encode())
            found["references"].update(f"{row.index}:{json.dumps(row.references)}\n".encode())
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
    whole: bool = False,
) -> Data:
    """Read a table of comma-separated values (tab-separated where its name ends in ``.tsv``).

    A cell of references may hold a list, ``["one", "two"]``. Relative pictures are looked for in
    ``image_folder`` and beside the table; of an address on the web the last part of its path is:
    nothing is fetched.

    Args:
        path: the file.
        image_column, prompt_column, reference_columns: where the names do not speak for
            themselves.
        image_folder: where relative pictures are.
        prompt: asked of every picture; ``{prompt}`` in it stands for the row's own.
        limit: only the first so many rows.
        whole: a row needs a prompt of its own and a picture that decodes (else the head of its file
            is looked at), which may lie beside the table as well.

    Raises:
        InputError: no such file, nothing in it, no usable column, or no row that can be used.
    """
    try:
        header, table, broken = read_texts(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    except InputError as error:
        raise InputError(f"--data {error}") from error
    if not table:
        raise InputError(f"--data {str(path)!r} is empty: a header and rows are needed.")
    columns = _columns(path, header, image_column, prompt_column, tuple(reference_columns))
    if image_folder is not None and not image_folder.is_dir() and not whole:
        raise InputError(f"--image-folder {str(image_folder)!r} is not a folder.")
    folders = [image_folder or path.parent, *([path.parent] if whole else [])]
    rows: list[Example] = []
    skipped: list[Skipped] = []
    for index, cells in enumerate(table[:limit]):
        if index in broken:
            skipped.append(Skipped(index, "", f"{broken[index].index} has {broken[index].reason}"))
            continue
        found = _example(index, cells, columns, folders, prompt, whole)
        (rows if isinstance(found, Example) else skipped).append(found)  # type: ignore[arg-type]
    if not rows:
        first = f", e.g. row {skipped[0].index}: {skipped[0].reason}" if skipped else ""
        raise InputError(f"--data {str(path)!r} has no row that can be used{first}.")
    return Data(path, columns, rows, skipped)


def _columns(
    path: Path,
    header: list[str],
    image: str | None,
    prompt: str | None,
    references: tuple[str, ...],
) -> Columns:
    said = {"image": [image], "prompt": [prompt], "reference": references}
    for kind, names in said.items():
        for name in names:
            if name is not None and name not in header:
                option = f"--{kind}-column{'s' if kind == 'reference' else ''}"
                raise unknown_name(f"{option} of {str(path)!r}", name, header)
    image = image or _first_of(header, IMAGE_NAMES)
    references = references or _references(header)
    if image is None or not references:
        what, option, names = ("references", "--reference-columns", REFERENCE_NAMES)
        if image is None:
            what, option, names = ("image", "--image-column", IMAGE_NAMES)
        raise InputError(
            f"--data {str(path)!r} has no column for {what} among {', '.join(header)}: "
            f"{', '.join(names)} are known, {option} names another."
        )
    return Columns(image, prompt or _first_of(header, PROMPT_NAMES), references)


def _first_of(header: list[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(header)}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _references(header: list[str]) -> tuple[str, ...]:
    """All columns of the first kind that is there: caption, caption_2, captions, ..."""
    kinds = (tuple(filter(pattern.fullmatch, header)) for pattern in _PATTERNS)
    return next(filter(None, kinds), ())


def _example(
    index: int,
    cells: dict[str, str],
    columns: Columns,
    folders: Sequence[Path],
    prompt: str | None,
    whole: bool,
) -> Example | Skipped:
    image = cells[columns.image].strip()
    if not image:
        return Skipped(index, image, "no image is named")
    path = next((path for folder in folders if (path := _find(image, folder))), None)
    if path is None:
        web = "an address on the web, and no file of its name is there"
        on_web = urlparse(image).scheme in ("http", "https")
        return Skipped(index, image, web if on_web else "no such file")
    given = [said for name in columns.references for said in read_list(cells[name])]
    references = tuple(said for said in map(one_line, given) if said)
    if not references:
        return Skipped(index, image, "no reference")
    own = cells[columns.prompt].strip() if columns.prompt else ""
    if whole and not own:
        return Skipped(index, image, "no question")
    own = own or DEFAULT_PROMPT
    asked = prompt.replace("{prompt}", own) if prompt else own
    example = Example(index, image, str(path), asked, references)
    broken = _unreadable(example, whole)
    return Skipped(index, image, broken) if broken else example


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


def _unreadable(example: Example, whole: bool) -> str | None:
    """Why a picture cannot be read: the head of its file, or, ``whole``, all of it."""
    try:
        if whole:
            example.picture()
        else:
            Image.open(example.path).close()
    except InputError as error:
        return str(error)
    except Exception as error:  # decoders raise whatever they like on damaged files
        return f"not a picture ({type(error).__name__})"
    return None


def one_line(text: str) -> str:
    """Blanks of all kinds, line ends and characters that are not printed become single blanks.

    Tools that read one caption a line would count wrong otherwise.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
