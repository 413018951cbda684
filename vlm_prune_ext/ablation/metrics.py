"""Scores of captions: BLEU-4 by sacrebleu; METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap.

A metric that cannot be computed here is ``None`` with the reason, never 0. The tools that need
Java run in one process of their own with a time limit, so none of them can hang a study.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXTRA = 'pip install -e ".[ablate]" brings it'
JAVA = "Java is not on the PATH (Debian: apt-get install default-jre-headless)"
SECONDS = 300.0
"""Time limit of one step for a small set."""
SECONDS_PER_ROW = {"tokenize": 0.02, "meteor": 0.1, "spice": 2.0, "rougeL": 0.02, "cider": 0.05}
"""What each row adds to it."""


@dataclass(frozen=True)
class Scores:
    """What a set of captions scores.

    Attributes:
        values: ``bleu4``, ``meteor``, ``rougeL``, ``spice``, ``cider``; ``None``: not computed.
            BLEU-4, METEOR, ROUGE-L and SPICE are 0 to 1, CIDEr is 0 to 10.
        reasons: why a metric is ``None``.
        raw: BLEU-4 as sacrebleu has it, out of 100.
        signature: how BLEU-4 was computed, in sacrebleu's words.
    """

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)
    signature: str | None = None


class Unavailable(Exception):
    """A tool that is missing, fails, or takes too long."""


class Metrics:
    """Scores captions, one set after the other; use it as a context manager.

    Args:
        log: where the tools' messages go; ``None``: nowhere.
        seconds: time limit of one step for a small set.
    """

    def __init__(self, log: Path | None = None, seconds: float = SECONDS) -> None:
        self._tools = Tools(log, seconds)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the tools' process."""
        self._tools.close()

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """Score one set.

        Args:
            predictions: cleaned captions, one per row; empty ones are legal and score nothing.
            references: right captions of each row, at least one.
        """
        values: dict[str, float | None] = dict.fromkeys(
            ("bleu4", "meteor", "rougeL", "spice", "cider")
        )
        if not predictions:
            return Scores(values, dict.fromkeys(values, "no row was answered"))
        reasons: dict[str, str] = {}
        raw, signature = {}, None
        try:
            raw["bleu4"], signature = bleu4(predictions, references)
            values["bleu4"] = min(raw["bleu4"] / 100, 1.0)  # 100.00000000000004 is perfect
        except Unavailable as error:
            reasons["bleu4"] = str(error)
        self._coco(predictions, references, values, reasons)
        return Scores(values, reasons, raw, signature)

    def _coco(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        values: dict[str, float | None],
        reasons: dict[str, str],
    ) -> None:
        names = ("meteor", "rougeL", "spice", "cider")
        try:
            needs_pycocoevalcap()
            needs_java()
            captions = [[*own, text] for own, text in zip(references, predictions, strict=True)]
            split = self._tools.ask({"do": "tokenize", "captions": captions})
        except Unavailable as error:
            reasons.update(dict.fromkeys(names, str(error)))
            return
        said = {
            "references": [own[:-1] for own in split],
            "predictions": [own[-1] for own in split],
        }
        for name in names:
            try:
                _check(name, said)
                value = float(self._tools.ask({"do": name, **said}))
                if not math.isfinite(value):
                    raise Unavailable(f"its tool gave {value}")
                values[name] = value
            except Unavailable as error:
                reasons[name] = str(error)


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU-4 out of 100, 13a tokens, exponential smoothing, letter case kept; and
    sacrebleu's signature.

    Raises:
        Unavailable: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise Unavailable(f"sacrebleu is not installed: {EXTRA}") from error
    metric = BLEU(lowercase=False, tokenize="13a", smooth_method="exp", max_ngram_order=4)
    most = max(map(len, references))
    streams: Any = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    score = metric.corpus_score(list(predictions), streams)
    return float(score.score), str(metric.get_signature())


def needs_pycocoevalcap() -> None:
    """Raise Unavailable without pycocoevalcap."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise Unavailable(f"pycocoevalcap is not installed: {EXTRA}")


def needs_java() -> None:
    """Raise Unavailable without Java, which the PTB tokenizer of all these metrics needs."""
    if shutil.which("java") is None:
        raise Unavailable(JAVA)


def _check(name: str, said: Mapping[str, Any]) -> None:
    """What is known to fail, or to say nothing, before it is tried."""
    if name == "spice":
        from vlm_prune_ext.ablation.coco import missing_spice_files

        missing = missing_spice_files()
        if missing:
            raise Unavailable(
                f"{missing[0]} of Stanford CoreNLP 3.6.0 is not in pycocoevalcap's spice/lib, "
                "and is not downloaded here"
            )
    if name == "cider" and len(said["predictions"]) < 2:
        raise Unavailable("CIDEr weighs words by how rare they are among rows: two are needed")


class Tools:
    """The process that runs pycocoevalcap, started when it is first needed.

    Args:
        log: see :class:`Metrics`.
        seconds: the same.
    """

    def __init__(self, log: Path | None = None, seconds: float = SECONDS) -> None:
        self.log, self.seconds = log, seconds
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

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
                [sys.executable, "-m", "vlm_prune_ext.ablation.coco"],
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
