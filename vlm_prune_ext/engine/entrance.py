"""A prompt at the door of the decoder: where its visual tokens are, and what enters layer 0."""

from __future__ import annotations

import torch

from vlm_prune_ext.engine.call import State
from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.engine.shorten import (
    DecoderInput,
    Shortened,
    without_dropped,
)
from vlm_prune_ext.engine.spans import (
    Image,
    VisualSpan,
    images_from_argument,
    images_from_mask,
    sparing_last,
)
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method, Stage


class Entrance:
    """Reads prompts, and shortens them where tokens go in front of layer 0.

    Args:
        parts: where things are.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None`` to have them found.
        first_stage: the stage at layer 0, if there is one.
        site: what chooses between tower and language model, if anything does.
    """

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        visual_span: VisualSpan | None,
        first_stage: Stage | None,
        site: FeatureSite | None,
    ) -> None:
        self.parts, self.method, self.visual_span = parts, method, visual_span
        self.first_stage, self.site = first_stage, site
        self.stated = method.stated_span

    def images(
        self, given: DecoderInput, pending: tuple[torch.Tensor, list[list[int]] | None] | None
    ) -> list[Image]:
        """Where the visual tokens of a prompt are.

        Args:
            given: the prompt.
            pending: what the model's adapter saw of it, see :data:`SpanSink`; ``None``: nothing.

        Raises:
            InputError: places that are not known, or do not fit the prompt.
        """
        if self.visual_span is not None:
            return images_from_argument(self.visual_span, given.batch, given.length)
        if pending is not None:
            mask, lengths = pending
            beams = given.batch // mask.shape[0]
            if beams > 1 and tuple(mask.shape) == (given.batch // beams, given.length):
                mask = mask.repeat_interleave(beams, dim=0)  # seen before beams were made of it
                lengths = lengths and [row for row in lengths for _ in range(beams)]
            if tuple(mask.shape) != (given.batch, given.length):
                raise InputError(
                    f"Visual tokens were found in an input of shape {tuple(mask.shape)}, but the "
                    f"language model was called with {(given.batch, given.length)}."
                )
            return images_from_mask(mask, lengths)
        if self.parts.watch_spans is not None:
            return []
        start, length = self.stated
        if start is None or length is None:
            raise InputError(
                "visual_span=None is not enough for a bare language model: give "
                "visual_span=(start, length), or sys_length and the image length in the method."
            )
        return images_from_argument((start, length), given.batch, given.length)

    def prompt(
        self, given: DecoderInput, images: list[Image], kwargs: dict, trace: Trace
    ) -> tuple[State, dict]:
        """What is known of a prompt, and the decoder's keyword arguments for what enters layer 0.

        Args:
            given: the prompt.
            images: its images.
            kwargs: the decoder's keyword arguments.
            trace: to be written to.
        """
        short: Shortened | None = None
        if self.site is not None:
            short = self.site.shorten(given, images)
            # The features that came were addresses, also where all of them stay.
            kwargs = {**kwargs, "inputs_embeds": short.given.embeds, "input_ids": None}
        else:
            images = sparing_last(images, given.last_tokens())
        if short is not None:
            short.images = sparing_last(short.images, short.last_tokens())
        elif self.first_stage is not None:
            short = without_dropped(given, images, self.first_stage, trace, self.parts)
        if short is None:
            state = Prefill.start(images, given.batch, given.length, given.real, given.device)
        else:
            kwargs = short.prefill_arguments(kwargs)
            state = short.start_prefill()
            trace.lengths[:] = [short.length] * len(self.parts.layers)
        state.ahead = given.ahead
        trace.visual_tokens[0] = state.visual_counts()
        return State(state, short), kwargs
