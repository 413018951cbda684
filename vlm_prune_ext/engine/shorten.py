"""Dropping in front of layer 0: the decoder is simply given a shorter prompt.

Two kinds of token can go there. Features that the vision tower dropped (or that were resized
away) leave a sequence with fewer image tokens, whose positions are counted anew, as if the image
had been smaller to begin with. Tokens that a rule drops at layer 0 leave gaps: the others keep
their rotary positions, as after any later layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine import masks
from vlm_prune_ext.engine.evidence import Looker
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.engine.spans import Image, runs_of
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.evidence import Stage


@dataclass
class DecoderInput:
    """What the decoder was called with; ``length`` counts padding. The last ``ahead`` tokens are
    candidates for the answer, not part of the prompt."""

    module: nn.Module
    embeds: torch.Tensor | None
    ids: torch.Tensor | None
    mask: Any
    positions: torch.Tensor | None
    batch: int
    length: int
    device: torch.device
    ahead: int = 0

    @staticmethod
    def of(module: nn.Module, kwargs: dict) -> DecoderInput:
        """Read the decoder's keyword arguments."""
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        given = embeds if embeds is not None else ids
        if given is None:
            raise InputError("The language model was called without input_ids or inputs_embeds.")
        return DecoderInput(
            module,
            embeds,
            ids,
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            given.shape[0],
            given.shape[1],
            given.device,
        )

    def forget(self) -> None:
        """Let go of the tensors, once the prompt is through; what decoding needs is known."""
        self.real  # noqa: B018 - computed while the mask is still here
        self.embeds = self.ids = self.mask = None

    def embedded(self) -> torch.Tensor:
        """``(batch, length, hidden)``."""
        if self.embeds is not None:
            return self.embeds
        return self.module.get_input_embeddings()(self.ids)  # type: ignore[operator]

    @cached_property
    def real(self) -> torch.Tensor | None:
        """Bool ``(batch, length)``, False at padding; ``None`` where there is none."""
        mask = self.mask
        if isinstance(mask, dict):  # one mask per kind of layer
            mask = mask.get("full_attention")
        if mask is None:
            return None
        if mask.dim() == 4:  # a token sees itself, whatever window it looks through
            own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            mask = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
            mask = mask.expand(self.batch, -1)
        real = mask[:, : self.length].bool()
        return None if bool(real.all()) else real

    def first_tokens(self) -> list[int]:
        """Per sample, place of the first token that is not padding."""
        real = self.real
        return [0] * self.batch if real is None else real.int().argmax(dim=1).tolist()

    def last_tokens(self) -> list[int]:
        """Per sample, place of the last token that is not padding."""
        return last_tokens(self.real, self.batch, self.length, self.ahead)


def last_tokens(real: torch.Tensor | None, batch: int, length: int, ahead: int) -> list[int]:
    """Per sample, place of the last token of which ``real`` ``(batch, length)`` is True, the last
    ``ahead`` left out."""
    length -= ahead
    if real is None:
        return [length - 1] * batch
    return (length - 1 - real[:, :length].flip(1).int().argmax(dim=1)).tolist()


@dataclass
class Shortened:
    """A shorter prompt, and what its decode steps need.

    Attributes:
        given: the prompt as it came.
        layout: places of it that go in, slots = places in the caller's sequence.
        origin: int64 ``(batch, n)``, place of each in the sequence that positions in the trace
            refer to; ``None`` where that is the shorter sequence itself.
        positions: rotary positions that go in.
        removed: int64 ``(batch, 1)``, how many were removed with renumbering.
        images: where visual tokens are now.
        held: tokens per sample.
    """

    given: DecoderInput
    layout: Layout
    origin: torch.Tensor | None
    positions: torch.Tensor
    removed: torch.Tensor
    images: list[Image]
    held: list[int]

    @property
    def length(self) -> int:
        """Tokens per sample that enter layer 0."""
        return self.layout.count

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots of the shorter sequence, and of what is decoded after it, stand in the
        sequence that positions refer to; int64 ``(batch, n)`` to the same."""
        if self.origin is None:
            return slots
        known = self.layout.slots.to(slots.device)
        later = slots - self.length + self.layout.total
        inside = known.gather(1, slots.clamp(max=self.length - 1))
        return torch.where(slots < self.length, inside, later)

    @property
    def whole(self) -> bool:
        """Nothing was dropped."""
        return self.layout.is_whole

    def settle(self, ahead: int) -> None:
        """Candidates at the end of the prompt count as decoded from now on."""
        self.layout = self.layout.without_last(ahead)
        self.origin = None if self.origin is None else self.origin[:, :-ahead]
        self.positions = self.positions[..., :-ahead]
        self.held = [held - ahead for held in self.held]
        real = self.given.real
        self.given.length, self.given.ahead = self.given.length - ahead, 0
        self.given.__dict__["real"] = None if real is None else real[:, :-ahead]

    @property
    def real(self) -> torch.Tensor | None:
        """As :attr:`DecoderInput.real`, of the shorter prompt; False at empty slots."""
        real = self.given.real
        if real is not None:
            real = real.gather(1, self.layout.slots)
        if self.layout.valid is not None:
            real = self.layout.valid if real is None else real & self.layout.valid
        return real

    def last_tokens(self) -> list[int]:
        """As :meth:`DecoderInput.last_tokens`, of the shorter prompt."""
        return last_tokens(self.real, self.given.batch, self.length, self.given.ahead)

    def start_prefill(self) -> Prefill:
        """State of the shorter prompt: its slots are the places that went in."""
        real = self.real
        state = Prefill.start(self.images, self.given.batch, self.length, real, self.given.device)
        if self.layout.valid is not None:
            # Empty slots are there from the start and may go when longer samples shrink.
            state.layout = replace(state.layout, valid=self.layout.valid)
            state.segments = {0: state.layout}
        state.held = list(self.held)
        return state

    def prefill_arguments(self, kwargs: dict) -> dict:
        """The decoder's arguments, shortened."""
        if self.whole:
            return kwargs
        embeds = take(self.given.embedded(), self.layout.slots, -2)
        mask = self._mask(kwargs.get("attention_mask"), self.length, prefill=True)
        if mask is None and self.origin is not None:
            # Gaps in positions would be read as borders of packed prompts if no mask came along.
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        changes = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": self.positions}
        return {**kwargs, "input_ids": None, **changes}

    def decode_arguments(self, kwargs: dict, step: DecoderInput, seen: int) -> dict:
        """The arguments of a later call: ``seen`` tokens are in the cache of layer 0."""
        if self.whole:
            return kwargs
        later = seen - self.length
        kwargs = self._without_known(kwargs, step, later)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (mask is not None and mask.dim() == 4):
            # Made for a static cache from the lengths in it and the padding of the longer prompt:
            # the two don't match. The decoder makes it anew from what is real.
            mask = self._real_keys(seen + step.length)
        else:
            mask = self._mask(mask, seen + step.length, prefill=False)
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = positions - self.removed
        else:
            ahead = torch.arange(1, step.length + 1, device=self.positions.device)
            positions = self.positions[..., -1:] + later + ahead
        return {**kwargs, "attention_mask": mask, "position_ids": positions}

    def _without_known(self, kwargs: dict, step: DecoderInput, later: int) -> dict:
        """The arguments of a later call without tokens that are cached already: ``generate`` takes
        the length of the cache, which is short of what was dropped, for that of the conversation.
        """
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return kwargs
        new = mask.shape[1] - self.layout.total - later
        if not 0 < new < step.length:
            return kwargs
        cut: dict[str, Any] = {}
        for name in ("input_ids", "position_ids"):
            if kwargs.get(name) is not None:
                cut[name] = kwargs[name][..., -new:]
        if kwargs.get("inputs_embeds") is not None:
            cut["inputs_embeds"] = kwargs["inputs_embeds"][:, -new:]
        step.length = new
        return {**kwargs, **cut}

    def _real_keys(self, width: int) -> torch.Tensor:
        """2-D padding mask over the shorter prompt and what was decoded since."""
        real = self.real
        if real is None:
            real = torch.ones_like(self.layout.slots, dtype=torch.bool)
        return torch.nn.functional.pad(real.long(), (0, width - self.length), value=1)

    def _mask(self, mask: Any, width: int, *, prefill: bool) -> Any:
        if isinstance(mask, dict):
            return {key: self._mask(value, width, prefill=prefill) for key, value in mask.items()}
        if mask is None:
            if self.layout.valid is None:
                return None
            extra = width - self.length
            return torch.nn.functional.pad(self.layout.valid.long(), (0, extra), value=1)
        if mask.dim() == 4 and not (prefill and mask.shape[-1] == self.given.length):
            width = mask.shape[-1]  # of a static cache
        return masks.adapt(
            mask,
            self.layout,
            queries=mask.shape[-2],
            prefill=prefill,
            width=width,
            attention="",
            dtype=self.positions.dtype,
        )


def images_left(images: list[Image], stays: torch.Tensor) -> list[Image]:
    """Where images are in a shorter prompt; ``stays`` bool ``(batch, S)``: what is in it."""
    until = stays.cpu().cumsum(dim=1)
    offset = until[:, -1].max() - until[:, -1]  # empty slots stand in front
    left = []
    for image in images:
        slots = torch.tensor(image.slots)
        here = until[image.sample, slots]
        before = until[image.sample].roll(1)[slots] * (slots > 0)
        places = (here - 1 + offset[image.sample])[here > before].tolist()
        if places:
            left.append(Image.of(image.sample, runs_of(places)))
    return left


def count_anew(layout: Layout, given: DecoderInput) -> torch.Tensor:
    """Positions 0, 1, 2, ... over what is left, not counting padding, ``(batch, n)``."""
    real = given.real
    left = torch.ones_like(layout.slots) if real is None else real.long().gather(1, layout.slots)
    if layout.valid is not None:
        left = left * layout.valid
    return (left.cumsum(dim=1) - 1).clamp(min=0)


def without_dropped(
    given: DecoderInput, images: list[Image], stage: Stage, trace: Trace, parts: ModelParts
) -> Shortened:
    """The prompt after a stage at layer 0; kept tokens keep their positions."""
    state = Prefill.start(images, given.batch, given.length, given.real, given.device)
    state.ahead = given.ahead
    look = Looker(stage.needs, parts, state, given.embedded())
    gone, _ = state.select(stage, look)
    if gone is not None:
        state.drop(0, gone, None, recount=False)
    state.record(0, trace)
    layout = state.layout
    positions = given.positions
    if positions is None:
        positions = torch.arange(given.length, device=given.device)[None]
        if parts.counts_real and given.real is not None:
            positions = (given.real.long().cumsum(dim=1) - 1).clamp(min=0)
    lost = torch.zeros(given.batch, 1, dtype=torch.int64, device=given.device)
    left = images if gone is None else images_left(images, ~gone)
    return Shortened(
        given, layout, layout.kept(), take(positions, layout.slots, -1), lost, left, state.held
    )
