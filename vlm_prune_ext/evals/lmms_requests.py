"""lmms-eval's requests in our terms: a conversation with images, and how to answer it.

lmms-eval has two interfaces. Chat models are handed a function that makes messages of a sample;
simple models a text and a function that gives the sample's images. Both end up as one prompt text
with its images, made by the same templates.
"""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lmms_eval.api.instance import Instance

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.evals.answer import Query
from vlm_prune_ext.evals.decoding import Decoding, decoding_of
from vlm_prune_ext.models.clips import Clip
from vlm_prune_ext.models.images import digest_of, open_image
from vlm_prune_ext.models.prompts import IMAGE, VIDEO

Messages = list[dict[str, Any]]
Dataset = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Source:
    """Where a sample comes from: ``task``, ``split``, row ``doc``."""

    task: str
    split: str
    doc: Any

    def __str__(self) -> str:
        return f"task {self.task}, split {self.split}, sample {self.doc}"


@dataclass
class Prompt:
    """One prompt, or why there is none.

    Attributes:
        text: whole text, with one ``<image>`` per image.
        images: RGB images, in order.
        fault: one sentence, where the sample cannot be answered.
    """

    text: str = ""
    images: list[Any] = field(default_factory=list)
    fault: str = ""


def fetch(dataset: Dataset, source: Source) -> Any:
    """A row of a task's data set. Its images are decoded here, so this may fail for one row."""
    return dataset[source.task][source.split][source.doc]


def chat_prompt(messages: Any, processor: Any, style: str | None) -> Prompt:
    """The prompt of a conversation in lmms-eval's form (``content`` items with ``type`` and
    ``text`` or ``url``).

    Text that spells ``<image>``, as several benchmarks word their questions, places the images of
    its message: one each, or all of them at the only marker.

    Raises:
        InputError: audio, a video where the family takes none, an unknown role or item, an image
            that does not decode, markers and images that differ in number.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages={messages!r} is not valid: a list of messages.")
    _refuse_other_media(messages, processor)
    if not any(_has_text(message) for message in messages if message.get("role") != "system"):
        return Prompt(fault="the question is empty")
    messages = [_without_video_markers(message) for message in messages]
    # Other families, and VLMEvalKit's template, have images where they put them, unless told.
    spelled = any(IMAGE in _said(item) for message in messages for item in _items(message))
    as_lmms_eval = processor.family in _LLAVA and style != "vlmeval"
    if not as_lmms_eval and not spelled:
        return Prompt(*processor.messages(messages, style=style))
    images: list[Any] = []
    written = [_write_images(message, images) for message in messages]
    text, _ = processor.messages(written, style=style)
    return Prompt(text, images)


def simple_prompt(text: Any, visuals: Any, processor: Any, style: str | None) -> Prompt:
    """The prompt of a text and its images; see :func:`chat_prompt`."""
    pictures = [visual for visual in (visuals or []) if visual is not None]
    content: list[dict[str, Any]] = [{"type": kind_of(one), "value": one} for one in pictures]
    content.append({"type": "text", "text": text if isinstance(text, str) else ""})
    return chat_prompt([{"role": "user", "content": content}], processor, style)


def kind_of(visual: Any) -> str:
    """Whether what a task hands over for a sample is an ``image`` or a ``video``: a file by its
    name, an array or list of frames, or an open reader of one."""
    if isinstance(visual, str | os.PathLike):
        kind = mimetypes.guess_type(os.fspath(visual))[0] or ""
        return "video" if kind.startswith("video/") else "image"
    frames = isinstance(visual, list | tuple) or hasattr(visual, "get_avg_fps")
    return "video" if frames or getattr(visual, "ndim", 0) == 4 else "image"


_LLAVA = ("llava", "llava_next")


def _write_images(message: Mapping[str, Any], found: list[Any]) -> Mapping[str, Any]:
    """A message whose images are markers in its text, the way lmms-eval's own LLaVA writes them:
    side by side they are joined by blanks, and a line break divides them from the text.

    Args:
        message: in lmms-eval's form.
        found: takes the images, opened.
    """
    items = _items(message)
    images = [open_image(_source(item)) for item in items if _kind_of(item) == "image"]
    said = "".join(_said(item) for item in items)
    markers = said.count(IMAGE)
    others = {_kind_of(item) for item in items} - {"image", "text"}
    if markers and "video" in others:
        raise InputError(f"the text has {markers} {IMAGE} marker(s) beside a video: leave them out")
    if others or not (markers or images):
        return message  # the processor names what it does not know
    if markers not in (0, len(images)) and not (markers == 1 and images):
        raise InputError(f"the text has {markers} {IMAGE} marker(s) for {len(images)} image(s)")
    found += images
    if markers == 1:
        said = said.replace(IMAGE, " ".join([IMAGE] * len(images)))
    return {**message, "content": said if markers else _joined(items)}


def _without_video_markers(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with videos stands as its items do, whatever its text spells."""
    items = _items(message)
    if all(_kind_of(item) != "video" for item in items):
        return message
    said = [
        {**i, "text": _said(i).replace(VIDEO, "")} if _kind_of(i) == "text" else i for i in items
    ]
    return {**message, "content": said}


def _joined(items: Sequence[Mapping[str, Any]]) -> str:
    text, last = "", ""
    for item in items:
        kind = _kind_of(item)
        between = {("image", "image"): " ", ("image", "text"): "\n"}.get((last, kind), "")
        text += between + (IMAGE if kind == "image" else _said(item))
        last = kind
    return text


def _items(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list | tuple) else ()


def _kind_of(item: Any) -> str:
    return str(item.get("type")) if isinstance(item, Mapping) else ""


def _said(item: Any) -> str:
    return str(item.get("text") or "") if _kind_of(item) == "text" else ""


def _source(item: Mapping[str, Any]) -> Any:
    return next(
        (item[n] for n in ("url", "image", "video", "path", "value") if item.get(n) is not None),
        None,
    )


def or_fault(make: Callable[[], Prompt]) -> Prompt:
    """A prompt, or what went wrong with this one sample.

    Everything is caught: rows are read and prompts are made by code of the task, and one bad row
    must not cost the others.
    """
    try:
        return make()
    except Exception as error:
        return Prompt(fault=reason_of(error))


def _has_text(message: Mapping[str, Any]) -> bool:
    return any(_said(item).replace(IMAGE, "").strip() for item in _items(message))


def _refuse_other_media(messages: Sequence[Mapping[str, Any]], processor: Any) -> None:
    for message in messages:
        for item in _items(message):
            if _kind_of(item) == "audio":
                raise InputError("audio is not supported: text, images and videos are.")
            if _kind_of(item) == "video" and not processor.takes_videos:
                processor.read_clip(Clip(_source(item)))


# -- requests --------------------------------------------------------------------------------------
@dataclass
class Task:
    """One request.

    Attributes:
        source: where it comes from.
        decoding: how it is answered.
        prompt: makes its prompt.
    """

    source: Source
    decoding: Decoding
    prompt: Callable[[], Prompt]

    def query(self) -> Query:
        """It as a question.

        Raises:
            Exception: whatever the task's code raises on a broken row.
        """
        prompt = self.prompt()
        if prompt.fault:
            raise InputError(prompt.fault)
        return Query(
            prompt.text,
            prompt.images,
            style="plain",
            max_new_tokens=self.decoding.max_new_tokens,
            until=self.decoding.until,
            options=dict(self.decoding.options),
        )


@dataclass(frozen=True)
class Step:
    """What a task says to the answers so far.

    Attributes:
        prompt: makes the next prompt; ``None``: it was the last round.
        answers: the answers as the task wants them kept; ``None``: as they are.
        info: what the task wants to be handed back.
    """

    prompt: Callable[[], Prompt] | None
    answers: Sequence[str] | None = None
    info: Any = None


Follow: TypeAlias = "Callable[[int, list[str], Any], Step]"
"""``follow(round, answers, info)``: what comes after ``round`` rounds."""


@dataclass
class Talk(Task):
    """A request on its way through several rounds, whose ``prompt`` is that of the round to come.

    Attributes:
        follow: asks the task what comes next.
        answers: one per round.
        over: whether the task has ended it.
    """

    follow: Follow
    answers: list[str] = field(default_factory=list)
    over: bool = False
    _rounds: int = 0
    _info: Any = None

    def advance(self, answer: str) -> None:
        """Take the answer of this round and ask the task for the next. A task that fails here
        fails the run: its code, not the sample, decides what comes next."""
        self.answers.append(answer)
        self._rounds += 1
        step = self.follow(self._rounds, list(self.answers), self._info)
        self._info = step.info
        if step.answers is not None:
            self.answers = [str(one) for one in step.answers]
        if step.prompt is None:
            self.over = True
        else:
            self.prompt = step.prompt


class Reader:
    """What lmms-eval's requests ask for.

    Args:
        model: the lmms-eval model; its ``task_dict`` and ``is_simple`` are read at each call.
        processor: makes prompts.
        style: conversation template; ``None``: the family's own.
    """

    def __init__(self, model: Any, processor: Any, style: str | None) -> None:
        self._model, self._processor, self._style = model, processor, style

    def task(self, request: Instance) -> Task:
        """A request for one answer."""
        if self._model.is_simple:
            text, given, to_visual, doc, task, split = request.args
            source = Source(task, split, doc)
            return Task(source, decoding_of(given), self._simple(source, text, to_visual))
        _, to_messages, given, doc, task, split = request.args
        source = Source(task, split, doc)
        return Task(source, decoding_of(given), self._chat(source, to_messages))

    def pictures(self, sources: Sequence[Source]) -> list[Hashable]:
        """The same for samples with the same pictures, as far as their data set stores pictures as
        such; ``None``: not known."""
        found: dict[Source, Hashable] = {}
        sets: dict[tuple[str, str], list[Source]] = {}
        for source in sources:
            sets.setdefault((source.task, source.split), []).append(source)
        for (task, split), mine in sets.items():
            docs = [source.doc for source in mine]
            for start in range(0, len(docs), _AT_ONCE):
                digests = _digests(self.data[task][split], docs[start : start + _AT_ONCE])
                found.update(zip(mine[start : start + _AT_ONCE], digests, strict=False))
        return [found.get(source) for source in sources]

    @property
    def data(self) -> Dataset:
        """The tasks' data: task -> split -> rows."""
        data: Dataset = self._model.task_dict
        return data

    def _simple(
        self, source: Source, text: Any, to_visual: Callable[[Any], Any] | None
    ) -> Callable[[], Prompt]:
        def make() -> Prompt:
            row = fetch(self.data, source)
            visuals = to_visual(row) if to_visual is not None else None
            return simple_prompt(text, visuals, self._processor, self._style)

        return make

    def _chat(self, source: Source, to_messages: Callable[[Any], Any]) -> Callable[[], Prompt]:
        def make() -> Prompt:
            messages = to_messages(fetch(self.data, source))
            return chat_prompt(messages, self._processor, self._style)

        return make

    def likelihood(self, request: Instance) -> tuple[Source, Callable[[], Prompt], str]:
        """Source, prompt and continuation of a request for a likelihood."""
        if len(request.args) == 2:  # likelihood of a continuation without its question
            text, continuation = request.args
            source = Source(request.task_name, "", request.doc_id)
            return source, lambda: self._bare(text), continuation
        text, target, to_visual, doc, task, split = request.args
        source = Source(task, split, doc)
        if not isinstance(target, str):
            target = str(target(fetch(self.data, source)))
        return source, self._simple(source, text, to_visual), target

    def _bare(self, text: str) -> Prompt:
        chat = [{"role": "user", "content": text}]
        prompt, _ = self._processor.messages(chat, style=self._style)
        return Prompt(prompt)

    def talk(self, request: Instance) -> Talk:
        """A request for answers in rounds."""
        if self._model.is_simple:
            text, given, to_visual, to_text, doc, task, split = request.args
            source = Source(task, split, doc)
            first = self._simple(source, text, to_visual)
            follow = self._simple_follow(source, to_text)
        else:
            _, to_messages, given, doc, task, split = request.args
            source = Source(task, split, doc)
            first = self._chat(source, to_messages)
            follow = self._chat_follow(source, to_messages)
        return Talk(source, decoding_of(given), first, follow)

    def _simple_follow(self, source: Source, to_text: Callable[..., Any]) -> Follow:
        def follow(number: int, answers: list[str], info: Any) -> Step:
            row = fetch(self.data, source)
            said = to_text(row, previous_output=answers, round_idx=number, previous_round_info=info)
            if not (isinstance(said, tuple) and len(said) == 5):
                return Step(None)
            visuals, text, terminal, answers, info = said
            if terminal:
                return Step(None, answers, info)
            make = self._simple(source, text, lambda _: visuals)
            return Step(make, answers, info)

        return follow

    def _chat_follow(self, source: Source, to_messages: Callable[..., Any]) -> Follow:
        def follow(number: int, answers: list[str], info: Any) -> Step:
            row = fetch(self.data, source)
            said = to_messages(
                row, round_idx=number, previous_output=answers, previous_round_info=info
            )
            if not (isinstance(said, tuple) and len(said) == 4):
                return Step(None)
            messages, terminal, _, info = said
            if terminal:
                return Step(None, None, info)
            return Step(self._chat(source, lambda _: messages), None, info)

        return follow


_AT_ONCE = 256  # samples whose pictures are read together


def _digests(dataset: Any, docs: list[Any]) -> list[Hashable]:
    """Digests of the stored pictures of some samples; nothing where there are none."""
    return [
        tuple(digest_of(one) if isinstance(one, bytes) else one for one in own)
        for own in stored_pictures(dataset, docs)
    ]


def stored_pictures(dataset: Any, docs: list[Any]) -> list[tuple[bytes | str, ...]]:
    """Pictures of some samples as their data set stores them, files or paths; nothing where it
    stores none."""
    names = [
        name
        for name, kind in (getattr(dataset, "features", None) or {}).items()
        if type(kind).__name__ == "Image"
    ]
    if not names:
        return []
    from datasets import Image

    stored = dataset.select_columns(names)
    for name in names:
        stored = stored.cast_column(name, Image(decode=False))
    rows = stored[docs]
    return [
        tuple(one["bytes"] if one and one["bytes"] else str(one and one["path"]) for one in own)
        for own in zip(*(rows[name] for name in names), strict=True)
    ]
