"""Prefill and decoding with fixed shapes: the layers between two drops, questions behind a prompt,
and one step of all layers.

Prompts stand at the left of their buffers with room behind. Causal attention never looks behind,
so a prefill needs no mask, whatever the lengths in a batch. Tokens that are decoded stand behind
the room, at the same place in all samples; only there a mask says what is real. Keys carry their
rotary position with them, so where they stand does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.layout import iota, sent
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.fast.graphs import Arena, Recorded, Recorder

Head = Any
"""``head(hidden (batch, n, hidden)) -> logits (batch, n, vocabulary)``."""


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_width(config: Any) -> int:
    """Channels of a head that positions turn."""
    scaling = getattr(config, "rope_parameters", None) or {}
    return int(head_dim(config) * scaling.get("partial_rotary_factor", 1.0))


def axes(config: Any) -> tuple[int, ...]:
    """Dimensions that positions have besides batch and tokens: three axes (time, height, width) in
    Qwen's models, of which text has the same number on each; else none."""
    scaling = getattr(config, "rope_parameters", None) or {}
    return (3,) if "mrope_section" in scaling else ()


def turns(decoder: Any, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
    """The rotary embedding of positions ``(batch, n)``, or with axes in front."""
    own = axes(decoder.config)
    if own and positions.dim() == 2:
        positions = positions.expand(*own, -1, -1)
    return decoder.rotary_emb(hidden, position_ids=positions)


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


class Writer:
    """Stands where layers expect a KV cache. Keeps keys and values of new tokens, from a slot on.

    Args:
        cache: of the layers.
        slot: int64 ``(1,)``, where the first new token goes.
        width: places that the new tokens attend to (of a prompt at slot 0: itself); ``None``: all.
    """

    def __init__(self, cache: SegmentCache, slot: torch.Tensor, width: int | None = None) -> None:
        self.cache, self.slot, self.width = cache, slot, width

    def buffers(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's part of the cache."""
        return self.cache.keys[layer], self.cache.values[layer]

    def seen(self, held: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the layer's part, what the new tokens attend to."""
        return held[0][:, :, : self.width], held[1][:, :, : self.width]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention of layers that are not fused."""
        held = self.buffers(layer)
        places = self.slot + torch.arange(keys.shape[2], device=keys.device)
        held[0].index_copy_(2, places, keys)
        held[1].index_copy_(2, places, values)
        return self.seen(held)


@dataclass
class Activations:
    """Memory for the activations of a prompt, shared by all pieces.

    Attributes:
        hidden: ``(batch, tokens, hidden)``, what goes in.
        output: the same, what comes out.
        attended: the same, what the last layer's attention received.
        cosines, sines: ``(batch, tokens, channels)``, the rotary embedding.
        positions: int64 ``(batch, tokens)``, see :func:`axes`.
        last: int64 ``(batch,)``, each sample's last token.
        stacked: ``(levels, batch, tokens, hidden)``, added behind the first layers.
    """

    hidden: torch.Tensor
    output: torch.Tensor
    attended: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    stacked: torch.Tensor

    @staticmethod
    def of(
        arena: Arena, config: Any, batch: int, tokens: int, dtype: torch.dtype, levels: int = 0
    ) -> Activations:
        """Views of an arena's memory; ``levels``: layers behind which something is added."""
        widths = [config.hidden_size] * 3 + [rotary_width(config)] * 2
        names = ("hidden", "output", "attended", "cosines", "sines")
        hidden, output, attended, cosines, sines = (
            arena.view(name, (batch, tokens, width), dtype)
            for name, width in zip(names, widths, strict=True)
        )
        shape = (*axes(config), batch, tokens)
        positions = arena.view("positions", shape, torch.int64)
        last = arena.view("last", (batch,), torch.int64)
        stacked = arena.view("stacked", (levels, *hidden.shape), dtype)
        return Activations(hidden, output, attended, cosines, sines, positions, last, stacked)

    def turn(self, decoder: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary embedding of :attr:`positions`, which is kept here."""
        rotary = self.cosines, self.sines
        made = turns(decoder, hidden, self.positions)
        for part, one in zip(rotary, made, strict=True):
            part.copy_(one)
        return rotary

    @contextmanager
    def attending(self, parts: ModelParts, layer: int | None) -> Iterator[None]:
        """Keep what the attention of a layer receives; ``None``: of none."""
        if layer is None:
            yield
            return

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.attended.copy_(given)

        attn: Any = parts.layers[layer].self_attn
        handle = attn.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


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

    def fill(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        stacked: torch.Tensor | None = None,
    ) -> None:
        """Before a run: ``(batch, n, hidden)``, ``(batch, n)``, ``(batch,)`` and ``(levels, batch,
        n, hidden)`` as in :class:`Activations`, of at most :attr:`tokens` tokens."""
        count, memory = hidden.shape[1], self.memory
        memory.hidden[:, :count].copy_(hidden)
        if count < self.tokens:  # nobody looks there, but it must stay finite
            memory.hidden[:, count:].zero_()
        memory.positions[..., :count].copy_(positions)
        memory.last.copy_(last)
        if self.cache.first < len(memory.stacked):
            memory.stacked.zero_()
            if stacked is not None:
                memory.stacked[:, :, :count].copy_(stacked)

    def _work(self) -> torch.Tensor:
        hidden, memory = self.memory.hidden, self.memory
        rotary = memory.turn(self.parts.decoder, hidden)
        writer = Writer(self.cache, self.slot, self.tokens)
        with memory.attending(self.parts, None if self.is_last else self.cache.stop - 1):
            for index in range(self.cache.first, self.cache.stop):
                hidden = run_layer(self.parts.layers[index], hidden, rotary, None, writer)
                if index < len(memory.stacked):
                    hidden = hidden + memory.stacked[index]
        if not self.is_last:
            return memory.output.copy_(hidden)
        assert self.parts.final_norm is not None
        return self.head(self.parts.final_norm(hidden[self.rows, memory.last]))


@dataclass
class Part:
    """What decoding needs to know of one cache.

    Attributes:
        cache: of some layers.
        seen: bool ``(cache.batch, n, start)``, what rows see of the prompt: one of them, or the
            ``n`` that share a place of the batch (questions about one picture).
        next: int64 ``(rows, 1)``, rotary position of the first decoded token.
    """

    cache: SegmentCache
    seen: torch.Tensor
    next: torch.Tensor

    @property
    def start(self) -> int:
        """Place from which on decoded tokens go."""
        return self.seen.shape[2]

    @property
    def together(self) -> int:
        """Rows that share a place of the batch."""
        return self.seen.shape[1]

    @property
    def room(self) -> int:
        """Tokens that can be decoded."""
        return (self.cache.width - self.start) // self.together


@dataclass(frozen=True)
class Bundle:
    """Rows that share places of a batch, ``n`` of them in each.

    Attributes:
        pack: int64 ``(batch * n,)``, the row at each place; where a place has fewer, any.
        unpack: int64 ``(rows,)``, where each row is among these.
    """

    pack: torch.Tensor
    unpack: torch.Tensor


class Step:
    """One decoded token per row through all layers.

    Args:
        parts: where things are in the model.
        head: see :data:`Head`.
        caches: one per segment, ascending; those whose rows share places come first.
        rows: of the batch.
        together: per cache, see :class:`Part`.
        recorder: shared by the model's recordings.
        counted: segments count rotary positions by what they hold themselves.

    Attributes:
        token: int64 ``(rows, 1)``, to be filled before each run.
    """

    def __init__(
        self,
        parts: ModelParts,
        head: Head,
        caches: list[SegmentCache],
        rows: int,
        together: list[int],
        recorder: Recorder,
        *,
        counted: bool,
    ) -> None:
        self.parts, self.head, self.caches, self.together = parts, head, caches, together
        device = recorder.device
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = self.token.new_zeros(len(caches) if counted else 1, rows, 1)
        self._room = self.token.new_zeros(len(caches), 1)
        self._count = self.token.new_zeros(1)
        self._seen = [
            torch.zeros(cache.batch, n, cache.width, dtype=torch.bool, device=device)
            for cache, n in zip(caches, together, strict=True)
        ]
        self._pack = self.token.new_zeros(caches[0].batch * together[0])
        self._unpack = self.token.new_zeros(rows)
        self._places = [torch.arange(cache.width, device=device) for cache in caches]
        self._recorded = Recorded(recorder)

    def start(self, held: list[Part], positions: torch.Tensor, done: int, bundle: Any) -> None:
        """After a prefill, or where other caches took over.

        Args:
            held: by cache.
            positions: int64 ``(segments or 1, rows, 1)``, rotary position of the next token.
            done: tokens that were decoded already.
            bundle: how rows share places, see :class:`Bundle`; ``None``: they do not.
        """
        self._positions.copy_(positions)
        starts = [[part.start] for part in held]
        self._room.copy_(sent(starts, self._room.device))
        self._count.fill_(done)
        for seen, part in zip(self._seen, held, strict=True):
            seen[..., : part.start].copy_(part.seen)
            seen[..., part.start :] = False
        if bundle is not None:
            self._pack.copy_(bundle.pack)
            self._unpack.copy_(bundle.unpack)

    def run(self) -> torch.Tensor:
        """Logits ``(rows, vocabulary)``, overwritten by the next run."""
        return self._recorded(self._work, (self._positions, self._count))

    def _work(self) -> torch.Tensor:
        decoder: Any = self.parts.decoder
        hidden = decoder.get_input_embeddings()(self.token)
        rotaries = [turns(decoder, hidden, own) for own in self._positions]
        packed = False
        for index, (cache, n) in enumerate(zip(self.caches, self.together, strict=True)):
            rotary = rotaries[index % len(rotaries)]
            if n > 1:
                shape = (cache.batch, n, -1)
                rotary = tuple(part[self._pack, 0].view(shape) for part in rotary)
                hidden = hidden if packed else hidden[self._pack, 0].view(shape)
                packed = True
            elif packed:
                hidden, packed = self._unpacked(hidden), False
            # Added to scores as it is: made once, where every layer would make its own of a bool.
            mask = hidden.new_zeros(self._seen[index].shape)
            mask = mask.masked_fill(~self._visible(index), float("-inf"))[:, None]
            writer = Writer(cache, self._room[index] + self._count * n)
            for layer in self.parts.layers[cache.first : cache.stop]:
                hidden = run_layer(layer, hidden, rotary, mask, writer)
        assert self.parts.final_norm is not None
        hidden = self._unpacked(hidden) if packed else hidden
        logits = self.head(self.parts.final_norm(hidden[:, -1]))
        self._positions += 1
        self._count += 1
        return logits

    def _unpacked(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, 1)[self._unpack][:, None]

    def _visible(self, index: int) -> torch.Tensor:
        """Of each place of a cache, whether rows see it, ``(batch, n, width)``: what they see of
        the prompt, and what was decoded of their own answers."""
        n = self.together[index]
        behind = self._places[index] - self._room[index]
        decoded = (behind >= 0) & (behind < (self._count + 1) * n)
        if n > 1:
            turns = torch.arange(n, device=behind.device)[:, None]
            decoded = decoded & (behind % n == turns)
        return self._seen[index] | decoded


class Follow:
    """Questions behind pictures, through the layers of their caches: several behind one prompt,
    which they see, blind to one another.

    Their tokens stand one behind the other in the prompt's row of the batch, so keys and values of
    a picture are kept once and read once for all of its questions, here and at each decode step.

    Args:
        parts: where things are in the model.
        head: see :data:`Head`.
        caches: of the prompts, ascending from layer 0.
        starts: by cache, the place of the first of these tokens.
        memory: for the activations, ``together`` questions of equally many places for each prompt.
        together: questions behind each prompt.
        rows: answers.
        recorder: shared by the model's recordings.

    Attributes:
        is_last: no layer follows.
        length: places of a question.
    """

    def __init__(
        self,
        parts: ModelParts,
        head: Head,
        caches: list[SegmentCache],
        starts: list[int],
        memory: Activations,
        together: int,
        rows: int,
        recorder: Recorder,
    ) -> None:
        self.parts, self.head, self.caches, self.starts = parts, head, caches, starts
        self.memory, self.is_last = memory, caches[-1].stop == len(parts.layers)
        batch, tokens = memory.hidden.shape[:2]
        self.length = tokens // together
        device = recorder.device
        places = torch.arange(tokens, device=device)
        question = places // self.length
        self.own = (question == question[:, None]) & (places <= places[:, None])
        self._ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self._seen = [
            torch.zeros(batch, 1, start, dtype=torch.bool, device=device) for start in starts
        ]
        self._slots = [torch.full((1,), start, device=device) for start in starts]
        self._last = torch.zeros(rows, dtype=torch.int64, device=device)
        self._recorded = Recorded(recorder)

    def fill(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        held: list[Part],
        last: torch.Tensor,
    ) -> None:
        """Before a run.

        Args:
            ids, positions: int64 ``(batch, together * length)``.
            held: the prompts in the caches.
            last: int64 ``(rows,)``, each answer's last token of the question, counted over the
                whole batch.
        """
        self._ids.copy_(ids)
        self.memory.positions.copy_(positions)
        for seen, part in zip(self._seen, held, strict=True):
            seen[..., : part.start].copy_(part.seen)
            seen[..., part.start :] = False
        self._last.copy_(last)

    def run(self) -> torch.Tensor:
        """Hidden states ``(batch, together * length, hidden)``; behind the last layer logits
        ``(rows, vocabulary)``. Overwritten by the next run of any piece."""
        return self._recorded(self._work)

    def _work(self) -> torch.Tensor:
        decoder = self.parts.decoder
        hidden = decoder.get_input_embeddings()(self._ids)  # type: ignore[union-attr,operator]
        rotary = self.memory.turn(decoder, hidden)
        batch, tokens = hidden.shape[:2]
        with self.memory.attending(self.parts, None if self.is_last else self.caches[-1].stop - 1):
            for cache, start, slot, seen in zip(
                self.caches, self.starts, self._slots, self._seen, strict=True
            ):
                visible = torch.cat(
                    [seen.expand(-1, tokens, -1), self.own.expand(batch, -1, -1)], dim=2
                )
                mask = hidden.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
                writer = Writer(cache, slot, start + tokens)
                for layer in self.parts.layers[cache.first : cache.stop]:
                    hidden = run_layer(layer, hidden, rotary, mask[:, None], writer)
        if not self.is_last:
            return self.memory.output.copy_(hidden)
        assert self.parts.final_norm is not None
        return self.head(self.parts.final_norm(hidden.flatten(0, 1)[self._last]))

    def held_by(self, held: list[Part], turns: torch.Tensor, after: torch.Tensor) -> list[Part]:
        """What decoding needs to know of the caches from now on.

        Args:
            held: the prompts in the caches.
            turns: bool ``(batch, together, together * length)``, which of these tokens each
                question is.
            after: int64 ``(rows, 1)``, rotary position behind each question.
        """
        found = []
        for part, seen in zip(held, self._seen, strict=True):
            whole = torch.cat([seen.expand(-1, turns.shape[1], -1), turns], dim=2)
            found.append(Part(part.cache, whole, after))
        return found


def own_places(counts: torch.Tensor, length: int) -> torch.Tensor:
    """Which places questions stand at: int64 ``(batch, together)`` tokens of each -> bool ``(batch,
    together, together * length)``."""
    together = counts.shape[1]
    places = iota(together * length, counts.device)
    mine = places // length == iota(together, counts.device)[:, None]
    return mine & (places % length < counts[..., None])


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
