"""What passes between a rule and the engine: what a rule may ask to see, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

Budget = int | float
Need = Literal["attention:last", "attention:text", "attention:visual", "keys", "hidden"]
FeatureNeed = Literal["features", "attention", "keys", "last", "projected", "joint"]


@dataclass
class Evidence:
    """What a rule sees: one group of images (a batch) with equally many visual tokens each.

    Attributes:
        total: visual tokens each image had when it entered layer 0 (what a ratio refers to).
        places: ``(batch, n)`` int64, which of those ``total`` tokens are still there, ascending.
        attention: ``(batch, n)`` float32, the attention each token received in the layer before,
            mean over query heads, summed over the query rows the stage asked for (``None`` if it
            asked for none).
        keys: ``(batch, kv_heads, n, head_dim)``, that layer's keys after rotary embedding.
        hidden: ``(batch, n, hidden)``, the hidden states that would enter the layer.
        sample: index in the batch of the forward pass, per row (for messages only; a rule must
            not let its answer depend on it, or a batch would differ from single runs).
    """

    total: int
    places: torch.Tensor
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    sample: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Visual tokens of each image that are still there, ``n``."""
        return self.places.shape[1]


Rule: TypeAlias = "Callable[[Evidence], torch.Tensor]"
"""Evidence -> what stays: int64 ``(batch, k)`` places 0...n-1 in ascending order, or, where the
number may differ between rows, a bool mask ``(batch, n)``."""


@dataclass(frozen=True)
class Stage:
    """One selection in the language model.

    Attributes:
        layer: 0-based decoder layer in front of which tokens go; ``num_layers`` means after the
            last. Evidence about attention and keys is that of layer ``layer - 1``.
        needs: what the rule wants to see.
        rule: the pure selection.
        mode: ``"drop"`` removes tokens from the sequence; ``"mask"`` hides them as keys only and
            selects anew at each decode step.
        budget: what the rule keeps per image, for error messages and FLOPs (``None``: unknown
            before it runs, as with thresholds).
    """

    layer: int
    needs: tuple[Need, ...]
    rule: Rule
    mode: Literal["drop", "mask"] = "drop"
    budget: Budget | None = None


@dataclass(frozen=True)
class VisionStage:
    """One selection inside a CLIP-like vision tower, after the attention of ``layer``.

    ``rule(keys) -> kept``: ``keys`` ``(batch, heads, patches, head_dim)`` without CLS, as
    the layer's key projection gives them; returns int64 ``(batch, k)`` places among the patches
    that entered the layer, ascending.
    """

    layer: int
    rule: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FeatureEvidence:
    """What a rule between tower and language model sees: a batch of crops with N patches each.

    A picture is one crop, except for high-resolution input. Only what a rule needs is there; the
    rest is ``None``. "With CLS" means that row 0 is CLS where the tower has one (``cls``).

    Attributes:
        patches: N.
        crops: crops of the picture that each row belongs to.
        cls: whether the tower has a CLS token. Where it has none, attention is the mean over the
            rows of all patches instead of the row of CLS.
        features: need ``features``: ``(batch, [1 +] N, C)``, output of the feature layer, with CLS.
        attention: need ``attention``: ``(batch, heads, N)`` float32, softmax output of the feature
            layer, CLS as the query, patches as keys (CLS itself left out, not renormalised).
        keys: need ``keys``: ``(batch, [1 +] N, head_dim)`` float32, the feature layer's key
            projection, mean over heads, with CLS.
        last_keys, last_queries: need ``last``: ``(batch, [1 +] N, C)`` and ``(batch, 1 or N, C)``,
            key projection of the tower's last layer, with CLS, and query projection of its CLS (of
            all patches where there is none), heads side by side, not scaled.
        projected: need ``projected``: ``(batch, N, D)``, tokens as the language model gets them.
        image_embeds: need ``joint``: ``(batch, N, P)``, patches in the joint space of image and
            text; ``text_embeds``: ``(batch, M, P)``, the question's M segments there;
            ``segments``: bool ``(batch, M)``, which of them a row has (``None``: all).
    """

    patches: int
    crops: int = 1
    cls: bool = True
    features: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    last_keys: torch.Tensor | None = None
    last_queries: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    @property
    def patch_features(self) -> torch.Tensor:
        """``features`` without CLS, ``(batch, N, C)``."""
        assert self.features is not None
        return self.features[:, 1:] if self.cls else self.features


CLS, MERGED = -1, -2


@dataclass
class NewTokens:
    """A rule's answer where tokens are new or stand in an order of their own.

    Attributes:
        kept: int64 ``(batch, k)``, what the trace shows; -1 where a row has fewer.
        places: int64 ``(batch, t)``, for each token the language model is to get, in its order: a
            place in the grid, :data:`CLS`, or :data:`MERGED` for one that stands for several.
        rows: ``(batch, t, C)``, the tokens as tower features, to be projected; ``None``: all are
            plain patches.
        counts: tokens of each row, where they differ; the rest of the row is filling.
        added: how many of the tokens are no patch of the tower.
    """

    kept: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor | None = None
    counts: tuple[int, ...] | None = None
    added: int = 0

    @staticmethod
    def after_merging(
        centres: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor
    ) -> NewTokens:
        """The answer of rules that merge around centres (see ``select.Merged``)."""
        places = centres.new_full(tokens.shape[:2], MERGED)
        each = tuple(count + 1 for count in counts.tolist())
        return NewTokens(centres, places, rows=tokens, counts=each, added=1)


@dataclass(frozen=True)
class FeatureStage:
    """The one selection between tower and language model.

    Attributes:
        needs: what the rule wants to see.
        rule: evidence -> places that stay, int64 ``(batch, k)`` ascending, or :class:`NewTokens`.
        over: what one row of the evidence is. ``"crop"``: each crop by itself, budget per crop.
            ``"picture"``: all crops of a picture in one sequence. ``"span"``: the picture's tokens
            as the language model would get them, row-end tokens included (needs no tower).
        budget: what the rule keeps per row, for messages and FLOPs (``None``: data decide).
        text_tower: for need ``joint``: what the user said about the text half of CLIP.
    """

    needs: tuple[FeatureNeed, ...]
    rule: Callable[[FeatureEvidence], torch.Tensor | NewTokens]
    over: Literal["crop", "picture", "span"] = "crop"
    budget: Budget | None = None
    text_tower: Any = None
