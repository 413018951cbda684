"""What cannot work while tokens are dropped, said before anything runs.

Training: gradients flow through a drop as through any gather. A loss over labels does not work,
since logits have lost the positions that were dropped; nor does gradient checkpointing, which runs
layers a second time in the backward pass, when the prompt they belonged to is gone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, Undo
from vlm_prune_ext.errors import InputError


def refuse_compiled() -> None:
    """Raise InputError where a compiled model is what calls: its graphs know nothing of hooks, and
    would leave them out."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            raise InputError(_COMPILED)
        frame = frame.f_back


_COMPILED = (
    "What torch.compile made of a model, its decoder or layers cannot be pruned: take the model "
    "itself (for generate with a static cache on a GPU, disable_compile=True)."
)


def _is_compiled(module: Any) -> bool:
    if type(module).__name__ == "OptimizedModule":
        return True
    made = getattr(module, "_compiled_call_impl", None)
    own = vars(module).get("forward") if module is not None else None
    return made is not None or hasattr(own, "_torchdynamo_orig_callable")


def refuse(parts: ModelParts, shortens: bool) -> Undo:
    """A hook in front of the model that raises InputError for labels and for checkpointed layers.

    Args:
        parts: of the model.
        shortens: whether logits lose positions; masks alone leave them all.

    Returns:
        what takes it off.
    """
    tower = parts.vision.layers if parts.vision is not None else ()
    layers = [*parts.layers, *tower]
    whole = [parts.model, *parts.model.children(), parts.decoder]
    if any(map(_is_compiled, [*whole, *layers])):
        raise InputError(_COMPILED)

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        refuse_compiled()
        if shortens and kwargs.get("labels") is not None:
            raise InputError(
                "labels are not accepted while pruning: logits have lost the positions that were "
                "dropped. Compute the loss of the logits that are left (Trace.kept says which), or "
                "train outside of prune()."
            )
        if not torch.is_grad_enabled():
            return
        if any(
            getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
        ):
            raise InputError(
                "Gradient checkpointing is not possible while pruning: layers would run a second "
                "time without their prompt. Call gradient_checkpointing_disable() or train outside "
                "of prune()."
            )

    return parts.model.register_forward_pre_hook(look, with_kwargs=True).remove
