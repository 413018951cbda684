"""pycocoevalcap in a process of its own: ``python -m vlm_prune_ext.ablation.coco``.

One JSON object a line comes in, one a line goes out, in order; METEOR's Java program is started at
the first request for it, kept for the following ones (it reads its tables for some seconds) and
closed at the end. Nothing here limits time: whoever started the process ends it when it takes too
long, with all that it started.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
