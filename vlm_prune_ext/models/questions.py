"""What was asked in a prompt: remembered by the processor that made it, found by its token ids.

A model is called with token ids only, and a template stands around the question. So the processor
keeps the text that it was given beside the ids that it made of it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

_ROOM = 4096  # prompts, the newest


class Asks(Protocol):
    """Knows the questions of prompts."""

    def questions(self, input_ids: torch.Tensor) -> list[str]:
        """``(batch, seq)`` -> the question of each sample."""


_ASKS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Asks]] = weakref.WeakKeyDictionary()


def answers_for(model: nn.Module, processor: Asks) -> None:
    """From now on a model's questions are asked of ``processor``; it is not kept alive."""
    _ASKS[model] = weakref.ref(processor)


def of_model(model: nn.Module) -> Asks | None:
    """Who knows the questions of a model's prompts, or ``None``."""
    found = _ASKS.get(model)
    return found() if found is not None else None


_SEEN: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


def note(model: nn.Module, input_ids: torch.Tensor) -> None:
    """The prompt that a model is given, int64 ``(batch, seq)``, while somebody wants to know."""
    _SEEN[model] = input_ids


def seen(model: nn.Module) -> torch.Tensor | None:
    """The prompt that was noted last."""
    return _SEEN.get(model)


def forget(model: nn.Module) -> None:
    """Nobody wants to know any more."""
    _SEEN.pop(model, None)


class Questions:
    """Token ids of prompts, and the text they were made of.

    Args:
        skip: ids that do not count: padding and placeholders of images.
    """

    def __init__(self, skip: Sequence[int]) -> None:
        self.skip = frozenset(skip)
        self._texts: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def key(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids that count."""
        return tuple(token for token in ids if token not in self.skip)

    def remember(self, input_ids: torch.Tensor, texts: Sequence[str]) -> None:
        """``input_ids`` ``(batch, seq)`` were made of ``texts``."""
        for ids, text in zip(input_ids.tolist(), texts, strict=True):
            self._texts[self.key(ids)] = text
            self._texts.move_to_end(self.key(ids))
        while len(self._texts) > _ROOM:
            self._texts.popitem(last=False)

    def find(self, ids: Sequence[int]) -> str | None:
        """The text of a prompt, or ``None``."""
        return self._texts.get(self.key(ids))
