"""lmms-eval's requests in our terms: a conversation with images, and how to answer it.

lmms-eval has two interfaces. Chat models are handed a function that makes messages of a sample;
simple models a text and a function that gives the sample's images. Both end up as one prompt text
with its images, made by the same templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.images import open_image

IMAGE = "<image>"
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
        InputError: audio or video, an unknown role or item, an image that does not decode, markers
            and images that differ in number.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages={messages!r} is not valid: a list of messages.")
    _refuse_other_media(messages)
    if not any(_has_text(message) for message in messages if message.get("role") != "system"):
        return Prompt(fault="the question is empty")
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
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": text if isinstance(text, str) else ""})
    return chat_prompt([{"role": "user", "content": content}], processor, style)


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
    if any(_kind_of(item) not in ("image", "text") for item in items) or not (markers or images):
        return message  # the processor names what it does not know
    if markers not in (0, len(images)) and not (markers == 1 and images):
        raise InputError(f"the text has {markers} {IMAGE} marker(s) for {len(images)} image(s)")
    found += images
    if markers == 1:
        said = said.replace(IMAGE, " ".join([IMAGE] * len(images)))
    return {**message, "content": said if markers else _joined(items)}


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
        (item[n] for n in ("url", "image", "path", "value") if item.get(n) is not None), None
    )


def or_fault(make: Callable[[], Prompt]) -> Prompt:
    """A prompt, or what went wrong with this one sample.

    Everything is caught: rows are read and prompts are made by code of the task, and one bad row
    must not cost the others.
    """
    try:
        return make()
    except Exception as error:
        said = str(error).strip() or "no message"
        return Prompt(fault=said if isinstance(error, InputError) else f"{_kind(error)}: {said}")


def _kind(error: Exception) -> str:
    return type(error).__name__


def _has_text(message: Mapping[str, Any]) -> bool:
    return any(_said(item).replace(IMAGE, "").strip() for item in _items(message))


def _refuse_other_media(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        for item in _items(message):
            if _kind_of(item) in ("video", "audio"):
                raise InputError(f"{_kind_of(item)} is not supported: text and images are.")
