"""What lmms-eval is told about this package: names of models, and where their classes are.

lmms-eval calls :func:`manifests` (entry point group ``lmms_eval.models``) whenever it starts, for
any model. So nothing is imported here but its own small registry class, and that late.
"""

from __future__ import annotations

from typing import Any

GROUP = "lmms_eval.models"
CLASSES = "vlm_prune_ext.evals.lmms"

ANY = "vlm_prune"
"""The model whose ``model_args`` say which method it is."""


def models() -> dict[str, str | None]:
    """Model name in lmms-eval -> registry name of its method; ``None`` for :data:`ANY`."""
    from vlm_prune_ext.methods.registry import classes

    named = {f"llava_{cls.name}": cls.name for cls in classes()}
    return {"llava_baseline": "none", **named, ANY: None}


def class_name(model: str, *, simple: bool) -> str:
    """Name of the class behind a model: ``llava_fastv`` -> ``LlavaFastvChat``."""
    stem = "".join(part.capitalize() for part in model.split("_"))
    return stem + ("Simple" if simple else "Chat")


def manifests() -> list[Any]:
    """One ``ModelManifest`` for each of :func:`models`, with both of its interfaces."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=model,
            simple_class_path=f"{CLASSES}.{class_name(model, simple=True)}",
            chat_class_path=f"{CLASSES}.{class_name(model, simple=False)}",
        )
        for model in models()
    ]
