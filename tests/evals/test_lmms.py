"""The lmms-eval models on tiny checkpoints: real requests, real evaluator, real response cache."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.tasks import TaskManager
from loguru import logger

import vlm_prune_ext as vp
from tests import family_makers, makers
from vlm_prune_ext.demo.writers import write_lmms_parquet, write_vlmeval_tsv
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import lmms as models
from vlm_prune_ext.evals.decoding import Decoding, decoding_of
from vlm_prune_ext.evals.lmms_likelihood import Row, score_rows
from vlm_prune_ext.evals.lmms_requests import chat_prompt
from vlm_prune_ext.evals.lmms_tally import Sums, _added, _metrics
from vlm_prune_ext.experiment.flops import DecoderShape, PromptFlops, decoder_flops

TASKS = Path(models.__file__).parent / "tasks"
KWARGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}
FASTV = "agg_layer=1,attention_rank=4"
SETTINGS = {
    "LlavaBaseline": "",
    "LlavaFastv": FASTV,
    "LlavaSaint": "start=1,end=3,threshold=0.2,min_neighbors=1,vit_layers=[1],vit_keep_num=12",
    "LlavaDownsample": "keep=9",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.tiny_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(autouse=True)
def _no_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models name lmms-eval's cache folder in the environment; each test starts without one."""
    monkeypatch.setenv("LMMS_CACHE_RUN_ID", "")
    monkeypatch.delenv("LMMS_CACHE_RUN_ID")


Make = Callable[..., models.PruneModel]


@pytest.fixture(scope="module")
def make(checkpoint: Path) -> Make:
    def make(name: str = "LlavaFastvChat", settings: str = FASTV, batch: Any = 4) -> Any:
        args = ",".join(filter(None, [f"pretrained={checkpoint},device=cpu", settings]))
        cls = getattr(models, name)
        model = cls.create_from_arg_string(args, {"batch_size": batch, "device": None})
        model.task_dict = {"t": {"test": ROWS}, "bad": {"test": BadRows()}}
        return model

    return make


def row(count: int, question: str, seed: int) -> dict[str, Any]:
    images = [makers.photo(40 + 9 * i, 50, seed=seed + i) for i in range(count)]
    return {"images": images, "question": question}


ROWS = [
    row(1, makers.QUESTIONS[0], 1),
    row(1, makers.QUESTIONS[2], 2),
    row(2, makers.QUESTIONS[1], 3),
    row(0, makers.QUESTIONS[3], 5),
    row(1, makers.QUESTIONS[3], 6),
    row(1, makers.QUESTIONS[1], 7),
    row(2, makers.QUESTIONS[2], 8),
]


ALL = range(len(ROWS))


class BadRows:
    """Rows 1 ... 3 are an image that does not decode, an empty question, and a stray marker."""

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place == 1:
            Image.open(os.devnull)
        good = ROWS[0] if place == 0 else ROWS[4]
        return {
            **good,
            "question": {2: "  ", 3: "<image> <image> what?"}.get(place, good["question"]),
        }

    def __len__(self) -> int:
        return 5


def to_messages(row: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in row["images"]]
    content.append({"type": "text", "text": row["question"]})
    return [{"role": "user", "content": content}]


def as_lmms_eval_asks(row: dict[str, Any]) -> str:
    """A question as lmms-eval's own LLaVA words it: images joined by blanks, then a line break."""
    images = " ".join(["<image>"] * len(row["images"]))
    return f"{images}\n{row['question']}" if images else row["question"]


def to_visual(row: dict[str, Any]) -> list[Any]:
    return row["images"]


def instance(arguments: tuple[Any, ...], kind: str, doc: int, task: str, idx: int = 0) -> Instance:
    metadata = {"task": task, "doc_id": doc, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=idx, metadata=metadata)


def requests(
    docs: Any = ALL,
    *,
    simple: bool = False,
    task: str = "t",
    kwargs: dict[str, Any] | None = None,
) -> list[Instance]:
    given = KWARGS if kwargs is None else kwargs
    made = []
    for doc in docs:
        if simple:
            source = ROWS if task == "t" else BadRows()
            text = "Where?" if (task, doc) == ("bad", 1) else source[doc]["question"]
            arguments: tuple[Any, ...] = (text, dict(given), to_visual, doc, task, "test")
        else:
            arguments = ("", to_messages, dict(given), doc, task, "test")
        made.append(instance(arguments, "generate_until", doc, task))
    return made


def texts(results: Any) -> list[str]:
    return [result.text for result in results]


@contextmanager
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    handle = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    try:
        yield lines
    finally:
        logger.remove(handle)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_and_interfaces_agree(make: Make, name: str) -> None:
    """Batches of 1, 4 and 16, chat and simple: the answers of one prompt at a time."""
    model = make(f"{name}Chat", SETTINGS[name], 1)
    answerer = model.answerer
    alone = []
    for sample in ROWS:
        inputs = answerer.processor.prompt(as_lmms_eval_asks(sample), sample["images"])
        with vp.prune(answerer.model, answerer.method):
            out = answerer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone += answerer.processor.decode(out, inputs)
    assert len(set(alone)) > 3
    for batch in (1, 4, 16):
        model.batch_size_per_gpu = batch
        assert texts(model.generate_until(requests())) == alone
    simple = make(f"{name}Simple", SETTINGS[name], 4)
    assert texts(simple.generate_until(requests(simple=True))) == alone


def test_requests_are_grouped_by_how_they_are_answered(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(batch=4)
    sizes = []
    inner = model.answerer.answer
    monkeypatch.setattr(
        model.answerer, "answer", lambda queries: sizes.append(len(queries)) or inner(queries)
    )
    short = requests(kwargs={**KWARGS, "max_new_tokens": 2})
    mixed = [one for pair in zip(requests(), short, strict=True) for one in pair]
    before = [dict(one.args[2]) for one in mixed]
    answers = model.generate_until(mixed)
    assert len(answers) == 14
    assert sizes == []
    got = list(answers)
    assert sizes == [4, 4, 3, 3]
    assert texts(got[0::2]) == texts(model.generate_until(requests()))
    assert texts(got[1::2]) == texts(model.generate_until(short))
    assert [one.args[2] for one in mixed] == before  # the response cache keys on them
    for result in got:
        assert result.token_counts.output_tokens <= 6
        assert result.token_counts.input_tokens > 16


def test_rows_with_one_picture_go_together_and_auto_answers_alike(make: Make) -> None:
    """Stored pictures are told apart by their bytes, without being decoded; answers keep the
    order of the requests."""
    pictures = [makers.photo(40 + 9 * n, 50, seed=n) for n in range(3)]
    shown = datasets.Dataset.from_list(
        [
            {"images": pictures[n % 3], "question": makers.QUESTIONS[n % 4]}
            for n in (0, 1, 2, 3, 4, 5, 6, 7, 8)
        ]
    ).cast_column("images", datasets.Image())
    asked = []
    answers = {}
    for batch in (1, 4, "auto"):
        model = make(batch=batch)
        model.task_dict = {"t": {"test": shown}}
        inner = model.answerer.answer
        asked.clear()
        model.answerer.answer = lambda queries, inner=inner: (  # type: ignore[method-assign]
            asked.extend(query.digests for query in queries) or inner(queries)
        )
        given = requests(range(9), kwargs={**KWARGS, "max_new_tokens": 3})
        for one in given:
            to_list = lambda row: to_messages({**row, "images": [row["images"]]})  # noqa: E731
            one.arguments = (one.args[0], to_list, *one.args[2:])
        answers[batch] = texts(model.generate_until(given))
        if batch != "auto":  # which begins with a batch of one
            assert len(list(groupby(asked))) == 3
    assert answers[1] == answers[4] == answers["auto"]
    assert len(set(answers[1])) > 2


def test_until_ends_an_answer(make: Make) -> None:
    model = make()
    whole = texts(model.generate_until(requests(kwargs={**KWARGS, "max_new_tokens": 12})))
    stop = whole[0][4:6]
    assert stop.strip()
    cut = texts(
        model.generate_until(requests(kwargs={**KWARGS, "max_new_tokens": 12, "until": [stop]}))
    )
    assert cut == [text.partition(stop)[0].strip() for text in whole]
    assert cut[0] != whole[0]


def test_beams_and_sampling(make: Make) -> None:
    model = make()
    beams = {**KWARGS, "num_beams": 3}
    together = texts(model.generate_until(requests([0, 1, 4], kwargs=beams)))
    alone = [texts(model.generate_until(requests([doc], kwargs=beams)))[0] for doc in (0, 1, 4)]
    assert together == alone
    drawn = {"max_new_tokens": 6, "temperature": 1.5}
    runs = set()
    for seed in range(3):
        torch.manual_seed(seed)
        runs.add(texts(model.generate_until(requests([0], kwargs=drawn)))[0])
    assert len(runs) > 1


def test_decoding_settings() -> None:
    greedy = Decoding(5, ("a",))
    given: dict[str, Any] = {"max_new_tokens": 5, "until": "a", "temperature": 0, "top_p": 0}
    assert decoding_of(given) == greedy
    assert decoding_of({**given, "num_beams": 1, "image_aspect_ratio": "original"}) == greedy
    assert decoding_of({**given, "repetition_penalty": None, "seed": 0}) == greedy
    assert decoding_of({"stop_sequences": ["a"], "max_gen_toks": 5}) == greedy
    assert decoding_of({}).max_new_tokens == 1024
    sampled = decoding_of({"temperature": 0.5, "top_p": 0.9, "do_sample": False})
    assert dict(sampled.options) == {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    searched = decoding_of({"num_beams": 3, "repetition_penalty": 1.2, "length_penalty": 0.5})
    assert len(searched.options) == 3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"until": [3]}, "until"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"repetition_penality": 1.2}, "Did you mean 'repetition_penalty'"),
        ({"visual_cot": True}, "visual_cot"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 0}, "top_p"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": True, "seed": 3}, "--seed"),
        ({"max_gen_toks": 5, "max_new_tokens": 7}, "max_new_tokens=7 contradicts"),
        ({"until": ["a"], "stop_sequences": ["b"]}, "one setting"),
        ({"min_new_tokens": 3, "max_new_tokens": 2}, "at most max_new_tokens=2"),
    ],
)
def test_options_are_honoured_or_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decoding_of(wrong)


def test_repetition_penalty(make: Make) -> None:
    """As transformers applies it to the prompt's text and the answer; a batch as single prompts."""
    model = make("LlavaBaselineChat", "")
    asked = {**KWARGS, "max_new_tokens": 12, "repetition_penalty": 3.0}
    together = texts(model.generate_until(requests([0, 1, 3], kwargs=asked)))
    alone = [texts(model.generate_until(requests([doc], kwargs=asked)))[0] for doc in (0, 1, 3)]
    assert together == alone != texts(model.generate_until(requests([0, 1, 3])))
    answerer = model.answerer  # sample 3 has no image, so transformers' own rule works
    inputs = answerer.processor.prompt(ROWS[3]["question"])
    out = answerer.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=3.0
    )
    assert answerer.processor.decode(out, inputs)[0] == together[2]


def test_markers_in_a_question_place_its_images(make: Make) -> None:
    model = make()
    processor = model.answerer.processor

    def prompt(text: str, count: int) -> tuple[str, int]:
        images = [{"type": "image", "url": makers.photo()}] * count
        chat = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        made = chat_prompt(chat, processor, "plain")
        return made.text, len(made.images)

    assert prompt("Question: <image>\nwhat?", 1) == ("Question: <image>\nwhat?", 1)
    assert prompt("Question: <image>\nwhat?", 2) == ("Question: <image> <image>\nwhat?", 2)
    assert prompt("Is <image> like <image>?", 2) == ("Is <image> like <image>?", 2)
    assert prompt("what?", 2) == ("<image> <image>\nwhat?", 2)
    assert prompt("what?", 0) == ("what?", 0)
    for text, count in (("<image> <image> what?", 1), ("<image> what?", 0), ("<image><image>?", 3)):
        with pytest.raises(InputError, match=f"marker.* for {count} image"):
            prompt(text, count)
    told = [{"type": "text", "text": "a"}, {"type": "image", "url": makers.photo()}]
    chat = [{"role": "user", "content": [*told, {"type": "text", "text": "b"}]}]
    assert chat_prompt(chat, processor, "plain").text == "a<image>\nb"


def test_padding_requests_cost_nothing(make: Make) -> None:
    """Requests that lmms-eval adds so that processes have equally many."""
    model = make()
    real = requests([0, 1])
    padded = [*real, evaluator._clone_padding_request(real[-1])]
    padded.append(evaluator._clone_padding_request(real[-1]))
    got = texts(model.generate_until(padded))
    assert got[1] == got[2] == got[3]
    assert model._tally.report(0, 1)["samples_per_second"] > 0
    assert model._tally._sums.samples == 2


def test_conversations_keep_their_turns(make: Make) -> None:
    model = make()
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *to_messages(ROWS[0]),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": makers.QUESTIONS[3]}]},
    ]
    request = instance(
        ("", lambda row: chat, dict(KWARGS), 0, "t", "test"), "generate_until", 0, "t"
    )
    processor = model.answerer.processor
    prompt, images = processor.messages(chat)
    assert prompt.index("Be brief.") < prompt.index("<image>") < prompt.index("A cat.")
    inputs = processor.prompt(prompt, images, style="plain")
    with vp.prune(model.model, model.answerer.method):
        out = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert texts(model.generate_until([request])) == processor.decode(out, inputs)


# -- likelihood ------------------------------------------------------------------------------------


def likelihood_requests(choices: list[str], docs: Any = range(4)) -> list[Instance]:
    return [
        instance(
            (ROWS[doc]["question"], choice, to_visual, doc, "t", "test"),
            "loglikelihood",
            doc,
            "t",
            i,
        )
        for doc in docs
        for i, choice in enumerate(choices)
    ]


def reference_loss(answerer: Any, sample: dict[str, Any], text: str) -> float:
    """One forward pass over prompt and continuation, without pruning."""
    inputs = answerer.processor.prompt(as_lmms_eval_asks(sample), sample["images"])
    whole = answerer.processor.prompt(
        f"{_rendered(answerer, sample)} {text}", sample["images"], style="plain"
    )
    start = inputs["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :start], inputs["input_ids"])
    with torch.no_grad():
        logs = answerer.model(**whole).logits.log_softmax(dim=-1)[0]
    ids = whole["input_ids"][0, start:]
    return -logs[start - 1 : -1].gather(1, ids[:, None]).mean().item()


def _rendered(answerer: Any, sample: dict[str, Any]) -> str:
    chat = [{"role": "user", "content": as_lmms_eval_asks(sample)}]
    return answerer.processor.messages(chat)[0]


def test_likelihood_of_the_baseline_is_a_forward_pass(make: Make) -> None:
    choices = [" A", " left", " Where is the red square?"]
    model = make("LlavaBaselineSimple", "")
    scores = list(model.loglikelihood(likelihood_requests(choices)))
    expected = [
        reference_loss(model.answerer, sample, choice.strip())
        for sample in ROWS[:4]
        for choice in choices
    ]
    assert [loss for loss, _ in scores] == pytest.approx(expected, abs=1e-4)
    keep_all = make("LlavaFastvSimple", "agg_layer=1,attention_rank=1.0")
    same = list(keep_all.loglikelihood(likelihood_requests(choices)))
    assert [loss for loss, _ in same] == pytest.approx(expected, abs=1e-4)


def test_likelihood_on_the_pruned_model(make: Make) -> None:
    """Losses differ from the baseline's, agree over batch sizes, and what generation says is
    greedy."""
    choices = [" A", " B", " left above"]
    model = make("LlavaFastvSimple", FASTV, 1)
    scores = list(model.loglikelihood(likelihood_requests(choices)))
    assert all(isinstance(score, GenerationResult) and len(score) == 2 for score in scores)
    for batch in (3, 16):
        model.batch_size_per_gpu = batch
        other = list(model.loglikelihood(likelihood_requests(choices)))
        assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in scores], abs=1e-4)
    baseline = list(make("LlavaBaselineSimple", "").loglikelihood(likelihood_requests(choices)))
    assert abs(scores[0][0] - baseline[0][0]) > 1e-3
    assert scores[9][0] == pytest.approx(baseline[9][0], abs=1e-4)  # sample 3 has no image
    assert not any(greedy for _, greedy in scores[:3])


def test_greedy_tokens_are_the_likeliest(make: Make) -> None:
    """What generation says is greedy, token by token; anything else is not."""
    model = make("LlavaFastvChat", FASTV)
    answerer = model.answerer
    prompt, images = answerer.processor.messages(to_messages(ROWS[0]))
    inputs = answerer.processor.prompt(prompt, images, style="plain")
    with vp.prune(answerer.model, answerer.method):
        out = answerer.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ids = tuple(out[0, inputs["input_ids"].shape[1] :].tolist())
    other = (ids[0] + 1, *ids[1:])
    rows = [Row(prompt, images, path[:-1], path[-1:]) for path in (ids, other)]
    said, wrong = score_rows(answerer.model, answerer.processor, answerer.method, rows)
    assert said.path_greedy == (True, True, True)
    assert said.best == ids[-1]
    assert wrong.path_greedy[0] is False
    assert said.mean_loss(0) < wrong.mean_loss(0)


def test_a_row_that_cannot_be_scored_is_reported(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("LlavaFastvSimple", FASTV, 4)
    choices = [" A", " B"]
    whole = list(model.loglikelihood(likelihood_requests(choices, range(4))))
    inner = model.model.generate

    def generate(**inputs: Any) -> Any:
        if (inputs["input_ids"] == model.answerer.processor.image_token_id).sum(1).max() > 16:
            raise torch.OutOfMemoryError("injected")
        return inner(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    with said() as lines:
        got = list(model.loglikelihood(likelihood_requests(choices, range(4))))
    for place, (loss, _) in enumerate(got):
        if place in (4, 5):  # sample 2 has two images
            assert loss == math.inf
        else:
            assert loss == pytest.approx(whole[place][0], abs=1e-4)
    assert sum("sample 2: not answered" in line for line in lines) == 2


def test_options_of_a_question_share_a_prefill(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("LlavaFastvSimple", FASTV, 2)
    rows = []
    inner = model.model.generate

    def generate(**inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return inner(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    list(model.loglikelihood(likelihood_requests([" A", " B", " C"], range(4))))
    assert rows == [2, 2]


# -- rounds ----------------------------------------------------------------------------------------


def rounds_of(place: int) -> int:
    return 1 + place % 3


def test_rounds(make: Make) -> None:
    """The task makes the next question of the answers, and says when it is over."""

    def messages(row: dict[str, Any], **state: Any) -> Any:
        number = state.get("round_idx")
        if number is None:
            return to_messages(row)
        place = next(i for i, one in enumerate(ROWS) if one is row)
        asked = {**row, "question": f"You said {state['previous_output'][-1]}. Why?"}
        info = (state["previous_round_info"] or 0) + 1
        assert info == number == len(state["previous_output"])
        return to_messages(asked), number >= rounds_of(place), state["previous_output"], info

    def text(row: dict[str, Any], **state: Any) -> Any:
        said, terminal, answers, info = messages(row, **state)
        return row["images"], said[0]["content"][-1]["text"], terminal, answers, info

    kind = "generate_until_multi_round"
    chat = [
        instance(("", messages, dict(KWARGS), doc, "t", "test"), kind, doc, "t") for doc in range(5)
    ]
    simple = [
        instance(
            (ROWS[doc]["question"], dict(KWARGS), to_visual, text, doc, "t", "test"), kind, doc, "t"
        )
        for doc in range(5)
    ]
    got = make().generate_until_multi_round(chat)
    assert [len(answers) for answers in got] == [rounds_of(doc) for doc in range(5)]
    assert make("LlavaFastvSimple").generate_until_multi_round(simple) == got
    assert make(batch=1).generate_until_multi_round(chat) == got
    first = make("LlavaFastvChat").generate_until(requests(range(5)))
    assert [answers[0] for answers in got] == texts(first)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_bad_samples_are_reported_and_the_others_answered(make: Make, simple: bool) -> None:
    model = make("LlavaFastvSimple" if simple else "LlavaFastvChat", batch=8)
    with said() as lines:
        got = list(model.generate_until(requests(range(5), task="bad", simple=simple)))
    good = texts(model.generate_until(requests([0, 4], simple=simple)))
    assert [got[0].text, got[4].text] == good
    assert [one.text for one in got[1:4]] == ["", "", ""]
    assert all(one.token_counts is None for one in got[1:4])
    for doc, word in ((1, "identify"), (2, "empty"), (3, "marker")):
        mine = [line for line in lines if f"task bad, split test, sample {doc}:" in line]
        assert len(mine) == 1, lines
        assert word in mine[0]
    figures = model._tally.report(0, 1)
    assert figures["failed_samples"] == 3
    assert figures["samples_without_image"] == 0


def test_a_sample_without_image_is_reported_and_answered(make: Make) -> None:
    model = make()
    with said() as lines:
        (answer,) = model.generate_until(requests([3]))
    assert answer.text
    assert any("sample 3" in line and "no image" in line for line in lines)
    assert model._tally.report(0, 1)["samples_without_image"] == 1


def test_a_run_in_which_nothing_worked_fails(make: Make) -> None:
    model = make()
    list(model.generate_until(requests([1, 2], task="bad")))
    with pytest.raises(InputError, match="None of 2 samples"):
        model.clean()


def test_video_is_refused(make: Make) -> None:
    model = make()
    chat = [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]
    request = instance(
        ("", lambda row: chat, dict(KWARGS), 0, "t", "test"), "generate_until", 0, "t"
    )
    with said() as lines:
        assert texts(model.generate_until([request])) == [""]
    assert "takes no videos here" in lines[0]


def test_out_of_memory_halves_the_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(batch=8)
    model.answerer._sharing = None  # what is shared is not asked by `generate`
    expected = texts(model.generate_until(requests()))
    sizes = []
    inner = model.model.generate

    def generate(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("injected")
        return inner(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    with caplog.at_level("WARNING", logger="vlm_prune_ext"):
        assert texts(model.generate_until(requests())) == expected
        assert texts(model.generate_until(requests())) == expected
    assert sizes[:3] == [7, 4, 2]
    assert max(sizes[2:]) <= 2
    assert len([r for r in caplog.records if "memory" in r.getMessage()]) == 1


def test_one_sample_too_large_is_reported(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(batch=8)
    model.answerer._sharing = None  # what is shared is not asked by `generate`
    expected = texts(model.generate_until(requests()))
    inner = model.model.generate

    def generate(**inputs: Any) -> Any:
        if (inputs["input_ids"] == model.answerer.processor.image_token_id).sum(1).max() > 16:
            raise torch.OutOfMemoryError("injected")
        return inner(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    got = texts(model.generate_until(requests()))
    large = [doc for doc, sample in enumerate(ROWS) if len(sample["images"]) > 1]
    assert got == ["" if doc in large else text for doc, text in enumerate(expected)]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ("attention_rnk=4", "attention_rank"),
        ("agg_layer=99", "agg_layer"),
        ("conv_template=vicuna", "vicuna_v1"),
        ("dtype=int8", "dtype"),
        ("device=gpu", "device"),
        ("pretrained=nowhere/to/be/found", "nowhere"),
    ],
)
def test_wrong_arguments_stop_before_anything_runs(make: Make, settings: str, word: str) -> None:
    args = settings if "pretrained" in settings else f"{FASTV},{settings}"
    if "agg_layer=99" in args or "pretrained" in args:
        args = f"{settings},attention_rank=4"
    with pytest.raises(InputError, match=word):
        if "pretrained" in settings:
            models.LlavaFastvChat.create_from_arg_string(args)
        else:
            make(settings=args)
    with pytest.raises(InputError, match="batch_size"):
        make(batch="many")


# -- the response cache ----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends."""


def cached_run(
    model: models.PruneModel,
    args: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_after: int | None = None,
) -> tuple[list[int], list[Any] | None]:
    """Answer all rows through lmms-eval's response cache. Returns the rows that were computed."""
    computed: list[int] = []
    inner = model._result

    def result(source: Any, outcome: Any) -> Any:
        if kill_after is not None and len(computed) >= kill_after:
            raise Killed
        computed.append(source.doc)
        return inner(source, outcome)

    monkeypatch.setattr(model, "_result", result)
    cache = ResponseCache.create(str(root), model=model.MODEL, model_args=args)
    results = None
    with suppress(Killed):
        results = cache.execute(model, "generate_until", requests())
    cache.finalize(success=results is not None)
    return computed, results


def test_interrupted_run_goes_on_where_it_was(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(make().generate_until(requests()))
    monkeypatch.delenv("LMMS_CACHE_RUN_ID", raising=False)
    first, nothing = cached_run(make(batch=1), FASTV, tmp_path, monkeypatch, kill_after=4)
    assert nothing is None
    assert first == [0, 1, 2, 3]
    second, results = cached_run(make(batch=2), FASTV, tmp_path, monkeypatch)
    assert sorted(second) == [4, 5, 6]
    assert [getattr(result, "text", result) for result in results or ()] == expected
    third, _ = cached_run(make(batch=2), FASTV, tmp_path, monkeypatch)
    assert third == []


def test_cache_keeps_configurations_apart(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_run(make(), FASTV, tmp_path, monkeypatch)
    other = "agg_layer=1,attention_rank=2"
    computed, results = cached_run(make(settings=other), other, tmp_path, monkeypatch)
    assert sorted(computed) == list(range(len(ROWS)))
    assert texts(results) == texts(make(settings=other).generate_until(requests()))


def test_a_run_id_of_the_user_stays(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_CACHE_RUN_ID", "mine")
    make()
    assert os.environ["LMMS_CACHE_RUN_ID"] == "mine"


# -- whole evaluations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_lmms_parquet(folder, 0, 6)
    return folder


def evaluate(checkpoint: Path, name: str, settings: str, tasks: list[str], **more: Any) -> Any:
    args = ",".join(filter(None, [f"pretrained={checkpoint},device=cpu", settings]))
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name=name)
    return evaluator.simple_evaluate(
        model=name,
        model_args=args,
        tasks=tasks,
        batch_size=4,
        task_manager=manager,
        cli_args=Namespace(process_with_media=False, output_path=None),
        bootstrap_iters=0,
        **more,
    )


@pytest.fixture
def shapes(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("VLM_PRUNE_DEMO_DATA", str(data))
    monkeypatch.setattr(
        "lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(data / "hf")
    )


@pytest.mark.usefixtures("shapes")
def test_evaluation_reports_what_it_cost(checkpoint: Path) -> None:
    tasks = ["shapes_mcq", "shapes_yn", "shapes_mme", "shapes_vqa", "shapes_caption"]
    results = evaluate(checkpoint, "llava_fastv", FASTV, tasks)
    assert set(results["results"]) == set(tasks)
    for task in tasks:
        assert len(results["samples"][task]) == 6
    figures = results["throughput"]
    assert figures["avg_visual_tokens_before"] == 16
    assert figures["avg_visual_tokens_after"] == 4
    assert figures["avg_failed_samples"] == 0
    for name in ("time_to_first_token", "decode_tokens_per_second", "samples_per_second"):
        assert figures[f"avg_{name}"] > 0
    assert 0.2 < figures["avg_peak_memory_gib"] < 64
    counts = [s["token_counts"][0] for task in tasks for s in results["samples"][task]]
    assert figures["total_gen_tokens"] == sum(count["output_tokens"] for count in counts)
    overall = results["efficiency"]["overall"]
    assert overall["docs_with_token_counts"] == 30
    shape = DecoderShape.from_config(vp.load(checkpoint)[0].config)
    ratios = []
    for count in counts:
        whole = count["input_tokens"]
        lengths = [whole] + [whole - 12] * (shape.layers - 1)
        full = [whole] * shape.layers
        ratios.append(decoder_flops(shape, lengths) / decoder_flops(shape, full))
    assert min(ratios) < figures["avg_flops_ratio"] < max(ratios)


@pytest.mark.usefixtures("shapes")
def test_likelihood_task(checkpoint: Path) -> None:
    results = evaluate(checkpoint, "llava_fastv", FASTV, ["shapes_mcq_ppl"], force_simple=True)
    assert 0 <= results["results"]["shapes_mcq_ppl"]["acc,none"] <= 1
    for sample in results["samples"]["shapes_mcq_ppl"]:
        losses = [resp[0][0] for resp in sample["resps"]]
        right = losses.index(min(losses)) == "ABCD".index(sample["doc"]["answer"])
        assert sample["acc"] == float(right)
        assert len(set(losses)) == 4


@pytest.mark.usefixtures("shapes")
def test_saint_from_model_args_alone(checkpoint: Path) -> None:
    """ViT-only, LLM-only and hybrid differ in nothing but model_args."""
    vit = "vit_layers=[1],vit_keep_num=9,vit_r=4"
    llm = "start=1,end=3,threshold=0.2,min_neighbors=1"
    after = {}
    for name, settings in (("vit", f"start=None,{vit}"), ("llm", llm), ("both", f"{llm},{vit}")):
        results = evaluate(checkpoint, "llava_saint", settings, ["shapes_mme"])
        after[name] = results["throughput"]["avg_visual_tokens_after"]
        assert results["throughput"]["avg_visual_tokens_before"] == 16
    assert after["vit"] == 8
    assert after["llm"] < 16
    assert after["both"] < after["vit"]


@pytest.mark.usefixtures("shapes")
def test_baseline_answers_as_lmms_evals_own_llava_hf(checkpoint: Path, tmp_path: Path) -> None:
    """Sample by sample, on the Hugging Face conversion of the same checkpoint."""
    from vlm_prune_ext.models.convert import convert_to_hf

    converted = convert_to_hf(checkpoint, tmp_path / "converted")
    tasks = ["shapes_mcq", "shapes_vqa"]
    ours = evaluate(checkpoint, "llava_baseline", "", tasks)
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
    theirs = evaluator.simple_evaluate(
        model="llava_hf",
        model_args=f"pretrained={converted},device_map=cpu,dtype=float32",
        device="cpu",
        tasks=tasks,
        batch_size=1,
        force_simple=True,
        task_manager=manager,
        cli_args=Namespace(process_with_media=False, output_path=None),
        bootstrap_iters=0,
    )
    for task in tasks:
        mine = {s["doc_id"]: s["resps"][0][0].strip() for s in ours["samples"][task]}
        other = {s["doc_id"]: s["resps"][0][0].strip() for s in theirs["samples"][task]}
        assert mine == other
        assert len(set(mine.values())) > 1


@pytest.mark.usefixtures("shapes")
def test_same_answers_as_in_vlmevalkit(checkpoint: Path, tmp_path: Path, make: Make) -> None:
    """The same rows with the same prompts: multiple choice as VLMEvalKit's LLaVA words it."""
    pytest.importorskip("vlmeval")
    import pandas as pd

    from vlm_prune_ext.evals.vlmeval import LLaVAFastV

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setenv("LMUData", str(tmp_path))
        path = write_vlmeval_tsv(tmp_path, 0, 6)["mcq"]
        from vlmeval.dataset.image_mcq import CustomMCQDataset

        patched.setattr(
            CustomMCQDataset, "load_data", lambda self, name: pd.read_csv(path, sep="\t")
        )
        dataset = CustomMCQDataset("Shapes_Check")
        model = LLaVAFastV(str(checkpoint), agg_layer=1, attention_rank=4, max_new_tokens=8)
        model.set_dump_image(dataset.dump_image)
        theirs = []
        for _, line in dataset.data.iterrows():
            message = model.build_prompt(line, "Shapes_Check")
            theirs.append(model.generate(message, dataset="Shapes_Check"))
    ours = evaluate(checkpoint, "llava_fastv", f"{FASTV},conv_template=vlmeval", ["shapes_mcq"])[
        "samples"
    ]["shapes_mcq"]
    assert [sample["resps"][0][0].strip() for sample in ours] == [text.strip() for text in theirs]


# -- several processes -----------------------------------------------------------------------------


def test_sums_of_processes_add_up() -> None:
    one = Sums(samples=4, seconds=2.0, new_tokens=10, timed=4, first_token=2.0, seeing=4, before=64)
    one.after, one.peak, one.joules = 16, 2**30, 8.0
    one.flops = PromptFlops(1.0, 4.0, visual=1.0, visual_baseline=8.0)
    one.fast = 3
    two = Sums(samples=2, failed=1, seconds=4.0, timed=2, first_token=4.0, decode=2.0, decoded=6)
    two.peak = 2**31
    total, longest = _added([one, two])
    assert longest == 4.0
    figures = _metrics(total, longest, 2)
    assert figures == pytest.approx(
        {
            "time_to_first_token": 1.0,
            "decode_tokens_per_second": 3.0,
            "samples_per_second": 1.5,
            "visual_tokens_before": 16.0,
            "visual_tokens_after": 4.0,
            "flops_ratio": 0.25,
            "flops_ratio_visual": 0.125,
            "fast_path": 0.5,
            "peak_memory_gib": 2.0,
            "joules_per_sample": 8 / 6,
            "failed_samples": 1,
            "samples_without_image": 0,
            "processes": 2,
        }
    )
    quiet, seconds = _added([Sums(), Sums()])
    assert "joules_per_sample" not in _metrics(quiet, seconds, 2)


def test_clean_lets_go_of_the_model(make: Make) -> None:
    import gc
    import weakref

    model = make()
    list(model.generate_until(requests([0])))
    watched = weakref.ref(model.model)
    model.clean()
    gc.collect()
    assert watched() is None
    with pytest.raises(RuntimeError, match="released"):
        _ = model.model
    model.clean()


# -- other suites ----------------------------------------------------------------------------------


def test_pruning_inside_a_transformers_pipeline(tmp_path: Path) -> None:
    """A model that somebody else has loaded and calls: the README's example."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(makers.tiny_hf_llava(tmp_path / "hf")))
    image = {"type": "image", "image": makers.photo(60, 60)}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": makers.QUESTIONS[0]}]}]
    whole = pipe(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    with vp.prune(pipe.model, vp.FastV(agg_layer=2, attention_rank=4)) as trace:
        pipe(text=chat, max_new_tokens=6, return_full_text=False)
    assert trace.visual_tokens == {0: [16], 2: [4]}
    with vp.prune(pipe.model, vp.FastV(agg_layer=2, attention_rank=1.0)):
        same = pipe(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    assert same == whole
    assert pipe(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"] == whole


# -- other families --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "internvl"])
def test_other_families_through_the_same_model(family: str, tmp_path: Path) -> None:
    """``vlm_prune`` takes any supported family: batched = single, chat = simple."""
    getattr(family_makers, family)(tmp_path / family)
    args = f"pretrained={tmp_path / family},method=fastv,agg_layer=1,attention_rank=4,device=cpu"
    answers = []
    for name in ("VlmPruneChat", "VlmPruneSimple"):
        model = getattr(models, name).create_from_arg_string(args, {"batch_size": 4})
        model.task_dict = {"t": {"test": ROWS}}
        for size in (4, 1):
            model.batch_size_per_gpu = size
            answers.append(texts(model.generate_until(requests(simple=model.is_simple))))
        figures = model._tally.report(0, 1)
        assert figures["visual_tokens_after"] < figures["visual_tokens_before"]
        assert figures["failed_samples"] == 0
    assert all(other == answers[0] for other in answers[1:])
    assert len(set(answers[0])) > 2
