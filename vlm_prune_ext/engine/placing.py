"""Which layer a stage reads, in decoders that attend in some of their layers only.

Linear-attention layers (Qwen3.5, Qwen3-Next: three of four) carry a state on and have no attention
row to read. What a paper reads of such a layer is read of the nearest layer that attends, and the
tokens go in front of the layer that this means. A drop needs no more: a layer that carries a state
on runs over the tokens that are left, in order, and its state is that of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm_prune_ext.engine.evidence import attention_needs, reads
from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import say_once
from vlm_prune_ext.methods.evidence import Stage


def placed(stages: Sequence[Stage], parts: ModelParts, name: str) -> tuple[Stage, ...]:
    """A method's stages at layers where what they read can be read; in their order, one a layer.

    Args:
        stages: ascending.
        parts: of the model.
        name: of the method, for messages.

    Raises:
        InputError: more stages than layers that attend, or one that hides keys.
    """
    kind = type(parts.decoder).__name__
    attending = [n for n in range(len(parts.layers)) if n not in parts.linear]
    made: list[Stage] = []
    moved: list[tuple[int, int]] = []
    for stage in stages:
        if stage.mode == "mask":
            raise InputError(
                f"{name} with mode='mask' hides keys, which the linear-attention layers of {kind} "
                "do not have: use mode='drop'."
            )
        after = made[-1].layer if made else -1
        free = [n for n in _readable(stage, attending, len(parts.layers)) if n > after]
        if not free:
            raise InputError(
                f"{name} has {len(stages)} stages that read attention or keys, and {kind} attends "
                f"in layers {_names(attending)} only: use fewer stages, or earlier ones."
            )
        nearest = min(free, key=lambda n: abs(n - stage.layer))
        if nearest != stage.layer:
            moved.append((stage.layer, nearest))
        made.append(replace(stage, layer=nearest))
    if moved:
        said = ", ".join(f"{there} instead of {here}" for here, there in moved)
        say_once(
            f"{name}: {kind} attends in layers {_names(attending)} only, next to which its tokens "
            f"go: in front of layer {said}."
        )
    return tuple(made)


def _readable(stage: Stage, attending: list[int], layers: int) -> list[int]:
    """Layers in front of which all can be seen that a stage wants to see."""
    before, coming = reads(stage.needs), bool(attention_needs(stage.needs, "coming"))
    fronts = (layers,) if stage.layer == layers else range(layers)
    return [
        layer
        for layer in fronts
        if (not before or layer - 1 in attending) and (not coming or layer in attending)
    ]


def _names(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
