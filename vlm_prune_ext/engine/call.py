"""One run of the decoder, and what decoding must remember of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from vlm_prune_ext.engine.evidence import Seen
from vlm_prune_ext.engine.layout import Layout, take
from vlm_prune_ext.engine.prefill import Prefill
from vlm_prune_ext.engine.shorten import Shortened


class State:
    """What decoding must remember of a prompt."""

    def __init__(self, prefill: Prefill, short: Shortened | None) -> None:
        self.prefill, self.short = prefill, short

    @property
    def length(self) -> int:
        """Tokens per sample of the prompt as it came, candidates included."""
        return self.prefill.layout.total if self.short is None else self.short.given.length

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.prefill.held)

    def copy(self) -> State:
        """For a copy of the cache: what decode steps change is its own."""
        mine = self.prefill
        hidden, segments = dict(mine.hidden_keys), dict(mine.segments)
        return State(replace(mine, hidden_keys=hidden, segments=segments), self.short)

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
    def misses_tokens(self) -> bool:
        """Whether any layer's cache holds less than the prompt."""
        cut = any(not layout.is_whole for layout in self.prefill.segments.values())
        return cut or (self.short is not None and not self.short.whole)


class Call:
    """One run of the decoder.

    Args:
        state: of its prompt.
        prefill: it is the prompt itself.
        decoded: tokens that layer 0 holds behind the prompt, before this call.
    """

    def __init__(self, state: State, *, prefill: bool, decoded: int = 0) -> None:
        self.state, self.prefill, self.decoded = state, prefill, decoded
        self.cache: Any = None
        self.masks: dict[Any, tuple[Any, Any]] = {}
        self.positions: dict[Any, tuple[Any, Any]] = {}
        self.seen: Seen | None = None
        # What the last layer was handed, and what was made of it; see LayerArguments.
        self.given: tuple[Any, ...] | None = None
        self.changes: dict[str, Any] = {}

    def take_seen(self) -> Seen | None:
        """What was read for a stage; it serves that stage only."""
        seen, self.seen = self.seen, None
        return seen

    def gaps(self, cut: bool) -> bool:
        """Do this layer's positions have gaps?"""
        short = self.state.short
        return self.prefill and (cut or (short is not None and not short.whole))

    def cut_positions(self, name: str, value: Any, layout: Layout) -> Any:
        """Positions of the tokens a layer holds; computed once for all layers that hold them."""
        return self.once((name, id(layout), id(value)), value, lambda: _cut(name, value, layout))

    def once(self, key: Any, kept: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` made for a key before, or makes now. ``kept`` is held beside it: an id in
        the key is only unique while its object lives."""
        if key not in self.positions:
            self.positions[key] = (kept, make())
        return self.positions[key][1]


def _cut(name: str, value: Any, layout: Layout) -> Any:
    if name == "position_ids":
        return take(value, layout.slots, -1)
    return tuple(take(part, layout.slots, -2) for part in value)
