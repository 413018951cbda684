"""Hooks on a causal decoder: prefill drops tokens, decoding lives with what is left.

One hook on the decoder tells prompts from decode steps and keeps their state; one on each layer
from the first drop on runs the stage in front of it, and hands the layer its tokens, rotary
positions and mask; one on the attention module of the layer in front of each stage reads what its
rule wants to see.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.compose import FeatureSite
from vlm_prune_ext.engine.evidence import (
    AttentionReader,
    Looker,
    Seen,
    attention_needs,
    cached_keys,
    reads,
)
from vlm_prune_ext.engine.layout import Layout, Prefill, take
from vlm_prune_ext.engine.masks import LayerArguments, prompt_arguments, step_arguments
from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.engine.placing import placed
from vlm_prune_ext.engine.prompt import (
    DecoderInput,
    Found,
    Image,
    VisualSpan,
    check_stated,
    has_videos,
    images_found,
    images_from_argument,
    images_stated,
    spans_of,
    sparing_last,
    tokens_by_sample,
)
from vlm_prune_ext.engine.state import (
    Call,
    Shortened,
    State,
    images_left,
    seal,
    state_of,
    watch,
)
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError, RowError
from vlm_prune_ext.methods.base import Method, say_once
from vlm_prune_ext.methods.evidence import Stage


class DecoderPruner:
    """Carries a method's stages out on a decoder.

    Args:
        parts: where things are.
        method: what to do.
        visual_span: stated places of visual tokens, or ``None`` to have them found.
        trace: filled at each prefill.
        site: what chooses between tower and language model, if anything does.
        whole_videos: rules see a video as one image, not each of its frames.

    Attributes:
        stages: layer -> the stage in front of it.
    """

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        visual_span: VisualSpan | None,
        trace: Trace,
        site: FeatureSite | None,
        whole_videos: bool = False,
    ) -> None:
        assert parts.decoder is not None
        self.parts, self.method, self.trace, self.site = parts, method, trace, site
        self.visual_span, self.whole_videos = visual_span, whole_videos
        self.stated = method.stated_span
        self.num_layers = len(parts.layers)
        planned = method.decoder_stages(self.num_layers)
        if parts.linear:
            planned = placed(planned, parts, method.name)
        self._first_kept = parts.first_attending if parts.linear else 0
        self.stages = {stage.layer: stage for stage in planned}
        shift = [method.decode_position_shift(layer) for layer in range(self.num_layers)]
        if not parts.plain_rotary:
            self._check_positions(any(shift))
        self.arguments = LayerArguments(parts, shift)
        # State by KV cache: several caches may be decoded in turn.
        self.states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._now = _Now()

    def _check_positions(self, shifts: bool) -> None:
        name, decoder = self.method.name, type(self.parts.decoder).__name__
        if shifts:
            raise InputError(
                f"{name} with reference_positions=True shifts rotary positions as the reference "
                f"does on LLaMA; {decoder} counts positions differently: leave it False."
            )
        if any(stage.recount for stage in self.stages.values()) and not self.parts.rotate:
            raise InputError(
                f"{name} counts rotary positions anew behind a drop, which {decoder} has no way "
                "to do."
            )

    @property
    def call(self) -> Call | None:
        """The run of the decoder that is under way in this thread."""
        return self._now.call

    @property
    def only_masks(self) -> bool:
        """Whether all tokens stay, some of them hidden."""
        modes = {stage.mode for stage in self.stages.values()}
        return modes <= {"mask", "observe"} and self.site is None

    @property
    def first_stage(self) -> Stage | None:
        """The stage that drops in front of layer 0, if there is one."""
        stage = self.stages.get(0)
        return stage if stage is not None and stage.mode == "drop" else None

    # -- attaching ---------------------------------------------------------------------------
    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        parts, decoder, layers = self.parts, self.parts.decoder, list(self.parts.layers)
        assert decoder is not None
        self._now = _Now()  # nothing is left of a prompt that failed under an earlier attachment
        handles = [
            parts.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, always_call=True),
        ]
        for index in self._touched_layers():
            hook = _bind(self._before_layer, index)
            handles.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        for layer, stage in self.stages.items():
            if layer > 0 and reads(stage.needs):
                attn: Any = layers[layer - 1].self_attn
                hook = _bind(self._after_attention, layer)
                handles.append(attn.register_forward_hook(hook, with_kwargs=True))
        if self.num_layers in self.stages:
            assert parts.final_norm is not None
            handles.append(parts.final_norm.register_forward_pre_hook(self._after_last))
        undos: list[Undo] = [handle.remove for handle in handles]
        undos.append(self._seal_caches)
        if parts.watch_spans is not None and self.visual_span is None:
            undos += parts.watch_spans(self._see_spans)
        if parts.follow is not None:
            undos += parts.follow(self.present)
        return undos

    def _touched_layers(self) -> range:
        """Layers whose input may differ from what the decoder hands out."""
        first = 0 if self.site is not None else min([*self.stages, self.num_layers])
        return range(min(first, 1) if any(self.arguments.shift) else first, self.num_layers)

    def _seal_caches(self) -> None:
        """Nobody can decode on from caches that miss tokens once the hooks are gone."""
        for cache, state in list(self.states.items()):
            seal(cache, misses_tokens=state.misses_tokens)
        self.states.clear()

    def present(self) -> torch.Tensor | None:
        """See :data:`Present`."""
        call = self.call
        if call is None or not call.prefill:
            return None
        layout, short = call.state.prefill.layout, call.state.short
        if layout.is_whole and call.state.is_whole_at_first:
            return None
        here = layout.kept()
        here = here.masked_fill(here >= layout.total, -1)  # rows that were added
        if short is None:
            return here
        came = short.layout.slots.to(here.device).gather(1, here.clamp(min=0))
        return torch.where(here < 0, here, came)

    # -- the decoder as a whole ----------------------------------------------------------------
    def _see_spans(self, mask: torch.Tensor, lengths: Any) -> None:
        self._now.found = (mask, lengths)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Assisted decoding feeds the first candidates along with the prompt, and asks for one
        logit more than there are candidates."""
        wanted, cache = kwargs.get("logits_to_keep"), kwargs.get("past_key_values")
        several = cache is not None and isinstance(wanted, int) and wanted > 1
        assisted = several and _is_assisted()  # anybody may ask for several logits
        self._now.ahead = wanted - 1 if assisted else 0  # type: ignore[operator]
        ids = args[0] if args else kwargs.get("input_ids")
        self._now.embedded = ids is None and kwargs.get("inputs_embeds") is not None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        refuse_compiled()
        if args:  # LlamaModel and its kin take input_ids first
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise InputError("Call the language model with keyword arguments while pruning.")
        now, cache = self._now, kwargs.get("past_key_values")
        found, now.found, now.call = now.found, None, None
        given = DecoderInput.of(module, kwargs)
        given.ahead, now.ahead = now.ahead if now.ahead < given.length else 0, 0
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if seen:
            return self._enter_step(given, kwargs, cache, seen, found)
        if cache is not None:
            self.states.pop(cache, None)  # emptied, and used again
        return self._enter_prompt(given, kwargs, found)

    def _enter_step(
        self, given: DecoderInput, kwargs: dict, cache: Any, seen: int, found: Found | None
    ) -> tuple[tuple, dict] | None:
        if found is not None and bool(found[0].any()):
            raise InputError(
                f"The KV cache already holds {seen} tokens and the input brings new visual tokens: "
                "while pruning, feed the whole prompt at once."
            )
        state = state_of(cache, self.states)
        if state is None:
            return None
        decoded = seen - state.cached
        _check_mask(given, state.length + decoded)
        self._now.call = Call(state, prefill=False, decoded=decoded)
        return (
            None if state.short is None else ((), step_arguments(state.short, kwargs, given, seen))
        )

    def _enter_prompt(
        self, given: DecoderInput, kwargs: dict, found: Found | None
    ) -> tuple[tuple, dict] | None:
        images, trace = self._images(given, found), self.trace
        trace.clear_decoder()
        if self.site is not None:
            self.site.forget()
        trace.lengths[:] = [given.length] * self.num_layers
        trace.visual_tokens[0] = [0] * given.batch
        if not images:
            if self._now.embedded:
                say_once(
                    "inputs_embeds came without input_ids: which of them are visual tokens is not "
                    "known, so nothing is dropped. visual_span=(start, length) says it."
                )
            return None
        if given.ahead and any(stage.mode == "mask" for stage in self.stages.values()):
            raise InputError(
                "mode='mask' chooses anew for every token, which assisted decoding does not allow "
                "for those that it feeds with the prompt: use mode='drop'."
            )
        trace.visual_input[:] = tokens_by_sample(images, given.batch)
        trace.spans[:] = spans_of(images, given.batch)
        if self.stated != (None, None):
            check_stated(self.stated, images, given.first_tokens())
        state, kwargs = self._start(given, images, kwargs)
        trace.visual_tokens[0] = state.prefill.visual_counts()
        self._now.call = Call(state, prefill=True)
        return (), kwargs

    def _images(self, given: DecoderInput, found: Found | None) -> list[Image]:
        """Where the visual tokens of a prompt are. Raises InputError: that is not known."""
        batch, length = given.batch, given.length
        if self.visual_span is not None:
            return images_from_argument(self.visual_span, batch, length)
        if found is not None:
            self._check_videos(found)
            images = images_found(found, batch, length, self.whole_videos)
            self._say_what_frames_get(images)
            return images
        if self.parts.watch_spans is not None:
            return []
        return images_stated(self.stated, batch, length)

    def _check_videos(self, found: Found) -> None:
        """Raise RowError where a rule would look for a video's tokens among its patches in vain."""
        vision = self.parts.vision
        if self.site is None or not self.site.works_in_tower or vision is None:
            return
        if vision.pools_videos and has_videos(found):
            raise RowError(
                f"{self.method.name} chooses among the tower's patches, which "
                f"{type(self.parts.model).__name__} pools in videos: methods that choose among the "
                "prompt's tokens apply (divprune, dycoke, random, those in the language model)."
            )

    def _say_what_frames_get(self, images: list[Image]) -> None:
        """Say once that a budget of a whole video leaves frames with nothing."""
        behind = self.site.stage if self.site is not None else None
        stated = [stage.budget for stage in self.stages.values()]
        stated += [behind.budget] if behind is not None else []
        budgets = [budget for budget in stated if isinstance(budget, int)]
        most = max((len(image.frames) for image in images), default=0)
        if budgets and min(budgets) < most:
            say_once(
                f"{self.method.name}: a budget of {min(budgets)} tokens for a video of {most} "
                "frames is below one token per frame: some keep none."
            )

    def _start(self, given: DecoderInput, images: list[Image], kwargs: dict) -> tuple[State, dict]:
        """What is known of a prompt, and the decoder's arguments for what enters layer 0."""
        first, keeps = self.first_stage, self._first_kept
        if self.site is not None:
            short = self.site.shorten(given, images)
            # The features that came were addresses, also where all of them stay.
            kwargs = {**kwargs, "inputs_embeds": short.given.embeds, "input_ids": None}
            short.images = sparing_last(short.images, short.last_tokens())
        else:
            images = sparing_last(images, given.last_tokens())
            if first is None:
                return State(Prefill.of(given, images), None, keeps), kwargs
            short = without_dropped(given, images, first, self.parts)
            self.trace.kept[0] = short.layout.kept()
        self.trace.lengths[:] = [short.length] * self.num_layers
        return State(short.start_prefill(), short, keeps), prompt_arguments(short, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self._now.call = self._now.call, None
        self._now.found = None  # seen while the decoder itself embedded: nobody asked
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
            hidden = self._select(index, hidden, call)
        made = self.arguments(index, hidden, kwargs, call)
        if made is kwargs and hidden is given:
            return None
        if args:
            return (hidden, *args[1:]), made
        return (), {**made, "hidden_states": hidden}

    def _after_last(self, module: nn.Module, args: tuple) -> tuple | None:
        """In front of the final norm: a stage after the last layer."""
        if self.call is None or not self.call.prefill:
            return None
        return (self._select(self.num_layers, args[0], self.call), *args[1:])

    @torch.no_grad()
    def _after_attention(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """After the attention of ``layer - 1``: read what the stage at ``layer`` wants to see."""
        call, stage = self.call, self.stages[layer]
        if call is None or not (call.prefill or stage.mode == "mask"):
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys = cached_keys(
            kwargs.get("past_key_values"), layer - 1, hidden.shape[1], prompt=call.prefill
        )
        reader = self._reader(module, hidden, kwargs, call, keys, layer - 1)
        if call.prefill:
            call.seen = reader.read(stage.needs, "before")
            return
        # Several tokens at once: each chooses for itself, as if the ones behind it were not there.
        rows = [reader.until(row).read(stage.needs, "before") for row in range(hidden.shape[1])]
        self._select_again(layer, call, rows)

    @torch.no_grad()
    def _foresee(
        self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict, call: Call
    ) -> Seen:
        """What ``layer`` would attend to if nothing were dropped in front of it; added to what was
        read off the layer before."""
        given = self.arguments(index, hidden, kwargs, call)
        normed = self.parts.input_norm(layer).forward(hidden)
        reader = self._reader(layer.self_attn, normed, given, call, None, index)
        coming = reader.read(self.stages[index].needs, "coming")
        before = call.take_seen() or [{} for _ in coming]
        return [{**a, **b} for a, b in zip(before, coming, strict=True)]

    def _reader(
        self,
        attn: Any,
        hidden: torch.Tensor,
        kwargs: dict,
        call: Call,
        keys: torch.Tensor | None,
        layer: int,
    ) -> AttentionReader:
        prefill = call.state.prefill
        prefill.move(hidden.device)
        return AttentionReader(
            self.parts,
            attn,
            hidden,
            prefill,
            prefill.layout_at(layer),
            held=keys,
            mask=kwargs.get("attention_mask"),
            rotary=kwargs.get("position_embeddings"),
            prompt=call.prefill,
        )

    # -- stages ------------------------------------------------------------------------------
    def _select(self, layer: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run the stage in front of ``layer``; returns the hidden states that go on."""
        stage, prefill = self.stages[layer], call.state.prefill
        prefill.move(hidden.device)
        look = Looker(stage.needs, self.parts, prefill, hidden, call.take_seen())
        if stage.mode == "observe":
            prefill.observe(stage, look)
            return hidden
        gone, added = prefill.select(stage, look)
        if stage.mode == "mask":
            if gone is not None:
                prefill.hidden_keys[layer] = gone
            self._note_hidden(layer, call, gone)
            return hidden
        if gone is not None or added is not None:
            index = prefill.drop(layer, gone, added, recount=stage.recount)
            if added is not None:
                hidden = torch.cat([hidden, added.hidden.to(hidden.dtype)], dim=1)
            hidden = take(hidden, index, -2)
        merged = 0 if added is None else added.names.shape[1]
        self.note(layer, call, prefill.layout, prefill.visual_counts(), merged)
        return hidden

    def _select_again(self, layer: int, call: Call, rows: list[Seen]) -> None:
        """Mask mode, decode step: choose anew what the layers from ``layer`` on may see.

        Args:
            layer: in front of which.
            call: the run that it is part of.
            rows: what each token of the call is shown.
        """
        stage, prefill = self.stages[layer], call.state.prefill
        looks = [Looker(stage.needs, self.parts, prefill, None, seen) for seen in rows]
        gone = [prefill.select(stage, look)[0] for look in looks]
        prefill.hidden_keys.pop(layer, None)
        if any(one is not None for one in gone):
            nothing = torch.zeros_like(prefill.layout.slots, dtype=torch.bool)
            hidden = torch.stack([nothing if one is None else one for one in gone], dim=1)
            prefill.hidden_keys[layer] = hidden[:, 0] if len(rows) == 1 else hidden
        self._note_hidden(layer, call, gone[-1])

    def _note_hidden(self, layer: int, call: Call, gone: torch.Tensor | None) -> None:
        """Note what is left where tokens only hide."""
        prefill = call.state.prefill
        layout, visual = prefill.layout, prefill.visual_counts()
        if gone is not None:
            lost = gone.sum(1).tolist()
            left = [held - n for held, n in zip(prefill.held, lost, strict=True)]
            layout, _ = layout.drop(~gone, left)
            visual = [count - n for count, n in zip(visual, lost, strict=True)]
        self._record(layer, call, layout, visual)

    def note(
        self, layer: int, call: Call, layout: Layout, visual: list[int], merged: int = 0
    ) -> None:
        """Write down what a drop left in front of ``layer``, whichever way the model runs.

        Args:
            layer: in front of which a stage ran.
            call: the run of its prompt.
            layout: what is left.
            visual: visual tokens of each sample.
            merged: most rows that it added to a sample.
        """
        self.trace.lengths[layer:] = [layout.count] * (self.num_layers - layer)
        if merged:
            self.trace.merged[layer] = merged
        self._record(layer, call, layout, visual)

    def _record(self, layer: int, call: Call, layout: Layout, visual: list[int]) -> None:
        kept, short = layout.kept(), call.state.short
        if short is not None and short.origin is not None:
            kept = torch.where(kept < 0, kept, short.places(kept.clamp(min=0)))
        self.trace.kept[layer] = kept
        self.trace.visual_tokens[layer] = visual
        if layout.positions is not None:
            self.trace.positions[layer] = layout.counted()


def without_dropped(
    given: DecoderInput, images: list[Image], stage: Stage, parts: ModelParts
) -> Shortened:
    """The prompt after a stage at layer 0; kept tokens keep their positions."""
    state = Prefill.of(given, images)
    look = Looker(stage.needs, parts, state, given.embedded())
    gone, _ = state.select(stage, look)
    if gone is not None:
        state.drop(0, gone, None, recount=False)
    layout = state.layout
    positions = given.positions
    if positions is None:
        positions = torch.arange(given.length, device=given.device)[None]
        if parts.counts_real and given.real is not None:
            positions = (given.real.long().cumsum(dim=1) - 1).clamp(min=0)
    lost = torch.zeros(given.batch, 1, dtype=torch.int64, device=given.device)
    left = images if gone is None else images_left(images, ~gone)
    return Shortened(
        given, layout, layout.kept(), take(positions, layout.slots, -1), lost, left, state.held
    )


# -- who calls -----------------------------------------------------------------------------------
COMPILED = (
    "What torch.compile made of a model, its decoder or layers cannot be pruned: take the model "
    "itself (for generate with a static cache on a GPU, disable_compile=True)."
)


def refuse_compiled() -> None:
    """Raise InputError where a compiled model is what calls: its graphs know nothing of hooks, and
    would leave them out."""
    if "torch._dynamo.eval_frame" in sys.modules and _is_called_by("compile_wrapper"):
        raise InputError(COMPILED)


def _is_assisted() -> bool:
    """Whether assisted decoding is what calls the model. It is the only one who knows that tokens
    are guesses, and says so nowhere in its arguments."""
    return _is_called_by("_assisted_decoding")


def _is_called_by(name: str) -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False


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


class _Now(threading.local):
    """What is under way in a thread: the run of the decoder, and what was seen of its input (where
    visual tokens are, and how many tokens are candidates behind the prompt)."""

    call: Call | None = None
    ahead: int = 0
    embedded: bool = False
    found: Found | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "A model cannot be copied or saved while it is pruned, its hooks with it: leave the "
            "with block (or turn the attached method off) first."
        )


def _bind(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        return function(index, *args)

    return hook  # of this package by its module, as a partial is not
