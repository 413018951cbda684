"""Hooks on a causal decoder: prefill drops tokens, decoding lives with what is left.

One hook on the decoder tells prompts from decode steps and keeps their state; one on each layer
from the first drop on hands the layer its tokens, rotary positions and mask; one on the attention
module of the layer in front of each stage reads the scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine import masks
from vlm_prune_ext.engine.evidence import AttentionReader, Looker, read
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.engine.seal import seal
from vlm_prune_ext.engine.shorten import (
    DecoderInput,
    Shortened,
    without_dropped,
    without_marked,
)
from vlm_prune_ext.engine.spans import (
    Image,
    VisualSpan,
    check_stated,
    images_from_argument,
    images_from_mask,
    tokens_by_sample,
)
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method, Stage


class DecoderPruner:
    """Carries a method's stages out on a decoder.

    Args:
        parts: where things are.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None`` to have them found.
        trace: filled at each prefill.
        features_shrink: image features may arrive with rows marked as dropped (vision.py).
    """

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        visual_span: VisualSpan | None,
        trace: Trace,
        features_shrink: bool,
    ) -> None:
        assert parts.decoder is not None
        self.parts, self.method, self.trace = parts, method, trace
        self.visual_span, self.features_shrink = visual_span, features_shrink
        self.num_layers = len(parts.layers)
        self.stages = {stage.layer: stage for stage in method.stages(self.num_layers)}
        self.shift = [method.decode_position_shift(layer) for layer in range(self.num_layers)]
        if any(self.shift) and not parts.plain_rotary:
            raise InputError(
                f"{method.name} with reference_positions=True shifts rotary positions as the "
                f"reference does on LLaMA; {type(parts.decoder).__name__} counts positions "
                "differently: leave it False."
            )
        # Hybrid models have layers that see only so many tokens back.
        config = getattr(parts.decoder, "config", None)
        self.windows = masks.sliding_windows(config, self.num_layers)
        self.pending: tuple[torch.Tensor, list[list[int]] | None] | None = None
        # State by KV cache: several caches may be decoded in turn.
        self.states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self.call: Call | None = None

    # -- attaching ---------------------------------------------------------------------------
    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        decoder = self.parts.decoder
        assert decoder is not None
        handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, always_call=True),
        ]
        for index in self._touched_layers():
            hook = _bind(self._before_layer, index)
            handles.append(
                self.parts.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
            )
        for layer, stage in self.stages.items():
            if layer > 0:
                handles.append(self._watch_attention(layer, stage))
        if self.num_layers in self.stages:
            assert self.parts.final_norm is not None
            handles.append(self.parts.final_norm.register_forward_pre_hook(self._after_last))
        undos: list[Undo] = [handle.remove for handle in handles]
        undos.append(self._seal_caches)
        if self.parts.watch_spans is not None and self.visual_span is None:
            undos += self.parts.watch_spans(self._see_spans)
        return undos

    def _seal_caches(self) -> None:
        """Nobody can decode on from caches that miss tokens once the hooks are gone."""
        for cache, state in list(self.states.items()):
            if state.misses_tokens:
                seal(cache)

    def _touched_layers(self) -> range:
        """Layers whose input may differ from what the decoder hands out."""
        first = min([*self.stages, self.num_layers])
        if any(self.shift):
            first = min(first, 1)
        if self.features_shrink:
            first = 0
        return range(first, self.num_layers)

    def _watch_attention(self, layer: int, stage: Stage) -> Any:
        attn: Any = self.parts.layers[layer - 1].self_attn
        hook = _bind(self._after_attention, layer)
        return attn.register_forward_hook(hook, with_kwargs=True)

    def _see_spans(self, mask: torch.Tensor, lengths: list[list[int]] | None) -> None:
        self.pending = (mask, lengths)

    # -- the decoder as a whole ----------------------------------------------------------------
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:  # LlamaModel and its kin take input_ids first
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise InputError("Call the language model with keyword arguments while pruning.")
        pending, self.pending = self.pending, None
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        given = DecoderInput.of(module, kwargs)
        if seen:
            return self._enter_decode(given, kwargs, cache, seen, pending)
        images = self._find_images(given, pending)
        self.trace.clear_decoder()
        self.trace.lengths[:] = [given.length] * self.num_layers
        self.trace.visual_tokens[0] = [0] * given.batch
        if not images:
            self.call = None
            return None
        self.trace.visual_input[:] = tokens_by_sample(images, given.batch)
        check_stated(self.method.stated_span, images, given.first_tokens())
        return self._enter_prefill(given, images, kwargs)

    def _find_images(
        self, given: DecoderInput, pending: tuple[torch.Tensor, list[list[int]] | None] | None
    ) -> list[Image]:
        if self.visual_span is not None:
            return images_from_argument(self.visual_span, given.batch, given.length)
        if pending is not None:
            mask, lengths = pending
            beams = given.batch // mask.shape[0]
            if beams > 1 and tuple(mask.shape) == (given.batch // beams, given.length):
                mask = mask.repeat_interleave(beams, dim=0)  # seen before beams were made of it
                lengths = lengths and [row for row in lengths for _ in range(beams)]
            if tuple(mask.shape) != (given.batch, given.length):
                raise InputError(
                    f"Visual tokens were found in an input of shape {tuple(mask.shape)}, but the "
                    f"language model was called with {(given.batch, given.length)}."
                )
            return images_from_mask(mask, lengths)
        if self.parts.watch_spans is not None:
            return []
        start, length = self.method.stated_span
        if start is None or length is None:
            raise InputError(
                "visual_span=None is not enough for a bare language model: give "
                "visual_span=(start, length), or sys_length and the image length in the method."
            )
        return images_from_argument((start, length), given.batch, given.length)

    def _enter_prefill(
        self, given: DecoderInput, images: list[Image], kwargs: dict
    ) -> tuple[tuple, dict] | None:
        short: Shortened | None = None
        if self.features_shrink:
            short = without_marked(given, images)
        elif 0 in self.stages:
            stage, counts = self.stages[0], self.parts.counts_real
            short = without_dropped(given, images, stage, self.trace, counts)
        if short is None:
            state = Prefill.start(images, given.batch, given.length, given.real, given.device)
        else:
            kwargs = short.prefill_arguments(kwargs)
            state = short.start_prefill()
            self.trace.lengths[:] = [short.length] * self.num_layers
        self.trace.visual_tokens[0] = state.visual_counts()
        self.call = Call(State(state, short), prefill=True)
        return (), kwargs

    def _enter_decode(
        self, given: DecoderInput, kwargs: dict, cache: Any, seen: int, pending: Any
    ) -> tuple[tuple, dict] | None:
        if pending is not None and bool(pending[0].any()):
            raise InputError(
                f"The KV cache already holds {seen} tokens and the input brings new visual tokens: "
                "while pruning, feed the whole prompt at once."
            )
        state = self.states.get(cache)
        self.call = Call(state, prefill=False) if state is not None else None
        if state is None or state.short is None:
            return None
        return (), state.short.decode_arguments(kwargs, given, seen)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self.call = self.call, None
        self.pending = None  # seen while the decoder itself embedded: nobody asked
        if call is None or not call.prefill or output is None:
            return
        if call.state.short is not None:
            call.state.short.given.forget()
        if call.cache is not None:
            self.states[call.cache] = call.state

    # -- one layer ---------------------------------------------------------------------------
    def _before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        call.cache = kwargs.get("past_key_values", call.cache)
        if call.prefill and index in self.stages and index > 0:
            hidden = self._run_stage(index, hidden)
        kwargs = self._layer_arguments(index, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, "hidden_states": hidden}

    def _run_stage(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Select in front of ``layer``; returns the hidden states that go on."""
        call, stage = self.call, self.stages[layer]
        assert call is not None
        prefill = call.state.prefill
        prefill.move(hidden.device)
        gone = prefill.select(stage, Looker(stage.needs, call.attention, call.keys, hidden))
        call.forget_evidence()
        if gone is not None and stage.mode == "drop":
            index = prefill.drop(layer, gone)
            hidden = take(hidden, index, -2)
            for later in range(layer, self.num_layers):
                self.trace.lengths[later] = prefill.layout.count
        elif gone is not None:
            prefill.hidden_keys[layer] = gone
        prefill.record(layer, self.trace, prefill.hidden_keys.get(layer))
        self._translate(layer, call)
        return hidden

    def _translate(self, layer: int, call: Call) -> None:
        """Slots -> positions of the sequence that entered layer 0, where layer 0 itself dropped."""
        short = call.state.short
        if short is not None and short.origin is not None:
            kept = self.trace.kept[layer]
            real = short.origin.to(kept.device).gather(1, kept.clamp(min=0))
            self.trace.kept[layer] = torch.where(kept < 0, kept, real)

    def write_trace(self, layer: int, call: Call, layout: Layout, visual: list[int]) -> None:
        """Note what another way of running the model (fast.py) kept in front of ``layer``."""
        self.trace.kept[layer] = layout.positions()
        self.trace.visual_tokens[layer] = visual
        for later in range(layer, self.num_layers):
            self.trace.lengths[later] = layout.count
        self._translate(layer, call)

    def _after_last(self, module: nn.Module, args: tuple) -> tuple | None:
        """In front of the final norm: a stage after the last layer."""
        if self.call is None or not self.call.prefill:
            return None
        return (self._run_stage(self.num_layers, args[0]), *args[1:])

    def _layer_arguments(self, index: int, hidden: torch.Tensor, kwargs: dict) -> dict:
        """The layer's mask and rotary positions."""
        call = self.call
        assert call is not None
        prefill = call.state.prefill
        layout = prefill.layout_at(index)
        cut = layout.count != layout.total or layout.valid is not None
        hiding = any(first <= index for first in prefill.hidden_keys)
        changes: dict[str, Any] = {}
        if cut or hiding or self._windows_gaps(index, call):
            changes["attention_mask"] = self._mask(index, layout, hidden, kwargs)
        if cut and call.prefill:
            for name in ("position_embeddings", "position_ids"):
                if kwargs.get(name) is not None:
                    changes[name] = call.cut_positions(name, kwargs[name], layout)
        if call.gaps(cut) and masks.takes_padding_masks(self._attention()):
            # FlashAttention-2 reads gaps in position ids as the borders of packed prompts.
            changes["position_ids"] = None
        if not call.prefill and self.shift[index]:
            changes["position_embeddings"] = self._shifted(hidden, kwargs, self.shift[index])
        return {**kwargs, **changes} if changes else kwargs

    def _windows_gaps(self, index: int, call: Call) -> bool:
        """Does the layer count a sliding window over a prompt that layer 0 dropped tokens of?"""
        short = call.state.short
        gaps = short is not None and short.origin is not None and not short.whole
        return gaps and self.windows[index] is not None

    def _shifted(self, hidden: torch.Tensor, kwargs: dict, shift: int) -> Any:
        rotary: Any = self.parts.decoder.rotary_emb  # type: ignore[union-attr]
        return rotary(hidden, position_ids=kwargs["position_ids"] + shift)

    def _attention(self) -> str:
        return str(self.parts.decoder.config._attn_implementation)  # type: ignore[union-attr]

    def _mask(self, index: int, layout: Layout, hidden: torch.Tensor, kwargs: dict) -> Any:
        call = self.call
        assert call is not None
        mask = kwargs.get("attention_mask")
        prefill = call.state.prefill
        if self._makes_mask(index, call):
            return self._made_mask(index, layout, hidden, kwargs)
        self._check_window(index, layout)
        whole = layout.count == layout.total and layout.valid is None
        if call.prefill and whole and not prefill.hidden_keys:
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
            made = self._hide_keys(index, made, width, hidden, prefill)
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

    def _made_mask(self, index: int, layout: Layout, hidden: torch.Tensor, kwargs: dict) -> Any:
        """The mask from where the tokens stood in the prompt, windows and hidden keys included."""
        call, window = self.call, self.windows[index]
        assert call is not None
        self._check_window(index, layout)
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
        for first, gone in prefill.hidden_keys.items():
            if first <= index:
                allowed = allowed & ~_pick(gone, slots, False)
        if call.prefill:
            rows = layout.slots
        else:
            first_row = layout.total + held - layout.count
            rows = torch.arange(first_row, first_row + queries, device=device)[None]
        short = call.state.short
        if short is not None:
            slots, rows = short.places(slots), short.places(rows.expand(len(slots), -1))
        made = masks.by_place(slots, allowed, rows, window, self._attention(), hidden.dtype)
        call.masks[key] = (None, made)
        return made

    def _check_window(self, index: int, layout: Layout) -> None:
        window = self.windows[index]
        call = self.call
        if call is None or not call.prefill or window is None:
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
        self, index: int, mask: Any, width: int, hidden: torch.Tensor, prefill: Prefill
    ) -> Any:
        """Mask mode: forbid the keys that are hidden from ``index`` on."""
        for first, gone in prefill.hidden_keys.items():
            if first > index:
                continue
            # The model's own mask may still be on the device of its first layers.
            device = hidden.device if mask is None else mask.device
            allowed = ~torch.nn.functional.pad(gone, (0, width - gone.shape[1])).to(device)
            if mask is None:
                queries, call = hidden.shape[1], self.call
                first_query = 0 if call is None or call.prefill else width - queries
                mask = masks.fresh(allowed, queries, first_query, self._attention(), hidden.dtype)
            else:
                allowed = allowed if mask.dim() == 2 else allowed[:, None, None, :]
                mask = masks.hide(mask, allowed)
        return mask

    def _key_width(self, index: int, layout: Layout, queries: int, kwargs: dict) -> int:
        """Keys the layer's attention sees in this call."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            return queries
        return int(cache.get_mask_sizes(queries, index)[0])

    # -- evidence ----------------------------------------------------------------------------
    @torch.no_grad()
    def _after_attention(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """After the attention of ``layer - 1``: read what the stage at ``layer`` wants to see."""
        call, stage = self.call, self.stages[layer]
        if call is None or not (call.prefill or stage.mode == "mask"):
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        prefill = call.state.prefill
        prefill.move(hidden.device)
        keys = self._cached_keys(kwargs.get("past_key_values"), layer - 1, hidden.shape[1])
        reader = AttentionReader(
            self.parts,
            module,
            hidden,
            prefill,
            prefill.layout_at(layer - 1),
            keys=keys,
            mask=kwargs.get("attention_mask"),
            rotary=kwargs.get("position_embeddings"),
            prompt=call.prefill,
        )
        call.attention, call.keys = read(stage.needs, reader)
        if not call.prefill:
            self._reselect(layer, stage, call)

    def _cached_keys(self, cache: Any, layer: int, queries: int) -> torch.Tensor | None:
        """Keys the layer has just attended to, where its cache holds them all."""
        if cache is None:
            return None
        keys = cache.layers[layer].keys
        if self.call is not None and self.call.prefill:
            return keys[..., :queries, :] if keys.shape[-2] >= queries else None
        if keys.shape[-2] < int(cache.get_seq_length(layer)):
            raise InputError(
                f"mode='mask' chooses anew at each decode step from the keys of layer "
                f"{layer}, but that layer caches only its sliding window: use mode='drop', "
                "or a layer behind one that sees all tokens."
            )
        return keys[..., : int(cache.get_seq_length(layer)), :]

    def _reselect(self, layer: int, stage: Stage, call: Call) -> None:
        """Mask mode, decode step: choose anew what the layers from ``layer`` on may see."""
        prefill = call.state.prefill
        gone = prefill.select(stage, Looker(stage.needs, call.attention, call.keys, None))
        call.forget_evidence()
        prefill.hidden_keys.pop(layer, None)
        if gone is not None:
            prefill.hidden_keys[layer] = gone
        prefill.record(layer, self.trace, gone)


def _pick(flags: torch.Tensor | None, slots: torch.Tensor, otherwise: bool) -> torch.Tensor:
    """``flags`` ``(batch, n)`` of given slots; ``otherwise`` for slots behind the prompt."""
    if flags is None:
        return torch.full_like(slots, otherwise, dtype=torch.bool)
    flags = flags.to(slots.device)
    inside = slots < flags.shape[1]
    return torch.where(inside, flags.gather(1, slots.clamp(max=flags.shape[1] - 1)), otherwise)


def _bind(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        return function(index, *args)

    return hook


class State:
    """What decoding must remember of a prompt."""

    def __init__(self, prefill: Prefill, short: Shortened | None) -> None:
        self.prefill, self.short = prefill, short

    @property
    def misses_tokens(self) -> bool:
        """Whether any layer's cache holds less than the prompt."""
        cut = any(layout.count < layout.total for layout in self.prefill.segments.values())
        return cut or (self.short is not None and not self.short.whole)


class Call:
    """One run of the decoder."""

    def __init__(self, state: State, prefill: bool) -> None:
        self.state, self.prefill = state, prefill
        self.cache: Any = None
        self.masks: dict[Any, tuple[Any, Any]] = {}
        self.positions: dict[Any, tuple[Any, Any]] = {}
        self.attention: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None

    def forget_evidence(self) -> None:
        """Scores serve one stage only."""
        self.attention = self.keys = None

    def gaps(self, cut: bool) -> bool:
        """Do this layer's positions have gaps?"""
        short = self.state.short
        return self.prefill and (cut or (short is not None and not short.whole))

    def cut_positions(self, name: str, value: Any, layout: Layout) -> Any:
        """Positions of the tokens a layer holds; computed once for all layers that hold them."""
        key = (name, id(layout), id(value))
        if key not in self.positions:
            if name == "position_ids":
                made: Any = take(value, layout.slots, -1)
            else:
                made = tuple(take(part, layout.slots, -2) for part in value)
            self.positions[key] = (value, made)
        return self.positions[key][1]
