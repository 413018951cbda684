"""A step's images after the engine encoded them: one call of the rule for all that are alike.

The engine's own code packs features as ever. What comes out is laid out as the sequence of a
prompt that holds nothing but these images, and shortened by the same code that shortens prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vlm_prune_ext.engine.compose import feature_site
from vlm_prune_ext.engine.decoder import without_dropped
from vlm_prune_ext.engine.layout import take
from vlm_prune_ext.engine.parts import ModelParts, VisionParts
from vlm_prune_ext.engine.prompt import DecoderInput, Image
from vlm_prune_ext.engine.tower import Watch, watch_on
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.evidence import FeatureStage
from vlm_prune_ext.serve.selection import Selection


@dataclass
class Left:
    """What is left of one image.

    Attributes:
        rows: ``(n, width)``, in the order in which the language model gets them.
        places: int64 ``(n,)`` ascending: which of the image's tokens stood there.
    """

    rows: torch.Tensor
    places: torch.Tensor


class RowPruner:
    """Carries a selection out on encoded images.

    Args:
        selection: what to keep.
        model: the engine's model, for messages only.
        vision: its tower; ``None`` where the rule looks at tokens only.
        watch: makes what notes the rule's needs on such a tower.
    """

    def __init__(
        self,
        selection: Selection,
        model: nn.Module,
        vision: VisionParts | None,
        watch: Callable[[VisionParts, tuple[str, ...]], Watch] = watch_on,
    ) -> None:
        self.selection, self.trace = selection, Trace()
        self.parts = ModelParts(model, vision=vision)
        self.site = None
        if isinstance(stage := selection.stage, FeatureStage):
            self.site = feature_site(self.parts, selection.method, stage, self.trace, watch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While images are encoded that are to be pruned (a video must not be)."""
        undos = [] if self.site is None else self.site.attach()
        try:
            yield
        finally:
            for undo in undos:
                undo()

    def prune(
        self,
        images: Sequence[torch.Tensor],
        grids: Sequence[tuple[int, int]] | None = None,
        width: int | None = None,
    ) -> list[Left]:
        """What is left of each image.

        Args:
            images: ``(tokens, channels)`` each, as the language model would get them.
            grids: rows and columns of each image's tokens, where positions say where they stand.
            width: channels that are a token's embedding; further ones follow their token.

        Returns:
            one entry each, with all channels.
        """
        lengths = [len(image) for image in images]
        whole = torch.cat(list(images))[None]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        spans = [Image(0, start, count) for start, count in zip(starts, lengths, strict=True)]
        given = DecoderInput(
            module=self.parts.model,
            embeds=whole[..., :width],
            ids=None,
            mask=None,
            positions=None if grids is None else grid_positions(grids).to(whole.device)[:, None],
            batch=1,
            length=whole.shape[1],
            device=whole.device,
        )
        if self.site is not None:
            made = self.site.shorten(given, spans)
        else:
            assert not isinstance(self.selection.stage, FeatureStage)
            made = without_dropped(given, spans, self.selection.stage, self.parts)
        slots = made.layout.slots
        rows = take(made.given.embedded(), slots, -2)[0]
        if width is not None and width < whole.shape[-1]:
            rows = torch.cat([rows, take(whole[..., width:], slots, -2)[0]], dim=-1)
        counts = [image.length for image in made.images]
        places = zip(slots[0].split(counts), starts, strict=True)
        return [
            Left(part, place - start)
            for part, (place, start) in zip(rows.split(counts), places, strict=True)
        ]


def grid_positions(grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Places of images' tokens in time, rows and columns, raster order: int64 ``(3, tokens)``."""
    parts = []
    for rows, columns in grids:
        place = torch.arange(rows * columns)
        parts.append(torch.stack([torch.zeros_like(place), place // columns, place % columns]))
    return torch.cat(parts, dim=1)
