"""Fuyu: no vision tower at all, patches of pixels go straight into the language model.

Source: https://www.adept.ai/blog/fuyu-8b. A newline token closes each row of patches; as in
LLaVA-NeXT these belong to the image and count as visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import FuyuForCausalLM

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.auto import AutoPrompts, read_processor
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_a, is_named
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.loading import load_model
from vlm_prune_ext.models.prompts import IMAGE, Style, without_markers

FUYU_STYLES: Mapping[str, Style] = {"fuyu": Style(user="{}\n", image=IMAGE)}


class FuyuPrompts(AutoPrompts):
    """Prompts and patches of Fuyu, whose processor puts the image in front.

    Args:
        model, processor: as in :class:`AutoPrompts`.

    Attributes:
        newline: id of the token that closes a row of patches.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor, "fuyu", FUYU_STYLES)
        self.newline = int(processor.image_newline_id)
        self.reserved = {self.image_token_id}

    def _marked(self, text: str, own: Sequence[Any]) -> str:
        if len(own) > 1 or text.count(IMAGE) != len(own):
            raise InputError(
                f"The prompt has {text.count(IMAGE)} {IMAGE} marker(s) and {len(own)} image(s): "
                "Fuyu takes one image per prompt, or none."
            )
        said = without_markers(text)
        self._check_text(said)
        return said

    def _note_images(self, input_ids: torch.Tensor, pictures: list[list[Image]]) -> None:
        """One image a prompt: nothing to tell apart."""

    def count_visual_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Patches and newlines of each sample."""
        return visual_mask(inputs["input_ids"], self.image_token_id, self.newline).sum(1).tolist()


def visual_mask(ids: torch.Tensor, patch: int, newline: int) -> torch.Tensor:
    """Bool ``(batch, seq)``: patches and the newlines that follow one."""
    patches = ids == patch
    after = torch.nn.functional.pad(patches[:, :-1], (1, 0))
    return patches | ((ids == newline) & after)


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    processor = read_processor(source, options.pictures)
    model = load_model(FuyuForCausalLM, source, options)
    return model, FuyuPrompts(model, processor)


def queries(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Queries of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, 0, hidden, rotary)


def keys(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Keys of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, 1, hidden, rotary)


def _project(attn: Any, which: int, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Persimmon's attention: one projection for all three, norm per head, and a rotation of the
    first channels of each head only."""
    from transformers.models.persimmon.modeling_persimmon import apply_rotary_pos_emb

    fused = attn.query_key_value(hidden)
    heads = fused.view(*hidden.shape[:-1], attn.num_heads, 3, attn.head_dim)[..., which, :]
    if attn.qk_layernorm:
        heads = (attn.q_layernorm, attn.k_layernorm)[which](heads)
    heads = heads.transpose(1, 2)
    if rotary is None:
        return heads
    turned, rest = heads[..., : attn.rotary_ndims], heads[..., attn.rotary_ndims :]
    turned = apply_rotary_pos_emb(turned, turned[:, :0], *rotary)[0]
    return torch.cat([turned, rest], dim=-1)


def _watch(inner: Any, patch: int) -> Callable[[SpanSink], list[Undo]]:
    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is not None and ids.shape[1] > 1:
                sink(visual_mask(ids, patch, _newline_of(ids, patch)), None)

        return [inner.register_forward_pre_hook(see, with_kwargs=True).remove]

    return watch


def _newline_of(ids: torch.Tensor, patch: int) -> int:
    """The token that follows the first row of patches; the model itself does not know its id."""
    patches = ids == patch
    ends = patches[:, :-1] & ~patches[:, 1:]
    places = ends.nonzero()
    return int(ids[places[0, 0], places[0, 1] + 1]) if len(places) else -1


def _parts(model: Any) -> ModelParts:
    inner = model.model
    decoder = inner.language_model
    return ModelParts(
        model=model,
        decoder=decoder,
        layers=decoder.layers,
        final_norm=decoder.final_layernorm,
        queries=queries,
        keys=keys,
        why_no_vision=(
            "Fuyu has no tower, its patches go straight into the language model; methods that "
            "work there apply"
        ),
        watch_spans=_watch(inner, model.config.image_token_id),
    )


def family_of(line: FamilyLine) -> Family:
    """The one of its kind."""
    return Family(
        line,
        owns=lambda model: is_a(model, line.architectures),
        parts=_parts,
        recognises=is_named(*line.architectures),
        load=_load,
        read_processor=read_processor,
    )
