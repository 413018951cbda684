"""BLIP-2 on OPT and on Flan-T5.

Paper: https://arxiv.org/abs/2301.12597. A Q-Former turns an image into a fixed number of visual
tokens, which stand in front of the text, even in front of its start token. With OPT they are
positions of a causal decoder and can be pruned. With Flan-T5 they go through an encoder, whose
output every decoder layer reads anew: that model runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import Blip2ForConditionalGeneration

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import rotary
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor
from vlm_prune_ext.models.causal_lm import decoder_parts, find_decoder
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.hub_processor import HubProcessor, read_pictures, without_markers
from vlm_prune_ext.models.huggingface import load_model
from vlm_prune_ext.models.original import load_tokenizer
from vlm_prune_ext.models.prompts import IMAGE, Style

NAME = "blip2"
ARCHITECTURE = "Blip2ForConditionalGeneration"

BLIP2_STYLES: Mapping[str, Style] = {
    "blip2_vqa": Style(
        user="Question: {}", answer=" {}. ", opening=" Answer:", image=IMAGE, after_system="\n"
    ),
    "plain": Style(image=IMAGE),
}


class QFormerProcessor(HubProcessor):
    """Prompts and pixels of models with a Q-Former (BLIP-2, InstructBLIP).

    Images always come first; where the text places them makes no difference.
    """

    def visual_lengths(self, images: list[Image]) -> list[int]:
        """The same for every image."""
        return [self._live_model().config.num_query_tokens] * len(images)

    def token_ids(self, text: str, lengths: Any) -> list[int]:
        """Placeholders, then the text with its start token; see the base class."""
        markers = text.count(IMAGE)
        if markers != len(lengths):
            raise InputError(
                f"The prompt has {markers} {IMAGE} marker(s) and {len(lengths)} image(s): give one "
                "marker per image, or none to have the images put in front."
            )
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
        return data


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


def _recognises(config: Mapping[str, Any]) -> bool:
    return ARCHITECTURE in (config.get("architectures") or [])


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    tokenizer, pictures = load_tokenizer(source), read_pictures(source)
    model = load_model(Blip2ForConditionalGeneration, source, options)
    token = image_token(model, f"checkpoint {source.name!r}")
    share_stops(model)
    style = "blip2_vqa"
    return model, QFormerProcessor(model, tokenizer, pictures, token, NAME, style, BLIP2_STYLES)


def share_stops(model: Any) -> None:
    """Tell the whole what ends an answer: its language model's ``generate`` does the work."""
    inner = model.language_model.generation_config
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, name, getattr(inner, name))


def _owns(model: Any) -> bool:
    return isinstance(model, Blip2ForConditionalGeneration) and _decoder(model) is not None


def _decoder(model: Any) -> Any:
    inner = model.language_model
    opt = getattr(getattr(inner, "model", None), "decoder", None)
    return opt if hasattr(opt, "embed_positions") else find_decoder(inner)


def _parts(model: Any) -> ModelParts:
    decoder, token = _decoder(model), image_token(model, "this model")
    watch = watch_embedded(model.get_input_embeddings(), token)
    if not hasattr(decoder, "embed_positions"):
        return decoder_parts(model, decoder, why_no_vision=WHY_NO_VISION, watch_spans=watch)
    return ModelParts(
        model=model,
        decoder=decoder,
        layers=decoder.layers,
        final_norm=decoder.final_layer_norm,
        queries=rotary.queries,
        keys=rotary.keys,
        plain_rotary=False,
        counts_real=True,
        why_no_vision=WHY_NO_VISION,
        watch_spans=watch,
    )


WHY_NO_VISION = (
    "the visual tokens are the Q-Former's queries, not patches; methods that work in the language "
    "model apply"
)

FAMILY = Family(
    name=NAME,
    title="BLIP-2 (OPT)",
    owns=_owns,
    parts=_parts,
    architectures=(ARCHITECTURE,),
    recognises=_recognises,
    load=_load,
)
