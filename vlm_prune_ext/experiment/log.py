"""What runs write while they work: one append-only log of JSON lines, and files written whole.

A process may be killed between any two instructions. What it had appended stays readable, a line it
left unfinished costs that line only, and files that are written whole are the old or the new one.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vlm_prune_ext.errors import InputError

T = TypeVar("T")

LOCK = ".lock"
ASIDE = "previous"


class Log:
    """A file of JSON objects, one a line, that is only ever added to.

    Args:
        path: the file; made at the first line, in a folder that is there (see :func:`lock`).

    Attributes:
        broken: numbers (from 1) of lines that the last :meth:`read` could not use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken: list[int] = []

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Add entries with a single write; an unfinished line before them is closed first.

        Raises:
            InputError: the file cannot be written (a full disk, a folder that is gone).
        """
        data = "".join(f"{_line(entry)}\n" for entry in entries).encode()
        with _says_why(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    data = b"\n" + data
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)

    def read(self) -> list[dict[str, Any]]:
        """Entries of all whole lines, in order; other lines are left out, and named in
        :attr:`broken`."""
        return [entry for _, entry in self.numbered()]

    def numbered(self) -> list[tuple[int, dict[str, Any]]]:
        """As :meth:`read`, each entry with the number of its line (from 1)."""
        entries, self.broken = [], []
        for number, line in enumerate(self._lines(), 1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append((number, entry))
            else:
                self.broken.append(number)
        return entries

    def _lines(self) -> list[bytes]:
        # Split at line ends only: texts may hold any of Unicode's other line separators.
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(
                f"{str(self.path)!r} cannot be read ({error.strerror or error})."
            ) from error
        return lines[:-1] if not lines[-1] else lines

    def replace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole file anew."""
        write_whole(self.path, "".join(f"{_line(entry)}\n" for entry in entries))


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float) and math.isfinite(value),
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "None": lambda value: value is None,
    "Any": lambda value: True,
}


def _fits(declared: str, value: Any) -> bool:
    """Whether a value is of a type as dataclasses declare it (``dict[str, int]``)."""
    if " | " in declared:
        return any(_fits(one, value) for one in declared.split(" | "))
    name, _, inner = declared.partition("[")
    if name == "dict":
        inside = inner.removeprefix("str, ")[:-1]
        return isinstance(value, dict) and all(_fits(inside, one) for one in value.values())
    if name == "list":
        return isinstance(value, list) and all(_fits(inner[:-1], one) for one in value)
    return _PLAIN[name](value)


def object_of(kind: type[T], values: Any) -> T | None:
    """A dataclass of what a line holds; ``None`` where that is not its own.

    Args:
        kind: its fields are plain values, lists and dicts. Names that a later version added to the
            line are left out.
        values: of any kind.
    """
    if not isinstance(values, dict):
        return None
    declared = {one.name: str(one.type) for one in fields(kind)}  # type: ignore[arg-type]
    known = {name: value for name, value in values.items() if name in declared}
    if not all(_fits(declared[name], value) for name, value in known.items()):
        return None
    try:
        return kind(**known)
    except TypeError:  # something is missing
        return None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _says_why(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror or error}): a folder with room for "
            "it is accepted; what was written before is kept."
        ) from error


# -- files written whole ---------------------------------------------------------------------------
def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by new content; it is the old or the new one, never half of it.

    Raises:
        InputError: it cannot be written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _says_why(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented; not-a-number is refused, since JSON has none."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """What a JSON file holds; ``None`` where there is no such file, or something else in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# -- folders -------------------------------------------------------------------------------------
@contextmanager
def lock(folder: Path, name: str = "") -> Iterator[None]:
    """Keep other runs out of a folder while this one writes to it. The system lets go of the lock
    when the process ends, however that happens.

    Args:
        folder: of the results; made if it is not there.
        name: a file in it; given, only that is locked.

    Raises:
        InputError: another run has it, or the folder cannot be made.
    """
    import fcntl

    with _says_why(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Not "w": whatever a link of this name leads to stays as it is.
        file = (folder / (f".{name}{LOCK}" if name else LOCK)).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{str(folder / name)!r} is in use by another run: wait for it, or give another "
                f"{'file' if name else 'folder'}."
            ) from error
        yield


def put_aside(folder: Path, only: Iterable[Path] | None = None) -> Path | None:
    """Move what an earlier run left in a folder into a subfolder of it: ``previous``, or, where
    files would meet others there, ``previous-2`` and so on. Nothing is deleted.

    Args:
        folder: of the results.
        only: files of it that are moved, those that are there; ``None``: everything, into a
            subfolder that is new.

    Returns:
        the subfolder; ``None`` if there was nothing to move.
    """
    there = list(folder.iterdir()) if only is None else [path for path in only if path.exists()]
    old = [p for p in there if p.name != LOCK and not p.name.startswith(ASIDE)]
    if not old:
        return None
    number, aside = 1, folder / ASIDE
    while aside.exists() and (only is None or any((aside / p.name).exists() for p in old)):
        number += 1
        aside = folder / f"{ASIDE}-{number}"
    with _says_why(aside):
        aside.mkdir(exist_ok=True)
        for path in old:
            path.rename(aside / path.name)
    return aside


# -- SIGTERM ---------------------------------------------------------------------------------------
@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises ``KeyboardInterrupt``.

    Not to be used around code that forks workers and ends them with SIGTERM (VLMEvalKit's scoring
    does): they would inherit the handler, and one that hangs in a lock would not end.
    """

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
