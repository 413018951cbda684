"""Questions about one picture: the same answers, kept sets and logits as from whole prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import vlm_prune_ext as vp
from tests import family_makers, makers, tables
from tests.fast.test_fast import write
from tests.pruning_checks import fingerprint
from vlm_prune_ext.evals.answer import Answer, Answerer, Query, Sizes
from vlm_prune_ext.evals.sharing import Sharing
from vlm_prune_ext.fast import pieces, run, shared
from vlm_prune_ext.fast.generate import sharing_of
from vlm_prune_ext.fast.graphs import Recorded
from vlm_prune_ext.models import parts_of

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
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl")
CASES += [
    (family, name)
    for family in ("qwen2_5_vl", "qwen3_vl")
    for name in ("none", "fastv", "himap", "random-later", "divprune")
]
CASES += [(family, name) for family in FAMILIES[1:] for name in ("none", "fastv", "random")]
CASES += [("next-vicuna", name) for name in KINDS] + [("huggingface", name) for name in KINDS[:2]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def load(form: str) -> Any:
        folder = tmp_path_factory.mktemp("shared") / "model"
        if form in FAMILIES:
            getattr(family_makers, form)(folder, layers=6)
            return vp.load(folder)
        return vp.load(write(folder, form))

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
    return (*said, answer.visual_kept)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_shared_prompts_are_answered_like_whole_ones(models: Any, form: str, name: str) -> None:
    loaded = models(form)
    whole = Answerer(*loaded, METHODS[name], share=False).answer(mixed())
    shared = Answerer(*loaded, METHODS[name])
    if name not in ("cdpruner", "fastv-mask"):
        both = 1 if form == "internvl" else 2  # its ids do not tell which of two is whose
        said = [answer.shared for answer in shared.answer(mixed())]
        assert said == [3, 2, 3, both, 3, 1, 2, 1, both]
    for _ in range(2 if name in KINDS else 1):  # the second time pictures are known
        found = shared.answer(mixed())
        assert [content(answer) for answer in found] == [content(answer) for answer in whole]
        if form not in FAMILIES:  # elsewhere a batch's tiles are shared out evenly
            assert [a.tower_images for a in found] == [a.tower_images for a in whole]


def test_one_picture_many_questions(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = models("original")
    runs: list[int] = []
    tower = model.model.vision_tower
    plain = type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda *a, **k: [runs.append(1), plain(*a, **k)][1])
    picture = makers.photo(seed=5)
    texts = vp.ask(model, processor, picture, TEXTS, max_new_tokens=4)
    again = [vp.ask(model, processor, picture, text, max_new_tokens=4)[0] for text in TEXTS]
    assert texts == again and len(runs) == 1
    whole = Answerer(model, processor, share=False)
    assert texts == [whole.answer([Query(t, [picture], max_new_tokens=4)])[0].text for t in TEXTS]
    with torch.no_grad():
        bias = model.model.multi_modal_projector.linear_2.bias
        before = bias.clone()
        bias.add_(1.0)
    try:
        assert vp.ask(model, processor, picture, TEXTS, max_new_tokens=4) != texts
        assert len(runs) == 2 + len(TEXTS)
    finally:
        bias.data.copy_(before)
    both = vp.ask(model, processor, [picture, makers.photo(seed=6)], TEXTS[:2], max_new_tokens=4)
    assert len(both) == 2


def test_what_is_told_of_shared_answers(models: Any) -> None:
    sizes = Sizes.of(models("original")[0].config)
    for name, layers in (("none", 6), ("fastv", 2), ("random", 6), ("cdpruner", 0)):
        answers = Answerer(*models("original"), METHODS[name]).answer(mixed())
        shared = [3, 2, 3, 2, 3, 1, 2, 1, 2] if layers else [1] * 9
        assert [answer.shared for answer in answers] == shared
        for answer in answers:
            assert answer.shared == 1 or answer.shared_layers == layers
            sample = sizes.sample(0, answer, warm_up=False)
            assert (sample.flops_computed < sample.flops) == (answer.shared > 1)


def test_time_to_first_token_counts_what_was_kept_from_an_earlier_call(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture's features serve every method that drops later, whose times are to compare."""
    model, processor = models("original")
    tower = model.model.vision_tower
    plain = type(tower).forward
    monkeypatch.setattr(
        type(tower), "forward", lambda *a, **k: [time.sleep(0.4), plain(*a, **k)][1]
    )
    query = Query("What is there?", [makers.photo(seed=77)], max_new_tokens=2, digests=("77",))
    for method in (None, METHODS["fastv"], METHODS["pdrop"]):
        start = time.perf_counter()
        (answer,) = Answerer(model, processor, method).answer([query])
        assert answer.prefill_seconds > 0.4
    assert time.perf_counter() - start < 0.4


def test_needs_say_what_depends_on_the_question() -> None:
    first = {name: m.first_by_question(6) for name, m in tables.METHODS.items()}
    expected = {"fastv": 2, "himap": 1, "pdrop": 1, "dart": 2, "sparsevlm": 2, "feather": 1}
    assert expected == {name: first[name] for name in expected}
    free = ("saint", "vtw", "random", "random-later", "downsample", *tables.TOWER)
    assert {first[name] for name in free if name != "cdpruner"} == {None}
    assert (
        first["cdpruner"]
        == -1
        == vp.CustomSelection(method=_by_text, agg_layer=0).first_by_question(6)
    )


def _by_text(evidence: Any, budget: int) -> Any: ...


_by_text.needs = ("hidden", "tail_hidden")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["none", "fastv", "himap", "random-later", "random", "saint-vit"])
def test_logits_and_kept_sets(models: Any, name: str) -> None:
    """Over prefill and decode steps, with answers longer than the room that is made for them."""
    model, processor = models("original")
    queries = [replace(query, max_new_tokens=6) for query in mixed()]
    seen: list[tuple[list[torch.Tensor], dict[int, torch.Tensor], Any]] = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            kept.append(scores.clone())
            return scores

    plan = next(p for _, p in Sharing(model, processor, METHODS[name]).plan(queries) if p)
    rows = [row for group in plan.groups for row in group.rows]
    options: Any = {"max_new_tokens": 6, "do_sample": False, "logits_processor": [Keep()]}
    whole = processor.batch([queries[r].text for r in rows], [queries[r].images for r in rows])
    for inputs in (whole, plan.inputs(processor)):
        kept: list[torch.Tensor] = []
        with vp.prune(model, METHODS[name]) as trace:
            if "pixel_values" in inputs:
                model.generate(**inputs, **options)
            else:
                assert plan.answer(inputs, options) is not None
        seen.append((kept, dict(trace.kept), trace))
    (first, one, trace), (second, other, told) = seen
    assert len(first) == len(second) == 6
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert one.keys() == other.keys()
    assert all(torch.equal(places, other[layer]) for layer, places in one.items())
    assert not one or trace.lengths == told.lengths
    assert {k: v.tolist() for k, v in trace.vision_kept.items()} == {
        k: v.tolist() for k, v in told.vision_kept.items()
    }


def test_a_failed_run_leaves_nothing(models: Any) -> None:
    model, processor = models("original")
    answerer = Answerer(model, processor, METHODS["fastv"])
    expected = [content(answer) for answer in answerer.answer(mixed())]

    class Fails(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            raise KeyError("a fault of the caller's")

    before = fingerprint(model)
    plan = next(p for _, p in answerer._sharing.plan(mixed()) if p)
    options: Any = {"max_new_tokens": 3, "do_sample": False, "logits_processor": [Fails()]}
    with pytest.raises(KeyError), vp.prune(model, METHODS["fastv"]):
        plan.answer(plan.inputs(processor), options)
    assert fingerprint(model) == before
    assert [content(answer) for answer in answerer.answer(mixed())] == expected


def test_what_is_kept_is_bounded(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = models("original")
    answerer = Answerer(model, processor)
    sharing_of(model, parts_of).prefixes.clear()  # type: ignore[union-attr]
    monkeypatch.setattr(shared, "BYTES", 3 * 60 * 64 * 4)
    for seed in range(8):
        answerer.answer(
            [Query(text, [makers.photo(seed=seed)], max_new_tokens=1) for text in TEXTS]
        )
    engine = sharing_of(model, parts_of)
    assert engine is not None
    kept = engine.prefixes
    assert 1 <= len(kept._items) < 8
    assert kept.bytes == sum(prefix.bytes for prefix in kept._items.values()) <= shared.BYTES


@pytest.mark.parametrize("name", ["none", "fastv", "sparsevlm"])
def test_answers_that_outgrow_their_caches(
    models: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = models("original")
    queries = [replace(query, max_new_tokens=24) for query in mixed()]
    model.generation_config.eos_token_id, before = -1, model.generation_config.eos_token_id
    try:
        whole = Answerer(model, processor, METHODS[name], share=False).answer(queries)
        monkeypatch.setattr(pieces, "CACHE_STEP", 8)
        for module in (run, shared):
            monkeypatch.setattr(module, "ROOM", 2)
        found = Answerer(model, processor, METHODS[name]).answer(queries)
    finally:
        model.generation_config.eos_token_id = before
    assert [answer.new_tokens for answer in found] == [24] * len(queries)
    assert [content(answer) for answer in found] == [content(answer) for answer in whole]


@pytest.mark.parametrize("name", KINDS)
def test_nothing_reads_what_a_later_piece_may_overwrite(
    models: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded pieces share memory: the output of one is gone when the next one runs."""
    answerer = Answerer(*models("original"), METHODS[name])
    expected = [content(answer) for answer in answerer.answer(mixed())]
    earlier: list[torch.Tensor] = []
    plain = Recorded._run

    def poisoned(self: Recorded, work: Any) -> Any:
        for tensor in earlier:
            tensor.fill_(float("nan"))
        output = plain(self, work)
        memory = getattr(getattr(work, "__self__", None), "memory", None)
        attended = memory.attended if memory is not None else None
        earlier[:] = [t for t in (output, attended) if isinstance(t, torch.Tensor)]
        return output

    monkeypatch.setattr(Recorded, "_run", poisoned)
    assert [content(answer) for answer in answerer.answer(mixed())] == expected
