"""What the shapes tasks need of Python: their data, prompts and scores.

Data: ``<kind>.parquet`` files as ``vlm-prune demo-data`` writes them, in the folder that
``VLM_PRUNE_DEMO_DATA`` names. Where that is not set, a fixed set is generated on first use and kept
in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import Any

import datasets

from vlm_prune_ext.evals.names import demo_data

LETTERS = "ABCD"
YES_NO_SUFFIX = " Please answer yes or no."

Doc = Mapping[str, Any]
Prompts = Mapping[str, str]


# -- data ----------------------------------------------------------------------------------------
def _load(kind: str) -> datasets.Dataset:
    path = demo_data("parquet") / f"{kind}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: VLM_PRUNE_DEMO_DATA must name a folder made by "
            "`vlm-prune demo-data`, or not be set."
        )
    data = datasets.Dataset.from_parquet(str(path))
    return data.cast_column("image", datasets.Image())


def load_mcq(_: datasets.Dataset) -> datasets.Dataset:
    """Multiple choice, in place of the seed row."""
    return _load("mcq")


def load_yn(_: datasets.Dataset) -> datasets.Dataset:
    """Yes or no, in place of the seed row."""
    return _load("yn")


def load_mme(_: datasets.Dataset) -> datasets.Dataset:
    """Yes or no in pairs, in place of the seed row."""
    return _load("mme")


def load_vqa(_: datasets.Dataset) -> datasets.Dataset:
    """Short answers, in place of the seed row."""
    return _load("vqa")


def load_caption(_: datasets.Dataset) -> datasets.Dataset:
    """Captions, in place of the seed row."""
    return _load("caption")


# -- prompts -------------------------------------------------------------------------------------
def doc_to_visual(doc: Doc) -> list[Any]:
    """The image of a sample, if it has one."""
    return [doc["image"].convert("RGB")] if doc["image"] is not None else []


def question_to_text(doc: Doc, lmms_eval_specific_kwargs: Prompts | None = None) -> str:
    """The question, with what the task asks for around it instead of MME's own suffix."""
    prompts = lmms_eval_specific_kwargs or {}
    question = (doc["question"] or "").strip()
    if not question:
        return ""
    after = prompts.get("post_prompt", "")
    if after:
        question = question.removesuffix(YES_NO_SUFFIX)
    return f"{prompts.get('pre_prompt', '')}{question}{after}"


def mcq_to_text(doc: Doc, lmms_eval_specific_kwargs: Prompts | None = None) -> str:
    """Question, lettered options, and what to answer with."""
    prompts = lmms_eval_specific_kwargs or {}
    question = (doc["question"] or "").strip()
    if not question:
        return ""
    options = "\n".join(f"{letter}. {doc[letter]}" for letter in LETTERS)
    before, after = prompts.get("pre_prompt", ""), prompts.get("post_prompt", "")
    return f"{before}{question}\n{options}{after}"


def mcq_letters(doc: Doc) -> list[str]:
    """The continuations whose likelihood is compared."""
    return list(LETTERS)


def mcq_place(doc: Doc) -> int:
    """Place of the right letter among :func:`mcq_letters`."""
    return LETTERS.index(doc["answer"])


# -- scores --------------------------------------------------------------------------------------
def _first_word(text: str) -> str:
    return (re.findall(r"[a-z0-9]+", text.lower()) or [""])[0]


def mcq_results(doc: Doc, results: list[str]) -> dict[str, float]:
    """1 where the answer's first word is the right letter, or the answer is the right option."""
    answer = results[0].strip()
    named = _first_word(answer).upper()
    right = named == doc["answer"] or _plain(answer) == _plain(str(doc[doc["answer"]]))
    return {"accuracy": float(right)}


def yn_results(doc: Doc, results: list[str]) -> dict[str, Any]:
    """POPE's measures; only ``yes`` and ``no`` themselves count as answers."""
    answer, truth = results[0].strip().rstrip(".").lower(), doc["answer"].lower()
    pair = {"answer": answer, "truth": truth}
    counted = dict.fromkeys(("precision", "recall", "f1", "yes_ratio"), pair)
    return {"accuracy": float(answer == truth), **counted}


def _yes_counts(pairs: Iterable[Mapping[str, str]]) -> tuple[int, int, int]:
    """True positives, false positives, false negatives for "yes"."""
    seen = Counter((pair["answer"] == "yes", pair["truth"] == "yes") for pair in pairs)
    return seen[True, True], seen[True, False], seen[False, True]


def precision(pairs: list[Mapping[str, str]]) -> float:
    """Share of right ones among answers "yes"."""
    hits, wrong, _ = _yes_counts(pairs)
    return hits / (hits + wrong) if hits + wrong else 0.0


def recall(pairs: list[Mapping[str, str]]) -> float:
    """Share of answers "yes" among questions whose answer is "yes"."""
    hits, _, missed = _yes_counts(pairs)
    return hits / (hits + missed) if hits + missed else 0.0


def f1(pairs: list[Mapping[str, str]]) -> float:
    """Harmonic mean of precision and recall."""
    hits, wrong, missed = _yes_counts(pairs)
    return 2 * hits / (2 * hits + wrong + missed) if hits else 0.0


def yes_ratio(pairs: list[Mapping[str, str]]) -> float:
    """Share of answers "yes"."""
    return mean(float(pair["answer"] == "yes") for pair in pairs)


def mme_results(doc: Doc, results: list[str]) -> dict[str, Any]:
    """What :func:`mme_score` needs: the image, the category, right or wrong."""
    right = _first_word(results[0]) == doc["answer"].lower()
    image, category = doc["question_id"], doc["category"]
    return {"perception_score": {"image": image, "category": category, "right": right}}


def mme_score(results: list[Mapping[str, Any]]) -> float:
    """Sum over categories of accuracy and accuracy-of-both, in percent, as MME adds them up."""
    images: dict[str, dict[Any, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        images[result["category"]][result["image"]].append(result["right"])
    total = 0.0
    for answers in images.values():
        total += 100 * mean(mean(map(float, pair)) for pair in answers.values())
        total += 100 * mean(float(all(pair)) for pair in answers.values())
    return total


_ARTICLES = frozenset(("a", "an", "the"))


def _plain(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def vqa_results(doc: Doc, results: list[str]) -> dict[str, float]:
    """VQA accuracy: an answer is right as far as three other people gave it."""
    answer = _plain(results[0])
    given = [_plain(reference) for reference in doc["answers"]]
    scores = []
    for place in range(len(given)):
        others = given[:place] + given[place + 1 :]
        scores.append(min(1.0, others.count(answer) / 3))
    return {"exact_match": mean(scores)}


def caption_results(doc: Doc, results: list[str]) -> dict[str, Any]:
    """A caption with its references, for scores over the whole set."""
    pair = {"caption": _plain_words(results[0]), "references": _references(doc)}
    return {"bleu_4": pair, "rouge_l": pair, "cider": pair}


def _references(doc: Doc) -> list[str]:
    answer = doc["answer"]
    return [_plain_words(text) for text in ([answer] if isinstance(answer, str) else answer)]


def _plain_words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def bleu_4(pairs: list[Mapping[str, Any]]) -> float:
    """Corpus BLEU-4, in percent."""
    from pycocoevalcap.bleu.bleu import Bleu

    return 100 * _scored(
        lambda gold, made: Bleu(4).compute_score(gold, made, verbose=0)[0][3], pairs
    )


def rouge_l(pairs: list[Mapping[str, Any]]) -> float:
    """Mean ROUGE-L, in percent."""
    from pycocoevalcap.rouge.rouge import Rouge

    return 100 * _scored(lambda gold, made: Rouge().compute_score(gold, made)[0], pairs)


def cider(pairs: list[Mapping[str, Any]]) -> float:
    """CIDEr, in percent; not defined (0) for fewer than two images."""
    from pycocoevalcap.cider.cider import Cider

    if len(pairs) < 2:
        return 0.0
    score = _scored(lambda gold, made: Cider().compute_score(gold, made)[0], pairs)
    return 100 * score if math.isfinite(score) else 0.0


Scorer = Callable[[dict[int, list[str]], dict[int, list[str]]], float]


def _scored(scorer: Scorer, pairs: list[Mapping[str, Any]]) -> float:
    gold = {place: pair["references"] for place, pair in enumerate(pairs)}
    made = {place: [pair["caption"]] for place, pair in enumerate(pairs)}
    return float(scorer(gold, made))
