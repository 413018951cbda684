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
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vlm_prune_ext.commands.common import (
    MethodSettings,
    checkpoint_of,
    chosen_method,
    load_model,
    model_name,
    print_table,
    track,
)
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import Log, lock, object_of
from vlm_prune_ext.experiment.record import changed, digest, weights_fingerprint
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import (
    FLAG,
    WHOLE,
    add_options,
    option,
    required,
    shared,
    text,
)

if TYPE_CHECKING:
    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.experiment.record import Sample

# The request that LLaVA's evaluation adds; without these words scores are not comparable.
SINGLE_PREDICTION = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


@dataclass(frozen=True)
class ScienceSettings(MethodSettings):
    """Which questions, how they are asked, and where answers go."""

    question_file: str = option("", required(text("a file", "FILE.json")), "")
    image_folder: str = option("", required(text("a folder", "DIR")), "")
    baseline: bool = option(False, FLAG, "no pruning (the default)")
    answers_file: str | None = option(
        None,
        text("a file", "OUT.jsonl"),
        "default: outputs/scienceqa/<model>_<method>.jsonl",
    )
    limit: int | None = shared("limit", None, "only the first N questions")
    single_pred_prompt: bool = option(False, FLAG, "ask for the option's letter directly")
    batch_size: int = option(1, WHOLE, "default: 1")
    max_new_tokens: int = option(1024, WHOLE, "default: 1024")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    chosen = ("baseline", "method")
    add_options(parser.add_mutually_exclusive_group(), chosen, ScienceSettings)
    rest = [one.name for one in fields(ScienceSettings) if one.name not in chosen]
    add_options(parser, rest, ScienceSettings)


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
    said = ScienceSettings.of(vars(args))
    if not Path(said.image_folder).is_dir():
        raise InputError(f"--image-folder {said.image_folder!r} is not a folder.")
    method = chosen_method(said)
    questions = read_questions(
        Path(said.question_file), Path(said.image_folder), said.single_pred_prompt
    )[: said.limit]
    label, name = "baseline" if method is None else method.label(), model_name(said)
    default = Path("outputs", "scienceqa", f"{Path(name).name}_{label}.jsonl")
    answers = AnswersFile(Path(said.answers_file or default), name, label, _settings(said))
    answers.check_writable()
    failed: list[str] = []
    with lock(answers.path.parent, answers.path.name):
        known = answers.read({question.id: question for question in questions})
        open_ = [question for question in questions if question.id not in known]
        if open_:
            from vlm_prune_ext.evals.answer import Answerer
            from vlm_prune_ext.pruning import announce

            announce(method)
            answerer = Answerer(*load_model(said), method)
            done = _answer_all(answerer, open_, said, answers, failed, len(known))
            known |= {record.question_id: record for record in done}
    _report(list(known.values()), len(failed), label, answers.path)
    return 1 if failed else 0


def _settings(said: ScienceSettings) -> dict[str, Any]:
    from vlm_prune_ext.models.checkpoint import Checkpoint

    return {
        "weights": weights_fingerprint(Checkpoint(checkpoint_of(said)).folder),
        "dtype": said.dtype,
        "max_new_tokens": said.max_new_tokens,
    }


# -- reading -----------------------------------------------------------------------------------
def read_questions(path: Path, image_folder: Path, single_prediction: bool) -> list[Question]:
    """Read a question file in LLaVA's layout.

    Raises:
        InputError: no such file, not JSON, or an entry that is not of that layout (named by its
            place in the list).
    """
    said = f"--question-file {str(path)!r}"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{said} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{said} is not a JSON file: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{said} must hold a list of questions.")
    questions = [
        _question(entry, index, image_folder, single_prediction)
        for index, entry in enumerate(entries)
    ]
    counts = Counter(question.id for question in questions)
    if twice := next((id_ for id_, count in counts.items() if count > 1), None):
        raise InputError(f"id {twice!r} is in {str(path)!r} twice: ids must differ.")
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
        lines = self.log.read()
        records = [record for line in lines if (record := object_of(Record, line)) is not None]
        if not records and (lines or self.log.broken):
            self._refuse("is not of this command: its line 1 is no answer")
        for record in records:
            self._check_same(record, questions.get(record.question_id))
        if self.log.broken:
            numbers = ", ".join(map(str, self.log.broken))
            say(f"{self.path}: line {numbers} cannot be read, and is left out.", error=True)
            self.log.replace(lines)
        found = {record.question_id: record for record in records}
        found = {id_: record for id_, record in found.items() if id_ in questions}
        for id_ in [id_ for id_, record in found.items() if record.row != questions[id_].row]:
            say(f"{id_}: its picture has changed; asked anew.", error=True)
            del found[id_]
        return found

    def _check_same(self, record: Record, question: Question | None) -> None:
        found, wanted = (record.model_id, record.method), (self.model_id, self.method)
        if found != wanted:
            ours = " with ".join(wanted)
            self._refuse(f"holds answers of {' with '.join(found)}, but this run is {ours}")
        if question is not None and question.text != record.prompt:
            self._refuse(f"has another prompt for {question.id!r} than the question file")
        if different := changed(record.settings, self.settings):
            self._refuse(f"holds answers made with {'; '.join(different)}")

    def _refuse(self, why: str) -> NoReturn:
        raise InputError(f"--answers-file {str(self.path)!r} {why}: give another file.")

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
    said: ScienceSettings,
    answers: AnswersFile,
    failed: list[str],
    done: int,
) -> Iterator[Record]:
    """Answer in batches, writing each answer as it comes; ids of bad images go to ``failed``."""
    from vlm_prune_ext.evals.answer import Query
    from vlm_prune_ext.evals.feed import answer_rows

    by_id = {question.id: question for question in questions}

    def query(question: Question) -> Query:
        pictures = [question.image] if question.image else []
        return Query(question.text, pictures, max_new_tokens=said.max_new_tokens)

    rows = ((question.id, lambda q=question: query(q)) for question in questions)
    samples = answer_rows(answerer, rows, said.batch_size)
    for _, sample in zip(track(questions, "ScienceQA", done=done), samples, strict=True):
        question = by_id[str(sample.index)]
        if sample.failed:
            failed.append(question.id)
            say(f"{question.id}: image cannot be read: {sample.failed}", error=True)
        else:
            yield answers.add(question, sample)


# -- reporting ---------------------------------------------------------------------------------
def _report(records: list[Record], failed: int, label: str, path: Path) -> None:
    rows: list[tuple[str, object]] = [("method", label), ("answered", len(records))]
    if records:
        right = sum(record.correct for record in records)
        seen = [record.correct for record in records if record.visual_tokens]
        share = 100 * sum(seen) / max(len(seen), 1)
        seconds = [record.seconds for record in records]
        mean, median = statistics.fmean(seconds), statistics.median(seconds)
        unread = sum(record.answer is None for record in records)
        rows += [
            ("accuracy", f"{100 * right / len(records):.2f} % ({right} right)"),
            ("accuracy with image", f"{share:.2f} % ({sum(seen)} of {len(seen)})" if seen else "-"),
            ("no letter in the answer", f"{unread} (counted as wrong)"),
            ("seconds per example", f"{mean:.3f} mean, {median:.3f} median"),
        ]
    rows += [("failed", failed), ("answers", path)]
    print_table(("ScienceQA", ""), rows)
