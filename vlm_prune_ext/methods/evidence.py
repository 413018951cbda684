"""What passes between a rule and the engine: what a rule may ask to see, is shown, and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlm_prune_ext.lazy import torch

Budget = int | float
FeatureNeed = Literal["features", "attention", "keys", "last", "projected", "joint"]


@dataclass(frozen=True)
class Attention:
    """A need: attention that the visual tokens receive, recomputed from a few query rows.

    Attributes:
        rows: who attends: the prompt's last token, the text behind the last image, the visual
            tokens, or the rows of that text which an earlier stage chose.
        layer: the layer in front of the stage, or the one to come (its norm and projections
            applied to what would enter it if nothing were dropped).
        rotary: queries and keys carry their rotary positions.
        over: the softmax runs over all that a row sees, or over the image's tokens alone.
        maps: not summed: one weight per head and row, in :attr:`Evidence.maps`.
    """

    rows: Literal["last", "text", "visual", "chosen"] = "last"
    layer: Literal["before", "coming"] = "before"
    rotary: bool = True
    over: Literal["row", "image"] = "row"
    maps: bool = False


Named = Literal[
    "attention:last",
    "attention:text",
    "attention:visual",
    "keys",
    "hidden",
    "normed",
    "positions",
    "tail_keys",
    "tail_hidden",
    "tail_normed",
    "frequencies",
]
Need = Named | Attention
"""``"attention:last"`` stands for ``Attention("last")``, and so on; the other names are those of
:class:`Evidence`. Nothing is computed that no stage asks for."""


def speaks_of_text(need: Need | FeatureNeed) -> bool:
    """Does a need show a rule anything of the text behind the images, so that the choice may depend
    on the question? Causal attention keeps the question from all that stands in front of it."""
    if isinstance(need, str) and need.startswith("attention:"):
        return need != "attention:visual"
    if isinstance(need, Attention):
        return need.rows != "visual"
    return need == "joint" or need.startswith("tail_")


@dataclass
class Evidence:
    """What a rule sees: one group of images (a batch) with equally many visual tokens each.

    The *tail* is the text behind a sample's last image (the prompt's last token, where it ends in
    an image); tails of different lengths are filled up from behind.

    Attributes:
        total: visual tokens each image had when it entered layer 0 (what a ratio refers to).
        places: ``(batch, n)`` int64, which of those ``total`` tokens are still there, ascending;
            rows that were added count on from ``total``.
        attention: ``(batch, n)`` float32, the attention each token received, mean over query
            heads, summed over the query rows the stage asked for, with their weights if they were
            chosen (``None`` if it asked for none).
        maps: ``(batch, heads, rows, n)`` float32, the same before any mean or sum.
        keys: ``(batch, kv_heads, n, head_dim)``, keys of the layer before, with rotary positions.
        hidden: ``(batch, n, hidden)``, the hidden states that would enter the layer; at layer 0
            the embeddings.
        normed: the same, through the decoder's final norm.
        positions: ``(batch, n)`` int64, places in the prompt, padding not counted.
        tail_real: ``(batch, t)`` bool, False at fillers of the tail; there with whatever else
            speaks of the tail.
        tail_keys, tail_hidden, tail_normed: as above, of the tail.
        tail_positions: ``(batch, t)``, as ``positions``.
        chosen: ``(batch, t)`` float32, the weights that an earlier stage gave to the tail's rows.
        frequencies: ``(head_dim / 2,)`` float32, angle per position of the rotary embedding.
        sample: index in the batch of the forward pass, per row (for messages only; a rule must
            not let its answer depend on it, or a batch would differ from single runs).
    """

    total: int
    places: torch.Tensor
    attention: torch.Tensor | None = None
    maps: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    tail_real: torch.Tensor | None = None
    tail_keys: torch.Tensor | None = None
    tail_hidden: torch.Tensor | None = None
    tail_normed: torch.Tensor | None = None
    tail_positions: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    frequencies: torch.Tensor | None = None
    sample: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Visual tokens of each image that are still there, ``n``."""
        return self.places.shape[1]

    @property
    def everything(self) -> torch.Tensor:
        """The answer that all stay, int64 ``(batch, n)``."""
        return torch.arange(self.count, device=self.places.device).expand_as(self.places)


@dataclass(frozen=True)
class Answer:
    """What a rule decides where it does more than drop.

    Attributes:
        keep: what stays, see :data:`Rule`.
        rows: ``(batch, c, hidden)``, hidden states of new tokens, which stand behind the kept ones
            of their image and count as visual tokens from then on.
    """

    keep: torch.Tensor
    rows: torch.Tensor | None = None


Rule: TypeAlias = "Callable[[Evidence], torch.Tensor | Answer]"
"""Evidence -> what stays: int64 ``(batch, k)`` places 0...n-1 in ascending order (``k`` may be 0),
or, where the number may differ between rows, a bool mask ``(batch, n)``; in an :class:`Answer` if
rows are added. Of a stage with ``mode="observe"``: float32 ``(batch, t)``, weights of the tail's
rows for stages that ask for the attention of ``"chosen"`` rows."""


@dataclass(frozen=True)
class Stage:
    """One selection in the language model.

    Attributes:
        layer: 0-based decoder layer in front of which tokens go; ``num_layers`` means after the
            last. Keys, and attention unless it is of the layer to come, are those of layer
            ``layer - 1``.
        needs: what the rule wants to see.
        rule: the pure selection.
        mode: ``"drop"`` removes tokens from the sequence; ``"mask"`` hides them as keys only and
            selects anew at each decode step; ``"observe"`` only chooses rows for later stages.
        budget: what the rule keeps per image, for error messages and FLOPs (``None``: unknown
            before it runs, as with thresholds).
        left: ``left(total, now)``: visual tokens of an image of ``total`` that had ``now`` in front
            of the stage and has so many behind it, rows that are added included; ``None``: as
            ``budget`` says.
        recount: positions are counted anew over what is left, 0, 1, ...; a token that is decoded
            then has the length of each layer's own cache as its position there.
    """

    layer: int
    needs: tuple[Need, ...]
    rule: Rule
    mode: Literal["drop", "mask", "observe"] = "drop"
    budget: Budget | None = None
    left: Callable[[int, int], int] | None = None
    recount: bool = False


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
        grid: rows and columns of the patches; ``None``: they are no grid, or it is not known.
        frames: tokens of each frame, of a video that is seen as one; empty: a picture, or a frame.
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
    grid: tuple[int, int] | None = None
    cls: bool = True
    frames: tuple[int, ...] = ()
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
        projected: ``rows`` are ``(batch, t, D)``, as the language model gets them.
        counts: tokens of each row, where they differ; the rest of the row is filling.
        added: how many of the tokens are no patch of the tower.
    """

    kept: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor | None = None
    projected: bool = False
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
        merges: the rule makes new rows, through which gradients go (choosing has none).
        row_ends: row-end tokens of a picture in crops stay, and tokens stand at their places among
            them.
        budget: what the rule keeps per row, for messages and FLOPs (``None``: data decide).
        left: tokens that come out of so many, where ``budget`` does not say it.
        text_tower: for need ``joint``: what the user said about the text half of CLIP.
    """

    needs: tuple[FeatureNeed, ...]
    rule: Callable[[FeatureEvidence], torch.Tensor | NewTokens]
    over: Literal["crop", "picture", "span"] = "crop"
    merges: bool = False
    row_ends: bool = False
    budget: Budget | None = None
    left: Callable[[int], int] | None = None
    text_tower: Any = None
