"""How answers are decoded: what a task may ask for, and what it means on prompts with images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from vlm_prune_ext.errors import InputError, unknown_name

logger = logging.getLogger("vlm_prune_ext")

DEFAULT_NEW_TOKENS = 1024
"""As lmms-eval's own models take it where a task states none."""


@dataclass(frozen=True)
class Decoding:
    """How to generate. Requests with equal settings may share a batch.

    Attributes:
        max_new_tokens: new tokens at most.
        until: texts that end an answer (and are not part of it).
        options: what else ``generate`` is given (names in :data:`OPTIONS`), as sorted pairs;
            empty is greedy.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    until: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class _Number:
    """What an option accepts: its kind, its range, and the value that changes nothing."""

    kind: type
    fits: Callable[[float], bool]
    accepted: str
    neutral: float | None = None


_SAMPLING = {
    "temperature": _Number(float, lambda x: x > 0, "a number above 0"),
    "top_p": _Number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "top_k": _Number(int, lambda x: x >= 0, "an integer of at least 0"),
}
_SEARCH = {
    "num_beams": _Number(int, lambda x: x >= 1, "an integer of at least 1", 1),
    "repetition_penalty": _Number(float, lambda x: x > 0, "a number above 0", 1.0),
    "length_penalty": _Number(float, lambda x: True, "a number", 1.0),
    "min_new_tokens": _Number(int, lambda x: x >= 0, "an integer of at least 0", 0),
}
OPTIONS = (*_SAMPLING, *_SEARCH)
"""What a task may change about decoding beside the limit and the texts that end an answer."""

_ALIASES = {"max_gen_toks": "max_new_tokens", "stop_sequences": "until"}
_FOR_OTHERS = ("image_aspect_ratio",)
_ACCEPTED = ("max_new_tokens", "until", "do_sample", *OPTIONS, *_ALIASES, *_FOR_OTHERS)


def decoding_of(given: Mapping[str, Any]) -> Decoding:
    """A task's ``generation_kwargs`` (never changed here: lmms-eval's cache keys on them).

    As in lmms-eval's own models, a temperature above 0 means sampling, whatever ``do_sample``
    says, and 0 means none; without sampling its settings have no effect. ``image_aspect_ratio``
    stays the checkpoint's own, as in lmms-eval's LLaVA, which is said once.

    Raises:
        InputError: an option that is not honoured here, or a value that is not accepted.
    """
    named: dict[str, Any] = {}
    for key, value in given.items():
        name = _ALIASES.get(key, key)
        if value is not None and named.setdefault(name, value) != value:
            raise InputError(
                f"{key}={value!r} contradicts {name}={named[name]!r} as a generation option: they "
                "are one setting."
            )
    seed = named.pop("seed", None)
    for key in named:
        if key not in _ACCEPTED:
            raise unknown_name("generation option", key, _ACCEPTED)
    if "image_aspect_ratio" in named:
        _say_aspect(str(named["image_aspect_ratio"]))
    options = _options(named)
    if seed is not None and options.get("do_sample"):
        raise InputError(
            f"seed={seed!r} is not valid as a generation option: lmms-eval's --seed sets it."
        )
    count = _checked("max_new_tokens", named.get("max_new_tokens", DEFAULT_NEW_TOKENS), _LIMIT)
    if options.get("min_new_tokens", 0) > count:
        raise InputError(
            f"min_new_tokens={options['min_new_tokens']} is not valid: at most "
            f"max_new_tokens={count}."
        )
    return Decoding(int(count), _until(named.get("until")), tuple(sorted(options.items())))


_LIMIT = _Number(int, lambda x: x >= 1, "an integer of at least 1")


def _until(given: Any) -> tuple[str, ...]:
    until = (given,) if isinstance(given, str) else given or ()
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise InputError(f"until={given!r} is not valid: a text or a list of texts.")
    return tuple(stop for stop in until if stop)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from greedy decoding."""
    options: dict[str, Any] = {}
    temperature = given.get("temperature")
    if temperature is not None:
        temperature = _checked("temperature", temperature, _SAMPLED)
    sample = given.get("do_sample", False)
    if not isinstance(sample, bool):
        raise InputError(f"do_sample={sample!r} is not valid: true or false.")
    if sample if temperature is None else temperature > 0:
        options["do_sample"] = True
        options |= {n: _checked(n, given[n], what) for n, what in _SAMPLING.items() if n in given}
    for name, what in _SEARCH.items():
        value = _checked(name, given.get(name, what.neutral), what)
        if value != what.neutral:
            options[name] = value
    return options


_SAMPLED = _Number(float, lambda x: x >= 0, "a number of at least 0")


def _checked(name: str, value: Any, what: _Number) -> Any:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if right and what.kind is int:
        right = float(value).is_integer()
    if not right or value != value or not what.fits(value):
        raise InputError(f"{name}={value!r} is not valid: {what.accepted}.")
    return what.kind(value)


@functools.cache
def _say_aspect(value: str) -> None:
    logger.warning(
        "image_aspect_ratio=%r of a task is not taken: pictures stay prepared as the checkpoint "
        "says, as with lmms-eval's own LLaVA.",
        value,
    )


class RepetitionPenalty(LogitsProcessor):
    """Scores of tokens that the prompt or the answer holds, made less likely.

    After CTRL (https://arxiv.org/abs/1909.05858, section 4.1) and with the meaning that
    transformers gives it: positive scores are divided by the penalty, negative ones multiplied.
    Deviation: image placeholders and padding are no text, so they are left out. The first may lie
    behind the vocabulary, the second would make a batch answer differently from single prompts.

    Args:
        penalty: above 0; 1 changes nothing.
        attention_mask: of the prompts, ``(batch, seq)``.
        image_token_id: the placeholder.
    """

    def __init__(self, penalty: float, attention_mask: torch.Tensor, image_token_id: int) -> None:
        self.penalty, self.image_token_id = penalty, image_token_id
        self.real, self.new = attention_mask.bool(), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``input_ids`` ``(batch * beams, seq)`` so far, ``scores`` ``(batch * beams, vocabulary)``
        -> the changed scores."""
        text = (input_ids != self.image_token_id) & (input_ids < scores.shape[1])
        prompt = input_ids.shape[1] - self.new
        if prompt:  # where a model is fed embeddings, only new tokens are seen
            copies = input_ids.shape[0] // self.real.shape[0]
            text[:, :prompt] &= self.real.repeat_interleave(copies, dim=0)
        self.new += 1
        rows, columns = text.nonzero(as_tuple=True)
        said = torch.zeros_like(scores, dtype=torch.bool)
        said[rows, input_ids[rows, columns]] = True
        changed = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(said, changed, scores)
