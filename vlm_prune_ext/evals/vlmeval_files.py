"""Keeps the files of several VLMEvalKit processes apart, those of killed ones from being read, and
words in tables from being taken for missing values.

VLMEvalKit (checked: 0.0.20) writes pictures straight to their place, where another process, or the
next run after a kill, takes the first half of one for the whole; and its scoring of multiple choice
writes ``/tmp/<time to the second>.xlsx`` and reads it back, which two processes do in the same
second. Its readers take ``None``, ``NA`` and ``null``, which options and answers may be, for
missing values, and it finds out what a text is by running it as Python.
"""

from __future__ import annotations

import ast
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from vlmeval.dataset.utils import multiple_choice, vqa_eval
from vlmeval.smp import file as reading
from vlmeval.smp import misc, vlm

from vlm_prune_ext.tables import BadRow, read_leniently


@contextmanager
def own_files() -> Iterator[None]:
    """While this is open, pictures appear whole or not at all, scoring files have own names, and
    tables are read as :func:`own_reading` has it.

    Only names inside VLMEvalKit's modules are exchanged, and they are put back.
    """
    tag = uuid.uuid4().hex
    with own_reading([]), ExitStack() as stack:
        for module in _users_of(vlm.decode_base64_to_image_file):
            exchange(stack, module, "decode_base64_to_image_file", whole(module))
        plain = multiple_choice.timestr
        exchange(stack, multiple_choice, "timestr", lambda: f"{plain()}_{tag}")
        try:
            yield
        finally:
            for left in Path("/tmp").glob(f"*_{tag}.*"):  # the folder is VLMEvalKit's choice
                left.unlink(missing_ok=True)


@contextmanager
def own_reading(bad: list[BadRow]) -> Iterator[None]:
    """While this is open, VLMEvalKit reads tables so that words stay words, and rows break alone.

    Args:
        bad: takes the broken rows of TSV files.
    """
    with ExitStack() as stack:
        exchange(stack, reading, "pd", _Pandas(bad))
        exchange(stack, pd.DataFrame, "to_excel", _as_text(pd.DataFrame.to_excel))
        for module in {*_users_of(misc.istype), *_users_of(vqa_eval.istype)}:
            exchange(stack, module, "istype", is_spelled)
        yield


def is_spelled(value: Any, kind: type) -> bool:
    """VLMEvalKit's ``istype``, which runs a text (an index) as Python to see what it is: whether a
    value is of a kind, or a text that spells one as Python writes it."""
    if isinstance(value, kind) or not isinstance(value, str):
        return isinstance(value, kind)
    if kind is int:  # what int() reads, and no more: 0x10 and 1_0 are names
        return re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", value) is not None
    try:
        return isinstance(ast.literal_eval(value), kind)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


class _Pandas:
    """pandas, as far as the module of VLMEvalKit's that reads files uses it."""

    def __init__(self, bad: list[BadRow]) -> None:
        self._bad = bad

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    def read_csv(self, path: Any, sep: str = ",", **options: Any) -> pd.DataFrame:
        """A table's whole rows."""
        data, bad = read_leniently(Path(path), sep, **options)
        self._bad += bad
        return data

    def read_excel(self, path: Any, **options: Any) -> pd.DataFrame:
        """A sheet whose texts are what was written: words, and signs that XML has no place for."""
        options = {"dtype": object, "keep_default_na": False, "na_values": [""], **options}
        found = pd.read_excel(path, **options).infer_objects()  # 007 stays a text
        found = found.map(lambda cell: _plain(cell) if isinstance(cell, str) else cell)
        if "prediction" in found:  # an empty answer is an answer
            found["prediction"] = found["prediction"].astype(object).fillna("")
        return found


_ESCAPED = re.compile(r"_x(00[01][0-9A-F])_")


def _plain(text: str) -> str:
    """Without the way in which xlsx writes control characters, which openpyxl leaves as it is."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def _as_text(write: Callable[..., Any]) -> Callable[..., Any]:
    """``DataFrame.to_excel`` whose cells stay the texts they are: VLMEvalKit's makes formulas and
    links of answers that look like some."""

    def to_excel(self: pd.DataFrame, *args: Any, **options: Any) -> Any:
        if options.get("engine") == "xlsxwriter":
            kinds = ("formulas", "urls", "numbers")
            plain = {f"strings_to_{kind}": False for kind in kinds}
            options["engine_kwargs"] = {"options": plain}
        return write(self, *args, **options)

    return to_excel


def exchange(stack: ExitStack, module: Any, name: str, new: Any) -> None:
    """Another thing under a module's name, until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, new)


def _users_of(function: Callable[..., Any]) -> list[Any]:
    """VLMEvalKit's modules that have this function under its name."""
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("vlmeval")]
    return [m for m in loaded if getattr(m, function.__name__, None) is function]


def whole(module: Any) -> Callable[..., None]:
    """The module's writer of pictures, writing beside the place and moving there when done."""
    write = module.decode_base64_to_image_file

    def write_whole(data: str, image_path: str, *args: Any, **kwargs: Any) -> None:
        place = Path(image_path)
        part = place.with_name(f".{uuid.uuid4().hex}{place.suffix}")
        try:
            write(data, str(part), *args, **kwargs)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)

    return write_whole
