"""Answers of a batch are those of its members, whatever prunes, and say what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import tables
from tests.makers import QUESTIONS, photos, tiny_original
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer, Answerer, Query, _Ends
from vlm_prune_ext.experiment.host import commit, hardware, versions
from vlm_prune_ext.experiment.measure import EnergyMeter, TokenClock
from vlm_prune_ext.experiment.record import Spread

METHODS = tables.pick("none", "fastv-mask", "saint-vit", "downsample", *tables.EVERYWHERE)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """16 visual tokens, 6 layers."""
    return vp.load(tiny_original(tmp_path_factory.mktemp("answer")))


def queries() -> list[Query]:
    """Different lengths, limits and numbers of images."""
    images = [[image] for image in photos(4)]
    images[2] = photos(2, seed=9)
    return [
        Query(text, own, max_new_tokens=3 + place)
        for place, (text, own) in enumerate(zip(QUESTIONS, images, strict=True))
    ]


def content(answer: Answer) -> tuple[Any, ...]:
    return (
        answer.text,
        answer.new_tokens,
        answer.prompt_tokens,
        answer.visual_kept,
        answer.lengths,
    )


@pytest.mark.parametrize("name", METHODS)
def test_batch_equals_singles(loaded: tuple[Any, Any], name: str) -> None:
    answerer = Answerer(*loaded, METHODS[name])
    together = answerer.answer(queries())
    alone = [answerer.answer([query])[0] for query in queries()]
    assert [content(a) for a in together] == [content(a) for a in alone]
    assert [answer.batch for answer in together] == [4] * 4
    for answer, query in zip(together, queries(), strict=True):
        assert answer.visual_tokens == 16 * len(query.images)
        assert 1 <= answer.new_tokens <= query.max_new_tokens
        assert answer.prefill_seconds > 0


@pytest.mark.parametrize(
    ("name", "kept", "lengths"),
    [
        ("none", {0: 16}, [0] * 6),
        ("fastv", {0: 16, 2: 6}, [0, 0, -10, -10, -10, -10]),
        ("fastv-mask", {0: 16, 2: 6}, [0] * 6),
        ("himap", {0: 16, 1: 10, 3: 5}, [0, -6, -6, -11, -11, -11]),
        ("saint-vit", {0: 9}, [-7] * 6),
        ("random", {0: 8}, [-8] * 6),
        ("downsample", {0: 4}, [-12] * 6),
    ],
)
def test_what_was_kept(
    loaded: tuple[Any, Any], name: str, kept: dict[int, int], lengths: list[int]
) -> None:
    answer = Answerer(*loaded, METHODS[name]).answer(queries()[:1])[0]
    assert answer.visual_kept == kept
    assert [n - answer.prompt_tokens for n in answer.lengths] == lengths


def test_answers_end_at_a_string(loaded: tuple[Any, Any]) -> None:
    answerer = Answerer(*loaded)
    whole = answerer.answer([Query("What?", photos(1), max_new_tokens=12)])[0]
    end = whole.text[4:6]
    short = answerer.answer([Query("What?", photos(1), max_new_tokens=12, until=(end,))])[0]
    assert short.text == whole.text[: whole.text.find(end)].strip()
    assert short.new_tokens < whole.new_tokens


def test_strings_end_an_answer_wherever_they_are_complete(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only tokens that can complete a string are looked at closely: the same as looking at all."""
    answerer = Answerer(*loaded)
    text = answerer.answer([Query("What?", photos(1), max_new_tokens=12)])[0].text
    ends = sorted({text[a : a + n] for n in (1, 2, 4) for a in range(0, len(text) - n, 3)})
    asked = [Query("What?", photos(1), max_new_tokens=12, until=(end,)) for end in ends]
    quick = [(one.text, one.new_tokens) for one in answerer.answer(asked)]
    assert [one for one, _ in quick] == [text[: text.find(end)].strip() for end in ends]
    monkeypatch.setattr(_Ends, "_may_end", lambda *_: True)
    assert [(one.text, one.new_tokens) for one in answerer.answer(asked)] == quick


def test_a_batch_that_does_not_fit_is_halved(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer(*loaded, METHODS["fastv"])
    expected = [content(answer) for answer in answerer.answer(queries())]
    original, sizes = answerer._generate, []

    def small_memory(batch: list[Query], planned: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return original(batch, planned)

    monkeypatch.setattr(answerer, "_generate", small_memory)
    assert [content(answer) for answer in answerer.answer(queries())] == expected
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert answerer.largest == 1

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(answerer, "_generate", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        answerer.answer(queries()[:1])


def test_wrong_input(loaded: tuple[Any, Any]) -> None:
    (whole,) = Answerer(*loaded, vp.FastV(agg_layer=2, attention_rank=17)).answer(queries()[:1])
    assert whole.visual_kept == {0: 16, 2: 16}  # more than there is keeps all
    with pytest.raises(InputError, match="agg_layer=6"):
        Answerer(*loaded, vp.FastV(agg_layer=6, attention_rank=2))
    with pytest.raises(InputError, match="style"):
        Answerer(*loaded).answer([Query("a"), Query("b", style="plain")])
    assert Answerer(*loaded).answer([]) == []


# -- measuring -----------------------------------------------------------------------------------
def test_clock_splits_time_and_changes_nothing(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor.prompt("What?", photos(1)[0])
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    clock = TokenClock("cpu")
    timed = model.generate(**inputs, max_new_tokens=4, do_sample=False, logits_processor=[clock])
    clock.stop()
    assert torch.equal(plain, timed)
    assert clock.steps == timed.shape[1] - (inputs["input_ids"].shape[1])
    assert clock.ttft > 0
    assert clock.decode > 0
    assert clock.tpot == pytest.approx(clock.decode / 3)
    assert clock.latency == clock.ttft + clock.decode


def test_spread_and_environment() -> None:
    assert Spread.of([]) is None
    assert Spread.of(range(1, 11)) == Spread(5.5, 5.5, 9, 10)
    assert versions()["torch"] == torch.__version__.partition("+")[0]
    assert hardware("cpu")["cores"] >= 1
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40
    assert EnergyMeter("cpu", None).joules() is None


@pytest.mark.gpu
def test_energy_is_counted_on_a_gpu() -> None:
    meter = EnergyMeter("cuda")
    if not meter.available:
        pytest.skip("this GPU has no counter")
    size = torch.ones(4096, 4096, device="cuda")
    for _ in range(200):
        size = size @ size * 1e-4
    assert (meter.joules() or 0.0) > 0
