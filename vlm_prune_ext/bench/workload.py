"""What is timed: a model, and prompts of one picture for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.flops import DecoderShape
from vlm_prune_ext.fast.reach import reach
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.models.base import starts_with

FRONT, BEHIND = 35, 32
"""Text tokens of a named shape's prompt in front of the picture (as in LLaVA-1.5's) and behind."""

LLAVA_VISUAL = {"llava": 576, "llava_next": 2928}
"""Visual tokens of a square picture, 672 pixels a side for LLaVA-NeXT: 24 x 24 + 48 x (48 + 1)."""


@dataclass
class Workload:
    """A model with prompts for it.

    Attributes:
        name: for tables.
        model: a whole vision-language model.
        single: inputs of one prompt for ``generate``; ``None``: only the language model is timed.
        span: ``(start, length)`` of the visual tokens in it.
        text: text tokens of it.
        decode: new tokens ``(batch, n)`` -> texts; ``None``: they mean nothing.
    """

    name: str
    model: Any
    single: dict[str, torch.Tensor] | None
    span: tuple[int, int]
    text: int
    decode: Callable[[torch.Tensor], list[str]] | None = None
    _longer: Counter[tuple[str, int]] = field(default_factory=Counter, repr=False)

    @cached_property
    def parts(self) -> ModelParts:
        """Where the model's parts are."""
        return parts_of(self.model)

    @property
    def decoder(self) -> Any:
        """The module that runs the decoder layers."""
        return self.parts.decoder

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.decoder.parameters()).dtype

    @property
    def tokens(self) -> int:
        """Of one prompt."""
        return self.text + self.span[1]

    @cached_property
    def shape(self) -> DecoderShape:
        """Sizes of the language model."""
        return DecoderShape.from_config(self.model.config)

    @property
    def weight_bytes(self) -> int:
        """Read for each decoded token: the layers and the output head."""
        modules = [self.parts.layers, self.model.get_output_embeddings()]
        weights = {id(p): p for module in modules for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in weights.values())

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """``generate``'s inputs: the same prompt ``size`` times."""
        assert self.single is not None
        return {name: torch.cat([value] * size) for name, value in self.single.items()}

    def unseen(self, size: int, backend: str, step: int) -> dict[str, torch.Tensor]:
        """As :meth:`batch`, with more text: ``step`` tokens longer than before in that
        ``backend``."""
        self._longer[backend, size] += step
        longer, inputs = self._longer[backend, size], self.batch(size)
        per_token = inputs["input_ids"].shape
        return {
            name: torch.cat([value, value[:, -1:].expand(-1, longer)], dim=1)
            if value.shape == per_token
            else value
            for name, value in inputs.items()
        }

    @torch.inference_mode()
    def decoder_inputs(self, size: int) -> dict[str, torch.Tensor]:
        """What the decoder is called with for such a batch."""
        positions = torch.arange(self.tokens, device=self.device).expand(size, -1)
        return {"inputs_embeds": self._embeds().expand(size, -1, -1), "position_ids": positions}

    def _embeds(self) -> torch.Tensor:
        if self.single is None:
            hidden = self.shape.hidden
            return torch.randn(1, self.tokens, hidden, device=self.device, dtype=self.dtype)
        inputs = dict(self.single)
        positions = torch.arange(self.tokens, device=self.device)[None]
        prompt, _ = reach(
            self.decoder, lambda: self.model(**inputs, position_ids=positions, use_cache=False)
        )
        return prompt.embeds


def of_shape(name: str, model: Any, visual: int | None = None) -> Workload:
    """A named shape: random token ids and pixels.

    Args:
        name: of the shape.
        model: see :func:`vlm_prune_ext.bench.shapes.random_model`.
        visual: visual tokens, where the shape does not say (default: 576).
    """
    config, device = model.config, next(model.parameters()).device
    kind = config.model_type
    if kind not in LLAVA_VISUAL:
        return Workload(name, model, None, (FRONT, visual or 576), FRONT + BEHIND)
    count = LLAVA_VISUAL[kind]
    generator = torch.Generator().manual_seed(0)
    front = torch.randint(3, 30000, (FRONT,), generator=generator)
    behind = torch.randint(3, 30000, (BEHIND,), generator=generator)
    ids = torch.cat([front, torch.full((count,), config.image_token_id), behind])[None]
    shape = (1, 3, 336, 336) if kind == "llava" else (1, 5, 3, 336, 336)
    pixels = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if kind == "llava_next":
        single["image_sizes"] = torch.tensor([[672, 672]])
    single = {key: value.to(device) for key, value in single.items()}
    return Workload(name, model, single, (FRONT, count), FRONT + BEHIND)


def of_checkpoint(name: str, model: Any, processor: Any, question: str, image: Any) -> Workload:
    """A loaded checkpoint, asked one question about one picture.

    Raises:
        InputError: its visual tokens are not one run.
    """
    inputs = dict(processor.prompt(question, image))
    places = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[:, 0]
    if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
        raise InputError(f"model {name!r} does not have its visual tokens in one run.")
    span = (int(places[0]), len(places))
    text = inputs["input_ids"].shape[1] - span[1]

    def decode(output: torch.Tensor) -> list[str]:
        return processor.decode(new_tokens(output, inputs["input_ids"]), {})

    return Workload(name, model, inputs, span, text, decode)


def new_tokens(output: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Of what ``generate`` returned, ``(batch, n)``, the part behind the prompt ``(1, length)``."""
    whole = starts_with(output[:1], prompt)
    return output[:, prompt.shape[1] :] if whole else output
