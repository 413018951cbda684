"""`generate` on the fast path: recorded pieces with fixed shapes instead of one layer at a time.

The model's own code still makes the decoder's input (tower, projector, merging text and image
features); from there on :mod:`vlm_prune_ext.fast.run` takes over. Whatever it cannot do goes
to transformers' own ``generate``, which gives the same answers.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from transformers import SuppressTokensLogitsProcessor

from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prune import Session, session_on, trace_of
from vlm_prune_ext.engine.state import Call
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.fast.front import (
    RecordedRules,
    RecordedTower,
    drops_inside,
    reach,
    site_of,
    takes_pixels,
)
from vlm_prune_ext.fast.graphs import Mark, RecordingError
from vlm_prune_ext.fast.pieces import Pieces
from vlm_prune_ext.fast.possible import (
    INPUTS,
    token_limit,
    why_not,
    why_not_now,
    why_not_options,
)
from vlm_prune_ext.fast.run import Prompt, Run, start
from vlm_prune_ext.fast.shared import (
    Asked,
    Prefix,
    Prefixes,
    in_front,
    start_shared,
    take_prefixes,
    version_of,
    why_not_shared,
)
from vlm_prune_ext.fast.unchanged import Unchanged
from vlm_prune_ext.methods.base import Method

logger = logging.getLogger("vlm_prune_ext")


class FastGenerate:
    """Stands in the place of a model's ``generate``, with the same arguments and results.

    Args:
        model: a whole vision-language model.
        parts: where its parts are.
        capture: record CUDA graphs; without them (on a CPU) the same pieces run one by one.
        forced: a method that has no fast path is an error instead of a line in the log.

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
        self._parts = replace(parts, model=parts.decoder, joint=None)
        self._said: set[str] = set()
        self._broken: str | None = None
        self._lock, self._owner = threading.Lock(), 0
        self._prepare(capture)

    def _prepare(self, capture: bool) -> None:
        """Start with nothing recorded."""
        model: Any = self._model()
        self.pieces = Pieces(self._parts, _Head(model), capture=capture)
        vision = self._parts.vision
        # A tower that takes all images as one sequence, or is told which patches are real, asks
        # the device how many there are.
        recorded = vision is not None and vision.packed is None and takes_pixels(vision.tower)
        self._tower = RecordedTower(vision.tower, self.pieces.recorder) if recorded else None  # type: ignore[union-attr]
        self._rules = RecordedRules(self.pieces.recorder)
        layers = {id(p) for layer in self._parts.layers for p in layer.parameters()}
        self._front = [p for p in model.parameters() if id(p) not in layers]
        self.prefixes = Prefixes()
        self._unchanged = Unchanged(model, self._parts.layers)

    @property
    def captures(self) -> int:
        """Pieces recorded so far."""
        return self.pieces.recorder.count

    @property
    def capture_seconds(self) -> float:
        """How long that took."""
        return self.pieces.recorder.seconds

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
        decoder: Any = self._decoder()
        session, trace = session_on(decoder), trace_of(model, decoder)
        reason = self._why_not_this_call(model, session, inputs, kwargs)
        if reason is None:
            try:
                answer = self._recorded(lambda: self._generate(model, session, kwargs))
                if trace is not None:
                    trace.backend = "graphs"
                return answer
            except _NotHere as not_here:
                reason = str(not_here)
        if trace is not None and session is None:
            trace.backend = "transformers"
        self._say(f"The fast path is not taken: {reason}.")
        return type(model).generate(model, inputs, **kwargs)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.warning(line)

    def _recorded(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Work on recordings of the model as it is now.

        Raises:
            _NotHere: transformers has to.
        """
        if self._unchanged.moved():
            self._prepare(self._capture)
        for _ in range(2):
            try:
                with torch.inference_mode():
                    ids = work()
            except _Changed:
                self._prepare(self._capture)
                continue
            except RecordingError as error:
                if self.forced:
                    raise
                self._broken = str(error)
                raise _NotHere(self._broken) from error
            except BaseException:
                self.pieces.arena.wipe()  # what is no number would spoil the next prompt
                raise
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
        reason = why_not_now(self.pieces.parts, method)
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
        real = mask.bool()
        if not bool((real[:, -1] & (real[:, 1:] >= real[:, :-1]).all(dim=1)).all()):
            return "attention_mask hides tokens inside or behind a prompt"
        return self._why_not_now(model, kwargs)

    def _why_not_now(self, model: Any, kwargs: Mapping[str, Any]) -> str | None:
        """What of the model as it is now, or of the options, is in the way."""
        if self._broken is not None:
            return self._broken
        if model.training:
            return "the model is in training mode"
        if self._capture and next(model.parameters()).device.type != "cuda":
            if self.pieces.recorder.capture:
                self._prepare(capture=False)  # the GPU's memory is let go of
            return "the model is not on a GPU any more"
        if torch.is_autocast_enabled(next(model.parameters()).device.type):
            return "autocast is on"
        if self._unchanged.hooked():
            return "the model has hooks, which recordings would not call"
        return why_not_options(model, kwargs)

    # -- the work -----------------------------------------------------------------------------
    def _generate(
        self, model: Any, session: Session | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        limit = token_limit(model, kwargs)
        return self._decode(model, self._prefill(model, session, kwargs, limit), kwargs, limit)

    def _decode(self, model: Any, run: Run, kwargs: Mapping[str, Any], limit: int) -> torch.Tensor:
        # Asked while the device works: hundreds of modules take a fifth of a millisecond.
        if not self._unchanged.holds():
            raise _Changed
        processors = [*_suppressing(model, run.logits.device)]
        processors += kwargs.get("logits_processor") or []
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
            self.pieces.arena.wipe()  # or a prompt that overflows would spoil the next one
        return ids

    def _prefill(self, model: Any, session: Session | None, kwargs: Any, limit: int) -> Run:
        prompt, call, pruner = self._enter(model, session, kwargs)
        return start(self.pieces, prompt, limit, pruner, call)

    def _enter(
        self, model: Any, session: Session | None, given: Mapping[str, Any]
    ) -> tuple[Prompt, Call | None, DecoderPruner | None]:
        """A prompt as it enters the decoder, through the recorded tower and rules."""
        inputs = {name: given[name] for name in INPUTS if given.get(name) is not None}
        # The model's own way, which knows of pictures where positions have axes.
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
        site, pruner = site_of(session), _pruner_of(session)
        if self._tower is not None and not drops_inside(session):
            self._tower.take_over(site.watch if site is not None else None)
        try:
            with self._rules.take_over(site):
                prompt, call = reach(
                    self._decoder(),  # type: ignore[arg-type]
                    lambda: model(**inputs, position_ids=positions, use_cache=False),
                    pruner,
                )
        finally:
            if self._tower is not None:
                self._tower.step_back()
        return prompt, call, pruner

    def prefill(self, forward: Callable[[], Any], max_new_tokens: int) -> Run:
        """Prefill alone.

        Args:
            forward: calls the model or its decoder as for a prefill, ``position_ids`` included; it
                is left when the decoder is reached.
            max_new_tokens: see :func:`vlm_prune_ext.fast.run.start`.

        Returns:
            the first token's logits, and what decodes on.
        """
        decoder: Any = self._decoder()
        pruner = _pruner_of(session_on(decoder))
        prompt, call = reach(decoder, forward, pruner)
        return start(self.pieces, prompt, max_new_tokens, pruner, call)

    # -- questions about one picture ----------------------------------------------------------
    def why_not_shared(self, method: Method | None) -> str | None:
        """Why questions about one picture are answered one by one; ``None``: they are not."""
        reason = why_not_shared(method, len(self._parts.layers))
        return reason or why_not_now(self.pieces.parts, method if self._capture else None)

    def shared_layers(self, method: Method | None) -> int:
        """Decoder layers in which questions about one picture share it."""
        layers = len(self._parts.layers)
        first = None if method is None else method.first_by_question(layers)
        return layers if first is None else max(first, 0)

    def known(self, keys: Iterable[Hashable], method: Method | None) -> list[bool]:
        """Which prefixes are there already."""
        return [key in self.prefixes for key in self._keys(keys, method)]

    def _keys(self, keys: Iterable[Hashable], method: Method | None) -> list[Hashable]:
        """With all else that prefixes depend on."""
        works, versions = in_front(method, len(self._parts.layers)), self._versions()
        looks = method is not None  # else nobody asks where a picture's tokens are
        return [(key, works, looks, versions) for key in keys]

    def _versions(self) -> Hashable:
        """Changes when anything in front of the layers is moved or written to (not by way of
        ``.data``, which leaves no mark)."""
        return hash(tuple(number for p in self._front for number in (p.data_ptr(), version_of(p))))

    def shared(self, asked: Asked, **kwargs: Any) -> torch.Tensor | None:
        """Answer questions about a few pictures; what their prompts share is computed once.

        Args:
            asked: the questions.
            **kwargs: as for ``generate``: ``input_ids`` and ``attention_mask`` of the whole
                prompts, filled up in front, and options.

        Returns:
            as ``generate``; ``None``: it cannot be done, which is said once.
        """
        model: Any = self._model()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                return self._answer_shared(model, asked, kwargs)
            finally:
                self._owner = 0

    def _answer_shared(
        self, model: Any, asked: Asked, kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        decoder: Any = self._decoder()
        session, trace = session_on(decoder), trace_of(model, decoder)
        reason = self.why_not_shared(None if session is None else session.method)
        reason = reason or self._why_not_now(model, kwargs)
        if reason is None:

            def work() -> torch.Tensor:
                limit = token_limit(model, kwargs)
                prefixes = self._prefixes(model, session, asked)
                run = start_shared(self.pieces, prefixes, asked, limit, _pruner_of(session))
                return self._decode(model, run, kwargs, limit)

            try:
                ids = self._recorded(work)
                if trace is not None and model.generate is self:
                    trace.backend = "graphs"
                return ids
            except _NotHere as not_here:
                reason = str(not_here)
        self._say(f"Questions about one picture share nothing: {reason}.")
        return None

    def _prefixes(self, model: Any, session: Session | None, asked: Asked) -> list[Prefix]:
        """What the questions share, out of memory or made now."""
        keys = self._keys(asked.keys, None if session is None else session.method)
        found = {key: self.prefixes.get(key) for key in keys}
        asked.known[:] = [one for one in found.values() if one is not None]
        missing = [index for index, key in enumerate(keys) if found[key] is None]
        if missing:
            made = self._make_prefixes(model, session, asked, missing)
            for index, prefix in zip(missing, made, strict=True):
                found[keys[index]] = prefix
                self.prefixes.put(keys[index], prefix)
        asked.found[:] = [one for key in keys if (one := found[key]) is not None]
        return asked.found

    def _make_prefixes(
        self, model: Any, session: Session | None, asked: Asked, which: list[int]
    ) -> list[Prefix]:
        device = self.pieces.recorder.device
        start = Mark(device)
        inputs, tiles = asked.make(which)
        unknown = sorted(set(inputs) - INPUTS)
        if unknown:
            raise _NotHere(f"the model is given {unknown[0]}")
        prompt, call, _ = self._enter(model, session, inputs)
        lengths = [asked.lengths[index] for index in which]
        trace = None if session is None else session.trace
        made = take_prefixes(prompt, call, lengths, tiles, trace)
        for prefix in made:
            prefix.took = start, Mark(device), len(made)
        return made


_SHARING: weakref.WeakKeyDictionary[Any, FastGenerate] = weakref.WeakKeyDictionary()


def sharing_of(model: Any, find_parts: Callable[[Any], ModelParts]) -> FastGenerate | None:
    """What answers questions about one picture for a model: its fast path, or the same pieces
    without being recorded; ``None``: its layers are not known well enough.

    Args:
        model: a whole model.
        find_parts: says where its parts are.
    """
    own = model.generate
    if isinstance(own, FastGenerate):
        return own
    if model not in _SHARING:
        try:
            _SHARING[model] = FastGenerate(model, find_parts(model), capture=False)
        except InputError:
            return None
    return _SHARING[model]


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


def check_method(model: Any, method: Method | None) -> None:
    """Say at once that a method has no fast path on a model that was told to take it.

    Raises:
        InputError: as :meth:`FastGenerate.check`.
    """
    if isinstance(model.generate, FastGenerate):
        model.generate.check(method)


class _NotHere(Exception):
    """Why transformers has to answer."""


class _Changed(Exception):
    """The model is not what was recorded."""


def _pruner_of(session: Session | None) -> DecoderPruner | None:
    pruners = session.pruners if session is not None else []
    return next((p for p in pruners if isinstance(p, DecoderPruner)), None)


class _Head:
    """Logits from the last layer's normed hidden states."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(batch, hidden)`` -> ``(batch, vocabulary)``."""
        model: Any = self._model()
        return model.get_output_embeddings()(hidden)


def _suppressing(model: Any, device: torch.device) -> Iterator[Any]:
    """What keeps a model from saying the tokens that its generation_config forbids (Ovis2)."""
    tokens = model.generation_config.suppress_tokens
    if tokens:
        yield SuppressTokensLogitsProcessor(tokens, device=str(device))


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
