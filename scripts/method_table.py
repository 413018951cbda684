"""Table of all methods at about 50 %, 25 % and 11 % of the visual tokens, as Markdown.

    python scripts/method_table.py --samples 100 --out docs/method_table.md

Each row is one method at one budget, on the same samples of the four Shapes sets (drawn from
``--seed``, so anyone can make fresh ones): score, prefill FLOPs over the unpruned ones, and visual
tokens that enter the decoder layers, averaged within groups of layers.

How budgets are matched. A budget is ``share * visual tokens``, for the layers behind the first
drop. One-drop methods take it as it is. HiMAP's two ranks keep its default proportion of 4 : 1, at
the scale that makes their mean over the layers behind stage 1 the budget. SAINT's threshold is
found by bisection on a few extra pictures, so that the layers behind its last drop get about the
budget; hybrid leaves half of the drop to the tower. Downsample takes the largest square grid that
is not above the budget.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlm_prune_ext as vp
from vlm_prune_ext.commands.scienceqa import read_letter
from vlm_prune_ext.commands.terminal import track
from vlm_prune_ext.demo.questions import samples
from vlm_prune_ext.demo.scenes import make_scene, render
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer, Answerer, Query
from vlm_prune_ext.experiment.flops import DecoderShape, VisionShape, decoder_flops, vision_flops
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.models import parts_of

KINDS = ("mcq", "yn", "vqa", "caption")
SHARES = (1 / 2, 1 / 4, 1 / 9)
NEW_TOKENS = {"mcq": 4, "yn": 4, "vqa": 8, "caption": 64}
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
GROUPS = 4  # groups of decoder layers in the table
CALIBRATION = 6  # pictures for SAINT's threshold


@dataclass(frozen=True)
class Case:
    """One sample: the query and the right answer."""

    query: Query
    kind: str
    answer: str


@dataclass(frozen=True)
class Sizes:
    """What budgets and layers are scaled to."""

    layers: int
    tower_layers: int
    feature_layer: int
    visual: int
    decoder: DecoderShape
    vision: VisionShape


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    share: str
    method: Method | None
    scores: dict[str, float]
    flops: float
    tokens: list[float]


# -- data --------------------------------------------------------------------------------------
def cases(kind: str, seed: int, count: int) -> list[Case]:
    """Samples of one Shapes set, worded as LLaVA's own evaluation words such questions."""
    made = []
    for sample in samples(kind, seed, count):
        text = sample["question"]
        if kind == "mcq":
            lines = [f"{letter}. {o}" for letter, o in zip("ABCD", sample["options"], strict=True)]
            text = "\n".join([text, *lines]) + LETTER_SUFFIX
        elif kind == "vqa":
            text += WORD_SUFFIX
        picture = render(make_scene(sample["scene_seed"]))
        query = Query(text, [picture], max_new_tokens=NEW_TOKENS[kind])
        made.append(Case(query, kind, sample["answer"]))
    return made


def score(kind: str, cases: Sequence[Case], texts: Sequence[str]) -> float:
    """Score of one set in percent: share of right answers; for captions BLEU-4 of the corpus."""
    if kind == "caption":
        from sacrebleu import corpus_bleu

        return float(corpus_bleu(list(texts), [[case.answer for case in cases]]).score)
    read = read_letter if kind == "mcq" else plain
    right = [read(t) == read(case.answer) for t, case in zip(texts, cases, strict=True)]
    return 100.0 * sum(right) / len(right)


def plain(text: str) -> str:
    """Lower case, without the full stop at the end."""
    return text.strip().rstrip(".").strip().lower()


# -- methods at a budget -----------------------------------------------------------------------
def methods_at(keep: int, sizes: Sizes, left: Callable[[Method], float]) -> Iterator[Method]:
    """Every method at a budget of ``keep`` visual tokens.

    Args:
        keep: the budget.
        sizes: of the model.
        left: visual tokens that a method leaves in the last layer, measured.
    """
    layer = 3
    yield vp.FastV(agg_layer=layer, attention_rank=keep)
    yield himap_at(keep, sizes)
    start, end = round(7 / 32 * sizes.layers), round(16 / 32 * sizes.layers)
    yield threshold_at(keep, vp.SAINT(start=start, end=end), left)
    tower = round(19 / 22 * sizes.feature_layer)
    vit = vp.SAINTViT(layers=(tower,), keep_num=keep + 1)
    yield vp.SAINT(start=None, vit=vit)
    half = replace(vit, keep_num=(keep + sizes.visual) // 2 + 1)
    yield threshold_at(keep, vp.SAINT(start=start, end=end, vit=half), left)
    # Custom "attention" is FastV and custom "random" is RandomDrop at this layer.
    for name in ("sampling", "similarity", "norm", "uniform"):
        # Attention of one token sums to one over hundreds of tokens: at temperature 1 sampling
        # would be uniform.
        more = {"temperature": 0.01} if name == "sampling" else {}
        yield vp.CustomSelection(method=name, kept_tokens=keep, agg_layer=layer, **more)
    yield vp.RandomDrop(keep=keep, layer=0)
    yield vp.RandomDrop(keep=keep, layer=layer)
    yield vp.Downsample(keep=keep)


def himap_at(keep: int, sizes: Sizes) -> Method:
    """HiMAP whose mean over the layers behind its first stage is ``keep``."""
    first, second = 2, sizes.layers // 2
    shallow, deep = second - first, sizes.layers - second
    text = min(keep * (shallow + deep) / (shallow + deep / 4), float(sizes.visual))
    # What the cap takes from stage 1, stage 2 gets back.
    image = (keep * (shallow + deep) - text * shallow) / deep
    return vp.HiMAP(
        attn_txt_layer=first,
        attn_txt_rank=round(text),
        attn_img_layer=second,
        attn_img_rank=max(1, round(image)),
    )


def threshold_at(keep: int, method: vp.SAINT, left: Callable[[Method], float]) -> Method:
    """``method`` with the threshold that leaves about ``keep`` tokens, to two decimals."""
    low, high = -1.0, 1.0
    while high - low > 0.005:
        middle = (low + high) / 2
        if left(replace(method, threshold=middle)) < keep:
            low = middle
        else:
            high = middle
    return replace(method, threshold=round(high, 3))


# -- running -----------------------------------------------------------------------------------
def run(
    model: Any,
    processor: Any,
    method: Method | None,
    sets: dict[str, list[Case]],
    sizes: Sizes,
    batch_size: int,
    share: str,
) -> Row:
    """Answer all sets with one method."""
    answerer = Answerer(model, processor, method)
    scores, answers = {}, []
    for kind, members in sets.items():
        given: list[Answer] = []
        for place in range(0, len(members), batch_size):
            batch = members[place : place + batch_size]
            given += answerer.answer([case.query for case in batch])
        scores[kind] = score(kind, members, [answer.text for answer in given])
        answers += given
    profiles = [layer_tokens(answer, sizes.layers) for answer in answers]
    mean = [sum(column) / len(profiles) for column in zip(*profiles, strict=True)]
    text = sum(a.prompt_tokens - a.visual_tokens for a in answers) / len(answers)
    return Row(share, method, scores, flops(method, mean, text, sizes), grouped(mean))


def layer_tokens(answer: Answer, layers: int) -> list[int]:
    """Visual tokens that enter each decoder layer."""
    tokens = [answer.visual_tokens] * layers
    for layer, count in sorted(answer.visual_kept.items()):
        tokens[layer:] = [count] * (layers - layer)
    return tokens


def grouped(tokens: Sequence[float]) -> list[float]:
    """Means over :data:`GROUPS` groups of layers."""
    size = math.ceil(len(tokens) / GROUPS)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [sum(part) / len(part) for part in parts]


def flops(method: Method | None, tokens: Sequence[float], text: float, sizes: Sizes) -> float:
    """Prefill FLOPs, vision tower included, over those of the baseline."""
    stages = (
        method.vision_stages(sizes.tower_layers, sizes.feature_layer) if method is not None else ()
    )
    drops = {stage.layer: round(tokens[0]) for stage in stages}
    own = decoder_flops(sizes.decoder, [round(text + n) for n in tokens])
    whole = decoder_flops(sizes.decoder, [round(text) + sizes.visual] * sizes.layers)
    return (own + vision_flops(sizes.vision, drops)) / (whole + vision_flops(sizes.vision))


# -- the table ---------------------------------------------------------------------------------
def markdown(rows: Sequence[Row], layers: int, count: int, command: str) -> str:
    """The table with what it was measured on."""
    import transformers

    size = math.ceil(layers / GROUPS)
    spans = [f"{i}-{min(i + size, layers) - 1}" for i in range(0, layers, size)]
    head = ["tokens", "method", "MCQ", "YN", "VQA", "Caption", "FLOPs"]
    head += [f"layers {span}" for span in spans]
    lines = [" | ".join(head), " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in rows:
        label = "baseline" if row.method is None else row.method.label()
        cells = [row.share, f"`{label}`", *(f"{row.scores[kind]:.1f}" for kind in KINDS)]
        cells += [f"{row.flops:.3f}", *(f"{n:.0f}" for n in row.tokens)]
        lines.append(" | ".join(cells))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    interval = 196 * math.sqrt(0.25 / count)
    notes = (
        f"{count} samples per set (95 % interval at most ± {interval:.1f} points); MCQ, YN and VQA "
        "in % right, Caption is BLEU-4 (sacrebleu); FLOPs: prefill with vision tower, over the "
        "baseline's; layers a-b: visual tokens that enter them, mean.",
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Command: `{command}`",
    )
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{table}\n\n" + "\n\n".join(notes) + "\n"


def cpu_name() -> str:
    """The processor's name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} cores)"
    return platform.processor() or platform.machine()


def main() -> int:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the demo checkpoint")
    parser.add_argument("--samples", type=int, default=100, help="per set")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--only", help="names of methods, with commas between")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: float32 on a CPU")
    parser.add_argument("--out", type=Path, help="default: standard output")
    args = parser.parse_args()
    if args.samples < 1:
        raise InputError(f"--samples {args.samples} is not valid: at least 1.")
    from vlm_prune_ext.demo import CHECKPOINT

    model, processor = vp.load(args.model or str(CHECKPOINT), dtype=args.dtype)
    model.eval()
    sets = {kind: cases(kind, args.seed, args.samples) for kind in KINDS}
    sizes = sizes_of(model, processor)
    command = " ".join(["python", *sys.argv])
    rows: list[Row] = []
    text = ""
    for row in table_rows(model, processor, sets, sizes, args):
        rows.append(row)
        text = markdown(rows, sizes.layers, args.samples, command)
        if args.out:  # after each row: what is done is kept
            args.out.write_text(text, encoding="utf-8")
    if not args.out:
        print(text)
    return 0


def sizes_of(model: Any, processor: Any) -> Sizes:
    """Read off the model and one prompt."""
    parts = parts_of(model)
    assert parts.vision is not None and parts.decoder is not None
    inputs = processor.prompt("?", Image.new("RGB", (336, 336)))
    feature = parts.vision.feature_layer
    return Sizes(
        layers=len(parts.layers),
        tower_layers=len(parts.vision.layers),
        feature_layer=len(parts.vision.layers) - 1 if feature is None else feature,
        visual=processor.count_visual_tokens(inputs)[0],
        decoder=DecoderShape.from_config(model.config),
        vision=VisionShape.from_config(model.config),
    )


def table_rows(
    model: Any, processor: Any, sets: dict[str, list[Case]], sizes: Sizes, args: argparse.Namespace
) -> Iterator[Row]:
    """Baseline, then every method at every budget."""
    probes = [processor.prompt(c.query.text, c.query.images) for c in sets["vqa"][:CALIBRATION]]

    def left(method: Method) -> float:
        counts = []
        for inputs in probes:
            with torch.inference_mode(), vp.prune(model, method) as trace:
                model(**inputs)
            counts.append(trace.visual_tokens[max(trace.visual_tokens)][0])
        return sum(counts) / len(counts)

    wanted = args.only.split(",") if args.only else None
    plan: list[tuple[str, Method | None]] = [("100 %", None)]
    for share in SHARES:
        for method in methods_at(round(share * sizes.visual), sizes, left):
            if wanted is None or method.name in wanted:
                plan.append((f"{100 * share:.0f} %", method))
    for share_text, method in track(plan, "methods"):
        yield run(model, processor, method, sets, sizes, args.batch_size, share_text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"{error}")
