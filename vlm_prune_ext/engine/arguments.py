"""The mask and the rotary positions of one layer, for the tokens that it holds."""

from __future__ import annotations

from functools import cached_property
from operator import is_
from typing import Any

import torch

from vlm_prune_ext.engine import masks
from vlm_prune_ext.engine.call import Call
from vlm_prune_ext.engine.layout import Layout
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError

_GIVEN = ("attention_mask", "position_embeddings", "position_ids")


class LayerArguments:
    """Makes a decoder's arguments fit layers that hold only part of the prompt.

    Args:
        parts: where things are.
        shift: per layer, what is added to a decode step's position.
    """

    def __init__(self, parts: ModelParts, shift: list[int]) -> None:
        self.parts, self.shift = parts, shift

    @cached_property
    def windows(self) -> list[int | None]:
        """Hybrid models have layers that see only so many tokens back."""
        config = getattr(self.parts.decoder, "config", None)
        return masks.sliding_windows(config, len(self.shift))

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
            for name in ("position_embeddings", "position_ids"):
                if kwargs.get(name) is not None:
                    changes[name] = call.cut_positions(name, kwargs[name], layout)
        if (
            call.gaps(cut)
            and layout.positions is None
            and masks.takes_padding_masks(self._attention())
        ):
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
        mask = kwargs.get("attention_mask")
        prefill = call.state.prefill
        if self._makes_mask(index, call):
            return self._made_mask(index, layout, hidden, kwargs, call)
        self._check_window(index, layout, call)
        if call.prefill and layout.is_whole and not prefill.hidden_keys:
            return mask  # cut with the prompt, in front of layer 0
        key = (id(layout), id(mask), tuple(f for f in prefill.hidden_keys if f <= index))
        if key not in call.masks:
            width = self._key_width(index, layout, hidden.shape[1], kwargs)
            made = masks.adapt(
                mask,
                layout,
                queries=hidden.shape[1],
                prefill=call.prefill,
                width=width,
                attention=self._attention(),
                dtype=hidden.dtype,
            )
            made = self._hide_keys(index, made, width, hidden, call)
            # The original is kept beside it: an id is only unique while its object lives.
            call.masks[key] = (mask, made)
        return call.masks[key][1]

    def _makes_mask(self, index: int, call: Call) -> bool:
        """Is the model's own mask of no use? Hybrid models size theirs by the cache of the first
        layer of each kind, which may hold fewer tokens, and count windows in tokens that are left.
        """
        if not any(self.windows):
            return False
        if not call.prefill:
            return True
        given = call.state.short.given.mask if call.state.short is not None else None
        stated = isinstance(given, dict) or (given is not None and given.dim() == 4)
        return self._windows_gaps(index, call) and not stated

    def _made_mask(
        self, index: int, layout: Layout, hidden: torch.Tensor, kwargs: dict, call: Call
    ) -> Any:
        """The mask from where the tokens stood in the prompt, windows and hidden keys included."""
        window = self.windows[index]
        self._check_window(index, layout, call)
        prefill, cache = call.state.prefill, kwargs.get("past_key_values")
        key = (id(layout), window, tuple(f for f in prefill.hidden_keys if f <= index))
        if key in call.masks:
            return call.masks[key][1]
        layout = layout.to(hidden.device)
        queries, device = hidden.shape[1], hidden.device
        held = int(cache.get_seq_length(index)) if cache is not None else 0
        width = self._key_width(index, layout, queries, kwargs)
        slots, valid = masks.key_slots(layout, width, held + queries)
        allowed = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid
        allowed = allowed & _pick(prefill.real, slots, True)
        seen = masks.in_order(layout, slots) if call.prefill and layout.added else None
        for first, gone in prefill.hidden_keys.items():
            if first <= index and gone.dim() == 2:
                allowed = allowed & ~_pick(gone, slots, False)
            elif first <= index:
                self._check_rows()
                each = [_pick(row, slots, False) for row in gone.unbind(1)]
                seen = ~torch.stack(each, dim=1) if seen is None else seen & ~torch.stack(each, 1)
        if call.prefill:
            rows = layout.slots
        else:
            first_row = layout.total + held - layout.count
            rows = torch.arange(first_row, first_row + queries, device=device)[None]
        short = call.state.short
        if short is not None:
            slots, rows = short.places(slots), short.places(rows.expand(len(slots), -1))
        made = masks.by_place(slots, allowed, rows, window, self._attention(), hidden.dtype, seen)
        call.masks[key] = (None, made)
        return made

    def _check_window(self, index: int, layout: Layout, call: Call) -> None:
        window = self.windows[index]
        if not call.prefill or window is None:
            return
        total = layout.total if call.state.short is None else call.state.short.layout.total
        if total <= window:
            return
        if masks.takes_padding_masks(self._attention()):
            raise InputError(
                f"attn_implementation={self._attention()!r} counts the sliding window of layer "
                f"{index} ({window} tokens) in tokens that are left: use sdpa or eager to prune a "
                f"prompt of {total} tokens."
            )

    def _hide_keys(
        self, index: int, mask: Any, width: int, hidden: torch.Tensor, call: Call
    ) -> Any:
        """Mask mode: forbid the keys that are hidden from ``index`` on."""
        for first, gone in call.state.prefill.hidden_keys.items():
            if first > index:
                continue
            # The model's own mask may still be on the device of its first layers.
            device = hidden.device if mask is None else mask.device
            allowed = ~torch.nn.functional.pad(gone, (0, width - gone.shape[-1])).to(device)
            if allowed.dim() == 3:
                self._check_rows()
            if mask is None:
                queries = hidden.shape[1]
                first_query = 0 if call.prefill else width - queries
                some = allowed if allowed.dim() == 2 else allowed.any(dim=1)
                mask = masks.fresh(some, queries, first_query, self._attention(), hidden.dtype)
            if mask.dim() == 4:
                allowed = allowed[:, None, None] if allowed.dim() == 2 else allowed[:, None]
            mask = masks.hide(mask, allowed)
        return mask

    def _check_rows(self) -> None:
        if masks.takes_padding_masks(self._attention()):
            raise InputError(
                f"attn_implementation={self._attention()!r} has one mask for all tokens of a call, "
                "but mode='mask' lets each choose for itself: feed them one by one, or use sdpa "
                "or eager."
            )

    def _key_width(self, index: int, layout: Layout, queries: int, kwargs: dict) -> int:
        """Keys the layer's attention sees in this call."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            return queries
        return int(cache.get_mask_sizes(queries, index)[0])


def _pick(flags: torch.Tensor | None, slots: torch.Tensor, otherwise: bool) -> torch.Tensor:
    """``flags`` ``(batch, n)`` of given slots; ``otherwise`` for slots behind the prompt."""
    if flags is None:
        return torch.full_like(slots, otherwise, dtype=torch.bool)
    flags = flags.to(slots.device)
    inside = slots < flags.shape[1]
    return torch.where(inside, flags.gather(1, slots.clamp(max=flags.shape[1] - 1)), otherwise)
