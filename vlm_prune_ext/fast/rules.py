"""Rules behind the tower, recorded: a greedy choice is hundreds of small kernels, which take longer
to launch than to run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.fast.graphs import LRU, Recorded, Recorder, RecordingError

_KEPT = 16  # recordings at a time

Rule = Callable[[Any], Any]


@dataclass
class _Recording:
    """``evidence`` that the graph reads, and the graph; ``graph=None``: the rule waits for the
    device, so it runs as it is."""

    evidence: Any
    graph: Recorded | None


class RecordedRules:
    """The rules of feature stages, by what they are and the shapes that they see.

    Args:
        recorder: shared by the model's recordings; without capture rules run as they are.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._made: LRU[_Recording] = LRU(_KEPT)

    @contextmanager
    def take_over(self, site: FeatureSite | None) -> Iterator[None]:
        """Inside the block the site's rule is a recorded one."""
        stage = site.stage if site is not None and self._recorder.capture else None
        if site is None or stage is None:
            yield
            return
        site.stage = replace(stage, rule=partial(self._answer, stage.rule))
        try:
            yield
        finally:
            site.stage = stage

    def _answer(self, rule: Rule, evidence: Any) -> Any:
        recording = self._made.get(
            (_named(rule), _shapes(evidence)), lambda: self._start(evidence, rule)
        )
        if recording.graph is None:
            return rule(evidence)
        for name, buffer in _tensors(recording.evidence).items():
            buffer.copy_(getattr(evidence, name))
        try:
            return _copied(recording.graph(lambda: rule(recording.evidence)))
        except RecordingError:
            recording.graph = None
            return rule(evidence)

    def _start(self, evidence: Any, rule: Rule) -> _Recording:
        if _waits(rule, evidence):
            return _Recording(None, None)
        return _Recording(_copied(evidence), Recorded(self._recorder))


def _waits(rule: Rule, evidence: Any) -> bool:
    """Does a rule ask the device for anything, so that it cannot be recorded?"""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rule(evidence)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _named(rule: Rule) -> Hashable:
    """A rule's function, and the method that it belongs to."""
    return getattr(rule, "__func__", rule), getattr(rule, "__self__", None)


def _tensors(thing: Any) -> dict[str, torch.Tensor]:
    found = {field.name: getattr(thing, field.name) for field in fields(thing)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _shapes(evidence: Any) -> Hashable:
    """All of an evidence but what its tensors hold."""
    return tuple(
        (field.name, (tuple(value.shape), value.dtype))
        if isinstance(value := getattr(evidence, field.name), torch.Tensor)
        else (field.name, value)
        for field in fields(evidence)
    )


def _copied(thing: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(thing, torch.Tensor):
        return thing.clone()
    return replace(thing, **{name: value.clone() for name, value in _tensors(thing).items()})
