"""Measures the demo model: `python -m vlm_prune_ext.demo.report --samples 500 --seed 1 --out DIR`.

Four sets of fresh scenes; the model as it is, two controls that cannot see, and FastV beside random
dropping at the same budgets. Writes `report.json`, `report.md` and `report.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vlm_prune_ext as vp

from . import CHECKPOINT
from .drawing import COLORS, IMAGE_SIZE, SHAPES, make_scene, render
from .questions import KINDS, LETTERS, check_count, samples

BUDGETS = (288, 144, 100, 64, 32, 16, 8)
ALL_TOKENS = 576
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
TITLES = {"mcq": "Shapes_MCQ", "yn": "Shapes_YN", "vqa": "Shapes_VQA", "caption": "Shapes_Caption"}
_NEW_TOKENS = {"mcq": 3, "yn": 3, "vqa": 4, "caption": 40}
_PAIR = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")


# ----------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Share:
    """A share of right answers with its 95 % Wilson interval, all in percent."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def wilson(right: int, count: int, z: float = 1.96) -> Share:
    """Wilson's score interval of `right` out of `count`."""
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Share(100 * p, 100 * max(0.0, middle - half), 100 * min(1.0, middle + half), count)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _n_grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_4(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 in percent, one reference each."""
    hits, total = [0] * 4, [0] * 4
    made = wanted = 0
    for candidate, reference in zip(candidates, references, strict=True):
        a, b = words_of(candidate), words_of(reference)
        made, wanted = made + len(a), wanted + len(b)
        for n in range(1, 5):
            mine = _n_grams(a, n)
            hits[n - 1] += sum((mine & _n_grams(b, n)).values())
            total[n - 1] += sum(mine.values())
    if not all(hits):
        return 0.0
    precision = sum(math.log(h / t) for h, t in zip(hits, total, strict=True)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - wanted / made))


# ----------------------------------------------------------------------------- answering


def prompt_text(sample: dict[str, Any]) -> str:
    """The user's text, worded as LLaVA's own evaluation words it."""
    if sample["kind"] == "mcq":
        lines = [f"{a}. {b}" for a, b in zip(LETTERS, sample["options"], strict=True)]
        return "\n".join([sample["question"], *lines]) + LETTER_SUFFIX
    if sample["kind"] == "vqa":
        return sample["question"] + WORD_SUFFIX
    return sample["question"]


def is_right(sample: dict[str, Any], answer: str) -> bool:
    """Whether `answer` is right; for captions, whether it names every coloured shape there is."""
    if sample["kind"] == "caption":
        return set(_PAIR.findall(sample["answer"].lower())) <= set(_PAIR.findall(answer.lower()))
    return words_of(answer) == words_of(sample["answer"])


def noise_image(index: int) -> Image.Image:
    """Uniform noise, another for each index: all that a model that cannot see gets to see."""
    rng = np.random.default_rng([99, index])
    return Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))


def picture(sample: dict[str, Any]) -> Image.Image:
    """The picture that the sample is about."""
    return render(make_scene(sample["scene_seed"]))


def answers(
    model: Any,
    processor: Any,
    items: Sequence[dict[str, Any]],
    method: Callable[[int], Any] = lambda batch: None,
    image: Callable[[dict[str, Any]], Image.Image] = picture,
    batch_size: int = 25,
) -> list[str]:
    """Greedy answers to `items`, all of one kind.

    Args:
        model, processor: as `vlm_prune_ext.load` returns them.
        items: samples.
        method: number of the batch to the pruning method (or `None`); random dropping takes
            another seed for each batch, so that a figure is not that of one lucky draw.
        image: what the model is shown.
        batch_size: samples at a time.
    """
    result: list[str] = []
    for number, start in enumerate(range(0, len(items), batch_size)):
        chunk = items[start : start + batch_size]
        inputs = processor.batch([prompt_text(s) for s in chunk], [image(s) for s in chunk])
        with torch.inference_mode(), vp.prune(model, method(number)):
            output = model.generate(
                **inputs, max_new_tokens=_NEW_TOKENS[chunk[0]["kind"]], do_sample=False
            )
        result += processor.decode(output, inputs)
    return result


def score(items: Sequence[dict[str, Any]], given: Sequence[str]) -> dict[str, Any]:
    """Share of right answers, overall and per category, and BLEU-4 for captions."""
    right = [is_right(s, a) for s, a in zip(items, given, strict=True)]
    result: dict[str, Any] = vars(wilson(sum(right), len(right))).copy()
    if items[0]["kind"] == "caption":
        result["bleu_4"] = bleu_4(given, [s["answer"] for s in items])
        return result
    categories = sorted({s["category"] for s in items})
    result["categories"] = {
        name: 100
        * float(np.mean([r for r, s in zip(right, items, strict=True) if s["category"] == name]))
        for name in categories
    }
    return result


def majority(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score of the one answer that is right most often."""
    (_, count), *_ = Counter(s["answer"] for s in items).most_common(1)
    return vars(wilson(count, len(items))).copy()


# ----------------------------------------------------------------------------- the report


Setting = tuple[Callable[[int], Any], Callable[[dict[str, Any]], Image.Image]]


def settings(budgets: Sequence[int]) -> dict[str, Setting]:
    """Name to method and picture of everything that is measured."""

    def unpruned(batch: int) -> None:
        return None

    def noise(sample: dict[str, Any]) -> Image.Image:
        return noise_image(sample["index"])

    def fastv(budget: int) -> Callable[[int], Any]:
        return lambda batch: vp.FastV(agg_layer=3, attention_rank=budget)

    def random(budget: int) -> Callable[[int], Any]:
        return lambda batch: vp.RandomDrop(keep=budget, layer=0, seed=batch)

    table: dict[str, Setting] = {"baseline": (unpruned, picture), "noise": (unpruned, noise)}
    for budget in budgets:
        table[f"fastv {budget}"] = (fastv(budget), picture)
        table[f"random {budget}"] = (random(budget), picture)
    return table


def measure(
    model: Any,
    processor: Any,
    *,
    seed: int,
    count: int,
    kinds: Sequence[str] = KINDS,
    budgets: Sequence[int] = BUDGETS,
    sweep_count: int | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything in the report, as plain data.

    Args:
        model, processor: as `vlm_prune_ext.load` returns them.
        seed: of the evaluation scenes.
        count: samples per set for baseline and controls.
        kinds: which sets.
        budgets: visual tokens kept.
        sweep_count: samples per set for the budgets (default: `count`); the first of the same.
        progress: called with a line after each setting.
    """
    check_count("samples", count)
    result: dict[str, Any] = {}
    for kind in kinds:
        items = samples(kind, seed, count)
        mine: dict[str, Any] = {"majority": majority(items)}
        for name, (method, image) in settings(budgets).items():
            begun = time.monotonic()
            part = items if name in ("baseline", "noise") else items[: sweep_count or count]
            given = answers(model, processor, part, method, image)
            mine[name] = score(part, given)
            mine[name]["seconds"] = round(time.monotonic() - begun, 1)
            if name == "baseline" and sweep_count and sweep_count < count:
                # What the budgets' figures are to be compared with: the very same samples.
                mine["baseline part"] = score(items[:sweep_count], given[:sweep_count])
            bleu = f", BLEU-4 {mine[name]['bleu_4']:.1f}" if kind == "caption" else ""
            progress(
                f"{TITLES[kind]} {name}: {mine[name]['value']:.1f} %{bleu} "
                f"of {len(part)} in {mine[name]['seconds']} s"
            )
        result[kind] = mine
    return result


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    text = f"{entry['value']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"
    return text + (f"; BLEU-4 {entry['bleu_4']:.1f}" if "bleu_4" in entry else "")


def markdown(report: dict[str, Any]) -> str:
    """The report as two Markdown tables."""
    sets = report["sets"]
    kinds = list(sets)
    lines = [
        f"Evaluation seed {report['seed']}, {report['samples']} samples a set"
        f" ({report['sweep_samples']} for each budget); percent right with 95 % Wilson intervals."
        " Captions: percent of images with every coloured shape named, and BLEU-4.",
        "",
        "| visual tokens | " + " | ".join(TITLES[k] for k in kinds) + " |",
        "| --- |" + " --- |" * len(kinds),
    ]
    names = {
        "baseline": f"all {ALL_TOKENS}",
        "baseline part": f"all {ALL_TOKENS}, the samples of the budgets",
        "noise": "image replaced by noise",
        "majority": "most frequent answer",
    }
    for name, title in names.items():
        if not any(name in sets[k] for k in kinds):
            continue
        lines.append(f"| {title} | " + " | ".join(_cell(sets[k].get(name)) for k in kinds) + " |")
    for method, title in (("fastv", "FastV, agg_layer 3"), ("random", "random, before layer 0")):
        for budget in report["budgets"]:
            cells = " | ".join(_cell(sets[k].get(f"{method} {budget}")) for k in kinds)
            lines.append(f"| {budget}, {title} | {cells} |")
    return "\n".join(lines) + "\n"


def draw_figure(report: dict[str, Any], path: Path) -> None:
    """Score against visual tokens kept, one panel per set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = report["sets"]
    figure, axes = plt.subplots(1, len(sets), figsize=(3.4 * len(sets), 3.2), sharey=True)
    for axis, (kind, mine) in zip(np.atleast_1d(axes), sets.items(), strict=True):
        for method, label in (("fastv", "FastV (agg_layer 3)"), ("random", "random (layer 0)")):
            rows = [(b, mine[f"{method} {b}"]) for b in report["budgets"]]
            rows = [(ALL_TOKENS, mine.get("baseline part", mine["baseline"])), *rows]
            x = [b for b, _ in rows]
            axis.plot(x, [r["value"] for _, r in rows], marker="o", markersize=3, label=label)
            axis.fill_between(
                x, [r["low"] for _, r in rows], [r["high"] for _, r in rows], alpha=0.15
            )
        axis.axhline(mine["noise"]["value"], color="grey", linestyle=":", label="image is noise")
        axis.set_xscale("log", base=2)
        axis.set_xticks([ALL_TOKENS, *report["budgets"]])
        axis.set_xticklabels([ALL_TOKENS, *report["budgets"]], fontsize=6, rotation=60)
        axis.set_title(TITLES[kind], fontsize=10)
        axis.set_xlabel("visual tokens kept", fontsize=8)
        axis.grid(alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("right, %")
    first.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    draw_figure(report, folder / "report.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=500, help="per set")
    parser.add_argument("--sweep-samples", type=int, help="per set and budget (default: --samples)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--sets", default=",".join(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    model, processor = vp.load(given.model, dtype=getattr(torch, given.dtype), device=given.device)
    kinds = tuple(given.sets.split(","))
    sets = measure(
        model,
        processor,
        seed=given.seed,
        count=given.samples,
        kinds=kinds,
        sweep_count=given.sweep_samples,
        progress=lambda line: print(line, flush=True),
    )
    report = {
        "seed": given.seed,
        "samples": given.samples,
        "sweep_samples": given.sweep_samples or given.samples,
        "dtype": given.dtype,
        "budgets": list(BUDGETS),
        "sets": sets,
    }
    write_report(report, given.out)


if __name__ == "__main__":
    main()
