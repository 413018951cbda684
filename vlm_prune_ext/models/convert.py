"""An original-format LLaVA checkpoint as a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import (
    AddedToken,
    GenerationConfig,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.adapters import load
from vlm_prune_ext.models.base import PromptProcessor
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.original import is_original
from vlm_prune_ext.models.prompts import IMAGE, Style

PAD = "<pad>"
_PUBLISHED = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
)
# Published conversions round the vocabulary up to this.
_ROUND_ROWS_TO = 64


def convert_to_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write an original-format LLaVA-1.5 or -1.6 checkpoint in Hugging Face format.

    The vocabulary gets ``<image>``, ``<pad>`` and rows up to a multiple of 64. In the output layer
    these rows are copies of the unknown token's, so that they never score above it; logits over the
    original vocabulary do not change. The chat template is LLaVA's own conversation. Weights have
    the names of the published conversions (https://huggingface.co/llava-hf).

    Args:
        source: the checkpoint, local or on the hub.
        target: folder to write; must be new or empty. It is there when all of it is.
        dtype: of the weights written; ``None`` keeps what the checkpoint states.

    Returns:
        ``target``.

    Raises:
        InputError: ``source`` is not in the original format, or ``target`` holds files.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"target {str(folder)!r} exists already: give a new or empty folder.")
    checkpoint = Checkpoint(source)
    if not is_original(checkpoint.config):
        raise InputError(
            f"checkpoint {checkpoint.name!r} is not in LLaVA's original format: config.json with "
            "mm_vision_tower and architecture LlavaLlamaForCausalLM or LlavaMistralForCausalLM is "
            "needed."
        )
    model, prompts = load(checkpoint.folder, dtype=dtype or "auto", device="cpu")
    tokenizer = _with_image_token(prompts.tokenizer)
    _grow(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.absolute().parent) as scratch:
        whole = Path(scratch) / "whole"
        _write(model, whole)
        _processor(model.config, prompts, tokenizer).save_pretrained(whole)
        if folder.exists():
            folder.rmdir()
        whole.rename(folder)
    return folder


def published_name(name: str) -> str:
    """The name that a weight has in published checkpoints (llava-hf): modules as they were before
    transformers 5, which other engines load by.

    Args:
        name: as transformers' module has it now.
    """
    for ours, theirs in _PUBLISHED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _write(model: Any, folder: Path) -> None:
    """Weights under their published names, in shards, and the configuration."""
    weights = {published_name(name): value for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("language_model.lm_head.weight")
    folder.mkdir()
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _with_image_token(tokenizer: Any) -> Any:
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    return tokenizer


def _grow(model: Any, tokenizer: Any) -> None:
    """Make room for the added tokens in both tables and say so in the configuration."""
    config = model.config
    vocabulary = config.text_config.vocab_size
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = -(-max(vocabulary, len(tokenizer)) // _ROUND_ROWS_TO) * _ROUND_ROWS_TO
    table = model.get_input_embeddings()
    own = table.weight.detach()[:vocabulary]
    table.weight = nn.Parameter(torch.cat([own, own.new_zeros(rows - vocabulary, own.shape[1])]))
    table.num_embeddings = rows
    head = model.get_output_embeddings()
    if config.tie_word_embeddings:
        head.weight = table.weight
    else:
        own = head.weight.detach()
        unknown = own[tokenizer.unk_token_id or 0]
        head.weight = nn.Parameter(torch.cat([own, unknown.expand(rows - vocabulary, -1)]))
    head.out_features = rows
    config.text_config.vocab_size = rows
    config.image_token_id = image
    config.text_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def _processor(config: Any, prompts: PromptProcessor, tokenizer: Any) -> Any:
    strategy = config.vision_feature_select_strategy
    images = prompts.image_processor
    fields = {
        name: getattr(images, name)
        for name in ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    }
    common = {
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1,
        "chat_template": chat_template(prompts.styles[prompts.default_style]),
    }
    if hasattr(config, "image_grid_pinpoints"):
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
        return LlavaNextProcessor(LlavaNextImageProcessor(**fields), **common)
    pads = getattr(prompts, "aspect", None) == "pad"
    return LlavaProcessor(LlavaImageProcessor(**fields, do_pad=pads), **common)


def chat_template(style: Style) -> str:
    """A conversation template in Jinja, for contents that are strings or lists of items."""
    parts = {"system": style.system, "image": style.image, "opening": style.opening}
    parts["user_before"], parts["user_after"] = style.user.split("{}")
    parts["answer_before"], parts["answer_after"] = style.answer.split("{}")
    parts["after_system"] = style.after_system
    said = {name: f"{{{{ {json.dumps(text)} }}}}" for name, text in parts.items()}
    return (
        "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for item in content %}{% if item['type'] == 'image' %}" + said["image"] + "{% elif "
        "item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% endmacro %}"
        "{% if not messages or messages[0]['role'] != 'system' %}" + said["system"] + "{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ said(message['content']) | trim }}" + said["after_system"] + "{% elif "
        "message['role'] == 'user' %}"
        + said["user_before"]
        + "{{ said(message['content']) }}"
        + said["user_after"]
        + "{% else %}"
        + said["opening"]
        + said["answer_before"]
        + "{{ said(message['content']) }}"
        + said["answer_after"]
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + said["opening"] + "{% endif %}"
    )
