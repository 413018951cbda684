"""Which questions of a batch share the beginning of their prompts, and with it their pictures."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import BatchFeature

from vlm_prune_ext.experiment.flops import tower_images
from vlm_prune_ext.fast.generate import FastGenerate, sharing_of
from vlm_prune_ext.fast.shared import Asked
from vlm_prune_ext.methods.base import Method, say_once
from vlm_prune_ext.models import parts_of
from vlm_prune_ext.models.clips import is_video
from vlm_prune_ext.models.images import digest_of

_REMEMBERED = 4096  # pictures that were asked about, the newest
_FULL = 0.75  # of the places of a run that questions fill, at least


_MET: weakref.WeakKeyDictionary[Any, OrderedDict[Hashable, None]] = weakref.WeakKeyDictionary()


class Question(Protocol):
    """What is looked at of a query, see :class:`vlm_prune_ext.evals.answer.Query`."""

    text: str
    images: Sequence[Any]
    style: str | None
    digests: tuple[str, ...]


@dataclass
class _Group:
    """Rows with one prefix. ``ids``: by row, of the whole prompt; ``length``: of the prefix."""

    key: Hashable
    length: int
    rows: list[int]
    ids: list[list[int]]


class Sharing:
    """Finds what can be shared.

    Args:
        model, processor, method: as of the :class:`~vlm_prune_ext.evals.answer.Answerer`.
    """

    def __init__(self, model: Any, processor: Any, method: Method | None) -> None:
        self.model, self.processor, self.method = model, processor, method
        self._met = _MET.setdefault(model, OrderedDict())
        self._known: OrderedDict[Hashable, tuple[str, list[int]]] = OrderedDict()
        self._planning = threading.Lock()

    def plan(self, queries: Sequence[Question]) -> list[tuple[list[int], Plan | None]]:
        """Runs: rows, and how they are answered together (``None``: with whole prompts). Several
        threads may be in here."""
        with self._planning:
            return self._plan(queries)

    def _plan(self, queries: Sequence[Question]) -> list[tuple[list[int], Plan | None]]:
        runs: list[tuple[list[int], Plan | None]] = []
        engine = self._engine() if any(query.images for query in queries) else None
        if engine is not None:
            for groups in _even(self._groups(engine, queries)):
                rows = [row for group in groups for row in group.rows]
                runs.append((rows, Plan(self, engine, groups, [queries[row] for row in rows])))
        taken = {row for rows, _ in runs for row in rows}
        rest = [row for row in range(len(queries)) if row not in taken]
        return [*runs, (rest, None)] if rest else runs

    def _engine(self) -> FastGenerate | None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            return None
        engine = sharing_of(self.model, parts_of)
        reason = None if engine is None else engine.why_not_shared(self.method)
        if reason is not None:
            say_once(f"Questions about one picture share nothing: {reason}.")
            return None
        return engine

    def _groups(self, engine: FastGenerate, queries: Sequence[Question]) -> list[_Group]:
        """Rows that share something with another, or with one that was answered before."""
        found: dict[Hashable, _Group] = {}
        settings = self.processor.picture_settings()
        pictures = [self._pictures_of(query, len(queries) == 1) for query in queries]
        counts = Counter(one for one in pictures if one)
        for row, (query, digests) in enumerate(zip(queries, pictures, strict=True)):
            if not digests or (counts[digests] == 1 and digests not in self._met):
                continue
            ids = self._ids(query, (digests, query.style, settings))
            token = self.processor.image_token_id
            if ids is None or token not in ids or ids[-1] == token:
                continue
            length = len(ids) - ids[::-1].index(token)
            key: Hashable = (digests, tuple(ids[:length]), settings)
            group = found.setdefault(key, _Group(key, length, [], []))
            group.rows.append(row)
            group.ids.append(ids)
        for digests in counts:
            self._met[digests] = None
            self._met.move_to_end(digests)
        while len(self._met) > _REMEMBERED:
            self._met.popitem(last=False)
        return list(found.values())

    def _pictures_of(self, query: Question, alone: bool) -> tuple[str, ...]:
        """Digests of its pictures; none where it has none, or where looking would not pay."""
        if any(map(is_video, query.images)):
            return ()  # what stands for a video is not one run of one kind of token
        if query.digests or not query.images or alone:
            return query.digests
        return tuple(map(digest_of, query.images))

    def _ids(self, query: Question, about: Hashable) -> list[int] | None:
        """Token ids of its prompt, ``about`` pictures that others are about, too."""
        processor, images = self.processor, list(query.images)
        ids = processor.ids_of(query.text, images, style=query.style)
        if ids is not None:
            return list(ids)
        if about not in self._known:
            whole = processor.batch([query.text], [images], style=query.style)
            self._known[about] = (query.text, whole["input_ids"][0].tolist())
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        found = processor.ids_like(query.text, images, self._known[about], style=query.style)
        return None if found is None else list(found)


def _even(groups: list[_Group]) -> list[list[_Group]]:
    """Groups of similar size together: pictures with fewer questions leave places empty."""
    runs: list[list[_Group]] = []
    for group in sorted(groups, key=lambda group: -len(group.rows)):
        run = runs[-1] if runs else []
        places = len(run[0].rows) * (len(run) + 1) if run else 0
        asked = sum(len(other.rows) for other in run) + len(group.rows)
        if run and asked >= _FULL * places:
            run.append(group)
        else:
            runs.append([group])
    return runs


class Plan:
    """Rows that are answered together, those with one prefix side by side.

    Args:
        sharing: whose plan it is.
        engine: answers.
        groups: of the rows; queries: all of them, in order.
    """

    def __init__(
        self,
        sharing: Sharing,
        engine: FastGenerate,
        groups: list[_Group],
        queries: list[Question],
    ) -> None:
        self._sharing, self._engine, self.groups = sharing, engine, groups
        self._queries = queries
        self._host = self._table()
        self._asked = Asked(
            [index for index, group in enumerate(groups) for _ in group.rows],
            [ids[group.length :] for group in groups for ids in group.ids],
            [group.length for group in groups],
            [group.key for group in groups],
            self._make,
        )

    def _table(self) -> dict[str, torch.Tensor]:
        """The whole prompts, filled up in front."""
        lengths = [len(ids) for group in self.groups for ids in group.ids]
        width = max(lengths)
        table = np.full((len(lengths), width), self._sharing.processor.pad_token_id)
        for row, ids in enumerate(ids for group in self.groups for ids in group.ids):
            table[row, width - len(ids) :] = ids
        real = np.arange(width) >= width - np.array(lengths)[:, None]
        made = {"input_ids": table, "attention_mask": real.astype(np.int64)}
        return {name: torch.from_numpy(value) for name, value in made.items()}

    def inputs(self, processor: Any) -> BatchFeature:
        """The whole prompts, without pixels, on the device."""
        return BatchFeature({name: t.to(processor.device) for name, t in self._host.items()})

    def answer(self, inputs: Any, options: Mapping[str, Any]) -> torch.Tensor | None:
        """As ``generate``; ``None``: nothing can be shared in such a call."""
        return self._engine.shared(self._asked, **inputs, **options)

    def tiles(self) -> list[float]:
        """Of each row, what its pictures are for the tower."""
        return [self._asked.found[index].tiles for index in self._asked.owner]

    def spared(self) -> float:
        """Seconds that prefixes took that were there already: whole prompts would take them."""
        return sum(prefix.seconds for prefix in self._asked.known)

    def told(self) -> list[dict[str, Any]]:
        """Of each row, fields of its answer about what was shared."""
        layers = self._engine.shared_layers(self._sharing.method)
        sizes = [len(self.groups[index].rows) for index in self._asked.owner]
        return [
            {"shared": size, "shared_layers": layers, "question_tokens": len(ids)}
            for size, ids in zip(sizes, self._asked.questions, strict=True)
        ]

    def _make(self, indices: list[int]) -> tuple[dict[str, torch.Tensor], list[float]]:
        firsts = [self._queries[self._asked.owner.index(index)] for index in indices]
        processor = self._sharing.processor
        images = [list(query.images) for query in firsts]
        whole = processor.batch([query.text for query in firsts], images, style=firsts[0].style)
        counts = tower_images(self._sharing.model.config, whole, list(map(len, images)))
        prompts = [len(self.groups[index].ids[0]) for index in indices]
        lengths = [self.groups[index].length + 1 for index in indices]
        return _cut(whole, prompts, lengths), counts


def _cut(
    whole: Mapping[str, torch.Tensor], prompts: list[int], lengths: list[int]
) -> dict[str, torch.Tensor]:
    """The first ``lengths`` tokens of prompts, filled up in front to equal lengths."""
    shape, width = whole["input_ids"].shape[:2], max(lengths)
    made: dict[str, torch.Tensor] = {}
    for name, value in whole.items():
        if value.shape[:2] != shape or value.dim() != 2:
            made[name] = value
            continue
        made[name] = value.new_zeros(len(lengths), width)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            first = shape[1] - prompt
            made[name][row, width - length :] = value[row, first : first + length]
    return made
