"""One question about one picture, with and without a method: answers, costs, and what was kept."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.pages.patches import Kept, Panel, panels

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from vlm_prune_ext.experiment.record import Sample
    from vlm_prune_ext.methods.base import Method


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        sample: the answer and its costs, as a run would log it.
        kept: what is left of the picture; ``None`` where the model has no square grid of patches.
        panels: the same, drawn; empty where there is none.
    """

    sample: Sample
    kept: Kept | None
    panels: list[Panel]


class Asker:
    """Asks a model; several threads take turns.

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.

    Attributes:
        why_no_grid: why nothing is drawn; empty: it is.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        from vlm_prune_ext.evals.answer import Sizes
        from vlm_prune_ext.models import parts_of

        self.model, self.processor = model, processor
        self._sizes = Sizes.of(model.config)
        self._turn = threading.Lock()
        parts = parts_of(model)
        self._side = parts.vision.grid if parts.vision is not None else 0
        merged = "patches and visual tokens are not one to one"
        why = merged if parts.vision is not None else parts.why_no_vision
        self.why_no_grid = (
            ""
            if self._side
            else "what is drawn is the square patch grid of LLaVA-1.5 and LLaVA-NeXT models; "
            f"in this one, {why}."
        )

    def ask(
        self, image: Image.Image, question: str, method: Method | None, max_new_tokens: int
    ) -> Reply:
        """Answer one question.

        Raises:
            InputError: an empty question, or a method that does not fit the model.
        """
        from vlm_prune_ext.evals.answer import Answerer, Query

        if not question.strip():
            raise InputError("The question is empty: give the text of one.")
        query = Query(question, [image], max_new_tokens=max_new_tokens)
        with self._turn:
            (answer,) = Answerer(self.model, self.processor, method).answer([query])
        sample = self._sizes.sample(0, answer, warm_up=False)
        if not self._side:
            return Reply(sample, None, [])
        kept = Kept(
            method.name if method is not None else "none",
            answer.visual_tokens,
            self._side,
            len(answer.lengths),
            answer.visual_kept,
            answer.kept,
            answer.patches,
        )
        return Reply(sample, kept, panels(kept))

    def seen(self, image: Image.Image) -> np.ndarray:
        """The picture in the model's eyes, ``(height, width, 3)`` uint8: of tiles the first one,
        with the normalisation undone."""
        inputs = self.processor.prompt("?", image)
        pixels = inputs["pixel_values"].detach().float().cpu()
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].permute(1, 2, 0).numpy()
        scale = self.processor.image_processor
        pixels = pixels * scale.image_std + scale.image_mean
        return (pixels.clip(0, 1) * 255).round().astype("uint8")
