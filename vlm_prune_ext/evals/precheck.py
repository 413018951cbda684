"""What a checkpoint's ``config.json`` alone says about a run, before hours are spent."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import read_json
from vlm_prune_ext.methods.base import Method

if TYPE_CHECKING:
    from vlm_prune_ext.experiment.budgets import Prompt
    from vlm_prune_ext.models.checkpoint import Checkpoint


def check_stated(folder: Path, method: Method | None) -> None:
    """As :func:`check_fit`, as far as a local ``config.json`` spells its numbers out. Nothing is
    imported for it, so what is refused here is refused at once.

    Raises:
        InputError: naming the field, its value and what is accepted.
    """
    raw = read_json(folder / "config.json")
    if method is None or not isinstance(raw, dict):
        return
    stated = dict(raw)
    if "mm_vision_tower" in raw:  # original LLaVA
        tower = read_json(folder / str(raw["mm_vision_tower"]) / "config.json") or {}
        stated["vision_config"] = tower.get("vision_config", tower)
        stated["vision_feature_layer"] = raw.get("mm_vision_select_layer")
        whole = raw.get("mm_vision_select_feature") == "cls_patch"
        stated["vision_feature_select_strategy"] = "full" if whole else "default"
    parts = {"text_config": stated.get("text_config", raw)}
    parts["vision_config"] = stated.get("vision_config") or {}
    try:
        spelled = {name: SimpleNamespace(**values) for name, values in parts.items()}
        check_config(SimpleNamespace(**{**stated, **spelled}), method)
    except (AttributeError, TypeError):  # too little is stated
        return


def check_fit(source: Checkpoint, method: Method | None) -> None:
    """Refuse a method that cannot work on a checkpoint.

    Checked are layers of the decoder and of the tower. A budget above the visual tokens of an image
    is none of it: it keeps them all. What depends on prompts shows at the first one.

    Raises:
        InputError: naming the field, its value and what is accepted.
    """
    if method is None:
        return
    try:
        config: Any = _config(source)
    except ValueError:  # no family that is known: loading says so
        return
    check_config(config, method)


def check_config(config: Any, method: Method) -> None:
    """As :func:`check_fit`, from a model's configuration."""
    text: Any = getattr(config, "text_config", config)
    method.decoder_stages(text.num_hidden_layers)
    vision: Any = getattr(config, "vision_config", None)
    _check_text_tower(method, getattr(vision, "model_type", None))
    if getattr(vision, "model_type", None) != "clip_vision_model":
        return  # other towers drop nothing, and their patches are not what becomes visual tokens
    method.vision_stages(vision.num_hidden_layers, _feature_layer(config, vision))


def prompt_of(source: Checkpoint) -> Prompt:
    """What budgets are worked out for on a checkpoint: its decoder, and the visual tokens of a
    picture, where all have as many.

    Raises:
        InputError: a decoder of another build.
    """
    from vlm_prune_ext.experiment.budgets import Prompt
    from vlm_prune_ext.experiment.flops import DecoderShape

    config = _config(source)
    vision: Any = getattr(config, "vision_config", None)
    fixed = getattr(vision, "model_type", None) == "clip_vision_model"
    if fixed and not hasattr(config, "image_grid_pinpoints"):
        return Prompt(
            DecoderShape.from_config(config), (vision.image_size // vision.patch_size) ** 2
        )
    return Prompt(DecoderShape.from_config(config), _SOME_TOKENS, fixed=False)


def decoder_of(source: Checkpoint) -> dict[str, Any] | None:
    """Sizes of the decoder as plain values; ``None`` where it is of another build, or its layers
    are of several, which papers' ways of counting do not know."""
    from vlm_prune_ext.experiment.flops import DecoderShape

    try:
        shape = DecoderShape.from_config(_config(source))
    except ValueError:
        return None
    return None if shape.own else asdict(shape)


_SOME_TOKENS = 1000  # of a picture, where it depends on the picture: ratios are worked out


def _check_text_tower(method: Method, tower: str | None) -> None:
    """A method that compares image and question needs a tower with CLIP's text half."""
    stage = method.feature_stage()
    if stage is not None and "joint" in stage.needs and tower not in ("clip_vision_model", None):
        raise InputError(
            f"{method.name} needs a CLIP text tower, and this model's vision tower is a {tower}."
        )


def _config(source: Checkpoint) -> Any:
    from transformers import AutoConfig

    from vlm_prune_ext.models.checkpoint import WITH_CODE
    from vlm_prune_ext.models.original import OriginalCheckpoint, is_original

    if is_original(source.config):
        from vlm_prune_ext.models.llava import original_config

        return original_config(OriginalCheckpoint(source))
    if source.architecture in WITH_CODE:
        from vlm_prune_ext.models.internvl_chat import published_config

        return published_config(source)
    # Without False it would ask on the terminal whether to run the checkpoint's code.
    return AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)


def _feature_layer(config: Any, vision: Any) -> int | None:
    """Index of the last tower layer in use (``hidden_states[0]`` is what enters the first)."""
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None:
        return None
    every = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(i - 1 if i > 0 else vision.num_hidden_layers + i for i in every)


def is_untrained(source: Checkpoint) -> bool:
    """Whether the checkpoint says of itself that its weights are random."""
    return "random" in str(source.config.get("description", "")).lower()
