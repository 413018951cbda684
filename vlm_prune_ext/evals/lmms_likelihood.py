"""Losses of continuations, as lmms-eval's multiple-choice tasks ask for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.likelihood import Row, RowScore, continuation_ids, score_rows
from vlm_prune_ext.evals.lmms_requests import Prompt, Reader, or_fault
from vlm_prune_ext.evals.lmms_tally import Tally


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
        """Scores, or in their place what is wrong with a row."""
        one = self._answerer
        try:
            return list(score_rows(one.model, one.processor, one.method, rows))
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
