"""Fused layers: the same numbers, the same parameters, and the model as it was afterwards.

On a CPU the kernels run in Triton's interpreter (in a process of its own: it is chosen at import),
in the types it rounds correctly; on a GPU as they are.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import vlm_prune_ext as vp
from tests import makers
from vlm_prune_ext.fast.fused import FusedLayers, pack
from vlm_prune_ext.fast.segments import run_layer

pytest.importorskip("triton")

CHECK = """
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from vlm_prune_ext.engine import evidence, triton_kernels
from vlm_prune_ext.fast import kernels

def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=RTOL[expected.dtype], atol=1e-6)

RTOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
for dtype in map(lambda name: getattr(torch, name), DTYPES):
    def made(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    for width in (192, 4096):
        norm = LlamaRMSNorm(width).to(DEVICE, dtype)
        norm.weight.data = made(width)
        x = made(3, 5, width)
        same(kernels.rms_norm(x, norm.weight.data, norm.variance_epsilon), norm(x).detach())
    for width in (700, 1024, 2500):
        both = made(2, 3, 2 * width)
        gate, up = both.chunk(2, dim=-1)
        same(kernels.silu_times(both), torch.nn.functional.silu(gate) * up)
    for heads, kv_heads, slot in ((6, 2, 0), (20, 20, 3)):
        states, cos, sin = made(2, 5, (heads + 2 * kv_heads) * 32), made(2, 5, 32), made(2, 5, 32)
        queries, keys, values = (
            part.unflatten(-1, (-1, 32)).transpose(1, 2).clone()
            for part in states.split([heads * 32, kv_heads * 32, kv_heads * 32], dim=-1)
        )
        held = [torch.full((2, kv_heads, 12, 32), 7.0, device=DEVICE, dtype=dtype) for _ in "kv"]
        expected = apply_rotary_pos_emb(queries, keys, cos, sin)
        at = torch.tensor([slot], device=DEVICE)
        kernels.rotate_and_keep(states, heads, (cos, sin), held, at)
        same(states[..., : heads * 32].unflatten(-1, (-1, 32)).transpose(1, 2), expected[0])
        for part, wanted in zip(held, (expected[1], values)):
            same(part[:, :, slot : slot + 5], wanted)
            part[:, :, slot : slot + 5] = 7.0
            assert bool((part == 7.0).all())  # nothing was written beside it
    for heads, kv_heads, rows, count in ((4, 2, 1, 20), (3, 3, 70, 150), (8, 1, 17, 64)):
        queries = made(2, rows, heads, 32).transpose(1, 2)
        keys = made(2, kv_heads, count + 5, 32)[:, :, :count]
        limits = torch.randint(0, count, (2, rows), device=DEVICE)
        limits[0] = count - 1
        weights = torch.rand(2, rows, device=DEVICE)
        allowed = torch.arange(count, device=DEVICE) <= limits[..., None]
        for weight in (None, weights):
            expected = evidence.received(queries.float(), keys.float(), allowed, weight, 0.2)
            found = triton_kernels.received(queries, keys, limits, weight, 0.2)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
print("the same")
"""


def check_kernels(device: str, dtypes: tuple[str, ...], **environment: str) -> None:
    code = f"DEVICE, DTYPES = {device!r}, {dtypes!r}\n{CHECK}"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout.strip() == "the same", run.stderr


def test_kernels_in_the_interpreter() -> None:
    check_kernels("cpu", ("float32", "float16"), TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check_kernels("cuda", ("float32", "float16", "bfloat16"))


def test_packed_weights_are_the_layers_own() -> None:
    linears = [nn.Linear(8, rows) for rows in (4, 6, 2)]
    before = copy.deepcopy(linears)
    x = torch.randn(3, 8)
    packed = pack(linears)
    assert packed is not None
    expected = torch.cat([linear(x) for linear in before], dim=-1)
    torch.testing.assert_close(nn.functional.linear(x, *packed), expected)
    for linear, old in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, old.weight) and torch.equal(linear.bias, old.bias)
    with torch.no_grad():
        linears[1].weight.zero_()
    assert bool((packed[0][4:10] == 0).all())
    storages = [linear.weight.untyped_storage() for linear in linears]
    assert [s.nbytes() for s in storages] == [linear.weight.nbytes for linear in linears]
    del packed
    gc.collect()
    assert all(bool(linear.weight.isfinite().all()) for linear in linears)
    assert torch.equal(linears[0].weight, before[0].weight)  # alive without the whole


def test_what_cannot_be_packed_is_left_alone() -> None:
    class Other(nn.Linear):
        pass

    for second in (Other(4, 4), nn.Linear(4, 4, bias=False)):
        first = nn.Linear(4, 4)
        place = first.weight.data_ptr()
        assert pack((first, second)) is None
        assert first.weight.data_ptr() == place


def test_a_packed_model_is_saved_whole(tmp_path: Path) -> None:
    model, processor = vp.load(makers.tiny_hf_llava(tmp_path / "m"), device="cpu")
    inputs = processor.prompt("Red?", makers.photo())
    expected = model(**inputs).logits
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        assert pack((attention.q_proj, attention.k_proj, attention.v_proj)) is not None
    model.save_pretrained(tmp_path / "saved")
    safetensors.torch.save_model(model, str(tmp_path / "plain.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "plain.safetensors")) == len(
        list(model.state_dict())
    )
    for copied in (type(model).from_pretrained(tmp_path / "saved"), copy.deepcopy(model)):
        assert torch.equal(copied.eval()(**inputs).logits, expected)


class Keep:
    """A KV cache as fused and other attention modules expect it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.held = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in "kv"]
        self.slot = torch.zeros(1, dtype=torch.int64, device="cuda")

    def buffers(self, layer: int) -> Any:
        return self.held

    def seen(self, held: Any, count: int) -> Any:
        return [part[:, :, :count] for part in held]

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> Any:
        for part, new in zip(self.held, (keys, values), strict=True):
            part[:, :, : new.shape[2]] = new
        return self.seen(self.held, keys.shape[2])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 4e-2)])
def test_a_layer_on_a_gpu(kind: str, dtype: str, tolerance: float) -> None:
    from transformers import AutoModel, LlamaConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).to("cuda", getattr(torch, dtype)).eval()
    hidden = torch.randn(2, 24, 256, device="cuda", dtype=model.dtype)
    rotary = model.rotary_emb(hidden, position_ids=torch.arange(24, device="cuda")[None])
    caches = [Keep((2, 4, 40, 32), model.dtype) for _ in "ab"]
    fused = FusedLayers(model)
    with torch.no_grad():
        expected = run_layer(model.layers[0], hidden, rotary, None, caches[0])
        with fused():
            assert "forward" in vars(model.layers[0].mlp)
            found = run_layer(model.layers[0], hidden, rotary, None, caches[1])
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(caches[0].held, caches[1].held, strict=True):
        torch.testing.assert_close(other, one, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vlm_prune_ext.engine import triton_kernels
    from vlm_prune_ext.fast import kernels

    ints, strides = ["i32"] * 4, ["i32"] * 6
    block = {"DIM": 128, "ROWS": 64, "KEYS": 64}
    kind = "*bf16"
    sums = [kind, kind, "*i64", "*fp32", "*fp32", "*fp32", "fp32", *ints, *strides]
    cases: list[tuple[Any, list[str], dict[str, Any]]] = [
        (kernels._rms_norm, [kind] * 3 + ["i32", "fp32"], {"BLOCK": 4096}),
        (kernels._silu_times, [kind] * 2 + ["i32"], {"BLOCK": 1024}),
        (kernels._rotate_and_keep, [kind] * 5 + ["*i64", *ints], {"HALF": 64, "HEADS": 16}),
        (triton_kernels._row_sums, [kind] * 2 + ["*i64", "*fp32", "fp32", *ints, *strides], block),
        (triton_kernels._key_sums, sums, {"WEIGHTED": True, **block}),
    ]
    for kernel, types, constants in cases:
        waiting = iter(types)
        names = {n: "constexpr" if n in constants else next(waiting) for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=names, constexprs=constants)
        made = compile(source, target=GPUTarget("cuda", 90, 32))
        assert ".target sm_90" in made.asm["ptx"]
