"""Losses of continuations, as lmms-eval's multiple-choice tasks ask for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.lmms_requests import Prompt, Reader, or_fault
from vlm_prune_ext.evals.lmms_tally import Tally
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.pruning import prune

IMAGE = "<image>"


@dataclass(frozen=True)
class Row:
    """One line of a batch: a prompt, tokens it is continued with, and what may come after them.

    Attributes:
        prompt: whole text of the prompt, with one ``<image>`` per image.
        images: its images.
        path: token ids that are fed.
        last: token ids whose likelihood as the next one is asked for.
    """

    prompt: str
    images: Sequence[Any]
    path: tuple[int, ...]
    last: tuple[int, ...]


@dataclass(frozen=True)
class RowScore:
    """Log-probabilities (natural, of the unscaled softmax) along one :class:`Row`.

    Attributes:
        path: one for each token of the path.
        path_greedy: for each, whether it was the most likely one.
        last: one for each of the last tokens.
        best: the most likely last token.
        prompt_tokens: length of the prompt, visual tokens included.
    """

    path: tuple[float, ...]
    path_greedy: tuple[bool, ...]
    last: tuple[float, ...]
    best: int
    prompt_tokens: int

    def mean_loss(self, choice: int) -> float:
        """Mean negative log-probability per token of path and ``last[choice]``."""
        values = [*self.path, self.last[choice]]
        return -sum(values) / len(values)


def continuation_ids(tokenizer: Any, prompt: str, continuation: str) -> tuple[int, ...]:
    """Token ids of a continuation as the tokenizer splits it behind the prompt's last words.

    A blank is put between the two where neither has one.
    """
    tail = prompt.rsplit(IMAGE, 1)[-1]
    if not tail[-1:].isspace() and not continuation[:1].isspace():
        continuation = " " + continuation
    before = list(tokenizer(tail).input_ids)
    whole = list(tokenizer(tail + continuation).input_ids)
    if whole[: len(before)] == before and len(whole) > len(before):
        return tuple(whole[len(before) :])
    return tuple(tokenizer(continuation, add_special_tokens=False).input_ids)


class _Steer(LogitsProcessor):
    """Makes ``generate`` follow each row's path, and notes what the model thought of it."""

    def __init__(self, rows: Sequence[Row], stop: int) -> None:
        self.rows, self.stop, self.step = rows, stop, 0
        self.path: list[list[float]] = [[] for _ in rows]
        self.greedy: list[list[bool]] = [[] for _ in rows]
        self.last: list[tuple[float, ...]] = [()] * len(rows)
        self.best = [0] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` ``(batch, vocabulary)`` -> the same with everything but the path forbidden."""
        logs = scores.float().log_softmax(dim=-1)
        best = logs.argmax(dim=-1).tolist()
        forced = torch.full_like(scores, float("-inf"))
        for place, row in enumerate(self.rows):
            token = self.stop
            if self.step < len(row.path):
                token = row.path[self.step]
                self.path[place].append(float(logs[place, token]))
                self.greedy[place].append(best[place] == token)
            elif self.step == len(row.path):
                self.last[place] = tuple(logs[place, list(row.last)].tolist())
                self.best[place] = best[place]
            forced[place, token] = 0.0
        self.step += 1
        return forced


@torch.inference_mode()
def score_rows(
    model: Any, processor: Any, method: Method | None, rows: Sequence[Row], video: str = "frame"
) -> list[RowScore]:
    """Score one batch, which gives the same as single rows.

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        method: what prunes; ``None`` is the baseline.
        rows: the batch.
        video: what a budget is of, see :func:`vlm_prune_ext.prune`.

    Raises:
        InputError: a prompt or span that is not accepted.
        torch.OutOfMemoryError: the batch does not fit.
    """
    inputs = processor.batch(
        [row.prompt for row in rows], [list(row.images) for row in rows], style="plain"
    )
    stop = _stop_id(model, processor)
    steer = _Steer(rows, stop)
    with prune(model, method, video=video):
        model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # what a checkpoint's own settings would do to the scores
            no_repeat_ngram_size=0,
            max_new_tokens=max(len(row.path) for row in rows) + 1,
            eos_token_id=stop,
            pad_token_id=stop,
            logits_processor=LogitsProcessorList([steer]),
        )
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [
        RowScore(
            tuple(steer.path[place]),
            tuple(steer.greedy[place]),
            steer.last[place],
            steer.best[place],
            lengths[place],
        )
        for place in range(len(rows))
    ]


def _stop_id(model: Any, processor: Any) -> int:
    stop = model.generation_config.eos_token_id
    stop = stop[0] if isinstance(stop, list) else stop
    return int(stop if stop is not None else processor.tokenizer.eos_token_id)


# -- losses ----------------------------------------------------------------------------------------
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


class Scorer:
    """Scores requests for likelihoods.

    Args:
        answerer: the model and what prunes it.
        reader: of requests.
        tally: takes what it costs.
        batch_size: questions per batch.
    """

    def __init__(self, answerer: Answerer, reader: Reader, tally: Tally, batch_size: int) -> None:
        self._answerer, self._reader, self._tally = answerer, reader, tally
        self._batch_size = batch_size

    def scores(
        self, requests: Sequence[Instance], places: Sequence[int]
    ) -> Iterator[tuple[int, Likelihood]]:
        """Of the requests at some places, with these."""
        # Options of one question share a prefill, so batches are counted in questions.
        several = self._batch_size * 8
        for start in range(0, len(places), several):
            some = places[start : start + several]
            yield from zip(some, self._score([requests[n] for n in some]), strict=True)

    def _score(self, requests: list[Instance]) -> list[Likelihood]:
        """Continuations with the same prompt and the same tokens but the last are one row."""
        prompts: dict[Any, Prompt] = {}
        rows: dict[Any, dict[int, int]] = {}
        wanted: list[tuple[Any, int] | None] = []
        tokenizer = self._answerer.processor.tokenizer
        for request in requests:
            source, make, continuation = self._reader.likelihood(request)
            name = (source, request.args[0])
            if name not in prompts:
                prompts[name] = or_fault(make)
            prompt = prompts[name]
            ids = continuation_ids(tokenizer, prompt.text, continuation)
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
        for first in range(0, len(keys), self._batch_size):
            part = keys[first : first + self._batch_size]
            start = time.perf_counter()
            made = self._score_some([rows[key] for key in part])
            count = sum(isinstance(one, RowScore) for one in made)
            self._tally.add(time.perf_counter() - start, samples=count)
            scored.update(zip(part, made, strict=True))
        return scored

    def _score_some(self, rows: list[Row]) -> list[RowScore | str]:
        """Scores, or in their place what is wrong with a row: a batch that is not accepted, or
        does not fit into memory, is halved."""
        one = self._answerer
        try:
            return list(score_rows(one.model, one.processor, one.method, rows, one.video))
        except (InputError, torch.OutOfMemoryError) as error:
            fault = str(error)
        if len(rows) == 1:
            return [fault]
        if torch.cuda.is_available():  # outside of `except`, which still holds the tensors
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return [*self._score_some(rows[:half]), *self._score_some(rows[half:])]

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
