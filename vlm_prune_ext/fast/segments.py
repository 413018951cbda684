"""Prefill and decoding with fixed shapes: the layers between two drops, and one step of all.

Prompts stand at the left of their buffers with room behind. Causal attention never looks behind,
so a prefill needs no mask, whatever the lengths in a batch. Tokens that are decoded stand behind
the room, at the same place in all samples; only there a mask says what is real. Keys carry their
rotary position with them, so where they stand does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.fast.arena import Arena
from vlm_prune_ext.fast.graphs import Recorded, Recorder

Head = Any
"""``head(hidden (batch, n, hidden)) -> logits (batch, n, vocabulary)``."""


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SegmentCache:
    """Keys and values of the layers ``first`` ... ``stop - 1``, which hold the same tokens.

    Args:
        arena: memory.
        config: of the decoder.
        first, stop: the layers.
        batch: samples.
        width: places, for the prompt and for what is decoded.
        dtype: of the keys.

    Attributes:
        keys, values: by layer, ``(batch, kv_heads, width, head_dim)``.
    """

    def __init__(
        self,
        arena: Arena,
        config: Any,
        first: int,
        stop: int,
        batch: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.first, self.stop, self.batch, self.width = first, stop, batch, width
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (batch, heads, width, head_dim(config))
        layers = range(first, stop)
        self.keys = {layer: arena.view(("keys", layer), shape, dtype) for layer in layers}
        self.values = {layer: arena.view(("values", layer), shape, dtype) for layer in layers}


def widen(old: SegmentCache, new: SegmentCache) -> None:
    """Take everything over into a wider cache, which may be in the same memory."""
    for layer in range(old.first, old.stop):
        for before, after in ((old.keys, new.keys), (old.values, new.values)):
            after[layer][:, :, : old.width].copy_(before[layer].clone())


class _Writer:
    """Stands where layers expect a KV cache. Keeps keys and values of new tokens, from a slot on.

    Args:
        cache: of the layers.
        slot: int64 ``(1,)``, where the first new token goes.
        alone: the new tokens attend to themselves alone (a prompt, at slot 0), not to all places.
    """

    def __init__(self, cache: SegmentCache, slot: torch.Tensor, *, alone: bool) -> None:
        self.cache, self.slot, self.alone = cache, slot, alone

    def buffers(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's part of the cache."""
        return self.cache.keys[layer], self.cache.values[layer]

    def seen(
        self, held: tuple[torch.Tensor, torch.Tensor], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the layer's part, what ``count`` new tokens attend to."""
        if not self.alone:
            return held
        return held[0][:, :, :count], held[1][:, :, :count]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention of layers that are not fused."""
        held = self.buffers(layer)
        places = self.slot + torch.arange(keys.shape[2], device=keys.device)
        held[0].index_copy_(2, places, keys)
        held[1].index_copy_(2, places, values)
        return self.seen(held, keys.shape[2])


@dataclass
class Activations:
    """Memory for the activations of a prompt, shared by all pieces.

    Attributes:
        hidden: ``(batch, tokens, hidden)``, what goes in.
        output: the same, what comes out.
        attended: the same, what the last layer's attention received.
        cosines, sines: ``(batch, tokens, head_dim)``, the rotary embedding.
        positions: int64 ``(batch, tokens)``.
        last: int64 ``(batch,)``, each sample's last token.
    """

    hidden: torch.Tensor
    output: torch.Tensor
    attended: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def of(arena: Arena, config: Any, batch: int, tokens: int, dtype: torch.dtype) -> Activations:
        """Views of an arena's memory."""
        widths = [config.hidden_size] * 3 + [head_dim(config)] * 2
        names = ("hidden", "output", "attended", "cosines", "sines")
        hidden, output, attended, cosines, sines = (
            arena.view(name, (batch, tokens, width), dtype)
            for name, width in zip(names, widths, strict=True)
        )
        positions = arena.view("positions", (batch, tokens), torch.int64)
        last = arena.view("last", (batch,), torch.int64)
        return Activations(hidden, output, attended, cosines, sines, positions, last)


class Segment:
    """A prompt through the layers of one cache.

    Args:
        parts: where things are in the model.
        head: see :data:`Head`.
        cache: of these layers.
        memory: for the activations.
        recorder: shared by the model's recordings.

    Attributes:
        tokens: per sample, with room behind.
        is_last: no layer follows.
    """

    def __init__(
        self,
        parts: ModelParts,
        head: Head,
        cache: SegmentCache,
        memory: Activations,
        recorder: Recorder,
    ) -> None:
        self.parts, self.head, self.cache, self.memory = parts, head, cache, memory
        self.tokens = memory.hidden.shape[1]
        self.rows = torch.arange(cache.batch, device=recorder.device)
        self.slot = self.rows.new_zeros(1)
        self.is_last = cache.stop == len(parts.layers)
        self._recorded = Recorded(recorder)

    def run(self) -> torch.Tensor:
        """Hidden states ``(batch, tokens, hidden)`` for the next segment; behind the last layer
        logits ``(batch, vocabulary)``. Overwritten by the next run of any segment."""
        return self._recorded(self._work)

    def fill(self, hidden: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> None:
        """Before a run: ``(batch, n, hidden)``, ``(batch, n)``, ``(batch,)`` as in
        :class:`Activations`, of at most :attr:`tokens` tokens."""
        count, memory = hidden.shape[1], self.memory
        memory.hidden[:, :count].copy_(hidden)
        if count < self.tokens:  # nobody looks there, but it must stay finite
            memory.hidden[:, count:].zero_()
        memory.positions[:, :count].copy_(positions)
        memory.last.copy_(last)

    def _work(self) -> torch.Tensor:
        decoder: Any = self.parts.decoder
        hidden, memory = self.memory.hidden, self.memory
        rotary = memory.cosines, memory.sines
        for part, made in zip(
            rotary, decoder.rotary_emb(hidden, position_ids=memory.positions), strict=True
        ):
            part.copy_(made)
        writer = _Writer(self.cache, self.slot, alone=True)
        watch = self.parts.layers[self.cache.stop - 1].self_attn.register_forward_pre_hook(  # type: ignore[union-attr,operator]
            self._see, with_kwargs=True
        )
        try:
            for layer in self.parts.layers[self.cache.first : self.cache.stop]:
                hidden = run_layer(layer, hidden, rotary, None, writer)
        finally:
            watch.remove()
        if not self.is_last:
            return memory.output.copy_(hidden)
        assert self.parts.final_norm is not None
        return self.head(self.parts.final_norm(hidden[self.rows, memory.last]))

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.is_last:
            self.memory.attended.copy_(
                kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            )


class Step:
    """One decoded token per sample through all layers.

    Args:
        parts: where things are in the model.
        head: see :data:`Head`.
        caches: one per segment, ascending.
        recorder: shared by the model's recordings.
        counted: segments count rotary positions by what they hold themselves.

    Attributes:
        token: int64 ``(batch, 1)``, to be filled before each run.
    """

    def __init__(
        self,
        parts: ModelParts,
        head: Head,
        caches: list[SegmentCache],
        recorder: Recorder,
        *,
        counted: bool,
    ) -> None:
        self.parts, self.head, self.caches = parts, head, caches
        batch, device = caches[0].batch, recorder.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = self.token.new_zeros(len(caches) if counted else 1, batch, 1)
        self._real = self.token.new_zeros(len(caches), batch, 1)
        self._room = self.token.new_zeros(len(caches), 1)
        self._count = self.token.new_zeros(1)
        self._places = [torch.arange(cache.width, device=device) for cache in caches]
        self._start: tuple[torch.Tensor, ...] | None = None
        self._recorded = Recorded(recorder)

    def start(
        self, positions: torch.Tensor, real: torch.Tensor, room: torch.Tensor, done: int
    ) -> None:
        """After a prefill, or where other caches took over.

        Args:
            positions: int64 ``(segments or 1, batch, 1)``, rotary position of the next token.
            real: int64 ``(segments, batch, 1)``, tokens of the prompt that each segment holds.
            room: int64 ``(segments, 1)``, where decoded tokens go from.
            done: how many are there already.
        """
        self._start = (positions, real, room, torch.full_like(self._count, done))
        self._reset()

    def run(self) -> torch.Tensor:
        """Logits ``(batch, vocabulary)``, overwritten by the next run."""
        return self._recorded(self._work, self._reset)

    def _reset(self) -> None:
        assert self._start is not None
        buffers = (self._positions, self._real, self._room, self._count)
        for buffer, value in zip(buffers, self._start, strict=True):
            buffer.copy_(value)

    def _work(self) -> torch.Tensor:
        decoder: Any = self.parts.decoder
        hidden = decoder.get_input_embeddings()(self.token)
        rotaries = [decoder.rotary_emb(hidden, position_ids=own) for own in self._positions]
        for index, cache in enumerate(self.caches):
            rotary = rotaries[index % len(rotaries)]
            places, room = self._places[index], self._room[index]
            slot = room + self._count
            seen = (places < self._real[index]) | ((places >= room) & (places <= slot))
            # Added to scores as it is: made once, where every layer would make its own of a bool.
            mask = hidden.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
            writer = _Writer(cache, slot, alone=False)
            for layer in self.parts.layers[cache.first : cache.stop]:
                hidden = run_layer(layer, hidden, rotary, mask[:, None, None], writer)
        assert self.parts.final_norm is not None
        logits = self.head(self.parts.final_norm(hidden[:, -1]))
        self._positions += 1
        self._count += 1
        return logits


def run_layer(
    layer: Any, hidden: torch.Tensor, rotary: Any, mask: torch.Tensor | None, writer: Any
) -> torch.Tensor:
    """One decoder layer, called as its model calls it."""
    output = layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=None,
        past_key_values=writer,
        use_cache=True,
    )
    return output[0] if isinstance(output, tuple) else output
