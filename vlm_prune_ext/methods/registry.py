"""Methods by name. Adding a method: its file, and one line here."""

from __future__ import annotations

import re
from typing import Any

import yaml

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.custom import CustomSelection
from vlm_prune_ext.methods.downsample import Downsample
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.himap import HiMAP
from vlm_prune_ext.methods.random_drop import RandomDrop
from vlm_prune_ext.methods.saint import SAINT

METHODS: dict[str, type[Method] | None] = {
    "none": None,
    "fastv": FastV,
    "himap": HiMAP,
    "saint": SAINT,
    "custom": CustomSelection,
    "random": RandomDrop,
    "downsample": Downsample,
}


def get_method(name: str, **settings: Any) -> Method | None:
    """A method by registry name; ``none`` gives ``None``, the baseline.

    Args:
        name: key of :data:`METHODS`.
        settings: its fields, under their own names or their ``model.config`` names.

    Raises:
        InputError: unknown name or parameter (with the near name), or a value not accepted.
    """
    cls = method_class(name)
    if cls is None:
        if settings:
            raise InputError(f"Method 'none' takes no parameters, got {', '.join(settings)}.")
        return None
    return cls.from_settings(settings)


def method_class(name: str) -> type[Method] | None:
    """The class behind a registry name; ``None`` for the baseline.

    Raises:
        InputError: unknown name (with the near name).
    """
    if not isinstance(name, str) or name not in METHODS:  # a list cannot even be looked up
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def parse_method(text: str) -> Method | None:
    """A method from its short form, as commands take it.

    ``fastv``, ``fastv:100`` (the primary budget: a count, or a ratio such as ``0.25``),
    ``fastv:100,agg_layer=2``, ``himap:attn_txt_rank=288,attn_img_rank=72``,
    ``saint:0.83,vit={layers: [19], keep_num: 376}``. Values are read as in a config file; commas
    inside brackets do not separate.

    Raises:
        InputError: for anything :func:`get_method` refuses, or a text that is not of this form.
    """
    name, _, rest = text.strip().partition(":")
    cls = method_class(name)
    settings: dict[str, Any] = {}
    for index, item in enumerate(_split(rest)):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if index or cls is None or not key:
                raise InputError(
                    f"{text!r} is not a method: name, name:budget or name:key=value,... is."
                )
            key, value = cls.BUDGET, key
        if key in settings:
            raise InputError(f"{key} is given twice in {text!r}: once is accepted.")
        settings[key] = _value(key, value)
    return get_method(name, **settings)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    return re.findall(r"(?:[^,\[{]|\[[^\]]*\]|\{(?:[^{}\[]|\[[^\]]*\])*\}|[\[{])+", text)


def _value(key: str, text: str) -> Any:
    """A value as YAML reads it; ``none`` is null."""
    if text.lower() == "none":
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{key}={text!r} is not valid: a number, name or list.") from error


def method_from_config(config: Any) -> Method | None:
    """The method that ``use_*`` fields of a ``model.config`` turn on, or ``None``.

    Raises:
        InputError: if more than one is on.
    """
    on = [c for c in METHODS.values() if c and getattr(config, c.CONFIG_FLAG or "_", False)]
    if len(on) > 1:
        flags = ", ".join(c.CONFIG_FLAG for c in on)
        raise InputError(f"{flags} are all on: exactly one method may be.")
    return settings_method(on[0], config) if on else None


def settings_method(cls: type[Method], config: Any) -> Method:
    """Build ``cls`` from the ``model.config`` fields that belong to it and are there.

    A field that is missing keeps its default; one that is there with ``None`` is passed on, since
    ``None`` means something for some (a length to detect, no stage in the language model).
    """
    return cls.from_settings(
        {k: getattr(config, k) for k in cls.CONFIG_FIELDS if hasattr(config, k)}
    )
