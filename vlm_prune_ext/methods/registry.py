"""Methods by name. Adding a method is its file in this folder, under ``@register``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import yaml

import vlm_prune_ext.methods as package
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import PUBLIC as PUBLIC
from vlm_prune_ext.methods.base import REGISTERED, Method
from vlm_prune_ext.methods.option import a_budget

for _module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{_module.name}")


class _Methods(Mapping[str, "type[Method] | None"]):
    """Registry name -> class; ``none``, the baseline, comes first and has no class. A view: methods
    that are registered later are in it."""

    def __getitem__(self, name: str) -> type[Method] | None:
        return None if name == "none" else REGISTERED[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["none", *sorted(REGISTERED)])

    def __len__(self) -> int:
        return 1 + len(REGISTERED)

    def __repr__(self) -> str:
        return f"METHODS({', '.join(self)})"


METHODS: Mapping[str, type[Method] | None] = _Methods()


def classes() -> tuple[type[Method], ...]:
    """All methods, by name; the baseline is none."""
    return tuple(cls for cls in METHODS.values() if cls is not None)


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


def standard_method(name: str) -> Method | None:
    """A method as its paper sets it; required fields have the value that its class states."""
    cls = method_class(name)
    return None if cls is None else cls.from_settings(cls.standard)


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

    ``fastv``, ``fastv:100`` (the keep budget: a count, or a ratio such as ``0.25``),
    ``fastv:100,agg_layer=2``, ``himap:attn_txt_rank=288,attn_img_rank=72``,
    ``saint:0.83,vit={layers: [19], keep_num: 376}``. Values are read as in a config file; commas
    inside brackets do not separate.

    Raises:
        InputError: for anything :func:`get_method` refuses, or a text that is not of this form.
    """
    name, settings = parse_settings(text)
    return get_method(name, **settings)


def parse_settings(text: str) -> tuple[str, dict[str, Any]]:
    """A short form as registry name and the settings that it states."""
    name, _, rest = text.strip().partition(":")
    cls = method_class(name)
    settings: dict[str, Any] = {}
    usual: dict[str, Any] = {}
    for index, item in enumerate(_split(rest)):
        key, equals, value = (part.strip() for part in item.partition("="))
        given: dict[str, Any]
        if equals:
            given = {key: _value(key, value)}
        elif index or cls is None or not key:
            raise InputError(
                f"{text!r} is not a method: name, name:budget or name:key=value,... is."
            )
        else:
            budget = _value(cls.budget_field, key)
            given = cls.budget_settings(budget)
            if a_budget().ok(budget):
                usual = cls.budget_defaults(budget)
        for each in given:
            if each in settings:
                raise InputError(f"{each} is given twice in {text!r}: once is accepted.")
        settings.update(given)
    stated = {cls.config_fields().get(key, key) for key in settings} if cls is not None else ()
    return name, {**{k: v for k, v in usual.items() if k not in stated}, **settings}


def short_form(method: Method | None) -> str:
    """A text that :func:`parse_method` reads as this method.

    Raises:
        InputError: there is none, e.g. of a function as a value.
    """
    if method is None:
        return "none"
    fields = {name: (getattr(method, name), one.default) for name, one in method.options().items()}
    stated = [
        f"{n}={_written(value)}" for n, (value, default) in fields.items() if value != default
    ]
    text = f"{method.name}:{','.join(stated)}".removesuffix(":")
    try:
        same = parse_method(text) == method
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{method.label()} cannot be written as text, as another process needs it."
        )
    return text


def _written(value: Any) -> str:
    return json.dumps(asdict(value) if is_dataclass(value) else value, default=str)  # type: ignore[arg-type]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets, which may hold brackets once more, and braces."""
    brackets = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
    return re.findall(rf"(?:[^,\[{{]|{brackets}|\{{(?:[^{{}}\[]|{brackets})*\}}|[\[{{])+", text)


def _value(key: str, text: str) -> Any:
    """A value as YAML reads it; ``none`` is null."""
    if text.lower() == "none":
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{key}={text!r} is not valid: a number, name or list.") from error


def settings_method(cls: type[Method], config: Any) -> Method:
    """Build ``cls`` from the ``model.config`` fields that belong to it and are there.

    A field that is missing keeps its default; one that is there with ``None`` is passed on, since
    ``None`` means something for some (a length to detect, no stage in the language model).
    """
    return cls.from_settings(
        {k: getattr(config, k) for k in cls.config_fields() if hasattr(config, k)}
    )
