"""Keeps the files of several VLMEvalKit processes apart, and those of killed ones from being read.

VLMEvalKit (checked: 0.0.20) writes pictures straight to their place, where another process, or the
next run after a kill, takes the first half of one for the whole; and its scoring of multiple choice
writes ``/tmp/<time to the second>.xlsx`` and reads it back, which two processes do in the same
second.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vlmeval.dataset.utils import multiple_choice
from vlmeval.smp import vlm


@contextmanager
def own_files() -> Iterator[None]:
    """While this is open, pictures appear whole or not at all, and scoring files have own names.

    Only names inside VLMEvalKit's modules are exchanged, and they are put back.
    """
    tag = uuid.uuid4().hex
    with ExitStack() as stack:
        for module in _users_of(vlm.decode_base64_to_image_file):
            _exchange(stack, module, "decode_base64_to_image_file", whole(module))
        plain = multiple_choice.timestr
        _exchange(stack, multiple_choice, "timestr", lambda: f"{plain()}_{tag}")
        try:
            yield
        finally:
            for left in Path("/tmp").glob(f"*_{tag}.*"):  # the folder is VLMEvalKit's choice
                left.unlink(missing_ok=True)


def _exchange(stack: ExitStack, module: Any, name: str, new: Callable[..., Any]) -> None:
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
