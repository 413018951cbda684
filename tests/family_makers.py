"""Tiny random checkpoints of the other families, made by transformers' own classes: models,
processors and tokenizers, saved into a folder as published ones are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn

from tests.makers import TEXTS

VOCAB = 384
HIDDEN = 64
HEADS = 4
KV_HEADS = 2


# ------------------------------------------------------------------------------ tokenizers


def byte_tokenizer(specials: list[str], start: str | None = None) -> Tokenizer:
    """Byte-level BPE that knows ``specials``, with ``start`` in front of each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return tokenizer


def fast_tokenizer(specials: list[str], start: str | None = None, **fields: Any) -> Any:
    """The same, as transformers has it."""
    made = byte_tokenizer(specials, start)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", **fields
    )


def fuyu_tokenizer() -> Any:
    """Blanks as marks, one in front of all, and special tokens as pieces like others: as Fuyu's."""
    special = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    letters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    pieces = [(name, 10.0 * len(name)) for name in special]
    pieces += [(word, -float(len(word)) / 2) for word in words[: VOCAB - 120]]
    pieces += [(letter, -3.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Replace("▁", " ")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# --------------------------------------------------------------------------------- weights


@torch.no_grad()
def scatter(model: nn.Module, seed: int = 0) -> Any:
    """Random weights that are far from flat: every head has clear favourites."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: torch.Tensor, std: float, mean: float = 0.0) -> None:
        value.copy_(torch.randn(value.shape, generator=generator) * std + mean)

    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                fill(value, 1.0 / getattr(module, "scalar_embed_scale", 1.0))
            elif value.dim() == 1 and key == "weight":  # norms; Gemma's add one themselves
                fill(value, 0.1, 0.0 if "Gemma" in type(module).__name__ else 1.0)
            elif value.dim() == 1:
                fill(value, 0.1)
            elif value.dim() == 2:
                gain = 2.0 if name.endswith(("q_proj", "k_proj")) else 1.0
                fill(value, gain / math.sqrt(value.shape[1]))
            else:
                fill(value, 0.5 if value.shape[0] == 1 else 1.0 / math.sqrt(value[0].numel()))
    return model.eval()


def _text(layers: int, **fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **fields,
    }


def _save(name: str, folder: Path, **fields: Any) -> None:
    """A model of transformers' classes of that name."""
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    scatter(model).save_pretrained(folder)


def _vision(**fields: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        **fields,
    }


# ---------------------------------------------------------------------------------- makers


GEMMA_LAYERS = ("sliding", "sliding", "full", "sliding", "full", "sliding")


def gemma3(folder: Path, kinds: tuple[str, ...] = GEMMA_LAYERS, window: int = 28) -> None:
    names = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    extra = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    names += list(extra.values())
    tokenizer = fast_tokenizer(
        names,
        "<bos>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=extra,
    )
    _save(
        "Gemma3",
        folder,
        text_config=_text(
            len(kinds),
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=window,
            layer_types=[f"{kind}_attention" for kind in kinds],
            bos_token_id=2,
        ),
        vision_config=_vision(image_size=56),
        mm_tokens_per_image=16,
        boi_token_index=names.index("<start_of_image>"),
        eoi_token_index=names.index("<end_of_image>"),
        image_token_index=names.index("<image_soft_token>"),
    )
    pictures = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    # As published: no system turn, a system message is said by the user.
    template = (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = (messages[0]['content'] if messages[0]['content'] is string "
        "else messages[0]['content'][0]['text']) + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}"
        "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}"
        "{%- endif -%}{%- for message in loop_messages -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{%- endif -%}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' "
        "+ (first_user_prefix if loop.first else '') }}"
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
        "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}"
        "{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    )
    transformers.Gemma3Processor(
        pictures, tokenizer, image_seq_length=16, chat_template=template
    ).save_pretrained(folder)


def internvl(folder: Path, layers: int = 4) -> None:
    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    names = ["<pad>", "<|im_end|>", "<|im_start|>", *extra.values()]
    tokenizer = fast_tokenizer(
        names, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=extra
    )
    _save(
        "InternVL",
        folder,
        text_config=_text(layers, model_type="qwen2"),
        vision_config=_vision(),
        image_token_id=names.index("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pictures = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    transformers.InternVLProcessor(
        pictures,
        tokenizer,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=_chatml("<IMG_CONTEXT>\n"),
    ).save_pretrained(folder)


QUERIES = 16


def _qformer(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 32,
        "pad_token_id": 0,
        **fields,
    }


def _blip_pictures() -> Any:
    return transformers.BlipImageProcessor(size={"height": 28, "width": 28})


def blip2_opt(folder: Path, layers: int = 4) -> None:
    names = ["<pad>", "</s>", "<image>"]
    tokenizer = fast_tokenizer(names, "</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    text = _text(
        layers,
        model_type="opt",
        ffn_dim=96,
        word_embed_proj_dim=HIDDEN,
        bos_token_id=1,
        do_layer_norm_before=True,
    )
    _blip2("Blip2", folder, text)
    transformers.Blip2Processor(
        _blip_pictures(), tokenizer, num_query_tokens=QUERIES
    ).save_pretrained(folder)


def _blip2(name: str, folder: Path, text: dict[str, Any]) -> None:
    _save(
        name,
        folder,
        vision_config=_vision(),
        qformer_config=_qformer(),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=2,
    )


def blip2_t5(folder: Path) -> None:
    tokenizer = fast_tokenizer(["<pad>", "</s>", "<image>"], eos_token="</s>", pad_token="<pad>")
    text = {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    _blip2("Blip2", folder, text)
    transformers.Blip2Processor(
        _blip_pictures(), tokenizer, num_query_tokens=QUERIES
    ).save_pretrained(folder)


def instructblip(folder: Path, layers: int = 4) -> None:
    names = ["<pad>", "</s>", "<image>", "<s>"]
    tokenizer = fast_tokenizer(names, "<s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    reader = fast_tokenizer(["[PAD]", "[CLS]"], "[CLS]", pad_token="[PAD]")
    reader.padding_side = "right"
    text = _text(layers, model_type="llama", bos_token_id=3)
    _blip2("InstructBlip", folder, text)
    transformers.InstructBlipProcessor(
        _blip_pictures(), tokenizer, reader, num_query_tokens=QUERIES
    ).save_pretrained(folder)


def fuyu(folder: Path, layers: int = 4) -> None:
    tokenizer = fuyu_tokenizer()
    text = _text(layers, model_type="persimmon", bos_token_id=1, eos_token_id=2)
    del text["num_key_value_heads"]
    config = transformers.FuyuConfig(
        **text,
        text_config=text,
        patch_size=10,
        image_size=60,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    scatter(transformers.FuyuForCausalLM(config)).save_pretrained(folder)
    pictures = transformers.FuyuImageProcessor(
        size={"height": 40, "width": 60}, patch_size={"height": 10, "width": 10}
    )
    transformers.FuyuProcessor(pictures, tokenizer).save_pretrained(folder)


# ------------------------------------------------------------------------ without a file of ours


def _chatml(image: str, system: str = "") -> str:
    """Qwen's and InternVL's template, as their checkpoints have it, for pictures and videos."""
    first = (
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        + system
        + "<|im_end|>\n{% endif %}"
        if system
        else ""
    )
    return (
        "{% for message in messages %}"
        + first
        + "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}"
        + image
        + "{% elif content['type'] == 'video' %}"
        + image.replace("image_pad", "video_pad")
        + "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = ["<pad>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
QWEN_IDS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": HIDDEN,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _qwen_processor(kind: str, folder: Path, system: str = "", side: int = 28) -> None:
    names = {"Qwen3VL": "Qwen3VLVideoProcessor"}
    video = getattr(transformers, names.get(kind, "Qwen2VLVideoProcessor"))
    sizes = {"min_pixels": side * side * 4, "max_pixels": side * side * 16}
    getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(patch_size=side // 2, **sizes),
        fast_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<pad>"),
        video(patch_size=side // 2),
        chat_template=_chatml(QWEN_IMAGE, system),
    ).save_pretrained(folder)


HELPFUL = "You are a helpful assistant."


def qwen2_vl(folder: Path, layers: int = 4) -> None:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 14}
    _save(
        "Qwen2VL",
        folder,
        text_config=_text(layers, rope_parameters=MROPE),
        vision_config=vision,
        **QWEN_IDS,
    )
    _qwen_processor("Qwen2VL", folder, HELPFUL)


def qwen_text(layers: int, head_dim: int, **rope: Any) -> dict[str, Any]:
    """Qwen's language model with heads of a width."""
    section = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    width = {"hidden_size": HEADS * head_dim, "head_dim": head_dim}
    return _text(layers, **width, rope_parameters={**MROPE, "mrope_section": section, **rope})


def qwen2_5_vl(folder: Path, layers: int = 4, head_dim: int = 16) -> None:
    vision = {**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]}
    vision["out_hidden_size"] = HEADS * head_dim
    text = qwen_text(layers, head_dim)
    _save("Qwen2_5_VL", folder, text_config=text, vision_config=vision, **QWEN_IDS)
    _qwen_processor("Qwen2_5_VL", folder, HELPFUL)


def qwen3_vl(folder: Path, layers: int = 4, head_dim: int = 16) -> None:
    vision = {**QWEN_VISION, "depth": 3, "patch_size": 16, "num_position_embeddings": 16}
    vision |= {"deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": HEADS * head_dim}
    text = qwen_text(layers, head_dim, mrope_interleaved=True)
    _save("Qwen3VL", folder, text_config=text, vision_config=vision, **QWEN_IDS)
    _qwen_processor("Qwen3VL", folder, side=32)


def qwen3_5(folder: Path, layers: int = 6, interval: int = 2) -> None:
    """Attention in every ``interval``-th layer, as published in every fourth; the others carry a
    state on."""
    vision = {**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 16}
    rope = {**MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    linear = {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    text = _text(layers, head_dim=16, full_attention_interval=interval)
    text |= linear | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text["rope_parameters"] = {**rope, "partial_rotary_factor": 0.5}
    _save("Qwen3_5", folder, text_config=text, vision_config=vision, **QWEN_IDS)
    _qwen_processor("Qwen3VL", folder, side=32)


def llava_onevision(folder: Path, layers: int = 4) -> None:
    names = ["<pad>", "<|im_end|>", "<|im_start|>", "<image>", "<video>"]
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    _save(
        "LlavaOnevision",
        folder,
        text_config=_text(layers, model_type="qwen2"),
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    # The published template puts all images of a turn in front of its text.
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
        "{{ '<video>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    size = {"height": 28, "width": 28}
    transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        fast_tokenizer(names, eos_token="<|im_end|>", pad_token="<pad>"),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    ).save_pretrained(folder)


def _video_llava(kind: str, folder: Path, layers: int, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """LLaMA behind CLIP; returns the tokenizer and what both processors take."""
    names = ["<pad>", "</s>", "<s>", "<image>", "<video>"]
    _save(
        kind,
        folder,
        text_config=_text(layers, model_type="llama"),
        image_token_index=3,
        video_token_index=4,
        tie_word_embeddings=False,
        **fields,
    )
    # The published templates put all images of a turn in front of its videos, both before its text.
    template = (
        "{% for message in messages %}{{ message['role'].upper() + ': '}}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
        "{{ '<video>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    given = {
        "patch_size": 7,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "chat_template": template,
    }
    tokenizer = fast_tokenizer(names, "<s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return tokenizer, given


def llava_next_video(folder: Path, layers: int = 4) -> None:
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    tokenizer, given = _video_llava(
        "LlavaNextVideo",
        folder,
        layers,
        vision_config=_vision(model_type="clip_vision_model"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    size = {"shortest_edge": 28}
    crop = {"height": 28, "width": 28}
    transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(size=size, crop_size=crop),
        transformers.LlavaNextImageProcessor(
            size=size, crop_size=crop, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        **given,
    ).save_pretrained(folder)


def video_llava(folder: Path, layers: int = 4) -> None:
    tokenizer, given = _video_llava(
        "VideoLlava",
        folder,
        layers,
        vision_config=_vision(model_type="clip_vision_model"),
        image_seq_length=16,
        video_seq_length=136,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**size),
        transformers.VideoLlavaVideoProcessor(**size),
        tokenizer,
        **given,
    ).save_pretrained(folder)


def _idefics(kind: str, folder: Path, layers: int) -> None:
    names = ["<pad>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>"]
    names += ["<image>", "<global-img>", *(f"<row_{a}_col_{b}>" for a in (1, 2) for b in (1, 2))]
    tokenizer = fast_tokenizer(names, eos_token="<end_of_utterance>", pad_token="<pad>")
    _save(
        kind,
        folder,
        text_config=_text(layers, model_type="llama"),
        vision_config=_vision(),
        image_token_id=4,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    template = (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    edge = {"longest_edge": 28}
    pictures = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 56}, max_image_size=edge
    )
    parts = [pictures, tokenizer]
    if kind == "SmolVLM":
        parts.append(transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge))
    getattr(transformers, f"{kind}Processor")(
        *parts, image_seq_len=4, chat_template=template
    ).save_pretrained(folder)


def idefics3(folder: Path, layers: int = 4) -> None:
    _idefics("Idefics3", folder, layers)


def smolvlm(folder: Path, layers: int = 4) -> None:
    _idefics("SmolVLM", folder, layers)


def paligemma(folder: Path, layers: int = 4) -> None:
    extra = {"image_token": "<image>"}
    names = ["<pad>", "<eos>", "<bos>", "<image>"]
    tokenizer = fast_tokenizer(
        names, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=extra
    )
    pictures = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    pictures.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pictures, tokenizer)
    text = _text(layers, model_type="gemma", head_dim=16, bos_token_id=2)
    text["vocab_size"] = len(processor.tokenizer) + 7  # its processor adds places and shapes
    _save(
        "PaliGemma",
        folder,
        text_config=text,
        vision_config=_vision(model_type="siglip_vision_model"),
        image_token_index=3,
        projection_dim=HIDDEN,
    )
    processor.save_pretrained(folder)


def mistral3(folder: Path, layers: int = 4) -> None:
    names = ["<pad>", "</s>", "<s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"]
    tokenizer = fast_tokenizer(names, "<s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    _save(
        "Mistral3",
        folder,
        text_config=_text(
            layers, model_type="mistral", head_dim=16, bos_token_id=2, sliding_window=None
        ),
        vision_config=_vision(model_type="pixtral", image_size=56, head_dim=16),
        image_token_index=3,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% for block in message['content'] %}{{ block['text'] }}{% endfor %}{{ eos_token }}"
        "{% else %}[INST]{% for block in message['content'] %}{% if block['type'] == 'image' %}"
        "[IMG]{% else %}{{ block['text'] }}{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
    )
    pictures = transformers.PixtralImageProcessor(
        size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}
    )
    transformers.PixtralProcessor(
        pictures, tokenizer, patch_size=7, spatial_merge_size=2, chat_template=template
    ).save_pretrained(folder)


def aya_vision(folder: Path, layers: int = 4) -> None:
    names = ["<PAD>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"]
    names += ["<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", "<image>"]
    names += ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    tokenizer = fast_tokenizer(
        names, "<BOS_TOKEN>", bos_token="<BOS_TOKEN>", eos_token=names[1], pad_token="<PAD>"
    )
    _save(
        "AyaVision",
        folder,
        text_config=_text(
            layers,
            model_type="cohere2",
            bos_token_id=2,
            sliding_window=24,
            # Layers that see everything do not turn queries and keys.
            layer_types=[f"{k}_attention" for k in ("sliding", "full", "sliding", "full")],
            logit_scale=1.0,
        ),
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=names.index("<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    template = (
        "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', "
        "'system': '<|SYSTEM_TOKEN|>'}[message['role']] }}{% for item in message['content'] %}"
        "{% if item['type'] == 'text' %}{{ item['text'] }}{% else %}<image>{% endif %}"
        "{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    )
    transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4),
        tokenizer,
        patch_size=7,
        img_size=28,
        downsample_factor=2,
        chat_template=template,
    ).save_pretrained(folder)


def ovis2(folder: Path, layers: int = 4) -> None:
    names = ["<pad>", "<|im_end|>", "<|im_start|>", "<image>", "<IMG_ATOM>", "<IMG_START>"]
    names += ["<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    vision = _vision(hidden_stride=2, vocab_size=32 + 5, rms_norm_eps=1e-5)
    config = transformers.Ovis2Config(
        text_config=_text(layers, model_type="qwen2"),
        vision_config=vision,
        image_token_id=names.index("<IMG_ATOM>"),
        visual_indicator_token_ids=[5, 6, 7, 8, 9],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )
    model = scatter(transformers.Ovis2ForConditionalGeneration(config))
    # What it says must not be taken for a part of an image when it is read again.
    model.generation_config.suppress_tokens = [4, 5, 6, 7, 8, 9]
    model.save_pretrained(folder)
    transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4),
        fast_tokenizer(names, eos_token="<|im_end|>", pad_token="<pad>"),
        image_seq_length=4,
        chat_template=_chatml("<image>\n", HELPFUL),
    ).save_pretrained(folder)


def glm4v(folder: Path, layers: int = 4) -> None:
    names = ["<|pad|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>"]
    names += [
        "<|image|>",
        "<|video|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "[gMASK]",
        "<sop>",
    ]
    ids = {
        "image_token_id": 5,
        "video_token_id": 6,
        "image_start_token_id": 3,
        "image_end_token_id": 4,
        "video_start_token_id": 7,
        "video_end_token_id": 8,
    }
    vision = {**QWEN_VISION, "image_size": 56}
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
    _save(
        "Glm4v",
        folder,
        text_config=_text(layers, rope_parameters=rope),
        vision_config=vision,
        **ids,
    )
    template = (
        "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
        "{% elif item['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
        "{% else %}<|begin_of_image|><|image|><|end_of_image|>{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 32}
    transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=size),
        fast_tokenizer(names, eos_token="<|user|>", pad_token="<|pad|>"),
        transformers.Glm4vVideoProcessor(),
        chat_template=template,
    ).save_pretrained(folder)


def gemma4(folder: Path, layers: int = 4) -> None:
    """The form of its larger models: no inputs of layers' own, no shared keys."""
    extra = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    }
    names = ["<pad>", "<eos>", "<bos>", *extra.values(), "<|turn>", "<turn|>", "<|video|>"]
    tokenizer = fast_tokenizer(
        names,
        "<bos>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=extra,
    )
    kinds = ("sliding", "full", "sliding", "full")
    text = _text(
        layers,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=24,
        layer_types=[f"{kind}_attention" for kind in kinds],
        hidden_size_per_layer_input=0,
        bos_token_id=2,
    )
    vision = _vision(num_key_value_heads=2, head_dim=16, patch_size=8, pooling_kernel_size=2)
    _save(
        "Gemma4",
        folder,
        text_config=text,
        vision_config={**vision, "position_embedding_size": 64},
        audio_config=None,
        image_token_id=names.index("<|image|>"),
        video_token_id=names.index("<|video|>"),
        boi_token_id=names.index("<|image>"),
        eoi_token_id=names.index("<image|>"),
        tie_word_embeddings=False,
    )
    template = (
        "{{ bos_token }}{% for message in messages %}<|turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}"
        "{{ item['text'] | trim }}{% elif item['type'] == 'video' %}<|video|>"
        "{% else %}<|image|>{% endif %}{% endfor %}<turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
    )
    sizes = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**sizes),
        tokenizer,
        transformers.Gemma4VideoProcessor(**sizes),
        chat_template=template,
        image_seq_length=70,
    ).save_pretrained(folder)


# -------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Kind:
    """A family as transformers has it.

    Attributes:
        make: writes a checkpoint into a folder.
        name: of transformers' classes, without what they are.
        places: the text may place images.
        whole: class of the model.
    """

    make: Callable[[Path], None]
    name: str
    places: bool = True
    whole: str = "ForConditionalGeneration"

    @property
    def model(self) -> Any:
        """transformers' class of the model."""
        return getattr(transformers, self.name + self.whole)

    @property
    def processor(self) -> Any:
        """transformers' class of the processor."""
        name = {"Mistral3": "Pixtral", "Qwen3_5": "Qwen3VL"}.get(self.name, self.name)
        return getattr(transformers, f"{name}Processor")


KINDS = {
    "qwen2_5_vl": Kind(qwen2_5_vl, "Qwen2_5_VL"),
    "gemma3": Kind(gemma3, "Gemma3"),
    "internvl": Kind(internvl, "InternVL"),
    "blip2_opt": Kind(blip2_opt, "Blip2", places=False),
    "instructblip": Kind(instructblip, "InstructBlip", places=False),
    "fuyu": Kind(fuyu, "Fuyu", places=False, whole="ForCausalLM"),
    "blip2_t5": Kind(blip2_t5, "Blip2", places=False),
}
"""Families with tests of their own in both frameworks."""

TABLE = {
    "qwen2_vl": Kind(qwen2_vl, "Qwen2VL"),
    "qwen3_vl": Kind(qwen3_vl, "Qwen3VL"),
    "qwen3_5": Kind(qwen3_5, "Qwen3_5"),
    "llava_onevision": Kind(llava_onevision, "LlavaOnevision"),
    "smolvlm": Kind(smolvlm, "SmolVLM"),
    "idefics3": Kind(idefics3, "Idefics3"),
    "paligemma": Kind(paligemma, "PaliGemma"),
    "mistral3": Kind(mistral3, "Mistral3"),
    "aya_vision": Kind(aya_vision, "AyaVision"),
    "ovis2": Kind(ovis2, "Ovis2"),
    "glm4v": Kind(glm4v, "Glm4v"),
    "gemma4": Kind(gemma4, "Gemma4"),
}
"""Families that are a line of the table and nothing else."""

VIDEO = {
    "llava_next_video": Kind(llava_next_video, "LlavaNextVideo"),
    "video_llava": Kind(video_llava, "VideoLlava"),
}
"""The same, made for videos."""


# -------------------------------------------------------------- InternVL as it was published

CHAT_SPECIALS = ("<img>", "</img>", "<IMG_CONTEXT>")
CHAT_DECODERS = ("InternLM2ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")


def internvl_chat(folder: Path, decoder: str = "InternLM2ForCausalLM", **more: Any) -> Any:
    """A checkpoint in InternVL's own format, with code of its own; returns the model.

    Args:
        folder: to write.
        decoder: one of :data:`CHAT_DECODERS`.
        more: fields of its ``config.json``.
    """
    from tests.remote_internvl import InternVLChatConfig, InternVLChatModel

    folder.mkdir(parents=True, exist_ok=True)
    internlm2 = decoder == "InternLM2ForCausalLM"
    made = internlm2_tokenizer(folder) if internlm2 else chat_tokenizer(folder)
    text = {
        **_text(4, rms_norm_eps=1e-5, rope_theta=1e4, hidden_act="silu"),
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "architectures": [decoder],
        "vocab_size": max(made.values()) + 1,
    }
    large = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
    small = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
    vision = _vision(layer_norm_eps=1e-6, hidden_act="gelu", **(small if internlm2 else large))
    fields = {
        "ps_version": "v2",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "force_image_size": vision["image_size"],
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 4,
        "template": "internlm2-chat" if internlm2 else "internvl2_5",
        **more,
    }
    config = InternVLChatConfig(llm_config=text, vision_config=vision, **fields)
    model = scatter(InternVLChatModel(config))
    model.img_context_token_id = made["<IMG_CONTEXT>"]
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = ["InternVLChatModel"]
    stored["auto_map"] = {
        "AutoConfig": "modeling_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    }
    (folder / "config.json").write_text(json.dumps(stored))
    code = Path(__file__).with_name("remote_internvl.py").read_text(encoding="utf-8")
    (folder / "modeling_internvl_chat.py").write_text(code, encoding="utf-8")
    return model


def chat_tokenizer(folder: Path) -> dict[str, int]:
    """Byte-level BPE as Qwen2's, saved whole."""
    names = ["<pad>", "<|im_end|>", "<|im_start|>", *CHAT_SPECIALS]
    tokenizer = fast_tokenizer(names, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab()


def internlm2_tokenizer(folder: Path) -> dict[str, int]:
    """`tokenizer.model` with spare pieces, and the JSON file that gives them their names."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(TEXTS) * 3),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(2)],
        pad_id=-1,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    named = {"<unk>": 0, "<s>": 1, "</s>": 2}
    named["<|im_end|>"] = read.piece_to_id("[UNUSED_TOKEN_0]")
    named["<|im_start|>"] = read.piece_to_id("[UNUSED_TOKEN_1]")
    named |= {token: VOCAB + place for place, token in enumerate(CHAT_SPECIALS)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    stored = {
        "added_tokens_decoder": {
            str(place): {"content": token, "special": True, **plain}
            for token, place in named.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    return named
