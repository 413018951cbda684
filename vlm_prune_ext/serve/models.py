"""vLLM's models with fewer visual tokens. Imported by vLLM alone, when a configuration asks.

Two things must agree: the places that a prompt keeps for an image, made from its size by the
processor, and the rows that the model returns for it. Both follow from one
:class:`~vlm_prune_ext.serve.selection.Selection`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models import (
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen3_vl,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from vlm_prune_ext.engine.parts import VisionParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.serve.plugin import selection_of
from vlm_prune_ext.serve.positions import planned_positions, read_places, with_places
from vlm_prune_ext.serve.rows import RowPruner
from vlm_prune_ext.serve.selection import KEY, Picture, Selection
from vlm_prune_ext.serve.towers import PackedRead, packed_parts, served_watch, tile_parts


# -- places in the prompt ------------------------------------------------------------------------
class _ShorterPrompts:
    """In front of a family's multimodal processor: fewer places for an image, and keys of caches
    that differ where rows differ."""

    info: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        selection = selection_of(self.info.ctx.model_config)
        assert selection is not None
        self.selection: Selection = selection

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> list[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        return [self._shorter(u, mm_items) if u.modality == "image" else u for u in updates]

    def _shorter(self, update: Any, mm_items: Any) -> Any:
        whole = update.replacement

        def replacement(index: int) -> Any:
            tokens = whole(index)
            images = mm_items.get_items("image", ImageProcessorItems)
            return tokens[: self.selection.left(self._picture(images, index, len(tokens)))]

        return replace(update, replacement=replacement)

    def _picture(self, images: Any, index: int, tokens: int) -> Picture:
        return Picture(tokens)

    def _get_mm_hashes(self, inputs: Any) -> Mapping[str, list[str]]:
        hashes = dict(super()._get_mm_hashes(inputs))  # type: ignore[misc]
        if "image" in hashes:
            hashes["image"] = [_keyed(key, self.selection) for key in hashes["image"]]
        return hashes


def _keyed(key: str, selection: Selection) -> str:
    """An image's key in the engine's caches, of this method alone."""
    return hashlib.sha256(f"{key} {KEY} {selection.identity}".encode()).hexdigest()


class _TiledPrompts(_ShorterPrompts):
    """Where an image is several crops."""

    def _picture(self, images: Any, index: int, tokens: int) -> Picture:
        size, encoder = images.get_image_size(index), self.info.get_vision_encoder_info()
        rows, columns = llava_next.get_anyres_image_grid_shape(
            image_size=(size.height, size.width),
            grid_pinpoints=self.info.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        return Picture(tokens, 1 + rows * columns, encoder.get_patch_grid_length() ** 2)


class _LlavaPrompts(_ShorterPrompts, llava.LlavaMultiModalProcessor):
    pass


class _LlavaNextPrompts(_TiledPrompts, llava_next.LlavaNextMultiModalProcessor):
    pass


class _LlavaOnevisionPrompts(_TiledPrompts, llava_onevision.LlavaOnevisionMultiModalProcessor):
    pass


class _Qwen25Prompts(_ShorterPrompts, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


class _Qwen3Prompts(_ShorterPrompts, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


class _ImagesOnly:
    """A video's positions would have to be counted anew as well: not done."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}


class _Qwen25Info(_ImagesOnly, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class _Qwen3Info(_ImagesOnly, qwen3_vl.Qwen3VLProcessingInfo):
    pass


# -- rows ----------------------------------------------------------------------------------------
class _Pruned:
    """In front of a family's class: encodes as it does, and returns what is left."""

    supports_tower_connector_lora = False
    _pruner: RowPruner
    _limit: int

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        selection = selection_of(vllm_config.model_config)
        assert selection is not None
        for what, on in self._unfit(vllm_config, selection).items():
            if on:
                name = selection.method.name
                raise InputError(f"{KEY} with {name} is not possible with {what}: turn it off.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._limit = vllm_config.scheduler_config.max_num_batched_tokens
        vision = self._vision() if selection.uses_tower else None
        self._pruner = RowPruner(
            selection,
            self,  # type: ignore[arg-type]
            vision,
            served_watch(tensor_model_parallel_all_gather),
        )

    def _unfit(self, vllm_config: Any, selection: Selection) -> dict[str, bool]:
        """What would pass a rule by -> whether it is on."""
        compilation = vllm_config.compilation_config
        shared_out = vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
        return {
            "compile_mm_encoder=True": selection.uses_tower and compilation.compile_mm_encoder,
            "cudagraph_mm_encoder=True": compilation.cudagraph_mm_encoder,
            "mm_encoder_tp_mode='data'": selection.uses_tower and shared_out,
            "speculative decoding": vllm_config.speculative_config is not None,
        }

    def _vision(self) -> VisionParts:
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows of each image or video. Places are few, so a step may bring more images than the
        unpruned engine would ever encode at once: memory was not measured for these."""
        if "pixel_values" not in kwargs:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        parts = [
            super(_Pruned, self).embed_multimodal(**part)  # type: ignore[misc]
            for part in self._parts(kwargs)
        ]
        return tuple(rows for part in parts for rows in part)

    def _parts(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class _Tiled(_Pruned):
    """LLaVA's families: pixels by image, and by crop."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def _vision(self) -> VisionParts:
        heads = self.config.vision_config.num_attention_heads
        return tile_parts(self.vision_tower, self.multi_modal_projector, heads)

    def _parts(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        pixels = kwargs["pixel_values"]
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        costs = [patches * (len(image) if image.dim() > 3 else 1) for image in pixels]
        for part in _within(costs, self._limit):
            yield {name: value[part] for name, value in kwargs.items()}

    def _process_image_input(self, image_input: Any) -> list[torch.Tensor]:
        _refuse_embeddings(image_input)
        with self._pruner.watching():
            images = super()._process_image_input(image_input)  # type: ignore[misc]
        return [left.rows for left in self._pruner.prune(list(images))]


class _Packed(_Pruned):
    """Qwen's families: all patches of all images in one sequence, positions of several axes."""

    config: Any
    visual: Any
    multimodal_config: Any
    _read: PackedRead | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Of the tokens of a step, as far as its graphs may know them: always the same memory.
        device = vllm_config.device_config.device
        self._moves = torch.zeros(3, self._limit, dtype=torch.int64, device=device)

    def _unfit(self, vllm_config: Any, selection: Selection) -> dict[str, bool]:
        several = vllm_config.parallel_config.pipeline_parallel_size > 1
        # Only the first stage learns where tokens stand.
        return super()._unfit(vllm_config, selection) | {"pipeline_parallel_size above 1": several}

    def _vision(self) -> VisionParts:
        config, blocks = self.config.vision_config, self.visual.blocks
        layer = max(getattr(config, "fullatt_block_indexes", None) or [len(blocks) - 1])
        self._read = PackedRead(blocks[layer].attn, tensor_model_parallel_all_gather)
        return packed_parts(self.visual, self._read, layer, config.num_heads)

    def _parts(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        grids, pixels = kwargs["image_grid_thw"], kwargs["pixel_values"]
        patches = grids.prod(-1).tolist()
        merged = int(self.visual.spatial_merge_size) ** 2
        for part in _within([count // merged for count in patches], self._limit):
            first = sum(patches[: part.start])
            last = first + sum(patches[part])
            yield {**kwargs, "pixel_values": pixels[first:last], "image_grid_thw": grids[part]}

    def _process_image_input(self, image_input: Any) -> list[torch.Tensor]:
        _refuse_embeddings(image_input)
        thw, merge = image_input["image_grid_thw"], int(self.visual.spatial_merge_size)
        if self._read is not None:
            self._read.lengths = thw.prod(-1).tolist()
        with self._pruner.watching():
            images = super()._process_image_input(image_input)  # type: ignore[misc]
        grids = [(rows // merge, columns // merge) for _, rows, columns in thw.tolist()]
        left = self._pruner.prune(images, grids, self.config.vision_config.out_hidden_size)
        return [
            with_places(one.rows, one.places, columns)
            for one, (_, columns) in zip(left, grids, strict=True)
        ]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt whose images are not encoded yet."""
        merge, images = int(self.visual.spatial_merge_size), []
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            _, rows, columns = feature.data["image_grid_thw"].data.tolist()
            where = feature.mm_position
            images.append((where.offset, where.length, rows // merge, columns // merge))
        return planned_positions(len(input_tokens), images)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the family's; notes where tokens stand in their images."""
        self._moves.zero_()
        if multimodal_embeddings:
            assert is_multimodal is not None
            read = [read_places(rows) for rows in multimodal_embeddings]
            places = torch.cat([place for _, place in read], dim=1)
            moves = self._moves[:, : len(input_ids)]
            moves[:, is_multimodal.to(moves.device)] = places
            multimodal_embeddings = [rows for rows, _ in read]
        return super().embed_input_ids(  # type: ignore[misc,no-any-return]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """As the family's, with tokens of images at their places. The runner writes positions anew
        for each step; graphs read them where they are. A step of decoded tokens alone may come
        without its tokens being embedded here."""
        positions.add_(self._moves[:, : positions.shape[-1]])
        self._moves.zero_()
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


def _within(costs: Sequence[int], limit: int) -> Iterator[slice]:
    """Runs of images whose costs stay within a limit, at least one image each."""
    first, total = 0, 0
    for index, cost in enumerate(costs):
        if index > first and total + cost > limit:
            yield slice(first, index)
            first, total = index, 0
        total += cost
    if first < len(costs):
        yield slice(first, len(costs))


def _refuse_embeddings(image_input: Any) -> None:
    if image_input["type"] == "image_embeds":
        raise InputError(f"Images as embeddings are not accepted with {KEY}: send pictures.")


# -- families ------------------------------------------------------------------------------------
@MULTIMODAL_REGISTRY.register_processor(
    _LlavaPrompts,
    info=llava.LlavaProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlava(_Tiled, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaNextPrompts,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(_Tiled, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaOnevisionPrompts,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(_Tiled, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision; videos are left whole."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen25Prompts,
    info=_Qwen25Info,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(_Packed, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3Prompts,
    info=_Qwen3Info,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(_Packed, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, DeepStack features included."""
