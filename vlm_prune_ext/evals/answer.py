"""Questions in, answers out: what every evaluation has in common.

A batch is one padded ``generate`` call, greedy unless told otherwise. What was kept and how long
it took come with each answer.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.decoding import RepetitionPenalty
from vlm_prune_ext.evals.sharing import Plan, Sharing
from vlm_prune_ext.experiment import flops
from vlm_prune_ext.experiment.flops import tower_images
from vlm_prune_ext.experiment.measure import TokenClock
from vlm_prune_ext.experiment.record import Sample, ranges
from vlm_prune_ext.fast.generate import check_method
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.models.base import starts_with
from vlm_prune_ext.models.clips import is_video
from vlm_prune_ext.models.images import ImageLike, digest_of
from vlm_prune_ext.pruning import prune

logger = logging.getLogger("vlm_prune_ext")

# A checkpoint's own sampling settings would only make noise, so all are stated.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass
class Query:
    """One question.

    Attributes:
        text: the question; ``<image>`` markers place the images, otherwise they go in front.
        images: any number of PIL images, paths or bytes, and of videos
            (:class:`~vlm_prune_ext.models.clips.Clip`).
        style: conversation template; ``None`` is the family's own, ``"plain"`` takes ``text`` as
            the whole prompt.
        max_new_tokens: the answer's limit.
        until: strings that end the answer; neither they nor what follows is part of it.
        options: what ``generate`` is to do instead of greedy decoding (``do_sample``,
            ``temperature``, ..., see :data:`vlm_prune_ext.evals.decoding.OPTIONS`).
        digests: of each image, as :func:`vlm_prune_ext.models.images.digest_of` gives it; empty:
            not known yet.
    """

    text: str
    images: Sequence[ImageLike] = ()
    style: str | None = None
    max_new_tokens: int = 256
    until: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    digests: tuple[str, ...] = ()


@dataclass
class Answer:
    """What a model said, and what it cost.

    Attributes:
        text: the answer, without special tokens or blanks at its ends.
        prompt_tokens: of the prompt, visual tokens included, before anything is dropped.
        new_tokens: generated, the one that ends the answer included.
        visual_tokens: of the prompt, before anything is dropped.
        visual_kept: decoder layer -> visual tokens that enter it: layer 0, and each layer in front
            of which a rule ran (``num_layers``: behind the last).
        prefill_seconds: until the first new token, this sample's share of its batch; where the
            picture's features were kept from an earlier call, with what they took then.
        decode_seconds: from there to the end of its batch, this sample's share.
        lengths: tokens that enter each decoder layer in the prefill, its own only (no padding);
            empty for a model whose decoder layers are not known.
        batch: samples that were answered together.
        tower_images: images (or tiles) that went through the vision tower; padding does not.
        patches_kept: tower layer -> patches of each image left by the drop in it.
        fast: on the fast path.
        shared: questions of its batch that share the beginning of its prompt, pictures included; in
            ``shared_layers`` decoder layers that was computed once for all of them, and but for
            ``question_tokens`` nothing for this one alone. All else is told as if it had been asked
            with its whole prompt.
        kept: decoder layer -> places, among the visual tokens that entered layer 0, of those that
            enter it; where a rule chose. Tokens that a rule added are not among them.
        patches: tower layer (-1: behind it) -> patches that stay, of the first tile.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    visual_tokens: int
    visual_kept: dict[int, int]
    prefill_seconds: float
    decode_seconds: float
    lengths: list[int] = field(default_factory=list)
    batch: int = 1
    tower_images: float = 0.0
    patches_kept: dict[int, int] = field(default_factory=dict)
    fast: bool = False
    shared: int = 1
    shared_layers: int = 0
    question_tokens: int = 0
    kept: dict[int, list[int]] = field(default_factory=dict)
    patches: dict[int, list[int]] = field(default_factory=dict)


Planned: TypeAlias = "list[tuple[list[int], Plan | None]]"
"""Runs that a batch is answered in: rows, and what their prompts share (``None``: nothing)."""


@dataclass(frozen=True)
class _Said:
    """What is known when the device has done its part of a run, all of it on the host.

    Attributes:
        queries: answered.
        output: int64 ``(rows, n)``, new tokens; counts: of each row, those of its answer.
        prompt, mask: int64 ``(batch, n)``.
        towers: of each row, what its pictures were for the tower.
        trace: what was kept; clock: how long it took; spared: seconds of an earlier run that belong
            to this one's time to first token; told: of each row, fields of its answer about what
            was shared.
    """

    queries: Sequence[Query]
    output: torch.Tensor
    counts: list[int]
    prompt: torch.Tensor
    mask: torch.Tensor
    towers: list[float]
    trace: Trace
    clock: TokenClock
    spared: float
    told: list[dict[str, Any]] | None


class Answerer:
    """Answers with one model and one method.

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        method: what prunes; ``None`` is the baseline, which attaches nothing.
        share: compute what prompts about one picture have in common once.
        video: what a budget is of, see :func:`vlm_prune_ext.prune`.

    Attributes:
        largest: samples that go together at most, once a batch did not fit into memory.

    Raises:
        InputError: a layer of the method that the model does not have, a model of unknown form,
            or a model loaded with ``fast=True`` and a method that has no fast path.
    """

    together: ClassVar[int | None] = None
    """Samples that are handed over at once where nobody says how many, of what makes its batches
    itself."""
    devices = 1
    """GPUs that work on one sample."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: Method | None = None,
        *,
        share: bool = True,
        video: str = "frame",
    ) -> None:
        self.model, self.processor, self.method, self.video = model, processor, method, video
        self._sharing = Sharing(model, processor, method) if share else None
        self.largest: int | None = None
        self._num_layers = _count_layers(model, method)
        check_method(model, method)
        stages = method.decoder_stages(self._num_layers) if method is not None else ()
        self._hiding = {stage.layer for stage in stages if stage.mode == "mask"}
        self._pruned = prune(model, method, video=video)  # planned once, entered for each batch

    def close(self) -> None:
        """Nothing more is asked: let go of what was started for it."""

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer a batch: one ``generate`` call, or more where it does not fit into memory.

        Args:
            queries: of one ``style`` and equal ``options``. Limits and ending strings may differ.

        Returns:
            one answer each, in order; the same as if each had been asked alone (but for draws of
            ``do_sample``).

        Raises:
            InputError: a prompt, image or span that is not accepted, or queries of two styles
                or with different options.
            torch.OutOfMemoryError: a single sample does not fit.
        """
        return self.run(queries, self.plan(queries))()

    def plan(self, queries: Sequence[Query]) -> Planned:
        """What of the prompts of a batch is computed together, for :meth:`run`. Needs no device:
        another thread may plan the next batch while one is answered."""
        if self._sharing is None:
            return [(list(range(len(queries))), None)]
        return self._sharing.plan(queries)

    def run(
        self, queries: Sequence[Query], planned: Planned | None = None
    ) -> Callable[[], list[Answer]]:
        """The device's part of :meth:`answer`.

        Args:
            queries: as there.
            planned: :meth:`plan` of them; ``None``: it is made here.

        Returns:
            what makes the answers out of what is on the host now. Another thread may call it.

        Raises:
            InputError, torch.OutOfMemoryError: as :meth:`answer`.
        """
        size = min(self.largest or len(queries), len(queries))
        parts: list[Callable[[], list[Answer]]] = []
        given = 0
        while given < len(queries):
            batch = queries[given : given + size]
            try:
                whole = planned if len(batch) == len(queries) else None
                parts.append(self._generate(batch, self.plan(batch) if whole is None else whole))
                given += len(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                if self.largest is None:  # said once, however often it happens
                    logger.warning(
                        "A batch of %d samples does not fit into memory: halved, and tried again.",
                        len(batch),
                    )
                size = self.largest = (len(batch) + 1) // 2
            if self.largest == size and torch.cuda.is_available():
                torch.cuda.empty_cache()  # outside of `except`, which still holds the tensors
        return lambda: [answer for part in parts for answer in part()]

    def _generate(self, queries: Sequence[Query], planned: Planned) -> Callable[[], list[Answer]]:
        made = [
            (rows, self._together([queries[row] for row in rows], plan)) for rows, plan in planned
        ]

        def finish() -> list[Answer]:
            found = {
                row: one
                for rows, part in made
                for row, one in zip(rows, self._finish(part), strict=True)
            }
            return [found[row] for row in range(len(queries))]

        return finish

    @torch.inference_mode()
    def _together(self, queries: Sequence[Query], plan: Plan | None) -> _Said:
        """Answer queries in one run; ``plan``: what they share."""
        inputs = self._inputs(queries) if plan is None else plan.inputs(self.processor)
        clock = TokenClock(self.processor.device)
        options = _options(queries)
        stops = stop_ids(self.model, self.processor)
        ends = _Ends(self.processor, queries, stops)
        beams = options["num_beams"] > 1  # rows are beams then: answers are cut afterwards
        processors = LogitsProcessorList([clock])
        own = self.model.generation_config.repetition_penalty or 1.0
        if (penalty := options.pop("repetition_penalty", own)) != 1.0:
            mask = inputs["attention_mask"]
            visual = self.processor.is_visual(inputs["input_ids"])
            mask = mask.bool() & ~visual
            processors.append(RepetitionPenalty(penalty, mask, self.processor.image_token_id))
            options["repetition_penalty"] = 1.0  # or transformers' own would come on top
        options |= {
            "use_cache": True,
            "max_new_tokens": max(query.max_new_tokens for query in queries),
            "pad_token_id": self.processor.pad_token_id,
            "logits_processor": processors,
            "stopping_criteria": StoppingCriteriaList([] if beams else [ends]),
        }
        with self._pruned as trace:
            if plan is None:
                output = self.model.generate(**inputs, **options)
            else:
                output = plan.answer(inputs, options)
            clock.stop()
            if output is not None:
                towers = self._tiles(inputs, queries) if plan is None else plan.tiles()
                seen = _on_host(trace)
                spared = 0.0 if plan is None else plan.spared()
        if output is None:  # why is said where it was found out
            return self._together(queries, None)
        output, prompt = output.cpu(), inputs["input_ids"].cpu()
        if starts_with(output, prompt):
            output = output[:, prompt.shape[1] :]
        counts = lengths_until(output, stops) if beams else ends.counts()
        mask = inputs["attention_mask"].cpu()
        told = None if plan is None else plan.told()
        return _Said(queries, output, counts, prompt, mask, towers, seen, clock, spared, told)

    def _finish(self, said: _Said) -> list[Answer]:
        """The answers of a run."""
        costs = _costs(self, said)
        if said.told is not None:
            costs = [replace(cost, **own) for cost, own in zip(costs, said.told, strict=True)]
        return [
            replace(cost, text=self._text(said.output[row], count, query), new_tokens=count)
            for row, (cost, count, query) in enumerate(
                zip(costs, said.counts, said.queries, strict=True)
            )
        ]

    def _tiles(self, inputs: Any, queries: Sequence[Query]) -> list[float]:
        """Of each query; where a video's frames come as pictures do, each is one."""
        videos = [sum(map(is_video, query.images)) for query in queries]
        images = [len(query.images) - n for query, n in zip(queries, videos, strict=True)]
        tiles = tower_images(self.model.config, inputs, images)
        frames = inputs.get("pixel_values_videos")
        each = frames.shape[1] if frames is not None and frames.dim() == 5 else 0
        return [tile + n * each for tile, n in zip(tiles, videos, strict=True)]

    def _inputs(self, queries: Sequence[Query]) -> Any:
        styles = {query.style for query in queries}
        if len(styles) > 1:
            raise InputError(f"style={sorted(map(str, styles))} is not valid: one for a batch.")
        return self.processor.batch(
            [query.text for query in queries],
            [list(query.images) for query in queries],
            style=queries[0].style,
        )

    def _lengths(self, text: int, kept: dict[int, int]) -> list[int]:
        """Tokens that enter each layer; those that are only hidden as keys still do."""
        lengths: list[int] = []
        for layer in range(self._num_layers):
            changes = layer in kept and layer not in self._hiding
            lengths.append(text + kept[layer] if changes else lengths[-1])
        return lengths

    def _text(self, ids: torch.Tensor, count: int, query: Query) -> str:
        text = self.processor.decode(ids[None, :count], {})[0]
        return _cut(text, query.until).strip()


def ask(
    model: Any,
    processor: Any,
    image: ImageLike | Sequence[ImageLike],
    questions: str | Sequence[str],
    method: Method | None = None,
    *,
    max_new_tokens: int = 256,
    style: str | None = None,
) -> list[str]:
    """Answer any number of questions about one picture: what their prompts have in common, picture
    included, is computed once, and kept for the next call about it (the newest pictures, 1 GiB).

    Args:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        image: PIL image, path or bytes, a :class:`~vlm_prune_ext.models.clips.Clip`, or several
            that every question is about.
        questions: one, or several.
        method: what prunes; ``None``: nothing does.
        max_new_tokens: limit of each answer.
        style: conversation template; ``None`` is the family's own.

    Returns:
        an answer for each question, greedily decoded; in float32 the same as of whole prompts.

    Raises:
        InputError: an image, question or method that is not accepted.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    digests = tuple(map(digest_of, images))
    opened = [processor.opened(one) for one in images]
    asked = [questions] if isinstance(questions, str) else list(questions)
    answerer = Answerer(model, processor, method)
    texts: list[str] = []
    for first in range(0, len(asked), _TOGETHER):
        queries = [
            Query(text, opened, style, max_new_tokens, digests=digests)
            for text in asked[first : first + _TOGETHER]
        ]
        texts += [answer.text for answer in answerer.answer(queries)]
    return texts


_TOGETHER = 64  # questions that are answered at a time


def _count_layers(model: Any, method: Method | None) -> int:
    """Decoder layers; 0 for encoder-decoder models, which are answered with as they are."""
    if method is None and getattr(model.config, "is_encoder_decoder", False):
        return 0
    return len(parts_of(model).layers)


def _on_host(trace: Trace) -> Trace:
    """A copy that the next run does not write to, with its tensors on the host."""
    copied: dict[str, Any] = {}
    for name, value in vars(trace).items():
        if isinstance(value, dict):
            value = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
        copied[name] = list(value) if isinstance(value, list) else value
    return Trace(**copied)


def _costs(who: Answerer, said: _Said) -> list[Answer]:
    """Answers that have everything but what was said."""
    trace, clock, towers = said.trace, said.clock, said.towers
    batch = len(said.queries)
    image = who.processor.is_visual(said.prompt)
    visual = who.processor.count_visual_tokens({"input_ids": said.prompt})
    prompts = said.mask.sum(dim=1).tolist()
    patches = {layer: kept.shape[1] for layer, kept in sorted(trace.vision_kept.items())}
    tiles = [0, *itertools.accumulate(int(count) for count in towers)]
    left = {n: _first_of_each(kept, batch) for n, kept in sorted(trace.visual_tokens.items())}
    places = _places(trace, image)
    answers = []
    for row in range(batch):
        counts = {layer: kept[row] for layer, kept in left.items()}
        kept = {0: visual[row]} | counts
        answers.append(
            Answer(
                text="",
                prompt_tokens=prompts[row],
                new_tokens=0,
                visual_tokens=visual[row],
                visual_kept=kept,
                prefill_seconds=(clock.ttft + said.spared) / batch,
                decode_seconds=clock.decode / batch,
                lengths=who._lengths(prompts[row] - visual[row], kept),
                batch=batch,
                tower_images=towers[row],
                patches_kept=patches,
                fast=trace.backend == "graphs",
                kept=places[row] if visual[row] else {},
                patches={
                    layer: [place for place in found[tiles[row]].tolist() if place >= 0]
                    for layer, found in trace.vision_kept.items()
                    if tiles[row] < len(found)
                },
            )
        )
    return answers


def _first_of_each(rows: Any, batch: int) -> Any:
    """Of rows that are beams, the first of each sample."""
    return rows[:: max(len(rows) // batch, 1)]


def _places(trace: Trace, image: torch.Tensor) -> list[dict[int, list[int]]]:
    """``Answer.kept`` of each row. Where the tower left fewer tokens than the prompt has places,
    the places of one picture still begin where the prompt's do.

    Args:
        trace: of the run.
        image: bool ``(batch, n)``, which tokens of the prompts are visual.
    """
    number = image.cumsum(dim=1) - 1  # of each visual token
    if trace.vision_kept and trace.kept:
        left = torch.tensor(_first_of_each(trace.visual_tokens[0], len(image)))[:, None]
        number = torch.arange(image.shape[1]) - image.int().argmax(dim=1, keepdim=True)
        image = (number >= 0) & (number < left)
    found: list[dict[int, list[int]]] = [{} for _ in range(len(image))]
    for layer, kept in trace.kept.items():
        kept = _first_of_each(kept, len(image))
        inside = (kept >= 0) & (kept < image.shape[1])
        named = kept.where(inside, 0)
        inside &= image.gather(1, named)
        numbers = number.gather(1, named)
        for row, own in enumerate(found):
            own[layer] = numbers[row, inside[row]].sort().values.tolist()
    return found


class _Ends(StoppingCriteria):
    """Where each answer of a batch ends: its end token, its limit, or one of its strings."""

    TAIL = 16  # tokens looked back at for a string

    def __init__(self, processor: Any, queries: Sequence[Query], stop_ids: frozenset[int]) -> None:
        self.processor, self.queries, self.stop_ids = processor, queries, stop_ids
        self.step = 0
        self.ended: list[int | None] = [None] * len(queries)
        self._pieces: dict[int, str] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """``input_ids`` ``(batch, seq)`` so far -> bool ``(batch,)``: which are complete."""
        self.step += 1
        tails = input_ids[:, -min(self.step, self.TAIL) :].tolist()
        for row, query in enumerate(self.queries):
            if self.ended[row] is None and self._ends(tails[row], query):
                self.ended[row] = self.step
        done = [end is not None for end in self.ended]
        return torch.tensor(done, device=input_ids.device)

    def _ends(self, tail: list[int], query: Query) -> bool:
        if tail[-1] in self.stop_ids or self.step >= query.max_new_tokens:
            return True
        ends = [end for end in query.until if end and self._may_end(tail[-1], end)]
        if not ends:
            return False
        text = self.processor.tokenizer.decode(tail, skip_special_tokens=True)
        return any(end in text for end in ends)

    def _may_end(self, newest: int, end: str) -> bool:
        """Whether a string can be complete with this token: where it has the last character, or may
        have it (parts of a character, and blanks in front of a word, do not show)."""
        if newest not in self._pieces:
            self._pieces[newest] = self.processor.tokenizer.decode([newest])
        piece = self._pieces[newest]
        return end[-1] == " " or not piece or "\ufffd" in piece or end[-1] in piece

    def counts(self) -> list[int]:
        """Tokens of each answer."""
        return [end if end is not None else self.step for end in self.ended]


def _options(queries: Sequence[Query]) -> dict[str, Any]:
    """How a batch is decoded: greedily, but for what its queries agree on."""
    first = dict(queries[0].options)
    for query in queries:
        if dict(query.options) != first:
            raise InputError(
                f"options={[first, dict(query.options)]} is not valid: the same for a whole batch."
            )
    return {**GREEDY, **first}


def stop_ids(model: Any, processor: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = processor.tokenizer.eos_token_id
    return frozenset(stop if isinstance(stop, list) else () if stop is None else (stop,))


def lengths_until(output: torch.Tensor, stops: frozenset[int]) -> list[int]:
    """Tokens of each row, ``(batch, n)``, up to and with its first end token."""
    counts = []
    for row in output.tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        counts.append(ends[0] + 1 if ends else len(row))
    return counts


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of some strings."""
    places = [text.find(end) for end in until if end and end in text]
    return text[: min(places)] if places else text


# -- a line of the log ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes(flops.Sizes):
    """Sizes of a model, and an answer of it as a line of the log."""

    @staticmethod
    def of(config: Any) -> Sizes:
        """Read off a model's config."""
        found = flops.Sizes.of(config)
        return Sizes(found.decoder, found.vision, found.tile)

    def sample(self, index: int | str, answer: Answer, *, warm_up: bool) -> Sample:
        """An answer as a line of the log."""
        cost = _cost_of(
            self,
            answer.prompt_tokens,
            answer.visual_tokens,
            tuple(answer.lengths),
            answer.tower_images,
            tuple(answer.patches_kept.items()),
        )
        return sample_of(
            index,
            answer,
            warm_up=warm_up,
            flops=cost.prefill,
            flops_baseline=cost.prefill_baseline,
            flops_visual=cost.visual,
            flops_visual_baseline=cost.visual_baseline,
            vision_flops=cost.vision,
            vision_flops_baseline=cost.vision_baseline,
            flops_computed=self._computed(answer, cost.prefill),
        )

    def _computed(self, answer: Answer, prefill: float) -> float:
        """FLOPs of what was computed for an answer: of what it shared, its share."""
        if self.decoder is None:
            return prefill
        saved, own = 1 - 1 / answer.shared, answer.question_tokens
        shared = [length - own for length in answer.lengths[: answer.shared_layers]]
        return prefill - saved * self.decoder.stack_flops(shared)


@lru_cache(4096)  # few prompts of a data set differ in these
def _cost_of(
    sizes: Sizes,
    tokens: int,
    visual: int,
    lengths: tuple[int, ...],
    tower_images: float,
    patches: tuple[tuple[int, int], ...],
) -> flops.PromptFlops:
    return sizes.prompt(tokens, visual, lengths, tower_images, dict(patches))


def sample_of(index: int | str, answer: Answer, **more: Any) -> Sample:
    """An answer as a line of a log; ``more``: what else is known of it."""
    return Sample(
        index=index,
        prediction=answer.text,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens,
        visual_tokens=answer.visual_tokens,
        visual_kept={str(layer): count for layer, count in answer.visual_kept.items()},
        lengths=answer.lengths,
        prefill_seconds=answer.prefill_seconds,
        decode_seconds=answer.decode_seconds,
        fast=answer.fast,
        shared=answer.shared,
        kept={str(layer): ranges(places) for layer, places in answer.kept.items()},
        patches={str(layer): ranges(places) for layer, places in answer.patches.items()},
        **more,
    )
