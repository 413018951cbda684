"""What an lmms-eval run cost: counted per process, added up over all of them, reported once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer, Answerer
from vlm_prune_ext.evals.lmms_requests import Source
from vlm_prune_ext.experiment.flops import PromptFlops, Sizes
from vlm_prune_ext.experiment.measure import EnergyMeter, peak_memory
from vlm_prune_ext.experiment.report import terminal_text

SHOWN = 10
"""Samples without an image that are named one by one; the rest is counted."""


@dataclass
class Sums:
    """Sums over the batches of one process; such sums can be added.

    Attributes:
        samples: answered or scored.
        failed: reported instead.
        bare: answered without an image.
        seconds: of all batches.
        new_tokens: generated.
        timed: samples that the times below are of: all but those of the first batch (which also
            pays for kernels being loaded), unless there is just one.
        first_token: seconds to the first token, as each sample had to wait for it.
        decode: seconds after it; ``decoded``: tokens made in them.
        seeing: samples with images; ``before``, ``after``: their visual tokens in the prompt and
            behind the last selection.
        flops: of all prompts.
        fast: answered on the fast path.
        peak: bytes; ``joules``: of the GPU, ``None`` where nothing counts.
    """

    samples: int = 0
    failed: int = 0
    bare: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    timed: int = 0
    first_token: float = 0.0
    decode: float = 0.0
    decoded: int = 0
    seeing: int = 0
    before: int = 0
    after: int = 0
    flops: PromptFlops = field(default_factory=PromptFlops)
    peak: int = 0
    joules: float | None = None
    fast: int = 0


class Tally:
    """Counts on one process.

    Args:
        answerer: what answers.
        device: where.
    """

    def __init__(self, answerer: Answerer, device: torch.device) -> None:
        self._sizes = Sizes.of(answerer.model.config)
        self._own = answerer.together is None  # else other processes' memory would be meant
        self._alone = answerer.devices == 1
        self._device = device
        self._sums = Sums()
        self._first: Sequence[Answer] | None = None
        self._energy: EnergyMeter | None = None
        self._faults: Counter[str] = Counter()
        self._example = ""

    def start(self) -> None:
        """Begin to count energy, if that has not begun."""
        if self._energy is None and self._alone:
            self._energy = EnergyMeter(self._device, None)

    def add(self, seconds: float, answers: Sequence[Answer] = (), samples: int = 0) -> None:
        """Count a batch.

        Args:
            seconds: that it took.
            answers: in it.
            samples: in it that were scored rather than answered.
        """
        self._sums.samples += len(answers) + samples
        self._sums.seconds += seconds
        for answer in answers:
            self._add_answer(answer)
        if self._first is None and (answers or samples):
            self._first = answers
        else:
            _add_times(self._sums, answers)

    def _add_answer(self, answer: Answer) -> None:
        sums = self._sums
        sums.new_tokens += answer.new_tokens
        sums.fast += answer.fast
        if answer.visual_tokens:
            sums.seeing += 1
            sums.before += answer.visual_tokens
            sums.after += answer.visual_kept[max(answer.visual_kept)]
        sums.flops += self._sizes.prompt(answer.prompt_tokens, answer.visual_tokens, answer.lengths)

    def fault(self, source: Source, why: str) -> None:
        """Report a sample that is not answered."""
        self._sums.failed += 1
        self._example = self._example or f"{source}: {why}"
        logger.error(terminal_text(f"{source}: not answered: {why}"))

    def without_image(self, source: Source) -> None:
        """Report a sample that has no image."""
        self._sums.bare += 1
        if self._sums.bare <= SHOWN:
            logger.warning(f"{source}: it has no image and is answered from its text alone")

    def report(self, rank: int, processes: int) -> dict[str, float]:
        """Add up all processes and hand the sums to lmms-eval. Every process has to call this.

        Returns:
            what was reported, under its names there (``results["throughput"]["avg_<name>"]``).

        Raises:
            InputError: not one sample could be answered; scores would mean nothing.
        """
        sums = self._sums
        if not sums.timed and self._first is not None:
            _add_times(sums, self._first)
        sums.peak = peak_memory(self._device) if self._own else 0
        sums.joules = self._energy.joules() if self._energy is not None else None
        everyone = _gather((sums, self._example), processes)
        total, longest = _added([one for one, _ in everyone])
        if total.failed and not total.samples:
            example = next(example for _, example in everyone if example)
            raise InputError(f"None of {total.failed} samples could be answered. {example}.")
        metrics = _metrics(total, longest, processes)
        if rank == 0 and total.samples:
            log_metrics(
                total_elapsed_time=longest,
                total_gen_tokens=total.new_tokens,
                avg_speed=total.new_tokens / longest if longest else 0.0,
                additional_metrics={"total_requests": total.samples, **metrics},
            )
        return metrics


def _add_times(sums: Sums, answers: Sequence[Answer]) -> None:
    for answer in answers:
        sums.timed += 1
        sums.first_token += answer.prefill_seconds * answer.batch
        sums.decode += answer.decode_seconds
        sums.decoded += max(0, answer.new_tokens - 1)


def _gather(own: Any, processes: int) -> list[Any]:
    if processes == 1 or not torch.distributed.is_initialized():
        return [own]
    everyone: list[Any] = [None] * processes
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _added(everyone: Sequence[Sums]) -> tuple[Sums, float]:
    """The sum, and the seconds of the process that took longest. Of peaks, the highest counts."""
    total = Sums()
    for sums in everyone:
        for name, value in vars(sums).items():
            if name not in ("peak", "joules"):
                setattr(total, name, getattr(total, name) + value)
        total.peak = max(total.peak, sums.peak)
        if sums.joules is not None:
            total.joules = (total.joules or 0.0) + sums.joules
    return total, max(sums.seconds for sums in everyone)


def _metrics(total: Sums, seconds: float, processes: int) -> dict[str, float]:
    """The figures of a run, by name; those that do not apply are left out."""
    figures: dict[str, float | None] = {
        "time_to_first_token": _ratio(total.first_token, total.timed),
        "decode_tokens_per_second": _ratio(total.decoded, total.decode),
        "samples_per_second": _ratio(total.samples, seconds),
        "visual_tokens_before": _ratio(total.before, total.seeing),
        "visual_tokens_after": _ratio(total.after, total.seeing),
        "flops_ratio": total.flops.ratio,
        "flops_ratio_visual": total.flops.ratio_visual,
        "fast_path": total.fast / total.samples if total.samples else None,
        "peak_memory_gib": total.peak / 2**30,
        "joules_per_sample": _ratio(total.joules or 0.0, total.samples),
        "failed_samples": total.failed,
        "samples_without_image": total.bare,
        "processes": processes,
    }
    if total.joules is None:
        del figures["joules_per_sample"]
    if not total.peak:
        del figures["peak_memory_gib"]
    return {name: value for name, value in figures.items() if value is not None}


def _ratio(value: float, count: float) -> float | None:
    return value / count if count else None
