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
DEFAULT_NEW_TOKENS = 1024
"""As lmms-eval's own models take it where a task states none."""

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


@dataclass(frozen=True)
class Decoding:
    """How to generate. Requests with equal settings may share a batch.

    Attributes:
        max_new_tokens: new tokens at most.
        until: texts that end an answer (and are not part of it).
        options: what else ``generate`` is given (``do_sample``, ``temperature``, ``top_p``,
            ``top_k``, ``num_beams``, ``repetition_penalty``), as sorted pairs; empty is greedy.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    until: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


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


def decoding_of(given: Mapping[str, Any]) -> Decoding:
    """A task's ``generation_kwargs`` (never changed here: lmms-eval's cache keys on them).

    Raises:
        InputError: ``until`` or ``max_new_tokens`` of another kind.
    """
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise InputError(f"until={given['until']!r} is not valid: a text or a list of texts.")
    count = given.get("max_new_tokens", given.get("max_gen_toks", DEFAULT_NEW_TOKENS))
    if isinstance(count, bool) or not isinstance(count, int | float) or count < 1:
        raise InputError(f"max_new_tokens={count!r} is not valid: an integer of at least 1.")
    return Decoding(int(count), tuple(stop for stop in until if stop), _options(given))


def _options(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What differs from greedy decoding. As in lmms-eval's own models, a temperature above 0
    means sampling, whatever ``do_sample`` says, and 0 means none."""
    options: dict[str, Any] = {}
    temperature = given.get("temperature")
    sample = bool(given.get("do_sample")) if temperature is None else temperature > 0
    if sample:
        options["do_sample"] = True
        for name in ("temperature", "top_p", "top_k"):
            if given.get(name) is not None:
                options[name] = given[name]
    for name, neutral in (("num_beams", 1), ("repetition_penalty", 1.0)):
        if given.get(name) not in (None, neutral):
            options[name] = given[name]
    return tuple(sorted(options.items()))


def fetch(dataset: Dataset, source: Source) -> Any:
    """A row of a task's data set. Its images are decoded here, so this may fail for one row."""
    return dataset[source.task][source.split][source.doc]


def chat_prompt(messages: Any, processor: Any, style: str | None) -> Prompt:
    """The prompt of a conversation in lmms-eval's form (``content`` items with ``type`` and
    ``text`` or ``url``).

    Raises:
        InputError: audio or video, an unknown role or item, an image that does not decode.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages={messages!r} is not valid: a list of messages.")
    _refuse_other_media(messages)
    if not any(_has_text(message) for message in messages if message.get("role") != "system"):
        return Prompt(fault="the question is empty")
    text, images = processor.messages(messages, style=style)
    return Prompt(text, images)


def simple_prompt(text: Any, visuals: Any, processor: Any, style: str | None) -> Prompt:
    """The prompt of a text and its images; ``<image>`` in the text places them, otherwise they go
    in front."""
    pictures = [visual for visual in (visuals or []) if visual is not None]
    if not isinstance(text, str) or not text.replace(IMAGE, "").strip():
        return Prompt(fault="the question is empty")
    if IMAGE in text:
        images = [open_image(picture) for picture in pictures]
        if text.count(IMAGE) != len(images):
            count = text.count(IMAGE)
            return Prompt(fault=f"the text has {count} {IMAGE} marker(s) for {len(images)} images")
        prompt, _ = processor.messages([{"role": "user", "content": text}], style=style)
        return Prompt(prompt, images)
    content = [{"type": "image", "image": picture} for picture in pictures]
    return chat_prompt(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}], processor, style
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
    content = message.get("content")
    if isinstance(content, str):
        return bool(content.strip())
    return any(
        item.get("type") == "text" and str(item.get("text") or "").strip() for item in content or ()
    )


def _refuse_other_media(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        content = message.get("content")
        for item in content if isinstance(content, list | tuple) else ():
            if item.get("type") in ("video", "audio"):
                raise InputError(f"{item['type']} is not supported: text and images are.")
