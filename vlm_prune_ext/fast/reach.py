"""The decoder's input, made by the model's own code: tower, projector, merging text and images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.layout import take
from vlm_prune_ext.engine.state import Call
from vlm_prune_ext.fast.run import Prompt


class _Reached(Exception):
    """The model has made the decoder's input; the rest of its forward is not wanted."""


def reach(
    decoder: nn.Module, forward: Callable[[], Any], pruner: DecoderPruner | None = None
) -> tuple[Prompt, Call | None]:
    """Run a model up to its decoder.

    Args:
        decoder: where to stop.
        forward: calls the model, ``position_ids`` included.
        pruner: the attached method, which has its say on the prompt first.

    Returns:
        the decoder's input, and what the method made of it (``None``: no visual tokens).
    """
    watch = _Watch(pruner)
    handle = decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        forward()
    except _Reached:
        pass
    finally:
        handle.remove()
    assert watch.prompt is not None
    return watch.prompt, watch.call


class _Watch:
    """A hook behind the pruner's own on the decoder: takes its input and ends the forward."""

    def __init__(self, pruner: DecoderPruner | None) -> None:
        self.pruner = pruner
        self.prompt: Prompt | None = None
        self.call: Call | None = None
        self.thread = threading.get_ident()

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is None:
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        self.call = self.pruner.call if self.pruner is not None else None
        if self.call is not None:
            real = self.call.state.prefill.real
        elif isinstance(mask, torch.Tensor) and not bool(mask.all()):
            real = mask.bool()
        else:
            # Also where a model passes a mask for each kind of layer (Gemma 3): it has no fast
            # path, and comes here for its embeddings only.
            real = None
        positions = kwargs["position_ids"]
        if positions.dim() == 3 and len(positions) == 4:  # those of text stand in front
            positions = positions[1:]
        self.prompt = Prompt(embeds, real, positions, self._stacked(embeds, kwargs))
        raise _Reached

    def _stacked(self, embeds: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Features that the decoder would add at visual tokens, at the tokens that enter it."""
        features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if not features or mask is None:
            return None
        whole = embeds.new_zeros(len(features), *mask.shape, embeds.shape[-1])
        for level, own in zip(whole, features, strict=True):
            level[mask] = own.to(level)
        here = None if self.pruner is None else self.pruner.present()
        if here is None:
            return whole
        held = take(whole, here.clamp(min=0), -2)
        return held.masked_fill_((here < 0)[..., None], 0)
