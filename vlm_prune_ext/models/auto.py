"""Families whose prompts and pixels the checkpoint's own processor makes.

``AutoProcessor`` turns text with one marker per image, and the images of each sample, into model
inputs; the checkpoint's chat template makes the text of a conversation. So a family is a line of
:data:`vlm_prune_ext.models.catalogue.FAMILIES`, and nothing here knows one from another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

import torch
import transformers
from PIL.Image import Image
from torch import nn
from transformers import AutoProcessor, BatchFeature

from vlm_prune_ext.engine.prompt import runs_of
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import generic
from vlm_prune_ext.models.base import (
    PICTURES,
    Family,
    LoadOptions,
    PromptProcessor,
    is_a,
    is_named,
    spelled,
)
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.images import ImageLike, open_image
from vlm_prune_ext.models.loading import check_files, load_model
from vlm_prune_ext.models.prompts import IMAGE, Style, Turn

Row = dict[str, torch.Tensor]
_ROOM = 4096  # prompts, the newest
_PIXELS_A_TOKEN = 28 * 28  # as Qwen has it


def family_of(line: FamilyLine) -> Family:
    """What a line of the table says, as code."""

    def load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
        processor = read_processor(source, options.pictures)
        model = load_model(getattr(transformers, line.architectures[0]), source, options)
        return model, AutoPrompts(model, processor, line.name)

    def owns(model: nn.Module) -> bool:
        return is_a(model, line.architectures) and generic.owns(model)

    named = is_named(*line.architectures)
    return Family(line, owns, generic.parts, named, load, read_processor)


def read_processor(source: Checkpoint, pictures: Mapping[str, Any]) -> Any:
    """The processor of a checkpoint, with settings of its pictures.

    Raises:
        InputError: it has none, one that cannot be made, or that has no such setting.
    """
    what = f"checkpoint {source.name!r}"
    check_files(source)
    try:
        made = AutoProcessor.from_pretrained(
            str(source.folder), trust_remote_code=False, **pictures
        )
    except Exception as error:  # many kinds, by what is wrong in the files
        said = first_line(error)
        raise InputError(f"The processor of {what} cannot be made: {said}") from error
    takes = getattr(made.image_processor.valid_kwargs, "__annotations__", {})
    known = [name for name in PICTURES if name in takes]
    for name in pictures:
        if name not in known:
            raise InputError(
                f"{name} is no setting of {type(made.image_processor).__name__}, which makes the "
                f"pixels of {what}; accepted: {', '.join(known)}."
            )
    return made


class AutoPrompts(PromptProcessor):
    """Prompts and pixels as the checkpoint's own processor makes them.

    Args:
        model: as in :class:`PromptProcessor`.
        processor: transformers' processor of the checkpoint.
        family: short family name.
        styles: conversation templates beside ``plain``, the default one first; ``None``: the
            checkpoint's own, named ``chat``, if it has one.
        image_token_id: the placeholder, where the model's configuration does not say it.

    Attributes:
        processor: as above.
        marker: what stands for one image in the text that it is given.
        reserved: ids that no text of a user may become.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        family: str,
        styles: Mapping[str, Style] | None = None,
        image_token_id: int | None = None,
    ) -> None:
        self.processor, self.marker = processor, marker_of(processor)
        self._images: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        if styles is None:
            styles = {}
            if getattr(processor, "chat_template", None):
                styles = {"chat": ChatTemplate(processor=processor, marker=self.marker)}
        styles = {"plain": Style(image=IMAGE), **styles}
        token = generic.token_of(model.config) if image_token_id is None else image_token_id
        assert token is not None
        super().__init__(
            model,
            processor.tokenizer,
            processor.image_processor,
            token,
            family,
            next((name for name in styles if name != "plain"), "plain"),
            styles,
        )
        self.reserved = {token, *_reserved(processor)}
        if self.tokenizer.pad_token_id in (None, token):
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.pad_token_id)

    def length(self, text: str, images: Sequence[ImageLike], style: str | None) -> int:
        """A guess: the processor alone knows, once it has made the pixels."""
        pixels = (image.width * image.height for image in map(open_image, images))
        return len(text) // 4 + sum(pixels) // _PIXELS_A_TOKEN

    def ids_of(
        self, text: str, images: Sequence[ImageLike], *, style: str | None = None
    ) -> list[int] | None:
        """``None``: how many tokens an image becomes, the processor says with its pixels."""
        return None

    def ids_like(
        self,
        text: str,
        images: Sequence[ImageLike],
        known: tuple[str, list[int]],
        *,
        style: str | None = None,
    ) -> list[int] | None:
        """Token ids of one question's prompt, by another about the same images; ``None``: it is
        not plain what of that one stands for an image.

        Args:
            text, images, style: as in :meth:`prompt`.
            known: the other's text, and its token ids.
        """
        before, ids = self._unfilled(known[0], images, style), known[1]
        places = [place for place, token in enumerate(before) if token == self.image_token_id]
        runs = runs_of([place for place, token in enumerate(ids) if token == self.image_token_id])
        if len(places) == 1 and len(runs):  # whatever stands for the one image, its frame included
            behind = len(before) - places[0] - 1
            filled = [ids[places[0] : len(ids) - behind]]
        else:
            filled = [ids[start : start + count] for start, count in runs]
        special = set(self.tokenizer.get_added_vocab().values()) | {self.image_token_id}
        if not all(one and one[0] in special and one[-1] in special for one in filled):
            return None
        if self._filled(before, filled) != ids:
            return None
        return self._filled(self._unfilled(text, images, style), filled)

    def _unfilled(self, text: str, images: Sequence[ImageLike], style: str | None) -> list[int]:
        """A prompt's tokens with one placeholder for each image."""
        marked = self._marked(self._style(style).single(text, len(images)), list(images))  # type: ignore[arg-type]
        with self._tokenizing:
            return list(self.tokenizer(marked).input_ids)

    def _filled(self, ids: list[int], images: list[list[int]]) -> list[int]:
        waiting, made = iter(images), list[int]()
        for token in ids:
            made += next(waiting, []) if token == self.image_token_id else [token]
        return made

    def _encode(self, prompts: list[str], pictures: list[list[Image]]) -> BatchFeature:
        texts = [self._marked(text, own) for text, own in zip(prompts, pictures, strict=True)]
        # Processors take a batch whose samples all have images, or none that has.
        shown = [row for row, own in enumerate(pictures) if own]
        unseen = [row for row, own in enumerate(pictures) if not own]
        parts = [(rows, self._made(rows, texts, pictures)) for rows in (shown, unseen) if rows]
        data = self._joined(parts, len(texts)) if len(parts) > 1 else parts[0][1]
        self._note_images(data["input_ids"], pictures)
        return BatchFeature(self._moved(data))

    def _note_images(self, input_ids: torch.Tensor, pictures: list[list[Image]]) -> None:
        """Remember which placeholders are which image's, where runs of them do not tell."""
        for ids, own in zip(input_ids.tolist(), pictures, strict=True):
            places = [place for place, token in enumerate(ids) if token == self.image_token_id]
            if len(runs_of(places)) == len(own):
                continue
            lengths = [len(places)]
            if len(own) > 1:
                alone = [self._made([0], [self.marker], [[image]]) for image in own]
                lengths = [int((a["input_ids"] == self.image_token_id).sum()) for a in alone]
            if sum(lengths) != len(places):  # several images are looked at less closely than one
                lengths = [len(places) // len(own)] * len(own)
            self._images[_key(ids, self.pad_token_id)] = lengths
        while len(self._images) > _ROOM:
            self._images.popitem(last=False)

    def image_lengths(self, input_ids: torch.Tensor) -> list[list[int]] | None:
        """Visual tokens of each image of prompts that this processor made; ``None``: every unbroken
        run of placeholders is one image.

        Args:
            input_ids: int64 ``(batch, seq)``.
        """
        if not self._images:
            return None
        rows = input_ids.tolist()
        found = [self._images.get(_key(ids, self.pad_token_id)) for ids in rows]
        if not any(found):
            return None
        return [own or self._run_lengths(ids) for own, ids in zip(found, rows, strict=True)]

    def _run_lengths(self, ids: list[int]) -> list[int]:
        places = [place for place, token in enumerate(ids) if token == self.image_token_id]
        return [length for _, length in runs_of(places)]

    def _marked(self, text: str, own: list[Image]) -> str:
        """The text with the processor's own markers in place of ours."""
        pieces = text.split(IMAGE)
        self._check_markers(len(pieces) - 1, len(own))
        for piece in pieces:
            self._check_text(piece)
        return self.marker.join(pieces)

    def _check_text(self, text: str) -> None:
        """Raise InputError where a text spells what stands for a part of an image or a video."""
        video = getattr(self.processor, "video_token", None)  # some look for it in the text
        if video and video in text:
            raise spelled(video)
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            if token in self.reserved:
                raise spelled(self.tokenizer.convert_ids_to_tokens(token))

    def _made(self, rows: list[int], texts: list[str], pictures: list[list[Image]]) -> Row:
        """What the processor makes of some rows of the batch."""
        shown = [pictures[row] for row in rows]
        with self._making([image for own in shown for image in own], self.processor):
            images = [self._shown(own) for own in shown]
            made = self.processor(
                text=[texts[row] for row in rows],
                images=images if images[0] else None,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        return {name: value for name, value in made.items() if name != "labels"}

    def _joined(self, parts: list[tuple[list[int], Row]], count: int) -> Row:
        """One batch of several, each row in its place, filled on the left."""
        joined: Row = {}
        width = max(made["input_ids"].shape[1] for _, made in parts)
        for rows, made in parts:
            here = made["input_ids"].shape
            for name, value in made.items():
                if value.shape[:2] != here:
                    joined[name] = value  # of the images, in order
                    continue
                fill = self.pad_token_id if name == "input_ids" else 0
                if name not in joined:
                    joined[name] = value.new_full((count, width), fill)
                joined[name][rows, width - here[1] :] = value
        return joined


def _key(ids: Sequence[int], pad: int) -> tuple[int, ...]:
    """A prompt without what fills it up in front."""
    return tuple(dropwhile(lambda token: token == pad, ids))


def _reserved(processor: Any) -> Iterable[int]:
    """Ids of tokens that stand for a part of an image or a video."""
    yield from (i for i in processor.image_token_ids if i is not None)
    video = getattr(processor, "video_token_id", None)
    if video is not None:
        yield video


def marker_of(processor: Any) -> str:
    """What stands for an image in the text that a processor is given, with what its chat template
    puts around it."""
    token = str(processor.image_token)
    if not getattr(processor, "chat_template", None):
        return token
    before, behind = "what stands before", "what stands behind"
    texts = [{"type": "text", "text": text} for text in (before, behind)]
    item = [texts[0], {"type": "image"}, texts[1]]
    said = processor.apply_chat_template([{"role": "user", "content": item}], tokenize=False)
    framed = said.partition(before)[2].partition(behind)[0].strip()
    return framed if framed.count(token) == 1 else token  # some put all images in front


@dataclass(frozen=True)
class ChatTemplate(Style):
    """The checkpoint's own conversation template.

    Attributes:
        processor: has it.
        marker: what it writes for an image.
    """

    processor: Any = field(default=None, compare=False)
    marker: str = IMAGE
    image: str = IMAGE

    def conversation(self, turns: Sequence[Turn]) -> str:
        """See :meth:`Style.conversation`.

        Raises:
            InputError: the template does not take such a conversation, e.g. no system turn.
        """
        for turn in turns:
            if self.marker in turn.text.replace(IMAGE, ""):
                raise spelled(self.marker)
        chat = [{"role": turn.role, "content": _items(turn.text)} for turn in turns]
        goes_on = bool(turns) and turns[-1].role == "assistant"
        try:
            said = self.processor.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        except Exception as error:  # whatever the template raises
            raise InputError(
                f"The checkpoint's chat template does not take this conversation: "
                f"{first_line(error)}"
            ) from error
        return self._without_start(said).replace(self.marker, IMAGE)

    def _without_start(self, text: str) -> str:
        """Some templates write the start token, which the tokenizer puts in front by itself."""
        tokenizer = self.processor.tokenizer
        start = tokenizer.bos_token
        if (
            start
            and text.startswith(start)
            and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        ):
            return text.removeprefix(start)
        return text


def _items(text: str) -> list[dict[str, str]]:
    """The text of a turn as the items of a message."""
    items: list[dict[str, str]] = []
    for place, piece in enumerate(text.split(IMAGE)):
        items += [{"type": "image"}] if place else []
        items += [{"type": "text", "text": piece}] if piece else []
    return items or [{"type": "text", "text": ""}]
