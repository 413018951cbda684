"""KV caches that are filled while pruning, and what may be done with them.

Layers of such a cache hold different tokens, and only what is remembered of its prompt says which.
While pruning, a cache is of a class derived from its own: a copy remembers as well, and where rows
are exchanged or tokens taken out that the prompt would have to follow, one sentence says so. A
cache that outlives the pruning it was made under refuses more tokens: whoever decoded on without
the pruner would count positions and masks from layer 0, silently wrong or with an error about
shapes. Nothing is put on the model.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from functools import cache as made_once
from typing import Any

from vlm_prune_ext.engine.call import State
from vlm_prune_ext.errors import InputError

_STATES = "_states_while_pruning"


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
    if state is None and (count := len(getattr(cache, "layers", ()))) > 1:
        first, last = (int(cache.get_seq_length(layer)) for layer in (0, count - 1))
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
                decoded = int(self.get_seq_length()) - state.prefill.segments[0].count
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
