"""What a run leaves behind: one line per sample while it runs, one typed record at its end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer
from vlm_prune_ext.experiment import flops
from vlm_prune_ext.experiment.record import Spread
from vlm_prune_ext.jsonl import whole_lines


# -- one line per sample -------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One answered (or failed) row.

    Attributes:
        index: of the row.
        prediction: the answer.
        failed: why there is none; ``None`` if all went well.
        warm_up: whether it was among the first of its process, whose times say nothing.
        prompt_tokens, new_tokens, visual_tokens, visual_kept, lengths: see :class:`Answer`.
        prefill_seconds, decode_seconds: the same.
        flops, flops_baseline: of the language model's prefill, with this method and without.
        flops_visual, flops_visual_baseline: of its layers, over the visual tokens alone.
        vision_flops, vision_flops_baseline: of the vision tower and the projector.
        fast: on the fast path.
    """

    index: int | str
    prediction: str
    failed: str | None = None
    warm_up: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    visual_tokens: int = 0
    visual_kept: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    flops: float = 0.0
    flops_baseline: float = 0.0
    flops_visual: float = 0.0
    flops_visual_baseline: float = 0.0
    vision_flops: float = 0.0
    vision_flops_baseline: float = 0.0
    fast: bool = False


@dataclass(frozen=True)
class Sizes(flops.Sizes):
    """Sizes of a model, and an answer of it as a line of the log."""

    @staticmethod
    def of(config: Any) -> Sizes:
        """Read off a model's config."""
        found = flops.Sizes.of(config)
        return Sizes(found.decoder, found.vision)

    def sample(self, index: int | str, answer: Answer, *, warm_up: bool) -> Sample:
        """An answer as a line of the log."""
        cost = self.prompt(
            answer.prompt_tokens,
            answer.visual_tokens,
            answer.lengths,
            answer.tower_images,
            answer.patches_kept,
        )
        return Sample(
            index=index,
            prediction=answer.text,
            warm_up=warm_up,
            prompt_tokens=answer.prompt_tokens,
            new_tokens=answer.new_tokens,
            visual_tokens=answer.visual_tokens,
            visual_kept={str(layer): count for layer, count in answer.visual_kept.items()},
            lengths=answer.lengths,
            prefill_seconds=answer.prefill_seconds,
            decode_seconds=answer.decode_seconds,
            flops=cost.prefill,
            flops_baseline=cost.prefill_baseline,
            flops_visual=cost.visual,
            flops_visual_baseline=cost.visual_baseline,
            vision_flops=cost.vision,
            vision_flops_baseline=cost.vision_baseline,
            fast=answer.fast,
        )


@dataclass(frozen=True)
class Stretch:
    """One process from its start to its end.

    Attributes:
        rank: of the process.
        seconds: that it answered for.
        peak_memory_bytes: see :func:`vlm_prune_ext.experiment.measure.peak_memory`.
        energy_joules: that its GPU used meanwhile; ``None`` where nothing counts.
        hardware: see :func:`vlm_prune_ext.experiment.host.hardware`.
    """

    rank: int
    seconds: float
    peak_memory_bytes: int
    energy_joules: float | None
    hardware: dict[str, Any]


class SampleLog:
    """A JSONL file of :class:`Sample` and :class:`Stretch` lines, written line by line.

    A line that a killed process left unfinished is not read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: Sample | Stretch) -> None:
        """Write one line, at once."""
        kind = "sample" if isinstance(entry, Sample) else "stretch"
        line = json.dumps({kind: asdict(entry)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> tuple[list[Sample], list[Stretch]]:
        """All whole lines.

        Raises:
            InputError: a line that is none of these.
        """
        samples: list[Sample] = []
        stretches: list[Stretch] = []
        for number, line in enumerate(whole_lines(self.path), 1):
            try:
                entry = json.loads(line)
                if "sample" in entry:
                    samples.append(Sample(**entry["sample"]))
                else:
                    stretches.append(Stretch(**entry["stretch"]))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"Line {number} of {str(self.path)!r} is not of this command: run without "
                    "--reuse to start anew."
                ) from error
        return samples, stretches

    def replace(self, entries: Iterable[Sample | Stretch]) -> None:
        """Write the whole file anew; it is the old or the new one, never half of it."""
        part = SampleLog(self.path.with_suffix(".part"))
        part.path.write_bytes(b"")
        for entry in entries:
            part.append(entry)
        part.path.replace(self.path)


# -- the record ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """The score that a data set is known by.

    Attributes:
        name: as VLMEvalKit calls it.
        value: in its usual unit (percent for accuracies, points for MME).
        standard_error: where it is a mean over n samples of right or wrong, in the same unit: that
            of a share p after Agresti and Coull (1998), ``sqrt(p (1 - p) / (n + 4))`` with
            ``p = (right + 2) / (n + 4)``, which is not 0 where all are right.
    """

    name: str
    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class LayerGroup:
    """Neighbouring decoder layers that hold equally many visual tokens, in every sample.

    Attributes:
        first, last: layers, both included.
        before, after: visual tokens, mean over samples, without pruning and with it.
    """

    first: int
    last: int
    before: float
    after: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of a prefill, mean over samples (2 per multiply-add, three SwiGLU matrices, grouped
    heads counted; a rule's own arithmetic is not in them).

    Attributes:
        prefill, prefill_baseline: of the language model with this method and without, text tokens
            and output head included.
        ratio: one over the other.
        vision, vision_baseline: of the vision tower and the projector; ``None`` where the tower is
            not CLIP's.
        ratio_with_vision: of both together; the same.
        ratio_visual: of the layers over visual tokens alone, as the pruning papers state it
            (``None``: no images, or a record from before it was kept).
    """

    prefill: float
    prefill_baseline: float
    ratio: float
    vision: float | None
    vision_baseline: float | None
    ratio_with_vision: float | None
    ratio_visual: float | None = None


@dataclass(frozen=True)
class Seconds:
    """Measured time per sample, synchronised; the first of each process are left out.

    Attributes:
        prefill: to the first new token.
        decode: from there to the end.
        decode_per_token: the same per token.
        warm_up_samples: left out.
        fast_path: share of the samples that was answered on the fast path.
    """

    prefill: Spread | None
    decode: Spread | None
    decode_per_token: float | None
    warm_up_samples: int
    fast_path: float


@dataclass(frozen=True)
class Record:
    """The result of one model with one method on one data set.

    Attributes:
        name: of model and method, as in file names.
        dataset: its name.
        model_path: where the model came from.
        method: name and resolved parameters.
        score: the one that the data set is known by; ``None`` if there is none.
        scores: all, as VLMEvalKit gives them.
        samples: rows that were answered or failed while being answered; scored together.
        failed: rows that have no answer, with the reason.
        without_image: rows that VLMEvalKit left out for having no image.
        visual_tokens: per group of layers.
        flops, seconds: of a sample.
        peak_memory_bytes: largest of all processes.
        energy_joules: of all processes together; ``None`` where nothing counts.
        wall_seconds: time that processes answered for, together.
        config: resolved settings.
        versions, commit, hardware: what it ran on.
        note: anything that a reader must know; ``None`` if there is nothing.
    """

    name: str
    dataset: str
    model_path: str
    method: dict[str, Any]
    score: Score | None
    scores: dict[str, float]
    samples: int
    failed: list[dict[str, str]]
    without_image: int
    visual_tokens: list[LayerGroup]
    flops: Flops | None
    seconds: Seconds
    peak_memory_bytes: int | None
    energy_joules: float | None
    wall_seconds: float
    config: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    hardware: list[dict[str, Any]]
    note: str | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")
        part.replace(path)

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens kept, mean over decoder layers."""
        layers = sum(group.last - group.first + 1 for group in self.visual_tokens)
        if not layers:
            return 0.0
        held = sum(g.after * (g.last - g.first + 1) for g in self.visual_tokens)
        return held / layers


def read_record(path: Path) -> Record:
    """Read what :meth:`Record.write` wrote.

    Raises:
        InputError: no such file, or something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        nested = {
            "score": data["score"] and Score(**data["score"]),
            "flops": data["flops"] and Flops(**data["flops"]),
            "visual_tokens": [LayerGroup(**group) for group in data["visual_tokens"]],
            "seconds": _read_seconds(data["seconds"]),
        }
        return Record(**{**data, **nested})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{str(path)!r} is not a result of this command.") from error


def _read_seconds(data: dict[str, Any]) -> Seconds:
    spreads = {k: data[k] and Spread(**data[k]) for k in ("prefill", "decode")}
    return Seconds(**{**data, **spreads})


# -- from lines to the record --------------------------------------------------------------------
def layer_groups(samples: Sequence[Sample]) -> list[LayerGroup]:
    """Groups of layers, split wherever any sample's count may change."""
    samples = [sample for sample in samples if sample.lengths]
    if not samples:
        return []
    layers = len(samples[0].lengths)
    starts = {int(layer) for sample in samples for layer in sample.visual_kept} | {0}
    edges = [*sorted(start for start in starts if start < layers), layers]
    before = sum(sample.visual_tokens for sample in samples) / len(samples)
    groups = []
    for first, end in pairwise(edges):
        after = sum(_held(sample, first) for sample in samples) / len(samples)
        groups.append(LayerGroup(first, end - 1, before, after))
    return groups


def _held(sample: Sample, layer: int) -> int:
    """Visual tokens that enter a layer."""
    kept = {int(key): count for key, count in sample.visual_kept.items()}
    return kept[max(first for first in kept if first <= layer)]


def mean_flops(samples: Sequence[Sample]) -> Flops | None:
    """Means, and ratios of means."""
    samples = [sample for sample in samples if sample.lengths]
    if not samples:
        return None

    total = flops.PromptFlops()
    for sample in samples:
        total += flops.PromptFlops(
            sample.flops,
            sample.flops_baseline,
            sample.flops_visual,
            sample.flops_visual_baseline,
            sample.vision_flops,
            sample.vision_flops_baseline,
        )
    if total.ratio is None:
        return None
    count, known = len(samples), total.vision_baseline > 0
    return Flops(
        prefill=total.prefill / count,
        prefill_baseline=total.prefill_baseline / count,
        ratio=total.ratio,
        vision=total.vision / count if known else None,
        vision_baseline=total.vision_baseline / count if known else None,
        ratio_with_vision=total.ratio_with_vision,
        ratio_visual=total.ratio_visual,
    )


def timing(samples: Sequence[Sample]) -> Seconds:
    """Time per sample, without warm-up."""
    answered = [sample for sample in samples if sample.lengths]
    warm = [sample for sample in answered if not sample.warm_up]
    steps = sum(sample.new_tokens - 1 for sample in warm)
    return Seconds(
        prefill=Spread.of(sample.prefill_seconds for sample in warm),
        decode=Spread.of(sample.decode_seconds for sample in warm),
        decode_per_token=sum(s.decode_seconds for s in warm) / steps if steps > 0 else None,
        warm_up_samples=len(answered) - len(warm),
        fast_path=sum(s.fast for s in answered) / len(answered) if answered else 0.0,
    )
