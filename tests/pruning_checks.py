"""Properties every method must have on every model; shared by the test matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
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


@dataclass(frozen=True)
class Replay(Method):
    """Drops what a recorded trace dropped: the same kept set, whatever the scores say now.

    ``kept``: layer -> ``(batch, n)`` absolute positions; ``starts``: (sample -> first position of
    its only image).
    """

    kept: dict
    starts: tuple

    name: ClassVar[str] = "replay"

    def decoder_stages(self, num_layers: int) -> tuple[Stage, ...]:
        def rule_for(layer: int):
            def rule(evidence: Evidence) -> torch.Tensor:
                rows = []
                for row, sample in enumerate(evidence.sample):
                    here = evidence.places[row] + self.starts[sample]
                    rows.append(torch.isin(here, self.kept[layer][sample]))
                return torch.stack(rows)

            return rule

        return tuple(Stage(layer, (), rule_for(layer)) for layer in sorted(self.kept))
