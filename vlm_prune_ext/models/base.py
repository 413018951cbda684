"""What every family adapter has in common: the record of a family, and the prompt processor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError, RowError, unknown_name
from vlm_prune_ext.models.catalogue import FAMILIES, PICTURES, VIDEOS, FamilyLine
from vlm_prune_ext.models.checkpoint import FETCHING, first_line
from vlm_prune_ext.models.clips import Clip, ReadyClip, check_sampling, is_video
from vlm_prune_ext.models.images import ImageLike, ReadyImage, bytes_of, on_device, open_image
from vlm_prune_ext.models.prompts import IMAGE, STYLES, VIDEO, Style, Turn, blank_in_front
from vlm_prune_ext.models.questions import Questions, answers_for
from vlm_prune_ext.models.resize import AsOnCpu

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm_prune_ext.models.checkpoint import Checkpoint

_TEXTS = 4096  # pieces of prompts whose tokens are remembered


@dataclass(frozen=True)
class LoadOptions:
    """How to load a checkpoint.

    Attributes:
        dtype: of weights and activations.
        device: where the model goes; not used where ``extra`` has a ``device_map``.
        attn_implementation: ``"sdpa"``, ``"eager"``, ... or ``None`` for transformers' choice.
        extra: further keyword arguments of transformers' ``from_pretrained`` (``device_map``,
            ``quantization_config``, ``revision``, ...): names in :data:`KEYWORDS`.
        pictures: settings of the image processor: names in :data:`PICTURES`.
    """

    dtype: torch.dtype
    device: torch.device
    attn_implementation: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trust_remote_code(self) -> bool:
        """Whether the user trusts code that comes with the checkpoint."""
        return bool(self.extra.get("trust_remote_code", False))

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained`` of a local folder, but for
        ``trust_remote_code``."""
        arguments: dict[str, Any] = {"dtype": self.dtype, "device_map": {"": self.device}}
        if self.attn_implementation is not None:
            arguments["attn_implementation"] = self.attn_implementation
        arguments |= self.extra
        for name in ("trust_remote_code", *FETCHING):  # done with when the folder is there
            arguments.pop(name, None)
        return arguments


KEYWORDS = (
    "allow_all_kernels",
    "cache_dir",
    "device_map",
    "device_mesh",
    "distributed_config",
    "experts_implementation",
    "force_download",
    "kernel_config",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "quantization_config",
    "revision",
    "token",
    "tp_plan",
    "tp_size",
    "trust_remote_code",
    "use_kernels",
    "use_safetensors",
    "weights_only",
)
"""Further arguments of transformers' ``from_pretrained`` that loading a model takes."""


def check_keywords(given: Mapping[str, Any]) -> None:
    """Raise InputError where an argument of loading is unknown, or is no truth value where it must
    be one."""
    own = ("dtype", "device", "attn_implementation")
    for name in given:
        if name not in (*KEYWORDS, *PICTURES, *VIDEOS):
            raise unknown_name("keyword of load()", name, (*own, *KEYWORDS, *PICTURES, *VIDEOS))
    check_sampling(given.get("frames"), given.get("fps"))
    for name in ("min_pixels", "max_pixels"):
        value = given.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r} is not valid: pixels of an image, 1 or more.")
    trust = given.get("trust_remote_code", False)
    if not isinstance(trust, bool):
        raise InputError(f"trust_remote_code={trust!r} is not valid: True or False.")


@dataclass(frozen=True)
class Family:
    """The code behind one family of models.

    Attributes:
        line: what there is to say about it.
        owns: whether a live model is one of this family's.
        parts: where its parts are.
        recognises: whether a ``config.json`` is one of this family's.
        load: model and processor from a checkpoint; ``None`` where only live models are taken.
        read_processor: the processor of a checkpoint with settings of its pictures, or InputError
            about one that it does not have; ``None`` where there are no such settings.
    """

    line: FamilyLine
    owns: Callable[[nn.Module], bool]
    parts: Callable[[Any], ModelParts]
    recognises: Callable[[Mapping[str, Any]], bool] | None = None
    load: Callable[[Checkpoint, LoadOptions], tuple[Any, PromptProcessor]] | None = None
    read_processor: Callable[[Checkpoint, Mapping[str, Any]], Any] | None = None


def _written(text: str) -> str:
    """A text as it is.

    Raises:
        InputError: it holds half a surrogate pair (JSON's ``\\ud800``), which is no sign.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The text holds {text[error.start]!a}, which is no sign.") from error
    return text


def is_named(*architectures: str) -> Callable[[Mapping[str, Any]], bool]:
    """For :attr:`Family.recognises`: whether a ``config.json`` names one of these classes."""

    def recognises(config: Mapping[str, Any]) -> bool:
        return any(name in architectures for name in config.get("architectures") or [])

    return recognises


def is_a(model: object, names: Sequence[str]) -> bool:
    """Whether a live model is of a class of one of these names, or of one derived from it."""
    return any(kind.__name__ in names for kind in type(model).__mro__)


def spelled(name: str) -> InputError:
    """For text of a user that holds what only an image may become."""
    return InputError(
        f"The text contains {name!r}, which stands for a part of an image: leave it out, or write "
        f"{IMAGE} where an image goes."
    )


class PromptProcessor:
    """Text and images to model inputs and back, for models whose prompt holds one placeholder
    token per visual token.

    Subclasses say how pixels are made (:meth:`pixels`).

    Args:
        model: the model that the inputs are for; only its device and dtype are read, at each call.
        tokenizer: the checkpoint's tokenizer.
        image_processor: the checkpoint's image processor (resizing, normalising).
        image_token_id: the placeholder.
        family: short family name.
        default_style: conversation template where none is named.
        styles: templates that may be named.

    Attributes:
        family, default_style, styles, tokenizer, image_processor, image_token_id: as above.
        pad_token_id: fills batches on the left; never the placeholder.
        preprocess: where pictures are resized and normalised: ``host``, or those of a batch
            together on the model's ``device``; ``None``: there if it is a GPU.
        frames, fps: how many frames are shown of a video that does not say so itself, see
            :class:`~vlm_prune_ext.models.clips.Clip`.
        takes_videos: whether the family takes any.
    """

    frames: int | None = None
    fps: float | None = None
    preprocess: str | None = None
    takes_videos = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        family: str,
        default_style: str,
        styles: Mapping[str, Style] = STYLES,
    ) -> None:
        self._model = weakref.ref(model)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.family = family
        self.default_style = default_style
        self.styles = styles
        self.pad_token_id = self._choose_pad()
        self._questions = Questions((self.pad_token_id, image_token_id))
        self._tokens = lru_cache(_TEXTS)(self._tokenized)
        self._tokenizing = Lock()  # tokenizers are not made for several threads
        answers_for(model, self)

    # -- where inputs go ---------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        return self._embedding().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self._live_model().dtype

    def _live_model(self) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("The model that this processor belongs to is gone.")
        return model

    def _embedding(self) -> Any:
        return self._live_model().get_input_embeddings()

    def _choose_pad(self) -> int:
        candidates = (
            self.tokenizer.pad_token_id,
            self.tokenizer.unk_token_id,
            self.tokenizer.eos_token_id,
        )
        for candidate in candidates:
            if candidate is not None and candidate != self.image_token_id:
                return int(candidate)
        return 0

    # -- text and images to inputs -----------------------------------------------------------
    def prompt(
        self,
        text: str,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        style: str | None = None,
    ) -> BatchFeature:
        """Inputs for one question, ready for ``model.generate(**inputs)``.

        Args:
            text: what the user says. ``<image>`` markers place the images, ``<video>`` markers the
                videos; without any they go in front, as the family does it.
            images: PIL image, path or bytes, a :class:`~vlm_prune_ext.models.clips.Clip` for a
                video, or a list of these.
            style: conversation template; ``plain`` takes the text as the whole prompt.

        Returns:
            ``input_ids``, ``attention_mask`` (int64, ``(1, seq)``) and, with images,
            ``pixel_values`` in the model's dtype and what else the family needs.

        Raises:
            InputError: unknown style, as many markers as images are not there, an image or video
                that does not decode, or a video for a family that takes none.
        """
        return self.batch([text], [_as_list(images)], style=style)

    def batch(
        self,
        texts: Sequence[str],
        images: Sequence[ImageLike | Sequence[ImageLike] | None],
        *,
        style: str | None = None,
    ) -> BatchFeature:
        """Inputs for several questions, padded on the left; see :meth:`prompt`.

        Args:
            texts: one question per sample.
            images: the images of each sample, any number.
            style: one template for all.

        Raises:
            InputError: unknown style, or not as many lists of images as texts.
            RowError: a text or a picture that cannot be taken.
        """
        if isinstance(texts, str) or len(texts) != len(images):
            given = "one string" if isinstance(texts, str) else f"{len(texts)} texts"
            raise InputError(
                f"texts and images must be lists of equal length; given are {given} and "
                f"{len(images)} lists of images."
            )
        template = self._style(style)
        try:
            pictures = [[self.opened(image) for image in _as_list(entry)] for entry in images]
            prompts = [
                template.single(_written(text), *_counts(own))
                for text, own in zip(texts, pictures, strict=True)
            ]
            made = self._encode(prompts, pictures)
        except InputError as error:
            raise RowError(str(error)) from error
        asked = [
            " ".join(text.replace(IMAGE, " ").replace(VIDEO if videos else IMAGE, " ").split())
            for text, (_, videos) in zip(texts, map(_counts, pictures), strict=True)
        ]
        self._questions.remember(made["input_ids"], asked)
        return made

    def opened(self, image: Any) -> Any:
        """A picture or video as its pixels are made of.

        Raises:
            InputError: it does not decode, or is a video, which the family does not take.
        """
        return self.read_clip(image) if is_video(image) else open_image(image)

    def read_clip(self, clip: Clip | ReadyClip) -> ReadyClip:
        """The frames of a video that the model is shown.

        Raises:
            InputError: the family takes no videos, or see
                :func:`vlm_prune_ext.models.clips.read_clip`.
        """
        line = FAMILIES.get(self.family)
        title = self.family if line is None else line.title
        raise InputError(f"{title} takes no videos here: pictures and text are accepted.")

    def questions(self, input_ids: torch.Tensor) -> list[str]:
        """What was asked in prompts that this processor made; of others their whole text.

        Args:
            input_ids: int64 ``(batch, seq)``.
        """
        return [self._question(ids) for ids in input_ids.tolist()]

    def _question(self, ids: list[int]) -> str:
        found = self._questions.find(ids)
        if found is not None:
            return found
        text = self.tokenizer.decode(self._questions.key(ids), skip_special_tokens=True)
        return str(text).strip()

    def messages(
        self, messages: Sequence[Mapping[str, Any]], *, style: str | None = None
    ) -> tuple[str, list[Image]]:
        """A conversation as the whole text of a prompt, with its images.

        ``processor.prompt(*processor.messages(chat), style="plain")`` makes inputs of it.

        Args:
            messages: each has ``role`` (``system``, ``user`` or ``assistant``) and ``content``, a
                string or a list of ``{"type": "text", "text": ...}``,
                ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``
                (``value``, ``path`` or ``url`` of a local file are taken too; of a video a
                :class:`Clip`, or with ``nframes``, ``fps``, ``start_time`` and ``end_time``
                beside it). Where the last one is the assistant's, the prompt ends in it.
            style: conversation template.

        Returns:
            the text, with one ``<image>`` per image and one ``<video>`` per video, and both in
            order: images are opened, videos are not.
        """
        template = self._style(style)
        images: list[Image] = []
        turns: list[Turn] = []
        for message in messages:
            pieces: list[str | None] = []
            for item in _items(message):
                if isinstance(item, str):
                    pieces.append(item)
                elif isinstance(item, Clip):
                    images.append(item)  # type: ignore[arg-type]
                    pieces.append(template.video)
                else:
                    images.append(open_image(item[0]))
                    pieces.append(None)
            turns.append(Turn(_role(message), template.content(pieces)))
        return template.conversation(turns), images

    def _style(self, name: str | None) -> Style:
        name = self.default_style if name is None else name
        if name not in self.styles:
            raise unknown_name("style", name, self.styles)
        return self.styles[name]

    # -- ahead of the model ------------------------------------------------------------------
    @property
    def device_pixels(self) -> bool:
        """Whether the model's device makes pixels of pictures. Image processors that do not work on
        tensors stay on the host."""
        if not isinstance(self.image_processor, TorchvisionBackend):
            return False
        return self.preprocess == "device" or (
            self.preprocess is None and self.device.type == "cuda"
        )

    def ready(self, image: ImageLike) -> ImageLike:
        """A picture with as much of the work done as can be done before its batch is known. Several
        threads may be in here.

        Raises:
            InputError: see :meth:`opened`.
        """
        opened = self.opened(image)
        if not self.device_pixels or isinstance(opened, ReadyImage | ReadyClip):
            return opened
        return ReadyImage(opened.size, bytes_of(opened, self.device.type == "cuda"))

    def _shown(self, images: list[Image]) -> list[Any]:
        """Images as the image processor is given them."""
        if not self.device_pixels:
            return images
        device = self.device
        return [on_device(image, device) for image in images]

    def shape_of(self, images: Sequence[Any]) -> Hashable:
        """What prompts of one batch must have in common of their pictures and videos."""
        return None

    def length(self, text: str, images: Sequence[ImageLike], style: str | None) -> int:
        """Tokens of a prompt, from which batches are put together. Its text's are remembered, so
        that :meth:`batch` finds them. Several threads may be in here."""
        return len(self.ids_of(text, images, style=style) or ())

    def ids_of(
        self, text: str, images: Sequence[ImageLike], *, style: str | None = None
    ) -> list[int] | None:
        """Token ids of one question's prompt, without making the pixels of its images; ``None``:
        they are not known before that.

        Args:
            text, images, style: as in :meth:`prompt`.
        """
        prompt = self._style(style).single(text, *_counts(images))
        return self.token_ids(prompt, self.visual_lengths([open_image(i) for i in images]))

    def unfilled_ids(
        self, text: str, images: Sequence[ImageLike], *, style: str | None = None
    ) -> list[int]:
        """Token ids of one question's prompt with one placeholder for each image, for an engine
        that makes room for images itself; all else as in :meth:`ids_of`."""
        return self.token_ids(
            self._style(style).single(_written(text), len(images)), [1] * len(images)
        )

    def drawn(self, image: ImageLike) -> Image:
        """A picture for an engine that makes its pixels itself."""
        return open_image(image)

    def ids_like(
        self,
        text: str,
        images: Sequence[ImageLike],
        known: tuple[str, list[int]],
        *,
        style: str | None = None,
    ) -> list[int] | None:
        """As :meth:`ids_of`, where another question about the same images is ``known``: its text
        and its token ids."""
        return self.ids_of(text, images, style=style)

    def picture_settings(self) -> str:
        """What pixels depend on besides the picture."""
        plain = {n: v for n, v in vars(self).items() if isinstance(v, int | str | list | None)}
        return repr((sorted(plain.items()), sorted(vars(self.image_processor).items())))

    def _encode(self, prompts: list[str], pictures: list[list[Image]]) -> BatchFeature:
        flat = [image for own in pictures for image in own]
        pixels = self.pixels(flat) if flat else {}
        lengths = iter(self.visual_lengths(flat))
        rows = []
        for text, own in zip(prompts, pictures, strict=True):
            rows.append(self.token_ids(text, [next(lengths) for _ in own]))
        return BatchFeature(self._moved(self._pad(rows) | pixels))

    def _moved(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To the model's device, pixels and their like in the model's type. Seconds stay exact:
        transformers counts positions with whole ones of them."""
        device, dtype = self.device, self.dtype
        return {
            name: value.to(device, dtype)
            if value.is_floating_point() and name != "second_per_grid_ts"
            else value.to(device)
            for name, value in data.items()
        }

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = [[self.pad_token_id] * (width - len(row)) + row for row in rows]
        real = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}

    def token_ids(self, text: str, lengths: Sequence[int]) -> list[int]:
        """Token ids of a prompt whose n-th ``<image>`` becomes ``lengths[n]`` placeholders.

        The text between images is tokenised piece by piece and the start token stays in front
        only, as LLaVA does it.

        Raises:
            InputError: if markers and images differ in number.
        """
        pieces = text.split(IMAGE)
        self._check_markers(len(pieces) - 1, len(lengths))
        ids = self.text_ids(pieces[0])
        for piece, length in zip(pieces[1:], lengths, strict=True):
            ids += [self.image_token_id] * length
            ids += self._without_start(self.text_ids(piece))
        return ids

    def text_ids(self, text: str, **options: Any) -> list[int]:
        """Token ids of text without images, as the tokenizer gives them.

        Raises:
            InputError: the text spells the placeholder's own name.
        """
        return list(self._tokens(text, len(self.tokenizer), **options))

    def _tokenized(self, text: str, _: int, **options: Any) -> tuple[int, ...]:
        """The number is of words in the vocabulary: with others, texts are looked at anew."""
        with self._tokenizing:
            front = blank_in_front(self.tokenizer, text)
            ids = tuple(self.tokenizer(front + text, **options).input_ids)
            if self.image_token_id in ids:
                raise spelled(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        return ids

    @staticmethod
    def _check_markers(markers: int, images: int) -> None:
        if markers != images:
            raise InputError(
                f"The prompt has {markers} {IMAGE} marker(s) and {images} image(s): give one "
                "marker per image, or none to have the images put in front."
            )

    def _without_start(self, ids: list[int]) -> list[int]:
        start = self.tokenizer.bos_token_id
        return ids[1:] if ids and start is not None and ids[0] == start else list(ids)

    def process(self, images: list[Image]) -> Any:
        """All that the image processor makes of images.

        Raises:
            InputError: an image whose shape it does not take.
        """
        with self._making(images, self.image_processor):
            return self.image_processor(images=self._shown(images), return_tensors="pt")

    @contextmanager
    def _making(self, images: Sequence[Image], who: object) -> Iterator[None]:
        """While pixels of images are made; says which could not be taken, where one could not."""
        try:
            with AsOnCpu() if self.device_pixels else nullcontext():
                yield
        except Exception as error:  # whatever a processor does on shapes that nobody tried
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images) or "no"
            raise InputError(
                f"{type(who).__name__} does not take images of {sizes} pixels: {first_line(error)}"
            ) from error

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """Model inputs made of the images of a whole batch, in order (float32)."""
        raise NotImplementedError

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """Visual tokens that each image becomes."""
        raise NotImplementedError

    # -- outputs to text ---------------------------------------------------------------------
    def decode(self, output_ids: Any, inputs: Mapping[str, Any]) -> list[str]:
        """Answers in plain text: new tokens only, no special tokens, no blanks at the ends.

        Args:
            output_ids: what ``generate`` returned: ids, ``(batch * num_return_sequences, n)``, with
                the prompt or without it, or the mapping of ``return_dict_in_generate`` that has
                them as ``sequences``.
            inputs: what it was called with.

        Raises:
            InputError: neither ids nor such a mapping.
        """
        output_ids = sequences_of(output_ids)
        prompt = inputs.get("input_ids")
        if prompt is not None and starts_with(output_ids, prompt):
            output_ids = output_ids[:, prompt.shape[1] :]
        texts = self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def is_visual(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which tokens of a prompt stand for a part of an image or video, bool ``(batch, seq)``."""
        return input_ids == self.image_token_id

    def count_visual_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each sample in what :meth:`prompt` or :meth:`batch` made."""
        return self.is_visual(inputs["input_ids"]).sum(dim=1).tolist()


def sequences_of(output: Any) -> torch.Tensor:
    """Token ids, ``(rows, n)``, of what ``generate`` returned.

    Raises:
        InputError: it has none.
    """
    ids = output.get("sequences") if isinstance(output, Mapping) else output
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise InputError(
            f"output of type {type(output).__name__} is not valid: what generate() returned is, "
            "ids of (batch, n) or a mapping with 'sequences'."
        )
    if ids.is_floating_point() or (ids.numel() and int(ids.min()) < 0):
        raise InputError("output is not valid: token ids are whole numbers of at least 0.")
    return ids


def starts_with(output_ids: torch.Tensor, prompt: torch.Tensor) -> bool:
    """Whether generated ids repeat the prompt, ``(batch * n, length)`` and ``(batch, seq)``: the
    ``n`` sequences of a sample stand one after the other, as ``num_return_sequences`` gives them.
    """
    width = prompt.shape[1]
    copies, rest = divmod(output_ids.shape[0], max(prompt.shape[0], 1))
    if output_ids.shape[1] < width or rest:
        return False
    prompts = prompt.repeat_interleave(copies, dim=0).to(output_ids.device)
    return bool(torch.equal(output_ids[:, :width], prompts))


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _counts(media: Sequence[Any]) -> tuple[int, int]:
    """Images and videos among them."""
    videos = sum(map(is_video, media))
    return len(media) - videos, videos


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise unknown_name("role", role, ("system", "user", "assistant"))
    return role


def _items(message: Mapping[str, Any]) -> list[str | tuple[Any] | Clip]:
    """Content as text pieces, 1-tuples of images, and videos."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise InputError(
            f"content={content!r} of a message is not valid: give a string or a list of items."
        )
    return [_item(item) for item in content]


def _item(item: Any) -> str | tuple[Any] | Clip:
    kind = item.get("type") if isinstance(item, Mapping) else None
    names = {
        "text": ("text", "value"),
        "image": ("image", "value", "path", "url"),
        "video": ("video", "value", "path", "url"),
    }
    if kind not in names:
        raise unknown_name("type of a message item", kind, names)
    for name in names[kind]:
        if item.get(name) is not None:
            found = item[name]
            if kind == "video":
                return found if isinstance(found, Clip) else _clip(found, item)
            return str(found) if kind == "text" else (found,)
    raise InputError(f"A message item of type {kind!r} needs one of: {', '.join(names[kind])}.")


def _clip(source: Any, item: Mapping[str, Any]) -> Clip:
    """The video of a message item, by the names that frameworks have for how much is shown."""
    frames = next((item[n] for n in ("nframes", "nframe", "frames") if item.get(n)), None)
    start, end = item.get("start_time"), item.get("end_time")
    return Clip(source, frames, None if frames else item.get("fps") or None, start, end)
