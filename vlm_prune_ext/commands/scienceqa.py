"""Accuracy and seconds per example on ScienceQA, from the JSON file that LLaVA's evaluation uses:
a list of {id, conversations: [{from: human, value}, {from: gpt, value}], image (optional)}.

Answers are appended to a JSONL file as they come. A second start with the same file continues;
each sample is answered once, and again only where its picture has changed. A sample whose image
cannot be read is reported and left out; the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import (
    add_method_arguments,
    add_model_arguments,
    checkpoint_of,
    chosen_method,
    load_model,
    model_name,
)
from vlm_prune_ext.commands.terminal import print_table, track
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import Log, lock
from vlm_prune_ext.experiment.record import changed, digest, weights_fingerprint
from vlm_prune_ext.experiment.report import terminal_text

if TYPE_CHECKING:
    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.experiment.record import Sample

# The request that LLaVA's evaluation adds; without these words scores are not comparable.
SINGLE_PREDICTION = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--question-file", required=True, metavar="FILE.json")
    parser.add_argument("--image-folder", required=True, metavar="DIR")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--baseline", action="store_true", help="no pruning (the default)")
    add_method_arguments(parser, group)
    add_model_arguments(parser)
    parser.add_argument(
        "--answers-file",
        metavar="OUT.jsonl",
        help="default: outputs/scienceqa/<model>_<method>.jsonl",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the option's letter directly"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")


@dataclass(frozen=True)
class Question:
    """One sample: what is asked, the right letter, and the image's path if there is one."""

    id: str
    text: str
    reference: str
    image: Path | None

    @property
    def row(self) -> dict[str, str]:
        """Fingerprints of what its answer depends on, beside the text."""
        if self.image is None:
            return {}
        try:
            return {"picture": digest(self.image.read_bytes())}
        except OSError:  # it will fail, and say why
            return {"picture": ""}


@dataclass(frozen=True)
class Record:
    """One line of the answers file: a sample of the experiment's record as this command names it.

    ``answer`` is the letter read off ``text`` (``None``: none could be). ``seconds`` is the time
    of the batch it was answered in, divided by the batch. ``row`` and ``settings`` are what it
    depends on, beside prompt, model and method.
    """

    question_id: str
    prompt: str
    text: str
    answer: str | None
    reference: str
    correct: bool
    seconds: float
    visual_tokens: int
    visual_kept: dict[str, int]
    model_id: str
    method: str
    row: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet and print the score."""
    _check(args)
    method = chosen_method(args)
    questions = read_questions(
        Path(args.question_file), Path(args.image_folder), args.single_pred_prompt
    )[: args.limit]
    label = "baseline" if method is None else method.label()
    path = Path(args.answers_file or _default_path(model_name(args), label))
    answers = AnswersFile(path, model_name(args), label, _settings(args))
    answers.check_writable()
    failed: list[str] = []
    with lock(path.parent, path.name):
        known = answers.read({question.id: question for question in questions})
        open_ = [question for question in questions if question.id not in known]
        if open_:
            from vlm_prune_ext.evals.answer import Answerer
            from vlm_prune_ext.resets import announce

            announce(method)
            answerer = Answerer(*load_model(args), method)
            done = list(_answer_all(answerer, open_, args, answers, failed, len(known)))
            known |= {record.question_id: record for record in done}
    _report(list(known.values()), len(failed), label, path)
    return 1 if failed else 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    from vlm_prune_ext.models.checkpoint import Checkpoint

    return {
        "weights": weights_fingerprint(Checkpoint(checkpoint_of(args)).folder),
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
    }


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {value} is not valid: an integer of at least 1.")
    if not Path(args.image_folder).is_dir():
        raise InputError(f"--image-folder {args.image_folder!r} is not a folder.")


def _default_path(model_path: str, label: str) -> Path:
    return Path("outputs", "scienceqa", f"{Path(model_path).name}_{label}.jsonl")


# -- reading -----------------------------------------------------------------------------------
def read_questions(path: Path, image_folder: Path, single_prediction: bool) -> list[Question]:
    """Read a question file in LLaVA's layout.

    Raises:
        InputError: no such file, not JSON, or an entry that is not of that layout (named by its
            place in the list).
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--question-file {str(path)!r} cannot be read: {error.strerror}."
        ) from error
    except ValueError as error:
        raise InputError(f"--question-file {str(path)!r} is not a JSON file: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--question-file {str(path)!r} must hold a list of questions.")
    questions = [
        _question(entry, index, image_folder, single_prediction)
        for index, entry in enumerate(entries)
    ]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"id {question.id!r} is in {str(path)!r} twice: ids must differ.")
        seen.add(question.id)
    return questions


def _question(entry: Any, index: int, folder: Path, single_prediction: bool) -> Question:
    try:
        asked, answered = (str(turn["value"]) for turn in entry["conversations"][:2])
        name, image = str(entry["id"]), entry.get("image")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"Question {index} of --question-file needs 'id' and 'conversations' with a human and "
            f"a gpt turn, each with 'value'; it is {str(entry)[:80]!r}."
        ) from error
    reference = read_letter(answered)
    if reference is None:
        raise InputError(
            f"Question {name!r} has no letter A-E in its gpt turn, which is {answered[:80]!r}."
        )
    text = asked.replace("<image>", "").strip()
    if single_prediction:
        text = f"{text}\n{SINGLE_PREDICTION}"
    return Question(name, text, reference, folder / str(image) if image else None)


def read_letter(text: str) -> str | None:
    """The option letter that an answer names, or ``None``.

    Accepted are a letter alone, a letter with a full stop, bracket or colon in front of the rest,
    and one "the answer is X" anywhere (or several that agree).
    """
    text = text.strip()
    leading = re.match(rf"\(?([{LETTERS}])(?:[.):]|$)", text)
    if leading:
        return leading[1]
    named = re.findall(rf"[Tt]he answer is:? \(?([{LETTERS}])\b", text)
    return named[0] if len(set(named)) == 1 else None


# -- answers file ------------------------------------------------------------------------------
class AnswersFile:
    """The JSONL file that answers are appended to, one line each.

    Args:
        path: the file; made with its folder when the first answer comes.
        model_id, method, settings: what the answers are of; a file of something else is refused.
    """

    def __init__(self, path: Path, model_id: str, method: str, settings: dict[str, Any]) -> None:
        self.path, self.log = path, Log(path)
        self.model_id, self.method, self.settings = model_id, method, settings

    def read(self, questions: dict[str, Question]) -> dict[str, Record]:
        """What is answered already, of these questions; of several lines the last one counts, and
        one that is broken or whose picture has changed does not.

        Raises:
            InputError: the file is of another model, method, prompt or setting, or is no answers
                file.
        """
        if not self.path.exists():
            return {}
        known = {f.name for f in fields(Record)}
        found: dict[str, Record] = {}
        lines = self.log.read()
        for line in lines:
            try:
                record = Record(**{name: line[name] for name in line.keys() & known})
            except TypeError:  # cut off, or of something else
                continue
            question = questions.get(record.question_id)
            self._check_same(record, question)
            found[record.question_id] = record
        if not found and (lines or self.log.broken):
            raise InputError(
                f"Line 1 of --answers-file {str(self.path)!r} is not an answer of this command: "
                "give another file."
            )
        if self.log.broken:
            numbers = ", ".join(map(str, self.log.broken))
            print(f"{self.path}: line {numbers} cannot be read, and is left out.", file=sys.stderr)
            self.log.replace(lines)
        old = [id_ for id_, r in found.items() if id_ in questions and r.row != questions[id_].row]
        for id_ in old:
            print(f"{terminal_text(id_)}: its picture has changed; asked anew.", file=sys.stderr)
        return {id_: r for id_, r in found.items() if id_ in questions and id_ not in old}

    def _check_same(self, record: Record, question: Question | None) -> None:
        found, wanted = (record.model_id, record.method), (self.model_id, self.method)
        if found != wanted:
            raise InputError(
                f"--answers-file {str(self.path)!r} holds answers of {' with '.join(found)}, but "
                f"this run is {' with '.join(wanted)}: give another file."
            )
        if question is not None and question.text != record.prompt:
            raise InputError(
                f"--answers-file {str(self.path)!r} has another prompt for {question.id!r} than "
                "the question file: give another file."
            )
        if different := changed(record.settings, self.settings):
            raise InputError(
                f"--answers-file {str(self.path)!r} holds answers made with "
                f"{'; '.join(different)}: give another file."
            )

    def check_writable(self) -> None:
        """Say now, before a model is loaded, that the file cannot be written."""
        place = self.path
        while not place.exists():
            place = place.parent
        right_kind = place.is_file() if place == self.path else place.is_dir()
        if not right_kind or not os.access(place, os.W_OK):
            raise InputError(f"--answers-file {str(self.path)!r} cannot be written: see {place}.")

    def add(self, question: Question, sample: Sample) -> Record:
        """Append a sample as a line."""
        letter = read_letter(sample.prediction)
        record = Record(
            question_id=question.id,
            prompt=question.text,
            text=sample.prediction,
            answer=letter,
            reference=question.reference,
            correct=letter == question.reference,
            seconds=sample.seconds,
            visual_tokens=sample.visual_tokens,
            visual_kept=sample.visual_kept if sample.visual_tokens else {},
            model_id=self.model_id,
            method=self.method,
            row=question.row,
            settings=self.settings,
        )
        self.log.append(asdict(record))
        return record


# -- answering ---------------------------------------------------------------------------------
def _answer_all(
    answerer: Answerer,
    questions: list[Question],
    args: argparse.Namespace,
    answers: AnswersFile,
    failed: list[str],
    done: int,
) -> Iterator[Record]:
    """Answer in batches, writing each answer as it comes; ids of bad images go to ``failed``."""
    from vlm_prune_ext.evals.answer import Query, answer_rows

    by_id = {question.id: question for question in questions}

    def query(question: Question) -> Query:
        pictures = [question.image] if question.image else []
        return Query(question.text, pictures, max_new_tokens=args.max_new_tokens)

    rows = ((question.id, lambda q=question: query(q)) for question in questions)
    samples = answer_rows(answerer, rows, args.batch_size)
    for _, sample in zip(track(questions, "ScienceQA", done=done), samples, strict=True):
        question = by_id[str(sample.index)]
        if sample.failed:
            failed.append(question.id)
            print(f"{question.id}: image cannot be read: {sample.failed}", file=sys.stderr)
        else:
            yield answers.add(question, sample)


# -- reporting ---------------------------------------------------------------------------------
def _report(records: list[Record], failed: int, label: str, path: Path) -> None:
    rows: list[tuple[str, object]] = [("method", label), ("answered", len(records))]
    if records:
        right = sum(record.correct for record in records)
        unread = sum(record.answer is None for record in records)
        seconds = [record.seconds for record in records]
        with_image = [record for record in records if record.visual_tokens]
        rows += [
            ("accuracy", f"{100 * right / len(records):.2f} % ({right} right)"),
            ("accuracy with image", _accuracy(with_image)),
            ("no letter in the answer", f"{unread} (counted as wrong)"),
            (
                "seconds per example",
                f"{statistics.fmean(seconds):.3f} mean, {statistics.median(seconds):.3f} median",
            ),
        ]
    rows += [("failed", failed), ("answers", path)]
    print_table(("ScienceQA", ""), rows)


def _accuracy(records: list[Record]) -> str:
    if not records:
        return "-"
    right = sum(record.correct for record in records)
    return f"{100 * right / len(records):.2f} % ({right} of {len(records)})"
