"""One cell, measured.

What each figure is and how it is taken:

- *Latency* is that of a whole ``generate`` call on a batch whose inputs are ready on the device,
  waited for at its end. No hook of ours is on the model (but those of the method). Every batch
  runs ``repeat`` times, and nothing is timed the first time that inputs of its shape run.
- *Prefill* and *decode* come from the same calls: the time to the scores of the first new token,
  and the rest. *Vision* is measured in runs of its own, of one token each, in which hooks wait for
  the device in front of the vision modules and behind them; the language model's prefill is the
  time to first token less that.
- *FLOPs* are counted in a run of its own over the first batch.
- *Energy* is measured in runs of its own over the first batch, long enough for the counter to move,
  with the power sampled beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList

from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import GREEDY, lengths_until, stop_ids
from vlm_prune_ext.evals.examples import Example
from vlm_prune_ext.experiment.flops import (
    FlopCount,
    count_flops,
    prefill_flops,
    vision_modules,
)
from vlm_prune_ext.experiment.measure import (
    GPU_WARM_UP,
    Energy,
    TokenClock,
    energy_of,
    peak_memory,
    reset_peak,
    stopwatch,
)
from vlm_prune_ext.experiment.measure import warm as warm_up
from vlm_prune_ext.experiment.metrics import METRICS, Answered, everywhere, fitting, score_all
from vlm_prune_ext.experiment.record import LayerGroup, Sample, Spread, layer_groups, mean_held
from vlm_prune_ext.models.base import starts_with
from vlm_prune_ext.profiling.loading import Loaded
from vlm_prune_ext.pruning import prune


# -- prompts with a stated number of text tokens ---------------------------------------------------
# Text tokens are all tokens of a prompt that are not visual ones: the family's template and the
# question. A prompt that has too many loses words at the end of its question (the template stays
# whole); one that has too few is filled up in front with padding, which attention does not see: the
# answer to a padded one is the same, and the model computes as many positions as if there had been
# text.
@dataclass
class Batch:
    """Inputs of some examples.

    Attributes:
        inputs: for ``generate``.
        visual: visual tokens of each.
        text: text tokens of each, padding not counted.
        pixels: shape of what the vision tower gets.
    """

    inputs: Any
    visual: list[int]
    text: list[int]
    pixels: tuple[int, ...]

    @property
    def width(self) -> int:
        """Positions of a row, padding included."""
        return int(self.inputs["input_ids"].shape[1])


class Prompter:
    """Makes batches, and remembers how far questions had to be cut.

    Args:
        processor: as :func:`vlm_prune_ext.load` returns it.
        side: pictures are resized to this many pixels a side; ``None``: as they are.
        limit: text tokens of a prompt; ``None``: as it is.
    """

    def __init__(self, processor: Any, side: int | None, limit: int | None) -> None:
        self.processor, self.side, self.limit = processor, side, limit
        self._questions: dict[int, str] = {}

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Inputs of some examples.

        Raises:
            InputError: the template alone has more text tokens than ``limit``.
        """
        pictures = [example.picture(self.side) for example in examples]
        texts = [self._question(e, p) for e, p in zip(examples, pictures, strict=True)]
        inputs = self.processor.batch(texts, pictures)
        visual = self.processor.count_visual_tokens(inputs)
        real = inputs["attention_mask"].sum(dim=1).tolist()
        text = [total - own for total, own in zip(real, visual, strict=True)]
        if self.limit is not None:
            inputs = self._filled(inputs, max(visual) + self.limit)
        pixels = inputs.get("pixel_values", inputs.get("image_patches"))
        return Batch(inputs, visual, text, tuple(pixels.shape) if pixels is not None else ())

    def _question(self, example: Example, picture: Any) -> str:
        if self.limit is None:
            return example.prompt
        if example.index not in self._questions:
            self._questions[example.index] = self._cut(example.prompt, picture)
        return self._questions[example.index]

    def _cut(self, question: str, picture: Any) -> str:
        """The question without as many words at its end as it has tokens too many."""
        assert self.limit is not None
        words = question.split(" ")
        said = question
        while (over := self._text_tokens(said, picture) - self.limit) > 0:
            if not words:
                raise InputError(
                    f"max_input_len={self.limit} is not valid: the prompt without any question has "
                    f"{self.limit + over} text tokens already."
                )
            # A word has at least one token, so this never cuts too far by much.
            del words[-max(1, over // 4) :]
            said = " ".join(words)
        return said

    def _text_tokens(self, text: str, picture: Any) -> int:
        inputs = self.processor.batch([text], [picture])
        return int(inputs["attention_mask"].sum()) - self.processor.count_visual_tokens(inputs)[0]

    def _filled(self, inputs: Any, width: int) -> Any:
        """Rows with padding in front, up to ``width`` positions."""
        shape = tuple(inputs["input_ids"].shape)
        missing = width - shape[1]
        for name, value in inputs.items():
            if missing > 0 and isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
                fill = self.processor.pad_token_id if name == "input_ids" else 0
                inputs[name] = torch.nn.functional.pad(value, (missing, 0), value=fill)
        return inputs


# -- figures of a cell -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Latency:
    """Seconds for a batch.

    Attributes:
        total: of a whole call.
        first_token: until the first new token.
        vision: of these, the vision modules' (median).
        prefill: of these, the rest (median).
        decode: behind the first new token.
        per_token: of decoding, for each further step (median); ``None`` where there was none.
        preparing: pictures and text to inputs, on the host (median; not part of ``total``).
    """

    total: Spread
    first_token: Spread
    vision: float
    prefill: float
    decode: Spread
    per_token: float | None
    preparing: float


@dataclass(frozen=True)
class Quality:
    """Scores of a set of answers.

    Attributes:
        wer: word error rate, 1.0 is as many errors as words.
        name: the score that fits: ``vqa`` (several people's answers), ``accuracy`` (one right
            answer) or ``bleu4`` (captions).
        value: in percent.
        samples: answers scored.
        cider: CIDEr of captions, 100 times the usual unit, where pycocoevalcap is installed.
        metrics: those that every command shows, by name.
    """

    wer: float
    name: str
    value: float
    samples: int
    cider: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


def quality_of(samples: Sequence[Answered | str], references: Sequence[Sequence[str]]) -> Quality:
    """Score answers.

    Args:
        samples: one per example, or their texts alone.
        references: one or several per example.
    """
    fits, more = fitting(references), everywhere()
    is_caption = fits == "bleu4_lower"
    names = ["wer", fits, *(["cider_words"] if is_caption else []), *more]
    found, missing = score_all(samples, references, names)
    for name in ("wer", fits):
        if name in missing:
            raise InputError(f"{METRICS[name].title} cannot be computed: {missing[name]}.")
    return Quality(
        wer=found["wer"],  # type: ignore[arg-type]
        name=METRICS[fits].title,
        value=found[fits],  # type: ignore[arg-type]
        samples=len(samples),
        cider=found.get("cider_words"),
        metrics={name: found[name] for name in more},
    )


@dataclass(frozen=True)
class Flops:
    """FLOPs per example (2 per multiply-add), of the first batch.

    Attributes:
        vision: counted, of tower and projector.
        prefill: counted, of the language model until the first new token.
        decode: counted, of all further tokens (without a cache these run the prompt again).
        analytic_vision, analytic_prefill: the same by formula; ``None`` where none is known.
        ratio: counted over analytic, of vision and prefill together; what a rule computes itself
            is counted and in no formula, so above 1 this is its share.
    """

    vision: float | None
    prefill: float | None
    decode: float | None
    analytic_vision: float | None
    analytic_prefill: float | None
    ratio: float | None


@dataclass(frozen=True)
class Tokens:
    """Means per example.

    Attributes:
        visual: visual tokens of the prompt.
        visual_kept: of these, how many a decoder layer holds, mean over layers.
        visual_last: of these, how many the last layer holds.
        text: text tokens, template included, padding not.
        width: positions of the prompt that are computed, padding included.
        new: generated.
        pixels: shape of the first batch's input to the vision tower.
    """

    visual: float
    visual_kept: float
    visual_last: float
    text: float
    width: float
    new: float
    pixels: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """All figures of one cell.

    Attributes:
        precision: of the weights, as it was.
        latency, energy, flops, tokens, quality: see there.
        examples_per_second: by the median latency.
        peak_memory: bytes; on a GPU allocated by tensors while this cell was measured, on a CPU
            resident memory of the process.
        seconds: the whole cell took.
        answers: of the examples, in order.
        row_numbers: of the examples, in the table.
    """

    precision: str
    latency: Latency
    energy: Energy
    flops: Flops
    tokens: Tokens
    quality: Quality
    examples_per_second: float
    peak_memory: int
    seconds: float
    answers: list[str] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)


@dataclass
class _Run:
    """One ``generate`` call: new ids, its clock and what was kept."""

    ids: torch.Tensor
    clock: TokenClock
    trace: Trace


class CellMeasurer:
    """Measures one cell.

    Args:
        loaded: the model in the cell's precision.
        cell: what to measure: a cell's settings as attributes, the method built.
        examples: the first ``cell.samples`` of these are used.
        idle: watts at idle, if known.
    """

    def __init__(
        self, loaded: Loaded, cell: Any, examples: Sequence[Example], idle: float | None = None
    ) -> None:
        self.loaded, self.cell, self.idle = loaded, cell, idle
        self.model, self.processor = loaded.model, loaded.processor
        self.device = self.processor.device
        self.examples = list(examples)[: cell.samples]
        self.prompter = Prompter(self.processor, cell.img_size, cell.max_input_len)

    def measure(self) -> Result:
        """Take all figures.

        Raises:
            InputError: a prompt or method that is not accepted.
            torch.OutOfMemoryError: a batch does not fit.
        """
        start = time.perf_counter()
        fast = self.loaded.optimization.form == "fast"
        if fast and not self.cell.cached:
            raise InputError("--optimization fast cannot be done without a KV cache.")
        torch.manual_seed(self.cell.seed)
        chunks = self._chunks()
        first = self.prompter.batch(chunks[0])
        warm: set[tuple[int, tuple[int, ...]]] = set()
        if self.cell.warmup:
            seconds = GPU_WARM_UP if torch.device(self.device).type == "cuda" else 0.0
            warm_up(lambda: self._generate(first), self.cell.warmup, seconds)
            warm.add((first.width, first.pixels))
        reset_peak(self.device)
        runs: list[_Run] = []
        batches: list[tuple[Batch, _Run, float]] = []
        for chunk in chunks:
            began = time.perf_counter()
            batch = self.prompter.batch(chunk)
            prepared = time.perf_counter() - began
            if (batch.width, batch.pixels) not in warm:
                self._generate(batch)
                warm.add((batch.width, batch.pixels))
            own = [self._generate(batch) for _ in range(self.cell.repeat)]
            batches.append((self._light(batch), own[0], prepared))
            runs += own
        peak = peak_memory(self.device)
        if fast and any(run.trace.backend != "graphs" for run in runs):
            raise InputError("--optimization fast is not taken by this model and these settings.")
        latency = self._latency(runs, first, [prepared for *_, prepared in batches])
        samples = self._samples([(batch, run) for batch, run, _ in batches])
        return Result(
            precision=str(self.loaded.optimization.precision),
            latency=latency,
            energy=energy_of(
                lambda: self._generate(first),
                self.device,
                examples=self.cell.batch_size,
                seconds=self.cell.energy_seconds,
                idle=self.idle,
            ),
            flops=self._flops(first),
            tokens=self._tokens(samples, [batch for batch, *_ in batches]),
            quality=quality_of(samples, [example.references for example in self.examples]),
            examples_per_second=self.cell.batch_size / latency.total.median,
            peak_memory=peak,
            seconds=time.perf_counter() - start,
            answers=[sample.prediction for sample in samples],
            row_numbers=[example.index + 1 for example in self.examples],
        )

    def _chunks(self) -> list[list[Example]]:
        """Batches, all full: the last one is filled up with examples from the start."""
        size = self.cell.batch_size
        count = -(-len(self.examples) // size)
        cycle = [self.examples[i % len(self.examples)] for i in range(count * size)]
        return [cycle[i : i + size] for i in range(0, len(cycle), size)]

    @staticmethod
    def _light(batch: Batch) -> Batch:
        """A batch without its pictures, for the book-keeping behind the measurement."""
        ids = {"input_ids": batch.inputs["input_ids"]}
        return Batch(ids, batch.visual, batch.text, batch.pixels)

    # -- running -----------------------------------------------------------------------------
    @torch.inference_mode()
    def _generate(
        self,
        batch: Batch,
        limit: int | None = None,
        at_first: Callable[[], object] | None = None,
    ) -> _Run:
        with prune(self.model, self.cell.method) as trace:
            clock = TokenClock(self.device, at_first)  # hooks are on: a caller puts them on once
            output = self.model.generate(
                **batch.inputs,
                **GREEDY,
                use_cache=self.cell.cached,
                max_new_tokens=limit or self.cell.max_new_tokens,
                pad_token_id=self.processor.pad_token_id,
                logits_processor=LogitsProcessorList([clock]),
            )
            clock.stop()
        prompt = batch.inputs["input_ids"]
        ids = output[:, prompt.shape[1] :] if starts_with(output, prompt) else output
        return _Run(ids, clock, trace)

    def _samples(self, batches: Sequence[tuple[Batch, _Run]]) -> list[Sample]:
        """What was said to each example and what it cost, as metrics see it."""
        found: list[Sample] = []
        for batch, run in batches:
            size, clock = self.cell.batch_size, run.clock
            kept, new = run.trace.visual_tokens, self._new(run)
            for row, text in enumerate(self.processor.decode(run.ids, {})):
                found.append(
                    Sample(
                        index=len(found),
                        prediction=text,
                        prompt_tokens=batch.visual[row] + batch.text[row],
                        new_tokens=new[row],
                        visual_tokens=batch.visual[row],
                        visual_kept={
                            "0": batch.visual[row],
                            **{str(layer): counts[row] for layer, counts in kept.items()},
                        },
                        lengths=list(run.trace.lengths),
                        prefill_seconds=clock.ttft / size,
                        decode_seconds=clock.decode / size,
                        fast=run.trace.backend == "graphs",
                        seconds=clock.latency / size,
                        batch=size,
                    )
                )
        return found[: len(self.examples)]

    # -- figures -----------------------------------------------------------------------------
    def _latency(self, runs: list[_Run], first: Batch, prepared: list[float]) -> Latency:
        firsts = [run.clock.ttft for run in runs]
        vision = self._vision_seconds(first)
        steps = [run.clock.tpot for run in runs if run.clock.tpot is not None]
        return Latency(
            total=Spread.of_some([run.clock.latency for run in runs]),
            first_token=Spread.of_some(firsts),
            vision=vision,
            prefill=max(statistics.median(firsts) - vision, 0.0),
            decode=Spread.of_some([run.clock.decode for run in runs]),
            per_token=statistics.median(steps) if steps else None,
            preparing=statistics.median(prepared),
        )

    def _vision_seconds(self, batch: Batch) -> float:
        """Median over runs in which the vision modules are timed."""
        found = []
        self._generate(batch, limit=1)  # another limit may be another shape to compile or record
        for _ in range(max(self.cell.repeat, 1)):
            with stopwatch(vision_modules(self.model), self.device) as spent:
                self._generate(batch, limit=1)
            found.append(spent())
        return statistics.median(found)

    def _flops(self, batch: Batch) -> Flops:
        seen: list[int] = []
        with count_flops(vision_modules(self.model)) as count:
            run = self._generate(batch, at_first=lambda: seen.extend((count.total, count.vision)))
        return self._flops_of(batch, run, count, seen)

    def _flops_of(self, batch: Batch, run: _Run, count: FlopCount, seen: list[int]) -> Flops:
        size = self.cell.batch_size
        lengths, kept = list(run.trace.lengths), run.trace.vision_kept
        if self.cell.method is not None and not self.cell.cached:
            # Without a cache the trace is that of the last step, not of the prompt.
            one = self._generate(batch, limit=1)
            lengths, kept = list(one.trace.lengths), one.trace.vision_kept
        patches = {layer: places.shape[1] for layer, places in kept.items()}
        analytic = prefill_flops(self.model.config, batch.inputs, lengths, patches)
        # A replayed CUDA graph shows the counter nothing.
        counted = count.total > 0 and self.loaded.optimization.form != "fast"
        total, vision = seen if seen else (0, 0)
        return Flops(
            vision=vision / size if counted else None,
            prefill=(total - vision) / size if counted else None,
            decode=(count.total - total) / size if counted else None,
            analytic_vision=analytic.vision / size if analytic else None,
            analytic_prefill=analytic.language / size if analytic else None,
            ratio=total / analytic.total if analytic and counted else None,
        )

    def _tokens(self, samples: Sequence[Sample], batches: Sequence[Batch]) -> Tokens:
        visual = statistics.fmean(sample.visual_tokens for sample in samples)
        # Of encoder-decoder models no layers are known.
        groups = layer_groups(samples) or [LayerGroup(0, 0, visual, visual)]
        return Tokens(
            visual=visual,
            visual_kept=mean_held(groups),
            visual_last=groups[-1].after,
            text=statistics.fmean(count for batch in batches for count in batch.text),
            width=statistics.fmean(batch.width for batch in batches),
            new=statistics.fmean(sample.new_tokens for sample in samples),
            pixels=batches[0].pixels,
        )

    def _new(self, run: _Run) -> list[int]:
        """New tokens of each example, its end token included."""
        return lengths_until(run.ids, stop_ids(self.model, self.processor))
