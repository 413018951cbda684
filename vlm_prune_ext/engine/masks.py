"""Attention masks for layers that hold only part of the prompt.

The model builds one mask for the whole prompt. A layer that holds fewer tokens gets the rows and
columns that belong to them, so padding, sliding windows and image blocks that see each other stay
what the model meant, whatever the back end: 4-D bool (SDPA), 4-D additive (eager), 2-D padding
(FlashAttention-2) or none at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
)

from vlm_prune_ext.engine.layout import Layout, iota, take
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prompt import DecoderInput
from vlm_prune_ext.engine.state import Call, Shortened
from vlm_prune_ext.errors import InputError

_GIVEN = ("attention_mask", "position_embeddings", "position_ids")


@dataclass(eq=False)
class LayerArguments:
    """Makes a decoder's arguments fit layers that hold only part of the prompt.

    Attributes:
        parts: where things are.
        shift: per layer, what is added to a decode step's position.
    """

    parts: ModelParts
    shift: list[int]

    @cached_property
    def windows(self) -> list[int | None]:
        """Hybrid models have layers that see only so many tokens back."""
        config = getattr(self.parts.decoder, "config", None)
        return sliding_windows(config, len(self.shift))

    def __call__(self, index: int, hidden: torch.Tensor, kwargs: dict, call: Call) -> dict:
        """The keyword arguments of layer ``index`` for the tokens it holds.

        Args:
            index: 0-based layer.
            hidden: ``(batch, n, hidden)``, what goes into it.
            kwargs: what the decoder hands it.
            call: the run that it is part of.
        """
        prefill = call.state.prefill
        layout = prefill.layout_at(index)
        if index in self.parts.linear:
            return self._of_linear(layout, kwargs, call)
        hiding = sum(first <= index for first in prefill.hidden_keys) if prefill.hidden_keys else 0
        # Most layers are handed what the layer before was handed, and hold what it held.
        given = (layout, *map(kwargs.get, _GIVEN), self.windows[index], hiding)
        if call.given is None or not all(map(is_, call.given, given)):
            changes = self._changes(index, layout, hiding > 0, hidden, kwargs, call)
            call.given = given
            call.changes = {n: made for n, made in changes.items() if made is not kwargs.get(n)}
        changes = call.changes
        if not call.prefill and self.shift[index]:
            shifted = kwargs["position_ids"] + self.shift[index]
            changes = {**changes, "position_embeddings": self._rotary(index, hidden, shifted)}
        return {**kwargs, **changes} if changes else kwargs

    def _of_linear(self, layout: Layout, kwargs: dict, call: Call) -> dict:
        """A layer that carries a state on: which tokens of a prompt are real, if not all are."""
        if not call.prefill or layout.is_whole:
            return kwargs
        mask, real = kwargs.get("attention_mask"), layout.valid
        if mask is not None:
            held = mask.gather(1, layout.slots.to(mask.device))
            real = held if real is None else hide(held, real.to(mask.device))
        return {**kwargs, "attention_mask": real}

    def _changes(
        self,
        index: int,
        layout: Layout,
        hiding: bool,
        hidden: torch.Tensor,
        kwargs: dict,
        call: Call,
    ) -> dict[str, Any]:
        """What the layer must be handed in place of what the decoder hands it."""
        cut = not layout.is_whole
        changes: dict[str, Any] = {}
        if cut or hiding or self._windows_gaps(index, call):
            changes["attention_mask"] = self._mask(index, layout, hidden, kwargs, call)
        if layout.positions is not None:
            changes |= self._counted_anew(index, layout, hidden, kwargs, call)
        elif cut and call.prefill:
            if (ids := kwargs.get("position_ids")) is not None:
                key = (id(layout), id(ids))
                changes["position_ids"] = call.once(key, ids, lambda: take(ids, layout.slots, -1))
            if (both := kwargs.get("position_embeddings")) is not None:
                changes["position_embeddings"] = call.once(
                    (id(layout), id(both)),
                    both,
                    lambda: tuple(take(part, layout.slots, -2) for part in both),
                )
        gaps = call.prefill and (cut or not call.state.is_whole_at_first)
        if gaps and layout.positions is None and takes_padding_masks(self._attention()):
            # FlashAttention-2 reads gaps in position ids as the borders of packed prompts.
            changes["position_ids"] = None
        return changes

    def _counted_anew(
        self, index: int, layout: Layout, hidden: torch.Tensor, kwargs: dict, call: Call
    ) -> dict[str, Any]:
        """Positions in a layer that counts them over what it holds itself."""
        assert layout.positions is not None
        positions = layout.positions
        if not call.prefill:  # behind the prompt, and behind what was decoded since
            first = call.once(("next", id(layout)), layout, layout.next_position)
            ahead = torch.arange(hidden.shape[1], device=first.device)
            positions = first + (call.decoded + ahead)
        changes: dict[str, Any] = {}
        if kwargs.get("position_embeddings") is not None:
            kind = id(kwargs["position_embeddings"])  # layers of one kind share theirs
            changes["position_embeddings"] = call.once(
                (id(layout), kind),
                kwargs["position_embeddings"],
                lambda: self._rotary(index, hidden, positions),
            )
        if kwargs.get("position_ids") is not None:
            changes["position_ids"] = positions
        return changes

    def _windows_gaps(self, index: int, call: Call) -> bool:
        """Does the layer count a sliding window over a prompt that layer 0 dropped tokens of?"""
        short = call.state.short
        gaps = short is not None and short.origin is not None and not short.whole
        return gaps and self.windows[index] is not None

    def _rotary(self, index: int, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """The rotary embedding of positions ``(batch, n)`` in layer ``index``."""
        if self.parts.rotate is not None:
            return self.parts.rotate(hidden, positions, index)
        rotary: Any = self.parts.decoder.rotary_emb  # type: ignore[union-attr]
        return rotary(hidden, position_ids=positions)

    def _attention(self) -> str:
        return str(self.parts.decoder.config._attn_implementation)  # type: ignore[union-attr]

    def _mask(
        self, index: int, layout: Layout, hidden: torch.Tensor, kwargs: dict, call: Call
    ) -> Any:
        mask, window = kwargs.get("attention_mask"), self.windows[index]
        if call.prefill and window is not None:
            self._check_window(index, window, call)
        hiding = [gone for first, gone in call.state.prefill.hidden_keys.items() if first <= index]
        if self._makes_mask(index, call):
            key = ("by place", id(layout), window, len(hiding))
            return call.once(
                key, layout, lambda: self._by_place(index, layout, hidden, kwargs, call, hiding)
            )
        if call.prefill and layout.is_whole and not hiding:
            return mask  # cut with the prompt, in front of layer 0

        def cut() -> Any:
            width, queries = _key_width(index, hidden, kwargs), hidden.shape[1]
            made = adapt(
                mask,
                layout,
                queries=queries,
                prefill=call.prefill,
                width=width,
                attention=self._attention(),
                dtype=hidden.dtype,
            )
            return self._hide_keys(made, hiding, width, hidden, call) if hiding else made

        return call.once(("cut", id(layout), id(mask), len(hiding)), mask, cut)

    def _makes_mask(self, index: int, call: Call) -> bool:
        """Is the model's own mask of no use? Hybrid models size theirs by the cache of the first
        layer of each kind, which may hold fewer tokens, and count windows in tokens that are left.
        """
        if not any(self.windows) and not self.parts.linear:
            return False
        if not call.prefill:
            return True
        given = call.state.short.given.mask if call.state.short is not None else None
        stated = isinstance(given, dict) or (given is not None and given.dim() == 4)
        return self._windows_gaps(index, call) and not stated

    def _by_place(
        self,
        index: int,
        layout: Layout,
        hidden: torch.Tensor,
        kwargs: dict,
        call: Call,
        hiding: list[torch.Tensor],
    ) -> torch.Tensor:
        """The mask from where the tokens stood in the prompt, windows and hidden keys included."""
        layout, short = layout.to(hidden.device), call.state.short
        cache = kwargs.get("past_key_values")
        queries, width = hidden.shape[1], _key_width(index, hidden, kwargs)
        held = int(cache.get_seq_length(index)) if cache is not None else 0
        # A cache with a window has let go of its oldest keys.
        slots, valid = columns(layout, width, max(held + queries - width, 0))
        allowed = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid
        allowed = allowed & _at(call.state.prefill.real, slots, True)
        seen = in_order(layout, slots) if call.prefill and layout.added else None
        for gone in hiding:
            if gone.dim() == 2:
                allowed = allowed & ~_at(gone, slots, False)
                continue
            self._check_rows()
            each = ~torch.stack([_at(row, slots, False) for row in gone.unbind(1)], dim=1)
            seen = each if seen is None else seen & each
        rows = layout.slots
        if not call.prefill:
            first = layout.total + held - layout.count
            rows = torch.arange(first, first + queries, device=slots.device)[None]
        if short is not None:
            slots, rows = short.places(slots), short.places(rows.expand(len(slots), -1))
        return by_place(
            slots, allowed, rows, self.windows[index], self._attention(), hidden.dtype, seen
        )

    def _check_window(self, index: int, window: int, call: Call) -> None:
        short = call.state.short
        total = (call.state.prefill if short is None else short).layout.total
        if total > window and takes_padding_masks(self._attention()):
            raise InputError(
                f"attn_implementation={self._attention()!r} counts the sliding window of layer "
                f"{index} ({window} tokens) in tokens that are left: use sdpa or eager to prune a "
                f"prompt of {total} tokens."
            )

    def _hide_keys(
        self, mask: Any, hiding: list[torch.Tensor], width: int, hidden: torch.Tensor, call: Call
    ) -> Any:
        """Mask mode: forbid keys that are hidden, bool ``(batch, [queries,] n)`` each."""
        for gone in hiding:
            # The model's own mask may still be on the device of its first layers.
            device = hidden.device if mask is None else mask.device
            allowed = ~pad(gone, (0, width - gone.shape[-1])).to(device)
            if allowed.dim() == 3:
                self._check_rows()
            if mask is None:
                queries = hidden.shape[1]
                first = 0 if call.prefill else width - queries
                some = allowed if allowed.dim() == 2 else allowed.any(dim=1)
                mask = fresh(some, queries, first, self._attention(), hidden.dtype)
            if mask.dim() == 4:
                allowed = allowed[:, None, None] if allowed.dim() == 2 else allowed[:, None]
            mask = hide(mask, allowed)
        return mask

    def _check_rows(self) -> None:
        if takes_padding_masks(self._attention()):
            raise InputError(
                f"attn_implementation={self._attention()!r} has one mask for all tokens of a call, "
                "but mode='mask' lets each choose for itself: feed them one by one, or use sdpa "
                "or eager."
            )


def _key_width(index: int, hidden: torch.Tensor, kwargs: dict) -> int:
    """Keys that a layer's attention sees in this call."""
    cache = kwargs.get("past_key_values")
    return (
        hidden.shape[1] if cache is None else int(cache.get_mask_sizes(hidden.shape[1], index)[0])
    )


def _at(flags: torch.Tensor | None, slots: torch.Tensor, otherwise: bool) -> torch.Tensor:
    """``flags`` ``(batch, n)`` of given slots; ``otherwise`` for slots behind the prompt."""
    if flags is None:
        return torch.full_like(slots, otherwise, dtype=torch.bool)
    flags = flags.to(slots.device)
    inside = slots < flags.shape[1]
    return torch.where(inside, flags.gather(1, slots.clamp(max=flags.shape[1] - 1)), otherwise)


# -- the decoder's arguments for a prompt that was shortened in front of layer 0 ------------------
def prompt_arguments(short: Shortened, kwargs: dict) -> dict:
    """The decoder's arguments, shortened."""
    if short.whole:
        return kwargs
    embeds = take(short.given.embedded(), short.layout.slots, -2)
    mask = _shorter(short, kwargs.get("attention_mask"), short.length, prefill=True)
    if mask is None and short.origin is not None:
        # Gaps in positions would be read as borders of packed prompts if no mask came along.
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    changes = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": short.positions}
    return {**kwargs, "input_ids": None, **changes}


def step_arguments(short: Shortened, kwargs: dict, step: DecoderInput, seen: int) -> dict:
    """The arguments of a later call: ``seen`` tokens are in the cache of layer 0."""
    if short.whole:
        return kwargs
    later = seen - short.length
    kwargs = _without_known(short, kwargs, step, later)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) or (mask is not None and mask.dim() == 4):
        # Made for a static cache from the lengths in it and the padding of the longer prompt:
        # the two don't match. The decoder makes it anew from what is real.
        mask = _real_keys(short, seen + step.length)
    else:
        mask = _shorter(short, mask, seen + step.length, prefill=False)
    positions = kwargs.get("position_ids")
    if positions is not None:
        positions = positions - short.removed
    else:
        ahead = torch.arange(1, step.length + 1, device=short.positions.device)
        positions = short.positions[..., -1:] + later + ahead
    return {**kwargs, "attention_mask": mask, "position_ids": positions}


def _without_known(short: Shortened, kwargs: dict, step: DecoderInput, later: int) -> dict:
    """The arguments of a later call without tokens that are cached already: ``generate`` takes
    the length of the cache, which is short of what was dropped, for that of the conversation.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return kwargs
    new = mask.shape[1] - short.layout.total - later
    if not 0 < new < step.length:
        return kwargs
    cut: dict[str, Any] = {}
    for name in ("input_ids", "position_ids"):
        if kwargs.get(name) is not None:
            cut[name] = kwargs[name][..., -new:]
    if kwargs.get("inputs_embeds") is not None:
        cut["inputs_embeds"] = kwargs["inputs_embeds"][:, -new:]
    step.length = new
    return {**kwargs, **cut}


def _real_keys(short: Shortened, width: int) -> torch.Tensor:
    """2-D padding mask over the shorter prompt and what was decoded since."""
    real = short.real
    if real is None:
        real = torch.ones_like(short.layout.slots, dtype=torch.bool)
    return pad(real.long(), (0, width - short.length), value=1)


def _shorter(short: Shortened, mask: Any, width: int, *, prefill: bool) -> Any:
    if isinstance(mask, dict):
        return {key: _shorter(short, value, width, prefill=prefill) for key, value in mask.items()}
    if mask is None:
        if short.layout.valid is None:
            return None
        extra = width - short.length
        return pad(short.layout.valid.long(), (0, extra), value=1)
    if mask.dim() == 4 and not (prefill and mask.shape[-1] == short.given.length):
        width = mask.shape[-1]  # of a static cache
    return adapt(
        mask,
        short.layout,
        queries=mask.shape[-2],
        prefill=prefill,
        width=width,
        attention="",
        dtype=short.positions.dtype,
    )


# -- masks ---------------------------------------------------------------------------------------
def takes_padding_masks(attention: str) -> bool:
    """Does this attention implementation take 2-D masks, as FlashAttention-2 does?

    Asked of the function that makes its masks, so kernels registered under other names count too.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS.get(attention) is flash_attention_mask


def sliding_windows(config: Any, layers: int) -> list[int | None]:
    """Per layer, how many tokens back it sees (itself included); ``None`` where it sees all.

    Asked of the cache that transformers makes for such a model, which has the same rule.
    """
    if config is None:
        return [None] * layers
    made = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return (made + [None] * layers)[:layers]


def hide(mask: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``mask`` with everything forbidden where ``allowed`` (bool, broadcastable) is False."""
    if mask.dtype == torch.bool:
        return mask & allowed
    if mask.is_floating_point():
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    return mask * allowed.to(mask.dtype)


def fresh(
    allowed: torch.Tensor, queries: int, first: int, attention: str, dtype: torch.dtype
) -> torch.Tensor:
    """A causal mask from nothing but keys that may be seen, in the form the back end takes.

    Args:
        allowed: bool ``(batch, keys)``.
        queries: number of queries.
        first: place of the first query among the keys.
        attention: the model's attention implementation.
        dtype: of the hidden states.
    """
    keys = torch.arange(allowed.shape[1], device=allowed.device)
    rows = torch.arange(first, first + queries, device=allowed.device)
    return by_place(keys[None], allowed, rows[None], None, attention, dtype)


def by_place(
    keys: torch.Tensor,
    allowed: torch.Tensor,
    rows: torch.Tensor,
    window: int | None,
    attention: str,
    dtype: torch.dtype,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """A causal mask, with a sliding window or without, from where tokens stood in the prompt.

    Args:
        keys: int64 ``(batch or 1, keys)``, place of each key.
        allowed: bool ``(batch, keys)``.
        rows: int64 ``(batch or 1, queries)``, place of each query.
        window: places back that a query sees, itself included; ``None`` sees all.
        attention: the model's attention implementation.
        dtype: of the hidden states.
        seen: bool ``(batch, queries, keys)``, False at pairs that are forbidden besides.
    """
    if takes_padding_masks(attention):
        if window is None:
            return allowed
        return allowed & (keys > rows[:, -1:] - window)  # causality is its own
    mask = keys[:, None, :] <= rows[..., None]
    if window is not None:
        mask = mask & (keys[:, None, :] > rows[..., None] - window)
    if seen is not None:
        mask = mask & seen
    mask = (mask & allowed[:, None, :])[:, None]
    if ALL_MASK_ATTENTION_FUNCTIONS.get(attention) is eager_mask:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def columns(layout: Layout, width: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots behind keys ``start`` ... ``start + width - 1`` of all that a layer was ever given, and
    which of them are real (in a static cache that is not full yet, there is room behind them).

    Returns:
        int64 ``(batch, width)`` and bool ``(batch, width)`` or ``None``.
    """
    slots, valid, extra = layout.slots, layout.valid, start + width - layout.count
    if extra > 0:
        later = torch.arange(layout.total, layout.total + extra, device=slots.device)
        slots = torch.cat([slots, later.expand(len(slots), extra)], dim=1)
        valid = None if valid is None else pad(valid, (0, extra), value=True)
    here = slice(start, start + width)
    return slots[:, here], None if valid is None else valid[:, here]


def adapt(
    mask: torch.Tensor | None,
    layout: Layout,
    *,
    queries: int,
    prefill: bool,
    width: int,
    attention: str,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The model's mask for the whole prompt, cut to what a layer holds.

    Args:
        mask: ``None``, ``(batch, keys)`` or ``(batch or 1, heads or 1, queries, keys)``.
        layout: what the layer holds of the prompt.
        queries: queries of this call.
        prefill: the queries are the prompt itself, so rows are cut as well.
        width: keys the layer's attention will see (a static cache is wider than what it holds).
        attention: the model's attention implementation.
        dtype: of the hidden states.
    """
    if mask is None:
        if layout.valid is None:
            return None
        allowed = pad(layout.valid, (0, width - layout.count), value=True)
        first = 0 if prefill else width - queries
        return fresh(allowed, queries, first, attention, dtype)
    if not isinstance(mask, torch.Tensor):
        raise InputError(
            f"attn_implementation={attention!r} hands masks of type {type(mask).__name__} to the "
            "layers, which can't be pruned: use eager, sdpa or flash_attention_2."
        )
    layout = layout.to(mask.device)
    slots, valid = columns(layout, width)
    present = slots < mask.shape[-1]
    allowed = present if valid is None else present & valid
    slots = slots.clamp(max=mask.shape[-1] - 1)
    if mask.dim() == 2:
        return hide(mask.gather(1, slots), allowed)
    if prefill:
        mask = take(mask.transpose(0, 1), layout.slots, -2).transpose(0, 1)
    mask = take(mask.permute(1, 2, 0, 3), slots, -1).permute(2, 0, 1, 3)
    seen = allowed[:, None, None, :]
    if prefill and layout.added:
        seen = seen & in_order(layout, slots)[:, None]
    return hide(mask, seen)


def in_order(layout: Layout, keys: torch.Tensor) -> torch.Tensor:
    """Rows that were added stand at the same slot as their image's last token: among those that
    share a slot, nobody sees who stands behind.

    Args:
        layout: what the layer holds of the prompt.
        keys: int64 ``(batch, width)``, slots of the keys.

    Returns:
        bool ``(batch, n, width)``, False where a key stands behind a query at its slot.
    """
    behind = iota(keys.shape[1], keys.device) > iota(layout.count, keys.device)[:, None]
    return ~(behind & (keys[:, None, :] == layout.slots[:, :, None]))
