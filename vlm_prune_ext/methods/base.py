"""What a pruning method is: hyper-parameters, and pure rules that run at stated layers.

A method never touches a model. It states *where* it wants to drop tokens (:class:`Stage`), *what*
it needs to see there (``needs``) and a rule that turns this :class:`Evidence` into the visual
tokens that stay. The engine does the rest.

A method is one file of this folder: a frozen dataclass whose fields are declared by
:func:`~vlm_prune_ext.methods.option.option`, under :func:`register`. Everything that lists
methods (``vp``, both frameworks, command lines, listings, labels, records) reads the declaration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.evidence import (  # noqa: F401 - a method's file imports from one place
    Budget,
    Evidence,
    FeatureStage,
    Need,
    Rule,
    Stage,
    VisionStage,
    speaks_of_text,
)
from vlm_prune_ext.methods.option import PUBLISHED_DEPTH, Declared, Option, document, require

logger = logging.getLogger("vlm_prune_ext")

Site = Literal["tower", "features", "decoder"]
"""Where a method works: inside the vision tower, on the features it hands on, or in the layers of
the language model."""


# -- limits that depend on the model or the image ------------------------------------------------
def require_layer(name: str, value: int, low: int, high: int, model: str) -> None:
    """Check that a layer exists in a model: ``low ... high``, as ``model`` describes it."""
    require(low <= value <= high, name, value, f"{low} ... {high} for {model}")


_SAID: set[str] = set()


def say_once(text: str) -> None:
    """Log a line the first time it comes up in this process."""
    if text not in _SAID:
        _SAID.add(text)
        logger.warning(text)


def resolve_budget(name: str | None, budget: Budget, total: int) -> int:
    """Tokens to keep of ``total``: a count as it is, a ratio rounded (halves to even, at least 1).

    A count above ``total`` keeps all of that image, and a ratio of less than one token keeps one,
    which is said once where ``name``, the field's, is given.
    """
    if isinstance(budget, float):
        if not round(budget * total) and name is not None:
            said = f"{name}={budget} is below one token of some images or frames"
            say_once(f"{said}: these keep one.")
        return max(1, round(budget * total))
    if budget > total and name is not None:
        say_once(f"{name}={budget} is above the visual tokens of some images: these keep them all.")
    return min(budget, total)


def relative_layer(layer: int, num_layers: int, low: int = 0) -> int:
    """The layer of a model of ``num_layers`` at the relative depth of ``layer`` in 32."""
    return max(low, round(layer * num_layers / PUBLISHED_DEPTH))


# -- the base ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method(Declared):
    """Base of all methods. Subclasses are frozen dataclasses of declared fields.

    Class attributes describe the method:

    * ``name``: registry name; ``paper``, ``code``: sources.
    * ``sites``: where it works.
    * ``budget_field``: the field that the short form ``name:100`` sets.
    * ``config_flag``, ``config_prefix``: the field of ``model.config`` that turns it on, and what
      precedes its fields' names there; ``use_<name>`` and ``<name>_`` unless stated.
    * ``resets``: calls beside ``reset_<name>()`` that read its fields off ``model.config``.
    * ``standard``: values of required fields where somebody asks for the method by name alone.
    * ``published``: field of layers -> further values of the paper's, meant for its 32 layers; like
      a default, such a value gives way in a shallower model.
    * ``compares_frames``: its rule sees a video as one image, with its frames
      (:attr:`FeatureEvidence.frames`), whatever the budget is of.
    * ``companions``: dataclasses of its file that belong to the public API.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    code: ClassVar[str] = ""
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)
    budget_field: ClassVar[str] = ""
    config_flag: ClassVar[str] = ""
    config_prefix: ClassVar[str] = ""
    resets: ClassVar[tuple[str, ...]] = ()
    standard: ClassVar[Mapping[str, Any]] = {}
    published: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    compares_frames: ClassVar[bool] = False
    companions: ClassVar[tuple[type[Declared], ...]] = ()

    # -- what the engine asks --------------------------------------------------------------
    def decoder_stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Selections in the language model, ascending by layer.

        Raises:
            InputError: a stated layer that the model does not have.
        """
        fitted = self.placed(num_layers)
        made = fitted.plan(num_layers)
        for one in fitted.options().values() if made else ():
            if one.accepts.kind == "layers":
                for layer in _layers_in(getattr(fitted, one.name)):
                    model = f"a model of {num_layers} layers"
                    require_layer(one.name, layer, one.accepts.low, num_layers - 1, model)
        return made

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """What :meth:`decoder_stages` answers, of a method whose default layers fit the model."""
        return ()

    def placed(self, num_layers: int) -> Method:
        """The method with its default layers at the same relative depth, where one of them lies
        beyond a model of ``num_layers``; a stated layer never moves."""
        layers = [
            one
            for one in self.options().values()
            if one.accepts.kind == "layers"
            and (one.name not in self._stated or self._is_published(one.name))
            and getattr(self, one.name) is not None
        ]
        if all(max(_layers_in(getattr(self, one.name))) < num_layers for one in layers):
            return self
        moved = {o.name: _placed(getattr(self, o.name), num_layers, o.accepts.low) for o in layers}
        said = ", ".join(f"{name}={value}" for name, value in moved.items())
        say_once(f"{self.name}: {said}, the published depth in {num_layers} layers.")
        return replace(self, **moved)

    def _is_published(self, name: str) -> bool:
        return getattr(self, name) in self.published.get(name, ())

    def vision_stages(self, num_layers: int, feature_layer: int | None) -> tuple[VisionStage, ...]:
        """Selections in the vision tower. ``feature_layer``: index of the last layer whose output
        is used (``None``: a bare tower, all layers)."""
        return ()

    def feature_stage(self) -> FeatureStage | None:
        """The selection between vision tower and language model, if there is one."""
        return None

    @property
    def working_sites(self) -> tuple[Site, ...]:
        """Those of ``sites`` at which this configuration does something."""
        return self.sites

    def first_by_question(self, num_layers: int) -> int | None:
        """The layer in front of which a choice first depends on the question, by what its rule
        sees; -1: in front of all layers; ``None``: none does. Up to there, questions
        about one picture can share what is computed of it."""
        between = self.feature_stage()
        if between is not None and any(map(speaks_of_text, between.needs)):
            return -1
        stages = self.decoder_stages(num_layers)
        if not any(speaks_of_text(need) for stage in stages for need in stage.needs):
            return None
        # What a stage in front of the first of these leaves is not worth telling apart.
        first = min(stage.layer for stage in stages if stage.mode != "observe" or stage.layer)
        return first or -1

    @property
    def stated_span(self) -> tuple[int | None, int | None]:
        """``(sys_length, image length)`` as the user stated them; ``None`` is detected."""
        by_kind = {one.accepts.kind: getattr(self, one.name) for one in self.options().values()}
        return by_kind.get("sys_length"), by_kind.get("image_length")

    def decode_position_shift(self, layer: int) -> int:
        """Added to a decode step's position in ``layer``; not 0 only to reproduce a fault."""
        return 0

    # -- what registries and commands ask --------------------------------------------------
    def label(self) -> str:
        """Short text for file names, e.g. ``fastv_rank100``; tells configurations apart."""
        tagged = [one for one in self.options().values() if one.tag is not None]
        always = [one for one in tagged if one.always]
        changed = [o for o in tagged if not o.always and getattr(self, o.name) != o.default]
        parts = [f"{one.tag}{label_text(getattr(self, one.name))}" for one in (*always, *changed)]
        return "_".join([self.name, *parts])

    @classmethod
    def budgets(cls) -> tuple[str, ...]:
        """Fields that hold a keep budget."""
        return tuple(o.name for o in cls.options().values() if o.accepts.kind == "budget")

    @classmethod
    def budget_settings(cls, budget: Any) -> dict[str, Any]:
        """The settings that the short form ``name:budget`` stands for. A method whose published
        settings spread a budget over several fields overrides it."""
        if not cls.budget_field:
            raise InputError(f"{cls.name} has no keep budget: give its parameters by name.")
        return {cls.budget_field: budget}

    @classmethod
    def budget_defaults(cls, budget: Any) -> dict[str, Any]:
        """Defaults of other fields beside the short form ``name:budget``; what is stated wins."""
        return {}

    @classmethod
    def summary(cls) -> str:
        """What the method does, the first paragraph of its docstring, on one line."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())

    @classmethod
    def flag(cls) -> str:
        """The ``model.config`` field that turns it on."""
        return cls.config_flag or f"use_{cls.name}"

    @classmethod
    def config_names(cls, one: Option) -> tuple[str, ...]:
        """The ``model.config`` fields that set a field."""
        return one.config or (f"{cls.config_prefix or cls.name + '_'}{one.name}",)

    @classmethod
    def config_fields(cls) -> dict[str, str]:
        """``model.config`` field -> field of the dataclass."""
        return {name: o.name for o in cls.options().values() for name in cls.config_names(o)}

    @classmethod
    def setting_names(cls) -> set[str]:
        """All names under which a parameter can be given."""
        return {*cls.options(), *cls.config_fields()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """Build from field names and/or ``model.config`` names (``fast_v_attention_rank``...).

        Raises:
            InputError: unknown key (with the near name), the same field given twice, or a value
                that is not accepted.
        """
        options, config = cls.options(), cls.config_fields()
        values: dict[str, Any] = {}
        for key, value in settings.items():
            name = key if key in options else config.get(key)
            if name is None:
                raise unknown_name(f"parameter of {cls.name}", key, cls.setting_names())
            if key != name:
                value = _meant(key, value, options[name])
            if name in values and values[name] != value:
                raise InputError(
                    f"{key}={value!r} contradicts {name}={values[name]!r}: they are one setting."
                )
            values[name] = value
        missing = [one.name for one in options.values() if one.required and one.name not in values]
        if missing:
            raise InputError(f"{cls.name} needs a value for {', '.join(missing)}.")
        return cls(**values)


def _layers_in(value: Any) -> list[int]:
    """The layers in a field: one, several, several with a number beside each, or none."""
    if value is None:
        return []
    if not isinstance(value, tuple):
        return [value]
    return [entry[0] if isinstance(entry, tuple) else entry for entry in value]


def _placed(value: Any, num_layers: int, low: int) -> Any:
    """A field's layers at the same relative depth."""
    if not isinstance(value, tuple):
        return relative_layer(value, num_layers, low)
    moved: list[int] = []
    for layer in _layers_in(value):  # two layers never fall on one
        moved.append(relative_layer(layer, num_layers, moved[-1] + 1 if moved else low))
    both = zip(moved, value, strict=True)
    return tuple((layer, *old[1:]) if isinstance(old, tuple) else layer for layer, old in both)


def _meant(key: str, value: Any, one: Option) -> Any:
    """A value of a ``model.config`` field whose values are not the field's own."""
    if one.config_values is None:
        return value
    accepted = " or ".join(str(v).lower() for v in one.config_values)
    ok = type(value) in {type(v) for v in one.config_values} and value in one.config_values
    require(ok, key, value, accepted)
    return one.config_values[value]


def label_text(value: object) -> str:
    """A value as part of a file name: a function by module and name, no odd characters."""
    if callable(value):
        value = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
    if isinstance(value, tuple):
        return "-".join(map(label_text, value))
    return re.sub(r"[^\w.+-]+", ".", str(value)).strip(".")


# -- the table -----------------------------------------------------------------------------------
REGISTERED: dict[str, type[Method]] = {}
PUBLIC: dict[str, type[Declared]] = {}
"""By its own name, the class of each method, and what else its file adds to the public API."""

_M = TypeVar("_M", bound=Method)


def register(cls: type[_M]) -> type[_M]:
    """Class decorator: put a method into every list of methods.

    Raises:
        TypeError: the declaration is not complete.
    """
    if not cls.__dict__.get("name"):
        raise TypeError(f"{cls.__name__} has no name: a method states its registry name.")
    for one in cls.options().values():
        if not one.help:
            raise TypeError(f"{cls.__name__}.{one.name} is not declared: use option(...).")
    if cls.budget_field and cls.budget_field not in cls.options():
        raise TypeError(f"{cls.__name__}: budget_field={cls.budget_field!r} is none of its fields.")
    known = REGISTERED.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise TypeError(f"Two methods are named {cls.name!r}: {known} and {cls}.")
    public: tuple[type[Declared], ...] = (cls, *cls.companions)
    for each in public:
        document(each)
        PUBLIC[each.__name__] = each
    REGISTERED[cls.name] = cls
    return cls
