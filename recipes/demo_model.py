"""Train a demo model from nothing: ``python recipes/demo_model.py --out DIR --device cuda``.

The result is a LLaVA-1.5 in the original format, of the sizes that the JSON files of ``--template``
state (by default those of the checkpoint that ships with the package). The modules are those of
transformers, the optimiser is ``torch.optim.AdamW``, the data are scenes drawn from their seeds.

1. *Tower.* Each of the 576 patches says what covers it: colour, shape, size, character of a sign,
   which object from the left, how far to its centre. These labels are free, since we drew the
   scene; the heads that say so are dropped afterwards. At the same time tower and a text half learn
   to find each other's picture and description in a batch, as CLIP does: the CLS token gets a
   meaning, and methods that compare patches with the question have something to compare with.
2. *Language.* The tower stays as it is, as in LLaVA. Projector and language model learn to answer,
   with the ordinary loss on the tokens of the answer and nothing else: no term points attention
   anywhere, and no token is dropped while learning. Some twenty questions are packed behind each
   picture. A mask lets each see the picture and itself only, at the positions it would have if it
   stood alone, so that a packed question has the logits of a single one (a test holds this).

Each stage resumes from ``DIR/work``; ``DIR/log.jsonl`` and ``DIR/curve.png`` follow it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AttentionInterface,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo import questions as qa
from vlm_prune_ext.demo.drawing import (
    CHARACTERS,
    COLORS,
    FIRST_TRAINING_SEED,
    GRID,
    IMAGE_SIZE,
    MAX_OBJECTS,
    PATCH,
    RADII,
    SHAPES,
    TEXT_LENGTHS,
    Scene,
    SceneText,
    draw,
    make_scene,
)
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.original import OriginalCheckpoint

PATCHES = GRID * GRID
IGNORE = -100
LENGTH = 1280
"""Tokens of a packed prompt: system text, picture, questions."""
PLACES = 8
"""Columns and rows in which an object's place is asked for, in training only."""
ASKED = (
    *(("vqa", "relation"), ("yn", "relation"), ("vqa", "place")) * 2,
    *(("vqa", "count"), ("yn", "existence"), ("mcq", "any")) * 2,
    *(("mcq", "relation"), ("yn", "comparison"), ("yn", "count")),
    *(("mcq", "named"), ("yn", "named")),
    *(("vqa", "text"), ("yn", "text"), ("mcq", "text"), ("vqa", "text")),
    *(("vqa", "color"), ("vqa", "shape"), ("vqa", "position")),
    *(("yn", "color"), ("yn", "position"), ("caption", "caption")),
)
"""What is asked about a picture, in an order of its own, as far as there is room."""
CATEGORIES = tuple(
    dict.fromkeys((*qa.OPEN_QUESTIONS, *qa.YES_NO_QUESTIONS, "place", "named", "caption"))
)

# -- wording ---------------------------------------------------------------------------------------
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


def place_question(scene: Scene, rng: np.random.Generator) -> qa.Question:
    """In which column or row an object is: a step towards telling which of two is further left."""
    index = int(rng.integers(len(scene.objects)))
    item = scene.objects[index]
    word, at = (("column", item.x), ("row", item.y))[int(rng.integers(2))]
    text = f"In which {word} of {PLACES} is the {item.name}?"
    return qa.Question("place", text, str(int(at * PLACES / IMAGE_SIZE) + 1), (index + 1,))


def named_question(scene: Scene, kind: str, rng: np.random.Generator) -> qa.Question | None:
    """Which option is it, or are two words the same: what the picture does not matter for."""
    asked = qa.choice_question(scene, "color", qa.LETTERS[int(rng.integers(4))], rng)
    if asked is None:
        return None
    right = asked.options[qa.LETTERS.index(asked.answer)]
    if kind == "mcq":
        return qa.Question("named", f"Which option is {right}?", asked.answer, (), asked.options)
    other = asked.options[int(rng.integers(4))] if rng.random() < 0.5 else right
    return qa.Question("named", f"Is {right} {other}?", "Yes" if other == right else "No", ())


def random_question(
    scene: Scene, kind: str, category: str, rng: np.random.Generator
) -> qa.Question | None:
    """A training question, or `None` where the scene does not allow it."""
    if kind == "caption":
        return qa.caption_question(scene)
    if category == "place":
        return place_question(scene, rng)
    if category == "named":
        return named_question(scene, kind, rng)
    if kind == "yn":
        return qa.yes_no_question(scene, category, bool(rng.integers(2)), rng)
    if category == "any":
        category = tuple(qa.OPEN_QUESTIONS)[int(rng.integers(len(qa.OPEN_QUESTIONS)))]
    if kind == "mcq":
        return qa.choice_question(scene, category, qa.LETTERS[int(rng.integers(4))], rng)
    return qa.open_question(scene, category, rng)


# -- tokenizers ------------------------------------------------------------------------------------
def tokenizer_text() -> Iterator[str]:
    """Sentences that hold each word the model will meet, in about their real proportions.

    What signs say is left out, so that no piece ever holds two of a sign's characters.
    """
    rng = np.random.default_rng(7)
    for form in SYSTEMS:
        for _ in range(40):
            yield image_prefix(form)
    yield " ".join(CHARACTERS)
    yield from ("What does the sign say?", "What is written on the sign?", "Does the sign say?") * 9
    for seed in range(1500):
        scene = make_scene(FIRST_TRAINING_SEED + seed)
        yield scene.caption
        for kind, category in ASKED[seed % 2 :: 2]:
            question = random_question(scene, kind, category, rng)
            if question is not None and question.category != "text":
                text = after_image("llava", word_question(question, kind, rng))
                yield from (line for line in text.split("\n") if line)
                yield question.answer


def train_tokenizer(vocabulary: int = 960) -> bytes:
    """A LLaMA-style sentencepiece model: BPE with byte fallback, `<unk>`, `<s>`, `</s>` first."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
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


class Encoder:
    """Text to token ids, piece by piece as LLaVA's `tokenizer_image_token` does."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.blank = self.pieces.piece_to_id("\u2581")
        self._cached = lru_cache(maxsize=200_000)(self._encode)

    def __reduce__(self) -> Any:
        return Encoder, (self.model,)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.pieces.encode(text))

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, without `<s>`."""
        return list(self._cached(text))


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A few of a picture's things in any order, for the contrast of picture and text."""
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:4]]
    parts = [
        f"a {item.size} {item.name}" if rng.random() < 0.3 else f"a {item.name}" for item in items
    ]
    if scene.text is not None and rng.random() < 0.7:
        parts.insert(int(rng.integers(len(parts) + 1)), f"a sign that says {scene.text.text}")
    return ", ".join(parts)


def train_text_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """CLIP's kind of tokenizer: lower case, BPE with word ends, the end token the largest id."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    base = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    base.normalizer = normalizers.Lowercase()
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, end_of_word_suffix="</w>", show_progress=False
    )
    alphabet = [f"{c} {c.lower()}{c.lower()}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    base.train_from_iterator([*tokenizer_text(), *alphabet], trainer)
    start, end = "<|startoftext|>", "<|endoftext|>"
    base.add_special_tokens([start, end])
    ids = [(name, base.token_to_id(name)) for name in (start, end)]
    base.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token=start, eos_token=end, pad_token=end, unk_token=end
    )


# -- data ------------------------------------------------------------------------------------------
PATCH_HEADS = {
    "kind": 3,
    "color": len(COLORS),
    "shape": len(SHAPES),
    "size": len(RADII),
    "character": len(CHARACTERS),
    "digit": max(TEXT_LENGTHS),
    "rank": MAX_OBJECTS,
    "offset": 2,
}
"""What each patch is asked, and how many answers there are; `character` and `digit` are which one
covers it and its place in the sign; `offset` is the way to the object's centre in patches, the one
thing learnt by regression."""


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
        labels["offset"][mine, 0] = item.x / PATCH - (mine % GRID + 0.5)
        labels["offset"][mine, 1] = item.y / PATCH - (mine // GRID + 0.5)
    if scene.text is not None:
        mine, digits = _under_characters(scene.text, np.flatnonzero(owners < 0))
        labels["digit"][mine] = digits
        labels["character"][mine] = [CHARACTERS.index(scene.text.text[d]) for d in digits]
    return labels


def _under_characters(sign: SceneText, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of some patches whose centre a character covers, and its place in the sign."""
    x = (patches % GRID + 0.5) * PATCH - (sign.x - sign.width / 2)
    y = (patches // GRID + 0.5) * PATCH - sign.y
    digits = np.floor((x - sign.scale / 2) / (6 * sign.scale)).astype(np.int64)
    inside = (digits >= 0) & (digits < len(sign.text)) & (np.abs(y) <= 4.5 * sign.scale)
    return patches[inside], digits[inside]


def pack(
    encode: Encoder, scene: Scene, form: str, room: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Questions about a scene one behind the other, in arrays of `room`.

    `ids` and `labels` (a label stands where its token is predicted, one place before it); `slot`
    numbers the questions from 1, 0 where nothing stands; `place` counts each question's tokens from
    0; `category` of the question, `IGNORE` where there is no label.
    """
    arrays = {name: np.zeros(room, dtype=np.int64) for name in ("ids", "slot", "place")}
    arrays |= {name: np.full(room, IGNORE, dtype=np.int64) for name in ("labels", "category")}
    at, slot = 0, 0
    for turn in rng.permutation(len(ASKED)):
        kind, category = ASKED[turn]
        question = random_question(scene, kind, category, rng)
        if question is None:
            continue
        prompt = encode(after_image(form, word_question(question, kind, rng)))
        # Tokenizers differ in whether a piece that begins with a space gets a blank token as well.
        skip = form == "vlmeval" and prompt[0] == encode.blank and rng.random() < 0.5
        prompt = prompt[int(skip) :]
        whole = [*prompt, *encode(question.answer), 2]
        end = at + len(whole)
        if end > room:
            continue
        slot += 1
        answer = slice(at + len(prompt) - 1, end - 1)
        arrays["ids"][at:end] = whole
        arrays["slot"][at:end] = slot
        arrays["place"][at:end] = np.arange(len(whole))
        arrays["labels"][answer] = whole[len(prompt) :]
        arrays["category"][answer] = CATEGORIES.index(question.category)
        at = end
    return arrays


class Batches(IterableDataset):
    """Endless batches of fresh training scenes, a function of their numbers alone.

    Args:
        size: pictures per batch.
        first: number of the first batch, so that a resumed run sees new scenes.
        encode: for stage 2, which gets questions.
        describe: for stage 1, which gets labels of patches and descriptions: text -> ids.
    """

    def __init__(
        self,
        size: int,
        first: int,
        encode: Encoder | None = None,
        describe: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.size, self.first, self.encode, self.describe = size, first, encode, describe

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Workers take turns, so that their number changes nothing."""
        worker = get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.first + offset
        while True:
            yield self._batch(number)
            number += step

    def _batch(self, number: int) -> dict[str, Tensor]:
        seed = FIRST_TRAINING_SEED + number * self.size
        scenes = [make_scene(seed + i) for i in range(self.size)]
        drawn = [draw(scene) for scene in scenes]
        rng = np.random.default_rng([2, number])
        arrays = {"pixels": np.stack([pixels for pixels, _ in drawn])}
        if self.encode is None:
            rows = [patch_labels(s, o) for s, (_, o) in zip(scenes, drawn, strict=True)]
            arrays |= self._descriptions([description(scene, rng) for scene in scenes])
        else:
            form = str(rng.choice(tuple(SYSTEMS), p=(0.45, 0.45, 0.1)))
            arrays["prefix"] = np.array([1, *self.encode(image_prefix(form))])
            room = LENGTH - PATCHES - len(arrays["prefix"])
            rows = [pack(self.encode, scene, form, room, rng) for scene in scenes]
        arrays |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _descriptions(self, texts: list[str]) -> dict[str, np.ndarray]:
        if self.describe is None:
            return {}
        made = self.describe(
            texts,
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="np",
        )
        return {"text": made["input_ids"], "text_mask": made["attention_mask"]}


# -- model -----------------------------------------------------------------------------------------
TEXT_LENGTH = 64
"""Tokens of the text half at most."""
FLEX = "packed_flex"
"""Attention that skips what a packed question does not see; two to three times as fast."""


def flex_layer(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """FlexAttention in the form that transformers calls."""
    scale = more.get("scaling")
    mixed = flex_attention(query, key, value, block_mask=mask, scale=scale)
    return mixed.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


@lru_cache(maxsize=1)
def block_mask_maker() -> Any:
    """`create_block_mask` that never holds the whole mask."""
    return torch.compile(create_block_mask)


def new_model(template: Path) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the sizes that an original-format folder states, float32, random.

    Matrices begin at `0.7 / sqrt(width)`: the default of 0.02 suits models thirty times as wide.
    """
    fields = OriginalCheckpoint(Checkpoint(str(template))).multimodal_config()
    fields["text_config"].initializer_range = 0.7 * fields["text_config"].hidden_size ** -0.5
    return LlavaForConditionalGeneration(LlavaConfig(**fields)).float()


class TextHalf(nn.Module):
    """What CLIP has beside its vision tower: a text model and both projections.

    Args:
        fields: of the text model, as the checkpoint's ``config.json`` states them.
        end: id of the end token, at which a text is read.
        vision_width: of the tower.
    """

    def __init__(self, fields: dict[str, Any], end: int, vision_width: int) -> None:
        super().__init__()
        config = CLIPTextConfig(**{**fields, "eos_token_id": end})
        self.text = CLIPTextModelWithProjection(config)
        self.visual_projection = nn.Linear(vision_width, fields["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, pooled: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pictures `(batch, width)` and texts `(batch, n)` -> logits `(batch, batch)`."""
        images = F.normalize(self.visual_projection(pooled), dim=-1)
        texts = F.normalize(self.text(input_ids=ids, attention_mask=mask).text_embeds, dim=-1)
        return self.logit_scale.clamp(max=4.6).exp() * images @ texts.T


def tower_states(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`(batch, 336, 336, 3)` uint8 to the `(batch, 576, width)` features that LLaVA selects, and
    the normed last CLS state `(batch, width)`."""
    mean, std = (
        torch.tensor(values, device=pixels.device)
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    scaled = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    output = model.model.vision_tower(scaled, output_hidden_states=True)
    return output.hidden_states[model.config.vision_feature_layer][:, 1:], output.pooler_output


def packed_layout(batch: dict[str, Tensor], rule: bool = False) -> tuple[Tensor, Any]:
    """Positions `(batch, n)` and mask `(batch, 1, n, n)` (true: is seen) of packed prompts: the
    prefix, the picture's 576, then questions, each as if it alone stood behind the picture.

    With `rule` the mask is a function of row, head, query and key, as FlexAttention takes it.
    """
    head = len(batch["prefix"]) + PATCHES
    slot = F.pad(batch["slot"], (head, 0), value=-1)
    positions = F.pad(batch["place"] + head, (head, 0))
    positions[:, :head] = torch.arange(head, device=slot.device)

    def sees(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        return (query >= key) & ((slot[row, key] == -1) | (slot[row, query] == slot[row, key]))

    if rule:
        return positions, sees
    row = torch.arange(len(slot), device=slot.device)[:, None, None]
    order = torch.arange(slot.shape[1], device=slot.device)
    return positions, sees(row, None, order[:, None], order[None])[:, None]


def answer_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states of the packed questions, `(batch, room, width)`."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        features, _ = tower_states(model, batch["pixels"])
    visual = model.model.multi_modal_projector(features)
    prefix = embed(batch["prefix"]).expand(len(visual), -1, -1).to(visual.dtype)
    text = embed(batch["ids"]).to(visual.dtype)
    flex = model.config.text_config._attn_implementation == FLEX
    positions, mask = packed_layout(batch, rule=flex)
    if flex:
        mask = block_mask_maker()(mask, len(visual), None, LENGTH, LENGTH, device=visual.device)
    states = model.model.language_model(
        inputs_embeds=torch.cat([prefix, visual, text], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return states[:, -text.shape[1] :]


# -- losses ----------------------------------------------------------------------------------------
TOWER_NAMES = (*(name for name in PATCH_HEADS if name != "offset"), "match")


def tower_loss(
    model: Any, heads: nn.Module, half: TextHalf, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses of the patches and of the contrast; per name of `TOWER_NAMES` how many were right, of
    how many."""
    features, pooled = tower_states(model, batch["pixels"])
    total, tally = features.new_zeros((), dtype=torch.float32), []
    for name, part in zip(
        PATCH_HEADS, heads(features).float().split([*PATCH_HEADS.values()], -1), strict=True
    ):
        if name == "offset":
            known = (batch["color"] != IGNORE)[..., None]
            error = F.smooth_l1_loss(part, batch[name], reduction="none") * known
            total = total + error.sum() / known.sum().clamp(min=1) / 2
            continue
        target = batch[name]
        total = total + F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        tally.append(_right(part.argmax(-1) == target, target != IGNORE))
    logits = half(pooled, batch["text"], batch["text_mask"]).float()
    own = torch.arange(len(logits), device=logits.device)
    total = total + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    tally.append(_right(logits.argmax(-1) == own, own >= 0))
    return total, torch.stack(tally)


def _right(right: Tensor, known: Tensor) -> Tensor:
    return torch.stack([(right & known).sum(), known.sum()]).double()


def answer_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens, and per category how many answers were right as a
    whole, of how many. An answer of n tokens weighs the root of n."""
    known = batch["labels"] != IGNORE
    logits = model.lm_head(answer_states(model, batch)[known]).float()
    target, category = batch["labels"][known], batch["category"][known]
    row = torch.arange(len(known), device=known.device)[:, None].expand_as(known)[known]
    answer = row * (LENGTH + 1) + batch["slot"][known]
    _, answer, sizes = torch.unique(answer, return_inverse=True, return_counts=True)
    weights = sizes[answer].float().rsqrt()
    losses = F.cross_entropy(logits, target, reduction="none")
    wrong = torch.zeros(len(sizes), device=known.device, dtype=torch.float64)
    wrong.index_add_(0, answer, (logits.argmax(-1) != target).double())
    of = torch.zeros_like(answer[: len(sizes)]).scatter_(0, answer, category)
    tally = torch.zeros(len(CATEGORIES), 2, device=known.device, dtype=torch.float64)
    tally.index_add_(0, of, torch.stack([wrong == 0, wrong >= 0], dim=1).double())
    return (losses * weights).sum() / weights.sum(), tally


# -- training --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    Args:
        stage: its name in files and the log.
        steps: updates in all.
        batch: pictures per update.
        peak: highest learning rate; reached after 2 % of the steps, from 30 % on a cosine to 0.
        every: steps between lines of the log.
        pause: seconds after which the stage saves itself and stops, to be gone on with later.
    """

    stage: str
    steps: int
    batch: int
    peak: float = 1e-3
    every: int = 50
    pause: float = math.inf

    def rate(self, step: int) -> float:
        """Learning rate over `peak`."""
        done = step / self.steps
        if done < 0.02:
            return (step + 1) / (0.02 * self.steps + 1)
        return 1.0 if done < 0.3 else 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))


Loss = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def train_stage(
    plan: Plan,
    module: nn.Module,
    loss_of: Loss,
    names: Sequence[str],
    batches: Batches,
    out: Path,
    workers: int,
) -> bool:
    """Run one stage, from where an earlier call stopped; false if it has to be gone on with.

    Args:
        module: what is trained; its state is what a stopped stage goes on from.
        loss_of: batch -> loss, and `(len(names), 2)`: right answers, and all.
    """
    device = next(module.parameters()).device
    fused = device.type == "cuda"
    weights = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, plan.peak, (0.9, 0.98), weight_decay=0.02, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, plan.rate)
    parts = {"module": module, "optimiser": optimiser, "schedule": schedule}
    path = out / "work" / f"{plan.stage}.pt"
    step, spent = _resume(path, parts, device)
    batches.first += step
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=fused)
    source, begun = iter(loader), time.monotonic()
    seconds, tally, losses = spent, torch.zeros(len(names), 2, device=device), []
    while step < plan.steps and seconds - spent < plan.pause:
        batch = {k: v.to(device, non_blocking=True) for k, v in next(source).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=fused):
            loss, right = loss_of(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        step += 1
        tally += right
        losses.append(loss.detach())
        if step % plan.every == 0 or step == plan.steps:
            seconds = spent + time.monotonic() - begun
            record = {"stage": plan.stage, "step": step, "loss": float(torch.stack(losses).mean())}
            shares = (tally[:, 0] / tally[:, 1]).tolist()
            record |= {n: s for n, s in zip(names, shares, strict=True) if s == s}
            _log(out / "log.jsonl", {**record, "pictures": step * plan.batch, "seconds": seconds})
            tally.zero_()
            losses.clear()
    _save(path, step, seconds, parts)
    return step == plan.steps


def _resume(path: Path, parts: dict[str, Any], device: torch.device) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"], saved["seconds"]


def _save(path: Path, step: int, seconds: float, parts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, "seconds": seconds, **state}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _log(path: Path, record: dict[str, Any]) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    line = json.dumps(rounded)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


# -- results ---------------------------------------------------------------------------------------
def save_checkpoint(
    model: Any,
    half: TextHalf,
    tokenizer: bytes,
    describe: PreTrainedTokenizerFast,
    template: Path,
    folder: Path,
) -> None:
    """The original LLaVA format: the template's JSON files, bfloat16 weights under their names;
    the folder of the tower is a whole CLIP with its tokenizer."""
    tower = Path(json.loads((template / "config.json").read_text())["mm_vision_tower"])
    (folder / tower).mkdir(parents=True, exist_ok=True)
    for path in (*template.glob("*.json"), *(template / tower).glob("*.json")):
        shutil.copyfile(path, folder / path.relative_to(template))
    describe.save_pretrained(folder / tower)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    whole: dict[str, Tensor] = {}
    clip = {name.removeprefix("text."): value for name, value in half.state_dict().items()}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            clip[f"vision_model.{rest}"] = value
        else:
            whole[_original_name(name)] = value
    for path, weights in ((folder, whole), (folder / tower, clip)):
        ready = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in weights.items()}
        save_file(ready, path / "model.safetensors", metadata={"format": "pt"})


def _original_name(name: str) -> str:
    for part, place in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"multi_modal_projector.{part}", f"mm_projector.{place}")
    return name.replace("model.language_model.", "model.")


def draw_curve(log: Path, picture: Path) -> None:
    """Shares of right answers, and the loss, of both stages against pictures seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, stage, names in zip(
        axes, ("tower", "language"), (TOWER_NAMES, CATEGORIES), strict=True
    ):
        mine = [record for record in records if record["stage"] == stage]
        for name in names:
            points = [(r["pictures"], 100 * r[name]) for r in mine if name in r]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(title=stage, xlabel="pictures")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncol=2, loc="lower right")
        losses = axis.twinx()
        losses.plot(*zip(*[(r["pictures"], r["loss"]) for r in mine], strict=True), "k:", lw=0.8)
        losses.set(yscale="log", ylabel="loss (dotted)")
    axes[0].set_ylabel("right on fresh training scenes, %")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def train(
    out: Path, template: Path, tower: Plan, language: Plan, device: torch.device, workers: int
) -> bool:
    """Both stages; checkpoint, log and curve land in `out`. False: paused, call again."""
    torch.manual_seed(1)
    out.mkdir(parents=True, exist_ok=True)
    model: Any = new_model(template)
    folder = json.loads((template / "config.json").read_text())["mm_vision_tower"]
    clip = json.loads((template / folder / "config.json").read_text())
    describe = train_text_tokenizer(clip["text_config"]["vocab_size"])
    width = model.config.vision_config.hidden_size
    half = TextHalf(clip["text_config"], int(describe.eos_token_id), width).to(device)
    heads = nn.Linear(width, sum(PATCH_HEADS.values())).to(device)
    model.to(device)
    _compile(model, device)
    seeing = nn.ModuleDict({"tower": model.model.vision_tower, "heads": heads, "text_half": half})
    scenes = Batches(tower.batch, 0, describe=describe)
    sees: Loss = lambda batch: tower_loss(model, heads, half, batch)  # noqa: E731
    if not train_stage(tower, seeing, sees, TOWER_NAMES, scenes, out, workers):
        return False
    tokenizer = train_tokenizer(model.config.text_config.vocab_size)
    model.model.vision_tower.requires_grad_(False)
    packed = Batches(language.batch, tower.steps * tower.batch, Encoder(tokenizer))
    answers: Loss = lambda batch: answer_loss(model, batch)  # noqa: E731
    if not train_stage(language, model, answers, CATEGORIES, packed, out, workers):
        return False
    save_checkpoint(model, half, tokenizer, describe, template, out / "checkpoint")
    draw_curve(out / "log.jsonl", out / "curve.png")
    return True


def _compile(model: Any, device: torch.device) -> None:
    """Fuse what stands in each layer, and skip what is not seen; worth thrice the speed."""
    if device.type != "cuda":
        return
    AttentionInterface.register(FLEX, flex_layer)
    model.model.language_model.set_attn_implementation(FLEX)
    for name, module in model.named_modules():
        if name.rpartition(".layers.")[2].isdigit():
            module.compile()


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 3 says: paused, run it again to go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of checkpoint, log and curve")
    add("--template", type=Path, default=CHECKPOINT, help="folder whose JSON files state the sizes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=14, help="processes that draw")
    add("--tower-steps", type=int, default=2_800)
    add("--tower-batch", type=int, default=256, help="pictures")
    add("--steps", type=int, default=9_000)
    add("--batch", type=int, default=96, help="pictures, with some twenty questions each")
    add("--pause", type=float, default=math.inf, help="seconds after which a stage stops for now")
    given = parser.parse_args(arguments)
    with torch.enable_grad():  # some libraries turn gradients off for the whole process
        done = train(
            given.out,
            given.template,
            Plan("tower", given.tower_steps, given.tower_batch, pause=given.pause),
            Plan("language", given.steps, given.batch, pause=given.pause),
            torch.device(given.device),
            given.workers,
        )
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
