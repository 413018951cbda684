"""The text half of a CLIP checkpoint, and the joint space it shares with a vision tower.

What the published CDPruner code does with a question (arXiv 2506.10967): start and end tokens
around it, filled up with id 0 to a multiple of the text tower's longest input, cut into pieces of
that length, each encoded alone and read at its largest id (the end token, where it has one).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import questions
from vlm_prune_ext.models.checkpoint import find_folder, read_json
from vlm_prune_ext.models.original import KNOWN_TOWERS
from vlm_prune_ext.models.towers import checkpoint_of, clip_body

Question = str | Sequence[int]
Reader = Callable[[torch.Tensor], "list[str]"]


class TextTower:
    """Text half of CLIP, with the projection that brings patches into the same space.

    Args:
        model: a module with ``text_model`` and ``text_projection``: ``CLIPModel`` or
            ``CLIPTextModelWithProjection``.
        visual_projection: of the same checkpoint; ``None``: ``model.visual_projection``.
        tokenizer: text -> ids with start and end tokens (a tokenizer of transformers, or a
            function that returns a list); not needed where all questions are ids.
        question: ask this instead of what the prompt asks: a text, its ids with start and end
            tokens, or a list of these, one per sample; or a function that reads the questions off
            the prompt's own token ids, ``(batch, seq)`` -> texts.
        whole_segments: give each segment of a question longer than the tower start and end tokens
            of its own. As published (``False``) all but the last lack an end token, and the first
            is read at its start token, so that its words do not count.

    Raises:
        InputError: a part is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        visual_projection: nn.Module | None = None,
        tokenizer: Callable[[str], Any] | None = None,
        *,
        question: Question | Sequence[Question] | Reader | None = None,
        whole_segments: bool = False,
    ) -> None:
        self.model: Any = model
        for part in ("text_model", "text_projection"):
            if not hasattr(model, part):
                raise InputError(
                    f"text_tower={type(model).__name__} has no {part}: a CLIPModel or a "
                    "CLIPTextModelWithProjection is needed."
                )
        self.visual_projection: Any = visual_projection or getattr(model, "visual_projection", None)
        if self.visual_projection is None:
            raise InputError(
                f"text_tower={type(model).__name__} has no visual_projection: give it as the "
                "second part, or a whole CLIPModel."
            )
        self.tokenizer, self.whole_segments = tokenizer, whole_segments
        self.question = question

    def __repr__(self) -> str:
        return f"TextTower({type(self.model).__name__})"

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return int(self.model.text_model.embeddings.position_embedding.weight.shape[0])

    def ids(self, question: Question) -> list[int]:
        """Token ids with start and end tokens."""
        if not isinstance(question, str):
            return [int(token) for token in question]
        if self.tokenizer is None:
            raise InputError(
                f"text_tower has no tokenizer for the question {question!r}: give one beside the "
                "model."
            )
        made = self.tokenizer(question)
        return list(getattr(made, "input_ids", made))

    def segments(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(M, longest)`` ids and mask (int64, 0 at filling) of one question."""
        size = self.longest
        if self.whole_segments and len(ids) > size:
            inner, step = ids[1:-1], size - 2
            pieces = [
                [ids[0], *inner[start : start + step], ids[-1]]
                for start in range(0, len(inner), step)
            ]
        else:
            pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        filled = [piece + [0] * (size - len(piece)) for piece in pieces]
        mask = [[1] * len(piece) + [0] * (size - len(piece)) for piece in pieces]
        return torch.tensor(filled), torch.tensor(mask)

    def embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Segments ``(M, T)`` -> ``(M, P)``, each read at its largest id."""
        device = self.model.text_projection.weight.device
        ids, mask = ids.to(device), mask.to(device)
        hidden = self.model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        read = hidden[torch.arange(len(ids), device=device), ids.argmax(dim=1)]
        return self.model.text_projection(read)

    def texts(self, asked: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Questions -> ``(batch, M, P)``, and bool ``(batch, M)``: which segments each has."""
        cut = [self.segments(self.ids(question)) for question in asked]
        embeds = self.embed(*(torch.cat(part) for part in zip(*cut, strict=True)))
        counts = [len(ids) for ids, _ in cut]
        parts = nn.utils.rnn.pad_sequence(embeds.split(counts), batch_first=True)
        have = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return parts, have.to(parts.device)


class JointSpace:
    """See :class:`vlm_prune_ext.engine.parts.Joint`.

    Args:
        model: what is pruned; its prompts are watched.
        tower: its vision tower, for the norm in front of the projection.
        text: the text half.
    """

    def __init__(self, model: nn.Module, tower: nn.Module, text: TextTower) -> None:
        self.model, self.text = model, text
        self.norm: Any = clip_body(tower).post_layernorm

    def attach(self) -> list[Undo]:
        """Watch what the model is asked."""
        watched = [self.model, getattr(self.model, "model", None)]
        undos: list[Undo] = [
            module.register_forward_pre_hook(self._see, with_kwargs=True).remove
            for module in watched
            if isinstance(module, nn.Module)
        ]
        return [*undos, lambda: questions.forget(self.model)]

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
            questions.note(self.model, ids)

    def images(self, features: torch.Tensor) -> torch.Tensor:
        """``(tiles, N, C)`` -> ``(tiles, N, P)``."""
        projection = self.text.visual_projection
        weight = projection.weight
        return projection(self.norm(features).to(weight.device, weight.dtype))

    def texts(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The questions of the prompt that was seen last.

        Raises:
            InputError: nobody knows them, or their number does not fit.
        """
        asked = self._asked(batch)
        if len(asked) == 1:
            asked = asked * batch
        if batch % len(asked):
            raise InputError(
                f"question={len(asked)} texts do not fit a batch of {batch}: one per sample."
            )
        different = list(dict.fromkeys(asked))
        parts, have = self.text.texts(different)
        beams = batch // len(asked)
        index = [different.index(one) for one in asked for _ in range(beams)]
        return parts[index], have[index]

    def _asked(self, batch: int) -> list[Any]:
        given, ids = self.text.question, questions.seen(self.model)
        if callable(given) and ids is not None:
            return list(given(ids))
        if given is not None and not callable(given):
            single = isinstance(given, str) or isinstance(given[0], int)
            return [_fixed(one) for one in ([given] if single else given)]
        asks = questions.of_model(self.model)
        if asks is None or ids is None:
            raise InputError(
                "CDPruner needs to know what is asked: make prompts with the processor that "
                "vp.load() returns, or give text_tower=TextTower(..., question=...)."
            )
        return list(asks.questions(ids))


def _fixed(question: Any) -> Question:
    if isinstance(question, str):
        return question
    return tuple(int(token) for token in question)


def source_of(model: Any, tower: Any) -> str | None:
    """The CLIP checkpoint that a model's tower came from: as it was loaded, as the configuration
    has it, or the published one of just these sizes; ``None``: not known."""
    named = checkpoint_of(tower) or getattr(model.config, "mm_vision_tower", None)
    if isinstance(named, str):
        return named
    for name, sizes in KNOWN_TOWERS.items():
        if all(getattr(tower.config, field, None) == size for field, size in sizes.items()):
            return name
    return None


def joint_space(model: nn.Module, tower: nn.Module, given: Any) -> JointSpace:
    """The joint space of a model's tower and what ``CDPruner.text_tower`` says.

    Args:
        model: what is pruned.
        tower: its CLIP tower.
        given: ``text_tower`` of the method.

    Raises:
        InputError: there is no text half, or it does not fit the tower.
    """
    text = _text_tower(source_of(model, tower), given, next(tower.parameters()))
    width, wanted = text.visual_projection.weight.shape[1], tower.config.hidden_size  # type: ignore[union-attr]
    if width != wanted:
        raise InputError(
            f"text_tower={given!r} belongs to a vision tower of width {width}, but the model's has "
            f"{wanted}: the CLIP checkpoint that the tower came from is needed."
        )
    return JointSpace(model, tower, text)


def _text_tower(source: str | None, given: Any, like: torch.Tensor) -> TextTower:
    if isinstance(given, TextTower):
        return given
    if isinstance(given, nn.Module):
        return TextTower(given)
    if isinstance(given, tuple | list):
        return _from_parts(given)
    if given is not None and not isinstance(given, str | os.PathLike):
        raise InputError(
            f"text_tower={given!r} is not valid: None, a folder or hub name of a CLIP "
            "checkpoint, a CLIPModel, or (model, tokenizer)."
        )
    name = source if given is None else os.fspath(given)
    if name is None:
        raise InputError(
            "CDPruner needs a CLIP text tower, and it is not known which checkpoint the model's "
            "vision tower came from: give text_tower=, its folder or hub name."
        )
    return load_text_tower(name, like.device, like.dtype)


def _from_parts(given: Sequence[Any]) -> TextTower:
    """A model, its tokenizer and its visual projection, in any order."""
    modules = [part for part in given if isinstance(part, nn.Module)]
    models = [part for part in modules if hasattr(part, "text_model")]
    others = [part for part in modules if part not in models]
    tokenizers = [part for part in given if part not in modules and callable(part)]
    if len(models) != 1 or len(others) > 1 or len(tokenizers) > 1:
        raise InputError(
            "text_tower as several parts is one text model, its tokenizer and, where the model has "
            "none, its visual projection."
        )
    return TextTower(models[0], next(iter(others), None), next(iter(tokenizers), None))


@lru_cache(maxsize=1)
def load_text_tower(name: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    """The text half of a CLIP checkpoint, by folder or hub name.

    Raises:
        InputError: it is not there, or it is the vision half alone.
    """
    from transformers import AutoTokenizer, CLIPModel

    folder, what = find_folder(name, what="CLIP text tower"), f"text_tower={name!r}"
    if "text_config" not in read_json(folder / "config.json", what):
        raise InputError(
            f"{what} is a vision tower alone: give text_tower=, a folder or hub name of a whole "
            "CLIP checkpoint."
        )
    loaded: Any = CLIPModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, found = loaded
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("vision_model."))
    if missing:
        raise InputError(f"{what} lacks weights of its text half: {missing[0]}.")
    del model.vision_model
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return TextTower(model.eval().to(device), None, tokenizer)
