"""Axes and cells: which settings are measured, checked before anything expensive.

A cell is one combination of the axes' values with everything else that decides what is measured.
Two cells are the same exactly if all of that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment import grid
from vlm_prune_ext.experiment.settings import method_as_json
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import get_method, parse_method

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
KERNELS = ("flash", "sdpa", "eager")
FORMS = ("compile", "fast")
OPTIMIZATIONS = (*PRECISIONS, *KERNELS, *FORMS)

AXES = (
    "model_name",
    "device",
    "optimization",
    "img_size",
    "max_input_len",
    "batch_size",
    "cached",
    "method",
)
"""Axes of a grid, from the one that costs most to change (another model) to the cheapest."""


@dataclass(frozen=True)
class Optimization:
    """How a model is held and run.

    Attributes:
        precision: of its weights, one of :data:`PRECISIONS`; ``None``: float32 on a CPU, on a GPU
            what the checkpoint states, in 16 bits.
        kernel: attention, one of :data:`KERNELS`; ``None``: transformers' choice.
        form: one of :data:`FORMS`; ``None``: plain.
    """

    precision: str | None = None
    kernel: str | None = None
    form: str | None = None

    @staticmethod
    def parse(text: str) -> Optimization:
        """Read ``bf16``, ``sdpa`` or, joined, ``bf16+eager``; at most one of each kind.

        Raises:
            InputError: an unknown part, or two of a kind.
        """
        found: dict[str, str] = {}
        for part in str(text).split("+"):
            kinds = {"precision": PRECISIONS, "kernel": KERNELS, "form": FORMS}
            kind = next((kind for kind, names in kinds.items() if part in names), None)
            if kind is None:
                raise unknown_name("--optimization", part, OPTIMIZATIONS)
            if kind in found:
                raise InputError(
                    f"--optimization {text} is not valid: {found[kind]} and {part} exclude each "
                    "other."
                )
            found[kind] = part
        return Optimization(**found)

    def __str__(self) -> str:
        return "+".join(part for part in (self.precision, self.kernel, self.form) if part)


@dataclass(frozen=True)
class Cell:
    """One combination of settings; equal ones are one cell.

    Attributes:
        model_name: folder or repository; ``"demo"`` is the demo's checkpoint.
        device: as torch names it.
        optimization: see :class:`Optimization`.
        img_size: pictures are resized to this many pixels a side before the processor sees them;
            ``None``: as they are.
        max_input_len: text tokens of the prompt, cut or padded to; ``None``: as it is.
        batch_size: examples in a batch.
        cached: whether ``generate`` keeps a KV cache.
        method: what prunes; ``None``: nothing.
        samples: examples used.
        repeat: timed runs of each batch.
        warmup: runs in front of the first timed one.
        max_new_tokens: limit of an answer.
        seed: of torch's generators.
        energy_seconds: how long energy is measured for at least.
        data: digest of the examples.
        processor: name of the hardware.
    """

    model_name: str
    device: str
    optimization: str
    img_size: int | None
    max_input_len: int | None
    batch_size: int
    cached: bool
    method: Method | None
    samples: int
    repeat: int
    warmup: int
    max_new_tokens: int
    seed: int
    energy_seconds: float
    data: str
    processor: str

    def plain(self) -> grid.Cell:
        """As the grid runner takes it: plain values, the method as its name and parameters."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["method"] = method_as_json(self.method)
        group = json.dumps([self.model_name, self.device, self.optimization])
        return grid.Cell(own, group, method_label(self.method))

    @staticmethod
    def of(cell: grid.Cell) -> Cell:
        """What :meth:`plain` was made of."""
        own = dict(cell.settings)
        return Cell(**{**own, "method": _method(own["method"])})


def method_label(method: Method | None) -> str:
    """The method's short name, as in file names."""
    return method.label() if method is not None else "none"


@dataclass(frozen=True)
class Plan:
    """What a grid is made of: values of each axis, and what all cells share.

    Attributes:
        axes: name of an axis -> its values, resolved.
        shared: fields of :class:`Cell` that are no axes, without ``data`` and ``processor``.
    """

    axes: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]

    def cells(self, data: str, processors: Mapping[str, str]) -> list[grid.Cell]:
        """All combinations, each once, those that one loaded model serves together.

        Args:
            data: digest of the examples.
            processors: device -> name of the hardware.
        """
        found: dict[str, grid.Cell] = {}
        for chosen in grid.product({name: self.axes[name] for name in AXES}):
            chosen["optimization"] = str(chosen["optimization"])
            processor = processors[chosen["device"]]
            cell = Cell(**chosen, **self.shared, data=data, processor=processor).plain()
            found.setdefault(cell.key, cell)
        groups = list(dict.fromkeys(cell.group for cell in found.values()))
        return sorted(found.values(), key=lambda cell: groups.index(cell.group))


DEFAULTS: Mapping[str, Any] = {
    "model_name": ["demo"],
    "device": [None],
    "optimization": [None],
    "img_size": [None],
    "max_input_len": [None],
    "batch_size": [1],
    "cached": [True],
    "method": [None],
    "samples": None,
    "repeat": 3,
    "warmup": 1,
    "max_new_tokens": 32,
    "seed": 0,
    "energy_seconds": 5.0,
}
"""Settings of a grid, in a file under these names and on the command line with dashes."""


def plan(given: Mapping[str, Any]) -> Plan:
    """Check settings and put the defaults in.

    Args:
        given: name -> value; a value of an axis may be a list.

    Raises:
        InputError: an unknown name, or a value that is not accepted.
    """
    for name in given:
        if name not in DEFAULTS:
            raise unknown_name("setting of profile", name, DEFAULTS)
    values = {**DEFAULTS, **given}
    readers = {
        "model_name": _model,
        "device": _device,
        "optimization": lambda v: Optimization() if v is None else Optimization.parse(v),
        "img_size": lambda v: _whole("img_size", v, 1, 8192, none=True),
        "max_input_len": lambda v: _whole("max_input_len", v, 1, 1 << 20, none=True),
        "batch_size": lambda v: _whole("batch_size", v, 1, 4096),
        "cached": _flag,
        "method": _method,
    }
    axes = {}
    for name in AXES:
        listed = values[name] if isinstance(values[name], list | tuple) else [values[name]]
        if not listed:
            raise InputError(f"{name}=[] is not valid: at least one value.")
        axes[name] = [readers[name](value) for value in listed]
    shared = {
        "samples": _whole("samples", values["samples"], 1, 1 << 20, none=True),
        "repeat": _whole("repeat", values["repeat"], 1, 100_000),
        "warmup": _whole("warmup", values["warmup"], 0, 100_000),
        "max_new_tokens": _whole("max_new_tokens", values["max_new_tokens"], 1, 100_000),
        "seed": _whole("seed", values["seed"], 0, 1 << 40),
        "energy_seconds": _seconds(values["energy_seconds"]),
    }
    return Plan(axes, shared)


def _model(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"model_name={value!r} is not valid: a folder, repository or short name.")
    return value


def _device(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise InputError(f"device={value!r} is not valid: cpu, cuda or cuda:N.")
    return value


def _method(value: Any) -> Method | None:
    """A short form as commands take it, or a mapping with a name, as configs have it."""
    if isinstance(value, Mapping):
        rest = {k: v for k, v in value.items() if k not in ("name", "parameters")}
        if "name" not in value:
            raise InputError(f"method={dict(value)!r} is not valid: a mapping with a name.")
        return get_method(str(value["name"]), **rest, **(value.get("parameters") or {}))
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"method={value!r} is not valid: a name such as fastv, or fastv:100.")
    return parse_method(value)


def _whole(name: str, value: Any, low: int, high: int, *, none: bool = False) -> int | None:
    if none and (value is None or str(value).lower() in ("none", "original")):
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = low - 1
    if not low <= number <= high or isinstance(value, bool):
        more = " or none" if none else ""
        raise InputError(f"{name}={value!r} is not valid: a whole number of {low} to {high}{more}.")
    return number


def _seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 <= number <= 3600.0:
        raise InputError(f"energy_seconds={value!r} is not valid: 0 to 3600 seconds.")
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"cached={value!r} is not valid: true or false.")
    return value
