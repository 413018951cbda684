"""Trains the demo model from nothing: `python -m vlm_prune_ext.demo.train --out DIR`.

The result is a LLaVA-1.5 checkpoint in the original format, small enough to live in the package: a
CLIP-style tower with 24 x 24 patches, a two-layer projector and a 12-layer LLaMA. Two stages, both
resumable, with what they follow written to a JSON-lines log:

1. `tower`: each patch learns to say what it is part of (dense labels are free: we drew the scene).
   The heads that say so are dropped afterwards; the features stay.
2. `language`: projector and language model learn to answer. The tower is frozen, so its features
   are computed once per scene and kept. Many questions share one image prefix: each sees the prefix
   and itself, at the positions it would have if it stood alone.

What makes this affordable on one CPU core: bfloat16 matrix units; object patches plus a random part
of the background stand in for all 576 tokens until the last phase; and one extra loss term that
tells the last prompt token, at the third decoder layer, which patches the question is about. That
term is also why attention-based pruning has something to go by in so small a model; it takes the
place of the long training that gives large models the same habit.

The shipped weights took 74 minutes on one core of an AMD EPYC (Zen 5) and followed
`training/log.jsonl`. Its notes say where the recipe was changed while they were being trained; this
file has the recipe as it was at the end, not yet run from start to finish in this form.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import questions as qa
from .drawing import (
    COLORS,
    FIRST_TRAINING_SEED,
    GRID,
    IMAGE_SIZE,
    MAX_OBJECTS,
    PATCH,
    RADII,
    SHAPES,
    TEXTS,
    Scene,
    draw,
    make_scene,
)

PATCHES = GRID * GRID
IGNORE = -100

SYSTEMS = {
    "llava": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    "vlmeval": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    ),
    "bare": "",
}
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
CAPTION_PROMPTS = (
    "Provide a one-sentence caption for the provided image.",
    # VLMEvalKit's, with the space it ends in.
    "Please describe this image in general. Directly provide the description, do not include "
    'prefix like "This image depicts". ',
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vision_width: int = 128
    vision_mlp: int = 384
    vision_layers: int = 5
    vision_heads: int = 4
    width: int = 128
    mlp: int = 384
    layers: int = 12
    heads: int = 4
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    context: int = 2048


SHAPE = Shape()

# ----------------------------------------------------------------------------- prompts


def image_prefix(form: str) -> str:
    """What stands before `<image>`, as LLaVA (or VLMEvalKit's LLaVA) assembles it."""
    return SYSTEMS[form] + ("USER:  " if form == "vlmeval" else "USER: ")


def after_image(form: str, text: str) -> str:
    """What stands after `<image>`, up to where the answer begins."""
    return f" {text} ASSISTANT: " if form == "vlmeval" else f"\n{text} ASSISTANT:"


def word_choice(question: qa.Question, style: int) -> str:
    """A multiple-choice question as LLaVA (0), VLMEvalKit's data sets (1) or lmms-eval (2) ask."""
    lines = [f"{letter}. {o}" for letter, o in zip(qa.LETTERS, question.options, strict=True)]
    listed = "\n".join(lines)
    if style == 0:
        return f"{question.text}\n{listed}{LETTER_SUFFIX}"
    if style == 1:
        return (
            f"Question: {question.text}\nOptions:\n{listed}\n"
            "Please select the correct answer from the options above. \n"
        )
    return f"{question.text} There are several options:\n{listed}\n{LETTER_SUFFIX}"


def word_question(question: qa.Question, kind: str, rng: np.random.Generator) -> str:
    """The user's text in one of the wordings that evaluation frameworks use for `kind`."""
    if kind == "mcq":
        return word_choice(question, int(rng.choice(3, p=(0.5, 0.25, 0.25))))
    if kind == "caption":
        return CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
    if kind == "yn":
        suffix = (qa.YES_NO_SUFFIX, WORD_SUFFIX, qa.YES_NO_SUFFIX + WORD_SUFFIX)
        return question.text + suffix[int(rng.integers(3))]
    # A minority without the suffix, as a person at a prompt would type.
    return question.text + (WORD_SUFFIX if rng.random() < 0.85 else "")


# ----------------------------------------------------------------------------- tokenizer


def tokenizer_text() -> Iterator[str]:
    """Sentences that hold each word the model will meet, in about their real proportions."""
    rng = np.random.default_rng(7)
    for form in SYSTEMS:
        for _ in range(40):
            yield image_prefix(form)
    for seed in range(1500):
        scene = make_scene(FIRST_TRAINING_SEED + seed)
        yield scene.caption
        for kind in qa.KINDS:
            question = random_question(scene, kind, rng)
            if question is not None:
                text = after_image("llava", word_question(question, kind, rng))
                yield from (line for line in text.split("\n") if line)
                yield question.answer


def train_tokenizer() -> bytes:
    """A LLaMA-style sentencepiece model: BPE with byte fallback, `<unk>`, `<s>`, `</s>` first."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(),
        model_writer=model,
        model_type="bpe",
        vocab_size=960,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def random_question(
    scene: Scene, kind: str, rng: np.random.Generator, more_position: float = 0.0
) -> qa.Question | None:
    """A training question, or `None` where the scene does not allow the one that was drawn.

    `more_position` is the share of questions that are about positions whatever else is drawn.
    """
    if kind == "caption":
        return qa.caption_question(scene)
    if more_position and rng.random() < more_position:
        if kind == "yn":
            return qa.yes_no_question(scene, "position", bool(rng.integers(2)), rng)
        if kind == "vqa":
            return qa.open_question(scene, "position", rng)
        return qa.choice_question(scene, "position", qa.LETTERS[int(rng.integers(4))], rng)
    if kind == "yn":
        category = str(rng.choice(tuple(qa.YES_NO_QUESTIONS), p=(0.36, 0.16, 0.16, 0.16, 0.16)))
        return qa.yes_no_question(scene, category, bool(rng.integers(2)), rng)
    category = str(rng.choice(tuple(qa.OPEN_QUESTIONS)))
    if kind == "mcq":
        return qa.choice_question(scene, category, qa.LETTERS[int(rng.integers(4))], rng)
    return qa.open_question(scene, category, rng)


# ----------------------------------------------------------------------------- tower


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention in plain matrix products; `bias` is added to the scores.

    For heads this small and sequences this short, PyTorch's fused CPU kernel is the slower one: its
    backward pass does not use the bfloat16 matrix units.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


class VisionLayer(nn.Module):
    """CLIP's encoder layer: pre-norm attention and an MLP (with SiLU: one fast kernel)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.vision_width
        self.heads = shape.vision_heads
        self.layer_norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, shape.vision_mlp)
        self.fc2 = nn.Linear(shape.vision_mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)` in and out."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.layer_norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.silu(self.fc1(self.layer_norm2(x))))


class Tower(nn.Module):
    """CLIP's vision transformer; trainable on a subset of its patches."""

    def __init__(self, shape: Shape = SHAPE) -> None:
        super().__init__()
        width = shape.vision_width
        self.patch_embedding = nn.Linear(3 * PATCH * PATCH, width, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(PATCHES + 1, width) * 0.02)
        self.pre_layrnorm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(VisionLayer(shape) for _ in range(shape.vision_layers))
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, patches: Tensor, indices: Tensor | None = None) -> Tensor:
        """Features that LLaVA selects: patches of the second-to-last layer's output.

        `patches`: `(batch, n, 588)` normalised pixels in channel, row, column order; `indices`:
        `(batch, n)` where they are in the grid, `None` for all 576 in order.
        """
        batch = patches.shape[0]
        x = self.patch_embedding(patches)
        place = (
            self.position_embedding[1:] if indices is None else self.position_embedding[indices + 1]
        )
        head = (self.class_embedding + self.position_embedding[0]).expand(batch, 1, -1)
        x = self.pre_layrnorm(torch.cat([head.to(x.dtype), x + place], dim=1))
        for layer in self.layers[:-1]:
            x = layer(x)
        return x[:, 1:]

    def huggingface_state(self) -> dict[str, Tensor]:
        """The weights under the names of `transformers.CLIPVisionModel`."""
        state: dict[str, Tensor] = {}
        root = "vision_model."
        width = self.class_embedding.shape[0]
        state[root + "embeddings.class_embedding"] = self.class_embedding
        state[root + "embeddings.position_embedding.weight"] = self.position_embedding
        state[root + "embeddings.patch_embedding.weight"] = self.patch_embedding.weight.view(
            width, 3, PATCH, PATCH
        )
        for name in ("pre_layrnorm", "post_layernorm"):
            for part in ("weight", "bias"):
                state[f"{root}{name}.{part}"] = getattr(getattr(self, name), part)
        for i, child in enumerate(self.layers):
            layer: Any = child
            base = f"{root}encoder.layers.{i}."
            for part in ("weight", "bias"):
                q, k, v = getattr(layer.qkv, part).chunk(3)
                for name, value in (("q", q), ("k", k), ("v", v)):
                    state[f"{base}self_attn.{name}_proj.{part}"] = value
                state[f"{base}self_attn.out_proj.{part}"] = getattr(layer.out_proj, part)
                for name in ("layer_norm1", "layer_norm2"):
                    state[f"{base}{name}.{part}"] = getattr(getattr(layer, name), part)
                for name in ("fc1", "fc2"):
                    state[f"{base}mlp.{name}.{part}"] = getattr(getattr(layer, name), part)
        return state


# ----------------------------------------------------------------------------- language model


class RMSNorm(nn.Module):
    """LLaMA's norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any `(..., width)`."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in LLaMA's half-split form; `x` is `(batch, heads, tokens, dim)`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class DecoderLayer(nn.Module):
    """LLaMA's decoder layer; query, key and value share one matrix, as do gate and up."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.input_layernorm = RMSNorm(shape.width, shape.rms_eps)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.rms_eps)
        self.gate_up = nn.Linear(shape.width, 2 * shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.width, bias=False)

    def heads_of(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values, each `(batch, heads, tokens, dim)`."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.input_layernorm(x))
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer, once attention has mixed the values."""
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class Llava(nn.Module):
    """Projector and language model over ready-made tower features."""

    def __init__(self, vocabulary: int, shape: Shape = SHAPE) -> None:
        super().__init__()
        self.shape = shape
        self.projector_in = nn.Linear(shape.vision_width, shape.width)
        self.projector_out = nn.Linear(shape.width, shape.width)
        self.embed_tokens = nn.Embedding(vocabulary, shape.width)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.rms_eps)
        self.lm_head = nn.Linear(shape.width, vocabulary, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def project(self, features: Tensor) -> Tensor:
        """Tower features to the width of the language model."""
        return self.projector_out(F.gelu(self.projector_in(features)))

    def llava_state(self) -> dict[str, Tensor]:
        """The weights under the names of an original LLaVA checkpoint."""
        state = {
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.lm_head.weight,
        }
        for index, linear in ((0, self.projector_in), (2, self.projector_out)):
            state[f"model.mm_projector.{index}.weight"] = linear.weight
            state[f"model.mm_projector.{index}.bias"] = linear.bias
        for i, child in enumerate(self.layers):
            layer: Any = child
            base = f"model.layers.{i}."
            q, k, v = layer.qkv.weight.chunk(3)
            gate, up = layer.gate_up.weight.chunk(2)
            named = {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": layer.o_proj.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.down_proj.weight,
                "input_layernorm": layer.input_layernorm.weight,
                "post_attention_layernorm": layer.post_attention_layernorm.weight,
            }
            state |= {f"{base}{name}.weight": value for name, value in named.items()}
        return state


# ----------------------------------------------------------------------------- checkpoint

DESCRIPTION = (
    "A demonstration model of vlm_prune_ext, trained from nothing on synthetic scenes (coloured "
    "shapes, drawn digits and words) and on questions about them. It answers those questions and "
    "nothing else; it is no general assistant. Made by vlm_prune_ext/demo/train.py."
)


def _llava_config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    return {
        "description": DESCRIPTION,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.context,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": shape.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "tokenizer_model_max_length": shape.context,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def _tower_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "hidden_act": "silu",
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": shape.vision_width,
        "torch_dtype": "bfloat16",
    }


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "feature_extractor_type": "CLIPFeatureExtractor",
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "size": {"shortest_edge": IMAGE_SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def _special(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    names = ("<unk>", "<s>", "</s>")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {
            str(i): {**_special(name), "special": True} for i, name in enumerate(names)
        },
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": shape.context,
        "padding_side": "right",
        "sp_model_kwargs": {},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, state: dict[str, Tensor]) -> None:
    ready = {k: v.detach().to("cpu", torch.bfloat16).contiguous().clone() for k, v in state.items()}
    part = path.with_suffix(".part")
    save_file(ready, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(path)


def save_checkpoint(folder: Path, tokenizer: bytes, tower: Tower, model: Llava) -> None:
    """Write all files of the checkpoint; weights are replaced in one step each."""
    shape = model.shape
    vision = folder / "vision_tower"
    vision.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _llava_config(shape, model.lm_head.out_features))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
    )
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    _write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": _special("<s>"),
            "eos_token": _special("</s>"),
            "unk_token": _special("<unk>"),
            "pad_token": "<unk>",
        },
    )
    (folder / "tokenizer.model").write_bytes(tokenizer)
    _write_json(vision / "config.json", _tower_config(shape))
    _write_json(vision / "preprocessor_config.json", _PREPROCESSOR)
    for place, state in ((folder, model.llava_state()), (vision, tower.huggingface_state())):
        _write_weights(place / "model.safetensors", state)


# ----------------------------------------------------------------------------- optimiser and log


class Optimiser:
    """Muon for the matrices inside the layers, AdamW for the rest, over float32 master weights.

    The model itself is bfloat16: on a CPU with bfloat16 units that is several times faster than
    float32, and keeping masters loses nothing of small updates.
    """

    def __init__(self, module: nn.Module, matrix_lr: float, other_lr: float) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.live = [p for _, p in named]
        self.master = [nn.Parameter(p.detach().float().clone()) for p in self.live]
        pairs = [(name, master) for (name, _), master in zip(named, self.master, strict=True)]
        inner = [m for n, m in pairs if m.ndim == 2 and "layers." in n]
        outer = [m for n, m in pairs if not (m.ndim == 2 and "layers." in n)]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
            torch.optim.Muon(
                inner, lr=matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
        ]
        self.peaks = [group["lr"] for o in self.optimisers for group in o.param_groups]

    def step(self, scale: float) -> float:
        """One update at `scale` times the peak rates; returns the norm of the gradient."""
        for master, live in zip(self.master, self.live, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.master, 1.0))
        groups = [group for o in self.optimisers for group in o.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        for optimiser in self.optimisers:
            optimiser.step()
        with torch.no_grad():
            for master, live in zip(self.master, self.live, strict=True):
                live.copy_(master)
        return norm

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "master": [m.detach() for m in self.master],
            "optimisers": [o.state_dict() for o in self.optimisers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """The opposite of `state`; sets the live weights as well."""
        with torch.no_grad():
            for master, live, saved in zip(self.master, self.live, state["master"], strict=True):
                master.copy_(saved)
                live.copy_(saved)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def rate(progress: float, floor: float = 0.02) -> float:
    """Warm-up over 2 % of the time, flat to 40 %, then a cosine to `floor`."""
    if progress < 0.02:
        return max(progress, 0.001) / 0.02
    if progress < 0.4:
        return 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.4) / 0.6)))


class Log:
    """Appends one JSON object per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **record: Any) -> None:
        """Write and print one record."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")
        print(json.dumps(rounded), flush=True)


def save_state(path: Path, **state: Any) -> None:
    """Write a resume file in one step."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


# ----------------------------------------------------------------------------- stage 1: tower

# What each patch of an object is asked, and how many answers there are. `offset` is the way to the
# object's centre, in patches, and the one thing learnt by regression.
PATCH_HEADS = {
    "kind": 3,
    "color": len(COLORS),
    "shape": len(SHAPES),
    "size": len(RADII),
    "text": len(TEXTS),
    "rank": MAX_OBJECTS,
    "quadrant": len(qa.QUADRANTS),
    "offset": 2,
}
_HEAD_WEIGHTS = {"rank": 0.5, "quadrant": 0.3, "size": 0.3, "offset": 0.3}


def pixels_to_patches(pixels: np.ndarray) -> np.ndarray:
    """`(336, 336, 3)` uint8 to `(576, 588)` uint8, each patch in channel, row, column order."""
    grid = pixels.reshape(GRID, PATCH, GRID, PATCH, 3)
    return grid.transpose(0, 2, 4, 1, 3).reshape(PATCHES, 3 * PATCH * PATCH)


def normalise(patches: Tensor) -> Tensor:
    """What CLIP's image processor does to an image that already has the right size."""
    mean = torch.tensor(IMAGE_MEAN).repeat_interleave(PATCH * PATCH) * 255
    std = torch.tensor(IMAGE_STD).repeat_interleave(PATCH * PATCH) * 255
    scaled = (patches.float() - mean.to(patches.device)) / std.to(patches.device)
    return scaled.to(torch.bfloat16)


def patch_labels(scene: Scene, owners: np.ndarray) -> dict[str, np.ndarray]:
    """What each of the 576 patches should say; `IGNORE` where it has nothing to say."""
    labels = {
        name: np.full(PATCHES, IGNORE, dtype=np.int64) for name in PATCH_HEADS if name != "offset"
    }
    labels["kind"] = (owners > 0) + 2 * (owners < 0).astype(np.int64)
    labels["offset"] = np.zeros((PATCHES, 2), dtype=np.float32)
    for rank, item in enumerate(scene.objects):
        mine = np.flatnonzero(owners == rank + 1)
        labels["color"][mine] = list(COLORS).index(item.color)
        labels["shape"][mine] = SHAPES.index(item.shape)
        labels["size"][mine] = list(RADII).index(item.size)
        labels["rank"][mine] = rank
        if item.quadrant:
            labels["quadrant"][mine] = qa.QUADRANTS.index(item.quadrant)
        labels["offset"][mine, 0] = item.x / PATCH - (mine % GRID + 0.5)
        labels["offset"][mine, 1] = item.y / PATCH - (mine // GRID + 0.5)
    if scene.text is not None:
        labels["text"][owners < 0] = TEXTS.index(scene.text.text)
    return labels


def choose_patches(owners: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """`keep` patches in grid order: all that belong to something, their neighbours, then any."""
    owned = (owners != 0).reshape(GRID, GRID)
    near = owned.copy()
    near[1:] |= owned[:-1]
    near[:-1] |= owned[1:]
    near[:, 1:] |= near[:, :-1].copy()
    near[:, :-1] |= near[:, 1:].copy()
    priority = owned.ravel() * 2.0 + near.ravel() + rng.random(PATCHES)
    return np.sort(np.argpartition(-priority, keep - 1)[:keep])


class TowerBatches(torch.utils.data.IterableDataset):
    """Endless batches of fresh training scenes, cut into patches, with their labels."""

    def __init__(self, batch: int, keep: int, start: int) -> None:
        self.batch, self.keep, self.start = batch, keep, start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Each worker walks its own seeds."""
        worker = torch.utils.data.get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        seed = self.start + offset
        while True:
            rows = []
            for _ in range(self.batch):
                rows.append(self._row(seed))
                seed += step
            yield {key: torch.from_numpy(np.stack([r[key] for r in rows])) for key in rows[0]}

    def _row(self, seed: int) -> dict[str, np.ndarray]:
        scene = make_scene(seed)
        pixels, owners = draw(scene)
        indices = np.arange(PATCHES)
        if self.keep < PATCHES:
            indices = choose_patches(owners, self.keep, np.random.default_rng(seed))
        labels = patch_labels(scene, owners)
        row = {name: value[indices] for name, value in labels.items()}
        return {"patches": pixels_to_patches(pixels)[indices], "indices": indices, **row}


def batches(dataset: torch.utils.data.IterableDataset, workers: int) -> Iterator[Any]:
    """Batches made by `workers` processes, or in this one if 0."""
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))


def tower_loss(outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the patch heads' losses, and each head's accuracy."""
    total = outputs.new_zeros(())
    scores: dict[str, float] = {}
    for (name, _), part in zip(
        PATCH_HEADS.items(), outputs.float().split(list(PATCH_HEADS.values()), dim=-1), strict=True
    ):
        target = batch[name]
        if name == "offset":
            mine = batch["color"] != IGNORE
            loss = F.smooth_l1_loss(part[mine], target[mine])
            scores[name] = float(loss.detach())
        else:
            known = target != IGNORE
            loss = F.cross_entropy(part[known], target[known]) if known.any() else total * 0
            hits = part[known].argmax(-1) == target[known]
            scores[name] = float(hits.float().mean())
        total = total + _HEAD_WEIGHTS.get(name, 1.0) * loss
    return total, scores


@dataclass
class Run:
    """What both stages need to know."""

    out: Path
    work: Path
    device: torch.device
    workers: int
    log: Log
    started: float = field(default_factory=time.monotonic)


def train_tower(run: Run, minutes: float) -> Tower:
    """Stage 1. The last fifth of the time sees whole images."""
    torch.manual_seed(1)
    tower = Tower()
    heads = nn.Linear(SHAPE.vision_width, sum(PATCH_HEADS.values()))
    both = nn.ModuleDict({"tower": tower, "heads": heads}).to(run.device, torch.bfloat16)
    optimiser = Optimiser(both, matrix_lr=4e-3, other_lr=2e-3)
    path = run.work / "tower.pt"
    step, seen, spent = 0, 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        optimiser.load(saved["optimiser"])
        step, seen, spent = saved["step"], saved["seen"], saved["spent"]
    budget = minutes * 60
    phases = ((0.8, 144, 32), (1.0, PATCHES, 16))
    last_save = spent
    for until, keep, size in phases:
        if spent >= until * budget:
            continue
        source = batches(
            TowerBatches(size, keep, FIRST_TRAINING_SEED + 1_000_000 + seen), run.workers
        )
        while spent < until * budget:
            begun = time.monotonic()
            batch = {k: v.to(run.device) for k, v in next(source).items()}
            features = tower(normalise(batch["patches"]), batch["indices"])
            loss, scores = tower_loss(heads(features), batch)
            loss.backward()
            norm = optimiser.step(rate(spent / budget))
            step, seen, spent = step + 1, seen + size, spent + time.monotonic() - begun
            if step % 50 == 0:
                run.log.write(
                    stage="tower",
                    step=step,
                    images=seen,
                    seconds=spent,
                    tokens=keep,
                    loss=float(loss.detach()),
                    norm=norm,
                    **scores,
                )
            if spent - last_save > 60 or spent >= budget:
                last_save = spent
                save_state(
                    path,
                    optimiser=optimiser.state(),
                    step=step,
                    seen=seen,
                    spent=spent,
                    weights=both.state_dict(),
                )
    return tower.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- stage 2: language

# The decoder layer whose last-prompt-token attention FastV(agg_layer=3) ranks the tokens by.
LOOK_LAYER = 2
# Multiple choice in two steps: after this layer the plain answer must be readable, ...
ANSWER_LAYER = 6
# ... and at this one the last prompt token looks at the option that says the same, whose words
# have looked up their letter before.
CHOICE_LAYER = 8
LETTER_LAYER = 4


@dataclass(frozen=True)
class Group:
    """`slots` questions of `kinds` per image, each padded to `length` tokens."""

    slots: int
    length: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """One step of the curriculum.

    `until` is a share of the stage's time, `tokens` how many of the 576 visual tokens a row has,
    `full_prompts` whether questions come in the frameworks' wording or bare, `drop` how often the
    visual tokens are cut before layer 3 as FastV would, `look` the weight of the attention term,
    `more_position` the share of questions given to what is learnt last.
    """

    until: float
    rows: int
    tokens: int
    full_prompts: bool
    drop: float
    look: float
    groups: tuple[Group, ...]
    more_position: float = 0.0


PHASES = (
    Phase(0.15, 10, 96, False, 0.0, 0.5, (Group(14, 24, ("vqa", "yn")), Group(2, 44, ("mcq",)))),
    Phase(
        0.35,
        10,
        96,
        False,
        0.0,
        0.4,
        (Group(10, 24, ("vqa", "yn")), Group(4, 44, ("mcq",)), Group(2, 44, ("caption",))),
    ),
    Phase(
        0.72,
        12,
        112,
        True,
        0.0,
        0.3,
        (Group(8, 40, ("vqa", "yn")), Group(4, 62, ("mcq",)), Group(2, 54, ("caption",))),
    ),
    Phase(
        1.01,
        8,
        PATCHES,
        True,
        0.6,
        0.2,
        (Group(8, 40, ("vqa", "yn")), Group(6, 62, ("mcq",)), Group(1, 54, ("caption",))),
        more_position=0.3,
    ),
)


class Encoder:
    """Text to token ids, piece by piece as LLaVA's `tokenizer_image_token` does."""

    def __init__(self, model: bytes) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.known: dict[str, list[int]] = {}
        self.blank = self.sp.piece_to_id("\u2581")

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, without `<s>`."""
        ids = self.known.get(text)
        if ids is None:
            ids = self.known[text] = self.sp.encode(text)
        return ids


@dataclass
class Slot:
    """One question, tokenised.

    `look` holds, for each place that has one, the position and the owners of the patches it should
    look at; `choice` the positions of the right option's words; `plain` up to two tokens of the
    answer in plain words (none if there is nothing to read off half-way).
    """

    ids: list[int]
    start: int
    kind: str
    look: list[tuple[int, tuple[int, ...]]]
    choice: tuple[int, int] | None
    plain: tuple[int, ...]


def make_slot(
    encode: Encoder, scene: Scene, kind: str, form: str, phase: Phase, rng: np.random.Generator
) -> Slot:
    """A random question of `kind` about `scene`."""
    question = None
    while question is None:
        question = random_question(scene, kind, rng, phase.more_position)
    if phase.full_prompts:
        text = word_question(question, kind, rng)
    elif kind == "mcq":
        text = word_choice(question, 0).removesuffix(LETTER_SUFFIX)
    else:
        text = question.text
    prompt = encode(after_image(form, text))
    # Tokenizers differ in whether a piece that begins with a space gets a blank token as well.
    skip = int(form == "vlmeval" and prompt[0] == encode.blank and rng.random() < 0.5)
    prompt = prompt[skip:]
    answer = encode(question.answer)
    ids = prompt + answer + [2]
    last = len(prompt) - 1
    look = [(last, question.owners)]
    choice, plain = None, answer
    if kind == "mcq":
        right = question.options[qa.LETTERS.index(question.answer)]
        plain = encode(right)
        before = after_image(form, text).split(f"\n{question.answer}. ")[0]
        first = len(encode(before)) - skip + 3  # the newline, the letter, the full stop
        choice = (first, first + len(encode(right)))
    elif kind == "caption":
        plain = []
        look += _caption_looks(scene, last)
    elif kind == "yn":
        plain = _true_place(encode, question)
    elif len(answer) > 1:
        look.append((last + 1, question.owners))
    return Slot(ids, len(prompt), kind, look, choice, tuple(plain[:2]))


def _true_place(encode: Encoder, question: qa.Question) -> list[int]:
    """For `Is ... in the left half?`: the half it really is in."""
    if question.category != "position":
        return []
    place = question.text.split()[-5]
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    return encode(place if question.answer == "Yes" else opposite[place])


def _caption_looks(scene: Scene, last: int) -> list[tuple[int, tuple[int, ...]]]:
    """Where to look while writing `a red circle, ...`: each token is predicted one place before."""
    looks: list[tuple[int, tuple[int, ...]]] = []
    place = last
    count = len(scene.objects)
    for rank in range(count):
        # Article, colour and shape are three tokens; what comes between is one (`,` or `and`).
        looks += [(place + step, (rank + 1,)) for step in range(3) if place + step > last]
        place += 4
    return looks


class Scenes:
    """Training scenes with their tower features, computed once."""

    def __init__(self, tower: Tower, count: int, first_seed: int, device: torch.device) -> None:
        self.scenes: list[Scene] = []
        self.owners = np.zeros((count, PATCHES), dtype=np.int8)
        width = SHAPE.vision_width
        self.features = torch.zeros(count, PATCHES, width, dtype=torch.bfloat16)
        self.tower, self.device, self.first_seed = tower, device, first_seed

    def save(self, path: Path) -> None:
        """Keep features and owners, for a resumed run."""
        save_state(path, features=self.features, owners=self.owners)

    def load(self, path: Path) -> None:
        """Take up what `save` kept; the scenes themselves follow from their seeds."""
        saved = torch.load(path, weights_only=False)
        self.features, self.owners = saved["features"], saved["owners"]
        self.scenes = [make_scene(self.first_seed + i) for i in range(len(self.owners))]

    def add(self, count: int) -> None:
        """Draw `count` more scenes, in batches of 16."""
        for _ in range(0, count, 16):
            start = len(self.scenes)
            size = min(16, len(self.owners) - start)
            if size <= 0:
                return
            pixels = []
            for i in range(start, start + size):
                self.scenes.append(make_scene(self.first_seed + i))
                image, self.owners[i] = draw(self.scenes[-1])
                pixels.append(pixels_to_patches(image))
            with torch.inference_mode():
                patches = torch.from_numpy(np.stack(pixels)).to(self.device)
                self.features[start : start + size] = self.tower(normalise(patches)).cpu()


def make_language_batch(
    scenes: Scenes, encode: Encoder, phase: Phase, rng: np.random.Generator
) -> dict[str, Any]:
    """One batch: `rows` images, and for each the questions that the phase's groups ask for."""
    rows = rng.integers(len(scenes.scenes), size=phase.rows)
    forms = tuple(SYSTEMS)
    form = forms[int(rng.choice(3, p=(0.45, 0.45, 0.1)))] if phase.full_prompts else "bare"
    prefix = torch.tensor([1, *encode(image_prefix(form))])
    every = np.arange(PATCHES)
    whole = phase.tokens == PATCHES
    kept = [every if whole else choose_patches(scenes.owners[r], phase.tokens, rng) for r in rows]
    indices = torch.from_numpy(np.stack(kept))
    row_index = torch.from_numpy(rows)
    owners = torch.from_numpy(scenes.owners[rows]).gather(1, indices)
    batch: dict[str, Any] = {
        "prefix": prefix,
        "indices": indices,
        "features": scenes.features[row_index[:, None], indices],
    }
    ids, labels, weights, kinds, plain, plain_too = [], [], [], [], [], []
    looks: list[tuple[int, int, tuple[int, ...], bool]] = []
    choices: list[tuple[int, int, int, int, int]] = []
    offset = 0
    for g, group in enumerate(phase.groups):
        block = np.zeros((phase.rows, group.slots, group.length), dtype=np.int64)
        target = np.full(block.shape, IGNORE, dtype=np.int64)
        weight = np.zeros(block.shape, dtype=np.float32)
        half = np.full(block.shape, IGNORE, dtype=np.int64)
        second = half.copy()
        kind_of = np.zeros(block.shape, dtype=np.int8)
        for b, row in enumerate(rows):
            for s in range(group.slots):
                kind = group.kinds[s % len(group.kinds)]
                slot = make_slot(encode, scenes.scenes[row], kind, form, phase, rng)
                size = len(slot.ids)
                assert size <= group.length, (kind, size)
                block[b, s, :size] = slot.ids
                target[b, s, slot.start - 1 : size - 1] = slot.ids[slot.start :]
                weight[b, s, slot.start - 1 : size - 1] = 0.4 if kind == "caption" else 0.3
                if kind != "caption":
                    weight[b, s, slot.start - 1] = 1.0
                kind_of[b, s] = qa.KINDS.index(kind)
                if kind == "vqa":
                    weight[b, s, slot.start - 1 : size - 2] = 1.0
                for part, token in zip((half, second), slot.plain, strict=False):
                    part[b, s, slot.start - 1] = token
                base = offset + s * group.length
                looks += [
                    (b, base + place, who, place == slot.start - 1) for place, who in slot.look
                ]
                if slot.choice is not None:
                    # Half-way, the right option's words must have become its letter.
                    half[b, s, slice(*slot.choice)] = slot.ids[slot.start]
                    choices.append((b, g, s, slot.start - 1, slot.choice[0] * 100 + slot.choice[1]))
        offset += group.slots * group.length
        ids.append(torch.from_numpy(block.reshape(phase.rows, -1)))
        labels.append(target.reshape(phase.rows, -1))
        weights.append(weight.reshape(phase.rows, -1))
        kinds.append(kind_of.reshape(phase.rows, -1))
        plain.append(half.reshape(phase.rows, -1))
        plain_too.append(second.reshape(phase.rows, -1))
    batch["ids"] = torch.cat(ids, dim=1)
    for name, parts in (
        ("labels", labels),
        ("weights", weights),
        ("kinds", kinds),
        ("plain", plain),
        ("plain_too", plain_too),
    ):
        batch[name] = torch.from_numpy(np.concatenate(parts, axis=1))
    batch |= _look_targets(looks, owners)
    batch["choices"] = torch.tensor(choices)
    batch["drop_to"] = int(rng.integers(48, 289)) if rng.random() < phase.drop else 0
    return batch


def _look_targets(
    looks: list[tuple[int, int, tuple[int, ...], bool]], owners: Tensor
) -> dict[str, Tensor]:
    """Rows, text positions and wanted attention over the visual tokens of all guided places.

    Most of the wanted attention lies evenly on the patches that the question is about, a little on
    whatever is no background: an object that was not asked about is still the better second choice.
    """
    rows = torch.tensor([entry[0] for entry in looks])
    places = torch.tensor([entry[1] for entry in looks])
    wanted = torch.zeros(len(looks), MAX_OBJECTS + 2, dtype=torch.bool)
    for i, (_, _, who, _) in enumerate(looks):
        wanted[i, [w + 1 for w in who]] = True
    about = wanted.gather(1, owners[rows].long() + 1).float()
    anything = (owners[rows] != 0).float()
    about = about / about.sum(-1, keepdim=True).clamp(min=1)
    anything = anything / anything.sum(-1, keepdim=True).clamp(min=1)
    last = torch.tensor([entry[3] for entry in looks])
    return {
        "look_rows": rows,
        "look_places": places,
        "look_targets": 0.85 * about + 0.15 * anything,
        "look_last": last,
    }


def rotary(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, `(batch, 1, tokens, head_dim / 2)`."""
    half = shape.width // shape.heads // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions[:, None, :, None].float() * shape.rope_theta**-steps
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def causal_bias(size: int, device: torch.device) -> Tensor:
    """0 where a token may look, a large negative number where it may not."""
    bias = torch.full((size, size), -30000.0, device=device, dtype=torch.bfloat16)
    return bias.triu(1)


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, head: int, groups: tuple[Group, ...]
) -> Tensor:
    """Attention where the first `head` tokens are shared and each question sees them and itself.

    Same numbers as one masked attention over everything, at a fraction of the work, since no
    question is ever scored against another.
    """
    batch, heads, _, dim = q.shape
    scale = dim**-0.5
    first = (q[:, :, :head], k[:, :, :head], v[:, :, :head])
    if head > 300:
        parts = [F.scaled_dot_product_attention(*first, is_causal=True)]
    else:
        parts = [attend(*first, causal_bias(head, q.device))]
    at = head
    for group in groups:
        n, size = group.slots, group.length
        span = slice(at, at + n * size)
        at += n * size
        mine = q[:, :, span] * scale
        shared = mine @ first[1].transpose(-1, -2)
        own_q, own_k, own_v = (
            t.reshape(batch, heads, n, size, dim) for t in (mine, k[:, :, span], v[:, :, span])
        )
        own = own_q @ own_k.transpose(-1, -2) + causal_bias(size, q.device)
        scores = torch.cat([shared, own.view(batch, heads, n * size, size)], dim=-1).softmax(-1)
        to_shared, to_own = scores.split([head, size], dim=-1)
        mixed = to_own.reshape(batch, heads, n, size, size) @ own_v
        parts.append(to_shared @ first[2] + mixed.view(batch, heads, n * size, dim))
    return torch.cat(parts, dim=2)


def _attention_to(q: Tensor, k: Tensor) -> Tensor:
    """Log of the head-averaged attention of `q` `(m, heads, dim)` over `k` `(m, heads, n, dim)`."""
    scores = (k @ q.unsqueeze(-1)).squeeze(-1).float() * q.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1).clamp(min=1e-8).log()


def _look(q: Tensor, k: Tensor, start: int, count: int, batch: dict[str, Any]) -> Tensor:
    """Log attention of the guided places over the visual tokens, `(guided, count)`."""
    rows = batch["look_rows"]
    places = batch["look_places"] + start + count
    keys = k[:, :, start : start + count]
    return _attention_to(q[rows, :, places], keys[rows])


def _choose(
    q: Tensor, k: Tensor, head: int, phase: Phase, choices: Tensor, letters: bool
) -> Tensor:
    """Loss for looking at the words of the right option, from the last prompt token.

    With `letters`: for looking at the option's letter, from the first of its words.
    """
    starts = [head]
    for group in phase.groups:
        starts.append(starts[-1] + group.slots * group.length)
    total, seen = q.new_zeros((), dtype=torch.float32), 0
    for g, group in enumerate(phase.groups):
        mine = choices[choices[:, 1] == g]
        if not len(mine):
            continue
        rows, slot, last = mine[:, 0], mine[:, 2], mine[:, 3]
        first, end = (mine[:, 4] // 100)[:, None], (mine[:, 4] % 100)[:, None]
        base = starts[g] + slot * group.length
        inside = torch.arange(group.length, device=q.device)
        places = base[:, None] + inside
        keys = k[rows[:, None], :, places].transpose(1, 2)
        if letters:
            # The letter and the full stop stand right before the words.
            wanted, asking = inside == first - 2, base + first[:, 0]
        else:
            wanted, asking = (inside >= first) & (inside < end), base + last
        log_attention = _attention_to(q[rows, :, asking], keys)
        total = total - (log_attention.exp() * wanted).sum(-1).clamp(min=1e-6).log().sum()
        seen += len(mine)
    return total / max(seen, 1)


def language_loss(
    model: Llava, batch: dict[str, Any], phase: Phase
) -> tuple[Tensor, dict[str, float]]:
    """All loss terms of one batch, and what they were."""
    rows, count = batch["indices"].shape
    start = len(batch["prefix"])
    device = batch["ids"].device
    prefix = model.embed_tokens(batch["prefix"]).expand(rows, -1, -1)
    visual = model.project(batch["features"])
    x = torch.cat([prefix, visual, model.embed_tokens(batch["ids"])], dim=1)
    text = torch.cat([torch.arange(g.length, device=device).repeat(g.slots) for g in phase.groups])
    positions = torch.cat(
        [
            torch.arange(start, device=device).expand(rows, -1),
            batch["indices"] + start,
            (text + start + PATCHES).expand(rows, -1),
        ],
        dim=1,
    )
    cos, sin = rotary(positions, model.shape)
    terms: dict[str, Tensor] = {}
    look = x.new_zeros(0)
    for i, child in enumerate(model.layers):
        layer: Any = child
        if i == LOOK_LAYER + 1 and batch["drop_to"]:
            kept = _rows_best(look, batch, rows, min(batch["drop_to"], count))
            index = torch.cat(
                [
                    torch.arange(start, device=device).expand(rows, -1),
                    kept + start,
                    torch.arange(start + count, x.shape[1], device=device).expand(rows, -1),
                ],
                dim=1,
            )
            count = kept.shape[1]
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            cos, sin = (
                t.gather(2, index[:, None, :, None].expand(-1, -1, -1, t.shape[-1]))
                for t in (cos, sin)
            )
        q, k, v = layer.heads_of(x, cos, sin)
        if i == LOOK_LAYER:
            look = _look(q, k, start, count, batch)
            terms["look"] = -(batch["look_targets"] * look).sum(-1).mean()
        if i in (CHOICE_LAYER, LETTER_LAYER) and len(batch["choices"]):
            letters = i == LETTER_LAYER
            terms["letter" if letters else "choose"] = _choose(
                q, k, start + count, phase, batch["choices"], letters
            )
        mixed = shared_prefix_attention(q, k, v, start + count, phase.groups)
        x = layer.finish(x, mixed)
        if i == ANSWER_LAYER - 1:
            terms["plain"], _ = _read(model, x[:, start + count :], batch["plain"], None)
            if (batch["plain_too"] != IGNORE).any():
                terms["plain_too"], _ = _read(
                    model, x[:, start + count :], batch["plain_too"], None
                )
    terms["answer"], hits = _read(model, x[:, start + count :], batch["labels"], batch["weights"])
    total = terms["answer"] + phase.look * terms["look"] + 0.2 * terms["plain"]
    for name in ("choose", "letter", "plain_too"):
        if name in terms:
            total = total + 0.3 * terms[name]
    scores = {name: float(term.detach()) for name, term in terms.items()}
    return total, scores | _accuracy(batch, hits)


def _rows_best(look: Tensor, batch: dict[str, Any], rows: int, keep: int) -> Tensor:
    """The visual tokens that a row's questions look at most from their last prompt token."""
    weight = look.detach().exp() * batch["look_last"][:, None]
    score = look.new_zeros(rows, look.shape[1]).index_add(0, batch["look_rows"], weight)
    return score.topk(keep, dim=-1).indices.sort(-1).values


def _read(model: Llava, x: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy where there are labels, and whether the likeliest token was right."""
    known = labels != IGNORE
    logits = model.lm_head(model.norm(x[known])).float()
    loss = F.cross_entropy(logits, labels[known], reduction="none")
    hits = logits.detach().argmax(-1) == labels[known]
    if weights is None:
        return loss.mean(), hits
    return (loss * weights[known]).sum() / weights[known].sum(), hits


def _accuracy(batch: dict[str, Any], hits: Tensor) -> dict[str, float]:
    """Share of right first answer tokens per kind; of all tokens for captions."""
    known = batch["labels"] != IGNORE
    kinds, weights = batch["kinds"][known], batch["weights"][known]
    scores = {}
    for number, name in enumerate(qa.KINDS):
        mine = (kinds == number) & ((weights == 1.0) | (name == "caption"))
        if mine.any():
            scores[name] = float(hits[mine].float().mean())
    return scores


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """All tensors of a batch on `device`."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def train_language(
    run: Run,
    tower: Tower,
    tokenizer: bytes,
    minutes: float,
    scene_count: int,
    every: Callable[[Llava], None],
) -> Llava:
    """Stage 2. `every` is called with the model each few minutes and at the end."""
    torch.manual_seed(2)
    encode = Encoder(tokenizer)
    model = Llava(encode.sp.vocab_size()).to(run.device, torch.bfloat16)
    optimiser = Optimiser(model, matrix_lr=4e-3, other_lr=2e-3)
    scenes = Scenes(tower, scene_count, FIRST_TRAINING_SEED, run.device)
    path = run.work / "language.pt"
    step, answers, spent = 0, 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        optimiser.load(saved["optimiser"])
        step, answers, spent = saved["step"], saved["answers"], saved["spent"]
    kept_scenes = run.work / "scenes.pt"
    if kept_scenes.exists():
        scenes.load(kept_scenes)
    budget = minutes * 60
    last_save = spent
    sums: dict[str, list[float]] = {}
    while spent < budget:
        begun = time.monotonic()
        # New scenes come a few at a time, until there are enough: no long wait before the first.
        if (step % 2 == 0 or not scenes.scenes) and len(scenes.scenes) < scene_count:
            scenes.add(16 if scenes.scenes else 1024)
            if len(scenes.scenes) == scene_count:
                scenes.save(kept_scenes)
        phase = next(p for p in PHASES if spent < p.until * budget)
        rng = np.random.default_rng([2, step])
        batch = to_device(make_language_batch(scenes, encode, phase, rng), run.device)
        loss, scores = language_loss(model, batch, phase)
        loss.backward()
        optimiser.step(rate(spent / budget))
        step += 1
        answers += phase.rows * sum(group.slots for group in phase.groups)
        spent += time.monotonic() - begun
        for name, value in scores.items():
            sums.setdefault(name, []).append(value)
        if step % 20 == 0:
            means = {name: sum(values) / len(values) for name, values in sums.items()}
            sums.clear()
            run.log.write(
                stage="language",
                step=step,
                answers=answers,
                scenes=len(scenes.scenes),
                seconds=spent,
                tokens=phase.tokens,
                **means,
            )
        if spent - last_save > 150 or spent >= budget:
            last_save = spent
            save_state(path, optimiser=optimiser.state(), step=step, answers=answers, spent=spent)
            every(model)
    return model


# ----------------------------------------------------------------------------- curve and command


def draw_curve(log: Path, picture: Path) -> None:
    """The accuracies of both stages against minutes, from the JSON lines.

    A line `{"note": ...}` marks where a person changed the recipe; it becomes a dotted line.
    """
    if not log.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, stage, names, title in (
        (axes[0], "tower", ("kind", "color", "shape", "text", "rank"), "1. tower, per patch"),
        (axes[1], "language", qa.KINDS, "2. language, first answer token"),
    ):
        mine = [r for r in records if r.get("stage") == stage]
        for name in names:
            points = [(r["seconds"] / 60, 100 * r[name]) for r in mine if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        for note, after in pairwise(records):
            if "note" in note and after.get("stage") == stage:
                axis.axvline(after["seconds"] / 60, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("right on fresh training scenes, %")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def train(
    out: Path,
    *,
    work: Path,
    device: str,
    minutes: float,
    scene_count: int,
    workers: int,
    fast: bool,
) -> None:
    """Both stages; the checkpoint, `log.jsonl` and `curve.png` land in `out`."""
    run = Run(out, work, torch.device(device), workers, Log(out / "training" / "log.jsonl"))
    work.mkdir(parents=True, exist_ok=True)
    if fast:
        # Fuses the small steps between matrix products; the maths stays the same.
        for name in ("heads_of", "finish"):
            setattr(DecoderLayer, name, torch.compile(getattr(DecoderLayer, name), dynamic=True))
    tokenizer = train_tokenizer()
    tower = train_tower(run, minutes * TOWER_SHARE)

    def export(model: Llava) -> None:
        save_checkpoint(out / "checkpoint", tokenizer, tower, model)
        draw_curve(run.log.path, out / "training" / "curve.png")

    train_language(run, tower, tokenizer, minutes * (1 - TOWER_SHARE), scene_count, export)


# The tower's part of the time.
TOWER_SHARE = 0.21


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and log")
    parser.add_argument("--work", type=Path, help="folder for resume files (default: OUT/work)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--minutes", type=float, default=66.0, help="time for both stages")
    parser.add_argument("--scenes", type=int, default=12_000, help="scenes kept for stage 2")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw for stage 1")
    parser.add_argument("--compile", action="store_true", help="torch.compile parts of the decoder")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with torch.enable_grad():  # some libraries turn gradients off for the whole process
        train(
            given.out,
            work=given.work or given.out / "work",
            device=given.device,
            minutes=given.minutes,
            scene_count=given.scenes,
            workers=given.workers,
            fast=given.compile,
        )


if __name__ == "__main__":
    main()
