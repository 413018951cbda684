"""One backend, with one method, at one batch size: what it takes to answer a workload, a model with
prompts of one picture.

Backends: ``transformers`` as it comes; ``transformers-attentions``, eager attention that returns
its maps, which published pruning codes need; ``hooks``, this package's; ``graphs``, its recorded
pieces with fixed shapes.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from vlm_prune_ext.bench.report import BACKENDS
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.engine.prune import run as prune_parts
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import measure
from vlm_prune_ext.experiment.flops import DecoderShape, Sizes, prefill_flops
from vlm_prune_ext.experiment.measure import Roofline, energy_of, seconds_of
from vlm_prune_ext.experiment.metrics import score_all
from vlm_prune_ext.experiment.record import Sample, Spread
from vlm_prune_ext.fast.front import reach
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.fast.pieces import PROMPT_STEP
from vlm_prune_ext.fast.possible import why_not
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.models.base import starts_with
from vlm_prune_ext.pruning import prune

BARE = BACKENDS[:2]  # of transformers alone
NEW_LENGTHS = 3  # tried, for what an answer takes there
ENERGY_SECONDS = 2.0  # the counter moves every 20 ms or so


# -- what is timed -------------------------------------------------------------------------------
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
    config, like = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    if config.model_type in LLAVA_VISUAL:
        count = LLAVA_VISUAL[config.model_type]
        picture = _llava_picture(config, generator)
    else:
        count = visual or 576
        if not hasattr(config.vision_config, "spatial_merge_size"):
            return Workload(name, model, None, (FRONT, count), FRONT + BEHIND)
        picture = _packed_picture(config.vision_config, count, generator)
    front = torch.randint(3, 30000, (FRONT,), generator=generator)
    behind = torch.randint(3, 30000, (BEHIND,), generator=generator)
    ids = torch.cat([front, torch.full((count,), config.image_token_id), behind])[None]
    single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
    if "image_grid_thw" in picture:
        single["mm_token_type_ids"] = (ids == config.image_token_id).long()
    single["pixel_values"] = single["pixel_values"].to(like.dtype)
    single = {key: value.to(like.device) for key, value in single.items()}
    return Workload(name, model, single, (FRONT, count), FRONT + BEHIND)


def _llava_picture(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if config.model_type == "llava":
        return {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}
    pixels = torch.randn(1, 5, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]])}


def _packed_picture(tower: Any, visual: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Qwen's: patches in one sequence, squares of them a token; as square as ``visual`` allows."""
    down = next(n for n in range(math.isqrt(visual), 0, -1) if visual % n == 0)
    merge = tower.spatial_merge_size
    grid = torch.tensor([[1, down * merge, visual // down * merge]])
    values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    pixels = torch.randn(int(grid.prod()), values, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


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


# -- cases -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """``backend``: of :data:`BACKENDS`; ``method``: ``None`` is the baseline."""

    backend: str
    method: Method | None
    batch_size: int

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return "none" if self.method is None else self.method.label()


@dataclass
class Measured:
    """What was measured of a case; ``None`` where it could not be (never 0).

    Attributes:
        backend, method, batch_size: of the case.
        lengths: tokens that enter each layer.
        prefill: seconds of the language model's prefill, output head included.
        ttft: seconds of ``generate`` for one token: tower, prefill, everything around.
        tpot: seconds per further token, for the whole batch.
        samples_per_second: of answers of one token; ``long_samples_per_second``: of ``new_tokens``.
        unseen_samples_per_second: of such answers to prompts of a length that was not seen before,
            where kernels are planned or recorded first.
        new_tokens: of the long answers.
        flops: of the prefill of the batch; flops_ratio: over the unpruned one, text included;
            flops_ratio_visual: of the layers over visual tokens alone, as papers state it;
            flops_ratio_whole: with tower and projector, as TTFT has them (``None``: a tower whose
            FLOPs are not stated, or that the method shortens).
        prefill_roofline: seconds, arithmetic; tpot_roofline: seconds, reading weights.
        peak_memory: bytes, most taken while answering (in the prefill, where only that is timed),
            weights included (GPU only).
        energy: joules per answer of one token (GPU only).
        same_kept: share of kept positions that hooks keep too (graphs only).
        captures: pieces recorded, and capture_seconds: how long that took (graphs only).
        metrics: those that every command shows, of the long answers.
    """

    backend: str
    method: str
    batch_size: int
    lengths: list[int]
    prefill: Spread
    flops: float
    flops_ratio: float
    flops_ratio_visual: float | None
    flops_ratio_whole: float | None
    prefill_roofline: float
    tpot_roofline: float
    new_tokens: int = 0
    ttft: Spread | None = None
    tpot: float | None = None
    samples_per_second: float | None = None
    long_samples_per_second: float | None = None
    unseen_samples_per_second: float | None = None
    peak_memory: int | None = None
    energy: float | None = None
    same_kept: float | None = None
    captures: int | None = None
    capture_seconds: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


def possible(workload: Workload, case: Case) -> str | None:
    """Why a case cannot be; ``None`` if it can."""
    if case.backend in BARE and case.method is not None:
        return "transformers does not prune"
    if case.backend == "hooks" and case.method is None and workload.device.type != "cuda":
        return "the baseline attaches nothing: it would be transformers again"
    if case.backend != "graphs":
        return None
    if workload.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return why_not(workload.parts, case.method)


@torch.inference_mode()
def measure_case(
    workload: Workload, case: Case, roofline: Roofline, *, new_tokens: int, repeat: int
) -> Measured:
    """Measure one case.

    Args:
        workload: model and prompts.
        case: what to measure.
        roofline: of the device.
        new_tokens: of the long answers, at least 2.
        repeat: timed runs of a prefill; whole answers are run a third as often.
    """
    gc.collect()
    if workload.device.type == "cuda":
        torch.cuda.empty_cache()
    with _as_backend(workload, case.backend) as fast, _no_end_token(workload.model):
        cell = _prefill_cell(workload, case, roofline, fast, repeat)
        if workload.single is not None:
            _answers(workload, case, cell, fast, new_tokens, max(3, repeat // 3))
    return cell


@contextmanager
def _as_backend(workload: Workload, backend: str) -> Iterator[FastGenerate | None]:
    """The model as a backend wants it, and as it was afterwards."""
    before = workload.model.config._attn_implementation
    if backend == "transformers-attentions":
        workload.model.set_attn_implementation("eager")
    try:
        yield _fast(workload) if backend == "graphs" else None
    finally:
        if backend == "transformers-attentions":
            workload.model.set_attn_implementation(before)


def _fast(workload: Workload) -> FastGenerate:
    """Fresh, so that what one case recorded does not count as the memory of another."""
    capture = workload.device.type == "cuda"
    return FastGenerate(workload.model, workload.parts, capture=capture, forced=True)


@contextmanager
def _no_end_token(model: Any) -> Iterator[None]:
    """Random weights, or a model that says little, would end answers early."""
    config = model.generation_config
    before, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = before


def _as_case(case: Case, pruned: Callable[[], Any]) -> Any:
    """What is around a measurement: for transformers itself nothing, so that it keeps its own
    choice of attention kernels."""
    return nullcontext(Trace()) if case.backend in BARE else pruned()


# -- prefill -----------------------------------------------------------------------------------
def _prefill_cell(
    workload: Workload, case: Case, roofline: Roofline, fast: FastGenerate | None, repeat: int
) -> Measured:
    given = workload.decoder_inputs(case.batch_size)
    forward = _forward(workload, case, given)
    with _as_case(case, lambda: prune_parts(workload.parts, case.method, workload.span)) as trace:
        call = forward if fast is None else lambda: fast.prefill(forward, 1)
        spread = seconds_of(call, workload.device, repeat=repeat)
        peak = _peak(call, workload.device) if workload.single is None else None
        lengths = list(trace.lengths) or [workload.tokens] * workload.shape.layers
        kept = dict(trace.kept)
    cost = Sizes(workload.shape, None).prompt(workload.tokens, workload.span[1], lengths)
    flops = cost.prefill
    assert cost.ratio is not None
    return Measured(
        backend=case.backend,
        method=case.label,
        batch_size=case.batch_size,
        lengths=lengths,
        prefill=spread,
        flops=flops * case.batch_size,
        flops_ratio=cost.ratio,
        flops_ratio_visual=cost.ratio_visual,
        flops_ratio_whole=_whole_ratio(workload, case, lengths),
        prefill_roofline=roofline.prefill_seconds(flops * case.batch_size),
        tpot_roofline=roofline.token_seconds(workload.weight_bytes),
        peak_memory=peak,
        same_kept=_agreement(workload, case, forward, kept) if fast is not None else None,
    )


def _whole_ratio(workload: Workload, case: Case, lengths: list[int]) -> float | None:
    inputs, config = workload.single, workload.model.config
    in_tower = case.method is not None and "tower" in case.method.working_sites
    if inputs is None or in_tower:
        return None
    whole = prefill_flops(config, inputs)
    own = prefill_flops(config, inputs, lengths)
    return own.total / whole.total if own is not None and whole is not None else None


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    measure.reset_peak(device)
    call()
    return measure.peak_memory(device)


def _forward(workload: Workload, case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    head = workload.model.get_output_embeddings()
    more = {"output_attentions": True} if case.backend == "transformers-attentions" else {}

    def forward() -> torch.Tensor:
        output = workload.decoder(**given, use_cache=True, **more)
        return head(output.last_hidden_state[:, -1:])

    return forward


def _agreement(
    workload: Workload, case: Case, forward: Callable[[], Any], kept: dict[int, torch.Tensor]
) -> float | None:
    """Share of the positions a method keeps with graphs that it also keeps with hooks."""
    if not kept:
        return None
    with prune_parts(workload.parts, case.method, workload.span) as trace:
        forward()
    same = total = 0
    for layer, places in kept.items():
        other = trace.kept[layer]
        for row in range(places.shape[0]):
            same += int(torch.isin(places[row], other[row]).sum())
            total += places.shape[1]
    return same / total


# -- whole answers -------------------------------------------------------------------------------
def _answers(
    workload: Workload,
    case: Case,
    cell: Measured,
    fast: FastGenerate | None,
    new_tokens: int,
    repeat: int,
) -> None:
    """Fill in what needs ``generate``."""
    inputs, device = workload.batch(case.batch_size), workload.device
    more: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if case.backend == "transformers-attentions":
        more |= {"output_attentions": True, "return_dict_in_generate": True}
    function = workload.model.generate if fast is None else fast

    def answer(count: int) -> Any:
        return function(**inputs, max_new_tokens=count, **more)

    with _as_case(case, lambda: prune(workload.model, case.method)):
        measure.reset_peak(device)
        for count in (1, new_tokens):  # everything is allocated and recorded, and counts
            said = answer(count)
        if device.type == "cuda":
            cell.peak_memory = measure.peak_memory(device)
        cell.ttft = seconds_of(lambda: answer(1), device, repeat=repeat, warm_up=0)
        long = seconds_of(lambda: answer(new_tokens), device, repeat=repeat, warm_up=0)
        on_gpu = device.type == "cuda"
        cell.energy = energy_of(
            lambda: answer(1),
            device,
            examples=case.batch_size,
            seconds=ENERGY_SECONDS if on_gpu else 0.0,
        ).counted
        if fast is not None:  # of this prompt, before others come
            cell.captures, cell.capture_seconds = fast.captures, fast.capture_seconds
        unseen = _unseen_seconds(workload, case, partial(function, **more), new_tokens)
    cell.new_tokens = new_tokens
    seconds = (long.median - cell.ttft.median) / (new_tokens - 1)
    cell.tpot = seconds if seconds > 0 else None  # lost in the noise of a busy machine
    cell.samples_per_second = case.batch_size / cell.ttft.median
    cell.long_samples_per_second = case.batch_size / long.median
    cell.unseen_samples_per_second = case.batch_size / unseen if unseen is not None else None
    output = said if isinstance(said, torch.Tensor) else said.sequences
    cell.metrics, _ = score_all(_samples(workload, cell, output, long.median), None)


def _samples(workload: Workload, cell: Measured, output: torch.Tensor, long: float) -> list[Sample]:
    """The long answers as metrics see them, each with its share of the batch."""
    size, ttft = cell.batch_size, cell.ttft.median if cell.ttft is not None else 0.0
    texts = workload.decode(output) if workload.decode is not None else [""] * size
    return [
        Sample(
            index=index,
            prediction=text,
            prompt_tokens=workload.tokens,
            new_tokens=cell.new_tokens,
            visual_tokens=workload.span[1],
            lengths=cell.lengths,
            prefill_seconds=ttft / size,
            decode_seconds=max(long - ttft, 0.0) / size,
            flops=cell.flops / size,
            flops_baseline=cell.flops / cell.flops_ratio / size,
            fast=cell.backend == "graphs",
            seconds=long / size,
            batch=size,
        )
        for index, text in enumerate(texts)
    ]


def _unseen_seconds(
    workload: Workload, case: Case, generate: Callable[..., Any], new: int
) -> float | None:
    """Of an answer of ``new`` tokens to a prompt of a new length, median; ``None``: no room."""

    def answer() -> float:
        # New to transformers' kernels with every token, to recorded pieces with every few.
        step = {"transformers": new, "graphs": PROMPT_STEP}.get(case.backend, 1)
        inputs = workload.unseen(case.batch_size, case.backend, step)
        call = partial(generate, **inputs, max_new_tokens=new)
        return seconds_of(call, workload.device, repeat=1, warm_up=0).median

    try:
        if case.backend == "graphs":
            answer()  # memory grows for the first longer prompt, with room for the next
        return statistics.median(answer() for _ in range(NEW_LENGTHS))
    except torch.OutOfMemoryError:
        return None
