"""Rows are prepared ahead, grouped and answered in batches: same answers, nothing lost."""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests.makers import QUESTIONS, photo, photos, tiny_original
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import feed
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.evals.batch_size import LARGEST, BatchSize, batch_size_of
from vlm_prune_ext.evals.feed import Batch, Feeder, Row, answer_rows, by_picture

CPU = torch.device("cpu")
FASTV = vp.FastV(agg_layer=2, attention_rank=6)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """16 visual tokens, 6 layers."""
    return vp.load(tiny_original(tmp_path_factory.mktemp("feed")))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    photo(60, 44, seed=seed).save(file, format="PNG")
    return file.getvalue()


PICTURES = [png(seed) for seed in range(3)]


def queries(count: int = 14) -> list[Query]:
    """Questions of different lengths about three pictures in turn, and some about none."""
    made = []
    for place in range(count):
        shown = [] if place % 7 == 6 else [PICTURES[place % 3]]
        text = f"{QUESTIONS[place % 4]} {'Well? ' * (place % 5)}{place}"
        made.append(Query(text, shown, max_new_tokens=3))
    return made


def rows(asked: list[Query]) -> list[Row]:
    return [Row(place, lambda q=one: q) for place, one in enumerate(asked)]


def run(answerer: Answerer, asked: list[Row], size: Any, **options: Any) -> list[Batch]:
    return list(Feeder(answerer, BatchSize(size, CPU), **options).batches(asked))


def texts(batches: list[Batch]) -> dict[Any, str]:
    return {one.index: one.answer.text for batch in batches for one in batch.outcomes if one.answer}


# -- answers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [None, FASTV, vp.DivPrune(ratio=0.5), vp.RandomDrop(keep=5)])
def test_batches_answer_as_single_questions(loaded: tuple[Any, Any], method: Any) -> None:
    """What questions about one picture share is computed once; alone: whole prompts."""
    answerer, asked = Answerer(*loaded, method), queries()
    whole = Answerer(*loaded, method, share=False)
    alone = {place: whole.answer([one])[0].text for place, one in enumerate(asked)}
    assert len(set(alone.values())) > 5
    shuffled = rows(asked)
    random.Random(1).shuffle(shuffled)
    for size, overlap in ((1, True), (4, False), ("auto", True)):
        for given in (rows(asked), shuffled, by_picture(shuffled, lambda row: row.index % 3)):
            batches = run(answerer, given, size, overlap=overlap)
            assert texts(batches) == alone
            assert sum(batch.size for batch in batches) == len(asked)
            assert all(batch.seconds > 0 for batch in batches)
    assert max(batch.size for batch in run(answerer, rows(asked), 4)) == 4


@pytest.mark.parametrize("where", ["host", "device"])
def test_what_fails_fails_alone(
    loaded: tuple[Any, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a batch: a picture cut short, none at all, a prompt that spells a marker,
    and a worker's thread that is told to end."""
    monkeypatch.setattr(loaded[1], "preprocess", where)
    answerer, asked = Answerer(*loaded, FASTV), queries()
    good = {place: answerer.answer([one])[0].text for place, one in enumerate(asked)}
    broken = rows(asked)

    def ends() -> Query:
        raise SystemExit("enough")

    wrong = {1: PICTURES[0][:300], 2: Path("nowhere.png")}
    for place, picture in wrong.items():
        broken[place] = Row(place, lambda p=picture, i=place: replace(asked[i], images=[p]))
    broken[5] = Row(5, lambda: replace(asked[5], text="<image> <image> what?"))
    broken[8] = Row(8, ends)
    batches = run(answerer, broken, 4)
    failed = {one.index: one for batch in batches for one in batch.outcomes if one.error}
    assert set(failed) == {1, 2, 5, 8}
    assert not any(one.asked for one in failed.values())
    assert "does not decode" in str(failed[1].error) and "nowhere.png" in str(failed[2].error)
    assert texts(batches) == {k: v for k, v in good.items() if k not in failed}


def test_what_cannot_be_answered_costs_its_row(loaded: tuple[Any, Any]) -> None:
    """A stated span that one prompt contradicts; the rest of its batch is answered."""
    answerer, asked = Answerer(*loaded, FASTV), queries(6)
    original = answerer._generate

    def picky(batch: list[Query], planned: Any) -> Any:
        if any(one.text == asked[2].text for one in batch):
            raise InputError("it contradicts the prompt")
        return original(batch, planned)

    answerer._generate = picky  # type: ignore[method-assign]
    for overlap in (False, True):
        batches = run(answerer, rows(asked), 4, overlap=overlap)
        failed = [one for batch in batches for one in batch.outcomes if one.error]
        assert [(one.index, one.asked) for one in failed] == [(2, True)]
        assert len(texts(batches)) == 5
    with pytest.raises(InputError, match="contradicts"):
        list(answer_rows(answerer, [(n, lambda q=q: q) for n, q in enumerate(asked)], 4))


def test_a_batch_that_does_not_fit_is_halved_for_good(loaded: tuple[Any, Any]) -> None:
    """Memory for two rows: the model itself raises what CUDA raises."""
    model, _ = loaded
    answerer, asked = Answerer(*loaded, FASTV), queries()
    alone = texts(run(answerer, rows(asked), 1))

    def small(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.register_forward_pre_hook(small, with_kwargs=True)
    try:
        for size in (8, "auto"):
            answerer.largest = None
            batches = run(answerer, rows(asked), size)
            assert texts(batches) == alone
            assert batches[-2].size == 2 and answerer.largest == 2
    finally:
        hook.remove()


def test_nothing_is_in_the_model_after_the_end(loaded: tuple[Any, Any]) -> None:
    """Whoever stops, or meets an error of the model, finds it as it was; what was done before the
    error was handed out."""
    answerer, asked = Answerer(*loaded, FASTV), queries()
    original, inside, calls = answerer._generate, [0], [0]

    def slow(batch: list[Query], planned: Any) -> Any:
        inside[0], calls[0] = inside[0] + 1, calls[0] + 1
        try:
            time.sleep(0.05)
            if calls[0] == 3:
                raise RuntimeError("of the model")
            return original(batch, planned)
        finally:
            inside[0] -= 1

    answerer._generate = slow  # type: ignore[method-assign]
    switching = sys.getswitchinterval()
    batches = Feeder(answerer, BatchSize(2, CPU), overlap=True).batches(rows(asked))
    assert next(batches).size == 2
    assert sys.getswitchinterval() < switching
    batches.close()  # type: ignore[attr-defined]
    assert inside == [0] and calls[0] < 4 and sys.getswitchinterval() == switching
    calls[0], found = 0, list[Batch]()
    with pytest.raises(RuntimeError, match="of the model"):
        found += Feeder(answerer, BatchSize(2, CPU), overlap=True).batches(rows(asked))
    assert inside == [0] and len(found) == 2


def test_samples_come_in_order(loaded: tuple[Any, Any]) -> None:
    answerer, asked = Answerer(*loaded, FASTV), queries()
    asked[3] = replace(asked[3], images=[b"no picture"])
    made = [(f"row {place}", lambda q=one: q) for place, one in enumerate(asked)]
    for size in (1, 4):
        samples = list(answer_rows(answerer, made, size))
        assert [sample.index for sample in samples] == [index for index, _ in made]
        assert [bool(sample.failed) for sample in samples] == [place == 3 for place in range(14)]
        warm_up = [sample for sample in samples if sample.warm_up]
        assert len(warm_up) == size == warm_up[0].batch
        assert all(sample.seconds > 0 for sample in samples if not sample.failed)


# -- ahead ---------------------------------------------------------------------------------------
def test_what_is_prepared_ahead_is_bounded(loaded: tuple[Any, Any]) -> None:
    """Of 100,000 rows, two windows are made beside the one that is answered."""
    taken = 0

    def endless() -> Iterator[Row]:
        nonlocal taken
        for place in range(100_000):
            taken += 1
            shown = [PICTURES[place % 3]]
            yield Row(place, lambda s=shown: Query(QUESTIONS[0], s, max_new_tokens=1))

    batches = Feeder(Answerer(*loaded), BatchSize(2, CPU), threads=3).batches(endless())
    for _ in range(4):  # of four batches in a window
        assert next(batches).size == 2
        assert taken <= 3 * 8
    batches.close()  # type: ignore[attr-defined]


def test_large_pictures_are_fewer_ahead(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once their size is known, as many rows are prepared as there is room for."""
    monkeypatch.setattr(feed, "_ROOM", 5 * loaded[1].ready(PICTURES[0]).pixels.nbytes)
    taken = answered = 0

    def many() -> Iterator[Row]:
        nonlocal taken
        for place in range(80):
            taken += 1
            shown = [PICTURES[place % 3]]
            yield Row(place, lambda s=shown: Query(QUESTIONS[0], s, max_new_tokens=1))

    for batch in Feeder(Answerer(*loaded), BatchSize(2, CPU)).batches(many()):
        answered += batch.size
        assert taken - answered <= (16 if answered <= 16 else 10)
    assert answered == 80


def test_a_picture_is_opened_once(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its content, whether it comes as bytes or as files; queries carry its digest."""
    processor, opened, seen = loaded[1], [], []
    ready = type(processor).ready
    monkeypatch.setattr(
        type(processor), "ready", lambda self, image: opened.append(1) or ready(self, image)
    )
    answerer = Answerer(*loaded)
    answer = answerer.answer
    answerer.answer = lambda asked: seen.extend(asked) or answer(asked)  # type: ignore[method-assign]
    asked = queries(13)
    for place in range(0, 13, 2):
        if asked[place].images:
            path = tmp_path / f"{place}.png"
            path.write_bytes(asked[place].images[0])  # type: ignore[arg-type]
            asked[place] = replace(asked[place], images=[path])
    run(answerer, rows(asked), 4)
    assert len(opened) == 3
    assert len({one.digests for one in seen}) == 4  # three pictures, and none
    assert all(len(one.digests) == len(one.images) for one in seen)


def test_prepared_pictures_are_the_pictures(loaded: tuple[Any, Any]) -> None:
    """Pixels made ahead are those that the family's own preprocessing makes, bit for bit."""
    processor = loaded[1]
    for image in photos(5):
        plain = processor.prompt("What?", image)
        ahead = processor.prompt("What?", processor.ready(image))
        assert torch.equal(plain["pixel_values"], ahead["pixel_values"])
        assert torch.equal(plain["input_ids"], ahead["input_ids"])
        assert processor.length("What?", [image], None) == plain["input_ids"].shape[1]


def test_rows_of_similar_length_share_a_batch(loaded: tuple[Any, Any]) -> None:
    """Four long questions among twelve short ones end up together; other limits stay apart."""
    long = {1, 6, 11, 12}
    asked = [
        Query("Well? " * (30 if place in long else 2) + str(place), max_new_tokens=1)
        for place in range(16)
    ]
    batches = run(Answerer(*loaded), rows(asked), 4)
    assert long in [{one.index for one in batch.outcomes} for batch in batches]
    mixed = [replace(one, max_new_tokens=1 + place % 2) for place, one in enumerate(asked)]
    for batch in run(Answerer(*loaded), rows(mixed), 4):
        assert len({one.index % 2 for one in batch.outcomes}) == 1
        assert batch.size == 4


def test_no_row_waits_for_long(loaded: tuple[Any, Any]) -> None:
    """The longest row is not put off from window to window."""
    asked = [Query("Well? " * (40 if place == 0 else 1), max_new_tokens=1) for place in range(62)]
    order = [
        one.index for batch in run(Answerer(*loaded), rows(asked), 3) for one in batch.outcomes
    ]
    assert order.index(0) < 24
    assert sorted(order) == list(range(62))


def test_rows_with_one_picture_stand_together() -> None:
    found = list(by_picture(range(10), lambda row: None if row == 4 else row % 3))
    assert found == [0, 3, 6, 9, 1, 7, 2, 5, 8, 4]


def test_batches_end_where_a_picture_does(loaded: tuple[Any, Any]) -> None:
    """Unless that leaves a quarter empty; longer runs fill theirs."""

    def sizes(questions: list[int], size: int) -> list[int]:
        asked = [
            Query(f"Well {n}?", [png(picture)], max_new_tokens=1)
            for picture, count in enumerate(questions)
            for n in range(count)
        ]
        return [batch.size for batch in run(Answerer(*loaded), rows(asked), size)]

    assert sizes([3, 3, 3, 3], 8) == [6, 6]
    assert sizes([1] * 7, 3) == [3, 3, 1]
    assert sizes([2, 7], 6) == [6, 3]  # a picture that fills no batch, and one that overfills one


# -- how many ------------------------------------------------------------------------------------
def test_auto_grows_while_it_pays() -> None:
    """Rates of batches of 1, 4, 16 and 64."""

    def settled(rates: dict[int, float]) -> int:
        size = BatchSize("auto", CPU)
        for _ in range(20):
            size.note(size.now, size.now / rates[size.now], None)
        return size.now

    assert settled({1: 10, 4: 30, 16: 60, 64: 80}) == LARGEST == 64
    assert settled({1: 10, 4: 30, 16: 30, 64: 80}) == 4
    assert settled({1: 10, 4: 5}) == 1
    size = BatchSize("auto", CPU)
    for _ in range(9):  # batches that are not full say nothing
        size.note(0, 1.0, None)
    assert size.now == 1
    size.note(1, 1.0, None)
    size.note(4, 1.0, largest=2)  # memory ran out
    assert size.now == 2
    size.note(2, 0.01, largest=2)
    assert size.now == 2


def test_sizes_that_are_accepted() -> None:
    assert BatchSize(None, CPU).now == BatchSize(1, CPU).now == 1
    assert [batch_size_of("n", given) for given in (3, "4", "auto")] == [3, 4, "auto"]
    for given in (0, "many", None, 2.5, True):
        with pytest.raises(InputError, match="integer of at least 1, or auto"):
            batch_size_of("n", given)
