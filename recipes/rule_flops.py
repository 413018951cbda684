"""What rules compute themselves, against the prefill of LLaVA-1.5-7B (67 + 576 tokens).

The FLOPs ratios that results state are by formula and leave a rule's own arithmetic out. Here it is
counted: torch's counter over a prompt, less the formula for the same lengths. The widths are
the published ones; two decoder layers with narrow MLPs and three tower layers are enough, since
what a rule computes depends on neither. Needs about 2 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

import vlm_prune_ext as vp
from vlm_prune_ext.bench.cases import of_shape
from vlm_prune_ext.bench.shapes import SHAPES
from vlm_prune_ext.experiment.flops import count_flops, prefill_flops, vision_modules
from vlm_prune_ext.experiment.report import Column, Table
from vlm_prune_ext.methods.registry import parse_method

RULES = (
    "fastv:100,agg_layer=1",
    "dart:layer=1",
    "pdrop:layers=[1],ratios=[0.5]",
    "visionzip",
    "fastervlm",
    "vispruner",
    "divprune",
    "scope",
    "holov",
    "prumerge_plus",
)


def narrow_model() -> Any:
    """The published widths, few layers, weights that are quick to make."""
    config: Any = SHAPES["llava-1.5-7b"]()
    config.text_config.update({"num_hidden_layers": 2, "intermediate_size": 64})
    config.vision_config.update({"num_hidden_layers": 3})
    with no_init_weights():
        model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        row = torch.randn(weight.shape[-1], generator=generator) / weight.shape[-1] ** 0.5
        weight.data = (row if weight.dim() > 1 else row.abs() + 1).expand(weight.shape).clone()
    return model


@torch.inference_mode()
def own_flops(model: Any, text: str) -> float:
    """What the rule of a method's short form adds to a prompt's arithmetic."""
    inputs: dict[str, Any] = of_shape("narrow", model).batch(1)
    more: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    method = parse_method(text)
    with vp.prune(model, method) as trace, count_flops(vision_modules(model)) as count:
        model.generate(**inputs, **more)
    formula = prefill_flops(model.config, inputs, trace.lengths)
    assert formula is not None
    return count.total - formula.total


PAGE = """# What rules compute themselves

Recipe: `python recipes/results.py rule_flops`

FLOPs ratios are by formula and leave a rule's own arithmetic out. Its share, counted at the widths
of LLaVA-1.5-7B (67 + 576 tokens, {whole:.0f} GFLOP of prefill and tower unpruned), one selection
each; methods with several stages do it once a stage:

{table}"""


def main() -> None:
    """Write the page."""
    model = narrow_model()
    whole = prefill_flops(SHAPES["llava-1.5-7b"](), of_shape("narrow", model).batch(1))
    assert whole is not None
    figures = [Column("own GFLOP", 3), Column("of the prefill", 4, unit=" %")]
    table = Table([Column("rule", left=True), *figures])
    for text in RULES:
        own = own_flops(model, text)
        print(text, own, file=sys.stderr, flush=True)
        table.rows.append([text, own / 1e9, 100 * own / whole.total])
    page = PAGE.format(whole=whole.total / 1e9, table=table.markdown())
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/rule_flops.md").write_text(page)


if __name__ == "__main__":
    main()
