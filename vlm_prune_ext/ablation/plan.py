"""What an ablation runs: models, methods, and what each pair is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment.record import weights_fingerprint
from vlm_prune_ext.experiment.settings import (
    DTYPES,
    FLAG,
    METHOD_HELP,
    WHOLE,
    Declared,
    many,
    named,
    option,
    required,
    shared,
    text,
)
from vlm_prune_ext.methods.base import Method, label_text
from vlm_prune_ext.methods.registry import get_method, parse_method
from vlm_prune_ext.models.catalogue import CATALOGUE

DEFAULT_MODELS = (
    "blip2-opt-2.7b",
    "internvl2-2b",
    "blip2-flan-t5-xl",
    "qwen2.5-vl-3b",
    "gemma-3-4b",
    "llava-1.5-7b",
    "llava-1.6-mistral-7b",
    "instructblip-vicuna-7b",
)
"""The models of the study, in its order."""

PRESETS = {
    "all": DEFAULT_MODELS,
    "quick": ("internvl2-2b", "blip2-opt-2.7b", "qwen2.5-vl-3b"),
    "latest": ("qwen2.5-vl-3b", "gemma-3-4b", "internvl3-2b"),
}
"""``all``: the study's eight; ``quick``: the three smallest of them; ``latest``: the newest of the
catalogue (all of 2025)."""

LANGUAGES = ("en", "ko")


@dataclass(frozen=True)
class AblationSettings(Declared):
    """What a study runs and how; ``models`` and ``preset`` exclude each other."""

    data: str = option("", required(text("a CSV", "CSV")), "pictures and captions")
    models: Any = option(
        (), many(text("a model", "MODEL")), "default: --preset all", "--model", "--models"
    )
    preset: str = option("all", named(PRESETS), "all (eight), quick or latest (three each)")
    methods: Any = option(
        ("none",),
        many(text("a method", "METHOD")),
        f"none, or {METHOD_HELP}",
        *("--method", "--methods"),
    )
    output_dir: str = option(
        "results", text("a folder", "DIR"), "default: results", "--out", "--output-dir"
    )
    batch_size: int = option(2, WHOLE, "default: 2")
    max_new_tokens: int = option(64, WHOLE, "default: 64")
    prompt: str | None = option(
        None, text("a text", "TEXT"), "asked of every picture; {prompt} is the CSV's own"
    )
    rerun: Any = option((), many(text("a name")), "models or runs to do anew")
    fresh: bool = shared("fresh")
    limit: int | None = option(None, WHOLE, "only the first N rows")
    image_column: str | None = option(None, text("a name"), "default: image, image_path, url")
    prompt_column: str | None = option(None, text("a name"), "default: query, prompt, question")
    reference_columns: Any = option(
        (),
        many(text("a name")),
        "default: annotation, answer, caption or reference, with numbers behind",
    )
    image_folder: str | None = option(None, text("a folder", "DIR"), "default: the CSV's folder")
    device: Any = option(
        (),
        many(text("a device", "DEVICE")),
        "cpu, cuda, cuda:1; of several each does a run at a time (default: as found)",
    )
    dtype: str | None = option(None, named(DTYPES), "float32, float16 or bfloat16")
    attn_implementation: str | None = shared("attn_implementation")
    fast: bool | None = shared("fast")
    min_pixels: int | None = shared("min_pixels")
    max_pixels: int | None = shared("max_pixels")
    trust_remote_code: bool = option(
        False, FLAG, "accept checkpoints that bring code of their own (internvl2-2b)"
    )
    lang: str = option("en", named(LANGUAGES, "LANG"), "en (default) or ko")

    def load(self) -> dict[str, Any]:
        """What :func:`vlm_prune_ext.load` is given; only what was said."""
        names = ("dtype", "attn_implementation", "fast", "min_pixels", "max_pixels")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, "trust_remote_code": True} if self.trust_remote_code else given


DEMO = "demo"
_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: what its files are called after.
        source: what :func:`vlm_prune_ext.load` takes.
        model_id: what it is known by: its name on the hub, or its folder.
        fingerprint: tells versions of a local checkpoint apart; ``None`` for others.
    """

    name: str
    source: str
    model_id: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class Run:
    """One model with one method.

    Attributes:
        name: the model's, with ``-<method><budget>`` behind it for a pruned run.
        model: which.
        method: short form as the user wrote it; ``none`` is the baseline.
        label: what tells the method's settings apart; ``baseline`` for none.
    """

    name: str
    model: Model
    method: str
    label: str


def plan(models: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """All runs: each model with each method, models in order.

    Args:
        models: names of the catalogue, ``demo``, folders, ``name=folder``, or ``owner/name`` on
            the Hugging Face hub.
        methods: short forms, e.g. ``none``, ``fastv:100``.

    Raises:
        InputError: an unknown name (with the near one), a folder without a checkpoint, or two
            runs of one name.
    """
    parsed = [(asked, parse_method(asked)) for asked in methods]
    runs = []
    for model in map(find_model, models):
        for asked, method in parsed:
            label = "baseline" if method is None else method.label()
            runs.append(Run(model.name + suffix(method), model, asked, label))
    seen: dict[str, Run] = {}
    for run in runs:
        if run.name.lower() in seen:
            raise InputError(
                f"{run.name!r} would be run twice ({seen[run.name.lower()].model.source} and "
                f"{run.model.source}): each model and method once; name=folder gives a folder "
                "another name."
            )
        seen[run.name.lower()] = run
    return runs


def find_model(text: str) -> Model:
    """The model that a user's word means.

    Raises:
        InputError: none does.
    """
    if text == DEMO:
        return Model(DEMO, str(CHECKPOINT), "vlm_prune_ext/demo", weights_fingerprint(CHECKPOINT))
    if text.lower() in CATALOGUE and not Path(text).is_dir():
        entry = CATALOGUE[text.lower()]
        return Model(entry.name, entry.name, entry.model_id)
    name, equals, folder = text.partition("=")
    if equals and not Path(text).is_dir():
        if not _NAME.fullmatch(name):
            raise InputError(f"model {text!r} is not valid: name=folder with a plain name.")
        return _local(name, Path(folder).expanduser(), text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _local(label_text(path.resolve().name), path, text)
    if path.exists() or text.startswith((".", "/", "~")):
        raise InputError(f"model {text!r} is not a folder: one with a config.json is accepted.")
    if _HUB.fullmatch(text):
        return Model(label_text(text.partition("/")[2]), text, text)
    raise unknown_name("model", text, [*CATALOGUE, DEMO])


def _local(name: str, path: Path, text: str) -> Model:
    if not path.is_dir():
        raise InputError(f"model {text!r}: {str(path)!r} is not a folder with a checkpoint.")
    from vlm_prune_ext.models.checkpoint import read_json

    read_json(path / "config.json", f"model {text!r}")
    return Model(name, str(path.resolve()), path.resolve().name, weights_fingerprint(path))


def suffix(method: Method | None) -> str:
    """What a method adds to a model's name: ``-fastv100``, with other settings that are not the
    defaults behind it (``-fastv100_k2``); ``-<label>`` where its label is of another form."""
    if method is None:
        return ""
    label = method.label()
    budget = getattr(method, method.budget_field, None) if method.budget_field else None
    if budget is None:
        return f"-{label}"
    plain = get_method(method.name, **{method.budget_field: budget})
    usual = plain.label().split("_") if plain is not None else []
    parts = label.split("_")
    if parts[: len(usual)] != usual:
        return f"-{label}"
    return "_".join([f"-{method.name}{label_text(budget)}", *parts[len(usual) :]])


def to_redo(names: Iterable[str], runs: Sequence[Run]) -> frozenset[str]:
    """Names of the runs that ``--rerun`` means: a run's own name, or a model's for all of its.

    Raises:
        InputError: a name that is none of this study's.
    """
    found: set[str] = set()
    for name in names:
        mine = {run.name for run in runs if name in (run.name, run.model.name)}
        if not mine:
            known = {run.name for run in runs} | {run.model.name for run in runs}
            raise unknown_name("--rerun", name, known)
        found |= mine
    return frozenset(found)
