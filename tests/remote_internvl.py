"""A small InternVL of our own in the interface and with the weight names of the published ones.

Tests copy this file into checkpoints, as the code that comes with them, and use it as reference.
Its InternLM2 knows no cache and no ``generate``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, llm_config: Any = None, vision_config: Any = None, **more: Any) -> None:
        super().__init__(**more)
        self.llm_config, self.vision_config = llm_config or {}, vision_config or {}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def attend(q: Any, k: Any, v: Any, allowed: Any = None) -> torch.Tensor:
    """``(batch, n, heads, dim)`` each -> ``(batch, n, heads * dim)``."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------- tower


class Block(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        width, norm = c["hidden_size"], RMSNorm if c["norm_type"] == "rms_norm" else nn.LayerNorm
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width, c["qkv_bias"]), "proj": nn.Linear(width, width)}
        )
        if c["qk_normalization"]:
            self.attn["q_norm"] = RMSNorm(width, c["layer_norm_eps"])
            self.attn["k_norm"] = RMSNorm(width, c["layer_norm_eps"])
        inner = c["intermediate_size"]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.norm1 = norm(width, eps=c["layer_norm_eps"])
        self.norm2 = norm(width, eps=c["layer_norm_eps"])
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.heads = c["num_attention_heads"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        if "q_norm" in self.attn:
            q, k = self.attn["q_norm"](q), self.attn["k_norm"](k)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        x = x + self.ls1 * self.attn["proj"](attend(q, k, v))
        inner = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2 * self.mlp["fc2"](inner)


class Embeddings(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)
        places = (c["image_size"] // patch) ** 2 + 1
        self.position_embedding = nn.Parameter(torch.zeros(1, places, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class Tower(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(c)
        blocks = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": blocks})

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        states = [self.embeddings(pixel_values)]
        for block in self.encoder["layers"]:
            states.append(block(states[-1]))
        return states


# --------------------------------------------------------------------------------- InternLM2


def turn(x: torch.Tensor, places: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of ``(batch, n, heads, dim)``."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half) / half)
    angles = (places[..., None] * rates)[:, :, None]
    one, other = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class InternLM2Layer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.heads, self.groups = c["num_attention_heads"], c["num_key_value_heads"]
        self.size, self.base = width // self.heads, c["rope_theta"]
        fused = (self.heads + 2 * self.groups) * self.size
        self.attention = nn.ModuleDict(
            {"wqkv": nn.Linear(width, fused, False), "wo": nn.Linear(width, width, False)}
        )
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(width, inner, False),
                "w3": nn.Linear(width, inner, False),
                "w2": nn.Linear(inner, width, False),
            }
        )
        self.attention_norm = RMSNorm(width, c["rms_norm_eps"])
        self.ffn_norm = RMSNorm(width, c["rms_norm_eps"])

    def forward(self, x: torch.Tensor, places: Any, allowed: Any) -> torch.Tensor:
        shared = self.heads // self.groups
        fused = self.attention["wqkv"](self.attention_norm(x))
        fused = fused.unflatten(-1, (self.groups, shared + 2, self.size))
        q = turn(fused[..., :shared, :].flatten(2, 3), places, self.base)
        k = turn(fused[..., shared, :], places, self.base).repeat_interleave(shared, dim=2)
        v = fused[..., shared + 1, :].repeat_interleave(shared, dim=2)
        x = x + self.attention["wo"](attend(q, k, v, allowed))
        h, ffn = self.ffn_norm(x), self.feed_forward
        return x + ffn["w2"](nn.functional.silu(ffn["w1"](h)) * ffn["w3"](h))


class InternLM2(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        layers = nn.ModuleList(InternLM2Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model = nn.ModuleDict(
            {
                "tok_embeddings": nn.Embedding(c["vocab_size"], c["hidden_size"]),
                "layers": layers,
                "norm": RMSNorm(c["hidden_size"], c["rms_norm_eps"]),
            }
        )
        self.output = nn.Linear(c["hidden_size"], c["vocab_size"], False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model["tok_embeddings"]

    def forward(self, inputs_embeds: Any, attention_mask: Any, **_: Any) -> Any:
        x, length = inputs_embeds, inputs_embeds.shape[1]
        real = attention_mask.bool()
        places = (real.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal[None, None] & real[:, None, None, :]
        for layer in self.model["layers"]:
            x = layer(x, places, allowed)
        return SimpleNamespace(logits=self.output(self.model["norm"](x)))


# ------------------------------------------------------------------------------------- whole


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        text, vision = config.llm_config, config.vision_config
        self.vision_model = Tower(vision)
        plain = {key: value for key, value in text.items() if key != "architectures"}
        self.language_model: Any
        if text["architectures"] == ["InternLM2ForCausalLM"]:
            self.language_model = InternLM2(text)
        elif text["architectures"] == ["Qwen2ForCausalLM"]:
            self.language_model = Qwen2ForCausalLM(Qwen2Config(**plain))
        else:
            self.language_model = LlamaForCausalLM(LlamaConfig(**plain))
        inner, width = vision["hidden_size"] * 4, text["hidden_size"]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width)
        )
        side = vision["image_size"] // vision["patch_size"]
        self.num_image_token = side**2 // 4
        self.img_context_token_id: int | None = None
        self.post_init()

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(tiles, 3, side, side)`` -> ``(tiles, tokens, width)``."""
        seen = self.vision_model(pixel_values)[self.config.select_layer][:, 1:]
        side = int(seen.shape[1] ** 0.5)
        # Squares of four patches, channels in the order of the published pixel shuffle.
        squares = seen.view(len(seen), side // 2, 2, side // 2, 2, -1)
        made = squares.permute(0, 1, 3, 2, 4, 5).flatten(3)
        if self.config.ps_version == "v1":
            made = made.transpose(1, 2)
        return self.mlp1(made.flatten(1, 2))

    def embed(self, pixel_values: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """The prompt with image features in it."""
        embedded = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            features = self.extract_feature(pixel_values).to(embedded.dtype)
            embedded[input_ids == self.img_context_token_id] = features.flatten(0, 1)
        return embedded

    def forward(self, pixel_values: Any, input_ids: Any, attention_mask: Any, **more: Any) -> Any:
        embedded = self.embed(pixel_values, input_ids)
        return self.language_model(inputs_embeds=embedded, attention_mask=attention_mask, **more)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> Any:
        embedded = self.embed(pixel_values, input_ids)
        return self.language_model.generate(
            inputs_embeds=embedded, attention_mask=attention_mask, **more
        )
