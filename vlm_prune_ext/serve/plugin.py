"""How vLLM comes to serve a pruned model: its registry asks us about every configuration.

vLLM has no hook between a configuration and the choice of a model's class, so the two methods of
its registry that make this choice are wrapped, on the one object. A configuration that does not
name ``vlm_prune`` goes through untouched; one that does gets the pruned class of its family, or an
error, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.serve.selection import (
    FAMILIES,
    KEY,
    Selection,
    asked_for,
    check_budget,
    check_version,
    selection_for,
)

PREFIX = "VlmPrune"
"""In front of an architecture's name: the pruned one's."""


def install() -> None:
    """Make pruned classes known to vLLM's registry, and have it ask us."""
    from vllm.model_executor.models.registry import ModelRegistry as registry

    if f"{PREFIX}{next(iter(FAMILIES))}" in registry.models:
        return
    for name, family in FAMILIES.items():
        registry.register_model(
            f"{PREFIX}{name}", f"vlm_prune_ext.serve.models:{family.class_name}"
        )
    registry.inspect_model_cls = _asking(registry.inspect_model_cls, selection_of)
    registry.resolve_model_cls = _asking(registry.resolve_model_cls, _selection_of_known)


def _asking(
    choose: Callable[..., tuple[Any, str]], asks: Callable[[Any], Selection | None]
) -> Callable[..., tuple[Any, str]]:
    def ask(architectures: Any, model_config: Any) -> tuple[Any, str]:
        if asks(model_config) is None:
            return choose(architectures, model_config)
        name = _published_name(model_config.hf_config)
        # vLLM remembers classes by this list: two engines of one process must not share an entry.
        model_config.hf_config.architectures = [f"{PREFIX}{name}"]
        return choose([f"{PREFIX}{name}"], model_config)[0], name

    return ask


def _selection_of_known(model_config: Any) -> Selection | None:
    """As :func:`selection_of`, of a configuration that was inspected: what is no family of ours
    then is the language model inside one, under the same configuration."""
    return (
        selection_of(model_config) if _published_name(model_config.hf_config) in FAMILIES else None
    )


def selection_of(model_config: Any) -> Selection | None:
    """What a model's configuration asks for; ``None``: nothing.

    Args:
        model_config: vLLM's ``ModelConfig``.

    Raises:
        InputError: it asks for what this engine, this model or this method cannot do.
    """
    overrides, value = model_config.hf_overrides, getattr(model_config.hf_config, KEY, None)
    text = asked_for(value, overrides if isinstance(overrides, dict) else ())
    if text is None:
        return None
    import vllm

    check_version(vllm.__version__)
    return selected(text, model_config.hf_config)


def selected(text: str, config: Any) -> Selection | None:
    """What a method's short form means on a model; ``None``: nothing is pruned.

    Args:
        text: the short form.
        config: transformers' configuration of the model.

    Raises:
        InputError: a method, family, tower or budget that does not fit.
    """
    name = _published_name(config)
    selection = selection_for(text, name, config.get_text_config().num_hidden_layers)
    if selection is not None:
        _check_tower(config, text, name)
        most = most_tokens(config, FAMILIES[name].tower)
        if most is not None:
            check_budget(selection, most, FAMILIES[name].title)
    return selection


def _published_name(config: Any) -> str:
    names = getattr(config, "architectures", None) or [""]
    return str(names[0]).removeprefix(PREFIX)


def _check_tower(config: Any, text: str, name: str) -> None:
    """Raise InputError for towers that LLaVA's classes take and that are not known here."""
    if FAMILIES[name].tower == "packed":
        return
    kind = config.vision_config.model_type
    clip = kind == "clip_vision_model"
    if not clip and kind != "siglip_vision_model":
        raise InputError(
            f"{KEY}={text!r} is not possible with a vision tower of type {kind!r}: "
            "clip_vision_model and siglip_vision_model are accepted."
        )
    strategy = config.vision_feature_select_strategy
    if clip and strategy != "default":
        raise InputError(
            f"{KEY}={text!r} is not possible with vision_feature_select_strategy={strategy!r}: "
            "'default' is accepted, where CLS is not among the visual tokens."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise InputError(
            f"{KEY}={text!r} is not possible with "
            f"vision_feature_layer={config.vision_feature_layer!r}: one layer is accepted."
        )


def most_tokens(config: Any, tower: str) -> int | None:
    """Visual tokens of the largest image; ``None`` where any number may come.

    Args:
        config: of the model.
        tower: see :class:`~vlm_prune_ext.serve.selection.ServedFamily`.
    """
    if tower == "packed":
        return None
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if tower == "one":
        return int(side * side)
    grids = [
        (high // vision.image_size, wide // vision.image_size)
        for high, wide in config.image_grid_pinpoints
    ]
    return int(max(side * side * (1 + rows * columns) + side * rows for rows, columns in grids))
