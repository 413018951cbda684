"""Questions about one picture on a GPU: what a question takes, with what they share and without.

    python scripts/gpu_share.py --out share.json

A model of LLaVA-1.5-7B's shape with random weights in bfloat16; 64 questions of 32 tokens behind 35
+ 576, four new tokens each, about 64, 16 or 4 pictures, which no call has seen before. *hooks* and
*graphs* are the same pieces run as they are, and recorded; *whole* is every question with its whole
prompt on recorded pieces. Before that, float32 on a smaller shape: largest difference of a logit
and share of equal tokens between shared and whole prompts of transformers' own ``generate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from vlm_prune_ext.bench.shapes import SHAPES, random_model
from vlm_prune_ext.experiment.measure import now
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.fast.shared import Asked
from vlm_prune_ext.methods.registry import parse_method
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.pruning import prune

DEVICE = "cuda"
METHODS = ("none", "divprune:64", "fastv:100")
FRONT, BEHIND, NEW = 35, 32, 4
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Questions:
    """Random prompts, ``together`` about each picture."""

    def __init__(self, model: Any, rows: int, together: int) -> None:
        config, self.device = model.config, next(model.parameters()).device
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        token, visual = config.image_token_id, (side // patch) ** 2
        draw = torch.Generator().manual_seed(together)
        self.count, self.together = rows // together, together
        low, high = 5, min(config.text_config.vocab_size, token) - 1
        front = torch.randint(low, high, (FRONT,), generator=draw).tolist()
        self.prefix = front + [token] * visual
        asked = torch.randint(low, high, (rows, BEHIND), generator=draw)
        self.asked = asked.tolist()
        shape = (self.count, 3, side, side)
        self.pixels = torch.randn(shape, generator=draw).to(self.device, model.dtype)
        ids = [self.prefix + one for one in self.asked]
        self.inputs = {"input_ids": torch.tensor(ids, device=self.device)}
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])

    def whole(self) -> dict[str, torch.Tensor]:
        """For ``generate``."""
        pixels = self.pixels.repeat_interleave(self.together, dim=0)
        return {**self.inputs, "pixel_values": pixels}

    def shared(self, fast: FastGenerate, **options: Any) -> Any:
        """Answers, of pictures that were not seen before."""
        fast.prefixes.clear()
        owner = [index for index in range(self.count) for _ in range(self.together)]
        lengths = [len(self.prefix)] * self.count
        asked = Asked(owner, self.asked, lengths, list(range(self.count)), self._make)
        return fast.shared(asked, **self.inputs, **options)

    def _make(self, indices: list[int]) -> tuple[dict[str, torch.Tensor], list[float]]:
        ids = torch.tensor([[*self.prefix, self.asked[0][0]]] * len(indices), device=self.device)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**made, "pixel_values": self.pixels[indices]}, [1.0] * len(indices)


def per_question(call: Callable[[], Any], rows: int, repeat: int) -> float:
    """Milliseconds."""
    device = torch.device(DEVICE)
    for _ in range(3):  # as it is, recorded, replayed
        call()
    times = []
    for _ in range(repeat):
        start = now(device)
        call()
        times.append(now(device) - start)
    return 1e3 * statistics.median(times) / rows


class Keep(LogitsProcessor):
    """Remembers what it sees."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """As it came."""
        self.seen.append(scores.clone())
        return scores


@torch.no_grad()
def equality(note: Callable[..., None]) -> None:
    """Float32 on a shape of 8 layers."""
    config = SHAPES["llava-1.5-7b"]()
    config.text_config.update(
        {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 2752}
    )
    config.text_config.update({"num_attention_heads": 16, "num_key_value_heads": 16})
    config.text_config.head_dim = 64
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    questions = Questions(model, 16, 4)
    for name in METHODS:
        method = None if name == "none" else parse_method(name)
        for way, capture in (("hooks", False), ("graphs", True)):
            fast = FastGenerate(model, parts_of(model), capture=capture, forced=True)
            whole, shared = Keep(), Keep()
            with prune(model, method):
                kept = LogitsProcessorList([whole])
                expected = model.generate(**questions.whole(), **OPTIONS, logits_processor=kept)
                for _ in range(3):
                    shared.seen.clear()
                    found = questions.shared(fast, **OPTIONS, logits_processor=[shared])
            gap = (whole.seen[0] - shared.seen[0]).abs().max().item()
            same = (expected[:, -NEW:] == found[:, -NEW:]).float().mean().item()
            note(kind="equality", way=way, method=name, largest_gap=gap, equal_tokens=same)


@torch.no_grad()
def speed(note: Callable[..., None], rows: int, repeat: int) -> None:
    """Milliseconds a question."""
    model = random_model("llava-1.5-7b", dtype=torch.bfloat16, device=torch.device(DEVICE))
    for way, capture in (("hooks", False), ("graphs", True)):
        fast = FastGenerate(model, parts_of(model), capture=capture, forced=True)
        for name in METHODS:
            method = None if name == "none" else parse_method(name)
            for together in (1, 4, 16):
                questions = Questions(model, rows, together)
                with prune(model, method):
                    ms = per_question(partial(questions.shared, fast, **OPTIONS), rows, repeat)
                    fields = {"way": way, "method": name, "together": together, "rows": rows}
                    note(kind="shared", **fields, ms=ms, per_second=1e3 / ms)
            if capture:
                with prune(model, method):
                    inputs = Questions(model, rows, 1).whole()
                    ms = per_question(partial(fast, **inputs, **OPTIONS), rows, 1)
                    note(kind="whole", way=way, method=name, rows=rows, ms=ms, per_second=1e3 / ms)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--rows", type=int, default=64, help="questions a call, a multiple of 16")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls")
    chosen = parser.parse_args()
    lines: list[dict[str, Any]] = []
    began = time.perf_counter()

    def note(**fields: Any) -> None:
        lines.append({**fields, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__})
        print(f"{time.perf_counter() - began:6.1f} s  {fields}", flush=True)
        chosen.out.write_text(json.dumps(lines, indent=1))

    equality(note)
    torch.cuda.empty_cache()
    speed(note, chosen.rows, chosen.repeat)


if __name__ == "__main__":
    main()
