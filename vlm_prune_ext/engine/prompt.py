"""The prompt as it came: what the decoder was called with, and where visual tokens are in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.errors import InputError

Span = tuple[int, int]
VisualSpan = Span | Sequence["Span | Sequence[Span]"]


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


@dataclass(frozen=True)
class Image:
    """One image in the input: row of the batch, first position, number of visual tokens.

    ``runs``: ``(start, length)`` of each unbroken run of them, where other tokens stand in between
    (tiles or rows with names of their own); empty where there is one run. ``frames``: tokens of
    each frame, where it is a whole video.
    """

    sample: int
    start: int
    length: int
    runs: tuple[Span, ...] = ()
    frames: tuple[int, ...] = ()

    @staticmethod
    def of(sample: int, runs: Sequence[Span], frames: tuple[int, ...] = ()) -> Image:
        """The image whose tokens are in these runs."""
        length = sum(count for _, count in runs)
        return Image(sample, runs[0][0], length, tuple(runs) if len(runs) > 1 else (), frames)

    @property
    def slots(self) -> list[int]:
        """Positions of its tokens."""
        runs = self.runs or ((self.start, self.length),)
        return [slot for start, length in runs for slot in range(start, start + length)]

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return sum(self.runs[-1]) if self.runs else self.start + self.length


def tokens_by_sample(images: list[Image], batch: int) -> list[int]:
    """Visual tokens of each of ``batch`` samples."""
    counts = [0] * batch
    for image in images:
        counts[image.sample] += image.length
    return counts


Length = int | tuple[int, ...]
"""Visual tokens of an image, or of each frame of a video."""


def images_from_mask(
    mask: torch.Tensor, lengths: Sequence[Sequence[Length]] | None, whole_videos: bool = False
) -> list[Image]:
    """Images from a ``(batch, seq)`` bool mask of visual tokens.

    Args:
        mask: True at visual tokens.
        lengths: per sample, tokens of each image or video in order: an unbroken run of several
            is split by them, and runs of one belong together. ``None``, or where they do not add
            up: every run is one image.
        whole_videos: a video is one image; else each of its frames is.
    """
    images: list[Image] = []
    for sample, row in enumerate(mask.cpu()):
        runs = runs_of(row.nonzero().flatten().tolist())
        wanted: list[tuple[int, ...]] = []  # tokens of each image; several numbers: of each frame
        for length in lengths[sample] if lengths is not None else []:
            each = (length,) if isinstance(length, int) else length
            wanted += [each] if whole_videos else [(one,) for one in each]
        for own, each in _split(runs, wanted):
            images.append(Image.of(sample, own, each if len(each) > 1 else ()))
    return images


def spans_of(images: list[Image], batch: int) -> list[list[Span]]:
    """Per sample, first position and number of the tokens of each image and each frame."""
    spans: list[list[Span]] = [[] for _ in range(batch)]
    for image in images:
        slots, at = image.slots, 0
        for count in image.frames or (image.length,):
            spans[image.sample].append((slots[at], count))
            at += count
    return spans


def _split(
    runs: list[Span], wanted: list[tuple[int, ...]]
) -> list[tuple[list[Span], tuple[int, ...]]]:
    """The runs of each image: shared out by the lengths ``wanted``, if these fill them exactly."""
    lengths = list(map(sum, wanted))
    if sum(lengths) != sum(length for _, length in runs) or not all(lengths):
        return [([run], ()) for run in runs]
    images = []
    waiting = list(runs)
    for length, each in zip(lengths, wanted, strict=True):
        own: list[Span] = []
        while length:
            start, here = waiting.pop(0)
            taken = min(here, length)
            own.append((start, taken))
            length -= taken
            if here > taken:
                waiting.insert(0, (start + taken, here - taken))
        images.append((own, each))
    return images


def runs_of(slots: Sequence[int]) -> list[Span]:
    """Unbroken runs of ascending positions."""
    breaks = [place for place, (one, two) in enumerate(pairwise(slots), 1) if two != one + 1]
    bounds = pairwise([0, *breaks, len(slots)] if slots else [])
    return [(slots[first], stop - first) for first, stop in bounds]


def sparing_last(images: list[Image], last: list[int]) -> list[Image]:
    """Images without the token that predicts the answer: where a prompt ends in its image, the
    image's last token counts as text, since it must stay.

    Args:
        images: of the prompt.
        last: per sample, place of the last token.
    """
    left = []
    for image in images:
        if image.end - 1 != last[image.sample]:
            left.append(image)
        elif image.length > 1:
            *before, final = image.frames or (1,)
            frames = (*before, final - 1) if final > 1 else tuple(before)
            left.append(Image.of(image.sample, runs_of(image.slots[:-1]), frames))
    return left


def images_from_argument(span: VisualSpan, batch: int, seq: int) -> list[Image]:
    """Images from the ``visual_span`` argument: ``(start, length)`` for all samples, or one entry
    per sample, each such a pair or a list of them.

    Raises:
        InputError: wrong form, positions outside the sequence, or images that overlap.
    """
    per_sample = _per_sample(span, batch)
    images = []
    for sample, spans in enumerate(per_sample):
        for start, length in spans:
            if start < 0 or length < 1 or start + length > seq:
                raise InputError(
                    f"visual_span={(start, length)} of sample {sample} does not fit a sequence of "
                    f"{seq} tokens: start must be at least 0, length at least 1, and their sum at "
                    f"most {seq}."
                )
            images.append(Image(sample, start, length))
        for (first, length), (second, _) in pairwise(sorted(spans)):
            if first + length > second:
                raise InputError(
                    f"visual_span={spans} of sample {sample} is not valid: its images overlap."
                )
    return images


def _per_sample(span: VisualSpan, batch: int) -> list[list[Span]]:
    if _is_pair(span):
        return [[(int(span[0]), int(span[1]))] for _ in range(batch)]  # type: ignore[arg-type,call-overload]
    if isinstance(span, tuple | list) and len(span) == batch:
        samples: list[Any] = [[entry] if _is_pair(entry) else entry for entry in span]
        if all(isinstance(each, tuple | list) and all(map(_is_pair, each)) for each in samples):
            return [[(int(a), int(b)) for a, b in each] for each in samples]
    raise InputError(
        f"visual_span={span!r} is not valid: give (start, length), or a list with one entry for "
        f"each of the {batch} samples, each a (start, length) or a list of them."
    )


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )


def check_stated(
    stated: tuple[int | None, int | None], images: list[Image], first_token: list[int]
) -> None:
    """Compare stated lengths with what the input holds.

    Args:
        stated: ``(sys_length, image length)`` of the method; ``None`` entries are not checked.
        images: what was found.
        first_token: per sample, place of the first token that is not padding.

    Raises:
        InputError: stating both numbers.
    """
    sys_length, image_length = stated
    for sample in sorted({image.sample for image in images}):
        mine = [image for image in images if image.sample == sample]
        found_sys = mine[0].start - first_token[sample]
        found_length = sum(image.length for image in mine)
        if sys_length is not None and sys_length != found_sys:
            raise InputError(
                f"sys_length={sys_length} contradicts the input: {found_sys} tokens precede the "
                f"first visual token of sample {sample}. Leave it None to have it detected."
            )
        if image_length is not None and image_length != found_length:
            raise InputError(
                f"image token length {image_length} contradicts the input: sample {sample} has "
                f"{found_length} visual tokens. Leave it None to have it detected."
            )


Found = tuple[torch.Tensor, "Sequence[Sequence[Length]] | None"]
"""What a model's adapter saw of a prompt, see :data:`~vlm_prune_ext.engine.parts.SpanSink`."""


def images_found(found: Found, batch: int, length: int, whole_videos: bool) -> list[Image]:
    """Images of a prompt ``(batch, length)`` from what the adapter saw of it; a video is one image,
    or each of its frames is.

    Raises:
        InputError: that was another prompt.
    """
    mask, lengths = found
    beams = batch // mask.shape[0]
    if beams > 1 and tuple(mask.shape) == (batch // beams, length):
        mask = mask.repeat_interleave(beams, dim=0)  # seen before beams were made of it
        lengths = lengths and [row for row in lengths for _ in range(beams)]
    if tuple(mask.shape) != (batch, length):
        raise InputError(
            f"Visual tokens were found in an input of shape {tuple(mask.shape)}, but the "
            f"language model was called with {(batch, length)}."
        )
    return images_from_mask(mask, lengths, whole_videos)


def has_videos(found: Found | None) -> bool:
    """Whether what the adapter saw of a prompt holds videos."""
    lengths = None if found is None else found[1]
    return any(isinstance(one, tuple) for row in lengths or () for one in row)


def images_stated(stated: tuple[int | None, int | None], batch: int, length: int) -> list[Image]:
    """Images from the lengths that a method's fields state, where nothing else is known.

    Raises:
        InputError: they are not stated, or do not fit.
    """
    start, count = stated
    if start is None or count is None:
        raise InputError(
            "visual_span=None is not enough for a bare language model: give "
            "visual_span=(start, length), or sys_length and the image length in the method."
        )
    return images_from_argument((start, count), batch, length)
