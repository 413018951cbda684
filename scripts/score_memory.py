"""What choosing tokens costs in memory: peak of a keep-all prefill over a vanilla prefill.

Decoder layers of LLaVA-1.5-7B's shape with random weights, 2,880 visual tokens, batch 8. All
tokens are kept, so that nothing but the scores differs. On CUDA the allocator's peak is read; on
CPU the bytes of all live tensors are followed operation by operation (memory inside a kernel is not
seen there). Fewer layers make the shares larger, not smaller: weights and cache count as part of
the vanilla peak.

    python scripts/score_memory.py --layers 3 --device cpu
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import vlm_prune_ext as vp

FRONT, VISUAL, BEHIND = 35, 2880, 32


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def build(layers: int, device: str) -> LlamaForCausalLM:
    """Random weights at the 7B shape, bfloat16."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def peak(model: LlamaForCausalLM, embeds: torch.Tensor, method: Any) -> float:
    """Peak bytes of one prefill with a KV cache, weights included."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad(), vp.prune(model, method, visual_span=(FRONT, VISUAL)):
        if embeds.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            return torch.cuda.max_memory_allocated()
        with LiveBytes([embeds, *model.parameters()]) as live:
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        return weights + embeds.numel() * embeds.element_size() + live.peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = build(args.layers, args.device)
    embeds = torch.randn(
        args.batch, FRONT + VISUAL + BEHIND, 4096, dtype=torch.bfloat16, device=args.device
    )
    methods = {
        "vanilla": None,
        "FastV": vp.FastV(agg_layer=1, attention_rank=1.0),
        "HiMAP": vp.HiMAP(attn_txt_layer=1, attn_txt_rank=1.0, attn_img_layer=2, attn_img_rank=1.0),
    }
    vanilla = 0.0
    for name, method in methods.items():
        size = peak(model, embeds, method)
        vanilla = vanilla or size
        print(f"{name:8} {size / 2**30:7.2f} GiB  {100 * (size / vanilla - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    main()
