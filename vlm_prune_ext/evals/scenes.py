"""The demo's questions asked in batches, without a framework: fresh scenes of any seed, worded as
LLaVA's own evaluation words such questions, and scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm_prune_ext.demo.drawing import COLORS, IMAGE_SIZE, SHAPES, make_scene, render
from vlm_prune_ext.demo.questions import LETTERS, samples
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.evals.feed import answer_rows
from vlm_prune_ext.experiment.metrics import bleu_words
from vlm_prune_ext.experiment.record import Sample
from vlm_prune_ext.experiment.statistics import wilson
from vlm_prune_ext.methods.base import Method

TITLES = {"mcq": "Shapes_MCQ", "yn": "Shapes_YN", "vqa": "Shapes_VQA", "caption": "Shapes_Caption"}
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
NEW_TOKENS = {"mcq": 4, "yn": 4, "vqa": 8, "caption": 64}

_PAIR = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")


@dataclass(frozen=True)
class Case:
    """A question: the demo's sample (``kind``, ``question``, ``answer``, ``category``...) and what
    a model is asked."""

    sample: dict[str, Any]
    query: Query

    @property
    def kind(self) -> str:
        """Which set it is of."""
        return str(self.sample["kind"])

    @property
    def answer(self) -> str:
        """The right one."""
        return str(self.sample["answer"])


def picture(sample: dict[str, Any]) -> Image.Image:
    """The picture that a sample is about."""
    return render(make_scene(sample["scene_seed"]))


def noise(sample: dict[str, Any]) -> Image.Image:
    """Uniform noise, another for each index: all that a model that cannot see gets to see."""
    rng = np.random.default_rng([99, sample["index"]])
    return Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))


def cases(
    kind: str, seed: int, count: int, image: Callable[[dict[str, Any]], Image.Image] = picture
) -> list[Case]:
    """Questions of one set.

    Args:
        kind: ``mcq``, ``yn``, ``vqa`` or ``caption``.
        seed: of the scenes.
        count: of questions.
        image: what the model is shown.
    """
    return [case(sample, image(sample)) for sample in samples(kind, seed, count)]


def case(sample: dict[str, Any], image: Image.Image) -> Case:
    """A sample as a question about an image."""
    text, kind = sample["question"], sample["kind"]
    if kind == "mcq":
        lines = [f"{a}. {b}" for a, b in zip(LETTERS, sample["options"], strict=True)]
        text = "\n".join([text, *lines]) + LETTER_SUFFIX
    elif kind == "vqa":
        text += WORD_SUFFIX
    return Case(sample, Query(text, [image], max_new_tokens=NEW_TOKENS[kind]))


def ask(
    model: Any,
    processor: Any,
    items: Sequence[Case],
    method: Callable[[int], Method | None] = lambda batch: None,
    batch_size: int = 25,
) -> list[Sample]:
    """Greedy answers to questions of one set, with what each cost.

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        items: the questions.
        method: number of the batch -> what prunes; random dropping takes another seed for each
            batch, so that a figure is not that of one lucky draw.
        batch_size: questions at a time.
    """
    found: list[Sample] = []
    for number, start in enumerate(range(0, len(items), batch_size)):
        batch = items[start : start + batch_size]
        answerer = Answerer(model, processor, method(number))
        rows = [(start + place, lambda c=one: c.query) for place, one in enumerate(batch)]
        found += answer_rows(answerer, rows, batch_size)
    return found


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def is_right(case: Case, answer: str) -> bool:
    """Whether an answer is right; for captions, whether it names every coloured shape there is."""
    if case.kind == "caption":
        return set(_PAIR.findall(case.answer.lower())) <= set(_PAIR.findall(answer.lower()))
    return words_of(answer) == words_of(case.answer)


def share(right: int, count: int) -> dict[str, Any]:
    """A share in percent with its 95 % Wilson interval."""
    low, high = wilson(right, count)
    return {"value": 100 * right / count, "low": 100 * low, "high": 100 * high, "count": count}


def score(items: Sequence[Case], given: Sequence[Sample]) -> dict[str, Any]:
    """Share of right answers, overall and per category, and BLEU-4 for captions, in percent."""
    right = [is_right(one, sample.prediction) for one, sample in zip(items, given, strict=True)]
    result = share(sum(right), len(right))
    if items[0].kind == "caption":
        references = [[one.answer] for one in items]
        result["bleu_4"] = bleu_words([sample.prediction for sample in given], references)
        return result
    result["categories"] = {}
    for name in sorted({one.sample["category"] for one in items}):
        mine = [r for r, one in zip(right, items, strict=True) if one.sample["category"] == name]
        result["categories"][name] = 100 * sum(mine) / len(mine)
    return result
