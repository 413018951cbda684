"""Loading a model of any family, and finding the parts of a live one."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.experiment.settings import PREPROCESS
from vlm_prune_ext.models.base import (
    Family,
    LoadOptions,
    PromptProcessor,
    check_keywords,
)
from vlm_prune_ext.models.catalogue import (
    FAMILIES,
    PICTURES,
    VIDEOS,
    FamilyLine,
    check_versions,
)
from vlm_prune_ext.models.checkpoint import (
    FETCHING,
    Checkpoint,
    check_fields,
    check_flash_attention,
)
from vlm_prune_ext.models.clip_text import joint_space
from vlm_prune_ext.models.clips import check_sampling
from vlm_prune_ext.models.towers import is_clip

logger = logging.getLogger("vlm_prune_ext")

# For live models only; wholes come before the parts they hold.
_LIVE = (
    FamilyLine("llava_package", "model of the llava package", home="llava_package"),
    FamilyLine("generic", "any model with image placeholders in a causal decoder", home="generic"),
    FamilyLine("clip", "CLIP vision tower", home="towers"),
    FamilyLine("causal_lm", "bare causal language model", home="generic"),
)


def families() -> tuple[Family, ...]:
    """All families, in the order in which they are asked: the first that owns a model is taken."""
    return tuple(_all())


def _all() -> Iterator[Family]:
    return (_made(line) for line in (*FAMILIES.values(), *_LIVE))


@functools.cache
def _made(line: FamilyLine) -> Family:
    home = importlib.import_module(f"vlm_prune_ext.models.{line.home}")
    made: Family = home.family_of(line)
    return made


def parts_of(model: nn.Module) -> ModelParts:
    """Where the parts of a live model are.

    Args:
        model: a whole vision-language model, a bare causal language model or a bare
            ``CLIPVisionModel``.

    Raises:
        InputError: a model of another kind, e.g. an encoder-decoder model.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{name} is an encoder-decoder model, whose decoder does not take visual tokens as "
            f"positions: nothing to prune. Accepted: {_titles()}."
        )
    for family in _all():
        if family.owns(model):
            return _with_joint_space(model, family.parts(model))
    raise InputError(f"{name} is not a model that can be pruned. Accepted: {_titles()}.")


def _with_joint_space(model: nn.Module, parts: ModelParts) -> ModelParts:
    tower = None if parts.vision is None else parts.vision.tower
    if tower is not None and is_clip(tower):
        parts.joint = functools.partial(joint_space, model, tower)
    return parts


def _titles() -> str:
    return ", ".join(family.line.title for family in families())


def load(
    name_or_path: str | os.PathLike[str] = "demo",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    fast: bool | None = None,
    preprocess: str | None = None,
    **kw: Any,
) -> tuple[Any, PromptProcessor]:
    """Load a model and what makes its prompts.

    Args:
        name_or_path: folder of a checkpoint, ``owner/name`` of one on the Hugging Face hub, or a
            short name of :data:`vlm_prune_ext.models.catalogue.CATALOGUE`; LLaVA in its original
            format or any family in Hugging Face format. ``"demo"``: the small model that comes
            with the package.
        dtype: e.g. ``"bfloat16"`` or ``torch.float16``. ``None``: float32 on a CPU, elsewhere what
            the checkpoint states. ``"auto"``: what the checkpoint states.
        device: e.g. ``"cuda:1"``. ``None``: the first GPU if there is one, else the CPU.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``; ``None`` leaves it
            to transformers.
        fast: let ``model.generate`` run greedy decoding, pruned or not, as CUDA graphs with fixed
            shapes; the arguments and the answers stay the same. ``True`` is an error where that is
            not possible (no GPU, another family, a method that only masks).
            ``None``: on a GPU, where it is possible; one line in the log says why where it is not.
        preprocess: where pictures are resized and normalised: ``"host"``, by threads, or
            ``"device"``, those of a batch together where the model is. The pixels are the same, bit
            for bit. ``None``: the device where it is a GPU.
        **kw: further arguments of transformers' ``from_pretrained``, e.g. ``device_map="auto"``;
            ``trust_remote_code=True`` for formats that come with code of their own; settings of
            the family's image processor, e.g. ``max_pixels=602112``.

    Returns:
        the model in evaluation mode, and its :class:`PromptProcessor`.

    Raises:
        InputError: nothing there, an architecture that is not known, files or weights that are
            missing or do not fit, a library that is too old, or an argument that is not accepted.
    """
    check_keywords(kw)
    if preprocess not in (None, *PREPROCESS):
        raise unknown_name("preprocess", str(preprocess), PREPROCESS)
    where = device_of(device)
    _check_attention(attn_implementation)
    stated = dtype_of(dtype) if dtype not in (None, "auto") else None
    check_versions()
    fetch = {name: kw[name] for name in FETCHING if name in kw}
    source = Checkpoint(name_or_path, revision=kw.get("revision"), fetch=fetch)
    check_fields(source)
    family = _family_of(source)
    if stated is None:
        on_cpu = where.type == "cpu" and "device_map" not in kw
        stated = torch.float32 if dtype is None and on_cpu else _stored_dtype(source)
    pictures = {name: kw.pop(name) for name in PICTURES if name in kw}
    pictures = {name: value for name, value in pictures.items() if value is not None}
    if family.read_processor is None:
        check_pictures(source, pictures)
    videos = {name: kw.pop(name) for name in VIDEOS if name in kw}
    _check_videos(family, videos)
    options = LoadOptions(stated, where, attn_implementation, kw, pictures)
    assert family.load is not None
    model, processor = family.load(source, options)
    processor.preprocess = preprocess
    for name, value in videos.items():
        setattr(processor, name, value)
    _turn_on_fast(model, fast)
    return model, processor


def check_pictures(source: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Refuse settings of pictures that a checkpoint's image processor does not have, before its
    weights are loaded.

    Args:
        source: the checkpoint.
        settings: any names; those of :data:`PICTURES` and :data:`VIDEOS` that are not ``None``
            are looked at.

    Raises:
        InputError: naming the setting and what is accepted.
    """
    given = {n: settings[n] for n in PICTURES if settings.get(n) is not None}
    videos = {n: settings[n] for n in VIDEOS if settings.get(n) is not None}
    if not given and not videos:
        return
    family = _family_of(source)
    check_sampling(settings.get("frames"), settings.get("fps"))
    _check_videos(family, videos)
    if not given:
        return
    if family.read_processor is None:
        raise InputError(
            f"{', '.join(given)} is no setting of {family.line.title}, whose pictures are prepared "
            "as the checkpoint says; accepted: none."
        )
    family.read_processor(source, given)


def _check_videos(family: Family, videos: Mapping[str, Any]) -> None:
    stated = [name for name, value in videos.items() if value is not None]
    if stated and not family.line.video:
        raise InputError(
            f"{', '.join(stated)} is no setting of {family.line.title}, which takes no videos "
            "here; accepted: none."
        )


def _turn_on_fast(model: Any, wanted: bool | None) -> None:
    if wanted is False or (wanted is None and next(model.parameters()).device.type != "cuda"):
        return
    from vlm_prune_ext.fast.generate import turn_on_fast

    family = next((family for family in _all() if family.owns(model)), None)
    try:
        if family is None or not family.line.fast:
            title = type(model).__name__ if family is None else family.line.title
            raise InputError(f"fast=True is not possible: {title} has no fast path.")
        turn_on_fast(model, family.parts(model), forced=bool(wanted))
    except InputError as error:
        if wanted:
            raise
        reason = str(error).removeprefix("fast=True is not possible: ")
        logger.warning("The fast path is not taken: %s", reason)


def _family_of(source: Checkpoint) -> Family:
    """Families that name its architecture are asked first: others' code need not be imported."""
    lines = sorted(
        FAMILIES.values(), key=lambda line: source.architecture not in line.architectures
    )
    for line in lines:
        family = _made(line)
        if family.recognises is not None and family.recognises(source.config):
            return family
    accepted = sorted({name for line in lines for name in line.architectures})
    raise InputError(
        f"checkpoint {source.name!r} is of architecture {source.architecture or None!r}, which is "
        f"not known. Accepted: {', '.join(accepted)} (original format: with mm_vision_tower)."
    )


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that is meant; ``None``: the first GPU if there is one, else the CPU.

    Raises:
        InputError: none of that name, or not there.
    """
    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device={device!r} is not valid: give 'cpu', 'cuda' or 'cuda:N'."
        ) from error
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise InputError(f"device={str(device)!r} is not there: {count} GPU(s) can be used.")
        return torch.device("cuda", found.index or 0)
    return found


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """The floating-point type that is meant: float32, float16 or bfloat16.

    Raises:
        InputError: another.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"dtype={dtype!r} is not valid: accepted are 'auto', 'float32', 'float16', 'bfloat16'."
        )
    return found


def _stored_dtype(source: Checkpoint) -> torch.dtype:
    """What ``config.json`` says its weights are in."""
    text = source.config.get("text_config") or {}
    for config in (source.config, text):
        name = config.get("dtype") or config.get("torch_dtype")
        if name in ("float32", "float16", "bfloat16"):
            return dtype_of(name)
    return torch.float32


def _check_attention(name: str | None) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if name is not None and name not in known:
        raise InputError(
            f"attn_implementation={name!r} is not valid: accepted are "
            f"{', '.join(sorted(n for n in known if '|' not in n))}."
        )
    check_flash_attention(name)
