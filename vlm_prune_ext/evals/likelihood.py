"""How likely given continuations of a prompt are, on a pruned model.

The prompt is prefilled as for generation, so tokens are dropped by what the end of the *prompt*
attends to and not by what stands in the continuation; then the continuation is fed token by token
through the same decode steps that generation takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

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


def score_rows(
    model: Any, processor: Any, method: Method | None, rows: Sequence[Row]
) -> list[RowScore]:
    """Score one batch, or its halves where it does not fit into memory. A batch gives the same as
    single rows.

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        method: what prunes; ``None`` is the baseline.
        rows: the batch.

    Raises:
        InputError: a prompt or span that is not accepted.
        torch.OutOfMemoryError: a single row does not fit.
    """
    try:
        return _score_batch(model, processor, method, rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(rows) // 2
    return [
        score
        for part in (rows[:half], rows[half:])
        for score in score_rows(model, processor, method, part)
    ]


@torch.inference_mode()
def _score_batch(
    model: Any, processor: Any, method: Method | None, rows: Sequence[Row]
) -> list[RowScore]:
    inputs = processor.batch(
        [row.prompt for row in rows], [list(row.images) for row in rows], style="plain"
    )
    stop = _stop_id(model, processor)
    steer = _Steer(rows, stop)
    with prune(model, method):
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
