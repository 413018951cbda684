"""Properties every method must have on every model; shared by the test matrices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from vlm_prune_ext.methods.base import Evidence, Method, Stage


def fingerprint(model: nn.Module) -> dict[str, tuple]:
    """Everything pruning could leave behind: hooks, attributes and methods of every module."""
    found = {}
    for name, module in model.named_modules():
        hooks = (
            tuple(module._forward_hooks.values()),
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks_with_kwargs),
            tuple(module._forward_pre_hooks_with_kwargs),
            tuple(module._forward_hooks_always_called),
        )
        skip = {"_parameters", "_buffers", "_modules"} | {k for k in vars(module) if "hook" in k}
        rest = {k: id(v) for k, v in vars(module).items() if k not in skip}
        flags = tuple(
            k for k in vars(module) if "hook" in k and not isinstance(vars(module)[k], dict)
        )
        found[name] = (hooks, rest, flags, id(type(module).forward))
    return found


class Recorded(Method):
    """Carries a method out in the language model and remembers what its rules answered.

    Made from another one, ``Recorded(method, before)``, it gives the same answers again, whatever
    there is to see now: the same tokens are kept and the same rows added.
    """

    name = "recorded"

    def __new__(cls, method: Method, before: Recorded | None = None) -> Recorded:
        return object.__new__(cls)

    def __init__(self, method: Method, before: Recorded | None = None) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "answers", {})

    def decoder_stages(self, num_layers: int) -> tuple[Stage, ...]:
        stages = self.method.decoder_stages(num_layers)
        if self.before is None:
            return tuple(replace(s, rule=partial(self._record, s.rule, s.layer)) for s in stages)
        return tuple(
            replace(stage, needs=(), rule=partial(self._replay, stage.layer))
            for stage in stages
            if stage.mode != "observe"
        )

    def _record(self, rule: Any, layer: int, seen: Evidence) -> Any:
        answer = rule(seen)
        self.answers[layer, seen.sample, seen.total, seen.count] = answer
        return answer

    def _replay(self, layer: int, seen: Evidence) -> Any:
        return self.before.answers[layer, seen.sample, seen.total, seen.count]
