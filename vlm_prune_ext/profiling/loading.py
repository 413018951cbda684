"""A model in the precision and form that a cell asks for.

``int8`` and ``int4`` are made by bitsandbytes: of two maintained libraries (torchao is the other)
it is the one whose supported interface does both on a CPU and on a GPU, in any floating-point type;
torchao 0.18 has 4 bits on a CPU among its prototypes only, and on a GPU in bfloat16 only or with a
further package. What is quantised: the linear layers inside the language model's layers, which is
nearly all of a model's weights. Embeddings, output head, vision tower and projector stay in 16
bits. ``int8`` is LLM.int8() (row-wise, no outlier columns kept apart), ``int4`` is NF4 in blocks
of 64 (of 32 where a layer's width is no multiple of 64).

``compile`` compiles the MLPs of the decoder layers with inductor, for any number of tokens: they
are most of the arithmetic, hold no state and carry no hook, so that pruned prompts of any length
run in the same compiled code.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.bench.shapes import SHAPES, random_model
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.fast.generate import turn_on_fast
from vlm_prune_ext.models import load, parts_of
from vlm_prune_ext.models.llava import LlavaProcessor, visual_tokens
from vlm_prune_ext.profiling.grid import Optimization

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ATTENTION = {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
_QUANTIZED = ("int8", "int4")
RANDOM = "random:"
"""In front of the name of a shape."""
# T5 reads the type of this layer's weight to choose that of its input.
_KEEP = ("wo",)


@dataclass
class Loaded:
    """A model that is ready to be measured.

    Attributes:
        model, processor: as :func:`vlm_prune_ext.load` returns them.
        optimization: with the precision it really has.
    """

    model: Any
    processor: Any
    optimization: Optimization


def check_optimization(optimization: Optimization, device: str) -> None:
    """Raise InputError where a device or this installation cannot do what is asked for."""
    said = f"--optimization {optimization} cannot be done on {device}: "
    on_gpu = device.startswith("cuda")
    if optimization.kernel == "flash":
        if not on_gpu:
            raise InputError(f"{said}FlashAttention-2 needs a GPU; sdpa and eager run here.")
        if importlib.util.find_spec("flash_attn") is None:
            raise InputError(f'{said}pip install -e ".[flash]" brings flash-attn.')
        if optimization.precision == "fp32":
            raise InputError(f"{said}FlashAttention-2 takes fp16 and bf16 only.")
    if optimization.precision in _QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f'{said}pip install -e ".[profile]" brings bitsandbytes.')
    if optimization.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise InputError(f"{said}this GPU has no bfloat16; fp16 runs here.")
    if optimization.form == "compile" and not on_gpu and not _has_compiler():
        raise InputError(f"{said}a C++ compiler (g++ or clang++) is needed and none is found.")
    if optimization.form == "fast" and not on_gpu:
        raise InputError(f"{said}CUDA graphs need a GPU; compile runs here.")


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def load_for(name: str, device: str, optimization: Optimization, **more: Any) -> Loaded:
    """Load a model.

    Args:
        name: folder, repository or short name; ``"demo"`` is the demo's checkpoint, and
            ``"random:llava-1.5-7b"`` a published shape with random weights.
        device: ``cpu`` or ``cuda:N``.
        optimization: what is asked for.
        more: further arguments of :func:`vlm_prune_ext.load`.

    Raises:
        InputError: whatever :func:`vlm_prune_ext.load` refuses.
    """
    check_name(name)
    if name.startswith(RANDOM):
        return _finished(*_random(name.removeprefix(RANDOM), device, optimization), optimization)
    model, processor = load(
        str(CHECKPOINT) if name == "demo" else name,
        dtype=_dtype(optimization, device),
        device=device,
        attn_implementation=_ATTENTION[optimization.kernel] if optimization.kernel else None,
        fast=optimization.form == "fast",
        **more,
    )
    return _finished(model, processor, optimization)


def check_name(name: str) -> None:
    """Raise InputError where a model with random weights has a shape that is not known."""
    names = [f"{RANDOM}{shape}" for shape in SHAPES if shape.startswith("llava-1.5")]
    if name.startswith(RANDOM) and name not in names:
        raise unknown_name("model", name, names)


def _random(shape: str, device: str, optimization: Optimization) -> tuple[Any, Any]:
    """A LLaVA-1.5 of a published shape with random weights, for speed and energy: its answers mean
    nothing. Prompts and pictures are made by the demo's tokenizer and image processor."""
    half = torch.float32 if device == "cpu" else torch.bfloat16
    model = random_model(
        shape,
        dtype=_dtype(optimization, device) or half,
        device=torch.device(device),
        attn_implementation=_ATTENTION[optimization.kernel or "sdpa"],
    )
    _, demo = load(str(CHECKPOINT), device="cpu")
    token, count = model.config.image_token_id, visual_tokens(model.config)
    processor = LlavaProcessor(model, demo.tokenizer, demo.image_processor, token, count)
    if optimization.form == "fast":
        turn_on_fast(model, parts_of(model))
    return model, processor


def _finished(model: Any, processor: Any, optimization: Optimization) -> Loaded:
    """The model in the form that is asked for, and what its precision is."""
    model.eval()
    precision = optimization.precision
    if precision is None:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        precision = names.get(model.dtype, str(model.dtype))
    elif precision in _QUANTIZED:
        quantize(model, precision)
    if optimization.form == "compile":
        compile_layers(model)
    return Loaded(model, processor, Optimization(precision, optimization.kernel, optimization.form))


def _dtype(optimization: Optimization, device: str) -> torch.dtype | None:
    if optimization.precision in _DTYPES:
        return _DTYPES[optimization.precision]
    on_gpu = device.startswith("cuda")
    half = torch.bfloat16 if not on_gpu or torch.cuda.is_bf16_supported() else torch.float16
    if optimization.precision in _QUANTIZED or optimization.kernel == "flash":
        return half
    return None


def language_layers(model: Any) -> list[nn.Module]:
    """The layers of the language model, decoder and (T5) encoder."""
    if not getattr(model.config, "is_encoder_decoder", False):
        inner = getattr(model, "language_model", None)
        if not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            return list(parts_of(model).layers)
    inner = model.language_model
    return [*inner.encoder.block, *inner.decoder.block]


def quantize(model: Any, precision: str) -> int:
    """Replace the linear layers inside the language model's layers, in place.

    Args:
        model: on its device, in the floating-point type that activations are to have.
        precision: ``int8`` or ``int4``.

    Returns:
        how many were replaced.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels it misses
    count = 0
    for layer in language_layers(model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and name not in _KEEP and _block(child):
                    setattr(module, name, _quantized(child, precision))
                    count += 1
    return count


def _block(linear: nn.Linear) -> int:
    """Weights that share a scale in 4 bits: 64, or 32 in narrow layers; 0: neither fits."""
    return next((size for size in (64, 32) if linear.in_features % size == 0), 0)


def _quantized(linear: nn.Linear, precision: str) -> nn.Module:
    from bitsandbytes import nn as small

    device, dtype = linear.weight.device, linear.weight.dtype
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    # On "meta" no weights are drawn at random that are replaced at once: minutes for 7B.
    if precision == "int8":
        made: Any = small.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0, device="meta")
        made.weight = small.Int8Params(linear.weight.data.cpu(), requires_grad=False)
    else:
        made = small.Linear4bit(
            *sizes,
            compute_dtype=dtype,
            quant_type="nf4",
            compress_statistics=False,
            device="meta",
        )
        made.weight = small.Params4bit(
            linear.weight.data.cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            blocksize=_block(linear),
            module=made,
        )
    made.bias = linear.bias
    return made.to(device).eval()


def compile_layers(model: Any) -> int:
    """Compile the MLPs of the language model's layers, in place; returns how many.

    Raises:
        InputError: they have none that stands by itself (OPT).
    """
    count = 0
    layers: list[Any] = language_layers(model)
    for layer in layers:
        mlp: Any = getattr(layer, "mlp", None)
        if mlp is None and hasattr(layer, "layer"):  # T5
            mlp = layer.layer[-1]
        if mlp is not None:
            mlp.forward = torch.compile(mlp.forward, dynamic=True)
            count += 1
    if not count:
        raise InputError(
            f"--optimization compile cannot be done with {type(model).__name__}: the layers of its "
            "language model have no MLP of their own."
        )
    return count
