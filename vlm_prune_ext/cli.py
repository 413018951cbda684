"""`vlm-prune`: one small command per job, each in a module of its own that is imported when named.

Exit codes: 0 all went well, 1 some samples failed (the others are done), 2 wrong input (one
sentence on standard error says what, nothing was done).

Adding a command: a line in :data:`COMMANDS` and ``commands/<name>.py`` with a docstring (the
command's help), ``add_arguments(parser)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from vlm_prune_ext import __version__
from vlm_prune_ext.errors import InputError, unknown_name

COMMANDS = {
    "eval": "score a model with VLMEvalKit, pruned or not",
    "sweep": "methods x budgets x models x data in one table, with plots",
    "show": "tables and plots of a sweep again, from its files alone",
    "status": "where a sweep stands, from another terminal",
    "methods": "pruning methods with their parameters, defaults and papers",
    "models": "models with a short name, and what each supports",
    "inspect": "draw which patches of a picture a method drops, layer by layer",
    "play": "a local web page: ask about a picture, drag the budget, see what is kept",
    "scienceqa": "accuracy and seconds per example on ScienceQA as LLaVA lays it out",
    "bench": "how fast pruning is, beside transformers and the floor of the device",
    "profile": "latency, energy, FLOPs, memory and answers of a grid of settings",
    "profile-data": "make the folder of examples that profile measures on",
    "ablate": "caption one data set with many models and compare them",
    "demo-data": "write fresh demo pictures with questions as benchmark files",
    "convert": "turn an original-format LLaVA checkpoint into a Hugging Face folder",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`InputError`, with the near name suggested."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise InputError(f"{message[0].upper()}{message[1:].rstrip('.')} (see {self.prog} --help).")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``argv``; misspelled options are found before missing ones are missed."""
        known = list(self._option_string_actions)
        for word in argv:
            if word == "--":
                break
            option = word.partition("=")[0]
            if option.startswith("--") and " " not in option and option not in known:
                said = str(unknown_name(f"option of {self.prog}", option, known))
                raise InputError(f"{said.split(' Accepted: ')[0]} See {self.prog} --help.")
        args, rest = self.parse_known_args(argv)
        if rest:
            self.error(f"unexpected {' '.join(map(repr, rest))}")
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and its arguments; ``None`` takes those of the process.

    Returns:
        the exit code: 0, 1 or 2, see the module's docstring; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with _watched() as pressed, _any_encoding():
        return _main(words, pressed)


def _main(words: list[str], pressed: list[int]) -> int:
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        # numpy and others make errors of their own of a Ctrl-C while they are imported.
        if pressed or isinstance(error, KeyboardInterrupt):
            print("Interrupted.", file=sys.stderr)
            return 130
        if not isinstance(error, InputError):
            raise
        from vlm_prune_ext.experiment.report import say

        for line in str(error).split("\n"):  # a sentence each, where several things are wrong
            say(line, error=True)
        return 2


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Ctrl-C as Python has it, and a note that it was pressed."""
    pressed: list[int] = []

    def stop(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _any_encoding() -> Iterator[None]:
    """What a terminal's encoding does not have is written out, and ends nothing."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    _set_errors(streams, ["backslashreplace"] * len(streams))
    try:
        yield
    finally:
        _set_errors(streams, before)


def _set_errors(streams: Sequence[io.TextIOWrapper], errors: Sequence[str | None]) -> None:
    for stream, name in zip(streams, errors, strict=True):
        with suppress(OSError, ValueError):  # closed, or another file under the same number
            stream.reconfigure(errors=name)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"vlm-prune {__version__}")
        return 0
    module, parser = command(words[0])
    try:
        args = parser.parse(words[1:])
    except SystemExit as done:  # --help
        return int(done.code or 0)
    return int(module.run(args))


def command(name: str) -> tuple[Any, Parser]:
    """A command's module and its parser.

    Raises:
        InputError: there is no such command (with the near name).
    """
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    module = importlib.import_module(f"vlm_prune_ext.commands.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"vlm-prune {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=getattr(module, "ARGUMENT_DEFAULT", None),
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module, parser


def overview() -> str:
    """What `vlm-prune --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vlm-prune COMMAND ...",
            "",
            "Visual-token pruning for vision-language models.",
            "",
            "commands:",
            *lines,
            "",
            "vlm-prune COMMAND --help says more about each.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
