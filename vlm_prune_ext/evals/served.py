"""Answers by vLLM's engine, asked as :class:`~vlm_prune_ext.evals.answer.Answerer` is asked.

Prompts are made here, by the same processor, down to their token ids; the engine only puts in what
stands for each image. Of the model there is a skeleton without weights, for its sizes. Batches are
the engine's affair: it is handed many questions at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from vlm_prune_ext.errors import InputError, RowError
from vlm_prune_ext.evals.answer import GREEDY, Answer, Answerer, Planned, Query, stop_ids
from vlm_prune_ext.evals.precheck import check_backend, check_served
from vlm_prune_ext.experiment.flops import tower_images
from vlm_prune_ext.experiment.settings import ENGINE
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import short_form
from vlm_prune_ext.models import device_of, load
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.clips import is_video
from vlm_prune_ext.models.images import ImageLike, open_image
from vlm_prune_ext.serve.selection import KEY


def make_answerer(
    path: str,
    method: Method | None,
    backend: str | None = None,
    *,
    seed: int = 0,
    video_budget: str | None = None,
    **given: Any,
) -> Answerer:
    """What answers with a checkpoint and a method.

    Args:
        path: folder or hub name of the checkpoint.
        method: what prunes; ``None``: nothing does.
        backend: ``"vllm"``; ``None``: transformers, in this process.
        seed: of draws, where the backend has its own.
        video_budget: see ``video`` of :func:`vlm_prune_ext.prune`.
        given: as for :func:`vlm_prune_ext.load`, and of the engine (names in
            :data:`~vlm_prune_ext.experiment.settings.ENGINE`, which mean what they mean there).

    Raises:
        InputError: settings that do not go with the backend, see :func:`check_served` and
            :func:`vlm_prune_ext.load`.
    """
    check_backend(backend, given)
    if backend is not None:
        return ServedAnswerer(path, method, seed=seed, **given)
    loading = {name: value for name, value in given.items() if name not in ENGINE}
    return Answerer(*load(path, **loading), method, video=video_budget or "frame")


class ServedAnswerer(Answerer):
    """Answers with one model and one method, in an engine of its own.

    Args:
        path, method, seed: see :func:`make_answerer`.
        dtype, revision, min_pixels, max_pixels: as for :func:`vlm_prune_ext.load`.
        given: arguments of the engine.

    Raises:
        InputError: see :func:`check_served`, and :func:`vlm_prune_ext.load`.
    """

    together: ClassVar[int | None] = 256

    def __init__(
        self,
        path: str,
        method: Method | None = None,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        seed: int = 0,
        **given: Any,
    ) -> None:
        source = Checkpoint(path, revision=revision)
        check_served(source, method)
        on_gpu = torch.cuda.device_count() > 0
        asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        pixels: dict[str, Any] = {name: value for name, value in asked.items() if value}
        dtype = dtype or ("auto" if on_gpu else "float32")
        self.model, prompts = load(source.folder, device="meta", dtype=dtype, **pixels)
        self.processor, self.method, self.largest = _Prompts(prompts), method, None
        self.devices = given.get("tensor_parallel_size") or 1
        self._stops = sorted(stop_ids(self.model, prompts))
        self._num_layers = self.model.config.get_text_config().num_hidden_layers
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._llm = LLM(
            str(source.folder),
            dtype=str(self.model.dtype).removeprefix("torch."),
            seed=seed,
            hf_overrides={} if method is None else {KEY: short_form(method)},
            mm_processor_kwargs=pixels or None,
            generation_config="vllm",  # the checkpoint's own would make noise: all of it is stated
            enforce_eager=not on_gpu,  # compiling for a CPU takes minutes
            disable_log_stats=False,  # or there are no times
            **{name: given[name] for name in ENGINE if given.get(name) is not None},
        )

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def plan(self, queries: Sequence[Query]) -> Planned:
        """Nothing: the engine shares prefixes itself."""
        return []

    def run(
        self, queries: Sequence[Query], planned: Planned | None = None
    ) -> Callable[[], list[Answer]]:
        """See :meth:`Answerer.run`; times are of each question by itself, as long as others were
        answered beside it."""
        from vllm.exceptions import VLLMClientError

        asked = [self._prompt(query) for query in queries]
        try:
            made = self._llm.generate(
                [one[0] for one in asked], [self._how(one) for one in queries], use_tqdm=False
            )
        except (
            ValueError,
            VLLMClientError,
        ) as error:  # a prompt that is longer than the engine takes
            raise RowError(first_line(error)) from error
        return lambda: [
            self._answer(query, *one, out)
            for query, one, out in zip(queries, asked, made, strict=True)
        ]

    def _prompt(self, query: Query) -> tuple[dict[str, Any], int, float]:
        """What the engine is asked, the visual tokens of it before anything is dropped, and the
        images (or tiles) that go through the tower."""
        prompts = self.processor.inner
        try:
            images = [open_image(image) for image in query.images]
            ids = prompts.unfilled_ids(query.text, images, style=query.style)
            visual = sum(prompts.visual_lengths(images))
        except InputError as error:
            raise RowError(str(error)) from error
        drawn = [prompts.drawn(image) for image in images]
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": drawn} if drawn else {}}
        return prompt, visual, self._tower_images(images)

    def _how(self, query: Query) -> Any:
        from vllm import SamplingParams

        options = {**GREEDY, **query.options}
        for name in ("num_beams", "length_penalty"):
            if options.get(name, 1) != 1:
                raise InputError(f"{name}={options[name]} is not possible with backend='vllm'.")
        drawn = options["do_sample"]
        own = self.model.generation_config.repetition_penalty or 1.0
        return SamplingParams(
            temperature=options["temperature"] if drawn else 0.0,
            top_p=options["top_p"] if drawn else 1.0,
            top_k=options["top_k"] if drawn else 0,
            repetition_penalty=options.get("repetition_penalty", own),
            min_tokens=options.get("min_new_tokens", 0),
            max_tokens=query.max_new_tokens,
            stop=[text for text in query.until if text],
            stop_token_ids=self._stops,
        )

    def _answer(
        self, query: Query, prompt: dict[str, Any], visual: int, towers: float, out: Any
    ) -> Answer:
        ids, times = list(out.outputs[0].token_ids), out.metrics
        text = len(prompt["prompt_token_ids"]) - len(query.images)
        kept = len(out.prompt_token_ids) - text
        return Answer(
            text=self._text(torch.tensor(ids), len(ids), query),
            prompt_tokens=text + visual,
            new_tokens=len(ids),
            visual_tokens=visual,
            visual_kept={0: kept},
            prefill_seconds=times.first_token_ts - times.scheduled_ts,
            decode_seconds=times.last_token_ts - times.first_token_ts,
            lengths=[text + kept] * self._num_layers,
            tower_images=towers,
        )

    def _tower_images(self, images: Sequence[Any]) -> float:
        sizes = [(image.height, image.width) for image in images]
        seen = {
            "image_sizes": torch.tensor(sizes),
            "pixel_values": torch.empty(len(sizes), 3, 1, 1),
        }
        return tower_images(self.model.config, seen if sizes else {})[0]


class _Prompts:
    """A processor whose model has no weights: pictures stay pictures, and the device is the
    engine's."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.device = inner, device_of(None)

    takes_videos = False

    def ready(self, image: ImageLike) -> ImageLike:
        if is_video(image):
            raise InputError("A video is not answered with backend='vllm': pictures and text are.")
        return open_image(image)

    def length(self, text: str, images: Sequence[ImageLike], style: str | None) -> int:
        return 0  # the engine puts its batches together itself

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
