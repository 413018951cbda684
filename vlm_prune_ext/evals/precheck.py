"""What settings and ``config.json`` alone say about a run, before hours are spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import read_json
from vlm_prune_ext.experiment.settings import ENGINE
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import short_form
from vlm_prune_ext.serve.plugin import selected
from vlm_prune_ext.serve.selection import FAMILIES, check_version

VLLM = "vllm"
"""The backend that is not transformers."""

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


def check_backend(backend: str | None, given: Mapping[str, Any]) -> None:
    """Refuse settings that do not go with the backend, before anything is loaded.

    Raises:
        InputError: naming the setting.
    """
    if backend not in (None, VLLM):
        raise InputError(f"backend={backend!r} is not valid: {VLLM}, or none for transformers.")
    for name in ENGINE if backend is None else _OTHERS:
        if given.get(name) not in (None, False):
            why = "vLLM's: it needs backend='vllm'" if backend is None else "not possible with vLLM"
            raise InputError(f"{name}={given[name]!r} is {why}.")


_OTHERS = (
    *("device", "device_map", "attn_implementation", "fast", "trust_remote_code"),
    *("preprocess", "frames", "fps"),
)


def check_served(source: Checkpoint, method: Method | None) -> None:
    """Refuse what the engine cannot do, before weights are read.

    Raises:
        InputError: no vLLM here or another version, a checkpoint or method that does not fit.
    """
    if find_spec("vllm") is None:
        raise InputError(
            "backend='vllm' needs vLLM, which is not installed here: `make vllm` makes an "
            "environment that has it (docs/serve.md)."
        )
    from vlm_prune_ext.models.original import is_original

    check_version(vllm_version())
    if is_original(source.config):
        raise InputError(
            f"checkpoint {source.name!r} is in LLaVA's original format, which vLLM does not load: "
            "`vlm-prune convert --model ... --out FOLDER` makes one that it does."
        )
    if source.architecture not in FAMILIES:
        titles = ", ".join(line.title for line in FAMILIES.values())
        raise InputError(
            f"backend='vllm' is not possible with {source.architecture}: {titles} are."
        )
    selected(short_form(method), _config(source))


def vllm_version() -> str:
    """Of the vLLM here, whatever its build is named."""
    return version(packages_distributions()["vllm"][0])


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
