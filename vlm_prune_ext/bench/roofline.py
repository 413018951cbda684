"""The roofline: what the device can do at best, measured first, and the time a prefill or a token
needs at least.

A prefill is bound by arithmetic: its FLOPs over the rate of a large matrix product. A decoded token
of a small batch is bound by reading the weights (and the KV cache) once: their bytes over the rate
of a large copy. Neither can be beaten without doing less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_prune_ext.experiment.measure import seconds_of


@dataclass(frozen=True)
class Roofline:
    """Rates of a device.

    Attributes:
        flops: FLOP/s of a large matrix product.
        bytes: bytes/s of a large copy, reading and writing counted.
        dtype: of the product, as text.
    """

    flops: float
    bytes: float
    dtype: str

    def prefill_seconds(self, flops: float) -> float:
        """Of a prefill at least: its arithmetic."""
        return flops / self.flops

    def token_seconds(self, weight_bytes: float) -> float:
        """Of a token at least: the weights are read."""
        return weight_bytes / self.bytes


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a matrix product (8,192 a side on a GPU, 2,048 on a CPU) and a copy (2 GiB; 256 MiB)."""
    on_gpu = device.type == "cuda"
    side, numbers = (8192, 1 << 30) if on_gpu else (2048, 1 << 26)
    left = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(left)
    seconds = seconds_of(lambda: torch.mm(left, left, out=product), device, repeat=7)
    flops = 2.0 * side**3 / seconds.median
    source = torch.zeros(numbers, dtype=torch.float16 if on_gpu else torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, repeat=7)
    moved = 2.0 * source.numel() * source.element_size()
    return Roofline(flops, moved / seconds.median, str(dtype).removeprefix("torch."))
