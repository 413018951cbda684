"""The state of one prompt: its images, its layouts layer by layer, and the rules that change them.

Everything here works on tensors and on the pure rules of a method; hooks live in decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vlm_prune_ext.engine.layout import Layout, iota, sent
from vlm_prune_ext.engine.spans import Image
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.methods.base import Evidence, Stage


@dataclass
class Group:
    """Images with equally many visual tokens left: rules see them as one batch.

    Attributes:
        samples: int64 ``(rows,)`` batch rows; ``names``: the same as Python numbers.
        starts: int64 ``(rows, 1)`` slot of each image's first token; ``(rows, total)`` where images
            are in several runs: for each token, how far its slot is ahead of its place.
        total: visual tokens of each image at layer 0.
        places: int64 ``(rows, n)``, which of them are left.
    """

    samples: torch.Tensor
    names: tuple[int, ...]
    starts: torch.Tensor
    total: int
    places: torch.Tensor

    def to(self, device: torch.device) -> Group:
        """The same on another device."""
        starts, places = self.starts.to(device), self.places.to(device)
        return Group(self.samples.to(device), self.names, starts, self.total, places)

    @property
    def slots(self) -> torch.Tensor:
        """``(rows, n)`` slots of the tokens left."""
        if self.starts.shape[1] == 1:
            return self.starts + self.places
        return self.starts.gather(1, self.places) + self.places


def group_images(images: list[Image], device: torch.device) -> list[Group]:
    """Images of equal length together."""
    groups = []
    for total in sorted({image.length for image in images}):
        mine = [image for image in images if image.length == total]
        names = tuple(image.sample for image in mine)
        starts = sent(_starts(mine), device)
        places = iota(total, device).expand(len(mine), total)
        groups.append(Group(sent(names, device), names, starts, total, places))
    return groups


def _starts(images: list[Image]) -> list[list[int]]:
    if not any(image.runs for image in images):
        return [[image.start] for image in images]
    return [[slot - place for place, slot in enumerate(image.slots)] for image in images]


@dataclass
class Prefill:
    """One prompt on its way through the decoder, and what decoding needs to know of it.

    Attributes:
        layout: what the current layer holds; ``segments``: first layer -> layout, ascending.
        groups: images, as they are now.
        held: tokens each sample holds now (padding included, empty slots not).
        real: bool ``(batch, S)``, False at padding of the input; ``None`` if there is none.
        hidden_keys: first layer -> bool ``(batch, n)``, tokens hidden as keys (mask mode).
    """

    layout: Layout
    groups: list[Group]
    held: list[int]
    real: torch.Tensor | None = None
    segments: dict[int, Layout] = field(default_factory=dict)
    hidden_keys: dict[int, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def start(
        images: list[Image], batch: int, total: int, real: torch.Tensor | None, device: torch.device
    ) -> Prefill:
        """The prompt as it enters layer 0."""
        layout = Layout.whole(batch, total, device)
        groups = group_images(images, device)
        return Prefill(layout, groups, [total] * batch, real, {0: layout})

    def move(self, device: torch.device) -> None:
        """Go on on another device, for the layers of a model that is spread over several."""
        if self.layout.slots.device != device:
            self.layout = self.layout.to(device)
            self.groups = [group.to(device) for group in self.groups]
            self.real = None if self.real is None else self.real.to(device)

    def layout_at(self, layer: int) -> Layout:
        """What ``layer`` holds."""
        return self.segments[max(first for first in self.segments if first <= layer)]

    def visual_counts(self) -> list[int]:
        """Visual tokens each sample holds now."""
        counts = [0] * len(self.held)
        for group in self.groups:
            for name in group.names:
                counts[name] += group.places.shape[1]
        return counts

    def select(self, stage: Stage, look: Look) -> torch.Tensor | None:
        """Run a stage's rule on every group. Returns what goes, bool ``(batch, n)`` (``None``:
        nothing). Groups and counts are updated; the layout is not."""
        gone = None
        groups: list[Group] = []
        for group in self.groups:
            here = self.layout.places_of(group.slots, group.samples)
            kept = stage.rule(look(group, here))
            parts, goes = _outcome(group, kept)
            groups += parts
            if goes is not None:
                if gone is None:
                    gone = torch.zeros_like(self.layout.slots, dtype=torch.bool)
                gone.index_put_((group.samples[:, None], here), goes)
        if stage.mode == "drop":  # hidden tokens stay, and may be chosen at the next step
            before = self.visual_counts()
            self.groups = groups
            after = self.visual_counts()
            self.held = [h - b + a for h, b, a in zip(self.held, before, after, strict=True)]
        return gone

    def drop(self, layer: int, gone: torch.Tensor) -> torch.Tensor:
        """Take tokens out in front of ``layer``. Returns the ``(batch, n')`` places to gather."""
        self.layout, index = self.layout.drop(~gone, self.held)
        self.segments[layer] = self.layout
        return index

    def record(self, layer: int, trace: Trace, hidden: torch.Tensor | None = None) -> None:
        """Note what enters ``layer`` after its rule ran; ``hidden``: tokens that only hide."""
        trace.kept[layer] = self.layout.positions()
        trace.visual_tokens[layer] = self.visual_counts()
        if hidden is not None:
            lost = hidden.sum(1).tolist()
            left = [held - n for held, n in zip(self.held, lost, strict=True)]
            trace.kept[layer] = self.layout.drop(~hidden, left)[0].positions()
            visual = zip(self.visual_counts(), lost, strict=True)
            trace.visual_tokens[layer] = [count - n for count, n in visual]


Look = Callable[[Group, torch.Tensor], Evidence]
"""``look(group, places)``: the evidence about a group; ``places`` ``(rows, n)`` in the sequence."""


def _outcome(group: Group, kept: torch.Tensor) -> tuple[list[Group], torch.Tensor | None]:
    """What a rule's answer makes of a group: the groups that follow, and which of its tokens go,
    bool ``(rows, n)`` (``None``: none)."""
    if kept.dtype == torch.bool:
        return _outcome_of_mask(group, kept)
    if kept.shape[1] == group.places.shape[1]:
        return [group], None
    goes = torch.ones_like(group.places, dtype=torch.bool).scatter_(1, kept, False)
    return [_keep(group, kept)], goes


def _outcome_of_mask(group: Group, stays: torch.Tensor) -> tuple[list[Group], torch.Tensor | None]:
    """As above for rules whose counts depend on the data: rows are regrouped by their count."""
    counts = stays.sum(dim=1).tolist()
    groups: list[Group] = []
    for count in sorted(set(counts)):
        rows = [row for row, c in enumerate(counts) if c == count]
        part = _rows(group, rows) if len(rows) < len(counts) else group
        if count < stays.shape[1]:
            part = _keep(part, _pick(stays[rows], count))
        groups.append(part)
    return groups, ~stays if min(counts) < stays.shape[1] else None


def _pick(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` True in each row, in order, without asking the device how many."""
    return mask.int().argsort(dim=1, stable=True)[:, mask.shape[1] - count :]


def _rows(group: Group, rows: list[int]) -> Group:
    names = tuple(group.names[row] for row in rows)
    return Group(group.samples[rows], names, group.starts[rows], group.total, group.places[rows])


def _keep(group: Group, kept: torch.Tensor) -> Group:
    places = group.places.gather(1, kept)
    return Group(group.samples, group.names, group.starts, group.total, places)
