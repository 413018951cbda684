"""Golden cases as models: outputs of the published reference codes (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlm_prune_ext.models.clip_text import TextTower

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


@dataclass
class Case:
    name: str
    info: dict
    tensors: dict[str, torch.Tensor]

    @property
    def span(self) -> tuple[int, int]:
        return self.info["sys_length"], self.info["image_length"]

    @property
    def embeds(self) -> torch.Tensor:
        return self.tensors["inputs_embeds"]

    def of(self, run: str) -> dict[str, torch.Tensor]:
        """Tensors of one run, without the prefix."""
        prefix = f"run.{run}."
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


def runs(prefix: str) -> list[tuple[str, dict]]:
    """(case name, run) of every run in the files whose name starts with ``prefix``."""
    found = []
    for path in sorted(FOLDER.glob(f"{prefix}*.json")):
        for run in json.loads(path.read_text())["runs"]:
            found.append((path.stem, run))
    assert found, prefix
    return found


def run_ids(pairs: list[tuple[str, dict]]) -> list[str]:
    return [f"{case}-{run['name']}" for case, run in pairs]


@lru_cache(maxsize=4)
def load_case(name: str) -> Case:
    info = json.loads((FOLDER / f"{name}.json").read_text())
    return Case(name, info, load_file(FOLDER / f"{name}.safetensors"))


def language_model(case: Case, attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(**case.info["model"], rope_theta=case.info["rope_theta"])
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    weights = {k[8:]: v for k, v in case.tensors.items() if k.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def vision_tower(case: Case, attention: str) -> CLIPVisionModel:
    config = CLIPVisionConfig(**case.info["model"])
    config._attn_implementation = attention
    model = CLIPVisionModel(config).eval()
    weights = {
        k[8:].removeprefix("vision_model."): v
        for k, v in case.tensors.items()
        if k.startswith("weights.")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    return model


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE, rtol=TOLERANCE)


def greedy_without_cache(model, case: Case, steps: int, on_step) -> tuple[list[int], torch.Tensor]:
    """Run the whole growing sequence again at each step; ``on_step()`` after each."""
    embeds, tokens, logits = case.embeds, [], []
    for _ in range(steps):
        out = model(inputs_embeds=embeds, use_cache=False)
        on_step()
        logits.append(out.logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        new = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        embeds = torch.cat([embeds, new], dim=1)
    return tokens, torch.stack(logits)


def greedy_with_cache(
    model, case: Case, steps: int, on_step=lambda: None
) -> tuple[list[int], torch.Tensor, list[int]]:
    """Prefill once, then one token at a time. Returns tokens, logits, prefill cache lengths."""
    out = model(inputs_embeds=case.embeds, use_cache=True)
    on_step()
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    logits, tokens = [out.logits[0, -1]], [int(out.logits[0, -1].argmax())]
    while len(tokens) < steps:
        out = model(
            input_ids=torch.tensor([[tokens[-1]]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        on_step()
        logits.append(out.logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits), lengths


@lru_cache(maxsize=4)
def llava_model(name: str, attention: str) -> LlavaForConditionalGeneration:
    """The golden ``vision_model_*`` as transformers' LLaVA. The placeholder is the last id, which
    the golden prompts do not use."""
    case = load_case(name)
    text = LlamaConfig(**case.info["language_model"], rope_theta=case.info["rope_theta"])
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**case.info["vision_tower"]),
        image_token_index=text.vocab_size - 1,
        vision_feature_layer=case.info["select_layer"],
        image_seq_length=case.info["num_patches"],
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    renamed = {
        "weights.vision_tower.vision_model.": "model.vision_tower.",
        "weights.vision_tower.": "model.vision_tower.",
        "weights.projector.": "model.multi_modal_projector.",
        "weights.language_model.model.": "model.language_model.",
        "weights.language_model.": "",
    }
    weights = {}
    for key, value in case.tensors.items():
        prefix = next((p for p in renamed if key.startswith(p)), None)
        if prefix is not None:
            weights[renamed[prefix] + key.removeprefix(prefix)] = value
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    return model


@lru_cache(maxsize=4)
def text_tower(name: str, text: str, whole_segments: bool = False) -> TextTower:
    """CLIP's text half of a golden ``vision_model_*``; whatever is asked, it is text ``text``."""
    case = load_case(name)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**case.info["text_tower"])).eval()
    prefix = "weights.text_tower."
    found = {k.removeprefix(prefix): v for k, v in case.tensors.items() if k.startswith(prefix)}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    weight = case.tensors["weights.visual_projection.weight"]
    projection = torch.nn.Linear(*reversed(weight.shape), bias=False)
    projection.load_state_dict({"weight": weight})
    mask = case.tensors[f"text_attention_mask.{text}"].bool()
    ids = case.tensors[f"text_input_ids.{text}"][mask].tolist()
    return TextTower(model, projection, question=ids, whole_segments=whole_segments)


def llava_prompt(name: str, images: int = 1, batch: str = "") -> dict[str, torch.Tensor]:
    """Inputs of the golden prompt, with as many images as rows."""
    case = load_case(name)
    before, after = case.tensors["input_ids_before"], case.tensors["input_ids_after"]
    token = case.info["language_model"]["vocab_size"] - 1
    middle = torch.full((1, case.info["num_patches"]), token)
    ids = torch.cat([before, middle, after], dim=1).repeat(images, 1)
    pixels = case.tensors[f"{batch}pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
