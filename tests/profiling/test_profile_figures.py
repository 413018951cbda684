"""Counting FLOPs and energy: torch's counter against formulas, counters against what they hold."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

import vlm_prune_ext as vp
from tests.family_makers import KINDS
from tests.makers import photos, tiny_hf_llava
from vlm_prune_ext.bench.shapes import SHAPES
from vlm_prune_ext.experiment.flops import (
    DecoderShape,
    count_flops,
    decoder_flops,
    planned_lengths,
    prefill_flops,
    vision_modules,
)
from vlm_prune_ext.experiment.measure import (
    EnergyMeter,
    PowerSampler,
    area,
    idle_power,
    peak_memory,
    reset_peak,
)
from vlm_prune_ext.experiment.record import Spread

QUESTIONS = ["What colour is the cat?", "Is there a dog in the image? Please answer yes or no."]


def counted(model: Any, inputs: Any, method: Any) -> tuple[float, float, Any]:
    """Counted FLOPs of vision and the rest of a prefill, and the trace."""
    with torch.inference_mode(), vp.prune(model, method) as trace:
        with count_flops(vision_modules(model)) as count:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return count.vision, count.total - count.vision, trace


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "blip2_opt", "blip2_t5"])
def test_counted_and_analytic_agree(kind: str, attention: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    if kind == "llava":
        tiny_hf_llava(folder, kv_heads=2)
    else:
        folder.mkdir()
        KINDS[kind].make(folder)
    model, processor = vp.load(str(folder), device="cpu", attn_implementation=attention)
    inputs = processor.batch(QUESTIONS, photos(2))
    methods: list[Any] = [None]
    if kind != "blip2_t5":
        methods += [
            vp.FastV(agg_layer=2, attention_rank=4),
            vp.RandomDrop(keep=4),
            vp.SAINT(start=1, end=2, threshold=0.1, min_neighbors=1),
            vp.CustomSelection(method="similarity", kept_tokens=4, agg_layer=1),
        ]
    for method in methods:
        vision, language, trace = counted(model, inputs, method)
        analytic = prefill_flops(model.config, inputs, trace.lengths)
        assert analytic is not None
        assert vision == pytest.approx(analytic.vision, rel=0.001), method
        assert language == pytest.approx(analytic.language, rel=0.02), method
        if method is not None:
            whole = prefill_flops(model.config, inputs)
            assert whole is not None and language < 1.001 * whole.language


def test_drops_inside_the_tower_are_counted(tmp_path: Path) -> None:
    model, processor = vp.load(str(tiny_hf_llava(tmp_path / "m")), device="cpu")
    inputs = processor.batch(QUESTIONS, photos(2))
    method = vp.SAINT(start=None, vit=vp.SAINTViT(layers=(1,), keep_num=9, r=8))
    vision, language, trace = counted(model, inputs, method)
    patches = {layer: kept.shape[1] for layer, kept in trace.vision_kept.items()}
    analytic = prefill_flops(model.config, inputs, trace.lengths, patches)
    assert analytic is not None
    assert vision == pytest.approx(analytic.vision, rel=0.05)
    assert language == pytest.approx(analytic.language, rel=0.02)


REAL = {
    "llava-1.5-7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064},
    ),
    "qwen2.5-vl-3b": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    ),
}


@pytest.mark.parametrize("name", list(REAL))
def test_decoders_of_real_shapes(name: str) -> None:
    """Counting needs no weights: on the meta device nothing is computed."""
    sizes, more = REAL[name]
    config = LlamaConfig(**sizes, **more, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        inputs = torch.zeros(1, 643, dtype=torch.int64)
        mask = torch.zeros(1, 1, 643, 643)  # stated, since it cannot be made without values
        with torch.no_grad(), count_flops() as count:
            model(input_ids=inputs, attention_mask=mask, logits_to_keep=1, use_cache=False)
    shape = DecoderShape.from_config(config)
    lengths = planned_lengths(None, shape.layers, text=67, visual=[576])
    assert count.total == pytest.approx(decoder_flops(shape, lengths), rel=0.001)


def test_towers_of_real_shapes() -> None:
    """CLIP and the Q-Former behind ViT-g whole, without weights; Qwen2.5-VL's tower in its real
    widths, two of its layers."""
    with torch.device("meta"), torch.no_grad():
        ids = torch.zeros(1, 643, dtype=torch.int64)
        llava = LlavaForConditionalGeneration(SHAPES["llava-1.5-7b"]())
        pixels = torch.zeros(1, 3, 336, 336)
        with count_flops(vision_modules(llava)) as count:
            llava.get_image_features(pixels)
        inputs = {"input_ids": ids, "pixel_values": pixels}
        _agree(count.vision, llava.config, inputs)
        config = Blip2Config(num_query_tokens=32)
        blip2 = Blip2ForConditionalGeneration(config)
        pixels = torch.zeros(1, 3, 224, 224)
        with count_flops(vision_modules(blip2)) as count:
            seen = blip2.vision_model(pixels).last_hidden_state
            found = blip2.qformer(query_embeds=blip2.query_tokens, encoder_hidden_states=seen)
            blip2.language_projection(found.last_hidden_state)
        _agree(count.vision, config, {"input_ids": ids, "pixel_values": pixels})
    config = SHAPES["qwen2.5-vl-3b"]()
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    tower = Qwen2_5_VisionTransformerPretrainedModel(config.vision_config).eval()
    grid = torch.tensor([[1, 18, 22]])
    with torch.no_grad(), count_flops([tower]) as count:
        tower(torch.zeros(18 * 22, 1176), grid_thw=grid)
    _agree(count.vision, config, {"input_ids": ids, "image_grid_thw": grid})


def _agree(counted: float, config: Any, inputs: dict[str, Any]) -> None:
    analytic = prefill_flops(config, inputs)
    assert analytic is not None and counted == pytest.approx(analytic.vision, rel=0.001)


def test_grouped_heads_in_fused_attention() -> None:
    """torch's own formula stops at an assertion where heads differ; ours counts query heads."""
    query, key = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 9, 16)
    with torch.no_grad(), count_flops() as count:
        torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert count.total == 4 * 2 * 8 * 5 * 9 * 16


def test_counting_leaves_nothing_behind(tmp_path: Path) -> None:
    model, processor = vp.load(str(tiny_hf_llava(tmp_path / "m", layers=2)), device="cpu")
    inputs = processor.batch(QUESTIONS, photos(2))
    first = counted(model, inputs, None)[:2]
    assert counted(model, inputs, None)[:2] == first
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vision_modules(model)]
    assert hooks == [0, 0]


def test_shapes_of_decoders_without_gates() -> None:
    base = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    opt = DecoderShape.from_config(SimpleNamespace(**base, model_type="opt", ffn_dim=16))
    assert (opt.intermediate, opt.mlp_matrices, opt.kv_heads) == (16, 2, 2)
    assert opt.layer_flops(1) == 2 * (4 * 64 + 2 * 8 * 16) + 4 * 8


def test_unknown_models_have_no_formula() -> None:
    assert prefill_flops(SimpleNamespace(model_type="something"), {}) is None


# ------------------------------------------------------------------------------------- energy


def write_zone(folder: Path, name: str, energy: int, span: int = 1_000_000) -> Path:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{span}\n")
    return zone


def test_processor_energy(tmp_path: Path) -> None:
    """Packages add up, their parts do not count twice, and a counter may start anew."""
    write_zone(tmp_path, "intel-rapl:0", 900_000)
    write_zone(tmp_path, "intel-rapl:1", 100_000)
    write_zone(tmp_path, "intel-rapl:0:0", 5)
    meter = EnergyMeter("cpu", tmp_path)
    assert meter.available
    write_zone(tmp_path, "intel-rapl:0", 200_000)
    write_zone(tmp_path, "intel-rapl:1", 600_000)
    write_zone(tmp_path, "intel-rapl:0:0", 999_999)
    assert meter.joules() == pytest.approx(0.3 + 0.5)


def test_no_counter_gives_nothing(tmp_path: Path) -> None:
    meter = EnergyMeter("cpu", tmp_path / "none")
    assert not meter.available and meter.joules() is None
    with PowerSampler("cpu") as sampler:
        pass
    assert sampler.joules is None and sampler.watts is None
    assert not EnergyMeter("cpu", None).available  # only GPUs are asked
    watts = idle_power("cpu", seconds=0.01)
    assert watts is None or watts > 0


def test_area_under_power() -> None:
    assert area([]) is None and area([(1.0, 50.0)]) is None
    assert area([(0.0, 10.0), (1.0, 20.0), (3.0, 20.0)]) == pytest.approx(15 + 40)


def test_spread_has_both_ends() -> None:
    found = Spread.of(range(1, 21))
    assert found is not None and (found.p10, found.median, found.p90) == (2, 10.5, 18)


def test_peak_memory_starts_anew() -> None:
    block = torch.ones(40_000_000)
    high = peak_memory("cpu")
    del block
    if not reset_peak("cpu"):
        pytest.skip("this system does not let a process reset its peak")
    assert math.isfinite(high) and peak_memory("cpu") < high


@pytest.mark.gpu
def test_sampled_power_agrees_with_the_counter() -> None:
    meter = EnergyMeter("cuda")
    if not meter.available:
        pytest.skip("this GPU does not count")
    work = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with PowerSampler("cuda") as sampler:
        meter = EnergyMeter("cuda")
        for _ in range(40):
            for _ in range(200):
                work @ work
            torch.cuda.synchronize()
        joules = meter.joules()
    assert joules == pytest.approx(sampler.joules, rel=0.1)
