"""Loading checkpoints in Hugging Face format."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import CLIPImageProcessor

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import LoadOptions
from vlm_prune_ext.models.checkpoint import WEIGHT_FILES, Checkpoint, read_json
from vlm_prune_ext.models.fields import explained


def load_model(kind: Any, source: Checkpoint, options: LoadOptions) -> Any:
    """A model of transformers' class ``kind``.

    Raises:
        InputError: no weights, or weights that are missing or do not fit.
    """
    what = f"checkpoint {source.name!r}"
    if not any((source.folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(
            f"{what} has no weights: {str(source.folder)!r} should hold one of "
            f"{', '.join(WEIGHT_FILES)}."
        )
    arguments = options.from_pretrained_arguments()
    arguments.pop("revision", None)  # the folder is that revision
    try:
        with explained(what):
            model, report = kind.from_pretrained(
                str(source.folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told apart below
                **arguments,
            )
    except InputError as error:
        if not isinstance(error.__cause__, SafetensorError):
            raise
        raise InputError(f"Weights of {what} cannot be read: {error.__cause__}.") from error
    names = sorted(report["missing_keys"])
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise InputError(f"{what} lacks {len(names)} weight(s): {shown}.")
    for name, stored, made in report["mismatched_keys"]:
        raise InputError(
            f"{what}: {name} has shape {tuple(stored)}, but its config.json makes it {tuple(made)}."
        )
    return model.eval()


def check_tower(source: Checkpoint) -> None:
    """Raise InputError unless the checkpoint's vision tower is CLIP's, whose pixels and token
    counts we know."""
    kind = (source.config.get("vision_config") or {}).get("model_type")
    if kind not in ("clip_vision_model", None):
        raise InputError(
            f"vision_config.model_type={kind!r} of checkpoint {source.name!r} is not supported; "
            "accepted: clip_vision_model."
        )


def read_image_processor(source: Checkpoint) -> CLIPImageProcessor:
    """Resizing and normalising as the checkpoint states it.

    Raises:
        InputError: neither ``preprocessor_config.json`` nor ``processor_config.json`` has one.
    """
    what = f"checkpoint {source.name!r}"
    path = source.folder / "preprocessor_config.json"
    if path.is_file():
        return CLIPImageProcessor(**_fields(read_json(path, what)))
    path = source.folder / "processor_config.json"
    if path.is_file():
        fields = read_json(path, what).get("image_processor")
        if isinstance(fields, dict):
            return CLIPImageProcessor(**_fields(fields))
    raise InputError(f"{what} has no image processor: preprocessor_config.json is needed.")


def _fields(stored: dict[str, Any]) -> dict[str, Any]:
    """What CLIP's image processor knows of the stored fields."""
    names = (
        "size",
        "crop_size",
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_convert_rgb",
        "resample",
    )
    return {name: stored[name] for name in names if name in stored}
