"""Axes of a profile: which settings are measured, checked before anything expensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment.settings import (
    FLAG,
    METHOD,
    METHOD_HELP,
    WHOLE,
    Declared,
    Kind,
    many,
    number,
    option,
    shared,
    text,
    whole,
)

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
    def parse(text: Any) -> Optimization:
        """Read ``bf16``, ``sdpa`` or, joined, ``bf16+eager``; at most one of each kind. Nothing is
        the default.

        Raises:
            InputError: an unknown part, or two of a kind.
        """
        if isinstance(text, Optimization):
            return text
        found: dict[str, str] = {}
        for part in str(text).split("+") if text else ():
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


_OPTIMIZATION = Kind("a name", lambda value: True, {"metavar": "NAME"}, Optimization.parse)


@dataclass(frozen=True)
class ProfileSettings(Declared):
    """What a profile measures; axes (:data:`AXES`) have lists of values, the rest one."""

    src_folder: str | None = option(
        None, text("a folder", "DIR"), "images/ and data.csv", "--data", "--src-folder"
    )
    out: str = option("outputs_profile", text("a folder", "DIR"), "default: outputs_profile")
    fresh: bool = shared("fresh")
    model_name: Any = option(
        ("demo",),
        many(text("a folder, repository or short name")),
        "folders, repositories, short names, random:llava-1.5-7b (default: demo)",
        *("--model", "--model-name"),
    )
    img_size: Any = option(
        (None,),
        many(whole(1, 8192), none=True),
        "pixels a side, or none (default: pictures as they are)",
    )
    batch_size: Any = option((1,), many(whole(1, 4096)), "default: 1")
    optimization: Any = option(
        (None,),
        many(_OPTIMIZATION),
        f"{' '.join(PRECISIONS)}, {' '.join(KERNELS)}, {' '.join(FORMS)}; joined as in bf16+eager "
        "(default: as the checkpoint, fp32 on a CPU)",
    )
    device: Any = option(
        (None,),
        many(text("cpu, cuda or cuda:N", "DEVICE"), none=True),
        "cpu, cuda, cuda:1 (default: as found)",
    )
    max_input_len: Any = option(
        (None,),
        many(whole(1, 1 << 20), none=True),
        "text tokens, or none (default: prompts as they are)",
    )
    method: Any = option((None,), many(METHOD), f"none, or {METHOD_HELP}")
    cached: Any = option((True,), many(FLAG), "")
    samples: int | None = option(
        None, WHOLE, "examples, the first ones (default: all)", "--limit", "--samples"
    )
    repeat: int = option(3, WHOLE, "timed runs of each batch (default: 3)")
    warmup: int = option(1, whole(0), "runs in front of the first batch (default: 1)")
    max_new_tokens: int = option(32, WHOLE, "limit of an answer (default: 32)")
    seed: int = option(0, whole(0, 1 << 40), "default: 0")
    energy_seconds: float = option(
        5.0,
        number("0 to 3600 seconds", 0, 3600),
        "least time that energy is measured over (default: 5; 0: not at all)",
    )
    trust_remote_code: bool = shared("trust_remote_code")
    min_pixels: int | None = shared("min_pixels")
    max_pixels: int | None = shared("max_pixels")

    def load(self) -> dict[str, Any]:
        """What :func:`vlm_prune_ext.load` is given besides; only what was said."""
        names = ("min_pixels", "max_pixels")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, "trust_remote_code": True} if self.trust_remote_code else given
