"""Building a VLMEvalKit data set so that a broken row costs that row and not the run.

VLMEvalKit reads a whole TSV with pandas and stops at the first row it cannot use. Here such rows
are named and left out, and the rest is the data set that VLMEvalKit would have built from them. Its
pictures are unpacked by content (:func:`unpack`), and of a TSV of one's own
nothing outside VLMEvalKit's data folder is read.

The demo's data sets are subclasses of VLMEvalKit's, scored by its own code, of ``Shapes_*.tsv`` as
``vlm-prune demo-data`` writes them (:func:`vlm_prune_ext.evals.names.demo_data` says where).
VLMEvalKit's data folder (``LMUData``) is neither read nor written for them.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import vlmeval.dataset
from vlmeval.dataset import ImageCaptionDataset, ImageMCQDataset, ImageVQADataset, ImageYORNDataset
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.video_dataset_config import supported_video_datasets as VIDEO_SETS
from vlmeval.smp import load

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.evals.names import (
    LMUDATA,
    VARIABLE,
    cache_folder,
    data_root,
    demo_data,
    is_by_path,
    own_table,
    table_name,
    task_file,
    unknown_dataset,
)
from vlm_prune_ext.evals.vlmeval_store import own_reading
from vlm_prune_ext.tables import BadRow, read_as_written, read_header

# A cell of the image column that is shorter refers to the row that has the image.
_REFERENCE = 64


class OwnVQA(vlmeval.dataset.CustomVQADataset):
    """A table of one's own with questions and right answers, without options, which VLMEvalKit asks
    but does not score. Here its VQA score does, that of its own benchmarks of short answers."""

    evaluate = vlmeval.dataset.ImageVQADataset.evaluate_heuristic


class _OwnVideos:
    """Put in front of a class for tables of one's own: rows name a video in the column ``video``, a
    path beside the table, or none. VLMEvalKit has no such tables; it is shown their texts, as of
    rows without a picture, and scores their answers as it does those."""

    def post_build(self, dataset: str) -> None:
        """Rows have no pictures that VLMEvalKit would look for."""
        self.meta_only = False

    def dump_image(self, line: Any) -> list[str]:
        """None."""
        return []

    def videos_of(self, line: Any) -> list[dict[str, str]]:
        """The videos of a row, as items of a message."""
        name = line["video"]
        if pd.isna(name) or not str(name).strip():
            return []
        root = own_table(self.dataset_name).parent  # type: ignore[attr-defined]
        path = Path(os.path.normpath(root / str(name)))
        if not path.is_relative_to(root):
            raise InputError(f"video {str(name)[:80]!r} leads out of {str(root)!r}")
        return [{"type": "video", "value": str(path)}]


class OwnVideoMCQ(_OwnVideos, vlmeval.dataset.CustomMCQDataset):
    """A table of one's own with videos and multiple choice."""


class OwnVideoVQA(_OwnVideos, OwnVQA):
    """A table of one's own with videos, questions and right answers."""


_OWN = (
    vlmeval.dataset.CustomMCQDataset,
    vlmeval.dataset.CustomVQADataset,
    OwnVQA,
    OwnVideoMCQ,
    OwnVideoVQA,
)


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
    if name in VIDEO_SETS:
        made: Any = VIDEO_SETS[name]
        return made.func if isinstance(made, partial) else made  # type: ignore[return-value]
    path = own_table(name)
    if not path.is_file():
        raise unknown_dataset(name, _all_names())
    header = set(read_header(path, _separator(path)))
    if "video" in header:
        return OwnVideoMCQ if {"A", "B"} <= header else OwnVideoVQA
    if not {"A", "B"} <= header:
        scored = is_by_path(name) and "answer" in header
        return OwnVQA if scored else vlmeval.dataset.CustomVQADataset
    if header & {"image", "image_path"}:
        return vlmeval.dataset.CustomMCQDataset
    return vlmeval.dataset.CustomTextMCQDataset


def _separator(path: Path) -> str:
    return "," if path.suffix.lower() == ".csv" else "\t"


def _all_names() -> set[str]:
    names = {*vlmeval.dataset.SUPPORTED_DATASETS, *VIDEO_SETS}
    return {name for name in names if isinstance(name, str)}


def check_name(name: str, mode: str) -> None:
    """Refuse what cannot be run, before anything is loaded.

    Raises:
        InputError: an unknown data set, one of another kind than images with questions, or one
            that VLMEvalKit cannot score.
    """
    name = table_name(name)
    if task_file(name) is not None:
        if mode != "all":
            raise InputError(f"mode={mode!r} is not possible for {name}: lmms-eval does both.")
        return
    cls = class_of(name)
    if cls is vlmeval.dataset.CustomVQADataset and mode != "infer":
        raise InputError(
            f"data={name!r} is a TSV of your own without columns A and B, which VLMEvalKit cannot "
            "score: mode 'infer' is accepted, or a file with multiple choice."
        )
    modality, kind = getattr(cls, "MODALITY", "IMAGE"), getattr(cls, "TYPE", None)
    packed = modality == "VIDEO" and bool(_arguments(name).get("pack"))
    if kind == "MT" or packed:
        what = "several questions in one" if packed else "conversations of several turns"
        raise InputError(
            f"data={name!r} is not valid: it has {what}; data sets of images or videos with single "
            "questions are accepted."
        )
    if modality == "VIDEO" and name not in VIDEO_SETS:
        near = sorted(n for n in VIDEO_SETS if n.startswith(f"{name}_"))
        raise InputError(
            f"data={name!r} does not say which frames of a video are shown: "
            f"{', '.join(near) or 'no other name of it'} is accepted."
        )


def _arguments(name: str) -> dict[str, Any]:
    made = VIDEO_SETS.get(name)
    return dict(made.keywords) if isinstance(made, partial) else {}


def open_table(name: str) -> Table:
    """Build a data set.

    Raises:
        InputError: an unknown data set, or its data cannot be had.
    """
    cls = class_of(name)
    bad: list[BadRow] = []
    try:
        with own_reading(bad):
            if name in VIDEO_SETS:
                dataset: Any = VIDEO_SETS[name]()
            elif issubclass(cls, ImageBaseDataset):
                dataset = type(cls.__name__, (_Screening, cls), {"own": cls in _OWN})(name)
            else:
                dataset = cls(dataset=name)
    except InputError:
        raise
    except Exception as error:  # downloads, archives and parsers fail in many ways
        raise InputError(
            f"Data of {name} cannot be had ({reason_of(error)}): put the right "
            f"{name}.tsv into {str(data_root())!r}, or let VLMEvalKit download it."
        ) from error
    bad += getattr(dataset, "bad_rows", [])
    if dataset is None or not len(dataset):
        first = f" The first: row {bad[0].index}, {bad[0].reason}." if bad else ""
        raise InputError(f"Data of {name} has no row that can be used.{first}")
    return Table(dataset, bad, getattr(dataset, "without_image", 0))


class _Screening:
    """Put in front of a data set's class: looks at its rows before the class does, and unpacks
    their pictures."""

    own: bool  # a user's TSV, of which VLMEvalKit knows nothing
    bad_rows: list[BadRow]
    without_image: int

    def __init__(self, dataset: str) -> None:
        self.bad_rows, self.without_image = [], 0
        super().__init__(dataset=dataset)  # type: ignore[call-arg]

    def load_data(self, dataset: str) -> pd.DataFrame:
        """As in the class, without rows that it could not use."""
        if self.own:  # the class would cut a file above 1 GB up once, and never look at it again
            path = own_table(dataset)
            data, broken = read_as_written(path, _separator(path))
            self.bad_rows += broken
            if is_by_path(dataset) and "index" not in data:
                data.insert(0, "index", range(len(data)))
        else:
            data = super().load_data(dataset)  # type: ignore[misc]
        folder = Path(self.img_root) if self.own else None  # type: ignore[attr-defined]
        root = None
        if is_by_path(dataset):
            folder = root = own_table(dataset).parent
        kept, bad, self.without_image = screen(data, folder, root)
        self.bad_rows += bad
        if getattr(self, "TYPE", "") == "Caption":
            kept, bad = _with_literal_answers(kept)
            self.bad_rows += bad
        return kept

    def dump_image(self, line: Any) -> list[str]:
        """Files with the pictures of a row. Where the class has a way of its own, that is taken.

        Raises:
            InputError: a picture that is not base64.
        """
        theirs = type(self).__mro__[2].dump_image  # type: ignore[attr-defined]
        if theirs is not ImageBaseDataset.dump_image or "image" not in line:
            return theirs(self, line)
        images = line["image"] if isinstance(line["image"], list) else [line["image"]]
        return [unpack(image) for image in images]


# -- looking at rows -----------------------------------------------------------------------------
def screen(
    data: pd.DataFrame, folder: Path | None = None, root: Path | None = None
) -> tuple[pd.DataFrame, list[BadRow], int]:
    """Sort out rows that VLMEvalKit's classes would fail on, or would do something for that
    nobody asked for.

    Args:
        data: as read from a file.
        folder: ``images/NAME`` of VLMEvalKit's data folder, where pictures of ``image_path`` are
            for a table that has none in it; a path may lead anywhere in the data folder. ``None``:
            not looked at.
        root: what paths may not lead out of; ``None``: the data folder.

    Returns:
        the rows to go on with, the broken ones, and how many have no image but are whole otherwise
        (VLMEvalKit leaves those out by itself).
    """
    if "index" not in data:
        raise _without("'index'", data)
    if folder is not None and "question" not in data:
        raise _without("'question'", data)
    if folder is not None and not {"image", "image_path", "video"} & set(data):
        raise _without("'image', 'image_path' or 'video'", data)
    data = data.reset_index(drop=True)
    reasons: dict[int, str] = {}
    whole = _mostly(data["index"].map(_is_whole))
    wanted = [n for n in ("question", "answer") if n in data and _mostly(data[n].notna())]
    key_of = _spelt_alike if whole else _as_text
    images = _Images(data, key_of) if "image" in data else None
    paths = data["image_path"].astype(object) if "image_path" in data else None
    seen: dict[Any, int] = {}
    for place, index in enumerate(data["index"]):
        missing = [name for name in wanted if pd.isna(data[name].iloc[place])]
        key = key_of(index)
        if pd.isna(index):
            reasons[place] = "no index"
        elif whole and not _is_whole(index):
            reasons[place] = "the index is no number"
        elif key in seen:
            reasons[place] = f"row {seen[key] + 1} of the file has this index already"
        elif missing:
            reasons[place] = f"no {' and no '.join(missing)}"
        elif folder is not None and (letter := _empty_answer(data, place)):
            reasons[place] = f"option {letter}, its answer, is empty"
        elif images is not None and images.absent(place):
            seen[key] = place
        elif paths is not None and pd.isna(paths.iloc[place]):
            reasons[place] = "no image_path"
        else:
            try:
                if images is not None:
                    images.resolve(place)
                if paths is not None:
                    paths.iloc[place] = _paths(paths.iloc[place], None if images else folder, root)
                seen[key] = place
            except ValueError as error:
                reasons[place] = str(error)
    bad = [BadRow(_name(data, place, key_of), reason) for place, reason in reasons.items()]
    if images is not None:
        data = data.assign(image=images.cells)
    if paths is not None:
        data = data.assign(image_path=paths)
    kept = data.drop(index=list(reasons)).reset_index(drop=True)
    if whole and kept["index"].dtype != "int64" and len(kept):
        kept = kept.assign(index=[_whole(x) for x in kept["index"]])
    without = int(kept["image"].isna().sum()) if images is not None else 0
    return kept, bad, without


def _empty_answer(data: pd.DataFrame, place: int) -> str:
    """The option that a row's answer names, where there is none ("nan" reads as empty)."""
    name = data["answer"].iloc[place] if "answer" in data else None
    known = isinstance(name, str) and len(name) == 1 and name.isupper() and name in data
    return str(name) if known and pd.isna(data[name].iloc[place]) else ""


def _without(name: str, data: pd.DataFrame) -> InputError:
    return InputError(f"column {name} is missing; there are {', '.join(map(str, data))}.")


def _with_literal_answers(data: pd.DataFrame) -> tuple[pd.DataFrame, list[BadRow]]:
    """Rows of captions, which VLMEvalKit's scoring evaluates as Python, and those it must not."""
    bad = []
    for place, answer in enumerate(data.get("answer", ())):
        try:
            literal: Any = ast.literal_eval(str(answer))
        except _NO_LITERAL:
            literal = None
        if not isinstance(literal, str | list):
            index = str(data["index"].iloc[place])
            bad.append(BadRow(index, "the answer is no list of texts", place))
    left = data.drop(index=[row.place for row in bad]).reset_index(drop=True)
    return left, [replace(row, place=None) for row in bad]


_NO_LITERAL = (ValueError, SyntaxError, MemoryError, RecursionError)


class _Images:
    """The image column: base64 pictures, lists of them, and references to rows that have some."""

    def __init__(self, data: pd.DataFrame, key_of: Callable[[Any], Any]) -> None:
        self.cells, self._key_of = data["image"].astype(object), key_of
        long = [self._is_long(cell) for cell in self.cells]
        pairs = zip(data["index"], self.cells, long, strict=True)
        self._by_index = {key_of(i): cell for i, cell, is_long in pairs if is_long}

    @staticmethod
    def _is_long(cell: Any) -> bool:
        return not pd.isna(cell) and len(str(cell)) > _REFERENCE

    def absent(self, place: int) -> bool:
        """Whether the row has none."""
        return bool(pd.isna(self.cells.iloc[place]))

    def resolve(self, place: int) -> None:
        """Put the picture where a reference is, so that the row it leads to may be broken.

        Raises:
            ValueError: no picture, and why.
        """
        cell = self.cells.iloc[place]
        if not self._is_long(cell):
            if self._key_of(cell) not in self._by_index:
                raise ValueError(
                    "the image is neither base64 data nor the index of a row with some"
                )
            cell = self.cells.iloc[place] = self._by_index[self._key_of(cell)]
        if str(cell).startswith("["):
            _texts(str(cell), "image")


def _paths(cell: Any, folder: Path | None, root: Path | None) -> str:
    """``image_path`` as VLMEvalKit wants it; with a folder, as absolute paths that lie in it.

    Raises:
        ValueError: no path, or one that leads out.
    """
    several = str(cell).startswith("[")
    names = _texts(str(cell), "image_path") if several else [str(cell)]
    if folder is None:
        return str(names) if several else names[0]
    root = root or Path(os.path.normpath(folder)).parent.parent
    found = []
    for name in names:
        path = os.path.normpath(folder / name)  # links stay: whoever put them there asked for it
        if not Path(path).is_relative_to(root):
            raise ValueError(f"image_path {name[:80]!r} leads out of {str(root)!r}")
        found.append(path)
    return str(found) if several else found[0]


def _texts(cell: str, name: str) -> list[str]:
    """A list of texts. VLMEvalKit evaluates such a cell as Python, whatever it says.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = ast.literal_eval(cell)
    except _NO_LITERAL:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise ValueError(f"the {name} begins like a list, but is no list of texts")
    return found


def _name(data: pd.DataFrame, place: int, key_of: Callable[[Any], Any]) -> str:
    index = data["index"].iloc[place]
    return f"row {place + 1}" if pd.isna(index) else str(key_of(index))


def _mostly(truths: Iterable[bool]) -> bool:
    found = list(truths)
    return sum(found) > len(found) / 2


def _whole(value: Any) -> int | None:
    """A whole number, however it is spelt (``1``, ``01``, ``1.0``); ``None``: something else."""
    text = str(value).strip()
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if "_" in text:  # which Python reads past
        return None
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        return None
    return int(number)


def _is_whole(value: Any) -> bool:
    return _whole(value) is not None


def _spelt_alike(value: Any) -> Any:
    """The same for all spellings of an index."""
    number = _whole(value)
    return _as_text(value) if number is None else number


def _as_text(value: Any) -> str:
    return str(value).strip()


# -- pictures --------------------------------------------------------------------------------------
_OTHER_ALPHABET = str.maketrans("-_", "+/")
_KINDS = ((b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))


def unpack(encoded: str) -> str:
    """A file with a picture's bytes, as they are. Text that was met before is not decoded again.

    Args:
        encoded: base64, with either alphabet; blanks and line ends in it do not count.

    Raises:
        InputError: it is not base64.
        OSError: the folder cannot be written.
    """
    key = hashlib.sha256(encoded.encode(errors="surrogatepass")).digest(), cache_folder()
    path, state = _unpacked.get(key, ("", ()))
    if not path or _state(path) != state:
        path = str(keep(_decoded(encoded)))
        if len(_unpacked) >= _PATHS:
            _unpacked.clear()
        _unpacked[key] = path, _state(path)
    return path


_PATHS = 1 << 16  # files that are known at a time
_unpacked: dict[tuple[bytes, Path], tuple[str, tuple[int, ...]]] = {}


def _state(path: str) -> tuple[int, ...]:
    """Changes when a file is written to; nothing where it is gone."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


def _decoded(encoded: str) -> bytes:
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        plain = "".join(encoded.split()).translate(_OTHER_ALPHABET)
        return base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the image is not base64 data") from error


def keep(data: bytes) -> Path:
    """A file with these bytes in the cache folder; one that holds others is written again."""
    ending = next((ending for start, ending in _KINDS if data.startswith(start)), ".png")
    digest = hashlib.sha256(data).hexdigest()[:40]
    path = cache_folder() / "pictures" / digest[:2] / f"{digest}{ending}"
    if path.is_file() and path.read_bytes() == data:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# -- the demo's data sets --------------------------------------------------------------------------
# Answers in these sets are short; VLMEvalKit's limit for LLaVA (2048) would only let a model that
# does not stop by itself babble.
MAX_NEW_TOKENS = {"Shapes_MCQ": 16, "Shapes_YN": 16, "Shapes_VQA": 16, "Shapes_Caption": 64}


class _Shapes:
    """In front of a class of VLMEvalKit's: data and pictures in a folder of their own."""

    def __init__(self, dataset: str, **kwargs: Any) -> None:
        with _no_lmudata():
            super().__init__(dataset=dataset, **kwargs)  # type: ignore[call-arg]

    def prepare_tsv(self, url: str, file_md5: str | None = None) -> Any:
        """The table, from our folder instead of a download."""
        name = self.dataset_name  # type: ignore[attr-defined]
        path = demo_data("tsv") / f"{name}.tsv"
        if not path.is_file():
            raise InputError(
                f"{str(path)!r} is missing: {VARIABLE} must name a folder made by "
                "`vlm-prune demo-data`, or not be set."
            )
        self.data_path = str(path)
        return load(str(path))


@contextmanager
def _no_lmudata() -> Iterator[None]:
    """VLMEvalKit makes its data folder when a data set is built; here it gets an existing one."""
    before = os.environ.get(LMUDATA)
    os.environ[LMUDATA] = tempfile.gettempdir()
    try:
        yield
    finally:
        os.environ.pop(LMUDATA)
        os.environ |= {LMUDATA: before} if before is not None else {}


_BASES = {
    "Shapes_MCQ": ImageMCQDataset,
    "Shapes_YN": ImageYORNDataset,
    "Shapes_VQA": ImageVQADataset,
    "Shapes_Caption": ImageCaptionDataset,
}
CLASSES = {
    name: type(
        name.replace("_", ""), (_Shapes, base), {"DATASET_URL": {name: ""}, "DATASET_MD5": {}}
    )
    for name, base in _BASES.items()
}


def register_datasets() -> None:
    """Make VLMEvalKit know the four data sets. A second call does nothing."""
    known = vlmeval.dataset.DATASET_CLASSES
    for name, cls in CLASSES.items():
        if cls not in known:
            known.append(cls)
            vlmeval.dataset.SUPPORTED_DATASETS.append(name)
