"""Settings of runs: one declaration per setting, and defaults < file < command line.

A setting has one name everywhere: ``max_new_tokens`` in a file and in a record is
``--max-new-tokens`` on the command line. A field of :class:`Settings` carries its default, what is
accepted, the options that set it and their help; command lines, checks and records follow from it.
Parameters of a method go under the names of its fields (``attention_rank``) or under those of
``model.config`` that users of the published codes know (``fast_v_attention_rank``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.option import a_seed
from vlm_prune_ext.methods.registry import (
    METHODS,
    classes,
    get_method,
    method_class,
    parse_settings,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("all", "infer", "eval")
VIDEO_BUDGETS = ("frame", "video")
METHOD_HELP = (
    "a method's short form: fastv, fastv:100, fastv:0.25,agg_layer=2 (vlm-prune methods lists them)"
)
CONVENTIONS = ("ours", "fastv", "sparsevlm", "macs")
"""How FLOPs are counted, see :mod:`vlm_prune_ext.experiment.conventions`."""
DTYPES = ("auto", "float32", "float16", "bfloat16")
PREPROCESS = ("host", "device")


# -- declarations --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        accepted: in words, for the sentence about another value.
        ok: whether a value is of it.
        arguments: of ``add_argument``.
        read: what a command line or a file says -> the value; it may raise :class:`InputError`.
        names: all that are accepted, where they can be told; the near one is suggested.
    """

    accepted: str
    ok: Callable[[Any], bool]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole_or_text(value: Any) -> Any:
    """A number where a text is one; anything else is left for the check to name."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _number_or_text(value: Any) -> Any:
    """As :func:`_whole_or_text`, of numbers with a fraction."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def text(accepted: str, metavar: str = "NAME") -> Kind:
    """A text that is not empty."""
    return Kind(accepted, _is_text, {"metavar": metavar})


def choice(values: tuple[str, ...]) -> Kind:
    """One of some names."""
    return Kind(f"one of {', '.join(values)}", values.__contains__, {"choices": values})


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number."""
    said = f"an integer of at least {low}" if high is None else f"an integer of {low} to {high}"
    within = range(low, sys.maxsize if high is None else high + 1)
    return Kind(
        said,
        lambda value: type(value) is int and value in within,
        {"type": _whole_or_text, "metavar": "N"},
        _whole_or_text,
    )


def number(accepted: str, low: float = 0.0, high: float = math.inf, above: float = -1.0) -> Kind:
    """A number of ``low`` to ``high``, larger than ``above`` and finite."""

    def read(value: Any) -> Any:
        try:
            return float(value)
        except (TypeError, ValueError):
            return value

    def ok(value: Any) -> bool:
        inside = isinstance(value, float) and low <= value <= high and above < value
        return inside and value != math.inf

    return Kind(accepted, ok, {"metavar": "N"}, read)


def named(values: Iterable[str], metavar: str = "NAME") -> Kind:
    """One of some names; of others the near one is suggested."""
    names = tuple(values)
    return Kind(f"one of {', '.join(names)}", names.__contains__, {"metavar": metavar}, names=names)


def many(kind: Kind, *, none: bool = False) -> Kind:
    """One value of a kind or several, as a list.

    Args:
        kind: of each.
        none: whether ``none`` is one as well.
    """

    def read(value: Any) -> list[Any]:
        listed = value if isinstance(value, list | tuple) else [value]
        nothing = ("none", "original") if none else ()
        return [None if str(one).lower() in nothing else kind.read(one) for one in listed]

    said = f"{kind.accepted} or none" if none else kind.accepted
    more = {key: value for key, value in kind.arguments.items() if key != "type"}
    return Kind(said, kind.ok, {**more, "nargs": "+", "action": "extend"}, read, kind.names)


def required(kind: Kind) -> Kind:
    """A kind of value that must be given."""
    return replace(kind, arguments={**kind.arguments, "required": True})


NAMES = Kind(
    "names of datasets",
    lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    {"nargs": "+", "metavar": "NAME"},
)
WHOLE = whole(1)
RATE = Kind(
    "a number above 0",
    lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    {"type": _number_or_text, "metavar": "X"},
    _number_or_text,
)
SHARE = Kind(
    "a number above 0, at most 1",
    lambda value: type(value) in (int, float) and 0 < value <= 1,
    {"type": _number_or_text, "metavar": "X"},
    _number_or_text,
)
BATCH = Kind(
    "an integer of at least 1, or auto",
    lambda value: value == "auto" or WHOLE.ok(value),
    {"type": _whole_or_text, "metavar": "N|auto"},
    _whole_or_text,
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool), {"action": "store_true"})
SWITCH = Kind(FLAG.accepted, FLAG.ok, {"action": argparse.BooleanOptionalAction})
METHOD = Kind(
    "a method's short form",
    lambda value: isinstance(value, Method),
    {"metavar": "NAME[:BUDGET]"},
    lambda value: method_of(value),
)
SEED = Kind("", lambda value: True, {"type": _whole_or_text, "metavar": "N"})  # checks itself


def option(default: Any, kind: Kind, about: str, *flags: str) -> Any:
    """A field of a settings class.

    Args:
        default: ``None`` is accepted only where it is the default.
        kind: of its values.
        about: help of its options.
        flags: options; not stated: ``--`` and its name with dashes.
    """
    return field(default=default, metadata={"kind": kind, "help": about, "flags": flags})


def shared(name: str, default: Any = ..., about: str = "", *flags: str) -> Any:
    """A field that :class:`Settings` declares too, under the same name; what is stated differs."""
    one = _declared(Settings)[name]
    kind, said, own = (one.metadata[key] for key in ("kind", "help", "flags"))
    return option(one.default if default is ... else default, kind, about or said, *(flags or own))


def _declared(cls: Any) -> dict[str, Any]:
    return {one.name: one for one in fields(cls) if "kind" in one.metadata}


def flags_of(one: Any) -> tuple[str, ...]:
    """Options that set a field."""
    return one.metadata["flags"] or (f"--{one.name.replace('_', '-')}",)


def add_options(parser: Any, names: Iterable[str] | None = None, of: Any = None) -> None:
    """Declare options of settings.

    Args:
        parser: an argument parser, or a group of one.
        names: fields; ``None``: all.
        of: the class that declares them; ``None``: :class:`Settings`.
    """
    declared = _declared(of or Settings)
    for name in declared if names is None else names:
        one = declared[name]
        kind, said = one.metadata["kind"], one.metadata["help"].replace("%", "%%")
        parser.add_argument(*flags_of(one), dest=name, help=said, **kind.arguments)


def add_config(parser: Any) -> None:
    """Declare ``--config`` and ``--allow-code``, of :func:`read_file`."""
    parser.add_argument(
        "--config", metavar="FILE", help="settings as JSON or YAML; the command line wins"
    )
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="let --config name code to run (package.module:function, trust_remote_code)",
    )


class Declared:
    """Settings of a command: a frozen dataclass, all of whose fields :func:`option` makes. Values
    are read and checked; what is not accepted is named by its option."""

    def __post_init__(self) -> None:
        for name, one in _declared(self).items():
            kind, value = one.metadata["kind"], getattr(self, name)
            if value is one.default and not value:  # nothing is said
                continue
            value = kind.read(value)
            if value == []:
                raise InputError(f"{flags_of(one)[0]} [] is not valid: at least one value.")
            for each in value if isinstance(value, list) else [value]:
                if each is not None and not kind.ok(each):
                    raise self.refused(one, each)
            object.__setattr__(self, name, value)

    def refused(self, one: Any, value: Any) -> InputError:
        """The error for a value of a field that is not accepted."""
        flag, kind = flags_of(one)[0], one.metadata["kind"]
        if kind.names:
            return unknown_name(flag, value, kind.names)
        if isinstance(value, str) and not value.strip():
            return InputError(f"{flag} {value!r} is not valid: it is empty.")
        said = f"{value:g}" if isinstance(value, float) else value
        return InputError(f"{flag} {said} is not valid: {kind.accepted}.")

    @classmethod
    def of(cls, line: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> Self:
        """Defaults, a file's settings over them, and the command line's over these.

        Args:
            line: name -> value; what is no field, or not given (``None`` or ``False``), is not
                looked at.
            file: the same, from :func:`read_file`.

        Raises:
            InputError: an unknown name in the file, or a value that is not accepted.
        """
        declared = _declared(cls)
        for name in file or {}:
            if name not in declared:
                raise unknown_name("setting", name, declared)
        given = {n: line[n] for n in declared if line.get(n) is not None and line[n] is not False}
        return cls(**{**(file or {}), **given})


@dataclass(frozen=True)
class ModelSettings(Declared):
    """Which model, where and how it is loaded; commands about one model add theirs.

    Attributes:
        model_path: folder or hub name of a checkpoint; ``None`` is the demo's.
        device, dtype, attn_implementation, fast, trust_remote_code: see
            :func:`vlm_prune_ext.load`.
        min_pixels, max_pixels: pixels of an image, of families that take it as large as it is.
        preprocess: where pictures are resized and normalised.
        frames, fps: how many frames of a video are shown, in all or of each second.
    """

    model_path: str | None = option(
        None,
        text("a text", "NAME_OR_PATH"),
        "folder or repository, original LLaVA or Hugging Face format (default: demo model)",
        *("--model-path", "--model"),
    )
    device: str | None = option(None, text("a text"), "cpu, cuda, cuda:1 (default: as found)")
    dtype: str | None = option(
        None, choice(DTYPES), "default: float32 on a CPU, else the checkpoint's"
    )
    attn_implementation: str | None = option(
        None, text("a text"), "eager, sdpa or flash_attention_2"
    )
    fast: bool | None = option(
        None,
        SWITCH,
        "CUDA graphs with fixed shapes, or an error (default: on a GPU, where possible)",
    )
    trust_remote_code: bool = option(
        False,
        FLAG,
        "load formats that come with code of their own, e.g. OpenGVLab/InternVL2-2B (default: "
        "refuse)",
    )
    min_pixels: int | None = option(
        None, WHOLE, "smaller pictures are enlarged, e.g. Qwen2.5-VL's (default: the checkpoint's)"
    )
    max_pixels: int | None = option(
        None, WHOLE, "larger pictures are made smaller (default: the checkpoint's)"
    )
    preprocess: str | None = option(
        None,
        choice(PREPROCESS),
        "where pictures are resized, with equal pixels (default: the device where it is a GPU)",
    )
    frames: int | None = option(
        None, WHOLE, "frames of a video that are shown (default: the data set's, else 32)"
    )
    fps: float | None = option(None, RATE, "frames of each second of a video, in place of --frames")


MODEL = tuple(f.name for f in fields(ModelSettings))
"""Names of these settings."""


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Everything that decides what a run does.

    Attributes:
        method: what prunes; ``None`` is the baseline.
        backend: what answers; ``None`` is transformers, in this process.
        tensor_parallel_size, max_model_len, gpu_memory_utilization: of vLLM.
        data: names of datasets.
        work_dir: where results go.
        limit: rows of each dataset, the first ones; ``None``: all.
        mode: ``infer`` makes predictions, ``eval`` scores those that are there, ``all`` does both.
        reuse: what every run does: go on from the answers that are there.
        fresh: start anew instead; what is there is put aside.
        verbose: print every answer.
        seed: of torch's generators, and of methods that draw lots.
        batch_size: rows that are answered together, or ``auto``: as many as pay and fit into
            memory; ``None``: ``auto`` on a GPU, else 1.
        max_new_tokens: limit of an answer; ``None``: VLMEvalKit's for LLaVA.
        keep_positions: how many of the first rows say in the log which tokens were kept.
        video_budget: what a method's budget is of: each ``frame`` of a video, or the ``video``.
    """

    method: Method | None = None
    backend: str | None = option(
        None,
        named(("vllm",)),
        "vllm: in vLLM's engine, with the same prompts (docs/serve.md); default: transformers",
    )
    tensor_parallel_size: int | None = option(None, WHOLE, "of vLLM: GPUs that share each layer")
    max_model_len: int | None = option(None, WHOLE, "of vLLM: tokens of prompt and answer")
    gpu_memory_utilization: float | None = option(
        None, SHARE, "of vLLM: share of a GPU's memory that it takes"
    )
    data: tuple[str, ...] = option(
        (),
        NAMES,
        "VLMEvalKit's, lmms-eval's, path.tsv, .csv, .yaml, or the demo's (default: these)",
    )
    work_dir: str = option(
        "outputs", text("a folder", "DIR"), "default: outputs", "--work-dir", "--out"
    )
    limit: int | None = option(None, WHOLE, "only the first N rows of each data set")
    mode: str = option("all", choice(MODES), "default: all")
    reuse: bool = option(False, FLAG, "what every run does: go on from what is there")
    fresh: bool = option(False, FLAG, "start anew; what is there is put aside, not deleted")
    verbose: bool = option(False, FLAG, "print every answer")
    seed: int = option(0, SEED, "default: 0")
    batch_size: int | str | None = option(
        None,
        BATCH,
        "rows that are answered together; auto: as many as pay and fit (default: auto on a GPU, "
        "else 1)",
    )
    max_new_tokens: int | None = option(None, WHOLE, "default: VLMEvalKit's for LLaVA, 2048")
    keep_positions: int = option(
        200, WHOLE, "first rows whose kept tokens are logged, for pages (default: 200)"
    )
    video_budget: str = option(
        "frame",
        choice(VIDEO_BUDGETS),
        "what a budget is of: each frame of a video, or all of it (default: frame)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        a_seed().check("seed", self.seed)
        if self.reuse and self.fresh:
            raise InputError("reuse=True and fresh=True exclude each other: one of them may be.")

    @property
    def label(self) -> str:
        """The method's part of file names."""
        return self.method.label() if self.method is not None else "baseline"

    def refused(self, one: Any, value: Any) -> InputError:
        """Named as in a file: it may come from one."""
        return InputError(f"{one.name}={value!r} is not valid: {one.metadata['kind'].accepted}.")

    def as_json(self) -> dict[str, Any]:
        """Plain values, the method as its name and all of its parameters."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"}
        return {**plain, "data": list(self.data), "method": method_as_json(self.method)}


def method_as_json(method: Method | None) -> dict[str, Any]:
    """A method as plain values: its name, and all of its parameters as they are resolved."""
    if method is None:
        return {"name": "none"}
    return {"name": method.name, "parameters": json.loads(json.dumps(asdict(method), default=str))}


def method_of(value: Any) -> Method | None:
    """The method that a short form, a mapping with a name, or a record means.

    Raises:
        InputError: it is none of these, or does not accept a parameter.
    """
    if isinstance(value, Method):
        return value
    name, parameters = _method_of(value)
    return get_method(name, **parameters)


ENGINE = ("tensor_parallel_size", "max_model_len", "gpu_memory_utilization")
"""Names of settings of vLLM's engine."""

# Names of settings that are not a method's.
RUN_KEYS = tuple(f.name for f in fields(Settings) if f.name != "method")


# -- reading -------------------------------------------------------------------------------------
def read_file(path: str | Path, *, allow_code: bool = False) -> dict[str, Any]:
    """Settings from a JSON or YAML file; dashes in names are read as underscores.

    Args:
        path: of the file.
        allow_code: it may name code to run: ``package.module:function`` as a method, or
            ``trust_remote_code: true``.

    Raises:
        InputError: no such file, neither JSON nor YAML, no mapping, values that hold themselves or
            are nested endlessly, or code that was not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Config file {str(path)!r} does not exist: give a .json or .yaml file.")
    try:
        text = path.read_text(encoding="utf-8")
        value = _parsed(text, is_json=path.suffix == ".json")
        size = _size(value)
    except RecursionError as error:
        raise InputError(f"Config file {str(path)!r} is nested too deeply.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:300]
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InputError(f"Config file {str(path)!r} is not valid {kind}: {said}.") from error
    if not isinstance(value, dict):
        raise InputError(f"Config file {str(path)!r} must hold names and values.")
    if size > _MOST_VALUES:
        raise InputError(
            f"Config file {str(path)!r} holds more than {_MOST_VALUES} values, or one that holds "
            "itself: settings are plain values."
        )
    code = None if allow_code else _code_in(value)
    if code is not None:
        raise InputError(
            f"Config file {str(path)!r} names code to run ({code}): --allow-code on the command "
            "line accepts that."
        )
    return {str(key).replace("-", "_"): entry for key, entry in value.items()}


class _OnceEach(yaml.SafeLoader):
    """YAML whose mappings have each name once: of two, the last would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As in the base."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        _check_once(name for name in names if name != "<<")
        return super().construct_mapping(node, deep)


def _parsed(text: str, *, is_json: bool) -> Any:
    if is_json:
        return json.loads(text, object_pairs_hook=_once_each)
    return yaml.load(text, _OnceEach)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once(name for name, _ in pairs)
    return dict(pairs)


def _check_once(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} stands in it twice")
        seen.add(name)


_MOST_VALUES = 10_000
_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*\s*:\s*[A-Za-z_][\w.]*$")


def _size(value: Any) -> int:
    """Values inside a value, counted as often as they are referred to, but no further than past
    :data:`_MOST_VALUES`."""
    count, waiting = 0, [value]
    while waiting and count <= _MOST_VALUES:
        count += 1
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set):
            waiting += found
    return count


def _code_in(value: Any, name: str = "") -> str | None:
    """What of a file's settings would run code; ``None``: nothing."""
    if isinstance(value, dict):
        inside = (_code_in(entry, f"{name} {key}") for key, entry in value.items())
        return next((found for found in inside if found is not None), None)
    if isinstance(value, list):
        return next((found for entry in value if (found := _code_in(entry, name))), None)
    if isinstance(value, str) and "method" in name and _names_code(value.strip()):
        return repr(value)
    if name.endswith("trust_remote_code") or name.endswith("trust-remote-code"):
        return "trust_remote_code" if value else None
    return None


def _names_code(text: str) -> bool:
    """Whether a method's text is ``package.module:function``, or a short form that holds one."""
    name, _, rest = text.partition(":")
    return (":" in rest) if name.strip() == "custom" else _FUNCTION.search(text) is not None


def resolve(
    command_line: Mapping[str, Any], file: Mapping[str, Any] | None = None
) -> tuple[Settings, frozenset[str]]:
    """Put defaults, a file's settings and the command line's together.

    Args:
        command_line: name -> value of what was given there; beside the names of
            :class:`Settings` also ``baseline``, ``use_*`` and parameters of methods.
        file: the same from :func:`read_file`.

    Returns:
        the settings, and the names of those that were given by either.

    Raises:
        InputError: an unknown name (with the near one), a value that is not accepted, parameters
            without their method, or two methods at once.
    """
    layers = [_Layer.split(file or {}, "file"), _Layer.split(command_line, "command line")]
    run = {**layers[0].run, **layers[1].run}
    name, parameters = _merge(layers[0], layers[1])
    if name is not None and "seed" in run and "seed" in _field_names(name):
        parameters.setdefault("seed", run["seed"])
    method = get_method(name, **parameters) if name is not None else None
    if "data" in run:
        run["data"] = _names(run["data"])
    chosen = any(layer.name is not None for layer in layers)
    given = frozenset(run) | ({"method"} if chosen else frozenset())
    return Settings(method=method, **run), given


@dataclass
class _Layer:
    """What one source says.

    Attributes:
        run: settings that are not a method's.
        name: registry name of the method, ``None`` if it does not say.
        parameters: of the method.
        source: for messages.
    """

    run: dict[str, Any]
    name: str | None
    parameters: dict[str, Any]
    source: str

    @staticmethod
    def split(given: Mapping[str, Any], source: str) -> _Layer:
        """Tell run settings, the choice of a method and its parameters apart."""
        rest = dict(given)
        names, parameters, off = _choice(rest)
        if len(names) > 1:
            raise InputError(
                f"Methods {', '.join(sorted(names))} are all asked for in the {source}: exactly "
                "one may be."
            )
        name = next(iter(names), None)
        run = {}
        for key, value in rest.items():
            if key in off:
                continue
            if key in RUN_KEYS and not (key == "mode" and value not in MODES and name):
                run[key] = value
            elif key in _parameter_names() or name is None or key in _own_names(name):
                parameters[key] = value
            else:
                raise _unknown(key, name)
        return _Layer(run, name, parameters, source)


def _choice(rest: dict[str, Any]) -> tuple[set[str], dict[str, Any], set[str]]:
    """Take what chooses a method out of ``rest``.

    Returns names of methods asked for, parameters that came with one, and the names of parameters
    of methods that are explicitly off.
    """
    names: set[str] = set()
    parameters: dict[str, Any] = {}
    off: set[str] = set()
    if rest.pop("baseline", False):
        names.add("none")
    for cls in classes():
        if cls.flag() not in rest:
            continue
        flag = rest.pop(cls.flag())
        _require(cls.flag(), flag, "true or false", lambda v: isinstance(v, bool))
        if flag:
            names.add(cls.name)
        else:
            off |= set(cls.config_fields())
    if "method" in rest:
        name, parameters = _method_of(rest.pop("method"))
        names.add(name)
    return names, parameters, off


def _method_of(value: Any) -> tuple[str, dict[str, Any]]:
    """``fastv``, ``fastv:100``, ``{name: fastv, ...}`` or nothing -> name and parameters."""
    if value is None:
        return "none", {}
    if isinstance(value, Mapping):
        rest = {key: entry for key, entry in value.items() if key not in ("name", "parameters")}
        if "name" not in value:
            raise InputError(f"method={value!r} is not valid: a mapping with a name.")
        cls = method_class(str(value["name"]))
        resolved = value.get("parameters") or {}
        return str(value["name"]), {**rest, **_stated(cls, resolved)}
    _require("method", value, f"a name of {', '.join(METHODS)}, or name:budget", _is_text)
    name, parameters = parse_settings(value)
    if parameters:
        get_method(name, **parameters)  # a wrong value is said with the text it stands in
    return name, parameters


def _stated(cls: type[Method] | None, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as :func:`method_as_json` writes them, without those that are the defaults: what
    nobody stated gives way in a shallower model, wherever the method is built again."""
    usual = json.loads(json.dumps(cls.defaults(), default=str)) if cls is not None else {}
    return {k: v for k, v in resolved.items() if k not in usual or v != usual[k]}


def _merge(file: _Layer, line: _Layer) -> tuple[str | None, dict[str, Any]]:
    """The method's name and parameters, those of the command line first."""
    name = line.name or file.name
    parameters = dict(file.parameters) if name == file.name else {}
    for key, value in line.parameters.items():
        for other in [k for k in parameters if k == key or _same_setting(name, k, key)]:
            del parameters[other]
        parameters[key] = value
    if name is None or name == "none":
        if parameters:
            raise _homeless(next(iter(parameters)), name, line)
        return None, {}
    for key in parameters:
        if key not in _own_names(name):
            raise _homeless(key, name, line)
    return name, parameters


def _same_setting(name: str | None, one: str, other: str) -> bool:
    """Are these two names of one field? Some fields are made of several ``model.config`` names;
    these stand beside each other."""
    cls = METHODS.get(name or "")
    if cls is None:
        return False
    config, options = cls.config_fields(), cls.options()
    fields_ = {config.get(key, key) for key in (one, other)}
    if len(fields_) > 1 or not fields_ <= set(options):
        return False
    return not {one, other} <= set(cls.config_names(options[fields_.pop()]))


def _field_names(name: str) -> set[str]:
    cls = method_class(name)
    return set(cls.options()) if cls is not None else set()


def _own_names(name: str) -> set[str]:
    cls = method_class(name)
    return cls.setting_names() if cls is not None else set()


def _parameter_names() -> set[str]:
    return {key for name in METHODS for key in _own_names(name)}


def _unknown(key: str, name: str | None) -> InputError:
    flags = {cls.flag() for cls in classes()}
    own = _own_names(name) if name is not None else _parameter_names()
    return unknown_name("setting", key, {*RUN_KEYS, "method", "baseline", *flags, *own})


def _homeless(key: str, name: str | None, line: _Layer) -> InputError:
    owners = [n for n in METHODS if key in _own_names(n)]
    if not owners:
        return _unknown(key, name)
    options = {option.key: option.option for option in method_options()}
    if key in line.parameters:  # named as it was typed
        key = options.get(key, key)
    if name is not None:
        chosen = "the baseline takes none" if name == "none" else f"the method is {name}"
        return InputError(f"{key} is a parameter of {' or '.join(owners)}, but {chosen}.")
    return InputError(
        f"{key} needs its method to be asked for: method {' or '.join(owners)} is accepted."
    )


# -- options of a command line -------------------------------------------------------------------
@dataclass(frozen=True)
class MethodOption:
    """A parameter of a method as an option of a command.

    Attributes:
        key: name of the setting; the option is ``--`` and the same with dashes.
        method: registry name.
        help: one line.
        flag: whether it turns the method on (and takes no value).
    """

    key: str
    method: str
    help: str
    flag: bool = False

    @property
    def option(self) -> str:
        """As it is written on a command line."""
        return "--" + self.key.replace("_", "-")


def method_options() -> Iterator[MethodOption]:
    """Options for all methods: their ``use_*`` flags and ``model.config`` names."""
    for cls in classes():
        yield MethodOption(cls.flag(), cls.name, f"the same as --method {cls.name}", flag=True)
        for one in cls.options().values():
            for key in cls.config_names(one):
                yield MethodOption(key, cls.name, one.help)


def read_value(text: str) -> Any:
    """A value of a parameter as a YAML file would have it; ``none`` is null."""
    if text.strip().lower() == "none":
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r} is not valid: a number, a name or a list.") from error


# -- checks --------------------------------------------------------------------------------------
def _require(name: str, value: Any, accepted: str, ok: Any, *, none: bool = False) -> None:
    if none and value is None:
        return
    try:
        good = bool(ok(value))
    except TypeError:
        good = False
    if not good:
        raise InputError(f"{name}={value!r} is not valid: {accepted}.")


def _names(value: Any) -> tuple[str, ...]:
    """Names of datasets from a list, or from one text with commas or blanks between."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    _require("data", value, "names of datasets", lambda v: isinstance(v, list | tuple) and v)
    names = tuple(value)
    _require("data", names, NAMES.accepted, lambda v: all(isinstance(name, str) for name in v))
    names = tuple(dict.fromkeys(names))
    _require("data", names, NAMES.accepted, NAMES.ok)
    return names
