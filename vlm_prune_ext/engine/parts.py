"""What the engine must know of a model: where its parts are. Family adapters fill it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn

from vlm_prune_ext.engine.prompt import Length

Undo = Callable[[], None]


class Projection(Protocol):
    """Queries or keys of some positions, after norm and rotary embedding.

    ``attn``: the layer's attention module. ``hidden``: ``(batch, n, hidden)``, what that module
    received. ``rotary``: its ``position_embeddings`` for those positions, each
    ``(batch or 1, n, head_dim)``, or ``None``. Returns ``(batch, heads, n, head_dim)``.
    """

    def __call__(self, attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Project some positions."""


class Joint(Protocol):
    """The joint space of image and question, of a CLIP checkpoint's two halves."""

    def attach(self) -> list[Undo]:
        """Hooks that see a prompt's questions, taken off by the answers."""

    def images(self, features: torch.Tensor) -> torch.Tensor:
        """``(tiles, N, C)``, patches of the feature layer -> ``(tiles, N, P)``."""

    def texts(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The questions of the prompt that was seen last: ``(batch, M, P)``, and bool
        ``(batch, M)``, which segments each has."""


SpanSink = Callable[[torch.Tensor, "Sequence[Sequence[Length]] | None"], None]
"""``sink(mask, lengths)``: ``mask`` ``(batch, seq)`` bool, True where the next prefill's input is
a visual token; ``lengths``: per sample, visual tokens of each image in order, of a video those of
each frame (``None``: every unbroken run is one image)."""

Present = Callable[[], "torch.Tensor | None"]
"""Positions in the prompt, as it came, of the tokens that hidden states hold at this moment: int64
``(batch, n)``, -1 at empty slots; ``None`` where nothing is missing."""


@dataclass
class Packed:
    """A tower that runs all images of a prompt as one sequence of patches.

    Attributes:
        attn: attention module of the last layer in which a patch sees its whole image.
        read: the keyword arguments of its call -> queries and keys ``(patches, heads, head_dim)``,
            after rotary embedding, and the lengths of the images.
        group: consecutive patches that the projector makes one token of.
        entrance: module that is called with the projector's input; ``None``: the projector.
    """

    attn: nn.Module
    read: Callable[[torch.Tensor, dict[str, Any]], tuple[torch.Tensor, torch.Tensor, list[int]]]
    group: int
    entrance: nn.Module | None = None


@dataclass
class VisionParts:
    """A vision tower.

    Attributes:
        tower: the module whose layers drop patches.
        layers: its encoder layers, each with ``self_attn`` or ``attention`` that has ``q_proj`` and
            ``k_proj``.
        num_heads: attention heads.
        feature_layer: index of the last layer whose output the language model uses.
        projector: module that maps tower features ``(images, patches, dim)`` to the language
            model's width; ``None`` for a bare tower.
        grid: patches per side.
        cls: whether CLS is the first of its tokens.
        drops: whether its layers may drop patches (CLIP's may).
        pools_videos: frames of videos are made smaller around the projector: which tokens are which
            patches is not known then.
        packed: for towers that take all images as one sequence (Qwen's); the other fields but
            ``tower`` and ``projector`` do not matter then.
    """

    tower: nn.Module
    layers: nn.ModuleList
    num_heads: int
    grid: int
    feature_layer: int | None = None
    projector: nn.Module | None = None
    cls: bool = True
    drops: bool = True
    pools_videos: bool = False
    packed: Packed | None = None


@dataclass
class ModelParts:
    """Where things are in one model.

    Attributes:
        model: what the user passed.
        decoder: the module that runs the decoder layers (takes ``inputs_embeds``,
            ``attention_mask``, ``position_ids``, ``past_key_values``); ``None`` for a bare tower.
        layers: the decoder layers, each with ``self_attn`` but for those that are ``linear``.
        final_norm: module that runs after the last layer.
        queries, keys: projections, see :class:`Projection`.
        scaling: factor on query-key products, by attention module.
        input_norm: norm in front of a layer's attention, by layer.
        plain_rotary: one rotary position per token, from ``decoder.rotary_emb(hidden,
            position_ids=...)`` as in LLaMA, the same in all layers.
        rotate: ``rotate(hidden, positions (batch, n), layer)`` -> ``position_embeddings`` of text
            at these positions, where the decoder's rotary embedding is not the plain one; ``None``
            there: positions cannot be counted anew.
        stacked: first layers behind which the decoder adds features at visual tokens (DeepStack).
        linear: layers that carry a state on instead of attending to keys (linear attention); they
            take a 2-D padding mask, and none at a decode step.
        counts_real: where the decoder is given no positions, it counts tokens that are not
            padding (OPT), not places in the row.
        vision: the tower, or ``None``.
        why_no_vision: sentence for methods that need the tower, where it is not CLIP-like.
        watch_spans: attaches whatever tells the engine where visual tokens are, returns undos;
            ``None`` where only ``visual_span`` can tell (a bare language model).
        joint: what ``FeatureStage.text_tower`` says -> the joint space of image and question;
            ``None`` where there can be none.
        follow: attaches whatever must know which tokens are left while the layers run (features
            that a decoder adds between them), returns undos; ``None`` where nothing must.
    """

    model: nn.Module
    decoder: nn.Module | None = None
    layers: nn.ModuleList = field(default_factory=nn.ModuleList)
    final_norm: nn.Module | None = None
    queries: Projection | None = None
    keys: Projection | None = None
    scaling: Callable[[Any], float] = attrgetter("scaling")
    input_norm: Callable[[Any], Any] = lambda layer: layer.input_layernorm
    plain_rotary: bool = True
    rotate: Callable[[torch.Tensor, torch.Tensor, int], Any] | None = None
    stacked: int = 0
    linear: frozenset[int] = frozenset()
    counts_real: bool = False
    vision: VisionParts | None = None
    why_no_vision: str = "the model has no vision tower"
    watch_spans: Callable[[SpanSink], list[Undo]] | None = None
    joint: Callable[[Any], Joint] | None = None
    follow: Callable[[Present], list[Undo]] | None = None

    @property
    def first_attending(self) -> int:
        """The first layer that keeps keys."""
        return next((n for n in range(len(self.layers)) if n not in self.linear), 0)
