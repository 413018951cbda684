"""What a pruning method is: hyper-parameters, and pure rules that run at stated layers.

A method never touches a model. It states *where* it wants to drop tokens (:class:`Stage`), *what*
it needs to see there (``needs``) and a rule that turns this :class:`Evidence` into the visual
tokens that stay. The engine does the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from inspect import cleandoc
from numbers import Integral, Real
from typing import Any, ClassVar

import torch

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.evidence import (  # noqa: F401 - a method's file imports from one place
    Budget,
    Evidence,
    Need,
    Rule,
    Stage,
    VisionStage,
)


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise :class:`InputError` naming the field, the value and what is accepted, unless ``ok``."""
    if not ok:
        raise InputError(f"{name}={value!r} is not valid: {accepted}.")


def plain_numbers(method: object) -> None:
    """Turn a dataclass's numbers of other libraries (``numpy.int64``, ``numpy.float32``, also in
    tuples and lists) into Python's own, so that checks, labels and records see one kind."""
    for field in fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        object.__setattr__(method, field.name, _plain(value))


def _plain(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


MAX_SEED = 2**63 - 1


def require_seed(name: str, value: object) -> None:
    """Check a seed: what torch's generators take, from 0."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    ok = is_int and 0 <= value <= MAX_SEED  # type: ignore[operator]
    require(ok, name, value, f"an integer from 0 to {MAX_SEED} (2**63 - 1)")


def require_int(name: str, value: object, low: int, *, none: bool = False) -> None:
    """Check an integer field: at least ``low``; ``None`` only where ``none`` is true."""
    if none and value is None:
        return
    is_int = isinstance(value, int) and not isinstance(value, bool)
    accepted = f"an integer of at least {low}" + (" or None" if none else "")
    require(is_int and value >= low, name, value, accepted)  # type: ignore[operator]


def require_number(name: str, value: object, low: float, high: float, accepted: str) -> float:
    """Check a real field: a finite number from ``low`` to ``high``; returns it as a float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = is_number and low <= value <= high  # type: ignore[operator]
    require(ok, name, value, accepted)
    return float(value)  # type: ignore[arg-type]


def require_span(sys_length: object, length_name: str, length: object) -> None:
    """Check the two fields that state the layout of the prompt; ``None`` is detected."""
    require_int("sys_length", sys_length, 0, none=True)
    require_int(length_name, length, 1, none=True)


def require_layer(name: str, value: int, low: int, high: int, model: str) -> None:
    """Check that a layer exists in a model: ``low ... high``, as ``model`` describes it."""
    require(low <= value <= high, name, value, f"{low} ... {high} for {model}")


def require_budget(name: str, value: object) -> None:
    """Check a keep budget: tokens per image (int >= 1) or a ratio (float in (0, 1])."""
    accepted = "an integer of at least 1 (visual tokens) or a float in (0, 1] (ratio)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        require(False, name, value, accepted)
    elif isinstance(value, int):
        require(value >= 1, name, value, accepted)
    else:
        require(math.isfinite(value) and 0.0 < value <= 1.0, name, value, accepted)


def resolve_budget(name: str, budget: Budget, total: int) -> int:
    """Tokens to keep of ``total``: a count as it is, a ratio rounded (halves to even, at least 1).

    Raises:
        InputError: if a count exceeds ``total``.
    """
    if isinstance(budget, float):
        return max(1, round(budget * total))
    accepted = f"at most {total}, the visual tokens present"
    require(budget <= total, name, budget, accepted)
    return budget


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter, for listings.

    Attributes:
        name: field of the dataclass.
        default: its default; ``MISSING`` where it is required.
        help: what its docstring says, on one line.
        config_names: ``model.config`` fields that set it.
    """

    name: str
    default: Any
    help: str
    config_names: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING


@dataclass(frozen=True)
class Description:
    """A method for listings: registry name, one sentence, sources, parameters."""

    name: str
    summary: str
    paper: str
    code: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses, validated in ``__post_init__``.

    Class attributes describe the method to registries, commands and folder names:

    * ``name``: registry name; ``paper``, ``code``: sources.
    * ``CONFIG_FLAG``: the ``use_*`` field of ``model.config`` that turns it on.
    * ``CONFIG_FIELDS``: ``model.config`` field -> field of the dataclass.
    * ``BUDGET``: the field that the short form ``name:100`` sets.
    * ``LABEL``: field -> tag in folder names. The first ``LABEL_ALWAYS`` are always written; the
      others only where they differ from the default.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    code: ClassVar[str] = ""
    CONFIG_FLAG: ClassVar[str] = ""
    CONFIG_FIELDS: ClassVar[Mapping[str, str]] = {}
    BUDGET: ClassVar[str] = ""
    LABEL: ClassVar[Mapping[str, str]] = {}
    LABEL_ALWAYS: ClassVar[int] = 1

    # -- what the engine asks --------------------------------------------------------------
    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Selections in the language model, ascending by layer. Raises InputError for a layer
        the model does not have."""
        return ()

    def vision_stages(self, num_layers: int, feature_layer: int | None) -> tuple[VisionStage, ...]:
        """Selections in the vision tower. ``feature_layer``: index of the last layer whose output
        is used (``None``: a bare tower, all layers)."""
        return ()

    def resize(self, grid: torch.Tensor) -> torch.Tensor | None:
        """Image features ``(images, side, side, hidden)`` -> a smaller grid, or ``None`` to leave
        them."""
        return None

    @property
    def stated_span(self) -> tuple[int | None, int | None]:
        """``(sys_length, image length)`` as the user stated them; ``None`` is detected."""
        return None, None

    def decode_position_shift(self, layer: int) -> int:
        """Added to a decode step's position in ``layer``; not 0 only to reproduce a fault."""
        return 0

    # -- what registries and commands ask --------------------------------------------------
    def label(self) -> str:
        """Short text for file names, e.g. ``fastv_rank100``; tells configurations apart."""
        parts = [self.name]
        defaults = {f.name: f.default for f in fields(self)}
        for index, (key, tag) in enumerate(self.LABEL.items()):
            value = getattr(self, key)
            if index < self.LABEL_ALWAYS or value != defaults[key]:
                parts.append(f"{tag}{label_text(value)}")
        return "_".join(parts)

    @classmethod
    def describe(cls) -> Description:
        """The method for listings, read off the dataclass and its docstring."""
        doc = cleandoc(cls.__doc__ or "")
        names: dict[str, tuple[str, ...]] = {}
        for config_name, field in cls.CONFIG_FIELDS.items():
            names[field] = (*names.get(field, ()), config_name)
        helps = _attribute_docs(doc)
        parameters = tuple(
            Parameter(f.name, _default(f), helps.get(f.name, ""), names.get(f.name, ()))
            for f in fields(cls)
        )
        return Description(cls.name, doc.split("\n\n")[0], cls.paper, cls.code, parameters)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Field -> default value; required fields are left out."""
        return {f.name: _default(f) for f in fields(cls) if _default(f) is not MISSING}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """Build from field names and/or ``model.config`` names (``fast_v_attention_rank``...).

        Raises:
            InputError: unknown key (with the near name), the same field given twice, or a value
                that is not accepted.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            name = cls.CONFIG_FIELDS.get(key, key)
            if name not in known:
                raise unknown_name(f"parameter of {cls.name}", key, {*known, *cls.CONFIG_FIELDS})
            if name in values and values[name] != value:
                raise InputError(
                    f"{key}={value!r} contradicts {name}={values[name]!r}: they are one setting."
                )
            values[name] = value
        missing = [f.name for f in fields(cls) if _default(f) is MISSING and f.name not in values]
        if missing:
            raise InputError(f"{cls.name} needs a value for {', '.join(missing)}.")
        return cls(**values)


def label_text(value: object) -> str:
    """A value as part of a file name: a function by module and name, no odd characters."""
    if callable(value):
        value = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
    return re.sub(r"[^\w.+-]+", ".", str(value)).strip(".")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _attribute_docs(doc: str) -> dict[str, str]:
    """Entries of a docstring's ``Attributes:`` section, each on one line."""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    entries = re.findall(
        r"^    ([\w, ]+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.M | re.S
    )
    return {
        name.strip(): " ".join(text.split()).replace("``", "")
        for names, text in entries
        for name in names.split(",")
    }
