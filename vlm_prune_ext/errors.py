"""The one exception for wrong input.

Everything a user can get wrong (a field of a method, a path, a name, a length that contradicts
the input) raises :class:`InputError`: one sentence that names the field, the value and what is
accepted. Commands print it and leave with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Wrong input, said in one sentence: the field, the value, what is accepted."""


class RowError(InputError):
    """A text or picture that a model cannot be asked with: of many rows, that row's failure."""


def unknown_name(kind: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for a name that is not known, with the nearest known one suggested.

    Args:
        kind: what the name is, for the sentence ("method", "config key", ...).
        value: what was given.
        accepted: all names that would have been right.
    """
    names = sorted(accepted)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
    return InputError(f"Unknown {kind} {value!r}.{hint} Accepted: {', '.join(names)}.")


def first_line(error: BaseException) -> str:
    """What an error says, without what follows in further lines; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong, with the error's type where it is none of ours."""
    said = first_line(error)
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def make_folder(folder: Path, name: str) -> None:
    """Make the folder of results before anything is computed for it.

    Args:
        folder: it and its parents; it may be there.
        name: what stands in front of it in the sentence (``"--out "``, ``"output_path="``).

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}{str(folder)!r} cannot be written ({error.strerror}).") from error
