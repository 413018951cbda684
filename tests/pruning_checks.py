"""Properties every method must have on every model; shared by the test matrices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tests import makers
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


SHAPES = {(64, 48): "RGB", (31, 97): "L", (20, 20): "RGBA", (150, 90): "P", (1, 4): "1"}


def check_preprocessing_on_the_device(processor: Any, pictures: list[Any]) -> None:
    """Pixels made of a batch together on the model's device equal those of the host, to the bit."""
    more = [makers.photo(*size, seed=5).convert(mode) for size, mode in SHAPES.items()]
    texts = ["What?"] * len(pictures + more)
    try:
        processor.preprocess = "host"
        host = processor.batch(texts, pictures + more)
        processor.preprocess = "device"
        device = processor.batch(texts, pictures + more)
        ahead = processor.batch(texts, [processor.ready(one) for one in pictures + more])
    finally:
        processor.preprocess = None
    assert set(host) == set(device) == set(ahead)
    for name in host:
        assert torch.equal(host[name], device[name])
        assert torch.equal(host[name], ahead[name])
