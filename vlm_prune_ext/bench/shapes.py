"""Models of published shapes with random weights: what speed depends on, without a download.

Sizes are those of the published ``config.json`` files, as far as arithmetic and memory depend on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from vlm_prune_ext.errors import unknown_name


def _clip() -> CLIPVisionConfig:
    """ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llama(layers: int, hidden: int, heads: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llava(*sizes: int) -> LlavaConfig:
    return LlavaConfig(vision_config=_clip(), text_config=_llama(*sizes), image_token_index=32000)


def _llava_next(*sizes: int) -> LlavaNextConfig:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextConfig(
        vision_config=_clip(),
        text_config=_llama(*sizes),
        image_token_index=32000,
        image_grid_pinpoints=pinpoints,
    )


def _qwen2_5(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    tied: bool = False,
) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
    )


def _qwen3() -> Qwen3VLConfig:
    """8B; its tower is SigLIP 2's."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    )


def _gemma() -> Gemma3Config:
    text = Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
    )
    return Gemma3Config(text_config=text, vision_config=vision)


SHAPES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llava-1.5-7b": lambda: _llava(32, 4096, 32, 11008),
    "llava-1.5-13b": lambda: _llava(40, 5120, 40, 13824),
    "llava-next-7b": lambda: _llava_next(32, 4096, 32, 11008),
    "qwen2.5-vl-3b": lambda: _qwen2_5(36, 2048, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-vl-7b": lambda: _qwen2_5(28, 3584, 28, 4, 18944, 152064),
    "qwen3-vl-8b": _qwen3,
    "gemma-3-4b": _gemma,
}
"""Name -> configuration. Of the last one the language model's prefill is timed alone."""


def random_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> Any:
    """A model of a named shape with random weights, made on the device itself.

    Args:
        name: key of :data:`SHAPES`.
        dtype, device, attn_implementation: as in :func:`vlm_prune_ext.load`.
        seed: of the weights.

    Returns:
        a transformers model in evaluation mode, without tokenizer or image processor.

    Raises:
        InputError: unknown name.
    """
    if name not in SHAPES:
        raise unknown_name("shape", name, SHAPES)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            SHAPES[name](), dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()
