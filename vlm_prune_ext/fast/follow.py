"""Questions behind pictures: several behind one prompt, which they see, blind to one another.

Their tokens stand one behind the other in the prompt's row of the batch, so keys and values of a
picture are kept once and read once for all of its questions, in this pass and at each decode step.
"""

from __future__ import annotations

import torch

from vlm_prune_ext.engine.layout import iota
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.fast.graphs import Recorded, Recorder
from vlm_prune_ext.fast.segments import Activations, Head, Part, SegmentCache, Writer, run_layer


class Follow:
    """Some tokens more behind a prompt's, through the layers of its caches.

    Args:
        parts: where things are in the model.
        head: see :data:`vlm_prune_ext.fast.segments.Head`.
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
