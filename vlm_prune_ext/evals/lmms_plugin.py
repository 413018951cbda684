"""What lmms-eval is told about this package: names of models, where their classes are, and what
``model_args`` they take.

lmms-eval calls :func:`manifests` (entry point group ``lmms_eval.models``) whenever it starts, for
any model: nothing that takes long is imported here. It splits ``key=value,key=value`` itself and
turns numbers, ``true`` and ``false`` into Python values; lists go in brackets
(``vit_layers=[11,19]``), ``None`` is written as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment.settings import ENGINE
from vlm_prune_ext.methods.base import Method, label_text
from vlm_prune_ext.methods.registry import METHODS, classes, get_method, method_class

GROUP = "lmms_eval.models"
CLASSES = "vlm_prune_ext.evals.lmms"

ANY = "vlm_prune"
"""The model whose ``model_args`` say which method it is."""


def models() -> dict[str, str | None]:
    """Model name in lmms-eval -> registry name of its method; ``None`` for :data:`ANY`."""
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


# -- model_args ------------------------------------------------------------------------------------
MODEL_KEYS = (
    "pretrained",
    "dtype",
    "attn_implementation",
    "conv_template",
    "device",
    "device_map",
    "revision",
    "fast",
    "trust_remote_code",
    "min_pixels",
    "max_pixels",
    "preprocess",
    "frames",
    "fps",
    "video_budget",
    "backend",
    *ENGINE,
)
"""Arguments that say which model and how it is loaded and prompted."""

RUN_KEYS = ("batch_size", "max_batch_size")
"""Arguments that lmms-eval adds from its own command line."""

_REFUSED = {
    "peft": "merge the adapter into the checkpoint first",
    "delta": "apply the delta weights to the checkpoint first",
}


def value_of(value: Any) -> Any:
    """A value as it was meant. lmms-eval turns numbers, ``true`` and ``false`` into Python values
    itself; here the same is done for text from elsewhere, and for ``None`` and lists."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{value!r} is not valid: a list in brackets.") from error
    return text


def method_of(model: str, given: Mapping[str, Any]) -> Method | None:
    """The method that a model's name and its ``model_args`` ask for; ``None`` is the baseline.

    Args:
        model: key of :func:`~vlm_prune_ext.evals.lmms_plugin.models`.
        given: the arguments that are not in :data:`MODEL_KEYS` or :data:`RUN_KEYS`.

    Raises:
        InputError: unknown argument (with the near name), one that is refused, or a value that is
            not accepted.
    """
    settings = {key: value_of(value) for key, value in given.items()}
    name = _method_name(model, settings)
    if models()[model] is None:
        del settings["method"]
    cls = method_class(name)
    _check_names(model, cls, settings)
    flag = cls.flag() if cls is not None else ""
    if flag and not settings.pop(flag, True):
        raise InputError(f"{flag}=False contradicts the model {model}: use llava_baseline.")
    return get_method(name, **_with_nested(cls, settings))


def class_of(model: str, given: Mapping[str, Any]) -> type[Method] | None:
    """The class of that method, whatever its parameters; ``None`` is the baseline."""
    return method_class(_method_name(model, given))


def _method_name(model: str, given: Mapping[str, Any]) -> str:
    named = models()[model]
    if named is not None:
        return named
    if "method" not in given:
        raise InputError(f"{model} needs method=... in model_args: {', '.join(METHODS)}.")
    name = value_of(given["method"])
    return "none" if name is None else str(name)


def accepted_keys(model: str, cls: type[Method] | None) -> set[str]:
    """All names that ``model_args`` may hold for a model whose method is ``cls``."""
    keys = {*MODEL_KEYS, *RUN_KEYS}
    if models()[model] is None:
        keys.add("method")
    if cls is None:
        return keys
    return keys | {*cls.setting_names(), cls.flag(), *_nested_names(cls)}


def _nested_names(cls: type[Method]) -> dict[str, tuple[str, str]]:
    """Names of the fields of a field: ``vit_layers`` -> ``("vit", "layers")``."""
    return {
        f"{outer.name}_{inner}": (outer.name, inner)
        for outer in cls.options().values()
        if outer.nested is not None
        for inner in outer.nested.options()
    }


def _check_names(model: str, cls: type[Method] | None, settings: Mapping[str, Any]) -> None:
    accepted = accepted_keys(model, cls)
    for key in settings:
        if key in _REFUSED:
            raise InputError(f"{key}= is not accepted in model_args: {_REFUSED[key]}.")
        if key not in accepted:
            raise unknown_name(f"model_args key of {model}", key, accepted - set(RUN_KEYS))


def _with_nested(cls: type[Method] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """``vit_layers``, ``vit_keep_num``, ``vit_r`` together as the field ``vit``."""
    names = _nested_names(cls) if cls is not None else {}
    rest = {key: value for key, value in settings.items() if key not in names}
    made: dict[str, dict[str, Any]] = {}
    for key in settings:
        if key in names:
            outer, inner = names[key]
            if rest.get(outer) is not None:
                raise InputError(f"{outer} and {key} are one setting: give one of them.")
            made.setdefault(outer, {})[inner] = settings[key]
    return {**rest, **made}


def method_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of ``model_args`` for the method."""
    return {key: value for key, value in given.items() if key not in (*MODEL_KEYS, *RUN_KEYS)}


def run_label(model: str, given: Mapping[str, Any]) -> str:
    """Name of a folder for one configuration: checkpoint, method with budget, and what else differs
    from the default, e.g. ``llava-v1.5-7b-fastv_rank100``.

    Args:
        model: key of :func:`~vlm_prune_ext.evals.lmms_plugin.models`.
        given: all of ``model_args``.

    Raises:
        InputError: as :func:`method_of`.
    """
    method = method_of(model, method_keys(given))
    checkpoint = str(given.get("pretrained") or "demo").rstrip("/").rsplit("/", 1)[-1]
    extra = [
        label_text(given[key])
        for key in ("dtype", "attn_implementation", "conv_template", "backend")
        if given.get(key) is not None
    ]
    if value_of(given.get("fast")) is not None:
        extra.append("fast" if value_of(given["fast"]) else "ordinary")
    name = method.label() if method is not None else "baseline"
    return "-".join([label_text(checkpoint), name, *extra])
