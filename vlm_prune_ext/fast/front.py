"""What stands in front of the layers: the model's own code makes the decoder's input (tower,
projector, merging text and images), with the vision tower and the rules behind it recorded.

A greedy choice is hundreds of small kernels, which take longer to launch than to run.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.layout import take
from vlm_prune_ext.engine.prune import Session
from vlm_prune_ext.engine.state import Call
from vlm_prune_ext.engine.tower import Seen, VisionPruner, Watch
from vlm_prune_ext.fast.graphs import LRU, Recorded, Recorder, RecordingError
from vlm_prune_ext.fast.run import Prompt

_RULES, _SHAPES = 16, 8  # recordings kept: of rules, of shapes of a tower's input

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
        self._made: LRU[_Recording] = LRU(_RULES)

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


# -- the tower ------------------------------------------------------------------------------------
def drops_inside(session: Session | None) -> bool:
    """Do tokens go inside the tower?"""
    pruners = session.pruners if session is not None else []
    return any(isinstance(pruner, VisionPruner) and pruner.stages for pruner in pruners)


def site_of(session: Session | None) -> FeatureSite | None:
    """What chooses between tower and language model, if anything does."""
    pruners = session.pruners if session is not None else []
    return next((p.site for p in pruners if isinstance(p, DecoderPruner)), None)


def takes_pixels(tower: nn.Module) -> bool:
    """Is a tower called with pixels alone, flags apart?"""
    return "patch_attention_mask" not in inspect.signature(type(tower).forward).parameters


class RecordedTower:
    """A vision tower whose forward is recorded, per shape of its input and what is noted of it.

    Hooks inside it run while it is recorded, and not when it is replayed: what they noted then is
    part of the recording.
    """

    def __init__(self, tower: nn.Module, recorder: Recorder) -> None:
        self._tower = weakref.ref(tower)
        self._recorder = recorder
        self._watch: Watch | None = None
        self._shapes: LRU[tuple[torch.Tensor, Recorded]] = LRU(_SHAPES)

    def take_over(self, watch: Watch | None) -> None:
        """From now on the tower's calls come here; ``watch`` notes what a rule needs of them."""
        self._watch = watch
        self._tower().forward = self._forward  # type: ignore[union-attr,method-assign]

    def step_back(self) -> None:
        """The tower has its own forward back."""
        self._watch = None
        vars(self._tower()).pop("forward", None)

    def _forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        watch = self._watch
        needs = () if watch is None else watch.needs
        key = (tuple(pixel_values.shape), pixel_values.dtype, needs, tuple(sorted(kwargs.items())))
        buffer, recorded = self._shapes.get(
            key, lambda: (torch.empty_like(pixel_values), Recorded(self._recorder))
        )
        buffer.copy_(pixel_values)
        before = Seen() if watch is None else watch.take()
        output, named = recorded(lambda: self._work(buffer, kwargs))
        if watch is not None:
            watch.seen = before
            for name, tensor in named:  # the next call writes where this one's are
                watch.seen.note(name, tensor.clone())
        return type(output)(**output)  # models write into what they get

    def _work(self, pixels: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        tower: Any = self._tower()
        output = type(tower).forward(tower, pixels, **kwargs)
        seen = Seen() if self._watch is None else self._watch.take()
        return output, [(name, part) for name, parts in seen.named.items() for part in parts]


# -- up to the decoder ----------------------------------------------------------------------------
class _Reached(Exception):
    """The model has made the decoder's input; the rest of its forward is not wanted."""


def reach(
    decoder: nn.Module, forward: Callable[[], Any], pruner: DecoderPruner | None = None
) -> tuple[Prompt, Call | None]:
    """Run a model up to its decoder.

    Args:
        decoder: where to stop.
        forward: calls the model, ``position_ids`` included.
        pruner: the attached method, which has its say on the prompt first.

    Returns:
        the decoder's input, and what the method made of it (``None``: no visual tokens).
    """
    watch = _Watch(pruner)
    handle = decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        forward()
    except _Reached:
        pass
    finally:
        handle.remove()
    assert watch.prompt is not None
    return watch.prompt, watch.call


class _Watch:
    """A hook behind the pruner's own on the decoder: takes its input and ends the forward."""

    def __init__(self, pruner: DecoderPruner | None) -> None:
        self.pruner = pruner
        self.prompt: Prompt | None = None
        self.call: Call | None = None
        self.thread = threading.get_ident()

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is None:
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        self.call = self.pruner.call if self.pruner is not None else None
        if self.call is not None:
            real = self.call.state.prefill.real
        elif isinstance(mask, torch.Tensor) and not bool(mask.all()):
            real = mask.bool()
        else:
            # Also where a model passes a mask for each kind of layer (Gemma 3): it has no fast
            # path, and comes here for its embeddings only.
            real = None
        positions = kwargs["position_ids"]
        if positions.dim() == 3 and len(positions) == 4:  # those of text stand in front
            positions = positions[1:]
        self.prompt = Prompt(embeds, real, positions, self._stacked(embeds, kwargs))
        raise _Reached

    def _stacked(self, embeds: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Features that the decoder would add at visual tokens, at the tokens that enter it."""
        features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if not features or mask is None:
            return None
        whole = embeds.new_zeros(len(features), *mask.shape, embeds.shape[-1])
        for level, own in zip(whole, features, strict=True):
            level[mask] = own.to(level)
        here = None if self.pruner is None else self.pruner.present()
        if here is None:
            return whole
        held = take(whole, here.clamp(min=0), -2)
        return held.masked_fill_((here < 0)[..., None], 0)
