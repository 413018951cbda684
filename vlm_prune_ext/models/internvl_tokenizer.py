"""Tokenizers of InternVL checkpoints in their published format.

Those on Qwen2 and LLaMA are transformers' own. Those on InternLM2 name a class that comes with the
checkpoint; here the same tokenizer is built from its ``tokenizer.model``: byte-fallback BPE without
a blank in front (where the file says so), with spare pieces renamed to the special tokens that
``added_tokens_decoder`` of ``tokenizer_config.json`` puts at their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line, read_json
from vlm_prune_ext.models.loading import load_tokenizer
from vlm_prune_ext.models.sentencepiece import merges_of

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
