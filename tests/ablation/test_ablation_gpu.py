"""The ablation on a GPU: random weights at the published shapes of the study's three smallest
models, one process each, and the GPU's memory afterwards.

Tokenizers are small ones (a vocabulary says nothing about speed where weights are random); all
else has the published sizes. Needs about 20 GB of disk and of main memory.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import family_makers
from vlm_prune_ext import cli
from vlm_prune_ext.demo.writers import write_caption_csv

MIB = 2**20
SAMPLES = 8

SHAPES: dict[str, dict[str, Any]] = {
    "internvl2-2b": {
        "make": family_makers.internvl,
        "text": {
            "model_type": "llama",
            "vocab_size": 92553,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
        },
        "whole": {"image_seq_length": 256},
        "pixels": {"size": {"height": 448, "width": 448}, "max_patches": 12},
        "processor": {"image_seq_length": 256},
    },
    "blip2-opt-2.7b": {
        "make": family_makers.blip2_opt,
        "text": {
            "vocab_size": 50304,
            "tie_word_embeddings": True,
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        "vision": {
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 39,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        "qformer": {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "encoder_hidden_size": 1408,
        },
        "whole": {"num_query_tokens": 32, "tie_word_embeddings": True},
        "pixels": {"size": {"height": 224, "width": 224}},
        "processor": {"num_query_tokens": 32},
    },
    "qwen2.5-vl-3b": {
        "make": family_makers.qwen2_5_vl,
        "text": {
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "whole": {"tie_word_embeddings": True},
        "pixels": {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
        "processor": {},
    },
}


def write_shape(folder: Path, shape: dict[str, Any], device: str) -> None:
    """A checkpoint of these sizes: a small one, with its configuration enlarged and new weights."""
    import transformers

    folder.mkdir()
    shape["make"](folder)
    stored = json.loads((folder / "config.json").read_text())
    for part in ("text", "vision", "qformer"):
        if part in shape:
            sizes = stored[f"{part}_config"]
            for name in ("layer_types", "head_dim"):  # follow from the others
                sizes.pop(name, None)
            sizes |= copy.deepcopy(shape[part])
    stored |= shape["whole"]
    stored.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(stored))
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, stored["architectures"][0])
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = cls(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for name, value in shape["pixels"].items():
        setattr(processor.image_processor, name, value)
    for name, value in shape["processor"].items():
        setattr(processor, name, value)
    processor.save_pretrained(folder)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_memory_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    for name, shape in SHAPES.items():
        write_shape(tmp_path / name, shape, "cuda")
        torch.cuda.empty_cache()
    data = write_caption_csv(tmp_path / "data", 1, SAMPLES)
    out = tmp_path / "out"
    models = [str(tmp_path / name) for name in SHAPES]
    command = ["ablate", "--data", str(data), "--models", *models, "--output-dir", str(out)]
    command += ["--batch-size", "2", "--max-new-tokens", "64", "--dtype", "bfloat16"]
    assert cli.main(command) == 0
    for name in SHAPES:
        record = json.loads((out / f"{name}_metrics.json").read_text())
        memory = record["gpu_memory"]
        for gpu, before in memory["before"].items():
            assert memory["after"][gpu] <= before + MIB, name
        assert record["peak_memory_bytes"] > 2**32  # the weights alone
        print(name, record["seconds_per_sample"], record["peak_memory_bytes"] / 2**30, memory)
        assert record["num_samples"] == SAMPLES and record["seconds_per_sample"] > 0
