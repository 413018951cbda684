"""Prompts with a stated number of text tokens.

Text tokens are all tokens of a prompt that are not visual ones: the family's template and the
question. A prompt that has too many loses words at the end of its question (the template stays
whole); one that has too few is filled up in front with padding, which attention does not see. That
is what ``padding="max_length"`` and ``truncation=True`` do to a prompt: the answer to a padded one
is the same, and the model computes as many positions as if there had been text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.profiling.data import Example


@dataclass
class Batch:
    """Inputs of some examples.

    Attributes:
        inputs: for ``generate``.
        visual: visual tokens of each.
        text: text tokens of each, padding not counted.
        pixels: shape of what the vision tower gets.
    """

    inputs: Any
    visual: list[int]
    text: list[int]
    pixels: tuple[int, ...]

    @property
    def width(self) -> int:
        """Positions of a row, padding included."""
        return int(self.inputs["input_ids"].shape[1])


class Prompter:
    """Makes batches, and remembers how far questions had to be cut.

    Args:
        processor: as :func:`vlm_prune_ext.load` returns it.
        side: pictures are resized to this many pixels a side; ``None``: as they are.
        limit: text tokens of a prompt; ``None``: as it is.
    """

    def __init__(self, processor: Any, side: int | None, limit: int | None) -> None:
        self.processor, self.side, self.limit = processor, side, limit
        self._questions: dict[int, str] = {}

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Inputs of some examples.

        Raises:
            InputError: the template alone has more text tokens than ``limit``.
        """
        pictures = [example.picture(self.side) for example in examples]
        texts = [self._question(e, p) for e, p in zip(examples, pictures, strict=True)]
        inputs = self.processor.batch(texts, pictures)
        visual = self.processor.count_visual_tokens(inputs)
        real = inputs["attention_mask"].sum(dim=1).tolist()
        text = [total - own for total, own in zip(real, visual, strict=True)]
        if self.limit is not None:
            inputs = self._filled(inputs, max(visual) + self.limit)
        pixels = inputs.get("pixel_values", inputs.get("image_patches"))
        return Batch(inputs, visual, text, tuple(pixels.shape) if pixels is not None else ())

    def _question(self, example: Example, picture: Any) -> str:
        if self.limit is None:
            return example.question
        if example.row not in self._questions:
            self._questions[example.row] = self._cut(example.question, picture)
        return self._questions[example.row]

    def _cut(self, question: str, picture: Any) -> str:
        """The question without as many words at its end as it has tokens too many."""
        assert self.limit is not None
        words = question.split(" ")
        said = question
        while (over := self._text_tokens(said, picture) - self.limit) > 0:
            if not words:
                raise InputError(
                    f"max_input_len={self.limit} is not valid: the prompt without any question has "
                    f"{self.limit + over} text tokens already."
                )
            # A word has at least one token, so this never cuts too far by much.
            del words[-max(1, over // 4) :]
            said = " ".join(words)
        return said

    def _text_tokens(self, text: str, picture: Any) -> int:
        inputs = self.processor.batch([text], [picture])
        return int(inputs["attention_mask"].sum()) - self.processor.count_visual_tokens(inputs)[0]

    def _filled(self, inputs: Any, width: int) -> Any:
        """Rows with padding in front, up to ``width`` positions."""
        shape = tuple(inputs["input_ids"].shape)
        missing = width - shape[1]
        for name, value in inputs.items():
            if missing > 0 and isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
                fill = self.processor.pad_token_id if name == "input_ids" else 0
                inputs[name] = torch.nn.functional.pad(value, (missing, 0), value=fill)
        return inputs
