"""Gemma 3 with images.

Paper: https://arxiv.org/abs/2503.19786. Most decoder layers see a sliding window only; the tokens
of one image see each other in both directions. A layer that holds part of the prompt gets its rows
and columns of the model's own masks, so both stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from transformers import Gemma3ForConditionalGeneration

from vlm_prune_ext.models.hub_processor import HubProcessor, hub_family
from vlm_prune_ext.models.prompts import IMAGE, STYLES, Style, Turn

NAME = "gemma3"


@dataclass(frozen=True)
class GemmaStyle(Style):
    """Gemma has no system turn: what it would say stands in front of the user's first words."""

    def conversation(self, turns: Sequence[Turn]) -> str:
        """See :meth:`Style.conversation`."""
        left, said = [], ""
        for turn in turns:
            if turn.role == "system":
                said = turn.text.strip() + self.after_system
            elif turn.role == "user":
                left.append(Turn("user", said + turn.text.strip()))
                said = ""
            else:
                left.append(turn)
        if said:
            left.append(Turn("user", said.rstrip()))
        return super().conversation(left)


GEMMA_STYLES: Mapping[str, Style] = {
    "gemma": GemmaStyle(
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        answer="{}<end_of_turn>\n",
        opening="<start_of_turn>model\n",
        image=IMAGE,
        after_system="\n\n",
    ),
    "plain": STYLES["plain"],
}


class GemmaProcessor(HubProcessor):
    """Prompts and pixels of Gemma 3; an image is taken whole, not panned over."""

    OPTIONS = {"do_pan_and_scan": False}
    FRAME = ("\n\n<start_of_image>", "<end_of_image>\n\n")
    TOKEN_TYPES = "token_type_ids"

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """The same for every image."""
        return [self._live_model().config.mm_tokens_per_image] * len(images)


def _processor(model: Any, tokenizer: Any, pictures: Any) -> GemmaProcessor:
    token = model.config.image_token_id
    return GemmaProcessor(model, tokenizer, pictures, token, NAME, "gemma", GEMMA_STYLES)


FAMILY = hub_family(
    NAME,
    "Gemma 3",
    Gemma3ForConditionalGeneration,
    _processor,
    decoder=lambda model: model.model.language_model,
    plain_rotary=False,
    image_length=lambda config: config.mm_tokens_per_image,
    why_no_vision=(
        "Gemma 3's tower is SigLIP, whose patches are pooled into tokens and which has no "
        "class token, so it is not CLIP-like; methods that work in the language model apply"
    ),
)
