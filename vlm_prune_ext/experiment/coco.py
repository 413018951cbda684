"""pycocoevalcap in a process of its own: ``python -m vlm_prune_ext.experiment.coco``.

:class:`Tools` is the side that asks, :class:`Scorers` the side that answers.

One JSON object a line comes in, one a line goes out, in order; METEOR's Java program is started at
the first request for it, kept for the following ones (it reads its tables for some seconds) and
closed at the end. The side that asks limits time: it ends the process when it takes too long, with
all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 300.0
"""Time limit of one step for a small set."""
SECONDS_PER_ROW = {"tokenize": 0.02, "meteor": 0.1, "spice": 2.0, "rougeL": 0.02, "cider": 0.05}
"""What each row adds to it."""


class Unavailable(Exception):
    """A tool that is missing, fails, or takes too long."""


class Tools:
    """The process that runs pycocoevalcap, started when it is first needed.

    Args:
        log: where its messages go; ``None``: nowhere.
        seconds: time limit of one step for a small set.
    """

    def __init__(self, log: Path | None = None, seconds: float = SECONDS) -> None:
        self.log, self.seconds = log, seconds
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Tools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to one request.

        Raises:
            Unavailable: the tool failed, died, or took longer than its limit (it is ended then;
                the next request starts it anew).
        """
        rows = len(request.get("predictions") or request.get("captions") or ())
        limit = self.seconds + rows * SECONDS_PER_ROW[request["do"]]
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit)
        except OSError:
            line = ""
        except queue.Empty:
            self.close()
            raise Unavailable(f"its tool took longer than {limit:.0f} s and was ended") from None
        except BaseException:
            self.close()
            raise
        if not line:
            code = self._process.wait()
            self.close()
            raise Unavailable(f"its tool ended unexpectedly (exit code {code})")
        said = json.loads(line)
        if "error" in said:
            raise Unavailable(f"its tool failed: {said['error']}")
        return said["value"]

    def _start(self) -> None:
        # Java takes the encoding of files from the locale, which may be plain ASCII.
        options = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} -Dfile.encoding=UTF-8".strip()
        environment = {**os.environ, "JAVA_TOOL_OPTIONS": options, "PYTHONUTF8": "1"}
        errors = self.log.open("ab") if self.log is not None else None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vlm_prune_ext.experiment.coco"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors if errors is not None else subprocess.DEVNULL,
                encoding="utf-8",
                env=environment,
                start_new_session=True,  # so that it can be ended with what it started
            )
        finally:
            if errors is not None:
                errors.close()
        self._answers = queue.Queue()
        reader = threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        )
        reader.start()

    def close(self) -> None:
        """End the process and all that it started; nothing happens where there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError):  # what it had not read is lost with it
            process.stdin.close()


def _read(stream: Any, answers: queue.Queue[str]) -> None:
    """Hand lines over; an empty one says that there are no more."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put("")


Captions = Mapping[int, Sequence[str]]


class Scorers:
    """The scorers of pycocoevalcap, on text that its PTB tokenizer has split."""

    def __init__(self) -> None:
        self._meteor: Any = None

    def answer(self, request: Mapping[str, Any]) -> Any:
        """What a request asks for.

        Args:
            request: ``do``: ``tokenize`` with ``captions`` (a list of texts per row), or a metric
                with ``references`` (a list per row) and ``predictions`` (one per row), tokenized.

        Returns:
            tokenized captions, or the score of the whole set.
        """
        if request["do"] == "tokenize":
            return self.tokenize(request["captions"])
        references = dict(enumerate(request["references"]))
        predictions = {i: [text] for i, text in enumerate(request["predictions"])}
        scorer = {
            "meteor": self._start_meteor,
            "rougeL": _rouge,
            "cider": _cider,
            "spice": _spice,
        }[request["do"]]()
        return float(scorer.compute_score(references, predictions)[0])

    def tokenize(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Lower case, split as the Penn Treebank does, punctuation left out."""
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        given = {i: [{"caption": text} for text in own] for i, own in enumerate(captions)}
        found = PTBTokenizer().tokenize(given)
        split = [list(found.get(i, [])) for i in range(len(captions))]
        if [len(own) for own in split] != [len(own) for own in captions]:
            raise RuntimeError("the PTB tokenizer gave another number of lines than it was given")
        return split

    def _start_meteor(self) -> Any:
        from pycocoevalcap.meteor.meteor import Meteor

        if self._meteor is None:
            self._meteor = Meteor()
        return self._meteor

    def close(self) -> None:
        """End METEOR's program."""
        if self._meteor is not None:
            program = self._meteor.meteor_p
            program.stdin.close()
            program.kill()
            program.wait()
            self._meteor = None


def _rouge() -> Any:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge()


def _cider() -> Any:
    from pycocoevalcap.cider.cider import Cider

    return Cider()


def _spice() -> Any:
    from pycocoevalcap.spice.spice import Spice

    missing = missing_spice_files()
    if missing:  # its constructor would download them
        raise RuntimeError(f"{missing[0]} is missing")
    return Spice()


def missing_spice_files() -> list[str]:
    """Files of Stanford CoreNLP 3.6.0 that SPICE needs and pycocoevalcap does not bring."""
    import pycocoevalcap

    folder = Path(str(pycocoevalcap.__path__[0]), "spice", "lib")
    needed = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    return [name for name in needed if not (folder / name).is_file()]


def main() -> int:
    """Answer requests on standard input until it ends."""
    # What libraries and programs print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    scorers = Scorers()
    try:
        for line in sys.stdin:
            try:
                said: dict[str, Any] = {"value": scorers.answer(json.loads(line))}
            except Exception as error:  # tools fail in many ways; the next one may work
                said = {"error": f"{type(error).__name__}: {error}"}
                scorers.close()
            answers.write(json.dumps(said) + "\n")
            answers.flush()
    finally:
        scorers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
