"""How good answers are: word error rate, and the score that fits the references.

Text is compared in lower case, without punctuation and with single blanks. The word error rate
(jiwer) is that of the whole set: errors of all answers over words of all references, where of
several references the one with the fewest errors is taken. It has no upper limit: an answer that
is longer than its reference can be wrong more often than the reference has words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_prune_ext.errors import InputError

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))
_MANY = 10
_CAPTION_WORDS = 4.0


@dataclass(frozen=True)
class Quality:
    """Scores of a set of answers.

    Attributes:
        wer: word error rate, 1.0 is as many errors as words.
        name: the score that fits: ``vqa`` (several people's answers), ``accuracy`` (one right
            answer) or ``bleu4`` (captions).
        value: in percent.
        samples: answers scored.
        cider: CIDEr of captions, 100 times the usual unit, where pycocoevalcap is installed.
    """

    wer: float
    name: str
    value: float
    samples: int
    cider: float | None = None


def require_scorers() -> None:
    """Raise InputError unless the packages that scores need are installed."""
    for name in ("jiwer", "sacrebleu"):
        try:
            __import__(name)
        except ImportError as error:
            raise InputError(
                f'{name} is not installed: pip install -e ".[profile]" brings it.'
            ) from error


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Quality:
    """Score answers.

    Args:
        answers: one per example.
        references: one or several per example.
    """
    name = kind_of(references)
    if name == "vqa":
        value = _mean([vqa_score(a, own) for a, own in zip(answers, references, strict=True)])
    elif name == "accuracy":
        pairs = zip(answers, references, strict=True)
        value = _mean([float(is_right(answer, own)) for answer, own in pairs])
    else:
        value = bleu_4(answers, references) / 100.0
    cider = _cider(answers, references) if name == "bleu4" else None
    return Quality(word_error_rate(answers, references), name, 100 * value, len(answers), cider)


def kind_of(references: Sequence[Sequence[str]]) -> str:
    """Captions have long references; answers that many people gave, about ten; others, one."""
    words = _mean([len(said.split()) for own in references for said in own])
    if words > _CAPTION_WORDS:
        return "bleu4"
    many = sum(len(own) >= _MANY for own in references)
    return "vqa" if 2 * many > len(references) else "accuracy"


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return text.lower().translate(_PUNCTUATION).split()


def word_error_rate(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Errors of all answers over words of the references they come nearest to."""
    errors = words = 0
    for answer, own in zip(answers, references, strict=True):
        wrong, length = min(_errors(answer, reference) for reference in own)
        errors, words = errors + wrong, words + length
    return errors / max(words, 1)


def _errors(answer: str, reference: str) -> tuple[int, int]:
    """Words put in, left out or changed, and words of the reference."""
    import jiwer

    said, wanted = " ".join(words_of(answer)), " ".join(words_of(reference))
    if not wanted:  # jiwer takes no empty reference
        return len(said.split()), 0
    found = jiwer.process_words(wanted, said)
    return found.substitutions + found.deletions + found.insertions, len(wanted.split())


def _short(text: str) -> str:
    return " ".join(word for word in words_of(text) if word not in _ARTICLES)


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is one of the references; where these are letters of options, the letter
    that the answer begins with counts."""
    said = _short(answer)
    for reference in references:
        if re.fullmatch(r"[A-Z]", reference.strip()):
            letter = re.match(r"\W*([A-Za-z])(?![A-Za-z])", answer)
            if letter and letter.group(1).upper() == reference.strip():
                return True
        elif said == _short(reference):
            return True
    return False


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: three who agree are enough; mean over leaving one person out at a time."""
    said, people = _short(answer), [_short(reference) for reference in references]
    shares = []
    for left_out in range(len(people)):
        rest = people[:left_out] + people[left_out + 1 :]
        shares.append(min(1.0, sum(person == said for person in rest) / 3.0))
    return _mean(shares)


def bleu_4(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in percent (sacrebleu, lower case)."""
    import sacrebleu

    most = max(len(own) for own in references)
    # sacrebleu takes a list per reference; where there are fewer, none is stated.
    columns = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), columns, lowercase=True).score)  # type: ignore[arg-type]


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    if len(answers) < 2:  # its weights come from how rare words are among the examples
        return None
    wanted = {i: [" ".join(words_of(said)) for said in own] for i, own in enumerate(references)}
    given = {i: [" ".join(words_of(answer))] for i, answer in enumerate(answers)}
    return 100.0 * float(Cider().compute_score(wanted, given)[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
