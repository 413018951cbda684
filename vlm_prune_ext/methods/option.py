"""How a method declares its fields: one :func:`option` each, and everything else follows from it.

The declaration of a field carries its default, what it accepts, one line of help, the
``model.config`` name that sets it and its tag in file names. Checks, listings, command-line
options, labels, records and the ``Attributes`` section of the docstring are read off it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from inspect import cleandoc
from numbers import Integral, Real
from typing import Any

from vlm_prune_ext.errors import InputError, unknown_name

MAX_SEED = 2**63 - 1
PUBLISHED_DEPTH = 32
"""Decoder layers of LLaVA-1.5-7B, for which published layer numbers are meant."""


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise :class:`InputError` naming the field, the value and what is accepted, unless ``ok``."""
    if not ok:
        raise InputError(f"{name}={value!r} is not valid: {accepted}.")


# -- what fields accept --------------------------------------------------------------------------
@dataclass(frozen=True)
class Accepts:
    """The values that a field takes.

    Attributes:
        text: what they are, for messages.
        ok: tells whether a value is one of them.
        convert: makes the value that is kept.
        kind: ``"budget"``, ``"layers"``, ``"sys_length"`` or ``"image_length"``, where others must
            know which fields are such.
        low: of layers, the first that is accepted.
    """

    text: str
    ok: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    kind: str = ""
    low: int = 0

    def optional(self, text: str = "None") -> Accepts:
        """The same, or ``None``."""
        ok, convert = self.ok, self.convert
        return Accepts(
            f"{self.text} or {text}",
            lambda value: value is None or ok(value),
            lambda value: None if value is None else convert(value),
            self.kind,
            self.low,
        )

    def check(self, name: str, value: Any) -> Any:
        """The value as it is kept. Raises InputError if it is not accepted."""
        require(self.ok(value), name, value, self.text)
        return self.convert(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def anything(text: str = "any value") -> Accepts:
    """No check here: the method's own :meth:`Declared.check` has it."""
    return Accepts(text, lambda value: True)


def an_integer(low: int) -> Accepts:
    """An integer from ``low``."""
    return Accepts(f"an integer of at least {low}", lambda v: _is_int(v) and v >= low)


def a_layer(low: int = 0) -> Accepts:
    """A 0-based layer of the language model."""
    return Accepts(
        f"an integer of at least {low}", lambda v: _is_int(v) and v >= low, kind="layers", low=low
    )


def some_layers(low: int = 0, count: int | None = None) -> Accepts:
    """Layers of the language model, ascending; a list, as files have it, becomes a tuple."""
    many = f"{count} layers" if count else "one or more layers"

    def ok(value: Any) -> bool:
        if not isinstance(value, tuple | list) or not value or len(value) != (count or len(value)):
            return False
        whole = all(_is_int(v) and v >= low for v in value)
        return whole and list(value) == sorted(set(value))

    return Accepts(f"{many} of at least {low}, ascending", ok, tuple, "layers", low)


def some_stages() -> Accepts:
    """Pairs of a layer and the keep budget behind it, layers ascending."""
    budget = a_budget()

    def ok(value: Any) -> bool:
        if not isinstance(value, tuple | list) or not value:
            return False
        pairs = all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in value)
        if not pairs or not all(_is_int(layer) and budget.ok(keep) for layer, keep in value):
            return False
        layers = [layer for layer, _ in value]
        return layers == sorted(set(layers)) and layers[0] >= 0

    text = f"pairs of a layer (at least 0, ascending) and {budget.text}"
    return Accepts(text, ok, lambda value: tuple((a, b) for a, b in value), "layers")


def a_budget(*, zero: bool = False) -> Accepts:
    """A keep budget: visual tokens per image (int) or a ratio (float); 0 only where ``zero``."""
    low = 0 if zero else 1
    ratio = "[0, 1]" if zero else "(0, 1]"

    def ok(value: Any) -> bool:
        if _is_int(value):
            return bool(value >= low)
        is_ratio = isinstance(value, float) and math.isfinite(value) and 0.0 <= value <= 1.0
        return is_ratio and (zero or value > 0.0)

    text = f"an integer of at least {low} (visual tokens) or a float in {ratio} (ratio)"
    return Accepts(text, ok, kind="budget")


def a_number(low: float, high: float, text: str) -> Accepts:
    """A real number from ``low`` to ``high``, kept as a float."""
    return Accepts(text, lambda v: _is_number(v) and low <= v <= high, float)


def one_of(*values: str) -> Accepts:
    """One of some names."""
    text = " or ".join(map(repr, values))
    return Accepts(text, lambda v: isinstance(v, str) and v in values)


def a_bool() -> Accepts:
    """True or false."""
    return Accepts("true or false", lambda v: isinstance(v, bool))


def a_seed() -> Accepts:
    """What torch's generators take, from 0."""
    text = f"an integer from 0 to {MAX_SEED} (2**63 - 1)"
    return Accepts(text, lambda v: _is_int(v) and 0 <= v <= MAX_SEED)


def a_tuple(each: Accepts, text: str) -> Accepts:
    """One or more values of a kind; a list, as files have it, becomes a tuple."""

    def ok(value: Any) -> bool:
        return isinstance(value, tuple | list) and bool(value) and all(map(each.ok, value))

    return Accepts(text, ok, lambda value: tuple(map(each.convert, value)), each.kind, each.low)


# -- a field -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """One declared field.

    Attributes:
        name: of the field.
        default: ``MISSING`` where it is required.
        accepts: its values.
        help: one sentence.
        config: ``model.config`` names that set it; empty: made from the method's prefix.
        config_values: what values of that ``model.config`` field mean, where they differ.
        tag: in file names, in front of the value; ``None``: the field is never part of one.
        always: the tag is written even where the value is the default.
        nested: a declared dataclass that a mapping is turned into.
    """

    name: str
    default: Any
    accepts: Accepts
    help: str
    config: tuple[str, ...] = ()
    config_values: Mapping[Any, Any] | None = None
    tag: str | None = ""
    always: bool = False
    nested: type[Declared] | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING


_BY_NAME = "\0"


def option(
    default: Any,
    accepts: Accepts,
    help: str,
    *,
    config: str | Iterable[str] = (),
    config_values: Mapping[Any, Any] | None = None,
    tag: str | None = _BY_NAME,
    always: bool = False,
    nested: type[Declared] | None = None,
) -> Any:
    """Declare a field of a method; see :class:`Option`. ``default=...`` (Ellipsis): required.

    ``tag`` is the field's own name unless stated.
    """
    names = (config,) if isinstance(config, str) else tuple(config)
    default = MISSING if default is ... else default
    about = {
        "accepts": accepts,
        "help": help,
        "config": names,
        "config_values": config_values,
        "tag": tag,
        "always": always,
        "nested": nested,
    }
    return field(default=default, metadata=about)


def system_length() -> Any:
    """Declare the field by which the user states how many tokens precede the first image."""
    return _stated_length("sys_length", 0, "Tokens in front of the image")


def image_length() -> Any:
    """Declare the field by which the user states how many visual tokens the prompt has."""
    return _stated_length("image_length", 1, "Visual tokens of the prompt")


def _stated_length(kind: str, low: int, what: str) -> Any:
    accepts = replace(an_integer(low).optional(), kind=kind)
    return option(None, accepts, f"{what}; None is detected, a wrong one is an error.", tag=None)


# -- a dataclass of such fields ------------------------------------------------------------------
class Declared:
    """Base of frozen dataclasses whose fields are declared by :func:`option`.

    Values are checked and made plain at construction: numbers of other libraries become Python's,
    lists become tuples. A keyword that is no field is an :class:`InputError` with the near name.
    """

    _stated: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Note which fields the caller stated: a default may give way, a stated value may not."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in kwargs:
            if key not in names:
                raise unknown_name(f"parameter of {cls.__name__}", key, names)
        if len(args) > len(names):
            raise InputError(
                f"{cls.__name__} takes {len(names)} parameters, got {len(args)}: "
                f"{', '.join(names)}."
            )
        stated = {*names[: len(args)], *kwargs}
        missing = [one.name for one in cls.options().values() if one.required]
        missing = [name for name in missing if name not in stated]
        if missing:
            raise InputError(f"{cls.__name__} needs a value for {', '.join(missing)}.")
        return _rebuilt(cls, {"_stated": frozenset(stated)})

    def __reduce__(self) -> Any:
        """Copies and pickles are made of what is there, not by calling the class anew."""
        return _rebuilt, (type(self), dict(vars(self)))

    def __post_init__(self) -> None:
        for one in self.options().values():
            value = plain(getattr(self, one.name))
            if one.nested is not None and isinstance(value, Mapping):
                value = one.nested(**{str(key): entry for key, entry in value.items()})
            object.__setattr__(self, one.name, one.accepts.check(one.name, value))
        self.check()

    def check(self) -> None:
        """What depends on several fields. Raises InputError."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Field -> its declaration, in order."""
        return dict(_options_of(cls))  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Field -> default value; required fields are left out."""
        return {o.name: o.default for o in cls.options().values() if not o.required}


def _rebuilt(cls: type, state: dict[str, Any]) -> Any:
    self: Any = object.__new__(cls)
    vars(self).update(state)
    return self


@cache
def _options_of(cls: type[Declared]) -> dict[str, Option]:
    return {f.name: _option_of(f) for f in fields(cls)}  # type: ignore[arg-type]


def _option_of(declared: Any) -> Option:
    """A field's declaration. A plain field, of a method that nobody registers, takes anything."""
    default = declared.default
    if declared.default_factory is not MISSING:
        default = declared.default_factory()
    about = dict(declared.metadata) or {"accepts": anything(), "help": "", "tag": _BY_NAME}
    if about["tag"] == _BY_NAME:
        about["tag"] = declared.name
    return Option(declared.name, default, **about)


def plain(value: Any) -> Any:
    """Numbers of other libraries (``numpy.int64``, ...) as Python's own, in tuples and lists too,
    so that checks, labels and records see one kind."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def document(cls: type[Declared]) -> None:
    """Write the declared fields into the class's docstring, as its ``Attributes`` section."""
    doc = cleandoc(cls.__doc__ or "")
    if "\nAttributes:\n" in doc:
        return
    lines = [f"    {one.name}: {one.help}" for one in cls.options().values()]
    attributes = "\n".join(["Attributes:", *lines])
    errors = "Raises:\n    InputError: for a value that is not accepted."
    cls.__doc__ = f"{doc}\n\n{attributes}\n\n{errors}\n"
