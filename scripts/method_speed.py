"""What choosing costs: every registered method beside the unpruned model, time to first token.

TTFT is a whole ``generate`` for one token, tower and projector included, on the fast path where it
takes the method. *Choosing* is what a method adds to a run that drops the same tokens without
looking: the same again with the rule's answers remembered and nothing computed for it, the two
timed in turns. So it holds the recomputed attention rows, the rule, and whatever waiting they
cause, and neither the drop itself nor what it saves.

    scripts/method_speed.py --shape llava-1.5-7b --batch-sizes 1 16 --out method_speed.md

Random weights; ``--methods`` takes short forms, by default every method with its own defaults.
CDPruner gets a text tower of CLIP ViT-L/14's size, and a question of 16 tokens.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from vlm_prune_ext.bench.cases import Workload, of_shape
from vlm_prune_ext.bench.shapes import random_model
from vlm_prune_ext.engine.decoder import DecoderPruner
from vlm_prune_ext.engine.prune import session_on
from vlm_prune_ext.engine.tower import VisionPruner
from vlm_prune_ext.experiment.flops import Sizes
from vlm_prune_ext.experiment.measure import seconds_of, warm
from vlm_prune_ext.experiment.report import markdown_cell
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.fast.possible import why_not
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.cdpruner import CDPruner
from vlm_prune_ext.methods.registry import METHODS, get_method, parse_method
from vlm_prune_ext.models.clip_text import TextTower
from vlm_prune_ext.pruning import prune


@dataclass
class Row:
    """One method at one batch size; seconds."""

    method: str
    batch: int
    backend: str
    behind: float
    mean: float
    flops_ratio: float
    ttft: float
    unpruned: float
    choosing: float | None


# -- remembered answers --------------------------------------------------------------------------
class Remembered:
    """A rule that answers what another answered in the run before, in the same order.

    Each way of asking it first waits for the device once: so the fast path sees that it is not to
    be recorded.
    """

    def __init__(self, rule: Callable[..., Any]) -> None:
        self.rule = rule
        self.answers: list[Any] = []
        self.next = 0
        self._waited: set[str] = set()

    def listen(self, *evidence: Any) -> Any:
        """Ask the rule and remember."""
        self._wait("listen")
        self.answers.append(_copied(self.rule(*evidence)))
        return self.answers[-1]

    def __call__(self, *evidence: Any) -> Any:
        """The next answer; after the last one the first again."""
        self._wait("answer")
        answer = self.answers[self.next % len(self.answers)]
        self.next += 1
        return answer

    def _wait(self, name: str) -> None:
        if name not in self._waited and torch.cuda.is_available():
            self._waited.add(name)
            torch.ones(1, device="cuda").item()


def _copied(answer: Any) -> Any:
    """Out of memory that recorded work may write to again."""
    if isinstance(answer, torch.Tensor):
        return answer.clone()
    tensors = {k: v.clone() for k, v in vars(answer).items() if isinstance(v, torch.Tensor)}
    return replace(answer, **tensors)


@contextmanager
def remembering(pruners: list[Any]) -> Iterator[Callable[[], None]]:
    """Rules are listened to inside the block until the yielded function is called; from then on
    they repeat themselves and need nothing. All is as it was afterwards."""
    heard: list[tuple[Callable[[Any], None], Any, Remembered]] = []
    undos: list[Callable[[], None]] = []

    def watch(stage: Any, put: Callable[[Any], None]) -> None:
        memory = Remembered(stage.rule)
        heard.append((put, stage, memory))
        undos.append(partial(put, stage))
        put(replace(stage, rule=memory.listen))

    for pruner in pruners:
        for stage, put in _stages(pruner):
            watch(stage, put)

    def repeat() -> None:
        for put, stage, memory in heard:
            put(replace(stage, rule=memory, **({"needs": ()} if hasattr(stage, "needs") else {})))
        for watch_ in {p.site.watch for p in pruners if isinstance(p, DecoderPruner) and p.site}:
            if watch_ is not None:
                undos.append(partial(setattr, watch_, "needs", watch_.needs))
                watch_.needs = ()

    try:
        yield repeat
    finally:
        for undo in undos:
            undo()


def _stages(pruner: Any) -> list[tuple[Any, Callable[[Any], None]]]:
    """A pruner's stages, each with what puts another in its place."""
    if not isinstance(pruner, DecoderPruner | VisionPruner):
        return []
    found: list[tuple[Any, Callable[[Any], None]]] = [
        (stage, partial(_put, pruner, layer)) for layer, stage in pruner.stages.items()
    ]
    site = getattr(pruner, "site", None)
    if site is not None and site.stage is not None:
        found.append((site.stage, partial(setattr, site, "stage")))
    return found


def _put(pruner: Any, layer: int, stage: Any) -> None:
    pruner.stages[layer] = stage


# -- one method ----------------------------------------------------------------------------------
def measure(workload: Workload, method: Method | None, batch: int, repeat: int) -> Row:
    """Time a method and its remembered choices, in turns."""
    inputs, device = workload.batch(batch), workload.device
    fast = why_not(workload.parts, method) is None
    generate = workload.model.generate
    if fast:
        generate = FastGenerate(workload.model, workload.parts, capture=device.type == "cuda")

    def first_token() -> None:
        generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)

    with prune(workload.model, method) as trace:
        warm(first_token, 3)
        session = session_on(workload.decoder)
        pruners = session.pruners if session is not None else []
        spread = seconds_of(first_token, device, repeat=repeat)
        behind, mean, ratio = _tokens(workload, trace)
        backend = trace.backend
        choosing = _choosing(first_token, pruners, device, repeat) if pruners else None
    label = "none" if method is None else method.label()
    return Row(label, batch, backend, behind, mean, ratio, spread.median, 0.0, choosing)


def _choosing(
    first_token: Callable[[], None], pruners: list[Any], device: torch.device, repeat: int
) -> float | None:
    """Seconds that looking and choosing take."""
    if not any(_stages(pruner) for pruner in pruners):
        return None  # resizes
    with remembering(pruners) as repeat_answers:
        first_token()
        repeat_answers()
        warm(first_token, 3)
    differences = []
    for _ in range(3):  # in turns, so that a drift of the clocks is nobody's
        looking = seconds_of(first_token, device, repeat=repeat).median
        with remembering(pruners) as repeat_answers:
            first_token()
            repeat_answers()
            blind = seconds_of(first_token, device, repeat=repeat).median
        differences.append(looking - blind)
    return statistics.median(differences)


def _tokens(workload: Workload, trace: Any) -> tuple[float, float, float]:
    """Visual tokens behind the last drop and as a mean over layers, and the FLOPs ratio."""
    layers, visual = workload.shape.layers, workload.span[1]
    counts, now = [], float(visual)
    for layer in range(layers):
        if layer in trace.visual_tokens:
            now = statistics.fmean(trace.visual_tokens[layer])
        counts.append(now)
    lengths = list(trace.lengths) or [workload.tokens] * layers
    cost = Sizes(workload.shape, None).prompt(workload.tokens, visual, lengths)
    return counts[-1], statistics.fmean(counts), float(cost.ratio or 1.0)


def method_of(text: str) -> Any:
    """A method by its short form; by name alone with what it is usually asked for."""
    cls = METHODS.get(text)
    return parse_method(text) if cls is None else get_method(text, **cls.standard)


def with_text_tower(method: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """CDPruner needs a text tower, which a random model does not bring."""
    if not isinstance(method, CDPruner):
        return method
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    with torch.device(device):
        text = CLIPTextModelWithProjection(config).eval().to(dtype)
        projection = torch.nn.Linear(1024, 768, bias=False).to(dtype)
    question = [49406, *range(1000, 1014), 49407]
    return replace(method, text_tower=TextTower(text, projection, question=question))


# -- the table -----------------------------------------------------------------------------------
HEAD = (
    "batch | method | backend | visual tokens behind | mean over layers | FLOPs ratio | TTFT ms | "
    "of unpruned | choosing ms | choosing, % of unpruned TTFT"
)


def table(rows: list[Row], title: list[str]) -> str:
    """The Markdown file."""
    lines = [*title, "", f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1)]
    for row in rows:
        choosing = ("–", "–")
        if row.choosing is not None:
            share = 100 * row.choosing / row.unpruned
            choosing = (f"{1000 * row.choosing:.3f}", f"{share:.2f}")
        cells = [
            str(row.batch),
            markdown_cell(row.method),
            row.backend,
            f"{row.behind:.0f}",
            f"{row.mean:.0f}",
            f"{row.flops_ratio:.3f}",
            f"{1000 * row.ttft:.2f}",
            f"{row.ttft / row.unpruned:.3f}",
            *choosing,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and write the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "prumerge:0.11"])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", default="method_speed.md")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    workload = of_shape(args.shape, random_model(args.shape, dtype=dtype, device=device))
    workload.model.generation_config.eos_token_id = None
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    title = [
        "# Time to first token and cost of choosing",
        "",
        f"{card}, torch {torch.__version__}, {args.shape} with random weights, {dtype}, prompts of "
        f"{workload.text} text and {workload.span[1]} visual tokens, {date.today()}; medians of "
        f"{args.repeat}. `scripts/method_speed.py {' '.join(sys.argv[1:])}`",
    ]
    rows: list[Row] = []
    failed = 0
    with torch.inference_mode():
        for batch in args.batch_sizes:
            unpruned = measure(workload, None, batch, args.repeat)
            unpruned.unpruned = unpruned.ttft
            rows.append(unpruned)
            for text in args.methods:
                if text == "none":
                    continue
                gc.collect()
                try:
                    plain = method_of(text)
                    method = with_text_tower(plain, device, dtype)
                    row = measure(workload, method, batch, args.repeat)
                    row.method = plain.label()
                except Exception as error:  # the others are still to be measured
                    failed += 1
                    print(f"Failed: {text}: {error}", file=sys.stderr, flush=True)
                    continue
                row.unpruned = unpruned.ttft
                rows.append(row)
                Path(args.out).write_text(table(rows, title), encoding="utf-8")
                print(f"batch {batch} {row.method}: {1000 * row.ttft:.2f} ms", file=sys.stderr)
    print(table(rows, title))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
