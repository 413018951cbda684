"""InstructBLIP on Vicuna.

Paper: https://arxiv.org/abs/2305.06500. As BLIP-2, but the Q-Former reads the instruction too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoTokenizer, InstructBlipForConditionalGeneration

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.blip2 import (
    WHY_NO_VISION,
    QFormerProcessor,
    image_token,
    share_stops,
    watch_embedded,
)
from vlm_prune_ext.models.causal_lm import decoder_parts, find_decoder
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.hub_processor import read_pictures, without_markers
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.prompts import IMAGE, Style

NAME = "instructblip"
ARCHITECTURE = "InstructBlipForConditionalGeneration"

INSTRUCTBLIP_STYLES: Mapping[str, Style] = {"plain": Style(image=IMAGE)}


class InstructBlipPrompts(QFormerProcessor):
    """Prompts and pixels of InstructBLIP.

    Args:
        model, tokenizer, image_processor, image_token_id: as in :class:`PromptProcessor`.
        qformer_tokenizer: the Q-Former's own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        qformer_tokenizer: Any,
    ) -> None:
        super().__init__(
            model, tokenizer, image_processor, image_token_id, NAME, "plain", INSTRUCTBLIP_STYLES
        )
        self.qformer_tokenizer = qformer_tokenizer

    def _encode(self, prompts: list[str], pictures: list[list[Image]]) -> Any:
        data = super()._encode(prompts, pictures)
        # One row per image: the Q-Former reads the instruction beside each.
        said = [without_markers(text) for text in prompts]
        texts = [text for text, own in zip(said, pictures, strict=True) for _ in own]
        texts = texts or said[:1]  # beside the blank image of prompts without any
        rows = [self.qformer_tokenizer(text).input_ids for text in texts]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.qformer_tokenizer.pad_token_id or 0)
        real = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            real[index, : len(row)] = 1
        data["qformer_input_ids"] = ids.to(self.device)
        data["qformer_attention_mask"] = real.to(self.device)
        return data


def _recognises(config: Mapping[str, Any]) -> bool:
    return ARCHITECTURE in (config.get("architectures") or [])


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    tokenizer, pictures = load_tokenizer(source), read_pictures(source)
    reader = _qformer_tokenizer(source.folder / "qformer_tokenizer", source.name)
    model = load_model(InstructBlipForConditionalGeneration, source, options)
    token = image_token(model, f"checkpoint {source.name!r}")
    share_stops(model)
    return model, InstructBlipPrompts(model, tokenizer, pictures, token, reader)


def _qformer_tokenizer(folder: Path, name: str) -> Any:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise InputError(
            f"checkpoint {name!r} has no tokenizer for its Q-Former: the folder qformer_tokenizer "
            "with tokenizer.json or vocab.txt is needed."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # many kinds, by format and version
        raise InputError(
            f"{str(folder)!r} of checkpoint {name!r} cannot be read: {first_line(error)}"
        ) from error


def _owns(model: Any) -> bool:
    whole = isinstance(model, InstructBlipForConditionalGeneration)
    return whole and find_decoder(model.language_model) is not None


def _parts(model: Any) -> ModelParts:
    token = image_token(model, "this model")
    return decoder_parts(
        model,
        find_decoder(model.language_model),
        why_no_vision=WHY_NO_VISION,
        watch_spans=watch_embedded(model.get_input_embeddings(), token),
    )


FAMILY = Family(
    name=NAME,
    title="InstructBLIP (Vicuna)",
    owns=_owns,
    parts=_parts,
    architectures=(ARCHITECTURE,),
    recognises=_recognises,
    load=_load,
)
