"""BLIP-2 on OPT and on Flan-T5, and InstructBLIP on Vicuna.

Papers: https://arxiv.org/abs/2301.12597 and https://arxiv.org/abs/2305.06500. A Q-Former turns an
image into a fixed number of visual tokens, which stand in front of the text, even in front of its
start token; InstructBLIP's reads the instruction too. With OPT and Vicuna they are positions of a
causal decoder and can be pruned. With Flan-T5 they go through an encoder, whose output every
decoder layer reads anew: that model runs as it is.

Prompts are made here: transformers' processors put in one image's tokens, however many images there
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Image
from torch import nn
from transformers import AutoTokenizer

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import generic
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_a, is_named
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.loading import load_model, load_tokenizer, read_pictures
from vlm_prune_ext.models.prompts import IMAGE, Style, without_markers

_STYLES: Mapping[str, Mapping[str, Style]] = {
    "blip2": {
        "blip2_vqa": Style(
            user="Question: {}", answer=" {}. ", opening=" Answer:", image=IMAGE, after_system="\n"
        ),
        "plain": Style(image=IMAGE),
    },
    "instructblip": {"plain": Style(image=IMAGE)},
}
WHY_NO_VISION = (
    "the visual tokens are the Q-Former's queries, not patches; methods that work in the language "
    "model apply"
)


class QFormerPrompts(PromptProcessor):
    """Prompts and pixels of models with a Q-Former.

    Images always come first; where the text places them makes no difference.

    Args:
        model, tokenizer, image_processor, image_token_id, family: as in :class:`PromptProcessor`.
        reader: tokenizer of a Q-Former that reads the instruction.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        family: str,
        reader: Any = None,
    ) -> None:
        styles = _STYLES[family]
        default = next(iter(styles))
        super().__init__(model, tokenizer, image_processor, image_token_id, family, default, styles)
        self.reader = reader

    def pixels(self, images: list[Image]) -> dict[str, torch.Tensor]:
        """``pixel_values``, ``(images, 3, side, side)``."""
        return {"pixel_values": self.process(images)["pixel_values"]}

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """The same for every image."""
        return [self._live_model().config.num_query_tokens] * len(images)

    def token_ids(self, text: str, lengths: Any) -> list[int]:
        """Placeholders, then the text with its start token; see the base class."""
        self._check_markers(text.count(IMAGE), len(lengths))
        said = self.text_ids(without_markers(text))
        return [self.image_token_id] * sum(lengths) + said

    def _encode(self, prompts: list[str], pictures: list[list[Image]]) -> Any:
        data = super()._encode(prompts, pictures)
        if "pixel_values" not in data:
            # `generate` takes no prompt without an image. One that no placeholder asks for is
            # looked at and goes nowhere.
            side = self._live_model().config.vision_config.image_size
            blank = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
            data["pixel_values"] = blank
        if self.reader is not None:
            data.update(self._read(prompts, pictures))
        return data

    def _read(self, prompts: list[str], pictures: list[list[Image]]) -> dict[str, torch.Tensor]:
        """What the Q-Former reads: one row per image, the instruction beside each."""
        said = [without_markers(text) for text in prompts]
        texts = [text for text, own in zip(said, pictures, strict=True) for _ in own]
        texts = texts or said[:1]  # beside the blank image of prompts without any
        rows = [self.reader(text).input_ids for text in texts]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.reader.pad_token_id or 0)
        real = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            real[index, : len(row)] = 1
        device = self.device
        return {"qformer_input_ids": ids.to(device), "qformer_attention_mask": real.to(device)}


def watch_embedded(table: nn.Module, image_token_id: int) -> Callable[[SpanSink], list[Undo]]:
    """What :attr:`ModelParts.watch_spans` asks for, where ``generate`` of the whole model embeds
    the prompt itself and calls the language model: a hook in front of the embedding."""

    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple) -> None:
            ids = args[0] if args else None
            if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
                sink(ids == image_token_id, None)

        return [table.register_forward_pre_hook(see).remove]

    return watch


def image_token(model: Any, what: str) -> int:
    """The placeholder's id.

    Raises:
        InputError: the configuration has none, as in checkpoints from before it was introduced.
    """
    token = model.config.image_token_id
    if token is None:
        raise InputError(
            f"config.json of {what} has no image_token_index: take a newer revision of the "
            "checkpoint, whose vocabulary has a placeholder for images."
        )
    return int(token)


def family_of(line: FamilyLine) -> Family:
    """``blip2`` or ``instructblip``."""
    (architecture,) = line.architectures
    instructed = line.name == "instructblip"

    def load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
        tokenizer, pictures = load_tokenizer(source), read_pictures(source)
        folder = source.folder / "qformer_tokenizer"
        reader = _qformer_tokenizer(folder, source.name) if instructed else None
        model = load_model(getattr(transformers, architecture), source, options)
        token = image_token(model, f"checkpoint {source.name!r}")
        share_stops(model)
        return model, QFormerPrompts(model, tokenizer, pictures, token, line.name, reader)

    def owns(model: Any) -> bool:
        return is_a(model, line.architectures) and _decoder(model) is not None

    return Family(line, owns, _parts, is_named(architecture), load)


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


def share_stops(model: Any) -> None:
    """Tell the whole what ends an answer: its language model's ``generate`` does the work."""
    inner = model.language_model.generation_config
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, name, getattr(inner, name))


def _decoder(model: Any) -> Any:
    inner = model.language_model
    opt = getattr(getattr(inner, "model", None), "decoder", None)
    return opt if hasattr(opt, "embed_positions") else generic.find_decoder(inner)


def _parts(model: Any) -> ModelParts:
    decoder, token = _decoder(model), image_token(model, "this model")
    watch = watch_embedded(model.get_input_embeddings(), token)
    if not hasattr(decoder, "embed_positions"):
        return generic.decoder_parts(model, decoder, why_no_vision=WHY_NO_VISION, watch_spans=watch)
    return ModelParts(
        model=model,
        decoder=decoder,
        layers=decoder.layers,
        final_norm=decoder.final_layer_norm,
        queries=generic.queries,
        keys=generic.keys,
        input_norm=lambda layer: layer.self_attn_layer_norm,
        plain_rotary=False,
        counts_real=True,
        why_no_vision=WHY_NO_VISION,
        watch_spans=watch,
    )
