"""Tiny random checkpoints in the formats of the published ones, written into a folder.

Weights are random but far from flat: attention has clear favourites in every head, so that a
mistake in a mask, a position or an order changes results visibly.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from vlm_prune_ext.models.clip_text import TextTower

Tensors = dict[str, torch.Tensor]

VOCAB = 480
VISION_WIDTH = 32
VISION_LAYERS = 5
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: ",
    "What colour is the cat? Where is the red square? How many circles are in the picture?",
    "Answer with the option's letter from the given choices directly. A. left B. right C. above",
    "Is there a dog in the image? Please answer yes or no. Describe this image in one sentence.",
    "[INST] A chat between a curious human and an artificial intelligence assistant. [/INST]",
)
QUESTIONS = (
    "What colour is the cat?",
    "Is there a dog in the image? Please answer yes or no.",
    "How many circles are in the picture, and where is the red square?",
    "Describe this image.",
)


# ------------------------------------------------------------------------------- inputs


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """An RGB image with large areas and fine grain, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    areas = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    grain = rng.integers(-40, 41, (height, width, 3))
    return Image.fromarray((np.asarray(areas).astype(int) + grain).clip(0, 255).astype(np.uint8))


def photos(count: int = 3, seed: int = 0) -> list[Image.Image]:
    """Images of different sizes: wide, tall, square, very wide, small."""
    sizes = [(90, 60), (50, 110), (70, 70), (150, 40), (30, 40)]
    return [photo(*sizes[i % len(sizes)], seed=seed + i) for i in range(count)]


# ---------------------------------------------------------------------------- tokenizer


@functools.cache
def tokenizer_bytes() -> bytes:
    """A sentencepiece model with LLaMA's conventions, trained on a few sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, **fields: Any) -> None:
    """`tokenizer.model` and its two JSON files, as LLaMA and Mistral checkpoints have them."""
    names = ["<unk>", "<s>", "</s>"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": n, "special": True, **plain} for i, n in enumerate(names)}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": added,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        **fields,
    }
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    )


@functools.cache
def text_tower() -> TextTower:
    """CLIP's text half beside the towers made here; its tokens are letters."""
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=20,
        bos_token_id=126,
        eos_token_id=127,
        initializer_factor=20.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLIPTextModelWithProjection(config).eval()
        projection = torch.nn.Linear(VISION_WIDTH, config.projection_dim, bias=False)

    def letters(text: str) -> list[int]:
        return [126, *(ord(letter) % 126 for letter in text), 127]

    return TextTower(model, projection, letters)


# ------------------------------------------------------------------------------ weights


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


class _Dice:
    """Random tensors of numbers that bfloat16 and float16 hold exactly, so that one checkpoint
    is the same in every dtype it is stored in or loaded in on the way."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=self.generator) * std + mean
        return value.bfloat16().half().float()


def language_weights(
    *, hidden: int, layers: int, heads: int, kv_heads: int, seed: int = 0, vocab: int = VOCAB
) -> Tensors:
    """A LLaMA or Mistral decoder under its original names; MLP width is twice the hidden size."""
    dice, head_dim = _Dice(seed), hidden // heads
    sharp, even = (2.5 / hidden) ** 0.5, hidden**-0.5
    out: Tensors = {"model.embed_tokens.weight": dice.normal(vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out[at + "self_attn.q_proj.weight"] = dice.normal(heads * head_dim, hidden, std=sharp)
        out[at + "self_attn.k_proj.weight"] = dice.normal(kv_heads * head_dim, hidden, std=sharp)
        out[at + "self_attn.v_proj.weight"] = dice.normal(kv_heads * head_dim, hidden, std=even)
        out[at + "self_attn.o_proj.weight"] = dice.normal(hidden, heads * head_dim, std=even)
        out[at + "mlp.gate_proj.weight"] = dice.normal(2 * hidden, hidden, std=even)
        out[at + "mlp.up_proj.weight"] = dice.normal(2 * hidden, hidden, std=even)
        out[at + "mlp.down_proj.weight"] = dice.normal(hidden, 2 * hidden, std=even / 2)
        out[at + "input_layernorm.weight"] = dice.normal(hidden, std=0.1, mean=1.0)
        out[at + "post_attention_layernorm.weight"] = dice.normal(hidden, std=0.1, mean=1.0)
    out["model.norm.weight"] = dice.normal(hidden, std=0.1, mean=1.0)
    out["lm_head.weight"] = dice.normal(vocab, hidden, std=3 * even)
    return out


def projector_weights(*, hidden: int, seed: int = 0) -> Tensors:
    """The two-layer projector and the newline embedding under their original names."""
    dice = _Dice(seed + 1)
    return {
        "model.mm_projector.0.weight": dice.normal(hidden, VISION_WIDTH, std=VISION_WIDTH**-0.5),
        "model.mm_projector.0.bias": dice.normal(hidden, std=0.1),
        "model.mm_projector.2.weight": dice.normal(hidden, hidden, std=1.5 * hidden**-0.5),
        "model.mm_projector.2.bias": dice.normal(hidden, std=0.1),
        "model.image_newline": dice.normal(hidden),
    }


def tower_weights(*, image_size: int, patch: int, seed: int = 0) -> Tensors:
    """A CLIP vision tower under its published names (`vision_model.` in front)."""
    dice, width = _Dice(seed + 2), VISION_WIDTH
    even = width**-0.5
    out: Tensors = {
        "embeddings.class_embedding": dice.normal(width),
        "embeddings.patch_embedding.weight": dice.normal(width, 3, patch, patch, std=1.0 / patch),
        "embeddings.position_embedding.weight": dice.normal((image_size // patch) ** 2 + 1, width),
        "pre_layrnorm.weight": dice.normal(width, std=0.1, mean=1.0),
        "pre_layrnorm.bias": dice.normal(width, std=0.1),
        "post_layernorm.weight": dice.normal(width, std=0.1, mean=1.0),
        "post_layernorm.bias": dice.normal(width, std=0.1),
    }
    for i in range(VISION_LAYERS):
        at = f"encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            std = (2.0 / width) ** 0.5 if name in ("k_proj", "q_proj") else even
            out[at + f"self_attn.{name}.weight"] = dice.normal(width, width, std=std)
            out[at + f"self_attn.{name}.bias"] = dice.normal(width, std=0.1)
        for name in ("layer_norm1", "layer_norm2"):
            out[at + f"{name}.weight"] = dice.normal(width, std=0.1, mean=1.0)
            out[at + f"{name}.bias"] = dice.normal(width, std=0.1)
        out[at + "mlp.fc1.weight"] = dice.normal(2 * width, width, std=even)
        out[at + "mlp.fc1.bias"] = dice.normal(2 * width, std=0.1)
        out[at + "mlp.fc2.weight"] = dice.normal(width, 2 * width, std=even / 2)
        out[at + "mlp.fc2.bias"] = dice.normal(width, std=0.1)
    return {f"vision_model.{name}": value for name, value in out.items()}


def write_weights(
    folder: Path, weights: Tensors, kind: Literal["safetensors", "bin"], sharded: bool
) -> None:
    """One file, or three shards with an index, named as published checkpoints name them."""
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")

    def write(name: str, tensors: Tensors) -> None:
        if kind == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name)

    if not sharded:
        write(f"{stem}.{ending}", weights)
        return
    names, places = list(weights), {}
    for shard in range(3):
        file = f"{stem}-{shard + 1:05d}-of-00003.{ending}"
        mine = names[shard::3]
        write(file, {name: weights[name] for name in mine})
        places.update(dict.fromkeys(mine, file))
    size = sum(value.numel() * value.element_size() for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / f"{stem}.{ending}.index.json", index)


# ------------------------------------------------------------------------------ configs


def vision_config(image_size: int, patch: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "image_size": image_size,
        "patch_size": patch,
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": VISION_WIDTH,
    }


def preprocessor_config(image_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "size": {"shortest_edge": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        **fields,
    }


def text_config(
    hidden: int, layers: int, heads: int, kv_heads: int, backbone: str = "vicuna"
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if backbone == "mistral":
        config |= {"rope_theta": 1000000.0, "sliding_window": None}
    return config


def _write_tower(
    folder: Path, image_size: int, patch: int, weights: Tensors | None, dtype: torch.dtype
) -> None:
    folder.mkdir()
    write_json(folder / "config.json", vision_config(image_size, patch))
    write_json(folder / "preprocessor_config.json", preprocessor_config(image_size))
    if weights is not None:
        tensors = {name: value.to(dtype) for name, value in weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------- checkpoints


def tiny_original(
    folder: Path | str,
    *,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    image_size: int = 56,
    patch: int = 14,
    seed: int = 0,
    weights: Literal["safetensors", "bin"] = "safetensors",
    sharded: bool = False,
    tower: Literal["inside", "folder"] = "inside",
    dtype: torch.dtype = torch.float32,
    backbone: Literal["vicuna", "mistral"] = "vicuna",
    **config: Any,
) -> Path:
    """An original-format LLaVA-1.5 checkpoint, `(image_size // patch) ** 2` visual tokens.

    Args:
        folder: made if need be.
        tower: where the tower's weights are: with the model's own (`inside`) or in the tower's
            folder; its configuration is in the folder `vision_tower` in any case.
        config: fields of `config.json` that differ from LLaVA-1.5's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = language_weights(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, seed=seed
    )
    tensors |= projector_weights(hidden=hidden, seed=seed)
    if "unpad" not in config.get("mm_patch_merge_type", "flat"):
        del tensors["model.image_newline"]
    vision = tower_weights(image_size=image_size, patch=patch, seed=seed)
    if tower == "inside":
        prefix = "model.vision_tower.vision_tower."
        tensors |= {prefix + name: value for name, value in vision.items()}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    write_weights(folder, tensors, weights, sharded)
    in_folder = None if tower == "inside" else vision
    _write_tower(folder / "vision_tower", image_size, patch, in_folder, dtype)
    mistral = backbone == "mistral"
    fields = {
        **text_config(hidden, layers, heads, kv_heads, backbone),
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava_llama",
        "pretraining_tp": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": tower == "inside",
        "use_mm_proj": True,
        **config,
    }
    write_json(folder / "config.json", fields)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_tokenizer(folder)
    return folder


def grid_pinpoints(image_size: int) -> list[list[int]]:
    """The tilings that LLaVA-1.6 knows, for another tile size."""
    tilings = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    return [[across * image_size, down * image_size] for across, down in tilings]


def tiny_next(
    folder: Path | str,
    backbone: Literal["vicuna", "mistral"] = "vicuna",
    format: Literal["hf", "original"] = "hf",
    *,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    image_size: int = 56,
    patch: int = 14,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A LLaVA-NeXT (1.6) checkpoint; both formats of one seed hold the same weights.

    The mistral backbone has half as many key/value heads as query heads.
    """
    kv_heads = heads // 2 if backbone == "mistral" else heads
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads}
    if format == "original":
        return tiny_original(
            folder,
            **sizes,
            image_size=image_size,
            patch=patch,
            seed=seed,
            backbone=backbone,
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            image_grid_pinpoints=grid_pinpoints(image_size),
            **options,
        )
    return _tiny_hf(folder, backbone, True, sizes, image_size, patch, seed, **options)


def tiny_hf_llava(
    folder: Path | str,
    *,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    image_size: int = 56,
    patch: int = 14,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A LLaVA-1.5 checkpoint in Hugging Face format; weights equal `tiny_original`'s.

    As the published ones it has `<image>` and `<pad>` behind the original vocabulary, and rows
    that no token uses behind these.
    """
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads}
    return _tiny_hf(folder, "vicuna", False, sizes, image_size, patch, seed, dtype=dtype)


def _tiny_hf(
    folder: Path | str,
    backbone: str,
    anyres: bool,
    sizes: dict[str, int],
    image_size: int,
    patch: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = text_config(**sizes, backbone=backbone) | {"vocab_size": VOCAB + 8}
    text["model_type"] = "mistral" if backbone == "mistral" else "llama"
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision_config(image_size, patch),
        "image_token_index": VOCAB,
        "pad_token_id": VOCAB + 1,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    if anyres:
        pinpoints = [[h, w] for w, h in grid_pinpoints(image_size)]
        config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        model: Any = LlavaNextForConditionalGeneration(config)
    else:
        config = LlavaConfig(**common, image_seq_length=(image_size // patch) ** 2)
        model = LlavaForConditionalGeneration(config)
    model.load_state_dict(_hf_names(sizes, image_size, patch, seed, anyres))
    model.to(dtype).save_pretrained(folder)
    _write_hf_processor(folder, backbone, anyres, image_size, patch)
    return folder


def _hf_names(
    sizes: dict[str, int], image_size: int, patch: int, seed: int, newline: bool
) -> Tensors:
    """The same weights under the names of transformers' modules, vocabulary grown by 8 rows."""
    out: Tensors = {}
    language = language_weights(**sizes, seed=seed)
    # The new rows score as `<unk>` does, so they never come out on top.
    head = language.pop("lm_head.weight")
    out["lm_head.weight"] = torch.cat([head, head[:1].expand(8, -1)])
    table = language.pop("model.embed_tokens.weight")
    grown = torch.cat([table, table[:8]])
    out["model.language_model.embed_tokens.weight"] = grown
    for name, value in language.items():
        out[name.replace("model.", "model.language_model.", 1)] = value
    projector = projector_weights(hidden=sizes["hidden"], seed=seed)
    line = projector.pop("model.image_newline")
    if newline:
        out["model.image_newline"] = line
    for name, value in projector.items():
        layer = {"0": "linear_1", "2": "linear_2"}[name.split(".")[2]]
        out[f"model.multi_modal_projector.{layer}.{name.split('.')[3]}"] = value
    for name, value in tower_weights(image_size=image_size, patch=patch, seed=seed).items():
        out["model.vision_tower." + name.removeprefix("vision_model.")] = value
    return out


CHAT_TEMPLATES = {
    "vicuna": (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for content in message['content'] if content['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for content in message['content'] if content['type'] == 'text' %}"
        "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
        "{% for content in message['content'] if content['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for content in message['content'] if content['type'] == 'text' %}"
        "{{ content['text'] }}{% endfor %} [/INST]{% else %}"
        "{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
    ),
}


def _write_hf_processor(
    folder: Path, backbone: str, anyres: bool, image_size: int, patch: int
) -> None:
    from transformers import (
        AddedToken,
        CLIPImageProcessor,
        LlamaTokenizer,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    write_tokenizer(folder, padding_side="left")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    fields = preprocessor_config(image_size)
    del fields["image_processor_type"]
    images: Any
    if anyres:
        pinpoints = [[h, w] for w, h in grid_pinpoints(image_size)]
        images = LlavaNextImageProcessor(**fields, image_grid_pinpoints=pinpoints)
    else:
        images = CLIPImageProcessor(**fields)
    kind: Any = LlavaNextProcessor if anyres else LlavaProcessor
    processor = kind(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATES[backbone],
    )
    processor.save_pretrained(folder)


def tiny_bare_llama(
    *, layers: int = 6, hidden: int = 64, heads: int = 4, kv_heads: int = 4, seed: int = 0
) -> Any:
    """A live `LlamaForCausalLM` with the weights of `tiny_original`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**text_config(hidden, layers, heads, kv_heads)))
    model.load_state_dict(
        language_weights(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, seed=seed)
    )
    return model.eval()


# ------------------------------------------------------------------------ llava package


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder: the `llava` package takes a tower's name for a path from there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def llava_package_model(folder: Path) -> tuple[Any, Any, Any]:
    """`(tokenizer, model, image_processor)` of an original-format checkpoint whose tower has its
    own folder, loaded in float32 by the `llava` package (which must be installed)."""
    from llava.model.builder import load_pretrained_model

    name = "llava-mistral" if "Mistral" in (folder / "config.json").read_text() else "llava"
    with inside(folder):
        tokenizer, model, images, _ = load_pretrained_model(
            str(folder), None, name, device_map="cpu", device="cpu"
        )
    return tokenizer, model.float().eval(), images
