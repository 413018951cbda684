"""SAINT: drop visual tokens that are similar to others, in the language model or the tower.

Paper: Jeddi, Baghbanzadeh, Dolatabadi and Taati, "Similarity-Aware Token Pruning: Your VLM but
Faster" (arXiv 2503.11549), the section on vision-language models. Code: ``ArmenJeddi/saint``,
folder ``VLM``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import (
    Evidence,
    Method,
    Site,
    Stage,
    VisionStage,
    register,
    require_layer,
)
from vlm_prune_ext.methods.option import (
    Declared,
    a_bool,
    a_layer,
    a_number,
    an_integer,
    anything,
    image_length,
    option,
    require,
    system_length,
)
from vlm_prune_ext.select import mean_over_heads, sum_of_cosines, top_k_ascending, unit_rows

PRUNE_MODE = "iterative_drop_full_graph"
_OFF = (None, "None", "none")
_VIT_FIELDS = ("saint_prune_mode", "saint_keep_num", "saint_r")


# -- the rules -----------------------------------------------------------------------------------
class SaintRanking(NamedTuple):
    """What SAINT's selection knows before it decides how many to drop.

    Attributes:
        order: int64 ``(batch, candidates)``, the even places, first to be dropped first.
        counts: int64 ``(batch,)``, how many candidates are redundant enough to be counted.
    """

    order: torch.Tensor
    counts: torch.Tensor


def saint_ranking(
    metric: torch.Tensor, threshold: float, min_neighbors: int, gamma: float
) -> SaintRanking:
    """Rank the even places of each row by how redundant they are with the odd places.

    A candidate's neighbours are the odd places whose cosine with it is at least ``threshold``.
    With neighbours its score is ``count * exp(gamma * (their mean cosine - threshold))``, else the
    plain mean of its cosines with all odd places.

    Args:
        metric: ``(batch, n, d)``, any float dtype (computed in float32).
        threshold: cosine in [-1, 1].
        min_neighbors: neighbours that make a candidate count as redundant.
        gamma: weight of the neighbours' mean cosine.

    Returns:
        order and counts; with fewer than two tokens nothing counts.
    """
    unit = unit_rows(metric)
    even, odd = unit[:, 0::2], unit[:, 1::2]
    cosines = even @ odd.transpose(1, 2)
    near = cosines >= threshold
    neighbors = near.sum(dim=-1)
    near_sum = torch.where(near, cosines, 0.0).sum(dim=-1)
    near_mean = near_sum / neighbors.clamp(min=1)
    plain_mean = cosines.sum(dim=-1) / max(odd.shape[1], 1)
    weighted = neighbors * torch.exp(gamma * (near_mean - threshold))
    score = torch.where(neighbors > 0, weighted, plain_mean)
    order = 2 * torch.sort(score, dim=-1, descending=True, stable=True).indices
    return SaintRanking(order, (neighbors >= min_neighbors).sum(dim=-1))


def saint_drop(
    metric: torch.Tensor, threshold: float, min_neighbors: int, gamma: float
) -> torch.Tensor:
    """SAINT's selection, each row with a count of its own.

    As many candidates (even places) are dropped as have at least ``min_neighbors`` neighbours;
    the highest ranked ones go, so the ones dropped need not be exactly the ones counted. Odd
    places always stay. Parameters as in :func:`saint_ranking`.

    Returns:
        bool ``(batch, n)``, True stays.
    """
    order, counts = saint_ranking(metric, threshold, min_neighbors, gamma)
    rank = torch.arange(order.shape[1], device=order.device)
    keep = torch.ones(metric.shape[:2], dtype=torch.bool, device=metric.device)
    return keep.scatter(1, order, rank >= counts.unsqueeze(1))


def drop_schedule(patches: int, keep: int, r: int) -> list[int]:
    """How many patches each round of the iterative drop takes, down to ``keep``.

    A round takes the smaller of what is still too many and ``remaining // r`` (at least 1), and
    that number is the ``r`` of the next round. The published code divides by zero where
    ``remaining // r`` is 0.
    """
    rounds = []
    while patches > keep:
        r = min(patches - keep, max(patches // r, 1))
        rounds.append(r)
        patches -= r
    return rounds


def iterative_keep(metric: torch.Tensor, keep_num: int, r: int) -> tuple[torch.Tensor, list[int]]:
    """Drop the patches that are most similar to all others, a few at a time.

    Each round scores the remaining patches by the sum of their cosines with all remaining ones
    and drops the highest, as many as :func:`drop_schedule` says.

    Args:
        metric: ``(batch, patches, d)``, without CLS.
        keep_num: tokens to keep, **CLS counted**: ``keep_num - 1`` patches stay, at most
            ``patches``.
        r: pace of the first round.

    Returns:
        int64 ``(batch, keep_num - 1)`` ascending, and the number dropped in each round.
    """
    batch, patches = metric.shape[:2]
    rounds = drop_schedule(patches, keep_num - 1, r)
    unit = unit_rows(metric)
    alive = torch.ones(batch, patches, dtype=torch.bool, device=metric.device)
    for drop in rounds:
        score = sum_of_cosines(unit, alive).masked_fill(~alive, -math.inf)
        alive = alive.scatter(1, top_k_ascending(score, drop), False)
    # A stable sort instead of a bool index: its size is known, so a GPU is not waited for.
    return top_k_ascending(alive.int(), keep_num - 1), rounds


# -- inside the tower ----------------------------------------------------------------------------
@dataclass(frozen=True)
class SAINTViT(Declared):
    """SAINT inside the vision tower: drop the patches most similar to all others.

    After the attention of each layer in ``layers``, patches go a few at a time (those with the
    highest sum of key cosines with all remaining patches) until ``keep_num - 1`` are left. CLS
    always stays and takes no part.
    """

    layers: tuple[int, ...] | None = option(
        (19,),
        anything(),
        "0-based tower layers, ascending; None: every layer, which comes to the first one, since "
        "no later layer finds more than keep_num tokens.",
    )
    keep_num: int | tuple[int, ...] = option(
        376,
        anything(),
        "Tokens left, CLS counted; one for all layers or one per layer, never growing.",
    )
    r: int | tuple[int, ...] = option(
        16,
        anything(),
        "Pace: the first round drops patches // r; one for all layers or one per layer.",
    )

    def check(self) -> None:
        """Layers ascend; counts and paces are one, or one per layer."""
        for field in ("layers", "keep_num", "r"):  # lists, as files have them, become tuples
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.layers, int) and not isinstance(self.layers, bool):
            object.__setattr__(self, "layers", (self.layers,))
        self._check_layers()
        self._check_per_layer("keep_num", self.keep_num, 2)
        self._check_per_layer("r", self.r, 1)
        counts = self.keep_nums(len(self.layers or ()))
        falling = all(before >= after for before, after in pairwise(counts))
        require(falling, "keep_num", self.keep_num, "counts that do not grow from layer to layer")

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        accepted = "one or more tower layers, ascending, or None for all"
        require(
            isinstance(self.layers, tuple) and bool(self.layers), "layers", self.layers, accepted
        )
        for layer in self.layers:
            an_integer(0).check("layers", layer)
        ascending = list(self.layers) == sorted(set(self.layers))
        require(ascending, "layers", self.layers, accepted)

    def _check_per_layer(self, name: str, value: object, low: int) -> None:
        if not isinstance(value, tuple):
            an_integer(low).check(name, value)
            return
        for entry in value:
            an_integer(low).check(name, entry)
        expected = len(self.layers) if self.layers is not None else None
        accepted = f"one number, or {expected} numbers for layers={self.layers}"
        if expected is None:
            accepted = "one number where layers=None"
        require(len(value) == expected, name, value, accepted)

    def keep_nums(self, count: int) -> tuple[int, ...]:
        """``keep_num`` for each of ``count`` layers."""
        return self.keep_num if isinstance(self.keep_num, tuple) else (self.keep_num,) * count

    def paces(self, count: int) -> tuple[int, ...]:
        """``r`` for each of ``count`` layers."""
        return self.r if isinstance(self.r, tuple) else (self.r,) * count

    def stages(self, num_layers: int, feature_layer: int | None) -> tuple[VisionStage, ...]:
        """One stage per layer; see :meth:`Method.vision_stages`."""
        last = num_layers - 1 if feature_layer is None else feature_layer
        model = f"a vision tower of {num_layers} layers"
        if feature_layer is not None:
            model += f" whose features are taken after layer {feature_layer}"
        # One count for every layer: the first layer reaches it, the others find nothing to drop.
        layers = (0,) if self.layers is None else self.layers
        for layer in layers:
            require_layer("vit.layers", layer, 0, last, model)
        plan = zip(layers, self.keep_nums(len(layers)), self.paces(len(layers)), strict=True)
        return tuple(VisionStage(i, partial(_keep_patches, keep_num=k, r=r)) for i, k, r in plan)

    def label(self) -> str:
        """Short text for file names, e.g. ``vit19_keep376``."""
        layers = "all" if self.layers is None else _joined(self.layers)
        pace = "" if self.r == 16 else f"_r{_joined(self.r)}"
        return f"vit{layers}_keep{_joined(self.keep_num)}{pace}"


def _joined(value: int | tuple[int, ...]) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _keep_patches(keys: torch.Tensor, keep_num: int, r: int) -> torch.Tensor:
    patches = keys.shape[2]
    accepted = f"at most {patches + 1}, the patches that enter the layer and CLS"
    require(keep_num <= patches + 1, "keep_num", keep_num, accepted)
    return iterative_keep(mean_over_heads(keys), keep_num, r)[0]


@register
@dataclass(frozen=True)
class SAINT(Method):
    """Drop visual tokens that are similar to others, layer after layer and in the vision tower.

    In the language model, after each layer ``start ... end`` (both included), each image's tokens
    are split by place: even places are candidates, odd places always stay. The metric is that
    layer's keys after rotary embedding, averaged over key/value heads. As many candidates go as
    have at least ``min_neighbors`` odd tokens at cosine ``threshold`` or above, those with the
    most and the closest neighbours first. In the vision tower see :class:`SAINTViT`.
    ``start=None`` is ViT-only, ``vit=None`` is LLM-only, both given is hybrid.

    Deviations from the published code: every sample of a batch has its own count and its own
    choice (there: the batch average of the counts, and in the tower the choice of sample 0);
    padding takes no part; several images are pruned each on its own; hybrid takes the number of
    image tokens from the tower instead of a constant; decode steps get the position they would
    have had without pruning (there: one more, in every layer but the first; see
    ``reference_positions``); few patches cause no division by zero, keys of length zero no NaN;
    ties go to the lower place. A single sample's prefill is the same.
    """

    name = "saint"
    paper = "arXiv 2503.11549"
    code = "ArmenJeddi/saint"
    sites = ("tower", "decoder")
    budget_field = "threshold"
    resets = ("set_saint",)
    companions = (SAINTViT,)

    start: int | None = option(
        7,
        a_layer().optional(),
        "First layer after which tokens go, 0-based; None: none in the language model.",
    )
    end: int = option(16, a_layer(), "Last such layer, start ... number of layers - 1.")
    threshold: float = option(
        0.83,
        a_number(-1.0, 1.0, "a cosine in [-1, 1]"),
        "Cosine from which two tokens are neighbours, in [-1, 1].",
    )
    min_neighbors: int = option(
        5, an_integer(1), "Neighbours that make a token count as redundant, at least 1."
    )
    # Up to 40 the exponential of twice gamma fits in float32, so ranks stay distinct.
    gamma: float = option(
        10.0,
        a_number(0.0, 40.0, "a number in [0, 40]"),
        "Weight of the neighbours' mean cosine in the ranking, in [0, 40].",
    )
    sys_length: int | None = system_length()
    image_token_length: int | None = image_length()
    vit: SAINTViT | None = option(
        None,
        anything(),
        "What to do in the vision tower (a SAINTViT, or a mapping of its fields); None: nothing.",
        config=_VIT_FIELDS,
        nested=SAINTViT,
    )
    reference_positions: bool = option(
        False,
        a_bool(),
        "True gives decode steps the published code's positions (one too many in every layer but "
        "the first) for exact comparison.",
    )

    def check(self) -> None:
        """Something is asked for, and the layers are in order."""
        is_vit = self.vit is None or isinstance(self.vit, SAINTViT)
        require(is_vit, "vit", self.vit, "a SAINTViT, a mapping of its fields, or None")
        some = self.start is not None or self.vit is not None
        require(some, "start", None, "a layer, unless vit says what to drop in the vision tower")
        if self.start is not None:
            require(self.end >= self.start, "end", self.end, f"at least start={self.start}")

    @property
    def working_sites(self) -> tuple[Site, ...]:
        """ViT-only, LLM-only or hybrid."""
        tower: tuple[Site, ...] = ("tower",) if self.vit is not None else ()
        return tower if self.start is None else (*tower, "decoder")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage behind each layer ``start ... end``, so in front of ``start + 1 ...``."""
        if self.start is None:
            return ()
        model = f"a model of {num_layers} layers"
        require_layer("end", self.end, self.start, num_layers - 1, model)
        return tuple(Stage(i + 1, ("keys",), self._rule) for i in range(self.start, self.end + 1))

    def vision_stages(self, num_layers: int, feature_layer: int | None) -> tuple[VisionStage, ...]:
        """What ``vit`` asks for."""
        return () if self.vit is None else self.vit.stages(num_layers, feature_layer)

    def decode_position_shift(self, layer: int) -> int:
        """1 behind layer 0 with ``reference_positions``, as the published code has it."""
        return int(self.reference_positions and self.start is not None and layer > 0)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.keys is not None
        metric = mean_over_heads(evidence.keys)
        return saint_drop(metric, self.threshold, self.min_neighbors, self.gamma)

    def label(self) -> str:
        """Short text for file names, e.g. ``saint_s7_e16_t0.83_vit19_keep376``."""
        parts = []
        if self.start is not None:
            parts += [f"s{self.start}", f"e{self.end}", f"t{self.threshold}"]
            parts += [f"n{self.min_neighbors}"] if self.min_neighbors != 5 else []
            parts += [f"g{self.gamma}"] if self.gamma != 10.0 else []
            parts += ["refpos"] if self.reference_positions else []
        if self.vit is not None:
            parts.append(self.vit.label())
        return "_".join([self.name, *parts])

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """As in the base, with ``saint_prune_mode``, ``saint_keep_num`` and ``saint_r`` understood.

        ``saint_prune_mode`` is ``None`` (nothing in the tower), ``"iterative_drop_full_graph"``
        (every tower layer) or a list with one entry per tower layer from
        layer 0 on, each that name or ``None`` / ``"None"``; layers beyond the list are left
        alone. ``saint_keep_num`` and ``saint_r`` are one number, or a list with one entry per
        entry of ``saint_prune_mode``, or one per layer that prunes.
        """
        settings = dict(settings)
        config = {key: settings.pop(key) for key in _VIT_FIELDS if key in settings}
        vit = _vit_from_config(config)
        if vit is not None:
            if settings.get("vit") is not None:
                raise InputError("vit and saint_prune_mode are one setting: give one of them.")
            settings["vit"] = vit
        return super().from_settings(settings)


def _vit_from_config(config: Mapping[str, Any]) -> SAINTViT | None:
    """``saint_prune_mode``, ``saint_keep_num``, ``saint_r`` -> what they ask of the tower."""
    if config and "saint_prune_mode" not in config:
        raise InputError(f"{', '.join(config)} says nothing without saint_prune_mode: give both.")
    modes = config.get("saint_prune_mode")
    entries = list(modes) if isinstance(modes, list | tuple) else [modes]
    for mode in entries:
        if mode not in (*_OFF, PRUNE_MODE):
            raise unknown_name("saint_prune_mode", mode, [PRUNE_MODE, "None"])
    values = {
        key.removeprefix("saint_"): config[key]
        for key in _VIT_FIELDS[1:]
        if config.get(key) is not None
    }
    if modes == PRUNE_MODE:
        return _vit_everywhere(values)
    layers = tuple(layer for layer, mode in enumerate(entries) if mode not in _OFF)
    if not layers:
        return None
    chosen = {key: _chosen(f"saint_{key}", v, layers, len(entries)) for key, v in values.items()}
    return SAINTViT(layers=layers, **chosen)


def _vit_everywhere(values: Mapping[str, Any]) -> SAINTViT:
    """One name for all layers: lists beside it say how many layers there are."""
    counts = {len(value) for value in values.values() if isinstance(value, list | tuple)}
    if not counts:
        return SAINTViT(layers=None, **values)
    require(len(counts) == 1, "saint_r", values.get("r"), "as many numbers as saint_keep_num has")
    return SAINTViT(layers=tuple(range(counts.pop())), **values)


def _chosen(name: str, value: Any, layers: Sequence[int], total: int) -> Any:
    """The entries of a per-layer list that belong to layers that prune."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) == total:
        return tuple(value[layer] for layer in layers)
    accepted = f"one number, or {total} (one per entry of saint_prune_mode), or {len(layers)}"
    require(len(value) == len(layers), name, value, f"{accepted} (one per layer that prunes)")
    return tuple(value)
