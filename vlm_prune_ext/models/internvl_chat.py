"""InternVL in the format in which it was published (``InternVLChatModel``), e.g. InternVL2-2B.

Code: https://github.com/OpenGVLab/InternVL. Such a repository brings code of its own, made for
transformers 4.37, which no longer runs: its InternLM2 has no ``generate`` since 4.50, and 5.x asks
for fields that it does not set. So the weights are read into transformers' own modules and nothing
of that code is run. InternLM2 is LLaMA with the three attention projections in one matrix and other
names, so this is exact; its tokenizer is built from ``tokenizer.model``.

It is done only where the user says ``trust_remote_code=True``, as for any checkpoint of that form.
Where weights or settings are of another kind (InternLM3, Phi-3, a variant with modules of its own)
the checkpoint's code is run then, if transformers can run it: :func:`load_remote`.

Deviations: answers end at the end-of-turn token, as there; tiles are resized on tensors, as in the
``-hf`` checkpoints, which may change a pixel by one step of 255.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.auto import AutoPrompts
from vlm_prune_ext.models.base import Family, LoadOptions, PromptProcessor, is_named
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.checkpoint import (
    Checkpoint,
    check_trust,
    explained,
    first_line,
    read_json,
    read_weights,
)
from vlm_prune_ext.models.generic import decoder_parts, find_decoder
from vlm_prune_ext.models.loading import load_tokenizer, token_id
from vlm_prune_ext.models.original import TEXT_FIELDS, check_weights
from vlm_prune_ext.models.prompts import IMAGE, STYLES, Style, chatml, merges_of

_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Decoders whose weights transformers' own modules take: class in ``llm_config`` -> model type."""

END = "<|im_end|>"
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "norm_type": "norm_type",
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
}
# In this order: longer names first.
_VISION_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_PROJECTOR_NAMES = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_INTERNLM2_NAMES = (
    ("tok_embeddings", "embed_tokens"),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention.wqkv.", ".self_attn.wqkv."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)

# What the published code says in front, by the `template` of config.json.
_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)


def _closed(system: str) -> Style:
    """InternVL2's turns: no line break behind the end of a turn."""
    return Style(
        system=f"<|im_start|>system\n{system}{END}",
        said_system=f"<|im_start|>system\n{{}}{END}",
        user=f"<|im_start|>user\n{{}}{END}",
        answer=f"{{}}{END}",
        opening="<|im_start|>assistant\n",
        image=f"{IMAGE}\n",
        after_system="",
    )


CHAT_STYLES: Mapping[str, Style] = {
    "internlm2-chat": _closed(_SYSTEM_2),
    "Hermes-2": _closed(_SYSTEM_2),
    "internvl2_5": chatml(f"{IMAGE}\n", system=_SYSTEM_2_5),
    "plain": STYLES["plain"],
}
"""Conversation templates, by the names that the checkpoints give them."""


def published_config(source: Checkpoint) -> InternVLConfig:
    """transformers' configuration of a checkpoint in the published format.

    Raises:
        InputError: a field that is missing, or a setting that transformers' modules do not have.
    """
    config, what = source.config, f"checkpoint {source.name!r}"
    parts: list[dict[str, Any]] = []
    for name in ("llm_config", "vision_config"):
        if not isinstance(config.get(name), dict):
            raise InputError(f"config.json of {what} has no {name}, which its format needs.")
        parts.append(config[name])
    text, vision = parts
    decoder = (text.get("architectures") or [None])[0]
    side = config.get("force_image_size") or vision.get("image_size")
    accepted = {
        "llm_config.architectures": (decoder, tuple(DECODERS)),
        "ps_version": (config.get("ps_version", "v1"), ("v2",)),
        "force_image_size": (side, (vision.get("image_size"),)),
        "template": (config.get("template"), tuple(CHAT_STYLES)),
        "use_thumbnail": (config.get("use_thumbnail", True), (True,)),
    }
    for name, (value, values) in accepted.items():
        if value not in values:
            raise InputError(
                f"{name}={value!r} of {what} is not known; accepted: {', '.join(map(str, values))}."
            )
    fields = {name: text[name] for name in (*TEXT_FIELDS, *_WINDOWS) if name in text}
    if "bias" in text:  # InternLM2's name
        fields["attention_bias"] = bool(text["bias"])
    tied = bool(text.get("tie_word_embeddings", False))
    fields |= {"use_cache": True, "tie_word_embeddings": tied}
    tower = {ours: vision[theirs] for theirs, ours in _VISION_FIELDS.items() if theirs in vision}
    made = InternVLConfig(
        text_config={"model_type": DECODERS[decoder], **fields},
        vision_config=InternVLVisionConfig(**tower).to_dict(),
        downsample_ratio=config.get("downsample_ratio", 0.5),
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=tied,
    )
    made.image_seq_length = int((side // tower["patch_size"] * made.downsample_ratio) ** 2)
    return made


def published_weights(source: Checkpoint, config: Any) -> dict[str, torch.Tensor]:
    """All weights under the names of transformers' modules, fused projections taken apart."""
    named: dict[str, torch.Tensor] = {}
    internlm2 = source.config["llm_config"]["architectures"][0] == "InternLM2ForCausalLM"
    for name, value in read_weights(source.folder, f"checkpoint {source.name!r}").items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        head, _, rest = name.partition(".")
        if head == "vision_model":
            named |= _vision_weight(rest, value)
        elif head == "mlp1":
            place, _, kind = rest.partition(".")
            layer = _PROJECTOR_NAMES.get(place, place)
            named[f"model.multi_modal_projector.{layer}.{kind}"] = value
        elif head == "language_model":
            named |= _text_weight(rest, value, config.text_config, internlm2)
        else:
            named[name] = value
    return named


def _vision_weight(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    for theirs, ours in _VISION_NAMES:
        name = name.replace(theirs, ours)
    name = f"model.vision_tower.{name}"
    if ".attention.qkv." not in name:
        return {name: value}
    thirds = zip("qkv", value.chunk(3), strict=True)
    return {name.replace(".qkv.", f".{part}_proj."): third for part, third in thirds}


def _text_weight(
    name: str, value: torch.Tensor, config: Any, internlm2: bool
) -> dict[str, torch.Tensor]:
    if internlm2:
        name = re.sub(r"^output\.", "lm_head.", name)
        for theirs, ours in _INTERNLM2_NAMES:
            name = name.replace(theirs, ours)
    if name.startswith("model."):
        name = "model.language_model." + name.removeprefix("model.")
    if ".self_attn.wqkv." not in name:
        return {name: value}
    # Per key-value head: the queries that share it, its key, its value.
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rows = value.view(groups, heads // groups + 2, -1, *value.shape[1:])
    parts = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}
    return {
        name.replace(".wqkv.", f".{part}_proj."): rows.reshape(-1, *value.shape[1:]).contiguous()
        for part, rows in parts.items()
    }


def _prompts(source: Checkpoint, model: Any, tokenizer: Any, per_tile: int) -> AutoPrompts:
    """Prompts and tiles as the published code makes them."""
    config, path = source.config, source.folder / "preprocessor_config.json"
    stored = read_json(path, f"checkpoint {source.name!r}") if path.is_file() else {}
    side = config.get("force_image_size") or config["vision_config"]["image_size"]
    pictures = GotOcr2ImageProcessor(
        size={"height": side, "width": side},
        image_mean=stored.get("image_mean") or IMAGENET_DEFAULT_MEAN,
        image_std=stored.get("image_std") or IMAGENET_DEFAULT_STD,
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 6),
        crop_to_patches=bool(config.get("dynamic_image_size", False)),
    )
    for name, token in _TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    processor = InternVLProcessor(
        pictures, tokenizer, InternVLVideoProcessor(), image_seq_length=per_tile
    )
    template = config["template"]
    styles = {template: CHAT_STYLES[template]}
    return AutoPrompts(model, processor, "internvl_chat", styles, processor.image_token_id)


def _load(source: Checkpoint, options: LoadOptions) -> tuple[Any, PromptProcessor]:
    what = f"checkpoint {source.name!r}"
    check_trust(source, options.trust_remote_code)
    tokenizer = load_chat_tokenizer(source)
    image = token_id(tokenizer, _TOKENS["context_image_token"], what)
    try:
        with explained(what):
            config = published_config(source)
            weights = published_weights(source, config)
        check_weights(InternVLForConditionalGeneration, config, weights, what)
    except InputError as misfit:
        model = load_remote(source, options, misfit, image)
        per_tile = tile_length(model)
    else:
        config.image_token_id = image
        with explained(what):
            model = InternVLForConditionalGeneration.from_pretrained(
                None, config=config, state_dict=weights, **options.from_pretrained_arguments()
            ).eval()
        per_tile = config.image_seq_length
    _set_ends(model, tokenizer, token_id(tokenizer, END, what))
    return model, _prompts(source, model, tokenizer, per_tile)


def _set_ends(model: Any, tokenizer: Any, stop: int) -> None:
    """Answers end with the assistant's turn, as the published code has it."""
    pad = tokenizer.pad_token_id
    made = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop,
        pad_token_id=stop if pad is None else pad,
    )
    model.generation_config = made
    if owns(model):  # its language model is who generates
        model.language_model.generation_config = made


def family_of(line: FamilyLine) -> Family:
    """Checkpoints of that format, and live models that their own code made."""
    return Family(line, owns, parts, is_named(*line.architectures), _load)


# -- internvl remote -------------------------------------------------------------------------------
# InternVL by the code that comes with a checkpoint: ``vision_model``, ``mlp1`` and
# ``language_model``, joined in ``forward`` and ``generate``.


WHY_NO_VISION = (
    "InternVL's tower gives four patches to one token and is not CLIP-like; methods that work in "
    "the language model apply"
)
_PARTS = ("vision_model", "mlp1", "language_model", "extract_feature")


def load_remote(
    source: Checkpoint, options: LoadOptions, misfit: InputError, image_token_id: int
) -> Any:
    """Run the checkpoint's own code.

    Args:
        source: with ``auto_map`` in its ``config.json``.
        options: that trust it.
        misfit: why transformers' own modules do not do.
        image_token_id: the placeholder, which such models are told from outside.

    Raises:
        InputError: ``misfit`` where there is no code, or that the code does not run here.
    """
    from transformers import AutoModel

    named = source.config.get("auto_map") or {}
    if "AutoModel" not in named:
        raise misfit
    arguments = options.from_pretrained_arguments()
    arguments.pop("revision", None)  # the folder is that revision
    try:
        model = AutoModel.from_pretrained(
            str(source.folder), trust_remote_code=True, output_loading_info=True, **arguments
        )[0]
    except Exception as error:  # whatever somebody's code raises
        said = f"fails under this transformers ({type(error).__name__}: {first_line(error)}"
        raise _no_way(source, f"{said.rstrip('.')})", misfit) from error
    if not owns(model) or not hasattr(model.language_model, "generate"):
        made = f"makes no model with {', '.join(_PARTS)} whose language model has generate()"
        raise _no_way(source, made, misfit)
    model.img_context_token_id = image_token_id
    return model.eval()


def _no_way(source: Checkpoint, said: str, misfit: InputError) -> InputError:
    return InputError(
        f"checkpoint {source.name!r} does not load: its own code {said}, and transformers' modules "
        f"do not take it ({str(misfit).rstrip('.')}); a checkpoint in Hugging Face format, whose "
        "name ends in -hf, would do."
    )


def tile_length(model: Any) -> int:
    """Visual tokens of one tile."""
    stated = getattr(model, "num_image_token", None)
    if stated is not None:
        return int(stated)
    config, vision = model.config, model.config.vision_config
    side = getattr(config, "force_image_size", None) or vision.image_size
    return int((side // vision.patch_size * config.downsample_ratio) ** 2)


def owns(model: Any) -> bool:
    """Whether a live model has that form."""
    return all(hasattr(model, name) for name in _PARTS) and hasattr(model, "img_context_token_id")


def parts(model: Any) -> ModelParts:
    """Where its parts are.

    Raises:
        InputError: a language model that is not built like LLaMA.
    """
    decoder = find_decoder(model.language_model)
    if decoder is None:
        raise InputError(
            f"{type(model.language_model).__name__} inside {type(model).__name__} is not built "
            "like LLaMA (layers with self_attn.q_proj): nothing to prune. vp.load() reads "
            "published InternVL checkpoints into modules that can be pruned."
        )
    return decoder_parts(
        model,
        decoder,
        why_no_vision=WHY_NO_VISION,
        watch_spans=_watch(model, model.language_model.get_input_embeddings()),
    )


def _watch(model: Any, table: nn.Module) -> Callable[[SpanSink], list[Undo]]:
    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple) -> None:
            ids, token = args[0] if args else None, model.img_context_token_id
            if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
                sink(ids == (-1 if token is None else token), None)

        return [table.register_forward_pre_hook(see).remove]

    return watch


# -- internvl tokenizer ----------------------------------------------------------------------------
# Tokenizers of InternVL checkpoints in their published format.


_BLANK = "▁"
_FIELDS = ("pad_token", "model_max_length", "clean_up_tokenization_spaces")


def load_chat_tokenizer(source: Checkpoint) -> Any:
    """The tokenizer of a checkpoint; no code of the checkpoint is run.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder, what = source.folder, f"checkpoint {source.name!r}"
    path = folder / "tokenizer_config.json"
    stored = read_json(path, what) if path.is_file() else {}
    model = folder / "tokenizer.model"
    name = str(stored.get("tokenizer_class", ""))
    pairs = all((folder / file).is_file() for file in ("vocab.json", "merges.txt"))
    try:
        if name.startswith("InternLM2Tokenizer") and model.is_file():
            return _internlm2(model, stored, what)
        if not name.startswith("LlamaTokenizer"):
            if (folder / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(str(folder))
            if pairs:
                return Qwen2Tokenizer.from_pretrained(str(folder))
    except InputError:
        raise
    except Exception as error:  # many kinds, by format and version
        raise InputError(f"The tokenizer of {what} cannot be read: {first_line(error)}") from error
    return load_tokenizer(source)


def _internlm2(path: Path, stored: Mapping[str, Any], what: str) -> PreTrainedTokenizerFast:
    extractor = SentencePieceExtractor(str(path))
    proto = extractor.proto
    found: Any = extractor.extract(BPE)
    vocabulary, merges = dict(found["vocab"]), merges_of(proto)
    added = {
        int(place): entry["content"] if isinstance(entry, Mapping) else str(entry)
        for place, entry in (stored.get("added_tokens_decoder") or {}).items()
    }
    pieces = {place: piece for piece, place in vocabulary.items()}
    for place, token in added.items():
        if place in pieces and pieces[place] != token:
            del vocabulary[pieces[place]]
            vocabulary[token] = place
    prefix = proto.normalizer_spec.add_dummy_prefix
    unknown, start, end = proto.trainer_spec.unk_piece, "<s>", "</s>"
    made = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    front = [normalizers.Prepend(_BLANK)] if prefix else []
    made.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", _BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    controls = {place: piece.piece for place, piece in enumerate(proto.pieces) if piece.type == 3}
    for place, token in sorted({**controls, **added}.items()):
        made.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if made.token_to_id(token) != place:
            raise InputError(
                f"added_tokens_decoder of {what} puts {token!r} at {place}, but the vocabulary "
                f"before it ends at {made.get_vocab_size() - 2}."
            )
    if stored.get("add_bos_token", True):
        made.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, made.token_to_id(start))]
        )
    more = {name: stored[name] for name in _FIELDS if stored.get(name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        padding_side="left",
        **more,
    )
