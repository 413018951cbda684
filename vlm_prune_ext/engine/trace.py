"""What a run kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Backend = Literal["transformers", "hooks", "graphs"]
"""What runs a model: transformers as it comes, transformers with this package's hooks, or recorded
CUDA graphs (:mod:`vlm_prune_ext.fast`)."""


@dataclass
class Trace:
    """Record of the last prefill (and the last run of the vision tower).

    Attributes:
        kept: layer -> int64 ``(batch, n)``, absolute positions, in order, in the sequence as it
            entered layer 0, of all tokens (text and padding included) that enter that layer. One
            entry for each layer at which a rule ran; ``num_layers`` is "after the last layer".
            Where samples keep different numbers, the shorter rows start with ``-1`` (empty slots).
        lengths: tokens entering each decoder layer.
        vision_kept: vision layer -> int64 ``(images, n)``, patch indices in grid order that
            survive it. Methods behind the tower have one entry, for the layer whose output they
            choose from (-1: they choose from the prompt's tokens): places that stay; for VisionZip
            rows with CLS first, for PruMerge the centres and for HoloV the places in the order of
            their tokens. -1 fills up rows of crops that keep fewer.
        visual_input: visual tokens of each sample in the prompt, before anything was dropped.
        spans: per sample, first position and number of the visual tokens of each image, and of
            each frame of a video, in the prompt; filled where hooks prune.
        visual_tokens: layer -> visual tokens of each sample that enter that layer; layer 0 and
            each layer at which a rule ran.
        positions: layer -> int64 ``(batch, n)``, rotary positions of the rows that enter it, where
            a method counted them anew; laid out as ``kept``.
        merged: layer -> most rows that a method added to a sample in front of it, -1: to an image
            or crop between vision tower and language model. In front of a layer, ``kept`` numbers
            them from the length of the sequence on, in the order of their creation.
        vision_attention: whose attention in the tower a rule behind it went by: ``"cls"``, or
            ``"received"``, the mean over all patches, where a tower has no CLS; ``None``: nobody's.
        backend: what ran the model last.
    """

    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    vision_kept: dict[int, torch.Tensor] = field(default_factory=dict)
    visual_input: list[int] = field(default_factory=list)
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    visual_tokens: dict[int, list[int]] = field(default_factory=dict)
    positions: dict[int, torch.Tensor] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    vision_attention: Literal["cls", "received"] | None = None
    backend: Backend = "transformers"

    def trim(self, ahead: int, total: int) -> None:
        """Take out what was not part of the prompt.

        Args:
            ahead: tokens at the end of each row.
            total: length of the sequence that they ended.
        """
        self.lengths[:] = [length - ahead for length in self.lengths]
        for layer, kept in self.kept.items():
            kept = kept[:, :-ahead]
            self.kept[layer] = torch.where(kept >= total, kept - ahead, kept)
        for layer, positions in self.positions.items():
            self.positions[layer] = positions[:, :-ahead]

    def clear(self) -> None:
        """Forget everything: pruning begins anew."""
        self.clear_decoder()
        self.merged.clear()
        self.vision_kept.clear()
        self.vision_attention = None

    def clear_decoder(self) -> None:
        """Forget the last prefill: another begins, and reaches this package's hooks."""
        self.backend = "hooks"
        self.kept.clear()
        self.lengths.clear()
        self.visual_input.clear()
        self.spans.clear()
        self.visual_tokens.clear()
        self.positions.clear()
        for layer in [layer for layer in self.merged if layer >= 0]:
            del self.merged[layer]
