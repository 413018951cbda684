"""Analytic FLOPs against torch's own counter, and against numbers worked out elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import vlm_prune_ext as vp
from tests import makers
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.flops import (
    DecoderShape,
    PromptFlops,
    Sizes,
    VisionShape,
    decoder_flops,
    planned_lengths,
    tower_images,
    vision_flops,
)
from vlm_prune_ext.methods.registry import parse_method

LLAVA_7B = DecoderShape(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000
)


def counted(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoder_agrees_with_torch(kv_heads: int) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=97,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.zeros(1, 50, dtype=torch.int64)
    measured = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    analytic = decoder_flops(DecoderShape.from_config(config), [50] * 3)
    assert analytic == pytest.approx(measured, rel=0.005)


def test_tower_agrees_with_torch() -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    measured = counted(lambda: model(pixel_values=torch.zeros(2, 3, 56, 56)))
    shape = VisionShape.from_config(config)
    assert shape.patches == 16 and not shape.projector
    assert vision_flops(shape, images=2) == pytest.approx(measured, rel=0.005)


def test_vision_drop_and_projector_by_hand() -> None:
    shape = VisionShape(2, 4, 1, 8, patches=9, patch_inputs=12, projector=(4, 6, 6))
    attention = 8 * 16 * 10 + 4 * 4 * 100
    mlp = 4 * 4 * 8
    projector = 2 * 4 * 6 + 2 * 6 * 6
    embed = 2 * 4 * 12 * 9
    whole = embed + 2 * (attention + mlp * 10) + projector * 9
    assert vision_flops(shape) == whole
    second = 8 * 16 * 5 + 4 * 4 * 25
    cut = embed + attention + mlp * 10 + second + mlp * 5 + projector * 4
    assert vision_flops(shape, {0: 4}) == cut
    assert vision_flops(shape, {0: 4}, images=3) == 3 * cut


@pytest.mark.parametrize(
    ("method", "ratio"), [("fastv:100,agg_layer=3", 0.325), ("fastv:64,agg_layer=2", 0.250)]
)
def test_ratios_of_llava_7b(method: str, ratio: float) -> None:
    lengths = planned_lengths(parse_method(method), 32, text=35 + 32, visual=[576])
    whole = decoder_flops(LLAVA_7B, [643] * 32)
    assert decoder_flops(LLAVA_7B, lengths) / whole == pytest.approx(ratio, abs=0.0005)
    # 790 TFLOP/s and 10.8 ms: the arithmetic floor of the whole prompt.
    assert whole / 790e12 == pytest.approx(0.0108, rel=0.01)


def test_planned_lengths() -> None:
    assert planned_lengths(None, 3, 10, [36]) == [46, 46, 46]
    himap = parse_method("himap:18,attn_img_rank=5,attn_img_layer=3")
    assert planned_lengths(himap, 5, 16, [36]) == [52, 52, 34, 21, 21]
    assert planned_lengths(parse_method("random:9"), 2, 16, [36, 36]) == [34, 34]
    for behind, left in (
        ("visionzip:dominant=5,contextual=3", 8),
        ("divprune:0.125", 4),
        ("prumerge:0.25", 10),
        ("downsample:11", 9),
        ("holov:12", 12),
    ):
        assert planned_lengths(parse_method(behind), 2, 16, [36]) == [16 + left] * 2
    with pytest.raises(InputError, match="depends on the picture"):
        planned_lengths(parse_method("prumerge"), 2, 16, [36])
    ratio = parse_method("fastv:0.25,agg_layer=1")
    assert planned_lengths(ratio, 3, 16, [36, 64]) == [116, 16 + 9 + 16, 16 + 9 + 16]
    masked = parse_method("fastv:4,agg_layer=1,mode=mask")
    assert planned_lengths(masked, 3, 16, [36]) == [52] * 3
    with pytest.raises(InputError, match="saint"):
        planned_lengths(parse_method("saint"), 32, 16, [36])


def test_ratio_baselines() -> None:
    sizes = Sizes(LLAVA_7B, None)
    assert sizes.prompt(643, 576, [643] * 32).ratio == 1.0
    assert sizes.prompt(643, 576, [211] * 32).ratio < 0.34


def test_shapes_from_composite_configs() -> None:
    text = SimpleNamespace(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=50,
    )
    vision = SimpleNamespace(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=14,
        image_size=336,
    )
    config = SimpleNamespace(text_config=text, vision_config=vision)
    shape = DecoderShape.from_config(config)
    assert (shape.kv_heads, shape.head_dim) == (4, 16)
    tower = VisionShape.from_config(config)
    assert (tower.patches, tower.patch_inputs, tower.projector) == (576, 588, (32, 64, 64))


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"lengths=.*32 layers"):
        decoder_flops(LLAVA_7B, [643] * 31)
    with pytest.raises(InputError, match="num_attention_heads"):
        DecoderShape.from_config(SimpleNamespace())


def test_ratio_of_visual_tokens_alone() -> None:
    """As FastV's paper states it: 50 % of 576 tokens behind layer 2 leave 0.5 and a little, where
    the ratio with text and output head is higher."""
    lengths = planned_lengths(parse_method("fastv:288,agg_layer=2"), 32, text=67, visual=[576])
    cost = Sizes(LLAVA_7B, None).prompt(67 + 576, 576, lengths)
    layer = LLAVA_7B.layer_flops
    assert cost.ratio_visual == (2 * layer(576) + 30 * layer(288)) / (32 * layer(576))
    whole = decoder_flops(LLAVA_7B, [643] * 32)
    assert cost.ratio == decoder_flops(LLAVA_7B, lengths) / whole > cost.ratio_visual
    assert cost.ratio_with_vision is None
    assert (cost + cost).ratio_visual == cost.ratio_visual
    bare = Sizes(LLAVA_7B, None).prompt(67, 0, [67] * 32)
    assert bare.ratio == 1.0 and bare.ratio_visual is None and PromptFlops().ratio is None


def test_padded_tiles_are_not_counted(tmp_path: Path) -> None:
    """LLaVA-NeXT's processor pads to the most tiles of a batch; the tower does not see that."""
    model, processor = vp.load(makers.tiny_next(tmp_path / "m", layers=2), device="cpu")
    pictures = [makers.photo(80, 60, seed=1), makers.photo(150, 40, seed=2)]
    inputs = processor.batch(["What?", "What?", "Who?"], [[pictures[0]], [pictures[1]], []])
    seen: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(
        lambda module, given, output: seen.append(output.last_hidden_state.shape[0])
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    tiles = tower_images(model.config, inputs, [1, 1, 0])
    assert tiles[0] != tiles[1] and tiles[2] == 0 and sum(tiles) == sum(seen)
    assert sum(tiles) < inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]
    assert tower_images(model.config, inputs) == [sum(seen)]
