"""Prompts for families whose pixels are made by the image processor of their own checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import AutoImageProcessor

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_named
from vlm_prune_ext.models.causal_lm import decoder_parts
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.placeholders import Lengths, watch_placeholders
from vlm_prune_ext.models.prompts import IMAGE, Style

_FILES = ("preprocessor_config.json", "processor_config.json")


class HubProcessor(PromptProcessor):
    """Prompts and pixels of one family.

    Subclasses say how many visual tokens an image becomes (:meth:`visual_lengths`).

    Args:
        model, tokenizer, image_processor, image_token_id, family, default_style, styles: as in
            :class:`PromptProcessor`.

    Attributes:
        INPUTS: what of the image processor's output the model takes.
        OPTIONS: what the image processor is told beside the images.
        FRAME: what stands in front of an image's placeholders and behind them, wherever it is.
        TOKEN_TYPES: name of the model's input that is 1 at visual tokens and 0 elsewhere, if it
            has one.
    """

    INPUTS: tuple[str, ...] = ("pixel_values",)
    OPTIONS: Mapping[str, Any] = {}
    FRAME: tuple[str, str] = ("", "")
    TOKEN_TYPES: str | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        family: str,
        default_style: str,
        styles: Mapping[str, Style],
    ) -> None:
        super().__init__(
            model, tokenizer, image_processor, image_token_id, family, default_style, styles
        )

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """What the checkpoint's own image processor makes of them."""
        made = self.process(images)
        return {name: made[name] for name in self.INPUTS}

    def process(self, images: list[Image]) -> Any:
        """All that the image processor gives.

        Raises:
            InputError: an image whose shape it does not take.
        """
        try:
            return self.image_processor(images=images, return_tensors="pt", **self.OPTIONS)
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise InputError(
                f"{type(self.image_processor).__name__} does not take images of {sizes} pixels: "
                f"{first_line(error)}"
            ) from error

    def token_ids(self, text: str, lengths: Sequence[int]) -> list[int]:
        """See :meth:`PromptProcessor.token_ids`."""
        before, after = self.FRAME
        return super().token_ids(text.replace(IMAGE, f"{before}{IMAGE}{after}"), lengths)

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        data = super()._pad(rows)
        if self.TOKEN_TYPES is not None:
            data[self.TOKEN_TYPES] = (data["input_ids"] == self.image_token_id).long()
        return data


def without_markers(text: str) -> str:
    """The text alone, for families whose images have a fixed place."""
    return text.replace(f"{IMAGE}\n", "").replace(IMAGE, "")


def read_pictures(source: Checkpoint) -> Any:
    """The image processor of a checkpoint.

    Raises:
        InputError: it has none, or one that cannot be made.
    """
    what = f"checkpoint {source.name!r}"
    if not any((source.folder / name).is_file() for name in _FILES):
        raise InputError(
            f"{what} has no image processor: preprocessor_config.json (or processor_config.json) "
            "is needed beside config.json."
        )
    try:
        return AutoImageProcessor.from_pretrained(str(source.folder), trust_remote_code=False)
    except Exception as error:  # many kinds, by what is wrong in the file
        said = first_line(error)
        raise InputError(f"The image processor of {what} cannot be made: {said}") from error


def token_id(tokenizer: Any, token: str, what: str) -> int:
    """Id of a special token.

    Raises:
        InputError: the tokenizer does not know it.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise InputError(f"The tokenizer of {what} has no token {token!r}, which its prompts need.")
    return int(found)


def hub_family(
    name: str,
    title: str,
    kind: Any,
    processor: Callable[[Any, Any, Any], PromptProcessor],
    *,
    decoder: Callable[[Any], Any],
    why_no_vision: str,
    image_length: Callable[[Any], int] | None = None,
    **more: Any,
) -> Family:
    """A family that is one class of transformers: ``model.model`` embeds the prompt, with a
    placeholder per visual token, and runs a LLaMA-like decoder.

    Args:
        name, title: as in :class:`Family`.
        kind: the class.
        processor: ``(model, tokenizer, image processor)`` -> its prompts.
        decoder: where the module with the decoder layers is; ``None`` from it: not this family's.
        why_no_vision: why tower methods do not apply.
        image_length: visual tokens of every image by the model's configuration, where images may
            stand side by side; ``None`` where other tokens stand between them.
        more: further fields of :class:`ModelParts`.
    """

    def load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
        tokenizer, pictures = load_tokenizer(source), read_pictures(source)
        model = load_model(kind, source, options)
        return model, processor(model, tokenizer, pictures)

    def owns(model: Any) -> bool:
        return isinstance(model, kind) and decoder(model) is not None

    def parts(model: Any) -> ModelParts:
        token = model.config.image_token_id
        length = None if image_length is None else image_length(model.config)
        return decoder_parts(
            model,
            decoder(model),
            why_no_vision=why_no_vision,
            watch_spans=watch_placeholders(model.model, token, equal_lengths(length)),
            **more,
        )

    return Family(
        name=name,
        title=title,
        owns=owns,
        parts=parts,
        architectures=(kind.__name__,),
        recognises=is_named(kind.__name__),
        load=load,
    )


def equal_lengths(length: int | None) -> Lengths:
    """Where every image has ``length`` visual tokens; ``None``: every unbroken run is one image."""

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]] | None:
        if length is None:
            return None
        return [[length] * (count // length) for count in mask.sum(dim=1).tolist()]

    return lengths
