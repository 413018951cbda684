"""One way of running a model, with one method, at one batch size: what it takes.

Ways: ``hf`` is transformers as it comes; ``hf-attentions`` is eager attention that returns its
maps, which published pruning codes need; ``ordinary`` is this package's hooks; ``fast`` its
recorded pieces with fixed shapes.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlm_prune_ext.bench.floors import Ceilings
from vlm_prune_ext.bench.subject import Subject
from vlm_prune_ext.engine.prune import run as prune_parts
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.experiment import measure
from vlm_prune_ext.experiment.flops import Sizes
from vlm_prune_ext.experiment.measure import energy_of, seconds_of
from vlm_prune_ext.experiment.record import Spread
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.fast.pieces import PROMPT_STEP
from vlm_prune_ext.fast.possible import why_not
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.pruning import prune

WAYS = ("hf", "hf-attentions", "ordinary", "fast")
NEW_LENGTHS = 3  # tried, for what an answer takes there
ENERGY_SECONDS = 2.0  # the counter moves every 20 ms or so


@dataclass(frozen=True)
class Case:
    """``way``: of :data:`WAYS`; ``method``: ``None`` is the baseline; ``batch``: samples."""

    way: str
    method: Method | None
    batch: int

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return "none" if self.method is None else self.method.label()


@dataclass
class Cell:
    """What was measured; ``None`` where it could not be (never 0).

    Attributes:
        way, method, batch: of the case.
        lengths: tokens that enter each layer.
        prefill: seconds of the language model's prefill, output head included.
        first_token: seconds of ``generate`` for one token: tower, prefill, everything around.
        decode: seconds per further token, for the whole batch.
        samples_per_second: of answers of one token; ``long_samples_per_second``: of ``new_tokens``.
        unseen_samples_per_second: of such answers to prompts of a length that was not seen before,
            where kernels are planned or recorded first.
        new_tokens: of the long answers.
        flops: of the prefill of the batch; flops_ratio: over the unpruned one, text included;
            flops_ratio_visual: of the layers over visual tokens alone, as papers state it.
        prefill_floor: seconds, arithmetic; decode_floor: seconds, reading weights.
        peak_bytes: most memory taken while answering (in the prefill, where only that is timed),
            weights included (GPU only).
        joules: per answer of one token.
        same_kept: share of kept positions that the ordinary path keeps too (fast only).
        captures: pieces recorded, and capture_seconds: how long that took (fast only).
    """

    way: str
    method: str
    batch: int
    lengths: list[int]
    prefill: Spread
    flops: float
    flops_ratio: float
    flops_ratio_visual: float | None
    prefill_floor: float
    decode_floor: float
    new_tokens: int = 0
    first_token: Spread | None = None
    decode: float | None = None
    samples_per_second: float | None = None
    long_samples_per_second: float | None = None
    unseen_samples_per_second: float | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    same_kept: float | None = None
    captures: int | None = None
    capture_seconds: float | None = None


def possible(subject: Subject, case: Case) -> str | None:
    """Why a case cannot be; ``None`` if it can."""
    if case.way in ("hf", "hf-attentions") and case.method is not None:
        return "transformers does not prune"
    if case.way == "ordinary" and case.method is None and subject.device.type != "cuda":
        return "the baseline attaches nothing: it would be hf again"
    if case.way != "fast":
        return None
    if subject.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return why_not(subject.parts, case.method)


@torch.inference_mode()
def measure_case(
    subject: Subject, case: Case, ceilings: Ceilings, *, new_tokens: int, repeat: int
) -> Cell:
    """Measure one case.

    Args:
        subject: model and prompts.
        case: what to measure.
        ceilings: of the device.
        new_tokens: of the long answers, at least 2.
        repeat: timed runs of a prefill; whole answers are run a third as often.
    """
    gc.collect()
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()
    with _as_way(subject, case.way) as fast, _no_end_token(subject.model):
        cell = _prefill_cell(subject, case, ceilings, fast, repeat)
        if subject.single is not None:
            _answers(subject, case, cell, fast, new_tokens, max(3, repeat // 3))
    return cell


@contextmanager
def _as_way(subject: Subject, way: str) -> Iterator[FastGenerate | None]:
    """The model as a way wants it, and as it was afterwards."""
    before = subject.model.config._attn_implementation
    if way == "hf-attentions":
        subject.model.set_attn_implementation("eager")
    try:
        yield _fast(subject) if way == "fast" else None
    finally:
        if way == "hf-attentions":
            subject.model.set_attn_implementation(before)


def _fast(subject: Subject) -> FastGenerate:
    """Fresh, so that what one case recorded does not count as the memory of another."""
    capture = subject.device.type == "cuda"
    return FastGenerate(subject.model, subject.parts, capture=capture, forced=True)


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
    return nullcontext(Trace()) if case.way in ("hf", "hf-attentions") else pruned()


# -- prefill -----------------------------------------------------------------------------------
def _prefill_cell(
    subject: Subject, case: Case, ceilings: Ceilings, fast: FastGenerate | None, repeat: int
) -> Cell:
    given = subject.decoder_inputs(case.batch)
    forward = _forward(subject, case, given)
    with _as_case(case, lambda: prune_parts(subject.parts, case.method, subject.span)) as trace:
        call = forward if fast is None else lambda: fast.prefill(forward, 1)
        spread = seconds_of(call, subject.device, repeat=repeat)
        peak = _peak(call, subject.device) if subject.single is None else None
        lengths = list(trace.lengths) or [subject.tokens] * subject.shape.layers
        kept = dict(trace.kept)
    cost = Sizes(subject.shape, None).prompt(subject.tokens, subject.span[1], lengths)
    flops = cost.prefill
    assert cost.ratio is not None
    return Cell(
        way=case.way,
        method=case.label,
        batch=case.batch,
        lengths=lengths,
        prefill=spread,
        flops=flops * case.batch,
        flops_ratio=cost.ratio,
        flops_ratio_visual=cost.ratio_visual,
        prefill_floor=ceilings.prefill_seconds(flops * case.batch),
        decode_floor=ceilings.token_seconds(subject.weight_bytes),
        peak_bytes=peak,
        same_kept=_agreement(subject, case, forward, kept) if fast is not None else None,
    )


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    measure.reset_peak(device)
    call()
    return measure.peak_memory(device)


def _forward(subject: Subject, case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    head = subject.model.get_output_embeddings()
    more = {"output_attentions": True} if case.way == "hf-attentions" else {}

    def forward() -> torch.Tensor:
        output = subject.decoder(**given, use_cache=True, **more)
        return head(output.last_hidden_state[:, -1:])

    return forward


def _agreement(
    subject: Subject, case: Case, forward: Callable[[], Any], kept: dict[int, torch.Tensor]
) -> float | None:
    """Share of the positions a method keeps on the fast path that it also keeps on the other."""
    if not kept:
        return None
    with prune_parts(subject.parts, case.method, subject.span) as trace:
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
    subject: Subject,
    case: Case,
    cell: Cell,
    fast: FastGenerate | None,
    new_tokens: int,
    repeat: int,
) -> None:
    """Fill in what needs ``generate``."""
    inputs, device = subject.batch(case.batch), subject.device
    more: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if case.way == "hf-attentions":
        more |= {"output_attentions": True, "return_dict_in_generate": True}
    function = subject.model.generate if fast is None else fast

    def answer(count: int) -> Any:
        return function(**inputs, max_new_tokens=count, **more)

    with _as_case(case, lambda: prune(subject.model, case.method)):
        measure.reset_peak(device)
        for count in (1, new_tokens):  # everything is allocated and recorded, and counts
            answer(count)
        if device.type == "cuda":
            cell.peak_bytes = measure.peak_memory(device)
        cell.first_token = seconds_of(lambda: answer(1), device, repeat=repeat, warm_up=0)
        long = seconds_of(lambda: answer(new_tokens), device, repeat=repeat, warm_up=0)
        on_gpu = device.type == "cuda"
        cell.joules = energy_of(
            lambda: answer(1),
            device,
            examples=case.batch,
            seconds=ENERGY_SECONDS if on_gpu else 0.0,
        ).counted
        if fast is not None:  # of this prompt, before others come
            cell.captures, cell.capture_seconds = fast.captures, fast.capture_seconds
        unseen = _unseen_seconds(subject, case, partial(function, **more), new_tokens)
    cell.new_tokens = new_tokens
    seconds = (long.median - cell.first_token.median) / (new_tokens - 1)
    cell.decode = seconds if seconds > 0 else None  # lost in the noise of a busy machine
    cell.samples_per_second = case.batch / cell.first_token.median
    cell.long_samples_per_second = case.batch / long.median
    cell.unseen_samples_per_second = case.batch / unseen if unseen is not None else None


def _unseen_seconds(
    subject: Subject, case: Case, generate: Callable[..., Any], new: int
) -> float | None:
    """Of an answer of ``new`` tokens to a prompt of a new length, median; ``None``: no room."""

    def answer() -> float:
        # New to transformers' kernels with every token, to recorded pieces with every few.
        step = {"hf": new, "fast": PROMPT_STEP}.get(case.way, 1)
        inputs = subject.unseen(case.batch, case.way, step)
        call = partial(generate, **inputs, max_new_tokens=new)
        return seconds_of(call, subject.device, repeat=1, warm_up=0).median

    try:
        if case.way == "fast":
            answer()  # memory grows for the first longer prompt, with room for the next
        return statistics.median(answer() for _ in range(NEW_LENGTHS))
    except torch.OutOfMemoryError:
        return None
