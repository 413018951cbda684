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

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.causal_lm import decoder_parts
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.hub_processor import HubProcessor, read_pictures
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.placeholders import watch_placeholders
from vlm_prune_ext.models.prompts import IMAGE, STYLES, Style, Turn

NAME = "gemma3"
ARCHITECTURE = "Gemma3ForConditionalGeneration"


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


def _recognises(config: Mapping[str, Any]) -> bool:
    return ARCHITECTURE in (config.get("architectures") or [])


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    tokenizer, pictures = load_tokenizer(source), read_pictures(source)
    model = load_model(Gemma3ForConditionalGeneration, source, options)
    token = model.config.image_token_id
    return model, GemmaProcessor(model, tokenizer, pictures, token, NAME, "gemma", GEMMA_STYLES)


def _owns(model: Any) -> bool:
    return isinstance(model, Gemma3ForConditionalGeneration)


def _parts(model: Any) -> ModelParts:
    inner, config = model.model, model.config
    length = config.mm_tokens_per_image

    def lengths(mask: Any, given: dict[str, Any]) -> list[list[int]]:
        return [[length] * (count // length) for count in mask.sum(dim=1).tolist()]

    return decoder_parts(
        model,
        inner.language_model,
        plain_rotary=False,
        why_no_vision=(
            "Gemma 3's tower is SigLIP, whose patches are pooled into tokens and which has no "
            "class token, so it is not CLIP-like; methods that work in the language model apply"
        ),
        watch_spans=watch_placeholders(inner, config.image_token_id, lengths),
    )


FAMILY = Family(
    name=NAME,
    title="Gemma 3",
    owns=_owns,
    parts=_parts,
    architectures=(ARCHITECTURE,),
    recognises=_recognises,
    load=_load,
)
