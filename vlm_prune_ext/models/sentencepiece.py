"""Two things that transformers (checked: 5.17) does otherwise than sentencepiece does with LLaMA's
``tokenizer.model``, and that change a prompt's ids: it does not look at the scores of pieces, and
it puts no blank in front of text that begins with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

_BLANK = " "
_BPE, _NORMAL = 2, 1  # sentencepiece's numbers for a kind of model, and for a kind of piece


def merges_of(proto: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which byte-pair encoding joins them: by the score of what they become.

    transformers orders them by id. LLaMA's runs of blanks have early ids and the
    lowest scores, so two blanks in front of a word would be joined before the word takes one.
    """
    vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    return generate_merges(vocabulary, scores)


def blank_in_front(tokenizer: Any, text: str) -> str:
    """What a LLaMA tokenizer needs in front of a text: the blank that begins every text comes in
    front of the text's own, as behind the picture in VLMEvalKit's prompt."""
    eaten = isinstance(tokenizer, LlamaTokenizer) and text.startswith(_BLANK)
    return _BLANK if eaten and _ids(tokenizer, " a") == _ids(tokenizer, "a") else ""


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def order_merges(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer that was read from ``tokenizer.model`` its merges in their right order."""
    proto = SentencePieceExtractor(str(path)).proto
    if proto.trainer_spec.model_type != _BPE:
        return
    backend = tokenizer.backend_tokenizer
    vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    unknown = backend.model.unk_token
    backend.model = BPE(
        vocabulary, merges_of(proto), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
