"""Several GPUs: one model on each (`share`), or one model over all of them (`split`).

    torchrun --nproc-per-node 1 scripts/gpus.py share --samples 256
    torchrun --nproc-per-node 2 scripts/gpus.py share --samples 256
    python scripts/gpus.py split

`share` answers the same demo questions with any number of processes, each with a model of its own
that takes every n-th question. `split` spreads the layers of a LLaVA-1.5 13B evenly over the
GPUs and generates without pruning and with three methods: bfloat16 for time and memory, float32
(the same weights) to compare tokens, also with the same model on one GPU. Weights are random but
for `--model demo`: answers mean nothing.

Both print one line of JSON, and exit with 1 if a check fails. They also run on a CPU (`share` with
gloo, `split` on one device with `--shape tiny`), which is for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState, dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import gather_object, get_balanced_memory
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vlm_prune_ext as vp
from vlm_prune_ext.bench.cases import BEHIND, FRONT, of_shape
from vlm_prune_ext.bench.shapes import random_model
from vlm_prune_ext.demo import questions
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import scenes
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.experiment.measure import now, peak_memory, reset_peak
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import parse_method
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.profiling.grid import Optimization
from vlm_prune_ext.profiling.loading import load_for

SEED = 71  # of the scenes
KEEP = 100  # visual tokens that FastV keeps in `split`
PADDING = 5  # of the second prompt in `split`, on its left


# -- one model per GPU ---------------------------------------------------------------------------
def share(args: argparse.Namespace) -> int:
    """Answer the questions with all processes, and check that each was answered once."""
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        result = _share(args, state)
    finally:
        state.destroy_process_group()
    return 0 if result["complete"] else 1


def _share(args: argparse.Namespace, state: PartialState) -> dict[str, Any]:
    device = state.device
    mine = range(args.samples)[state.process_index :: state.num_processes]
    queries = demo_queries(args.samples, args.max_new_tokens)
    batches = [mine[at : at + args.batch_size] for at in range(0, len(mine), args.batch_size)]
    answerer = _answerer(args, device)
    for warm_up in _one_per_shape(answerer.processor, queries, batches):
        answerer.answer([queries[i] for i in warm_up])

    counts: dict[int, int] = {}
    state.wait_for_everyone()
    start = now(device)
    for batch in batches:
        answers = answerer.answer([queries[i] for i in batch])
        counts |= {i: answer.new_tokens for i, answer in zip(batch, answers, strict=True)}
    own = now(device) - start
    state.wait_for_everyone()
    seconds = now(device) - start

    gathered = gather_object([(own, sorted(counts.items()))])
    answered = sorted(pair for _, pairs in gathered for pair in pairs)
    result = {
        "mode": "share",
        "world": state.num_processes,
        "device": _name(device),
        "samples": args.samples,
        "batch": args.batch_size,
        "method": args.method,
        "model": args.model,
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
        "fast": args.fast,
        "new_tokens": args.max_new_tokens,
        "complete": answered == [(i, args.max_new_tokens) for i in range(args.samples)],
        "rank_seconds": [round(took, 3) for took, _ in gathered],
        "seconds": round(seconds, 3),
        "samples_per_second": round(args.samples / seconds, 3),
    }
    if state.is_main_process:
        print(json.dumps(result), flush=True)
    return result


def demo_queries(count: int, max_new_tokens: int) -> list[Query]:
    """Questions of the demo of all formats, mixed, so that every process gets the same mixture."""
    share = -(-count // len(questions.KINDS))
    cases = [case for kind in questions.KINDS for case in scenes.cases(kind, SEED, share)]
    random.Random(SEED).shuffle(cases)
    return [replace(case.query, max_new_tokens=max_new_tokens) for case in cases[:count]]


def _answerer(args: argparse.Namespace, device: torch.device) -> Answerer:
    method, on_gpu = parse_method(args.method), device.type == "cuda"
    how = Optimization("bf16" if on_gpu else "fp32", None, "fast" if args.fast else None)
    loaded = load_for(args.model, str(device), how)
    model = loaded.model
    # A token that no answer has, so that all answers are equally long.
    model.generation_config.eos_token_id = model.config.get_text_config().vocab_size
    return Answerer(model, loaded.processor, method)


def _one_per_shape(processor: Any, queries: list[Query], batches: list[range]) -> list[range]:
    """A batch of each shape, for what is recorded or chosen the first time; the largest first,
    since memory that has to grow is recorded anew."""
    shapes: dict[torch.Size, range] = {}
    for batch in batches:
        chosen = [queries[i] for i in batch]
        inputs = processor.batch([q.text for q in chosen], [list(q.images) for q in chosen])
        shapes.setdefault(inputs["input_ids"].shape, batch)
    return [shapes[shape] for shape in sorted(shapes, key=torch.Size.numel, reverse=True)]


# -- one model over all GPUs ---------------------------------------------------------------------
@dataclass
class Output:
    """Of one way of generating: ids ``(batch, new)``, tokens that enter each layer, layer ->
    positions that stay, tokens in each layer's cache afterwards, seconds."""

    ids: torch.Tensor
    lengths: list[int]
    kept: dict[int, torch.Tensor]
    cached: list[int]
    seconds: float


def split(args: argparse.Namespace) -> int:
    """Spread a model, generate, and compare."""
    gpus = torch.cuda.device_count()
    first = torch.device("cuda:0" if gpus else "cpu")
    if args.shape == "tiny":
        model = _tiny(first)
    else:
        model = random_model(args.shape, dtype=torch.bfloat16, device=first)
    inputs = _two_prompts(model, args.shape)
    spread = device_map(model, gpus)
    model = dispatch_model(model, spread, skip_keys=model._skip_keys_device_placement)
    layers = [next(layer.parameters()).device for layer in parts_of(model).layers]
    methods = _methods(layers)

    for method in methods.values():  # libraries choose their kernels
        _generate(model, inputs, method, 2)
    _free()
    devices = [torch.device("cuda", i) for i in range(gpus)]
    for device in devices:
        reset_peak(device)
    timed = {name: _generate(model, inputs, m, args.new_tokens) for name, m in methods.items()}
    peaks = [round(peak_memory(device) / 2**30, 2) for device in devices]

    _cast(model, torch.float32)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    over_all = {name: _generate(model, inputs, m, args.new_tokens) for name, m in methods.items()}
    again = _generate(model, inputs, None, args.new_tokens, use_cache=False)
    remove_hook_from_submodules(model)
    model.to(first)
    on_one = {name: _generate(model, inputs, m, args.new_tokens) for name, m in methods.items()}

    checks = {f"{name}_as_on_one_device": _same(over_all[name], on_one[name]) for name in methods}
    checks |= {f"{name}_cache": _cache_fits(out, args.new_tokens) for name, out in timed.items()}
    checks["cached_as_uncached"] = torch.equal(over_all["none"].ids, again.ids)
    checks["keep_all_as_none"] = torch.equal(over_all["fastv-all"].ids, over_all["none"].ids)
    checks["fastv_lengths"] = set(timed["fastv"].lengths[3:]) == {FRONT + KEEP + BEHIND}
    checks["saint_drops"] = timed["saint"].lengths[-1] < timed["saint"].lengths[0]
    if gpus > 1:
        checks["several_devices"] = len(set(layers)) > 1
    result = {
        "mode": "split",
        "shape": args.shape,
        "device": _name(first),
        "layers": Counter(map(str, layers)),
        "batch": 2,
        "new_tokens": args.new_tokens,
        "dtype": "bfloat16",
        # Of whole answers: tower and prefill are in it.
        "tokens_per_second": {
            n: round(2 * args.new_tokens / o.seconds, 2) for n, o in timed.items()
        },
        "last_layer_tokens": {name: out.lengths[-1] for name, out in timed.items() if out.lengths},
        "peak_gib": peaks,
        "checks": checks,
    }
    print(json.dumps(result), flush=True)
    return 0 if all(checks.values()) else 1


def _tiny(device: torch.device) -> Any:
    """As many layers and visual tokens as matter, and hardly a weight."""
    text = LlamaConfig(
        initializer_range=0.2,
        vocab_size=32064,
        hidden_size=64,
        intermediate_size=2048,  # or the embedding would outweigh all layers
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    vision = CLIPVisionConfig(
        initializer_range=0.2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        projection_dim=32,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    model: Any = LlavaForConditionalGeneration(config)
    return model.to(device, torch.bfloat16).eval()


def _two_prompts(model: Any, shape: str) -> dict[str, torch.Tensor]:
    """Two prompts with different pictures, the second shorter and padded on its left."""
    inputs = of_shape(shape, model).batch(2)
    inputs["pixel_values"][1] = inputs["pixel_values"][1].flip(-1)
    inputs["attention_mask"][1, :PADDING] = 0
    return inputs


def device_map(model: Any, gpus: int) -> dict[str, Any]:
    """Module name -> device, as many bytes of weights on each; whole layers only."""
    if not gpus:
        return {"": "cpu"}
    whole = list(model._no_split_modules)
    room = {i: torch.cuda.get_device_properties(i).total_memory for i in range(gpus)}
    room = get_balanced_memory(model, max_memory=room, no_split_module_classes=whole)
    return infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)


def _methods(layers: list[torch.device]) -> Mapping[str, Method | None]:
    """What is run. Of the last, one drop is where one device's layers end (scores come from the
    layer before), the other on the last device."""
    other = next((i for i, device in enumerate(layers) if device != layers[0]), len(layers) // 2)
    return {
        "none": None,
        "fastv": vp.FastV(agg_layer=3, attention_rank=KEEP),
        "fastv-all": vp.FastV(agg_layer=3, attention_rank=1.0),
        "himap": vp.HiMAP(),
        "saint": vp.SAINT(threshold=0.1),  # random keys are not alike
        "himap-boundary": vp.HiMAP(attn_txt_layer=other, attn_img_layer=other + 2),
    }


@torch.inference_mode()
def _generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    method: Method | None,
    new_tokens: int,
    use_cache: bool = True,
) -> Output:
    cache = DynamicCache() if use_cache else None
    device = inputs["input_ids"].device
    with vp.prune(model, method) as trace:
        start = now(device)
        ids = model.generate(
            **inputs,
            past_key_values=cache,
            use_cache=use_cache,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=model.config.get_text_config().vocab_size,  # a token no answer has
            max_new_tokens=new_tokens,
        )
        seconds = now(device) - start
        lengths = list(trace.lengths)
        kept = {layer: places.cpu() for layer, places in trace.kept.items()}
    layers: list[Any] = cache.layers if cache is not None else []
    cached = [layer.keys.shape[-2] for layer in layers]
    return Output(ids[:, inputs["input_ids"].shape[1] :].cpu(), lengths, kept, cached, seconds)


def _same(one: Output, other: Output) -> bool:
    """Whether tokens are the same, and which visual ones stayed."""
    kept = one.kept.keys() == other.kept.keys() and all(
        torch.equal(places, other.kept[layer]) for layer, places in one.kept.items()
    )
    return kept and one.lengths == other.lengths and torch.equal(one.ids, other.ids)


def _cache_fits(out: Output, new_tokens: int) -> bool:
    """Each layer's cache has what entered the layer, and every new token but the last."""
    prompt = out.lengths or [FRONT + 576 + BEHIND] * len(out.cached)
    return out.cached == [length + new_tokens - 1 for length in prompt]


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters only, each where it is; ``model.to`` would also round the rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not valid: an integer of at least 1")
    return number


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("share", help="one model on each GPU; start it with torchrun")
    one.add_argument("--model", default="random:llava-1.5-7b", help="demo, or random:SHAPE")
    one.add_argument("--samples", type=_positive, default=256)
    one.add_argument("--batch-size", type=_positive, default=8)
    one.add_argument("--method", default="fastv:100")
    one.add_argument("--max-new-tokens", type=_positive, default=16)
    one.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="the fast path (default: on a GPU)",
    )
    one.set_defaults(run=share)
    all_of_them = modes.add_parser("split", help="one model over all GPUs")
    all_of_them.add_argument("--shape", default="llava-1.5-13b", help="a LLaVA-1.5 shape, or tiny")
    all_of_them.add_argument("--new-tokens", type=_positive, default=16)
    all_of_them.set_defaults(run=split)
    args = parser.parse_args()
    try:
        return args.run(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
