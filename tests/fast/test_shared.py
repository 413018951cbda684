"""Questions about one picture: the same answers, kept sets and logits as from whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import vlm_prune_ext as vp
from tests import makers, tables
from tests.fast.test_fast import write
from vlm_prune_ext.evals.answer import Answer, Answerer, Query

TEXTS = (
    "What is this?",
    "How many circles are there in the picture?",
    "Red?",
    "Is it a photograph, or something that was drawn?",
)
METHODS = tables.pick("none", *tables.METHODS)
KINDS = ("none", "fastv", "saint", "random", "divprune", "sparsevlm", "saint-vit", "prumerge_plus")
"""Of sharing: all layers or some, with drops among them or in front, rows that are added."""
CASES = [("original", name) for name in METHODS]
CASES += [("next-vicuna", name) for name in KINDS] + [("huggingface", name) for name in KINDS[:2]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def load(form: str) -> Any:
        return vp.load(write(tmp_path_factory.mktemp("shared") / "model", form))

    return load


def mixed() -> list[Query]:
    """Three pictures of other shapes, questions of other lengths and limits, in no order; one
    question about two pictures, one about none."""
    one, other, third = makers.photos(3)
    rows = [(0, [one]), (1, [other]), (2, [one]), (3, [one, other]), (1, [one]), (0, [])]
    rows += [(3, [other]), (0, [third]), (2, [one, other])]
    return [
        Query(TEXTS[text], images, max_new_tokens=3 + place % 3)
        for place, (text, images) in enumerate(rows)
    ]


def content(answer: Answer) -> tuple[Any, ...]:
    said = (answer.text, answer.new_tokens, answer.prompt_tokens, answer.lengths)
    if not answer.visual_tokens:  # what rules did, is told of the whole batch
        return said
    return (*said, answer.visual_kept, answer.tower_images)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_shared_prompts_are_answered_like_whole_ones(models: Any, form: str, name: str) -> None:
    loaded = models(form)
    whole = Answerer(*loaded, METHODS[name], share=False).answer(mixed())
    shared = Answerer(*loaded, METHODS[name])
    for _ in range(2 if name in KINDS else 1):  # the second time pictures are known
        assert [content(a) for a in shared.answer(mixed())] == [content(a) for a in whole]
