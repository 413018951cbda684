"""Fuyu: no vision tower at all, patches of pixels go straight into the language model.

Source: https://www.adept.ai/blog/fuyu-8b. A newline token closes each row of patches; as in
LLaVA-NeXT these belong to the image and count as visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from transformers import BatchFeature, FuyuForCausalLM, PreTrainedTokenizerFast

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_a, is_named
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.fields import explained
from vlm_prune_ext.models.loading import load_model, read_pictures, token_id
from vlm_prune_ext.models.prompts import IMAGE, Style, without_markers

NEWLINE = "|NEWLINE|"
START = "<s>"
# Behind the prompt of an image; the answer follows it.
ANSWER = "<0x04>"

FUYU_STYLES: Mapping[str, Style] = {
    "fuyu": Style(user="{}\n", image=IMAGE),
    "plain": Style(image=IMAGE),
}


class FuyuPrompts(PromptProcessor):
    """Prompts and patches of Fuyu.

    Args:
        model, tokenizer, image_processor: as in :class:`PromptProcessor`.
        newline: id of the token that closes a row.
        start: id of the token between image and text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, newline: int, start: int
    ) -> None:
        token = model.config.image_token_id
        super().__init__(model, tokenizer, image_processor, token, "fuyu", "fuyu", FUYU_STYLES)
        self.newline, self.start = newline, start

    def _encode(self, prompts: list[str], pictures: list[list[Image]]) -> BatchFeature:
        rows, patches = [], []
        for text, own in zip(prompts, pictures, strict=True):
            if len(own) > 1 or text.count(IMAGE) != len(own):
                raise InputError(
                    f"The prompt has {text.count(IMAGE)} {IMAGE} marker(s) and {len(own)} "
                    "image(s): Fuyu takes one image per prompt, or none."
                )
            text = without_markers(text)
            if not own:
                rows.append(self.text_ids(text))
                continue
            cut, columns = self.patches(own[0])
            row = [self.image_token_id] * columns + [self.newline]
            said = self.text_ids(text + ANSWER, add_special_tokens=False)
            rows.append(row * (len(cut) // columns) + [self.start] + said)
            patches.append(cut)
        data = self._pad(rows)
        if patches:
            data["image_patches"] = torch.cat(patches).to(self.dtype)
        return BatchFeature({name: value.to(self.device) for name, value in data.items()})

    def patches(self, image: Image) -> tuple[torch.Tensor, int]:
        """Patches ``(rows * columns, values)`` of an image without its padding, and columns."""
        made = self.process([image])
        size = self.image_processor.patch_size
        size = size if isinstance(size, dict) else {"height": size.height, "width": size.width}
        picture = made["images"][0]
        height, width = picture.shape[-2:]
        inner = (made["image_unpadded_heights"], made["image_unpadded_widths"])
        down, across = (
            math.ceil(int(torch.as_tensor(edge).flatten()[0]) / size[name]) * size[name]
            for edge, name in zip(inner, ("height", "width"), strict=True)
        )
        picture = picture[..., : min(down, height), : min(across, width)]
        cut = self.image_processor.patchify_image(picture)
        return torch.as_tensor(cut).flatten(0, -2), picture.shape[-1] // size["width"]

    def count_visual_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Patches and newlines of each sample."""
        return visual_mask(inputs["input_ids"], self.image_token_id, self.newline).sum(1).tolist()


def visual_mask(ids: torch.Tensor, patch: int, newline: int) -> torch.Tensor:
    """Bool ``(batch, seq)``: patches and the newlines that follow one."""
    patches = ids == patch
    after = torch.nn.functional.pad(patches[:, :-1], (1, 0))
    return patches | ((ids == newline) & after)


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    what = f"checkpoint {source.name!r}"
    if not (source.folder / "tokenizer.json").is_file():
        raise InputError(f"{what} has no tokenizer: tokenizer.json is needed.")
    pictures = read_pictures(source)
    with explained(f"The tokenizer of {what}"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source.folder))
    newline, start = (token_id(tokenizer, token, what) for token in (NEWLINE, START))
    model = load_model(FuyuForCausalLM, source, options)
    return model, FuyuPrompts(model, tokenizer, pictures, newline, start)


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
    )
