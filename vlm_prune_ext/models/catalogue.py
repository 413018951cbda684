"""Models by short name: where they are, what family they belong to, what can be done with them.

Any other checkpoint of these families loads by its own name or folder just the same.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlm_prune_ext.errors import InputError, unknown_name

MINIMUM = {"transformers": "5.17", "torch": "2.6"}
"""Oldest versions that have all families in the form that is needed here."""


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: short name.
        model_id: ``owner/name`` on the Hugging Face hub.
        family: name of its :class:`Family`.
        size: parameters of the whole model, in billions.
        title: family as people write it.
        evaluate, batch: it answers questions, and several in one padded batch.
        llm_side: methods that drop visual tokens in the language model apply.
        vision_side: methods that drop patches in the vision tower apply.
        fast: it can run on fixed shapes (``fast=True`` of ``load``).
        note: what one should know before choosing it.
    """

    name: str
    model_id: str
    family: str
    size: float
    title: str
    evaluate: bool = True
    batch: bool = True
    llm_side: bool = True
    vision_side: bool = False
    fast: bool = False
    note: str = ""


_T5 = "encoder-decoder: its decoder does not take visual tokens as positions"
_REMOTE = "published format: only with --trust-remote-code (read natively, its code is not run)"

CATALOGUE: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "llava-1.5-7b",
            "liuhaotian/llava-v1.5-7b",
            "llava",
            7.1,
            "LLaVA-1.5",
            vision_side=True,
            fast=True,
        ),
        Entry(
            "llava-1.5-13b",
            "liuhaotian/llava-v1.5-13b",
            "llava",
            13.4,
            "LLaVA-1.5",
            vision_side=True,
            fast=True,
        ),
        Entry(
            "llava-1.6-mistral-7b",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava_next",
            7.6,
            "LLaVA-NeXT",
            vision_side=True,
            fast=True,
        ),
        Entry(
            "llava-1.6-vicuna-13b",
            "llava-hf/llava-v1.6-vicuna-13b-hf",
            "llava_next",
            13.4,
            "LLaVA-NeXT",
            vision_side=True,
            fast=True,
        ),
        Entry("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3.8, "Qwen2.5-VL"),
        Entry("gemma-3-4b", "google/gemma-3-4b-it", "gemma3", 4.3, "Gemma 3"),
        Entry("internvl3-2b", "OpenGVLab/InternVL3-2B-hf", "internvl", 2.1, "InternVL", fast=True),
        Entry(
            "internvl2-2b",
            "OpenGVLab/InternVL2-2B",
            "internvl_chat",
            2.2,
            "InternVL",
            fast=True,
            note=_REMOTE,
        ),
        Entry("blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b", "blip2", 3.7, "BLIP-2 (OPT)"),
        Entry(
            "blip2-flan-t5-xl",
            "Salesforce/blip2-flan-t5-xl",
            "blip2",
            3.9,
            "BLIP-2 (Flan-T5)",
            llm_side=False,
            note=_T5,
        ),
        Entry(
            "instructblip-vicuna-7b",
            "Salesforce/instructblip-vicuna-7b",
            "instructblip",
            7.9,
            "InstructBLIP (Vicuna)",
        ),
        Entry("fuyu-8b", "adept/fuyu-8b", "fuyu", 9.4, "Fuyu", note="one image per prompt"),
    )
}


def resolve(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The hub's name of a short name; anything else as it is.

    A folder of that name comes first.

    Raises:
        InputError: it is no path, but nearly a short name.
    """
    name = os.fspath(name_or_path)
    if Path(name).exists() or os.sep in name or "/" in name:
        return name_or_path
    if name.lower() in CATALOGUE:
        return CATALOGUE[name.lower()].model_id
    if difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.7):
        raise unknown_name("model", name, CATALOGUE)
    return name_or_path


def check_versions() -> None:
    """Raise InputError where a library is older than the families need."""
    for package, needed in MINIMUM.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if _parts(found) < _parts(needed):
            raise InputError(
                f"{package} {found} is too old: {needed} or newer is needed; "
                f'pip install -U "{package}>={needed}" brings it.'
            )


def _parts(text: str) -> tuple[int, ...]:
    """``"5.17.0"`` -> ``(5, 17)``."""
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
