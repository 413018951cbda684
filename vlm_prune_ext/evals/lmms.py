"""Models for lmms-eval: every pruning method, chat and simple interface, true batches.

``accelerate launch -m lmms_eval --model llava_fastv --model_args attention_rank=100 --tasks ...``

The classes are found through the entry point group ``lmms_eval.models`` (see ``lmms_plugin``).
All settings come from ``model_args``; nothing is read from the environment, so that lmms-eval's
response cache, which keys on ``model_args``, never serves answers of another configuration.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer, Answerer, Query
from vlm_prune_ext.evals.decoding import Decoding, decoding_of
from vlm_prune_ext.evals.lazy import LazyAnswers
from vlm_prune_ext.evals.likelihood import Row, RowScore, continuation_ids, score_rows
from vlm_prune_ext.evals.lmms_args import method_of, value_of
from vlm_prune_ext.evals.lmms_plugin import class_name, models
from vlm_prune_ext.evals.lmms_requests import (
    Prompt,
    Source,
    chat_prompt,
    fetch,
    or_fault,
    simple_prompt,
)
from vlm_prune_ext.evals.lmms_rounds import Follow, Step, Talk
from vlm_prune_ext.evals.lmms_tally import Tally
from vlm_prune_ext.evals.precheck import check_fit
from vlm_prune_ext.models import load
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.pruning import prune

AUTO_BATCH = 64
"""Where ``--batch_size auto`` starts; out of memory halves it."""


class Likelihood(tuple[float, bool], GenerationResult):
    """``(loss, greedy)`` of one continuation.

    A pair, as lmms-eval asks for, that is a ``GenerationResult`` as well: its evaluator turns any
    other pair into text (0.7.3), and its own multiple-choice tasks cannot read that.
    """

    token_counts = None

    def __init__(self, pair: tuple[float, bool]) -> None:
        """The tuple is complete already; a ``GenerationResult`` would set its ``text`` here."""

    @property
    def text(self) -> Any:  # type: ignore[override]
        """What the evaluator hands to the task."""
        return self

    def strip(self) -> str:
        """Nothing, which keeps it out of the response cache: pairs do not come back from there as
        pairs."""
        return ""


@dataclass(frozen=True)
class _Task:
    """One request: where it comes from, how its prompt is made, how it is answered."""

    source: Source
    prompt: Callable[[], Prompt]
    decoding: Decoding


class PruneModel(lmms):
    """What all models share; the chat interface. See :func:`lmms_plugin.models`.

    Args:
        pretrained: checkpoint, folder or ``owner/name``; the demo checkpoint where it is missing.
        batch_size: samples per batch, or ``auto``: as many as fit, from 64 (or
            ``max_batch_size``) downwards.
        max_batch_size: see ``batch_size``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; with several processes each takes its own.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``; missing: float32 on a CPU,
            elsewhere what the checkpoint states.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``.
        fast: CUDA graphs with fixed shapes, see :func:`vlm_prune_ext.load`.
        trust_remote_code: ``true`` for formats that come with code of their own.
        min_pixels, max_pixels: pixels of an image, of families that take it as large as it is.
        conv_template: conversation template (``vicuna_v1``, ``vlmeval``, ...); missing: the
            family's own.
        device_map: ``auto`` spreads one model over all GPUs of a single process.
        revision: branch, tag or commit of a checkpoint on the hub.
        **given: parameters of the method, under their own or their ``model.config`` names.

    Raises:
        InputError: an argument that is not known or not accepted, or a method that does not fit
            the model.
    """

    is_simple = False
    MODEL: ClassVar[str] = "vlm_prune"

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        conv_template: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        fast: bool | None = None,
        trust_remote_code: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        method = method_of(self.MODEL, given)
        self.batch_size_per_gpu = _batch_size(batch_size, max_batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._style = value_of(conv_template)
        checkpoint = value_of(pretrained) or CHECKPOINT
        check_fit(Checkpoint(checkpoint, revision=value_of(revision)), method)
        model, processor = load(
            checkpoint,
            dtype=value_of(dtype),
            device=_device(device, self.accelerator),
            attn_implementation=value_of(attn_implementation),
            fast=_flag("fast", fast),
            trust_remote_code=bool(_flag("trust_remote_code", trust_remote_code)),
            min_pixels=value_of(min_pixels),
            max_pixels=value_of(max_pixels),
            **self._extra(device_map, revision),
        )
        self._device = processor.device
        processor.messages([{"role": "user", "content": "?"}], style=self._style)  # a known style?
        with prune(model, method):  # does the method fit the model?
            pass
        self._answerer: Answerer | None = Answerer(model, processor, method)
        self._tally = Tally(model, self._device)
        if self._rank == 0:
            label = method.label() if method is not None else "baseline"
            logger.info(
                f"{label}: lmms-eval names its output folder after the checkpoint alone, so give "
                f"each configuration an --output_path of its own (run_lmms.sh does)"
            )
        _keep_cache_across_runs(self.MODEL, [pretrained, dtype, conv_template, *given.items()])

    def _extra(self, device_map: str | None, revision: str | None) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that are there."""
        given = {"device_map": value_of(device_map), "revision": value_of(revision)}
        if given["device_map"] is not None and self._world_size > 1:
            raise InputError(
                f"device_map={device_map!r} needs a single process: start it with num_processes=1."
            )
        return {name: value for name, value in given.items() if value is not None}

    # -- what lmms-eval and its users look at ------------------------------------------------------
    @property
    def answerer(self) -> Answerer:
        """Model, processor and method; gone after :meth:`clean`."""
        if self._answerer is None:
            raise RuntimeError("The model was released after its evaluation: make a new one.")
        return self._answerer

    @property
    def model(self) -> Any:
        """The vision-language model."""
        return self.answerer.model

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.answerer.processor.tokenizer

    @property
    def batch_size(self) -> int:
        """Samples per batch and process."""
        return self.batch_size_per_gpu

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    # -- generation --------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance]) -> Sequence[GenerationResult]:  # type: ignore[override]
        """Answers in the order of the requests, made in batches when they are asked for."""
        tasks = [self._task(request) for request in requests]
        bar = self._bar(len(requests), "Answering")

        def compute(places: list[int]) -> list[GenerationResult]:
            results = self._answer([tasks[place] for place in places])
            bar.update(len(places))
            return results

        return LazyAnswers(
            [task.decoding for task in tasks],
            self.batch_size,
            compute,
            _padding_twins(requests),
            bar.close,
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:  # type: ignore[override]
        """Answers of several rounds per sample, as many as the task asks for; rounds of different
        samples share batches."""
        talks = [self._talk(request) for request in requests]
        bar = self._bar(len(talks), "Answering in rounds")
        open_talks = talks
        while open_talks:
            tasks = [_Task(talk.source, talk.prompt, talk.decoding) for talk in open_talks]
            keys = [task.decoding for task in tasks]
            answers = LazyAnswers(keys, self.batch_size, partial(self._answer_at, tasks))
            for talk, answer in zip(open_talks, answers, strict=True):
                talk.advance(answer.text)
            left = [talk for talk in open_talks if not talk.over]
            bar.update(len(open_talks) - len(left))
            open_talks = left
        bar.close()
        return [talk.answers for talk in talks]

    def _answer_at(self, tasks: list[_Task], places: list[int]) -> list[GenerationResult]:
        return self._answer([tasks[place] for place in places])

    def _answer(self, tasks: list[_Task]) -> list[GenerationResult]:
        """One batch. A sample that cannot be answered is reported and gets an empty answer."""
        with self._tally.batch() as measured:
            prompts = [or_fault(task.prompt) for task in tasks]
            queries = {
                place: _query(prompt, task.decoding)
                for place, (prompt, task) in enumerate(zip(prompts, tasks, strict=True))
                if not prompt.fault
            }
            outcome = dict(zip(queries, self._run(list(queries.values())), strict=True))
            measured.take([one for one in outcome.values() if isinstance(one, Answer)])
        results = []
        for place, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            one = outcome.get(place, prompt.fault)
            results.append(self._result(task.source, prompt, one))
        return results

    def _run(self, queries: list[Query]) -> list[Answer | str]:
        """Answers, or in their place what is wrong with a query."""
        if not queries:
            return []
        try:
            return list(self.answerer.answer(queries))
        except (InputError, torch.OutOfMemoryError) as error:
            fault = str(error)
        if len(queries) == 1:
            return [fault]
        return [one for query in queries for one in self._run([query])]

    def _result(self, source: Source, prompt: Prompt, outcome: Answer | str) -> GenerationResult:
        if isinstance(outcome, str):
            self._tally.fault(source, outcome)
            return GenerationResult(text="")
        if not prompt.images:
            self._tally.without_image(source)
        counts = TokenCounts(input_tokens=outcome.prompt_tokens, output_tokens=outcome.new_tokens)
        return GenerationResult(text=outcome.text, token_counts=counts)

    # -- likelihood --------------------------------------------------------------------------------
    def loglikelihood(self, requests: list[Instance]) -> Sequence[Likelihood]:  # type: ignore[override]
        """``(loss, greedy)`` of each continuation: its mean negative log-probability per token, and
        whether it is what greedy decoding would say.

        A loss rather than a log-probability, as lmms-eval's own models return it and its
        multiple-choice tasks (which take the smallest) expect it. Tokens are dropped by the prompt
        alone, as in generation.
        """
        bar = self._bar(len(requests), "Scoring")

        def compute(places: list[int]) -> list[Likelihood]:
            scores = self._score([requests[place] for place in places])
            bar.update(len(places))
            return scores

        # Options of one question share a prefill, so batches are counted in questions there.
        several = self.batch_size * 8
        return LazyAnswers(
            [None] * len(requests), several, compute, _padding_twins(requests), bar.close
        )

    def _score(self, requests: list[Instance]) -> list[Likelihood]:
        """Continuations with the same prompt and the same tokens but the last are one row."""
        prompts: dict[Any, Prompt] = {}
        rows: dict[Any, dict[int, int]] = {}
        wanted: list[tuple[Any, int] | None] = []
        for request in requests:
            source, make, continuation = self._likelihood_request(request)
            name = (source, request.args[0])
            if name not in prompts:
                prompts[name] = or_fault(make)
            prompt = prompts[name]
            ids = continuation_ids(self.tokenizer, prompt.text, continuation)
            if prompt.fault or not ids:
                self._tally.fault(source, prompt.fault or "the continuation is empty")
                wanted.append(None)
                continue
            lasts = rows.setdefault((name, ids[:-1]), {})
            lasts.setdefault(ids[-1], len(lasts))
            wanted.append(((name, ids[:-1]), ids[-1]))
        scored = self._score_rows(
            {
                key: Row(prompts[key[0]].text, prompts[key[0]].images, key[1], tuple(lasts))
                for key, lasts in rows.items()
            }
        )
        return [self._likelihood(one, rows, scored) for one in wanted]

    def _score_rows(self, rows: dict[Any, Row]) -> dict[Any, RowScore | str]:
        keys = list(rows)
        scored: dict[Any, RowScore | str] = {}
        for first in range(0, len(keys), self.batch_size):
            part = keys[first : first + self.batch_size]
            with self._tally.batch() as measured:
                made = self._score_some([rows[key] for key in part])
                measured.count(sum(isinstance(one, RowScore) for one in made))
            scored.update(zip(part, made, strict=True))
        return scored

    def _score_some(self, rows: list[Row]) -> list[RowScore | str]:
        """Scores, or in their place what is wrong with a row."""
        answerer = self.answerer
        try:
            return list(score_rows(answerer.model, answerer.processor, answerer.method, rows))
        except (InputError, torch.OutOfMemoryError) as error:
            fault = str(error)
        if len(rows) == 1:
            return [fault]
        return [one for row in rows for one in self._score_some([row])]

    def _likelihood(
        self,
        one: tuple[Any, int] | None,
        rows: dict[Any, dict[int, int]],
        scored: dict[Any, RowScore | str],
    ) -> Likelihood:
        """The outcome of one request; one without a score is the least likely there can be."""
        if one is None:
            return Likelihood((math.inf, False))
        key, last = one
        score = scored[key]
        if isinstance(score, str):
            (source, _), _ = key
            self._tally.fault(source, score)
            return Likelihood((math.inf, False))
        greedy = all(score.path_greedy) and score.best == last
        return Likelihood((score.mean_loss(rows[key][last]), greedy))

    # -- what a request says -----------------------------------------------------------------------
    def _task(self, request: Instance) -> _Task:
        if self.is_simple:
            text, given, to_visual, doc, task, split = request.args
            source = Source(task, split, doc)
            return _Task(source, self._simple(source, text, to_visual), decoding_of(given))
        _, to_messages, given, doc, task, split = request.args
        source = Source(task, split, doc)
        return _Task(source, self._chat(source, to_messages), decoding_of(given))

    def _simple(
        self, source: Source, text: Any, to_visual: Callable[[Any], Any] | None
    ) -> Callable[[], Prompt]:
        def make() -> Prompt:
            row = fetch(self.task_dict, source)
            visuals = to_visual(row) if to_visual is not None else None
            return simple_prompt(text, visuals, self.answerer.processor, self._style)

        return make

    def _chat(self, source: Source, to_messages: Callable[[Any], Any]) -> Callable[[], Prompt]:
        def make() -> Prompt:
            messages = to_messages(fetch(self.task_dict, source))
            return chat_prompt(messages, self.answerer.processor, self._style)

        return make

    def _likelihood_request(self, request: Instance) -> tuple[Source, Callable[[], Prompt], str]:
        if len(request.args) == 2:  # likelihood of a continuation without its question
            text, continuation = request.args
            source = Source(request.task_name, "", request.doc_id)
            return source, lambda: self._bare(text), continuation
        text, target, to_visual, doc, task, split = request.args
        source = Source(task, split, doc)
        if not isinstance(target, str):
            target = str(target(fetch(self.task_dict, source)))
        return source, self._simple(source, text, to_visual), target

    def _bare(self, text: str) -> Prompt:
        chat = [{"role": "user", "content": text}]
        prompt, _ = self.answerer.processor.messages(chat, style=self._style)
        return Prompt(prompt)

    def _talk(self, request: Instance) -> Talk:
        if self.is_simple:
            text, given, to_visual, to_text, doc, task, split = request.args
            source = Source(task, split, doc)
            first = self._simple(source, text, to_visual)
            follow = self._simple_follow(source, to_text)
        else:
            _, to_messages, given, doc, task, split = request.args
            source = Source(task, split, doc)
            first = self._chat(source, to_messages)
            follow = self._chat_follow(source, to_messages)
        return Talk(source, decoding_of(given), first, follow)

    def _simple_follow(self, source: Source, to_text: Callable[..., Any]) -> Follow:
        def follow(number: int, answers: list[str], info: Any) -> Step:
            row = fetch(self.task_dict, source)
            said = to_text(row, previous_output=answers, round_idx=number, previous_round_info=info)
            if not (isinstance(said, tuple) and len(said) == 5):
                return Step(None)
            visuals, text, terminal, answers, info = said
            if terminal:
                return Step(None, answers, info)
            make = self._simple(source, text, lambda _: visuals)
            return Step(make, answers, info)

        return follow

    def _chat_follow(self, source: Source, to_messages: Callable[..., Any]) -> Follow:
        def follow(number: int, answers: list[str], info: Any) -> Step:
            row = fetch(self.task_dict, source)
            said = to_messages(
                row, round_idx=number, previous_output=answers, previous_round_info=info
            )
            if not (isinstance(said, tuple) and len(said) == 4):
                return Step(None)
            messages, terminal, _, info = said
            if terminal:
                return Step(None, None, info)
            return Step(self._chat(source, lambda _: messages), None, info)

        return follow

    # -- the end of an evaluation ------------------------------------------------------------------
    def clean(self) -> None:
        """Report what was measured, over all processes, and let go of the model.

        lmms-eval calls this on every process once all requests are answered, whether a process had
        requests of its own or found them all in the cache: the one place where they can meet.
        """
        if self._answerer is not None:
            self._tally.report(self._rank, self._world_size)
            self._answerer = None
        super().clean()

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, disable=self.rank != 0, desc=what)


def _batch_size(given: int | str, most: int | None) -> int:
    """Samples per batch.

    Raises:
        InputError: not a number of at least 1, ``auto`` or ``auto:N``.
    """
    if isinstance(given, str) and given.partition(":")[0] == "auto":
        return int(most or AUTO_BATCH)
    try:
        size = int(given)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise InputError(f"batch_size={given!r} is not valid: an integer of at least 1, or auto.")
    return size


def _flag(name: str, given: Any) -> bool | None:
    value = value_of(given)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}={given!r} is not valid: true or false.")
    return value


def _device(given: str | None, accelerator: Accelerator) -> torch.device | str:
    """The device of this process; a stated one counts unless several processes would share it."""
    given = value_of(given)
    if given is None or (accelerator.num_processes > 1 and str(given) != "cpu"):
        return accelerator.device
    return str(given)


def _padding_twins(requests: Sequence[Instance]) -> dict[int, int]:
    """Requests that only even out the processes -> the real request that they repeat."""
    real = {
        id(request.arguments): place
        for place, request in enumerate(requests)
        if not _is_padding(request)
    }
    return {
        place: real[id(request.arguments)]
        for place, request in enumerate(requests)
        if _is_padding(request) and id(request.arguments) in real
    }


def _is_padding(request: Instance) -> bool:
    return bool((request.metadata or {}).get("__padding_only__"))


def _keep_cache_across_runs(model: str, settings: Sequence[Any]) -> None:
    """Let lmms-eval's response cache find what an interrupted run of the same configuration wrote.

    By default it names each run's folder at random and looks at finished runs only, so that the
    answers of an interrupted one are lost. A name that the user or a scheduler gave is left alone.
    """
    name = hashlib.sha256(repr((model, settings)).encode()).hexdigest()[:16]
    os.environ.setdefault("LMMS_CACHE_RUN_ID", f"{model}-{name}")


def _query(prompt: Prompt, decoding: Decoding) -> Query:
    return Query(
        prompt.text,
        prompt.images,
        style="plain",
        max_new_tokens=decoding.max_new_tokens,
        until=decoding.until,
        options=dict(decoding.options),
    )


def __getattr__(name: str) -> type[PruneModel]:
    """A chat and a simple class for each of :func:`lmms_plugin.models`, made when asked for."""
    for model, method in models().items():
        for simple in (False, True):
            if name == class_name(model, simple=simple):
                about = f"{model}: {method or 'the method that model_args name'}."
                body = {"MODEL": model, "is_simple": simple, "__doc__": about}
                made = type(name, (PruneModel,), {**body, "__module__": __name__})
                globals()[name] = made
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
