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
    from transformers import PreTrainedTokenizerFast

    made = byte_tokenizer(specials, start)
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **fields)


def fuyu_tokenizer() -> Any:
    """Blanks as marks, one in front of all, and special tokens as pieces like others: as Fuyu's."""
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(
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
                fill(value, 0.1, 0.0 if "Gemma3" in type(module).__name__ else 1.0)
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


def qwen2_5_vl(folder: Path, layers: int = 4) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    names = ["<pad>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
    names += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = fast_tokenizer(names, eos_token="<|im_end|>", pad_token="<pad>")
    config = Qwen2_5_VLConfig(
        text_config=_text(
            layers,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": HIDDEN,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=names.index("<|image_pad|>"),
        video_token_id=names.index("<|video_pad|>"),
        vision_start_token_id=names.index("<|vision_start|>"),
        vision_end_token_id=names.index("<|vision_end|>"),
    )
    scatter(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    sizes = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor()
    ).save_pretrained(folder)


GEMMA_LAYERS = ("sliding", "sliding", "full", "sliding", "full", "sliding")


def gemma3(folder: Path, kinds: tuple[str, ...] = GEMMA_LAYERS, window: int = 28) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

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
    config = Gemma3Config(
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
    scatter(Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    pictures = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    Gemma3Processor(pictures, tokenizer, image_seq_length=16).save_pretrained(folder)


def internvl(folder: Path, layers: int = 4) -> None:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

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
    config = InternVLConfig(
        text_config=_text(layers, model_type="qwen2"),
        vision_config=_vision(),
        image_token_id=names.index("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    scatter(InternVLForConditionalGeneration(config)).save_pretrained(folder)
    pictures = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    InternVLProcessor(
        pictures, tokenizer, InternVLVideoProcessor(), image_seq_length=4
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
    from transformers import BlipImageProcessor

    return BlipImageProcessor(size={"height": 28, "width": 28})


def blip2_opt(folder: Path, layers: int = 4) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

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
    _blip2(folder, Blip2Config, Blip2ForConditionalGeneration, text)
    Blip2Processor(_blip_pictures(), tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)


def _blip2(folder: Path, config: Any, kind: Any, text: dict[str, Any]) -> None:
    made = config(
        vision_config=_vision(),
        qformer_config=_qformer(),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=2,
    )
    scatter(kind(made)).save_pretrained(folder)


def blip2_t5(folder: Path) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

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
    _blip2(folder, Blip2Config, Blip2ForConditionalGeneration, text)
    Blip2Processor(_blip_pictures(), tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)


def instructblip(folder: Path, layers: int = 4) -> None:
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    names = ["<pad>", "</s>", "<image>", "<s>"]
    tokenizer = fast_tokenizer(names, "<s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    reader = fast_tokenizer(["[PAD]", "[CLS]"], "[CLS]", pad_token="[PAD]")
    reader.padding_side = "right"
    text = _text(layers, model_type="llama", bos_token_id=3)
    _blip2(folder, InstructBlipConfig, InstructBlipForConditionalGeneration, text)
    InstructBlipProcessor(
        _blip_pictures(), tokenizer, reader, num_query_tokens=QUERIES
    ).save_pretrained(folder)


def fuyu(folder: Path, layers: int = 4) -> None:
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

    tokenizer = fuyu_tokenizer()
    text = _text(layers, model_type="persimmon", bos_token_id=1, eos_token_id=2)
    del text["num_key_value_heads"]
    config = FuyuConfig(
        **text,
        text_config=text,
        patch_size=10,
        image_size=60,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    scatter(FuyuForCausalLM(config)).save_pretrained(folder)
    pictures = FuyuImageProcessor(
        size={"height": 40, "width": 60}, patch_size={"height": 10, "width": 10}
    )
    FuyuProcessor(pictures, tokenizer).save_pretrained(folder)


# -------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Kind:
    """A family as transformers has it.

    Attributes:
        make: writes a checkpoint into a folder.
        model, processor: names of transformers' classes.
        image: what stands for an image in our text, and what in the processor's.
        places: the text may place images.
    """

    make: Callable[[Path], None]
    model: str
    processor: str
    image: tuple[str, str]
    places: bool = False


KINDS = {
    "qwen2_5_vl": Kind(
        qwen2_5_vl,
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        ("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
        places=True,
    ),
    "gemma3": Kind(
        gemma3,
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        ("<image>", "<start_of_image>"),
        places=True,
    ),
    "blip2_opt": Kind(
        blip2_opt, "Blip2ForConditionalGeneration", "Blip2Processor", ("<image>", "")
    ),
    "instructblip": Kind(
        instructblip,
        "InstructBlipForConditionalGeneration",
        "InstructBlipProcessor",
        ("<image>", ""),
    ),
    "internvl": Kind(
        internvl,
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        ("<image>", "<IMG_CONTEXT>"),
        places=True,
    ),
    "fuyu": Kind(fuyu, "FuyuForCausalLM", "FuyuProcessor", ("<image>", "")),
    "blip2_t5": Kind(blip2_t5, "Blip2ForConditionalGeneration", "Blip2Processor", ("<image>", "")),
}


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
