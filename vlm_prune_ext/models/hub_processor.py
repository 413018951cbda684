"""Prompts for families whose pixels are made by the image processor of their own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import AutoImageProcessor

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import PromptProcessor
from vlm_prune_ext.models.checkpoint import Checkpoint
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
                f"{str(error).splitlines()[0]}"
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
        return AutoImageProcessor.from_pretrained(str(source.folder))
    except Exception as error:  # many kinds, by what is wrong in the file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"The image processor of {what} cannot be made: {first}") from error


def token_id(tokenizer: Any, token: str, what: str) -> int:
    """Id of a special token.

    Raises:
        InputError: the tokenizer does not know it.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise InputError(f"The tokenizer of {what} has no token {token!r}, which its prompts need.")
    return int(found)
