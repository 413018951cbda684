"""Conversation templates, by the names that LLaVA and VLMEvalKit give them, and what is particular
to SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

IMAGE, VIDEO = "<image>", "<video>"

_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)


@dataclass(frozen=True)
class Turn:
    """What one side says: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True)
class Style:
    """How a conversation becomes one text.

    Attributes:
        system: what stands in front where the conversation brings no system message.
        said_system: frame of a system message that the conversation brings.
        user: frame of a user's turn; ``{}`` is what they say.
        answer: frame of an assistant's turn.
        opening: what the assistant's answer follows.
        image, video: what an image, and a video, becomes inside a turn.
        after_system: what divides a system message of the conversation from the first turn.
    """

    system: str = ""
    said_system: str = "{}"
    user: str = "{}"
    answer: str = "{}"
    opening: str = ""
    image: str = IMAGE + "\n"
    video: str = VIDEO + "\n"
    after_system: str = " "

    def single(self, text: str, images: int, videos: int = 0) -> str:
        """The prompt of one question; images and videos go in front unless the text places them."""
        if videos and VIDEO not in text:
            text = self.video * videos + text
        if IMAGE not in text:
            text = self.image * images + text
        return self.conversation([Turn("user", text)])

    def content(self, pieces: Sequence[str | None]) -> str:
        """The text of one turn from its pieces, ``None`` for an image."""
        return "".join(self.image if piece is None else piece for piece in pieces)

    def conversation(self, turns: Sequence[Turn]) -> str:
        """The whole prompt, up to where the assistant's next words begin."""
        text = self.system
        for index, turn in enumerate(turns):
            last = index == len(turns) - 1
            if turn.role == "system":
                text = _fill(self.said_system, turn.text.strip()) + self.after_system
            elif turn.role == "user":
                text += _fill(self.user, turn.text)
            elif last:  # an answer that is to be continued
                return text + self.opening + _fill(self.answer.partition("{}")[0] + "{}", turn.text)
            else:
                text += self.opening + _fill(self.answer, turn.text)
        return text + self.opening


def _fill(frame: str, text: str) -> str:
    before, _, after = frame.partition("{}")
    return before + text + after


def chatml(image: str, system: str | None = None) -> Style:
    """The turns of Qwen's models, which InternVL takes too.

    Args:
        image: what an image becomes.
        system: what is said where the conversation brings no system message.
    """
    frame = "<|im_start|>system\n{}<|im_end|>\n"
    return Style(
        system="" if system is None else _fill(frame, system),
        said_system=frame,
        user="<|im_start|>user\n{}<|im_end|>\n",
        answer="{}<|im_end|>\n",
        opening="<|im_start|>assistant\n",
        image=image,
        after_system="",
    )


STYLES: Mapping[str, Style] = {
    # LLaVA's own conversation of that name.
    "vicuna_v1": Style(
        system=_CURIOUS.format("user"),
        user="USER: {} ",
        answer=" {}</s>",
        opening="ASSISTANT:",
    ),
    # The string that VLMEvalKit's LLaVA class puts together: other words, other blanks.
    "vlmeval": Style(
        system=_CURIOUS.format("human"),
        user="USER: {} ",
        answer="{}</s>",
        opening="ASSISTANT: ",
        image=f" {IMAGE} ",
    ),
    "mistral_instruct": Style(user="[INST] {} [/INST]", answer=" {} </s>", after_system="\n"),
    "plain": Style(),
}
"""Name -> template. ``plain`` takes the text as the whole prompt."""


def without_markers(text: str) -> str:
    """The text alone, for families whose images have a fixed place."""
    return text.replace(f"{IMAGE}\n", "").replace(IMAGE, "")


# -- sentencepiece ---------------------------------------------------------------------------------
# Two things that transformers (checked: 5.17) does otherwise than sentencepiece does with
# LLaMA's ``tokenizer.model``, and that change a prompt's ids: it does not look at the scores of
# pieces, and it puts no blank in front of text that begins with one.


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
