"""What rules see of a layer: attention rows recomputed from its keys, and gathers of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.layout import Group, Layout, Prefill, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError, first_line
from vlm_prune_ext.methods.evidence import Attention, Evidence, Need

logger = logging.getLogger("vlm_prune_ext")

Seen = list[dict[str, torch.Tensor]]
"""By group, fields of :class:`Evidence` that were read off a layer."""


def attention_needs(needs: Sequence[Need], layer: str) -> list[Attention]:
    """Those of ``needs`` that are attention of the layer ``"before"`` or the one ``"coming"``."""
    found = []
    for need in needs:
        if isinstance(need, str) and need.startswith("attention:"):
            need = Attention(need.removeprefix("attention:"))  # type: ignore[arg-type]
        if isinstance(need, Attention) and need.layer == layer:
            found.append(need)
    return found


def reads(needs: Iterable[Need]) -> bool:
    """Does a stage want to see anything of the layer in front of it?"""
    needs = tuple(needs)
    return bool({"keys", "tail_keys"} & set(needs)) or bool(attention_needs(needs, "before"))


@dataclass(eq=False)
class Looker:
    """Shows a rule the evidence about one group of images.

    Attributes:
        needs: what the rule asks for; it is shown nothing else.
        parts: where things are in the model.
        prefill: state of the prompt.
        hidden: ``(batch, n, hidden)``, what would enter the layer; ``None`` at a decode step.
        seen: what was read off layers, see :meth:`AttentionReader.read`.
    """

    needs: Sequence[Need]
    parts: ModelParts
    prefill: Prefill
    hidden: torch.Tensor | None
    seen: Seen | None = None

    def __call__(self, index: int, group: Group, places: torch.Tensor) -> Evidence:
        """``index`` of the group in the prompt; ``places`` ``(rows, n)``: where its tokens are."""
        seen = self.seen[index] if self.seen else {}
        evidence = Evidence(
            group.total, group.places, chosen=group.chosen, sample=group.names, **seen
        )
        prefill, samples = self.prefill, group.samples
        self._show_hidden(evidence, samples, places)
        if any(speaks_of_tail(need) for need in self.needs):
            tail = prefill.tail()
            slots, evidence.tail_real = tail.slots[samples], tail.real[samples]
            there = prefill.layout.places_of(slots, samples)
            self._show_hidden(evidence, samples, there, "tail_")
            if "positions" in self.needs:
                evidence.tail_positions = prefill.positions_of(slots, samples)
        if "positions" in self.needs:
            # A row that was added stands for its image's last token.
            slots = group.tokens.where(group.places < group.total, group.last)
            evidence.positions = prefill.positions_of(slots, samples)
        if "frequencies" in self.needs:
            evidence.frequencies = frequencies(self.parts)
        return evidence

    def _show_hidden(
        self, evidence: Evidence, samples: torch.Tensor, places: torch.Tensor, prefix: str = ""
    ) -> None:
        for name in ("hidden", "normed"):
            if self.hidden is not None and prefix + name in self.needs:
                value = self.hidden[samples[:, None], places]
                if name == "normed":
                    norm: Any = self.parts.final_norm
                    # Not as a call: hooks on the norm wait for what leaves the last layer.
                    value = norm.forward(value)
                setattr(evidence, prefix + name, value)


def speaks_of_tail(need: Need) -> bool:
    """Does a need concern the text behind the images row by row?"""
    if isinstance(need, Attention):
        return need.maps and need.rows in ("text", "chosen")
    return need.startswith("tail_")


def frequencies(parts: ModelParts) -> torch.Tensor:
    """Angles per position of the rotary embedding, float32 ``(head_dim / 2,)``.

    Raises:
        InputError: the decoder has none, or several.
    """
    found = getattr(getattr(parts.decoder, "rotary_emb", None), "inv_freq", None)
    if found is None:
        raise InputError(
            f"{type(parts.decoder).__name__} does not have one rotary embedding for all layers, "
            "which this method divides attention by."
        )
    return found.float()


def cached_keys(cache: Any, layer: int, queries: int, *, prompt: bool) -> torch.Tensor | None:
    """Keys a layer has just attended to, ``(batch, kv_heads, n, head_dim)``.

    Args:
        cache: of the whole model, or ``None``.
        layer: 0-based.
        queries: tokens of this call.
        prompt: they are a prompt.

    Returns:
        ``None`` where a prompt's keys are not, or not all, in the cache.

    Raises:
        InputError: a decode step whose earlier keys the cache has let go of.
    """
    if cache is None:
        return None
    keys = cache.layers[layer].keys
    held = keys.shape[-2] if keys.dim() == 4 else 0  # a quantised cache holds something else
    if prompt:
        return keys[..., :queries, :] if held >= queries else None
    if held < int(cache.get_seq_length(layer)):
        raise InputError(
            f"mode='mask' chooses anew at each decode step from the keys of layer {layer}, but the "
            f"cache of that layer ({type(cache.layers[layer]).__name__}) does not hold them all as "
            "they are: use mode='drop', or a layer and a cache that do."
        )
    return keys[..., : int(cache.get_seq_length(layer)), :]


@dataclass(frozen=True)
class _Rows:
    """Query rows.

    Attributes:
        places: int64 ``(b, rows)`` in this call's input.
        weights: float32 ``(b, rows)``; ``None``: all count.
        samples: int64 ``(b,)`` batch rows that they belong to; ``None``: each to its own.
    """

    places: torch.Tensor
    weights: torch.Tensor | None
    samples: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(batch or 1, ...)`` -> ``(b, ...)``."""
        if self.samples is None:
            return tensor
        return tensor.expand(-1 if len(tensor) > 1 else len(self.samples), *tensor.shape[1:])[
            self.samples if len(tensor) > 1 else slice(None)
        ]

    def block(self, part: slice) -> _Rows:
        """Some of the rows."""
        weights = None if self.weights is None else self.weights[:, part]
        return _Rows(self.places[:, part], weights, self.samples)


@dataclass(eq=False)
class AttentionReader:
    """Reads attention rows and keys of a layer, as it attended or as it would attend.

    Attributes:
        parts: where things are in the model.
        attn: the layer's attention module.
        hidden: ``(batch, n, hidden)``, what it received.
        prefill: state of the prompt.
        layout: what the layer holds of the prompt.
        held: ``(batch, kv_heads, keys, head_dim)``, all it attended to; ``None``: projected anew.
        mask: the layer's attention mask, in any of its forms.
        rotary: the layer's ``position_embeddings``.
        prompt: the rows are the prompt itself, not a decode step.
    """

    parts: ModelParts
    attn: nn.Module
    hidden: torch.Tensor
    prefill: Prefill
    layout: Layout
    held: torch.Tensor | None
    mask: torch.Tensor | None
    rotary: Any
    prompt: bool

    def __post_init__(self) -> None:
        self.layout = self.layout.to(self.hidden.device)

    @property
    def width(self) -> int:
        """Keys that it attended to."""
        return self.hidden.shape[1] if self.held is None else self.held.shape[-2]

    def until(self, row: int) -> AttentionReader:
        """As it was for token ``row`` of a decode step, with the tokens behind it still to come."""
        later = self.hidden.shape[1] - row - 1
        mask, rotary = self.mask, self.rotary
        if mask is not None and mask.dim() == 4:
            mask = mask[:, :, : row + 1]
        if rotary is not None:
            rotary = tuple(part[..., : row + 1, :] for part in rotary)
        keys = self.keys[..., : self.width - later, :]
        return replace(self, hidden=self.hidden[:, : row + 1], held=keys, mask=mask, rotary=rotary)

    @cached_property
    def keys(self) -> torch.Tensor:
        """``(batch, kv_heads, width, head_dim)``."""
        return self._projected(None, self.rotary) if self.held is None else self.held

    def read(self, needs: Sequence[Need], layer: str) -> Seen:
        """What a stage wants to see of this layer, which is the one ``"before"`` it or the one
        ``"coming"``."""
        seen: Seen = [{} for _ in self.prefill.groups]
        attention = attention_needs(needs, layer)
        # One row per sample serves all its images, unless the image has a say in it.
        shared = {need: self.attention(need) for need in attention if _is_shared(need)}
        for group, found in zip(self.prefill.groups, seen, strict=True):
            here = self.layout.places_of(group.tokens, group.samples)
            rows = group.samples[:, None]
            for need in attention:
                if need in shared:
                    found["attention"] = shared[need][rows, here]
                else:
                    found["maps" if need.maps else "attention"] = self._of_group(need, group, here)
            if layer == "before" and "keys" in needs:
                found["keys"] = self._keys_at(rows, here)
            if layer == "before" and "tail_keys" in needs:
                slots = self.prefill.tail().slots[group.samples]
                found["tail_keys"] = self._keys_at(
                    rows, self.layout.places_of(slots, group.samples)
                )
        return seen

    def _keys_at(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.keys.transpose(1, 2)[rows, places].transpose(1, 2)

    def _projected(self, rows: torch.Tensor | None, rotary: Any) -> torch.Tensor:
        """Keys of all that came in, or of ``rows`` ``(batch, m)`` of it."""
        assert self.parts.keys is not None
        hidden = self.hidden if rows is None else take(self.hidden, rows, -2)
        return self.parts.keys(self.attn, hidden, rotary)

    # -- rows of each sample -----------------------------------------------------------------
    def attention(self, need: Attention) -> torch.Tensor:
        """Attention every token received from the rows ``need`` names, float32 ``(batch, n)``."""
        rows = self._rows(need.rows)
        queries = self._queries(rows, self.rotary)
        kernels = triton_kernels(queries.device) if self.mask is None else None
        if kernels is not None and _fits(queries, self.keys):
            limits = rows.places + (self.width - self.hidden.shape[1])
            scaling = self.parts.scaling(self.attn)
            return kernels.received(queries, self.keys, limits, rows.weights, scaling)
        total: torch.Tensor | None = None
        for part in self._blocks(rows, queries):
            found = received(
                queries[:, :, part],
                self.keys,
                self._allowed(rows.block(part), last=need.rows == "last"),
                rows.block(part).weights,
                self.parts.scaling(self.attn),
            )
            total = found if total is None else total + found
        assert total is not None
        return total

    def _blocks(self, rows: _Rows, queries: torch.Tensor) -> Iterable[slice]:
        batch, count = rows.places.shape
        step = rows_per_block(batch * queries.shape[1] * self.width, self.hidden.numel())
        return [slice(first, first + step) for first in range(0, count, step)]

    def _queries(self, rows: _Rows, rotary: Any) -> torch.Tensor:
        if rotary is not None:
            rotary = tuple(take(rows.of(part), rows.places, -2) for part in rotary)
        projection = self.parts.queries
        assert projection is not None
        return projection(self.attn, take(rows.of(self.hidden), rows.places, -2), rotary)

    # -- rows of each image ------------------------------------------------------------------
    def _of_group(self, need: Attention, group: Group, here: torch.Tensor) -> torch.Tensor:
        """Attention that images receive: ``(rows, n)`` or, as maps, ``(rows, heads, r, n)``."""
        rows = self._group_rows(need.rows, group, here)
        queries = self._queries(rows, self.rotary if need.rotary else None)
        keys = self._group_keys(need, rows, here)
        # A column for each token of the image.
        columns = None if need.over == "image" else here[:, None, None, :]
        parts = []
        for part in self._blocks(rows, queries):
            block = rows.block(part)
            allowed = None
            if need.over == "row":
                allowed = self._allowed(block, last=need.rows == "last")
            weights = attend(queries[:, :, part], keys, allowed, self.parts.scaling(self.attn))
            if columns is not None:
                weights = weights.gather(3, columns.expand(*weights.shape[:3], -1))
            parts.append(weights if need.maps else summed(weights, block.weights))
        if need.maps:
            return torch.cat(parts, dim=2)
        return torch.stack(parts).sum(dim=0)

    def _group_rows(self, which: str, group: Group, here: torch.Tensor) -> _Rows:
        samples = None if group.names == tuple(range(len(self.hidden))) else group.samples
        if which == "visual":
            return _Rows(here, None, samples)
        rows = self._rows("text" if which == "chosen" else which)
        weights = group.chosen if which == "chosen" else rows.weights
        assert which != "chosen" or weights is not None
        if samples is None:
            return _Rows(rows.places, weights)
        if which != "chosen" and weights is not None:
            weights = weights[samples]
        return _Rows(rows.places[samples], weights, samples)

    def _group_keys(self, need: Attention, rows: _Rows, here: torch.Tensor) -> torch.Tensor:
        if need.over == "image" and not need.rotary:  # few enough to be projected for this alone
            assert self.parts.keys is not None
            return self.parts.keys(self.attn, take(rows.of(self.hidden), here, -2), None)
        keys = rows.of(self.keys if need.rotary else self._projected(None, None))
        return take_keys(keys, here) if need.over == "image" else keys

    # -- what rows are, and what they may see --------------------------------------------------
    def _real(self) -> torch.Tensor | None:
        """Bool ``(batch, n)``, False at padding and empty slots of the prompt."""
        return self.layout.real(self.prefill.real)

    def _rows(self, which: str) -> _Rows:
        """Query rows of each sample."""
        batch, count = self.hidden.shape[:2]
        device = self.hidden.device
        if which == "last":
            real = self._real() if self.prompt else None
            end = count - self.prefill.ahead if self.prompt else count
            if real is None:
                return _Rows(torch.full((batch, 1), end - 1, device=device), None)
            iota = torch.arange(end, device=device)
            return _Rows((real[:, :end] * iota).argmax(dim=1, keepdim=True), None)
        if which == "text":
            tail = self.prefill.tail()
            everybody = torch.arange(batch, device=device)
            return _Rows(self.layout.places_of(tail.slots, everybody), tail.real.float())
        return self._visual_rows()

    def _visual_rows(self) -> _Rows:
        """All visual tokens that are left; samples with fewer are filled with weight 0."""
        prefill = self.prefill
        counts = prefill.visual_counts()
        batch = self.hidden.shape[0]
        here = torch.zeros(
            batch, self.hidden.shape[1], dtype=torch.int32, device=self.hidden.device
        )
        for group in prefill.groups:
            places = self.layout.places_of(group.tokens, group.samples)
            here[group.samples[:, None], places] = 1
        rows = here.argsort(dim=1, stable=True)[:, here.shape[1] - max(counts) :]
        same = min(counts) == max(counts)
        return _Rows(rows, None if same else here.gather(1, rows).float())

    def _allowed(self, rows: _Rows, *, last: bool) -> torch.Tensor | None:
        """What the rows may see, bool ``(b, rows, keys)``; ``None``: everything."""
        width, places = self.width, rows.places
        plain = self.mask is None and self.prompt and self._real() is None
        if plain and last and width == self.hidden.shape[1] and not self.prefill.ahead:
            return None
        if self.mask is not None and self.mask.dim() == 4:
            mask = rows.of(self.mask[:, 0, :, :width]).expand(len(places), -1, -1)
            mask = take(mask, places, -2)
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        offset = width - self.hidden.shape[1]
        allowed = torch.arange(width, device=places.device) <= (places + offset)[..., None]
        if self.mask is not None:
            return allowed & rows.of(self.mask.bool())[:, None, :width]
        return allowed


def take_keys(keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``(b, kv_heads, n, head_dim)`` at ``places`` ``(b, m)``."""
    index = places[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return keys.gather(2, index)


def _is_shared(need: Attention) -> bool:
    """Do all images of a sample see the same rows, in the same softmax, summed?"""
    return need.rows != "chosen" and need.rotary and need.over == "row" and not need.maps


def _fits(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Can the kernel read these?"""
    dim = queries.shape[-1]
    return (
        dim >= 16
        and dim & (dim - 1) == 0
        and queries.stride(-1) == keys.stride(-1) == 1
        and queries.dtype == keys.dtype
    )


# -- weights --------------------------------------------------------------------------------------
# Attention weights held at once, in float32: 64 MiB, or twice as many elements as the hidden states
# have, which is less than a layer's MLP takes a moment later.
BLOCK_ELEMENTS = 1 << 24


def received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor | None,
    weights: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention each key receives, mean over query heads, summed over weighted query rows.

    Args:
        queries, keys, allowed, scaling: see :func:`attend`.
        weights: see :func:`summed`.

    Returns:
        float32 ``(batch, n)``.
    """
    return summed(attend(queries, keys, allowed, scaling), weights)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention weights, softmax over the keys.

    Args:
        queries: ``(batch, heads, rows, head_dim)``.
        keys: ``(batch, kv_heads, n, head_dim)``; heads are grouped as in grouped-query attention.
        allowed: bool ``(batch, rows, n)``: what a row may see; ``None``: everything.
        scaling: factor on the products.

    Returns:
        float32 ``(batch, heads, rows, n)``.
    """
    batch, heads, rows, dim = queries.shape
    groups, count = keys.shape[1:3]
    grouped = queries.reshape(batch * groups, heads // groups * rows, dim)
    # Scaled inside the product, before it is rounded, and in no pass of its own.
    nothing = grouped.new_empty(())
    keys = keys.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(nothing, grouped, keys, beta=0, alpha=scaling)
    logits = logits.view(batch, heads, rows, count)
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1, dtype=torch.float32)


def summed(attention: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean over heads, sum over rows, in place where rows are weighted.

    Args:
        attention: float32 ``(batch, heads, rows, n)``.
        weights: float32 ``(batch, rows)``, 0 for rows that do not count; ``None``: all count.

    Returns:
        float32 ``(batch, n)``.
    """
    if weights is not None:
        attention = attention.mul_(weights[:, None, :, None])
    return attention.sum(dim=(1, 2)) / attention.shape[1]


def rows_per_block(row: int, hidden: int) -> int:
    """How many query rows fit one block.

    Args:
        row: attention weights of one row of each sample, all heads.
        hidden: elements of the hidden states.
    """
    return max(1, max(BLOCK_ELEMENTS, 2 * hidden) // row)


@cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """:mod:`vlm_prune_ext.engine.triton_kernels`; ``None`` off a GPU, and where Triton is missing
    or cannot compile."""
    if device.type != "cuda":
        return None
    try:
        from vlm_prune_ext.engine import triton_kernels

        rows, keys = torch.ones(1, 2, 3, 32, device=device), torch.ones(1, 1, 7, 32, device=device)
        last = torch.full((1, 3), 6, device=device)
        received = triton_kernels.received(rows, keys, last, None, 1.0)
        if not torch.allclose(received, torch.full_like(received, 3 / 7)):
            raise ValueError("a kernel gives wrong numbers")
    except Exception as error:  # Triton's own errors, a missing C compiler, ...
        said = first_line(error)
        logger.warning("No kernel of this package is used: Triton does not work (%s).", said)
        return None
    return triton_kernels
