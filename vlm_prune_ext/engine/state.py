"""What decoding must remember of a prompt, and the KV caches that it was read into.

A prompt may be shortened in front of layer 0: the decoder is simply given less. Features that the
vision tower dropped (or that were resized away) leave a sequence with fewer image tokens, whose
positions are counted anew, as if the image had been smaller to begin with. Tokens that a rule drops
at layer 0 leave gaps: the others keep their rotary positions, as after any later layer.

Layers of such a cache hold different tokens, and only what is remembered of its prompt says which.
While pruning, a cache is of a class derived from its own: a copy remembers as well, and where rows
are exchanged or tokens taken out that the prompt would have to follow, one sentence says so. A
cache that outlives the pruning it was made under refuses more tokens: whoever decoded on without
the pruner would count positions and masks from layer 0, silently wrong or with an error about
shapes. Nothing is put on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cache as made_once
from functools import cached_property
from typing import Any

import torch

from vlm_prune_ext.engine.evidence import Seen
from vlm_prune_ext.engine.layout import Layout, Prefill
from vlm_prune_ext.engine.prompt import DecoderInput, Image, last_tokens, runs_of
from vlm_prune_ext.errors import InputError

_STATES = "_states_while_pruning"


@dataclass
class Shortened:
    """A shorter prompt, and what its decode steps need.

    Attributes:
        given: the prompt as it came.
        layout: places of it that go in, slots = places in the caller's sequence.
        origin: int64 ``(batch, n)``, place of each in the sequence that positions in the trace
            refer to; ``None`` where that is the shorter sequence itself.
        positions: rotary positions that go in.
        removed: int64 ``(batch, 1)``, how many were removed with renumbering.
        images: where visual tokens are now.
        held: tokens per sample.
    """

    given: DecoderInput
    layout: Layout
    origin: torch.Tensor | None
    positions: torch.Tensor
    removed: torch.Tensor
    images: list[Image]
    held: list[int]

    @property
    def length(self) -> int:
        """Tokens per sample that enter layer 0."""
        return self.layout.count

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots of the shorter sequence, and of what is decoded after it, stand in the
        sequence that positions refer to; int64 ``(batch, n)`` to the same."""
        if self.origin is None:
            return slots
        known = self.layout.slots.to(slots.device)
        later = slots - self.length + self.layout.total
        inside = known.gather(1, slots.clamp(max=self.length - 1))
        return torch.where(slots < self.length, inside, later)

    @property
    def whole(self) -> bool:
        """Nothing was dropped."""
        return self.layout.is_whole

    def settle(self, ahead: int) -> None:
        """Candidates at the end of the prompt count as decoded from now on."""
        self.layout = self.layout.without_last(ahead)
        self.origin = None if self.origin is None else self.origin[:, :-ahead]
        self.positions = self.positions[..., :-ahead]
        self.held = [held - ahead for held in self.held]
        real = self.given.real
        self.given.length, self.given.ahead = self.given.length - ahead, 0
        self.given.__dict__["real"] = None if real is None else real[:, :-ahead]

    @property
    def real(self) -> torch.Tensor | None:
        """As :attr:`DecoderInput.real`, of the shorter prompt; False at empty slots."""
        return self.layout.real(self.given.real)

    def last_tokens(self) -> list[int]:
        """As :meth:`DecoderInput.last_tokens`, of the shorter prompt."""
        return last_tokens(self.real, self.given.batch, self.length, self.given.ahead)

    def start_prefill(self) -> Prefill:
        """State of the shorter prompt: its slots are the places that went in."""
        real = self.real
        state = Prefill.start(self.images, self.given.batch, self.length, real, self.given.device)
        if self.layout.valid is not None:
            # Empty slots are there from the start and may go when longer samples shrink.
            state.layout = replace(state.layout, valid=self.layout.valid)
            state.segments = {0: state.layout}
        state.held, state.ahead = list(self.held), self.given.ahead
        return state


def images_left(images: list[Image], stays: torch.Tensor) -> list[Image]:
    """Where images are in a shorter prompt; ``stays`` bool ``(batch, S)``: what is in it."""
    until = stays.cpu().cumsum(dim=1)
    offset = until[:, -1].max() - until[:, -1]  # empty slots stand in front
    left = []
    for image in images:
        slots = torch.tensor(image.slots)
        here = until[image.sample, slots]
        before = until[image.sample].roll(1)[slots] * (slots > 0)
        places = (here - 1 + offset[image.sample])[here > before].tolist()
        if places:
            left.append(Image.of(image.sample, runs_of(places)))
    return left


@dataclass(eq=False)
class State:
    """What decoding must remember of a prompt.

    Attributes:
        prefill: what its layers hold.
        short: the shorter prompt that entered layer 0, if it is one.
        first: the first layer that keeps keys: its length is what a cache says of itself.
    """

    prefill: Prefill
    short: Shortened | None
    first: int = 0

    @property
    def length(self) -> int:
        """Tokens per sample of the prompt as it came, candidates included."""
        return self.prefill.layout.total if self.short is None else self.short.given.length

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.prefill.held)

    @property
    def cached(self) -> int:
        """What a cache said of itself when the prompt was through."""
        return self.prefill.layout_at(self.first).count

    def copy(self) -> State:
        """For a copy of the cache: what decode steps change is its own."""
        mine = self.prefill
        hidden, segments = dict(mine.hidden_keys), dict(mine.segments)
        mine = replace(mine, hidden_keys=hidden, segments=segments)
        return State(mine, self.short, self.first)

    def allows(self, rows: list[int]) -> bool:
        """Whether these rows may stand where the first, the second ... did: theirs is the same."""
        if len(rows) != self.batch:  # one prompt serves them all, unless each chooses for itself
            return self.batch == 1 and self.misses_tokens
        return all(
            self.rows_alike[row] == kind for row, kind in zip(rows, self.rows_alike, strict=True)
        )

    @cached_property
    def rows_alike(self) -> list[int]:
        """A number per sample, the same for samples that hold the same."""
        prefill = self.prefill
        parts = [layout.kept() for layout in prefill.segments.values()]
        if prefill.real is not None:
            parts.append(prefill.real.long())
        if self.short is not None:
            parts.append(self.short.layout.kept())
        rows = [list(row) for row in zip(*(part.tolist() for part in parts), strict=True)]
        for group in prefill.groups:
            for sample, tokens in zip(group.names, group.tokens.tolist(), strict=True):
                rows[sample].append(tokens)
        known: dict[str, int] = {}
        return [known.setdefault(str(row), len(known)) for row in rows]

    def settle(self) -> None:
        """The prompt has been read: candidates behind it count as decoded from now on."""
        ahead = self.prefill.ahead
        self.prefill.settle()
        if self.short is not None:
            self.short.settle(ahead)

    @property
    def is_whole_at_first(self) -> bool:
        """Whether nothing was dropped in front of layer 0."""
        return self.short is None or self.short.whole

    @property
    def misses_tokens(self) -> bool:
        """Whether any layer's cache holds less than the prompt."""
        cut = any(not layout.is_whole for layout in self.prefill.segments.values())
        return cut or not self.is_whole_at_first


@dataclass(eq=False)
class Call:
    """One run of the decoder.

    Attributes:
        state: of its prompt.
        prefill: it is the prompt itself.
        decoded: tokens that layer 0 holds behind the prompt, before this call.
        cache: that it writes to.
        seen: what was read for the stage to come.
        given, changes: what the last layer was handed, and what was made of it, see
            :class:`~vlm_prune_ext.engine.masks.LayerArguments`.
    """

    state: State
    prefill: bool
    decoded: int = 0
    cache: Any = None
    seen: Seen | None = None
    given: tuple[Any, ...] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    _made: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def take_seen(self) -> Seen | None:
        """What was read for a stage; it serves that stage only."""
        seen, self.seen = self.seen, None
        return seen

    def once(self, key: Any, kept: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` made for a key before, or makes now. ``kept`` is held beside it: an id in
        the key is only unique while its object lives."""
        if key not in self._made:
            self._made[key] = (kept, make())
        return self._made[key][1]


def watch(cache: Any, states: MutableMapping[Any, State]) -> None:
    """Have a cache look after what is remembered of its prompt.

    Args:
        cache: transformers' cache.
        states: by cache, what decoding must remember; copies are added.
    """
    if _STATES not in vars(cache):
        kind: Any = type(cache)
        cache.__class__ = _watched(kind)
    setattr(cache, _STATES, states)


def seal(cache: Any, *, misses_tokens: bool) -> None:
    """The end of the pruning that a cache was filled under.

    Args:
        cache: as :func:`watch` got it; it is of its own class again.
        misses_tokens: it raises from now on when tokens are appended. Caches of fixed size are left
            alone: transformers empties and uses them again.
    """
    cache.__class__ = type(cache).__mro__[1]
    delattr(cache, _STATES)
    if misses_tokens and not getattr(cache, "is_compileable", False):
        cache.update = _Refusal(cache)


def state_of(cache: Any, states: MutableMapping[Any, State]) -> State | None:
    """What is remembered of a cache's prompt; of a cache that nothing is known of, ``None``.

    Raises:
        InputError: such a cache, whose layers hold different numbers of tokens.
    """
    state = states.get(cache)
    # Layers that carry a state on (linear attention) have no length.
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    if state is None and len(layers) > 1:
        first, last = (int(layer.get_seq_length()) for layer in (layers[0], layers[-1]))
        if first != last:
            raise InputError(
                f"This {type(cache).__name__} holds {first} tokens in its first layer, {last} in "
                "its last: it was filled while pruning and made anew from its tensors. Copy it "
                "with copy.deepcopy, or start from the whole prompt."
            )
    return state


@made_once
def _watched(kind: Any) -> Any:
    class Watched(kind):  # type: ignore[misc]
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            made = memo[id(self)] = kind.__new__(type(self))
            states: MutableMapping[Any, State] = vars(self)[_STATES]
            for name, value in vars(self).items():
                setattr(made, name, states if name == _STATES else copy.deepcopy(value, memo))
            if self in states:
                states[made] = states[self].copy()
            return made

        def __copy__(self) -> Any:
            raise InputError(
                "A shallow copy of a cache shares its layers: use copy.deepcopy while pruning."
            )

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise InputError(
                "A cache that is being filled while pruning cannot be saved: what layers hold is "
                "known inside the with block only."
            )

        def _state(self) -> State | None:
            found: State | None = vars(self)[_STATES].get(self) if self.get_seq_length() else None
            return found

        def crop(self, tokens_to_remove: int) -> None:
            state = self._state()
            if state is not None:
                decoded = int(self.get_seq_length()) - state.cached
                if tokens_to_remove > 0:  # the length that is to be left, as the caller counts
                    tokens_to_remove = min(0, tokens_to_remove - state.length - decoded)
                    if not tokens_to_remove:
                        return
                if -tokens_to_remove > decoded:
                    raise InputError(
                        f"{-tokens_to_remove} tokens cannot be taken out of a cache filled while "
                        f"pruning, with {decoded} behind its prompt: start from the prompt."
                    )
            super().crop(tokens_to_remove)

        def reorder_cache(self, beam_idx: Any) -> Any:
            self._check(lambda state: beam_idx.tolist())
            return super().reorder_cache(beam_idx)

        def batch_select_indices(self, indices: Any) -> Any:
            self._check(lambda state: indices.tolist())
            return super().batch_select_indices(indices)

        def batch_repeat_interleave(self, repeats: int) -> Any:
            self._check(lambda state: [row for row in range(state.batch) for _ in range(repeats)])
            return super().batch_repeat_interleave(repeats)

        def _check(self, rows: Any) -> None:
            state = self._state()
            if state is not None and not state.allows(rows(state)):
                raise InputError(
                    "Rows of a cache filled while pruning cannot be exchanged, left out or "
                    "repeated where their prompts differ: what is known of each would not follow."
                )

    Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
    Watched.__module__ = kind.__module__
    return Watched


class _Refusal:
    """Stands in for a cache's ``update``."""

    def __init__(self, cache: Any) -> None:
        self.kind = type(cache)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"This {self.kind.__name__} was filled while pruning, which has ended, and its layers "
            "hold different tokens: decode inside the with block, or start anew from the whole "
            "prompt."
        )
