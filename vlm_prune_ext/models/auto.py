"""Families whose prompts and pixels the checkpoint's own processor makes.

``AutoProcessor`` turns text with one marker per image, and the images of each sample, into model
inputs; the checkpoint's chat template makes the text of a conversation. So a family is a line of
:data:`vlm_prune_ext.models.catalogue.FAMILIES`, and nothing here knows one from another.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoProcessor, BatchFeature

from vlm_prune_ext.engine.prompt import runs_of
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import generic
from vlm_prune_ext.models.base import (
    Family,
    LoadOptions,
    PromptProcessor,
    is_a,
    is_named,
    spelled,
)
from vlm_prune_ext.models.catalogue import FAMILIES, PICTURES, FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.clips import Clip, ReadyClip, chooser, is_video, read_clip
from vlm_prune_ext.models.images import ImageLike, Size
from vlm_prune_ext.models.loading import check_files, load_model
from vlm_prune_ext.models.prompts import IMAGE, VIDEO, Style, Turn

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
        marker: what stands for one image in the text that it is given; ``video_marker``: for one
            video, ``None`` where the family takes none.
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
        self.takes_videos = family in FAMILIES and FAMILIES[family].video
        self.video_marker = marker_of(processor, "video") if self.takes_videos else None
        self._images: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self._lengths: dict[Size, int] = {}
        if styles is None:
            styles = {}
            if getattr(processor, "chat_template", None):
                chat = ChatTemplate(
                    processor=processor, marker=self.marker, video_marker=self.video_marker
                )
                styles = {"chat": chat}
        styles = {"plain": Style(image=IMAGE, video=VIDEO), **styles}
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
        pixels = (
            image.width * image.height * (len(image.pixels) if is_video(image) else 1)
            for image in map(self.opened, images)
        )
        return len(text) // 4 + sum(pixels) // _PIXELS_A_TOKEN

    def ids_of(
        self, text: str, images: Sequence[ImageLike], *, style: str | None = None
    ) -> list[int] | None:
        """``None``: how many tokens an image becomes, the processor says with its pixels."""
        return None

    def visual_lengths(self, images: list[Any]) -> list[int]:
        """Of each by itself, as the processor says it once for each size; LLaVA-OneVision's looks
        at several pictures of one prompt less closely."""
        for image in images:
            if image.size not in self._lengths:
                ids = self._made([0], [self.marker], [[image]])["input_ids"]
                self._lengths[image.size] = int((ids == self.image_token_id).sum())
        return [self._lengths[image.size] for image in images]

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
        before, ids = self.unfilled_ids(known[0], images, style=style), known[1]
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
        return self._filled(self.unfilled_ids(text, images, style=style), filled)

    def unfilled_ids(
        self, text: str, images: Sequence[ImageLike], *, style: str | None = None
    ) -> list[int]:
        """See :meth:`PromptProcessor.unfilled_ids`."""
        marked = self._marked(self._style(style).single(text, len(images)), list(images))
        with self._tokenizing:
            return list(self.tokenizer(marked).input_ids)

    def _filled(self, ids: list[int], images: list[list[int]]) -> list[int]:
        waiting, made = iter(images), list[int]()
        for token in ids:
            made += next(waiting, []) if token == self.image_token_id else [token]
        return made

    def read_clip(self, clip: Clip | ReadyClip) -> ReadyClip:
        """See :meth:`PromptProcessor.read_clip`; the processor chooses frames."""
        if not self.takes_videos:
            return super().read_clip(clip)
        if isinstance(clip, ReadyClip):
            return clip
        if clip.frames is None and clip.fps is None and clip.is_file:
            clip = replace(clip, frames=self.frames, fps=self.fps)
        return read_clip(clip, chooser(self.processor.video_processor, clip))

    def shape_of(self, images: Sequence[Any]) -> Hashable:
        """See :meth:`PromptProcessor.shape_of`: frames of its videos, where a model takes those of
        a batch as one tensor."""
        videos = [len(one.pixels) for one in images if is_video(one)]
        if not videos or "video_grid_thw" in self.processor.video_processor.model_input_names:
            return None
        return tuple(sorted(set(videos)))

    def is_visual(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`PromptProcessor.is_visual`."""
        found = super().is_visual(input_ids)
        token = getattr(self.processor, "video_token_id", None)
        if not self.takes_videos or token is None:
            return found
        return found | (input_ids == token)

    def _encode(self, prompts: list[str], pictures: list[list[Any]]) -> BatchFeature:
        texts = [self._marked(text, own) for text, own in zip(prompts, pictures, strict=True)]
        parts = [(rows, self._made(rows, texts, pictures)) for rows in _alike(pictures)]
        data = self._joined(parts, len(texts)) if len(parts) > 1 else parts[0][1]
        self._note_images(data["input_ids"], pictures)
        self._check_mixture(data["input_ids"], pictures)
        return BatchFeature(self._moved(data))

    def _check_mixture(self, input_ids: torch.Tensor, pictures: list[list[Any]]) -> None:
        """Raise InputError where pictures and videos would be taken for each other: transformers
        (5.17) does so in GLM-4.1V, whose frames have the placeholders of images."""
        kinds = {is_video(one) for own in pictures for one in own}
        if len(kinds) == 2 and not bool((input_ids == self.processor.video_token_id).any()):
            raise InputError(
                f"{FAMILIES[self.family].title} takes pictures or videos in one call, not both."
            )

    def _note_images(self, input_ids: torch.Tensor, pictures: list[list[Any]]) -> None:
        """Remember which placeholders are which image's, where runs of them do not tell."""
        for ids, own in zip(input_ids.tolist(), pictures, strict=True):
            if any(map(is_video, own)):  # the model's inputs say what a video's are
                continue
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

    def _marked(self, text: str, own: Sequence[Any]) -> str:
        """The text with the processor's own markers in place of ours."""
        videos = sum(map(is_video, own))
        pieces = text.split(IMAGE)
        self._check_markers(len(pieces) - 1, len(own) - videos)
        made = []
        for piece in pieces:
            between = piece.split(VIDEO) if videos else [piece]
            videos -= len(between) - 1
            for part in between:
                self._check_text(part)
            made.append((self.video_marker or "").join(between))
        if videos:
            there = text.count(VIDEO)
            raise InputError(
                f"The prompt has {there} {VIDEO} marker(s) for {there + videos} video(s): give one "
                "marker per video, or none to have the videos put in front."
            )
        return self.marker.join(made)

    def _check_text(self, text: str) -> None:
        """Raise InputError where a text spells what stands for a part of an image or a video."""
        video = getattr(self.processor, "video_token", None)  # some look for it in the text
        if video and video in text:
            raise spelled(video)
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            if token in self.reserved:
                raise spelled(self.tokenizer.convert_ids_to_tokens(token))

    def _made(self, rows: list[int], texts: list[str], pictures: list[list[Any]]) -> Row:
        """What the processor makes of some rows of the batch, which have media of one kind."""
        shown = [[one for one in pictures[row] if not is_video(one)] for row in rows]
        clips = [one for row in rows for one in pictures[row] if is_video(one)]
        videos: dict[str, Any] = {}
        if clips:
            where = self.device if self.device_pixels else None
            frames = [torch.from_numpy(clip.pixels).to(where) for clip in clips]
            videos["videos"] = [one.permute(0, 3, 1, 2) for one in frames]
            videos["video_metadata"] = [clip.metadata() for clip in clips]
            videos["do_sample_frames"] = False
        with self._making([image for row in rows for image in pictures[row]], self.processor):
            images = [self._shown(own) for own in shown]
            made = self.processor(
                text=[texts[row] for row in rows],
                images=images if images[0] else None,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                **videos,
            )
        return {name: value for name, value in made.items() if name != "labels"}

    def _joined(self, parts: list[tuple[list[int], Row]], count: int) -> Row:
        """One batch of several, each row in its place, filled on the left."""
        joined: Row = {}
        width = max(made["input_ids"].shape[1] for _, made in parts)
        for rows, made in parts:
            here = made["input_ids"].shape
            for name, value in made.items():
                if value.shape[:2] != here:  # of the images or videos, in order
                    before = joined.get(name)
                    joined[name] = value if before is None else torch.cat([before, value])
                    continue
                fill = self.pad_token_id if name == "input_ids" else 0
                if name not in joined:
                    joined[name] = value.new_full((count, width), fill)
                joined[name][rows, width - here[1] :] = value
        return joined


def _alike(pictures: list[list[Any]]) -> list[list[int]]:
    """Rows that a processor takes together: all have images, or none has; the same of videos. Where
    a row has both, each is by itself, so that media stay in the order of the rows."""
    kinds = [(any(not is_video(one) for one in own), any(map(is_video, own))) for own in pictures]
    if (True, True) in kinds and len(set(kinds)) > 1:
        return [[row] for row in range(len(kinds))]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for row, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def _key(ids: Sequence[int], pad: int) -> tuple[int, ...]:
    """A prompt without what fills it up in front."""
    return tuple(dropwhile(lambda token: token == pad, ids))


def _reserved(processor: Any) -> Iterable[int]:
    """Ids of tokens that stand for a part of an image or a video."""
    yield from (i for i in processor.image_token_ids if i is not None)
    video = getattr(processor, "video_token_id", None)
    if video is not None:
        yield video


def marker_of(processor: Any, kind: str = "image") -> str:
    """What stands for an image (or ``"video"``) in the text that a processor is given, with what
    its chat template puts around it."""
    token = str(getattr(processor, f"{kind}_token"))
    if not getattr(processor, "chat_template", None):
        return token
    before, behind = "what stands before", "what stands behind"
    texts = [{"type": "text", "text": text} for text in (before, behind)]
    item = [texts[0], {"type": kind}, texts[1]]
    said = processor.apply_chat_template([{"role": "user", "content": item}], tokenize=False)
    framed = said.partition(before)[2].partition(behind)[0].strip()
    return framed if framed.count(token) == 1 else token  # some put all images in front


@dataclass(frozen=True)
class ChatTemplate(Style):
    """The checkpoint's own conversation template.

    Attributes:
        processor: has it.
        marker: what it writes for an image; ``video_marker``: for a video, if the family takes any.
    """

    processor: Any = field(default=None, compare=False)
    marker: str = IMAGE
    video_marker: str | None = None
    image: str = IMAGE
    video: str = VIDEO

    def conversation(self, turns: Sequence[Turn]) -> str:
        """See :meth:`Style.conversation`.

        Raises:
            InputError: the template does not take such a conversation, e.g. no system turn.
        """
        markers = {self.marker: IMAGE}
        if self.video_marker is not None:
            markers[self.video_marker] = VIDEO
        for turn in turns:
            for theirs, ours in markers.items():
                if theirs in turn.text.replace(IMAGE, "").replace(ours, ""):
                    raise spelled(theirs)
        chat = [
            {"role": turn.role, "content": _items(turn.text, self.video_marker is not None)}
            for turn in turns
        ]
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
        for theirs, ours in markers.items():
            said = said.replace(theirs, ours)
        return self._without_start(said)

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


def _items(text: str, videos: bool = False) -> list[dict[str, str]]:
    """The text of a turn as the items of a message; ``videos``: it may hold some."""
    items: list[dict[str, str]] = []
    for piece in re.split(f"({IMAGE}|{VIDEO})" if videos else f"({IMAGE})", text):
        if piece == IMAGE or (videos and piece == VIDEO):
            items.append({"type": "image" if piece == IMAGE else "video"})
        elif piece:
            items.append({"type": "text", "text": piece})
    return items or [{"type": "text", "text": ""}]
