"""`generate` on the fast path: recorded pieces with fixed shapes instead of one layer at a time.

The model's own code still makes the decoder's input (tower, projector, merging text and image
features); from there on :mod:`vlm_prune_ext.engine.fast` takes over. Whatever it cannot do goes
to transformers' own ``generate``, which gives the same answers.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from vlm_prune_ext.engine.decoder import Call, DecoderPruner
from vlm_prune_ext.engine.fast import FastDecoder, Prompt, Run, why_not, why_not_now
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prune import Session, session_on
from vlm_prune_ext.engine.recorded import Recorded, Recorder, RecordingError, Shelf
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models.unchanged import Unchanged

logger = logging.getLogger("vlm_prune_ext")

# Arguments of greedy decoding, and those that do not matter to it.
_INPUTS = frozenset({"input_ids", "attention_mask", "pixel_values", "image_sizes"})
_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "use_cache": (True, None),
    "return_dict_in_generate": (False, None),
}
_FREE = frozenset({"temperature", "top_p", "top_k", "max_new_tokens", "pad_token_id"})
_OWN = frozenset({"eos_token_id", "logits_processor", "stopping_criteria"})
# Fields of a model's generation_config that greedy decoding does not read, or that are read here.
_HARMLESS = _FREE | {
    "do_sample",
    "bos_token_id",
    "eos_token_id",
    "max_length",
    "transformers_version",
    "use_cache",
}
_TOWER_SHAPES = 8


class FastGenerate:
    """Stands in the place of a model's ``generate``, with the same arguments and results.

    Args:
        model: a whole vision-language model.
        parts: where its parts are.
        capture: record CUDA graphs; without them (on a CPU) the same pieces run one by one.
        forced: a method that has no fast path is an error instead of a line in the log.

    Attributes:
        took: whether the last call was answered here, not by transformers.

    Raises:
        InputError: the model cannot run on fixed shapes.
        RecordingError: CUDA could not record a piece, and ``forced`` (else it is logged, and
            transformers takes over for good).
    """

    def __init__(
        self, model: Any, parts: ModelParts, *, capture: bool = True, forced: bool = False
    ) -> None:
        reason = why_not(parts, None)
        if reason is not None:
            raise InputError(f"fast=True is not possible: {reason}.")
        assert parts.decoder is not None
        self._model = weakref.ref(model)
        self._decoder = weakref.ref(parts.decoder)
        self.forced, self._capture = forced, capture
        # The model holds this object, so nothing here may hold the model: memory would stay taken
        # after its last user let go of it.
        self._parts = replace(parts, model=parts.decoder)
        self.took = False
        self._said: set[str] = set()
        self._broken: str | None = None
        self._lock, self._owner = threading.Lock(), 0
        self._prepare(capture)

    def _prepare(self, capture: bool) -> None:
        """Start with nothing recorded."""
        model: Any = self._model()
        self.fast = FastDecoder(self._parts, _Head(model), capture=capture)
        vision = self._parts.vision
        self._tower = _RecordedTower(vision.tower, self.fast.recorder) if vision else None
        self._weights = self._where_weights_are()
        self._unchanged = Unchanged(model)

    def _where_weights_are(self) -> tuple[int, ...]:
        """Changes where a model is moved, cast, or given adapters. Two layers speak for all: asked
        before anything is replayed, where the old memory may be gone; the rest is asked later."""
        layers = self._parts.layers
        ends = [p for layer in (layers[0], layers[-1]) for p in layer.parameters()]
        return tuple(number for p in ends for number in (id(p), p.data_ptr()))

    @property
    def captures(self) -> int:
        """Pieces recorded so far."""
        return self.fast.recorder.count

    @property
    def capture_seconds(self) -> float:
        """How long that took."""
        return self.fast.recorder.seconds

    def __call__(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As ``transformers.GenerationMixin.generate``."""
        model: Any = self._model()
        if self._owner == threading.get_ident():  # a processor of the running call asks
            return type(model).generate(model, inputs, **kwargs)
        with self._lock:
            # What is recorded works for one call at a time, and while something is recorded the
            # layers are not what transformers expects: its calls wait, too.
            self._owner = threading.get_ident()
            try:
                return self._here_or_there(model, inputs, kwargs)
            finally:
                self._owner = 0

    def _here_or_there(self, model: Any, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
        session = session_on(self._decoder())  # type: ignore[arg-type]
        reason = self._why_not_this_call(model, session, inputs, kwargs)
        if reason is None:
            try:
                return self._answer(model, session, kwargs)
            except _NotHere as not_here:
                reason = str(not_here)
        self.took = False
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("The fast path is not taken: %s.", reason)
        return type(model).generate(model, inputs, **kwargs)

    def _answer(self, model: Any, session: Session | None, kwargs: Mapping[str, Any]) -> Any:
        """On recordings of the model as it is now.

        Raises:
            _NotHere: transformers has to.
        """
        if self._where_weights_are() != self._weights:
            self._prepare(self._capture)
        for _ in range(2):
            try:
                with torch.inference_mode():
                    ids = self._generate(model, session, kwargs)
            except _Changed:
                self._prepare(self._capture)
                continue
            except RecordingError as error:
                if self.forced:
                    raise
                self._broken = str(error)
                raise _NotHere(self._broken) from error
            except BaseException:
                self.fast.arena.wipe()  # what is no number would spoil the next prompt
                raise
            self.took = True
            return ids.clone()  # an ordinary tensor again
        raise _NotHere("the model changes while it answers")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model gets transformers' own ``generate``: what is recorded here works on
        the memory of this model."""
        model: Any = self._model()
        copied = memo.get(id(model), model)
        return MethodType(type(copied).generate, copied)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A model with the fast path cannot be pickled: save_pretrained() saves it; for "
            "torch.save(model), load it with fast=False."
        )

    # -- may it? ------------------------------------------------------------------------------
    def check(self, method: Method | None) -> str | None:
        """Why a method has no fast path on this model; ``None`` if it has.

        Raises:
            InputError: it has none, and the fast path is forced.
        """
        reason = why_not_now(self.fast.parts, method)
        if reason is not None and self.forced:
            raise InputError(f"fast=True is not possible: {reason}.")
        return reason

    def _why_not_this_call(
        self, model: Any, session: Session | None, inputs: Any, kwargs: Mapping[str, Any]
    ) -> str | None:
        if self._broken is not None:
            return self._broken
        reason = self.check(session.method if session is not None else None)
        if reason is not None:
            return reason
        if inputs is not None or kwargs.get("input_ids") is None:
            return "generate was not given input_ids by name"
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or mask.shape != kwargs["input_ids"].shape:
            return "generate was not given a 2-D attention_mask, as long as input_ids"
        if not bool(mask[:, -1].all()):
            return "there is padding behind a prompt"
        if model.training:
            return "the model is in training mode"
        if self._capture and next(model.parameters()).device.type != "cuda":
            if self.fast.recorder.capture:
                self._prepare(capture=False)  # the GPU's memory is let go of
            return "the model is not on a GPU any more"
        if torch.is_autocast_enabled(mask.device.type):
            return "autocast is on"
        if self._unchanged.hooked():
            return "the model has hooks, which recordings would not call"
        return _why_not_options(model, kwargs)

    # -- the work -----------------------------------------------------------------------------
    def _generate(
        self, model: Any, session: Session | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        limit = _limit(model, kwargs)
        run = self._prefill(model, session, kwargs, limit)
        # Asked while the device works: hundreds of modules take about a millisecond.
        if not self._unchanged.holds():
            raise _Changed
        processors = kwargs.get("logits_processor") or []
        criteria = kwargs.get("stopping_criteria") or []
        stops, pad = _special_tokens(model, kwargs, run.logits.device)
        ids = kwargs["input_ids"]
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for count in range(1, limit + 1):
            scores: Any = run.logits.to(torch.float32, copy=True)  # the next step overwrites them
            for processor in processors:
                scores = processor(ids, scores)
            newest = scores.argmax(dim=-1)
            if stops is not None and pad is not None:
                newest = torch.where(done, pad, newest)
                done = done | torch.isin(newest, stops)
            ids = torch.cat([ids, newest[:, None]], dim=1)
            for criterion in criteria:
                done = done | criterion(ids, scores)
            if count == limit or bool(done.all()):
                break
            run.step(newest)
        if not bool(torch.isfinite(run.logits).all()):
            self.fast.arena.wipe()  # or a prompt that overflows would spoil the next one
        return ids

    def _prefill(self, model: Any, session: Session | None, kwargs: Any, limit: int) -> Run:
        inputs = {name: kwargs[name] for name in _INPUTS if kwargs.get(name) is not None}
        mask = inputs["attention_mask"]
        positions = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
        in_tower = session is not None and any(
            not isinstance(pruner, DecoderPruner) for pruner in session.pruners
        )
        if self._tower is not None and not in_tower:
            self._tower.take_over()
        try:
            return self.prefill(
                lambda: model(**inputs, position_ids=positions, use_cache=False), limit
            )
        finally:
            if self._tower is not None:
                self._tower.step_back()

    def prefill(self, forward: Callable[[], Any], max_new_tokens: int) -> Run:
        """Prefill alone.

        Args:
            forward: calls the model or its decoder as for a prefill, ``position_ids`` included; it
                is left when the decoder is reached.
            max_new_tokens: see :meth:`FastDecoder.start`.

        Returns:
            the first token's logits, and what decodes on.
        """
        decoder: Any = self._decoder()
        session = session_on(decoder)
        pruners = session.pruners if session is not None else []
        pruner = next((p for p in pruners if isinstance(p, DecoderPruner)), None)
        prompt, call = reach(decoder, forward, pruner)
        return self.fast.start(prompt, max_new_tokens, pruner, call)


def turn_on_fast(model: Any, parts: ModelParts, *, forced: bool = True) -> None:
    """Give a model the fast ``generate``.

    Args:
        model: a whole model.
        parts: where its parts are.
        forced: a method that has no fast path is an error instead of a line in the log.

    Raises:
        InputError: it cannot have it.
    """
    device, reason = next(model.parameters()).device, why_not(parts, None)
    if device.type != "cuda":
        reason = f"it needs a CUDA device, and the model is on {device.type!r}"
    if reason is not None:
        raise InputError(f"fast=True is not possible: {reason}.")
    model.generate = FastGenerate(model, parts, forced=forced)


class _NotHere(Exception):
    """Why transformers has to answer."""


class _Changed(Exception):
    """The model is not what was recorded."""


class _Head:
    """Logits from the last layer's normed hidden states."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(batch, hidden)`` -> ``(batch, vocabulary)``."""
        model: Any = self._model()
        return model.get_output_embeddings()(hidden)


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
        self.prompt = Prompt(embeds, real, kwargs["position_ids"])
        raise _Reached


class _RecordedTower:
    """A vision tower whose forward is recorded, per shape of its input."""

    def __init__(self, tower: nn.Module, recorder: Recorder) -> None:
        self._tower = weakref.ref(tower)
        self.recorder = recorder
        self._shapes: Shelf[tuple[torch.Tensor, Recorded]] = Shelf(_TOWER_SHAPES)

    def take_over(self) -> None:
        """From now on the tower's calls come here."""
        if self.recorder.capture:
            self._tower().forward = self._forward  # type: ignore[union-attr,method-assign]

    def step_back(self) -> None:
        """The tower has its own forward back."""
        vars(self._tower()).pop("forward", None)

    def _forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        tower: Any = self._tower()
        key = (tuple(pixel_values.shape), pixel_values.dtype, tuple(sorted(kwargs.items())))
        buffer, recorded = self._shapes.get(
            key, lambda: (torch.empty_like(pixel_values), Recorded(self.recorder))
        )
        buffer.copy_(pixel_values)
        output = recorded(lambda: type(tower).forward(tower, buffer, **kwargs))
        return type(output)(**output)  # models write into what they get


# -- options -----------------------------------------------------------------------------------
def _why_not_options(model: Any, kwargs: Mapping[str, Any]) -> str | None:
    """What of the call asks for more than greedy decoding from a plain prompt."""
    for name, value in kwargs.items():
        if name in _GREEDY:
            if value not in _GREEDY[name]:
                return f"generate was asked for {name}={value!r}"
        elif name not in _INPUTS | _FREE | _OWN and value is not None:
            return f"generate was given {name}"
    if not _INPUTS & set(kwargs) <= _accepted(type(model).forward):
        return "generate was given inputs that the model does not take"
    config = model.generation_config
    if config.do_sample and "do_sample" not in kwargs:
        return "the model's generation_config samples"
    usual = _usual_config()
    said = {name for name, value in vars(config).items() if value and value != usual.get(name)}
    odd = sorted(name for name in said - _HARMLESS if not name.startswith("_"))
    if odd:
        return f"the model's generation_config sets {odd[0]}"
    if _limit(model, kwargs) < 1:
        return "max_new_tokens is not stated"
    return None


@lru_cache
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of a model's inputs."""
    return frozenset(inspect.signature(forward).parameters)


@lru_cache
def _usual_config() -> dict[str, Any]:
    return dict(vars(GenerationConfig()))


def _limit(model: Any, kwargs: Mapping[str, Any]) -> int:
    limit = kwargs.get("max_new_tokens")
    return int(limit if limit is not None else model.generation_config.max_new_tokens or 0)


def _special_tokens(
    model: Any, kwargs: Mapping[str, Any], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Tokens that end an answer, and what follows one in a batch; ``None`` if nothing ends it."""
    config = model.generation_config
    stops = kwargs.get("eos_token_id", config.eos_token_id)
    if stops is None:
        return None, None
    stops = torch.as_tensor(stops, device=device).flatten()
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    return stops, stops[0] if pad is None else torch.as_tensor(pad, device=device)
