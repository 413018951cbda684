"""What several commands share: which model, which method, how tables and progress are shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.report import Column, Table, bars
from vlm_prune_ext.experiment.settings import METHOD_HELP, MODEL, Kind, ModelSettings, option, text

if TYPE_CHECKING:
    import torch

    from vlm_prune_ext.methods.base import Method

Item = TypeVar("Item")

# Without a terminal, one line of progress at most this often (seconds).
_PLAIN_PERIOD = 30.0

_KEY_VALUE = Kind("KEY=VALUE", lambda one: "=" in one, {"action": "append", "metavar": "KEY=VALUE"})


@dataclass(frozen=True)
class MethodSettings(ModelSettings):
    """One model with one method."""

    method: str | None = option(None, text("a method"), METHOD_HELP)
    settings: Any = option(
        (),
        _KEY_VALUE,
        "a parameter of the method, under its own or its model.config name; may be repeated",
        "--set",
    )


def chosen_method(args: Any) -> Method | None:
    """The method that ``--method`` and ``--set`` ask for; ``None`` for the baseline.

    Raises:
        InputError: unknown name or parameter, or a value that is not accepted.
    """
    from vlm_prune_ext.methods.registry import parse_method

    if args.method is None:
        if args.settings:
            raise InputError(
                f"--set {args.settings[0]} needs --method: it is a method's parameter."
            )
        return None
    more = ",".join(args.settings)
    if not more:
        return parse_method(args.method)
    return parse_method(f"{args.method}{',' if ':' in args.method else ':'}{more}")


def model_name(args: Any) -> str:
    """What the model is called in files and messages."""
    return "demo" if args.model_path is None else checkpoint_of(args)


def checkpoint_of(args: Any) -> str:
    """What is loaded: the demo's checkpoint where nothing is said."""
    from vlm_prune_ext.demo import CHECKPOINT

    if args.model_path is None:
        return str(CHECKPOINT)
    return args.model_path


def device_for(args: Any) -> torch.device:
    """The device that is meant, before anything is loaded.

    Raises:
        InputError: it is not there, or ``--fast`` cannot be on it.
    """
    from vlm_prune_ext.models import device_of

    device = device_of(args.device)
    if args.fast and device.type != "cuda":
        raise InputError(f"--fast is not possible: CUDA graphs need a GPU, this is {device.type}.")
    return device


def load_model(args: Any) -> tuple[Any, Any]:
    """``(model, processor)`` as :class:`ModelSettings` say."""
    from vlm_prune_ext.models import load

    quiet_transformers()
    given = {name: getattr(args, name) for name in MODEL[1:]}
    model, processor = load(checkpoint_of(args), **given)
    return model.eval(), processor


def quiet_transformers() -> None:
    """Leave what a command prints to the command; transformers still reports errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


# -- what is printed -----------------------------------------------------------------------------
def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of texts on standard output; the last column may be long."""
    made = Table([Column(name, left=True) for name in columns])
    made.rows.extend([list(map(str, row)) for row in rows])
    made.show()


def track(
    items: Iterable[Item], title: str, *, done: int = 0, total: int | None = None
) -> Iterator[Item]:
    """Go through ``items`` with progress and time left on standard error.

    Args:
        items: what is to do.
        title: what is being done.
        done: how many more were done before this start, counted in what is shown.
        total: of both; ``None``: as many as ``items`` and ``done``.
    """
    if total is None:
        items = list(items)
        total = done + len(items)
    show = _track_rich if sys.stderr.isatty() else _track_plain
    yield from show(items, title, done, total)


def _track_rich(items: Iterable[Item], title: str, done: int, total: int) -> Iterator[Item]:
    with bars() as progress:
        task = progress.add_task(title, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _track_plain(items: Iterable[Item], title: str, done: int, total: int) -> Iterator[Item]:
    start = last = time.monotonic()
    for index, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - last < _PLAIN_PERIOD and index < total:
            continue
        last = now
        left = (now - start) / (index - done) * (total - index)
        print(f"{title}: {index} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
