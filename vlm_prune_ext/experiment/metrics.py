"""Scores of answers: one small declaration a metric.

A metric is registered once; from there it is in every command's record, log, tables and pages::

    @metric("words", "words", help="mean words of an answer")
    def words(scored: Scored) -> float:
        return mean(len(text.split()) for text in scored.predictions)

Where packages compute what goes by one name differently, the variants have names of their own: BLEU
depends on letter case, CIDEr on the tokenizer. A metric that cannot be computed here is ``None``
with the reason, never 0.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment.coco import Tools, Unavailable, missing_spice_files

EXTRA = 'pip install -e ".[ablate]" brings it'
JAVA = "Java is not on the PATH (Debian: apt-get install default-jre-headless)"
CAPTION = ("bleu4", "meteor", "rougeL", "spice", "cider")
"""What captions are scored by in papers."""

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))
_MANY = 10
_CAPTION_WORDS = 4.0


class Answered(Protocol):
    """What a metric may know of a sample: at least what was said."""

    @property
    def prediction(self) -> str:
        """The answer."""


class Scored:
    """What a metric sees: a set of answers, with what they cost and what would have been right.

    Args:
        samples: answered rows (:class:`vlm_prune_ext.experiment.record.Sample`, with tokens, times
            and FLOPs), or their texts alone; empty texts are legal and score nothing.
        references: right answers of each, at least one; ``None``: nobody knows any.
        tools: the process that runs pycocoevalcap; ``None``: one of its own, see :meth:`close`.
        log: where that one's messages go; ``None``: nowhere.
    """

    def __init__(
        self,
        samples: Sequence[Answered | str],
        references: Sequence[Sequence[str]] | None = None,
        tools: Tools | None = None,
        log: Path | None = None,
    ) -> None:
        self.samples, self._references, self._tools, self._log = samples, references, tools, log

    @cached_property
    def predictions(self) -> list[str]:
        """What was said.

        Raises:
            Unavailable: nothing was.
        """
        if not self.samples:
            raise Unavailable("no row was answered")
        return [one if isinstance(one, str) else one.prediction for one in self.samples]

    @property
    def references(self) -> Sequence[Sequence[str]]:
        """Right answers of each sample.

        Raises:
            Unavailable: nobody knows any.
        """
        if self._references is None:
            raise Unavailable("no right answers are known")
        return self._references

    @property
    def pairs(self) -> list[tuple[str, Sequence[str]]]:
        """Each answer with its references."""
        return list(zip(self.predictions, self.references, strict=True))

    def mean(self, score: Callable[[str, Sequence[str]], float]) -> float:
        """Mean of a score of each answer."""
        return mean(score(said, right) for said, right in self.pairs)

    @cached_property
    def _tokenized(self) -> dict[str, Any]:
        """Texts as the PTB tokenizer splits them (or why it cannot), for all that need it."""
        captions = [[*right, said] for said, right in self.pairs]
        try:
            needs_pycocoevalcap()
            needs_java()
            split = self._coco_tools.ask({"do": "tokenize", "captions": captions})
        except Unavailable as error:
            return {"error": str(error)}
        return {
            "references": [own[:-1] for own in split],
            "predictions": [own[-1] for own in split],
        }

    def coco(self, name: str) -> float:
        """A score of pycocoevalcap, of the whole set."""
        said = self._tokenized
        if "error" in said:
            raise Unavailable(said["error"])
        return float(self._coco_tools.ask({"do": name, **said}))

    @property
    def _coco_tools(self) -> Tools:
        if self._tools is None:
            self._tools = Tools(self._log)
        return self._tools

    def close(self) -> None:
        """End the tools' process, if there is one."""
        if self._tools is not None:
            self._tools.close()


@dataclass(frozen=True)
class Value:
    """What a metric says of a set.

    Attributes:
        value: ``None``: not computed.
        reason: why not.
        raw: as the package behind it gives it, where that has another unit.
        signature: how it was computed, in that package's words.
    """

    value: float | None
    reason: str | None = None
    raw: float | None = None
    signature: str | None = None


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: in records and logs.
        title: in tables.
        compute: of what is scored; it may raise :class:`Unavailable` with a reason.
        digits: shown behind the point.
        help: what it is and in which unit, for legends.
        everywhere: whether every command shows it; one that does not is asked for by name.
    """

    name: str
    title: str
    compute: Callable[[Scored], float | Value]
    digits: int = 2
    help: str = ""
    everywhere: bool = True


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order of their declarations."""


def register(made: Metric) -> Metric:
    """Make a metric known.

    Raises:
        InputError: one of this name is.
    """
    if made.name in METRICS:
        raise InputError(f"Metric {made.name!r} is registered already: give it another name.")
    METRICS[made.name] = made
    return made


def metric(
    name: str, title: str, *, digits: int = 2, help: str = "", everywhere: bool = True
) -> Callable[[Callable[[Scored], float | Value]], Callable[[Scored], float | Value]]:
    """Declare what follows as a metric."""

    def declare(compute: Callable[[Scored], float | Value]) -> Callable[[Scored], float | Value]:
        register(Metric(name, title, compute, digits, help, everywhere))
        return compute

    return declare


def everywhere() -> list[str]:
    """Names of the metrics that every command shows."""
    return [one.name for one in METRICS.values() if one.everywhere]


def metric_names() -> list[str]:
    """What captions are scored by, and the metrics that every command shows."""
    return [*CAPTION, *everywhere()]


def evaluate(scored: Scored, names: Iterable[str]) -> dict[str, Value]:
    """Values of some metrics.

    Raises:
        InputError: an unknown name.
    """
    return {name: _value(name, scored) for name in names}


def _value(name: str, scored: Scored) -> Value:
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    try:
        scored.predictions  # noqa: B018  # a set without answers has no score at all
        found = METRICS[name].compute(scored)
    except Unavailable as error:
        return Value(None, str(error))
    made = found if isinstance(found, Value) else Value(float(found))
    if made.value is not None and not math.isfinite(made.value):
        return Value(None, f"its tool gave {made.value}")
    return made


def score_all(
    samples: Sequence[Answered | str],
    references: Sequence[Sequence[str]] | None,
    names: Iterable[str] | None = None,
    log: Path | None = None,
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values by name, and why those that are ``None`` are.

    Args:
        samples, references: see :class:`Scored`.
        names: of metrics; ``None``: those that every command shows.
        log: where the tools' messages go; ``None``: nowhere.
    """
    with closing(Scored(samples, references, log=log)) as scored:
        found = evaluate(scored, everywhere() if names is None else names)
    missing = {name: one.reason for name, one in found.items() if one.reason is not None}
    return {name: one.value for name, one in found.items()}, missing


# -- captions ------------------------------------------------------------------------------------
def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False
) -> tuple[float, str]:
    """Corpus BLEU-4 out of 100, 13a tokens, exponential smoothing (sacrebleu), and its signature.

    Raises:
        Unavailable: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise Unavailable(f"sacrebleu is not installed: {EXTRA}") from error
    made = BLEU(lowercase=lowercase, tokenize="13a", smooth_method="exp", max_ngram_order=4)
    most = max(map(len, references))
    # sacrebleu takes a list per reference; where there are fewer, none is stated.
    streams: Any = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    score = made.corpus_score(list(predictions), streams)
    return float(score.score), str(made.get_signature())


@metric("bleu4", "BLEU-4", digits=4, help="0 to 1, sacrebleu, letter case kept", everywhere=False)
def _bleu4(scored: Scored) -> Value:
    raw, signature = bleu(scored.predictions, scored.references)
    return Value(min(raw / 100, 1.0), raw=raw, signature=signature)  # 100.00000000000004 is perfect


@metric("bleu4_lower", "bleu4", digits=1, help="BLEU-4 in %, lower case", everywhere=False)
def _bleu4_lower(scored: Scored) -> Value:
    raw, signature = bleu(scored.predictions, scored.references, lowercase=True)
    return Value(raw, signature=signature)


@metric("bleu4_words", "BLEU-4", digits=1, help="in %, plain words, no smoothing", everywhere=False)
def _bleu4_words(scored: Scored) -> float:
    return bleu_words(scored.predictions, scored.references)


def bleu_words(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in percent over lower-case words without punctuation, not smoothed, of the
    first reference each: what the demo model's figures are in."""
    pairs = zip(predictions, references, strict=True)
    rows = [bleu_parts(said, right[0]) for said, right in pairs]
    return bleu_of([sum(column) for column in zip(*rows, strict=True)])


def bleu_parts(said: str, right: str) -> list[int]:
    """What a row adds to :func:`bleu_words`: hits and n-grams for each n, and both lengths."""
    mine, its = (re.findall(r"[a-z0-9]+", text.lower()) for text in (said, right))
    hits, total = [], []
    for n in range(1, 5):
        grams = _n_grams(mine, n)
        hits.append(sum((grams & _n_grams(its, n)).values()))
        total.append(sum(grams.values()))
    return [*hits, *total, len(mine), len(its)]


def bleu_of(sums: Sequence[float]) -> float:
    """BLEU-4 in percent of sums of :func:`bleu_parts`."""
    hits, total, (made, wanted) = sums[:4], sums[4:8], sums[8:]
    if not all(hits):
        return 0.0
    precision = sum(math.log(hit / of) for hit, of in zip(hits, total, strict=True)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - wanted / made))


def cider_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each row times 100, words weighed by all of these references; their mean is what
    VLMEvalKit states (blanks between words, no PTB tokenizer).

    Raises:
        Unavailable: pycocoevalcap is not installed.
    """
    needs_pycocoevalcap()
    from pycocoevalcap.cider.cider import Cider

    right = {place: list(own) for place, own in enumerate(references)}
    _, rows = Cider().compute_score(right, {i: [said] for i, said in enumerate(predictions)})
    return [100.0 * float(row) for row in rows]


def _n_grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def needs_pycocoevalcap() -> None:
    """Raise Unavailable without pycocoevalcap."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise Unavailable(f"pycocoevalcap is not installed: {EXTRA}")


def needs_java() -> None:
    """Raise Unavailable without Java, which the PTB tokenizer of all these metrics needs."""
    if shutil.which("java") is None:
        raise Unavailable(JAVA)


@metric("meteor", "METEOR", digits=4, help="0 to 1, PTB tokens", everywhere=False)
def _meteor(scored: Scored) -> float:
    return scored.coco("meteor")


@metric("rougeL", "ROUGE-L", digits=4, help="0 to 1, PTB tokens", everywhere=False)
def _rouge_l(scored: Scored) -> float:
    return scored.coco("rougeL")


@metric("spice", "SPICE", digits=4, help="0 to 1, PTB tokens", everywhere=False)
def _spice(scored: Scored) -> float:
    needs_pycocoevalcap()
    needs_java()
    if missing := missing_spice_files():
        raise Unavailable(
            f"{missing[0]} of Stanford CoreNLP 3.6.0 is not in pycocoevalcap's spice/lib, "
            "and is not downloaded here"
        )
    return scored.coco("spice")


def _needs_two(scored: Scored) -> None:
    if len(scored.predictions) < 2:
        raise Unavailable("CIDEr weighs words by how rare they are among rows: two are needed")


@metric("cider", "CIDEr", digits=4, help="0 to 10, PTB tokens", everywhere=False)
def _cider(scored: Scored) -> float:
    _needs_two(scored)
    return scored.coco("cider")


@metric("cider_words", "CIDEr", digits=1, help="x 100, plain words, no Java", everywhere=False)
def _cider_words(scored: Scored) -> float:
    needs_pycocoevalcap()
    _needs_two(scored)
    from pycocoevalcap.cider.cider import Cider

    wanted, given = {}, {}
    for row, (said, right) in enumerate(scored.pairs):
        wanted[row] = [" ".join(words_of(text)) for text in right]
        given[row] = [" ".join(words_of(said))]
    return 100.0 * float(Cider().compute_score(wanted, given)[0])


# -- short answers -------------------------------------------------------------------------------
@metric("accuracy", "accuracy", digits=1, help="exact match in %", everywhere=False)
def _accuracy(scored: Scored) -> float:
    return 100.0 * scored.mean(is_right)


@metric("vqa", "vqa", digits=1, help="VQA accuracy in %", everywhere=False)
def _vqa(scored: Scored) -> float:
    return 100.0 * scored.mean(vqa_score)


@metric(
    "wer",
    "WER",
    help="word error rate, 1 is as many errors as reference words",
    everywhere=False,
)
def _wer(scored: Scored) -> float:
    return word_error_rate(scored.predictions, scored.references)


def fitting(references: Sequence[Sequence[str]]) -> str:
    """The metric that fits: captions have long references; answers that many people gave, about
    ten; others, one."""
    words = mean(len(said.split()) for own in references for said in own)
    if words > _CAPTION_WORDS:
        return "bleu4_lower"
    many = sum(len(own) >= _MANY for own in references)
    return "vqa" if 2 * many > len(references) else "accuracy"


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return text.lower().translate(_PUNCTUATION).split()


def word_error_rate(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Errors of all answers over words of the references they come nearest to (jiwer). It has no
    upper limit: a long answer can be wrong more often than its reference has words.

    Raises:
        Unavailable: jiwer is not installed.
    """
    errors = words = 0
    for answer, own in zip(answers, references, strict=True):
        wrong, length = min(_errors(answer, reference) for reference in own)
        errors, words = errors + wrong, words + length
    return errors / max(words, 1)


def _errors(answer: str, reference: str) -> tuple[int, int]:
    """Words put in, left out or changed, and words of the reference."""
    try:
        import jiwer
    except ImportError as error:
        raise Unavailable('jiwer is not installed: pip install -e ".[profile]"') from error

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
    """VQA accuracy: three who agree are enough; mean over leaving one person out at a time
    (Antol et al., arXiv 1505.00468)."""
    said, people = _short(answer), [_short(reference) for reference in references]
    return mean(
        min(1.0, sum(person == said for person in people[:out] + people[out + 1 :]) / 3.0)
        for out in range(len(people))
    )


def mean(values: Iterable[float]) -> float:
    """0 of none."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def require(packages: Mapping[str, str]) -> None:
    """Raise InputError unless modules are installed; beside each the extra that brings it."""
    for name, extra in packages.items():
        if importlib.util.find_spec(name) is None:
            raise InputError(f'{name} is not installed: pip install -e ".[{extra}]" brings it.')
