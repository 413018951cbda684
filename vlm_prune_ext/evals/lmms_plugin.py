"""What lmms-eval is told about this package: names of models, and where their classes are.

lmms-eval calls :func:`manifests` (entry point group ``lmms_eval.models``) whenever it starts, for
any model. So nothing is imported here but its own small registry class, and that late.
"""

from __future__ import annotations

from typing import Any

GROUP = "lmms_eval.models"
CLASSES = "vlm_prune_ext.evals.lmms"

MODELS: dict[str, str | None] = {
    "llava_baseline": "none",
    "llava_fastv": "fastv",
    "llava_saint": "saint",
    "llava_himap": "himap",
    "llava_custom": "custom",
    "llava_random": "random",
    "llava_downsample": "downsample",
    "vlm_prune": None,
}
"""Model name in lmms-eval -> registry name of its method; ``None``: ``model_args`` say which."""


def class_name(model: str, *, simple: bool) -> str:
    """Name of the class behind a model: ``llava_fastv`` -> ``LlavaFastvChat``."""
    stem = "".join(part.capitalize() for part in model.split("_"))
    return stem + ("Simple" if simple else "Chat")


def manifests() -> list[Any]:
    """One ``ModelManifest`` for each entry of :data:`MODELS`, with both of its interfaces."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=model,
            simple_class_path=f"{CLASSES}.{class_name(model, simple=True)}",
            chat_class_path=f"{CLASSES}.{class_name(model, simple=False)}",
        )
        for model in MODELS
    ]
