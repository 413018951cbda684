"""Live models made by the ``llava`` package (https://github.com/haotian-liu/LLaVA), as they are.

The package itself is not imported: its models are known by what they can do. They put image
features into the prompt in ``prepare_inputs_labels_for_multimodal``; while spans are watched, that
method is wrapped on the instance, and the labels it hands out tell where the features went.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.models import questions
from vlm_prune_ext.models.base import Family
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.generic import decoder_parts, find_decoder
from vlm_prune_ext.models.llava import packed_length, read_pinpoints, share_out
from vlm_prune_ext.models.towers import is_clip, vision_parts

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
_METHOD = "prepare_inputs_labels_for_multimodal"
# Stands for IGNORE_INDEX in labels of the caller's own while the wrapped method runs.
_IGNORED_BEFORE = -101


def _owns(model: Any) -> bool:
    can = hasattr(model, _METHOD) and hasattr(model, "get_vision_tower")
    return can and find_decoder(model) is not None


def _parts(model: Any) -> ModelParts:
    wrapper = model.get_vision_tower()
    tower = getattr(wrapper, "vision_tower", None)
    vision, why = None, "its vision tower is not loaded (call load_model() on it)"
    if tower is not None and is_clip(tower):
        projector = model.get_model().mm_projector
        vision = vision_parts(tower, feature=wrapper.select_layer, projector=projector)
    elif tower is not None:
        why = f"its vision tower, a {type(tower).__name__}, is not CLIP-like"
    return decoder_parts(
        model,
        find_decoder(model),
        vision=vision,
        why_no_vision=why,
        watch_spans=_Watch(model),
    )


class _Watch:
    """Attaches the wrapper; see :attr:`ModelParts.watch_spans`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, sink: SpanSink) -> list[Undo]:
        model, own = self.model, vars(self.model)
        before = own.get(_METHOD)
        own[_METHOD] = _Wrapped(model, getattr(model, _METHOD), sink)

        def undo() -> None:
            if before is None:
                own.pop(_METHOD, None)
            else:
                own[_METHOD] = before

        return [undo]


class _Wrapped:
    """The method with a look at what it did; arguments and results are the original's."""

    def __init__(self, model: Any, original: Any, sink: SpanSink) -> None:
        self.model, self.original, self.sink = model, original, sink

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        head = (input_ids, position_ids)
        tail = (images, image_sizes)
        passes = images is None or self.model.get_vision_tower() is None
        if passes or input_ids.shape[1] == 1:
            return self.original(*head, attention_mask, past_key_values, labels, *tail)
        questions.note(self.model, input_ids)
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        marked = torch.zeros_like(input_ids) if labels is None else labels.clone()
        marked[marked == IGNORE_INDEX] = _IGNORED_BEFORE
        ids, positions, full, cache, embeds, found = self.original(
            *head, mask, past_key_values, marked, *tail
        )
        visual = (found == IGNORE_INDEX) & full.bool()
        self.sink(visual, self._lengths(visual, images, image_sizes))
        # Without a mask the original returns none, and padding between samples of unequal length
        # would be read as text: it is kept where there is such padding.
        if attention_mask is None and bool(full.all()):
            full = None
        if labels is not None:
            found[found == _IGNORED_BEFORE] = IGNORE_INDEX
        return ids, positions, full, cache, embeds, None if labels is None else found

    def _lengths(
        self, visual: torch.Tensor, images: Any, image_sizes: Any
    ) -> list[list[int]] | None:
        """Visual tokens of each image by sample, ``None`` where unbroken runs must do."""
        each = self._each_image(images, image_sizes)
        counts = visual.sum(dim=1).tolist()
        # A sample without an image uses one up all the same, unseen.
        return None if each is None else share_out(_skip_unseen(each, counts), counts)

    def _each_image(self, images: Any, image_sizes: Any) -> list[int] | None:
        config, tower = self.model.config, self.model.get_vision_tower()
        whole = tower.select_feature == "cls_patch"
        per_tile = tower.num_patches + int(whole)
        stacks = isinstance(images, list) or images.ndim == 5
        if not stacks:
            return [per_tile] * images.shape[0]
        tile_counts = [image.shape[0] if image.ndim == 4 else 1 for image in images]
        merge = getattr(config, "mm_patch_merge_type", "flat")
        if merge == "flat":
            return [per_tile * count for count in tile_counts]
        if merge != "spatial_unpad" or image_sizes is None:
            return None
        side, grid = tower.config.image_size, tower.num_patches_per_side
        pinpoints = read_pinpoints(vars(config), "the model")
        return [
            packed_length((int(w), int(h)), pinpoints, side, grid) if count > 1 else per_tile + 1
            for (w, h), count in zip(image_sizes, tile_counts, strict=True)
        ]


def _skip_unseen(each: list[int], counts: list[int]) -> list[int]:
    """The images that are in the prompts: samples without visual tokens use one up unseen."""
    waiting, seen = list(each), []
    for count in counts:
        if count == 0 and len(waiting) > 0:
            waiting.pop(0)
            continue
        taken = 0
        while taken < count and waiting:
            taken += waiting[0]
            seen.append(waiting.pop(0))
    return seen


def family_of(line: FamilyLine) -> Family:
    """Live models only."""
    return Family(line, _owns, _parts)
