"""Which tokens of the prompt layers hold, and the rules that change it.

Slots are places 0 ... S-1 of the sequence that enters layer 0. After a drop a layer holds some of
them; tokens that are decoded later get slots S, S+1, ... in every layer. Rows that a rule adds have
names of their own, S and up; masks take them for the last token of their image, behind which they
stand.

A :class:`Prefill` is the state of one prompt: its images, and its layouts layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_prune_ext.engine.prompt import DecoderInput, Image
from vlm_prune_ext.methods.evidence import Answer, Evidence, Stage

_Held = TypeVar("_Held", bound="Layout | Group")


@dataclass(frozen=True)
class Added:
    """Rows that a rule adds to the sequence, at most ``c`` per sample.

    Attributes:
        hidden: ``(batch, c, hidden)``.
        names: int64 ``(batch, c)``; ``slots``: of the last token of their image.
        behind: int64 ``(batch, c)``, the place that each stands behind, before anything is dropped.
        real: bool ``(batch, c)``, False at fillers of samples that get fewer.
    """

    hidden: torch.Tensor
    names: torch.Tensor
    slots: torch.Tensor
    behind: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Slots of the prompt that one run of layers holds.

    Attributes:
        slots: int64 ``(batch, n)``, ascending over the valid entries.
        valid: bool ``(batch, n)``, False at empty slots in front of samples that keep fewer
            tokens than others; ``None`` if there are none.
        total: S, slots of the whole prompt.
        names: int64 ``(batch, n)``, what tells tokens apart; the slots where no row was added.
        added: most rows that were added to any sample so far; names stay below ``total + added``.
        positions: int64 ``(batch, n)``, rotary positions where they were counted anew.
    """

    slots: torch.Tensor
    valid: torch.Tensor | None
    total: int
    names: torch.Tensor
    added: int = 0
    positions: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens per sample, ``n``."""
        return self.slots.shape[1]

    @property
    def is_whole(self) -> bool:
        """Nothing was dropped or added yet."""
        return self.count == self.total and self.valid is None and not self.added

    @staticmethod
    def whole(batch: int, total: int, device: torch.device) -> Layout:
        """Everything is there."""
        slots = iota(total, device).expand(batch, total)
        return Layout(slots, None, total, slots)

    def to(self, device: torch.device) -> Layout:
        """The same on another device (a model may be spread over several)."""
        if self.slots.device == device:
            return self
        return _each(self, lambda tensor: tensor.to(device))

    def kept(self) -> torch.Tensor:
        """``(batch, n)`` names, ``-1`` at empty slots."""
        return self._where_valid(self.names)

    def counted(self) -> torch.Tensor:
        """:attr:`positions`, ``-1`` at empty slots."""
        assert self.positions is not None
        return self._where_valid(self.positions)

    def _where_valid(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone() if self.valid is None else values.masked_fill(~self.valid, -1)

    def places_of(self, names: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """Current places of tokens that are here: ``names`` ``(rows, m)`` of batch rows
        ``samples``."""
        if self.is_whole:
            return names
        inverse = self.slots.new_zeros(self.slots.shape[0], self.total + self.added)
        here = iota(self.count, self.slots.device).expand_as(self.slots)
        if self.valid is not None:  # empty slots must not claim a place
            here = here.masked_fill(~self.valid, 0)
        inverse.scatter_add_(1, self.names, here)
        return inverse[samples[:, None], names]

    def drop(
        self, keep: torch.Tensor, held: list[int], added: Added | None = None
    ) -> tuple[Layout, torch.Tensor]:
        """The layout after a drop.

        Args:
            keep: bool ``(batch, n)``.
            held: how many tokens each sample holds then (known to the caller, so that the device
                need not be asked).
            added: rows that come in.

        Returns:
            the new layout, and int64 ``(batch, max(held))`` current places to gather; places
            ``n`` and up are those of the added rows.
        """
        if self.valid is not None:
            keep = keep & self.valid
        slots, names, more = self.slots, self.names, self.added
        # A stable sort puts dropped places first and kept ones last, each in order: the last
        # `count` columns are the kept ones, with leftovers in front where a sample keeps fewer.
        order = keep.int()
        if added is not None:
            order, keep = _order_with(added, keep)
            slots = torch.cat([slots, added.slots], dim=1)
            names = torch.cat([names, added.names], dim=1)
            more += added.names.shape[1]
        index = order.argsort(dim=1, stable=True)[:, -max(held) :]
        valid = keep.gather(1, index) if min(held) < max(held) else None
        positions = self.positions
        if positions is not None and added is None:
            positions = positions.gather(1, index)
        kept = slots.gather(1, index)
        names = kept if names is slots else names.gather(1, index)
        return Layout(kept, valid, self.total, names, more, positions), index

    def at(self, index: torch.Tensor) -> Layout:
        """The tokens at places ``(batch, m)``."""
        return _each(self, lambda tensor: tensor.gather(1, index))

    def without_last(self, count: int) -> Layout:
        """Without the last ``count`` slots, all of which are here."""
        left = _each(self, lambda tensor: tensor[:, :-count])
        total = self.total - count
        names = torch.where(left.names >= total, left.names - count, left.names)
        return replace(left, total=total, names=names)

    def real(self, real: torch.Tensor | None) -> torch.Tensor | None:
        """Bool ``(batch, n)``, False at empty slots and where ``real`` ``(batch, S)`` is; ``None``:
        nowhere."""
        if real is None:
            return self.valid
        real = real.gather(1, self.slots)
        return real if self.valid is None else real & self.valid

    def counted_anew(self, real: torch.Tensor | None) -> Layout:
        """With rotary positions 0, 1, ... over what is here.

        Args:
            real: bool ``(batch, S)``, False at padding of the prompt; ``None`` if there is none.
        """
        real = self.real(real)
        there = torch.ones_like(self.slots) if real is None else real.long()
        return replace(self, positions=(there.cumsum(dim=1) - 1).clamp(min=0))

    def next_position(self) -> torch.Tensor:
        """Rotary position behind those that were counted anew, int64 ``(batch, 1)``."""
        assert self.positions is not None
        return self.positions.amax(dim=1, keepdim=True) + 1


def _each(thing: _Held, change: Callable[[torch.Tensor], torch.Tensor]) -> _Held:
    """The same with all of its tensors changed."""
    held: dict[str, Any] = vars(thing)
    changed: dict[str, Any] = {n: change(v) for n, v in held.items() if isinstance(v, torch.Tensor)}
    return replace(thing, **changed)


def _order_with(added: Added, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort keys of all places and added rows, what goes first; and what stays of both."""
    step, more = keep.shape[1], added.names.shape[1]
    here = iota(step, keep.device) * (more + 1)
    between = added.behind * (more + 1) + 1 + iota(more, keep.device)
    keep = torch.cat([keep, added.real], dim=1)
    order = torch.cat([here.expand(keep.shape[0], step), between], dim=1)
    return order + keep * ((step + 1) * (more + 1)), keep


def take(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather along ``dim`` with one index row per sample.

    Args:
        tensor: the batch is the dimension just before ``dim``, of size batch or 1 (which is
            expanded); anything may stand around them.
        index: int64 ``(batch, m)``.
        dim: negative dimension to gather along.
    """
    batch, m = index.shape
    if tensor.shape[dim - 1] != batch:
        shape = list(tensor.shape)
        shape[dim - 1] = batch
        tensor = tensor.expand(shape)
    view = [1] * tensor.dim()
    view[dim - 1], view[dim] = batch, m
    shape = list(tensor.shape)
    shape[dim] = m
    return tensor.gather(tensor.dim() + dim, index.to(tensor.device).view(view).expand(shape))


@lru_cache(maxsize=256)
def iota(count: int, device: torch.device) -> torch.Tensor:
    """int64 ``(count,)``: 0, 1, ...; made once, never to be written to."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device)


def sent(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Numbers as an int64 tensor on a device, without waiting for what the device has to do."""
    made = torch.tensor(numbers)
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


@dataclass
class Group:
    """Images with equally many visual tokens left: rules see them as one batch.

    Attributes:
        samples: int64 ``(rows,)`` batch rows; ``names``: the same as Python numbers.
        total: visual tokens of each image at layer 0.
        places: int64 ``(rows, n)``, which of them are left; rows that were added count on.
        tokens: int64 ``(rows, n)``, what the layout calls them.
        last: int64 ``(rows, 1)``, slot of each image's last token.
        added: rows that were added to each image so far.
        chosen: float32 ``(rows, t)``, weights of the tail's rows, once a stage chose them.
    """

    samples: torch.Tensor
    names: tuple[int, ...]
    total: int
    places: torch.Tensor
    tokens: torch.Tensor
    last: torch.Tensor
    added: int = 0
    chosen: torch.Tensor | None = None

    def to(self, device: torch.device) -> Group:
        """The same on another device."""
        return _each(self, lambda tensor: tensor.to(device))

    def rows(self, rows: list[int]) -> Group:
        """Some of the images."""
        some = _each(self, lambda tensor: tensor[rows])
        return replace(some, names=tuple(self.names[row] for row in rows))

    def keep(self, kept: torch.Tensor) -> Group:
        """Some tokens of each image, int64 ``(rows, k)`` out of 0 ... n-1."""
        return replace(self, places=self.places.gather(1, kept), tokens=self.tokens.gather(1, kept))


def group_images(images: list[Image], device: torch.device) -> list[Group]:
    """Images of equal length together."""
    groups = []
    for total in sorted({image.length for image in images}):
        mine = [image for image in images if image.length == total]
        names = tuple(image.sample for image in mine)
        starts = sent(_starts(mine), device)
        places = iota(total, device).expand(len(mine), total)
        tokens = starts + places
        groups.append(Group(sent(names, device), names, total, places, tokens, tokens[:, -1:]))
    return groups


def _starts(images: list[Image]) -> list[list[int]]:
    if not any(image.runs for image in images):
        return [[image.start] for image in images]
    return [[slot - place for place, slot in enumerate(image.slots)] for image in images]


@dataclass
class Tail:
    """The text behind each sample's last image.

    ``slots``: int64 ``(batch, t)``; ``real``: bool ``(batch, t)``, False at fillers.
    """

    slots: torch.Tensor
    real: torch.Tensor


@dataclass
class Prefill:
    """One prompt on its way through the decoder, and what decoding needs to know of it.

    Attributes:
        layout: what the current layer holds; ``segments``: first layer -> layout, ascending.
        groups: images, as they are now.
        held: tokens each sample holds now (padding included, empty slots not).
        tail_starts: per sample, slot behind the last image (S where there is no image).
        real: bool ``(batch, S)``, False at padding of the input; ``None`` if there is none.
        moved: int64 ``(batch, S)``, where the slots that the starts refer to are, if they moved.
        hidden_keys: first layer -> bool ``(batch, n)``, tokens hidden as keys (mask mode), or
            ``(batch, queries, n)`` where each of several queries has a choice of its own.
        created: per sample, rows that rules added so far.
        images: as they were at layer 0.
        ahead: tokens at the end that are candidates for the answer, not part of the prompt: rules
            do not look at them.
    """

    layout: Layout
    groups: list[Group]
    held: list[int]
    tail_starts: list[int]
    real: torch.Tensor | None = None
    moved: torch.Tensor | None = None
    segments: dict[int, Layout] = field(default_factory=dict)
    hidden_keys: dict[int, torch.Tensor] = field(default_factory=dict)
    created: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    ahead: int = 0
    _tail: Tail | None = None

    @staticmethod
    def start(
        images: list[Image], batch: int, total: int, real: torch.Tensor | None, device: torch.device
    ) -> Prefill:
        """The prompt as it enters layer 0."""
        layout = Layout.whole(batch, total, device)
        ends = [0] * batch
        for image in images:
            ends[image.sample] = max(ends[image.sample], image.end)
        return Prefill(
            layout,
            group_images(images, device),
            [total] * batch,
            [end or total for end in ends],
            real,
            segments={0: layout},
            created=[0] * batch,
            images=images,
        )

    @staticmethod
    def of(given: DecoderInput, images: list[Image]) -> Prefill:
        """A prompt that enters layer 0 as it came."""
        state = Prefill.start(images, given.batch, given.length, given.real, given.device)
        state.ahead = given.ahead
        return state

    def move(self, device: torch.device) -> None:
        """Go on on another device, for the layers of a model that is spread over several."""
        if self.layout.slots.device != device:
            self.layout = self.layout.to(device)
            self.groups = [group.to(device) for group in self.groups]
            self.real = None if self.real is None else self.real.to(device)
            self._tail = None

    def layout_at(self, layer: int) -> Layout:
        """What ``layer`` holds."""
        for first in reversed(self.segments):
            if first <= layer:
                return self.segments[first]
        raise AssertionError("layer 0 has a layout")

    def tail(self) -> Tail:
        """The text behind the images."""
        if self._tail is None:
            total, device = self.layout.total, self.layout.slots.device
            starts = sent([[start] for start in self.tail_starts], device)
            slots = starts + iota(total - min(self.tail_starts), device)
            real = slots < total - self.ahead
            slots = slots.clamp(max=total - 1)
            if self.moved is not None:
                slots = self.moved.gather(1, slots)
            self._tail = Tail(
                slots, real if self.real is None else real & self.real.gather(1, slots)
            )
        return self._tail

    def settle(self) -> None:
        """Candidates at the end count as decoded from now on."""
        ahead, total = self.ahead, self.layout.total
        for layer, layout in self.segments.items():
            self.segments[layer] = layout.without_last(ahead)
        self.layout = self.segments[max(self.segments)]
        self.real = None if self.real is None else self.real[:, :-ahead]
        self.held = [held - ahead for held in self.held]
        for group in self.groups:
            group.tokens = torch.where(group.tokens >= total, group.tokens - ahead, group.tokens)
        self.ahead, self._tail = 0, None

    def positions_of(self, slots: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """Places in the prompt, padding not counted: ``slots`` ``(rows, m)`` of batch rows
        ``samples``, int64 of the same shape."""
        if self.real is None:
            return slots
        return (self.real.long().cumsum(dim=1) - 1)[samples[:, None], slots]

    def visual_counts(self) -> list[int]:
        """Visual tokens each sample holds now."""
        counts = [0] * len(self.held)
        for group in self.groups:
            for name in group.names:
                counts[name] += group.places.shape[1]
        return counts

    def observe(self, stage: Stage, look: Look) -> None:
        """Run a rule that chooses rows for later stages."""
        for index, group in enumerate(self.groups):
            here = self.layout.places_of(group.tokens, group.samples)
            weights = stage.rule(look(index, group, here))
            assert isinstance(weights, torch.Tensor)
            group.chosen = weights.float()

    def select(self, stage: Stage, look: Look) -> tuple[torch.Tensor | None, Added | None]:
        """Run a stage's rule on every group. Returns what goes, bool ``(batch, n)`` (``None``:
        nothing), and what comes in. Groups and counts are updated; the layout is not."""
        gone = None
        groups: list[Group] = []
        new: list[tuple[Group, Added]] = []
        for index, group in enumerate(self.groups):
            here = self.layout.places_of(group.tokens, group.samples)
            answer = stage.rule(look(index, group, here))
            if not isinstance(answer, Answer):
                answer = Answer(answer)
            parts, goes = _outcome(group, answer.keep)
            if answer.rows is not None and answer.rows.shape[1]:
                # Rows that are added tell groups apart no more than counts do: one part.
                parts = [self._with_rows(parts[0], answer.rows, here[:, -1:], new)]
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
        return gone, _joined(new, len(self.held)) if new else None

    def _with_rows(
        self,
        group: Group,
        hidden: torch.Tensor,
        behind: torch.Tensor,
        new: list[tuple[Group, Added]],
    ) -> Group:
        """A group with rows added to each image; notes them in ``new``."""
        count, device = hidden.shape[1], hidden.device
        firsts = []
        for sample in group.names:
            firsts.append([self.layout.total + self.created[sample]])
            self.created[sample] += count
        names = sent(firsts, device) + iota(count, device)
        slots, behind = group.last.expand_as(names), behind.expand_as(names)
        added = Added(hidden, names, slots, behind, torch.ones_like(names, dtype=torch.bool))
        new.append((group, added))
        first = group.total + group.added
        places = iota(first + count, device)[first:].expand_as(names)
        return replace(
            group,
            places=torch.cat([group.places, places], dim=1),
            tokens=torch.cat([group.tokens, names], dim=1),
            added=group.added + count,
        )

    def drop(
        self, layer: int, gone: torch.Tensor | None, added: Added | None, *, recount: bool
    ) -> torch.Tensor:
        """Take tokens out, and others in, in front of ``layer``. Returns the ``(batch, n')`` places
        to gather, see :meth:`Layout.drop`."""
        keep = torch.ones_like(self.layout.slots, dtype=torch.bool) if gone is None else ~gone
        self.layout, index = self.layout.drop(keep, self.held, added)
        if recount:
            self.layout = self.layout.counted_anew(self.real)
        self.segments[layer] = self.layout
        return index


Look = Callable[[int, Group, torch.Tensor], Evidence]
"""``look(index, group, places)``: the evidence about one of the prompt's groups; ``places``
``(rows, n)`` of its tokens in the sequence."""


def _joined(new: list[tuple[Group, Added]], batch: int) -> Added:
    """The rows of all groups, side by side in their samples."""
    rows: list[list[tuple[Added, int]]] = [[] for _ in range(batch)]
    for group, added in new:
        for row, sample in enumerate(group.names):
            rows[sample].append((added, row))

    def side_by_side(name: str) -> torch.Tensor:
        none = getattr(new[0][1], name)[0, :0]
        own = [torch.cat([none, *(getattr(a, name)[row] for a, row in each)]) for each in rows]
        return pad_sequence(own, batch_first=True)

    return Added(*map(side_by_side, ("hidden", "names", "slots", "behind", "real")))


def _outcome(group: Group, kept: torch.Tensor) -> tuple[list[Group], torch.Tensor | None]:
    """What a rule's answer makes of a group: the groups that follow, and which of its tokens go,
    bool ``(rows, n)`` (``None``: none)."""
    if kept.dtype == torch.bool:
        return _outcome_of_mask(group, kept)
    if kept.shape[1] == group.places.shape[1]:
        return [group], None
    goes = torch.ones_like(group.places, dtype=torch.bool).scatter_(1, kept, False)
    return [group.keep(kept)], goes


def _outcome_of_mask(group: Group, stays: torch.Tensor) -> tuple[list[Group], torch.Tensor | None]:
    """As above for rules whose counts depend on the data: rows are regrouped by their count."""
    counts = stays.sum(dim=1).tolist()
    groups: list[Group] = []
    for count in sorted(set(counts)):
        rows = [row for row, c in enumerate(counts) if c == count]
        part = group.rows(rows) if len(rows) < len(counts) else group
        if count < stays.shape[1]:
            part = part.keep(_pick(stays[rows], count))
        groups.append(part)
    return groups, ~stays if min(counts) < stays.shape[1] else None


def _pick(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` True in each row, in order, without asking the device how many."""
    return mask.int().argsort(dim=1, stable=True)[:, mask.shape[1] - count :]
