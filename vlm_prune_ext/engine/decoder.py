"""Hooks on a causal decoder: prefill drops tokens, decoding lives with what is left.

One hook on the decoder tells prompts from decode steps and keeps their state; one on each layer
from the first drop on hands the layer its tokens, rotary positions and mask; one on the attention
module of the layer in front of each stage reads the scores. What they do stands elsewhere:
entrance.py reads prompts, evidence.py layers, selection.py runs stages, arguments.py makes masks
and positions.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.arguments import LayerArguments
from vlm_prune_ext.engine.call import Call, State
from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.engine.entrance import Entrance
from vlm_prune_ext.engine.evidence import AttentionReader, Seen, cached_keys, reads
from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.engine.refusals import refuse_compiled
from vlm_prune_ext.engine.seal import seal, state_of, watch
from vlm_prune_ext.engine.selection import Selection
from vlm_prune_ext.engine.shorten import DecoderInput
from vlm_prune_ext.engine.spans import VisualSpan, check_stated, tokens_by_sample
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method, say_once
from vlm_prune_ext.methods.evidence import attention_needs


class DecoderPruner:
    """Carries a method's stages out on a decoder.

    Args:
        parts: where things are.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None`` to have them found.
        trace: filled at each prefill.
        site: what chooses between tower and language model, if anything does.
    """

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        visual_span: VisualSpan | None,
        trace: Trace,
        site: FeatureSite | None,
    ) -> None:
        assert parts.decoder is not None
        self.parts, self.method, self.trace = parts, method, trace
        self.visual_span = visual_span
        self.num_layers = len(parts.layers)
        self.stages = {stage.layer: stage for stage in method.decoder_stages(self.num_layers)}
        shift = [method.decode_position_shift(layer) for layer in range(self.num_layers)]
        if any(shift) and not parts.plain_rotary:
            raise InputError(
                f"{method.name} with reference_positions=True shifts rotary positions as the "
                f"reference does on LLaMA; {type(parts.decoder).__name__} counts positions "
                "differently: leave it False."
            )
        recounts = any(stage.recount for stage in self.stages.values())
        if recounts and not (parts.plain_rotary or parts.rotate):
            raise InputError(
                f"{method.name} counts rotary positions anew behind a drop, which "
                f"{type(parts.decoder).__name__} has no way to do."
            )
        self.site = site
        first = self.stages.get(0)
        drops_first = first if first is not None and first.mode == "drop" else None
        self.entrance = Entrance(parts, method, visual_span, drops_first, site)
        self.arguments = LayerArguments(parts, shift)
        self.selection = Selection(self.stages, parts, trace)
        # State by KV cache: several caches may be decoded in turn.
        self.states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._now = _Now()

    @property
    def call(self) -> Call | None:
        """The run of the decoder that is under way in this thread."""
        return self._now.call

    @property
    def only_masks(self) -> bool:
        """Whether all tokens stay, some of them hidden."""
        modes = {stage.mode for stage in self.stages.values()}
        return modes <= {"mask", "observe"} and self.site is None

    # -- attaching ---------------------------------------------------------------------------
    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        decoder = self.parts.decoder
        assert decoder is not None
        self._now = _Now()  # nothing is left of a prompt that failed under an earlier attachment
        handles = [
            self.parts.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, always_call=True),
        ]
        layers = list(self.parts.layers)
        for index in self._touched_layers():
            hook = _bind(self._before_layer, index)
            handles.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        for layer, stage in self.stages.items():
            if layer > 0 and reads(stage.needs):
                attn: Any = layers[layer - 1].self_attn
                hook = _bind(self._after_attention, layer)
                handles.append(attn.register_forward_hook(hook, with_kwargs=True))
        if self.num_layers in self.stages:
            assert self.parts.final_norm is not None
            handles.append(self.parts.final_norm.register_forward_pre_hook(self._after_last))
        undos: list[Undo] = [handle.remove for handle in handles]
        undos.append(self._seal_caches)
        if self.parts.watch_spans is not None and self.visual_span is None:
            undos += self.parts.watch_spans(self._see_spans)
        if self.parts.follow is not None:
            undos += self.parts.follow(self._present)
        return undos

    def _present(self) -> torch.Tensor | None:
        """See :data:`Present`."""
        call = self.call
        if call is None or not call.prefill:
            return None
        layout, short = call.state.prefill.layout, call.state.short
        if layout.is_whole and (short is None or short.whole):
            return None
        here = layout.kept()
        here = here.masked_fill(here >= layout.total, -1)  # rows that were added
        if short is None:
            return here
        came = short.layout.slots.to(here.device).gather(1, here.clamp(min=0))
        return torch.where(here < 0, here, came)

    def _seal_caches(self) -> None:
        """Nobody can decode on from caches that miss tokens once the hooks are gone."""
        for cache, state in list(self.states.items()):
            seal(cache, misses_tokens=state.misses_tokens)
        self.states.clear()

    def _touched_layers(self) -> range:
        """Layers whose input may differ from what the decoder hands out."""
        first = min([*self.stages, self.num_layers])
        if any(self.arguments.shift):
            first = min(first, 1)
        if self.site is not None:
            first = 0
        return range(first, self.num_layers)

    def _see_spans(self, mask: torch.Tensor, lengths: list[list[int]] | None) -> None:
        self._now.pending = (mask, lengths)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Assisted decoding feeds the first candidates along with the prompt, and asks for one
        logit more than there are candidates."""
        wanted, cache = kwargs.get("logits_to_keep"), kwargs.get("past_key_values")
        several = cache is not None and isinstance(wanted, int) and wanted > 1
        assisted = several and _is_assisted()  # anybody may ask for several logits
        self._now.ahead = wanted - 1 if assisted else 0  # type: ignore[operator]
        ids = args[0] if args else kwargs.get("input_ids")
        self._now.embedded = ids is None and kwargs.get("inputs_embeds") is not None

    # -- the decoder as a whole ----------------------------------------------------------------
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        refuse_compiled()
        if args:  # LlamaModel and its kin take input_ids first
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise InputError("Call the language model with keyword arguments while pruning.")
        pending, self._now.pending = self._now.pending, None
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        given = DecoderInput.of(module, kwargs)
        ahead, self._now.ahead = self._now.ahead, 0
        if seen:
            return self._enter_decode(given, kwargs, cache, seen, pending)
        if cache is not None:
            self.states.pop(cache, None)  # emptied, and used again
        images = self.entrance.images(given, pending)
        self.trace.clear_decoder()
        if self.site is not None:
            self.site.forget()
        self.trace.lengths[:] = [given.length] * self.num_layers
        self.trace.visual_tokens[0] = [0] * given.batch
        if not images:
            self._now.call = None
            if self._now.embedded:
                say_once(
                    "inputs_embeds came without input_ids: which of them are visual tokens is not "
                    "known, so nothing is dropped. visual_span=(start, length) says it."
                )
            return None
        given.ahead = ahead if ahead < given.length else 0
        if given.ahead and any(stage.mode == "mask" for stage in self.stages.values()):
            raise InputError(
                "mode='mask' chooses anew for every token, which assisted decoding does not allow "
                "for those that it feeds with the prompt: use mode='drop'."
            )
        self.trace.visual_input[:] = tokens_by_sample(images, given.batch)
        check_stated(self.entrance.stated, images, given.first_tokens())
        state, kwargs = self.entrance.prompt(given, images, kwargs, self.trace)
        self._now.call = Call(state, prefill=True)
        return (), kwargs

    def _enter_decode(
        self, given: DecoderInput, kwargs: dict, cache: Any, seen: int, pending: Any
    ) -> tuple[tuple, dict] | None:
        if pending is not None and bool(pending[0].any()):
            raise InputError(
                f"The KV cache already holds {seen} tokens and the input brings new visual tokens: "
                "while pruning, feed the whole prompt at once."
            )
        state = state_of(cache, self.states)
        self._now.call = None
        if state is not None:
            decoded = seen - state.prefill.segments[0].count
            _check_mask(given, state.length + decoded)
            self._now.call = Call(state, prefill=False, decoded=decoded)
        if state is None or state.short is None:
            return None
        return (), state.short.decode_arguments(kwargs, given, seen)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self._now.call = self._now.call, None
        self._now.pending = None  # seen while the decoder itself embedded: nobody asked
        if call is None or not call.prefill or output is None:
            return
        if call.state.short is not None:
            call.state.short.given.forget()
        if call.state.prefill.ahead:
            self.trace.trim(call.state.prefill.ahead, call.state.length)
            call.state.settle()
        if call.cache is not None:
            self.states[call.cache] = call.state
            watch(call.cache, self.states)

    # -- one layer ---------------------------------------------------------------------------
    def _before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        call = self._now.call
        if call is None:
            return None
        hidden = given = args[0] if args else kwargs["hidden_states"]
        call.cache = kwargs.get("past_key_values", call.cache)
        stage = self.stages.get(index)
        if call.prefill and stage is not None and (index > 0 or stage.mode == "observe"):
            if attention_needs(stage.needs, "coming"):
                call.seen = self._foresee(index, module, hidden, kwargs, call)
            hidden = self.selection.run(index, hidden, call)
        made = self.arguments(index, hidden, kwargs, call)
        if made is kwargs and hidden is given:
            return None
        if args:
            return (hidden, *args[1:]), made
        return (), {**made, "hidden_states": hidden}

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
        reader = AttentionReader(
            self.parts,
            module,
            hidden,
            prefill,
            prefill.layout_at(layer - 1),
            keys=cached_keys(
                kwargs.get("past_key_values"), layer - 1, hidden.shape[1], prompt=call.prefill
            ),
            mask=kwargs.get("attention_mask"),
            rotary=kwargs.get("position_embeddings"),
            prompt=call.prefill,
        )
        if call.prefill:
            call.seen = reader.read(stage.needs, "before")
            return
        # Several tokens at once: each chooses for itself, as if the ones behind it were not there.
        rows = [reader.until(row).read(stage.needs, "before") for row in range(hidden.shape[1])]
        self.selection.again(layer, call, rows)

    @torch.no_grad()
    def _foresee(
        self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict, call: Call
    ) -> Seen:
        """What ``layer`` would attend to if nothing were dropped in front of it; added to what was
        read off the layer before."""
        prefill = call.state.prefill
        prefill.move(hidden.device)
        arguments = self.arguments(index, hidden, kwargs, call)
        reader = AttentionReader(
            self.parts,
            layer.self_attn,
            self.parts.input_norm(layer).forward(hidden),
            prefill,
            prefill.layout,
            keys=None,
            mask=arguments.get("attention_mask"),
            rotary=arguments.get("position_embeddings"),
            prompt=True,
        )
        before = call.take_seen() or [{} for _ in prefill.groups]
        coming = reader.read(self.stages[index].needs, "coming")
        return [{**a, **b} for a, b in zip(before, coming, strict=True)]

    def _after_last(self, module: nn.Module, args: tuple) -> tuple | None:
        """In front of the final norm: a stage after the last layer."""
        if self.call is None or not self.call.prefill:
            return None
        return (self.selection.run(self.num_layers, args[0], self.call), *args[1:])


def _check_mask(step: DecoderInput, known: int) -> None:
    """Refuse a mask of a conversation that is none of this cache's.

    Args:
        step: the call.
        known: tokens of the conversation before it.
    """
    mask = step.mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    if not 0 < mask.shape[1] - known <= step.length:
        raise InputError(
            f"attention_mask has {mask.shape[1]} places; this cache's conversation has {known} "
            f"tokens, and {step.length} more came."
        )


def _is_assisted() -> bool:
    """Whether assisted decoding is what calls the model. It is the only one who knows that tokens
    are guesses, and says so nowhere in its arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Now(threading.local):
    """What is under way in a thread: the run of the decoder, and what was seen of its input (where
    visual tokens are, and how many tokens are candidates behind the prompt)."""

    call: Call | None = None
    ahead: int = 0
    embedded: bool = False
    pending: tuple[torch.Tensor, list[list[int]] | None] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "A model cannot be copied or saved while it is pruned, its hooks with it: leave the "
            "with block (or turn the attached method off) first."
        )


def _bind(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        return function(index, *args)

    return hook
