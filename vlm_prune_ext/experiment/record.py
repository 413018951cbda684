"""The one record: what a run of one model with one method on one data set leaves behind.

While it works, a :class:`Sample` per row and a :class:`Stretch` per process go into its log; at its
end :func:`summarise` makes a :class:`Record` of them. Whoever shows results reads records; what a
command's own files have under other names is a view of these.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import Log, object_of, write_json


# -- fingerprints ----------------------------------------------------------------------------------
def digest(*parts: Any) -> str:
    """A short text (16 hexadecimal digits) that differs where any part does.

    Args:
        parts: bytes, or anything that JSON has (other values by their ``str``).
    """
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else _canonical(part)
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:16]


def _canonical(part: Any) -> bytes:
    text = json.dumps(part, sort_keys=True, ensure_ascii=True, default=str)
    return text.encode()


_WHOLE = 64 << 20  # bytes of a file that is read in full
_BLOCKS, _BLOCK = 256, 64 << 10  # what is read of a larger one
_WEIGHTS = (".safetensors", ".bin", ".model", ".pt", ".pth", ".json")


def weights_fingerprint(folder: Path) -> str:
    """Tells versions of a checkpoint apart by what its files hold, wherever they lie.

    Files of weights, tokenizer and configuration count. Of one over 64 MiB its size and 256 blocks
    of 64 KiB, evenly spaced, are read: training changes nearly every weight, and 14 GB would take
    half a minute.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in _WEIGHTS and path.is_file():
            found.append([path.relative_to(folder).as_posix(), _file_digest(path)])
    return digest(found)


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(1 << 20):
                found.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()[:16]


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' settings, in words: ``seed=0, now 5``."""
    return [
        f"{name}={before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]


# -- lines of the log ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One answered (or failed) row.

    Attributes:
        index: of the row.
        prediction: the answer.
        failed: why there is none; ``None`` if all went well.
        warm_up: whether it was among the first of its process, whose times say nothing.
        prompt_tokens: of the prompt, visual tokens included, before anything is dropped.
        new_tokens: generated, the one that ends the answer included.
        visual_tokens: of the prompt, before anything is dropped.
        visual_kept: decoder layer -> visual tokens that enter it, where the number changes.
        lengths: tokens that enter each decoder layer in the prefill.
        prefill_seconds: until the first new token (TTFT), this sample's share of its batch.
        decode_seconds: from there to the end of its batch, its share.
        flops, flops_baseline: of the language model's prefill, with this method and without.
        flops_computed: the same where ``shared`` questions of the batch shared the beginning of
            their prompts, which counts as often as it was computed (``flops`` is of whole prompts).
        flops_visual, flops_visual_baseline: of its layers, over the visual tokens alone.
        vision_flops, vision_flops_baseline: of the vision tower and the projector.
        fast: on the fast path.
        seconds: all that the row took, its share of its batch (0: only the parts were timed).
        batch: samples that were answered together.
        row: part of the row -> digest, for each part that the answer depends on.
        kept: decoder layer -> places of the visual tokens that enter it, among those that entered
            layer 0, as :func:`ranges` writes them; where a rule chose, of the first rows only.
        patches: tower layer (-1: behind the tower) -> the same of its patches, the first tile's.
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
    flops_computed: float = 0.0
    shared: int = 1
    flops_visual: float = 0.0
    flops_visual_baseline: float = 0.0
    vision_flops: float = 0.0
    vision_flops_baseline: float = 0.0
    fast: bool = False
    seconds: float = 0.0
    batch: int = 1
    row: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    patches: dict[str, str] = field(default_factory=dict)


def ranges(places: Iterable[int]) -> str:
    """Whole numbers, ascending, in short: ``0-3,7``."""
    found: list[list[int]] = []
    for place in places:
        if found and found[-1][1] == place - 1:
            found[-1][1] = place
        else:
            found.append([place, place])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def places(text: str) -> list[int]:
    """What :func:`ranges` was given."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return [n for low, _, high in ends for n in range(int(low), int(high or low) + 1)]


@dataclass(frozen=True)
class Stretch:
    """One process from its start to its end.

    Attributes:
        rank: of the process.
        seconds: that it answered for.
        peak_memory_bytes: allocated by tensors on a GPU, resident on a CPU; ``None``: not known.
        energy_joules: that its GPU used meanwhile; ``None`` where nothing counts.
        hardware: processor, cores, threads, memory, GPU.
    """

    rank: int
    seconds: float
    peak_memory_bytes: int | None
    energy_joules: float | None
    hardware: dict[str, Any]


class SampleLog(Log):
    """A log of samples and stretches, one or the other a line."""

    def add(self, *entries: Sample | Stretch) -> None:
        """Append some, with a single write."""
        self.append(*map(_entry, entries))

    def samples(self) -> tuple[list[Sample], list[Stretch]]:
        """All that can be read. A line that is no sample and no stretch, but says so, is left out
        and named as a broken one is."""
        samples, stretches = [], []
        for number, entry in self.numbered():
            sample = object_of(Sample, entry.get("sample"))
            stretch = object_of(Stretch, entry.get("stretch"))
            if sample is not None:
                samples.append(sample)
            elif stretch is not None:
                stretches.append(stretch)
            elif {"sample", "stretch"} & set(entry):
                self.broken.append(number)
        self.broken.sort()
        return samples, stretches

    def rewrite(self, entries: Iterable[Sample | Stretch]) -> None:
        """Write the whole log anew."""
        self.replace(map(_entry, entries))


def _entry(entry: Sample | Stretch) -> dict[str, Any]:
    return {type(entry).__name__.lower(): vars(entry)}  # plain values, which are not copied


# -- figures ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spread:
    """Mean, median, 90th and 10th percentile and number of some measurements.

    ``p10`` is ``None`` in records that were written before it was kept.
    """

    mean: float
    median: float
    p90: float
    count: int
    p10: float | None = field(default=None, compare=False)

    @staticmethod
    def of_some(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        found = Spread.of(values)
        assert found is not None
        return found

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """Of any number of values; ``None`` of none."""
        ordered = sorted(values)
        if not ordered:
            return None
        # Nearest rank: values that occurred.
        high, low = (max(0, -(-tenths * len(ordered) // 10) - 1) for tenths in (9, 1))
        return Spread(
            mean=statistics.fmean(ordered),
            median=statistics.median(ordered),
            p90=ordered[high],
            count=len(ordered),
            p10=ordered[low],
        )


@dataclass(frozen=True)
class Score:
    """The score that a data set is known by.

    Attributes:
        name: as the framework that scored calls it.
        value: in its usual unit (percent for accuracies, points for MME).
        standard_error: where it is a mean over samples of right or wrong, in the same unit: that of
            Agresti and Coull, ``sqrt(p (1 - p) / (n + 4))`` with ``p = (right + 2) / (n + 4)``.
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
    heads counted; text tokens are in both figures of a ratio, a rule's own arithmetic in none).

    Attributes:
        prefill, prefill_baseline: of the language model with this method and without.
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
        prefill: to the first new token (TTFT).
        decode: from there to the end.
        decode_per_token: the same per token (TPOT).
        warm_up_samples: left out.
        fast_path: share of the samples that was answered on the fast path.
    """

    prefill: Spread | None
    decode: Spread | None
    decode_per_token: float | None
    warm_up_samples: int
    fast_path: float


# -- the record ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """The result of one model with one method on one data set.

    Attributes:
        name: of model and method, as in file names.
        dataset: its name.
        model_path: where the model came from.
        method: name and resolved parameters.
        score: the one that the data set is known by; ``None`` if there is none.
        scores: all, as the framework gives them.
        samples: rows that were answered or failed while being answered; scored together.
        failed: rows that have no answer, with the reason.
        without_image: rows that were left out for having no image.
        visual_tokens: per group of layers.
        flops, seconds: of a sample.
        peak_memory_bytes: largest of all processes.
        energy_joules: of all processes together; ``None`` where nothing counts.
        wall_seconds: time that processes answered for, together.
        config: resolved settings.
        versions, commit, hardware: what it ran on.
        note: anything that a reader must know; ``None`` if there is nothing.
        metrics: name of a registered metric -> value; ``None`` where it could not be had.
        missing: name of such a metric -> why.
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
    metrics: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @property
    def label(self) -> str:
        """The method's part of the name, in tables."""
        return str(self.config.get("label") or self.name.rpartition("-")[2])

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens kept, mean over decoder layers."""
        return mean_held(self.visual_tokens)

    @property
    def last_visual_tokens(self) -> float | None:
        """Visual tokens that enter the last decoder layer, mean over samples."""
        return self.visual_tokens[-1].after if self.visual_tokens else None

    @property
    def token_steps(self) -> str:
        """Visual tokens of a sample on their way through the layers: ``576 → 100``."""
        return token_steps(self.visual_tokens)


def mean_held(groups: Sequence[LayerGroup]) -> float:
    """Visual tokens that groups of layers hold, mean over layers; 0 of none."""
    layers = sum(group.last - group.first + 1 for group in groups)
    return sum(g.after * (g.last - g.first + 1) for g in groups) / layers if layers else 0.0


def token_steps(groups: Sequence[LayerGroup]) -> str:
    """Visual tokens on their way through groups of layers: ``576 → 100``."""
    steps = [f"{groups[0].before:.0f}"] if groups else []
    steps += [f"{group.after:.0f}" for group in groups]
    different = [step for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]]
    if len(different) > 4:
        different = [different[0], "…", different[-1]]
    return " → ".join(different) or "-"


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


# -- from lines to the record ----------------------------------------------------------------------
def summarise(samples: Sequence[Sample], stretches: Sequence[Stretch]) -> dict[str, Any]:
    """Fields of :class:`Record` that follow from the lines of a log alone."""
    energies = [s.energy_joules for s in stretches if s.energy_joules is not None]
    peaks = [s.peak_memory_bytes for s in stretches if s.peak_memory_bytes is not None]
    hardware = {json.dumps(s.hardware, sort_keys=True): s.hardware for s in stretches}
    return {
        "samples": len(samples),
        "failed": [{"index": str(s.index), "reason": s.failed} for s in samples if s.failed],
        "visual_tokens": layer_groups(samples),
        "flops": mean_flops(samples),
        "seconds": timing(samples),
        "peak_memory_bytes": max(peaks, default=None),
        "energy_joules": sum(energies) if energies else None,
        "wall_seconds": sum(s.seconds for s in stretches),
        "hardware": list(hardware.values()),
    }


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
        after = sum(held(sample, first) for sample in samples) / len(samples)
        groups.append(LayerGroup(first, end - 1, before, after))
    return groups


def held(sample: Sample, layer: int) -> int:
    """Visual tokens of a sample that enter a layer."""
    kept = {int(key): count for key, count in sample.visual_kept.items()}
    return kept[max(first for first in kept if first <= layer)]


def mean_flops(samples: Sequence[Sample]) -> Flops | None:
    """Means, and ratios of means."""
    samples = [sample for sample in samples if sample.lengths]
    if not samples:
        return None

    def mean(name: str) -> float:
        return sum(getattr(sample, name) for sample in samples) / len(samples)

    own, whole = mean("flops"), mean("flops_baseline")
    if not whole:
        return None
    vision, vision_whole = mean("vision_flops"), mean("vision_flops_baseline")
    visual, visual_whole = mean("flops_visual"), mean("flops_visual_baseline")
    known = vision_whole > 0
    return Flops(
        prefill=own,
        prefill_baseline=whole,
        ratio=own / whole,
        vision=vision if known else None,
        vision_baseline=vision_whole if known else None,
        ratio_with_vision=(own + vision) / (whole + vision_whole) if known else None,
        ratio_visual=visual / visual_whole if visual_whole else None,
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
