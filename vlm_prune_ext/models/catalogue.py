"""Data: families of models, and checkpoints by short name with what can be done with them.

Any other checkpoint of these families loads by its own name or folder just the same.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError, unknown_name

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
"""The demo's model (LLaVA-1.5, original format), which ``load()`` and ``load("demo")`` give."""

MINIMUM = {"transformers": "5.17", "torch": "2.6"}
"""Oldest versions that have all families in the form that is needed here."""

PICTURES = (
    "min_pixels",
    "max_pixels",
    "min_patches",
    "max_patches",
    "crop_to_patches",
    "do_image_splitting",
    "do_pan_and_scan",
    "max_image_size",
    "max_soft_tokens",
    "size",
)
"""Settings of a family's image processor that loading takes: how large an image may be, and whether
it is cut into tiles."""

VIDEOS = ("frames", "fps")
"""How many frames of a video are shown, where the video does not say so itself; see
:class:`~vlm_prune_ext.models.clips.Clip`."""


def _hf(name: str) -> tuple[str, ...]:
    """The class of transformers that holds a whole vision-language model."""
    return (f"{name}ForConditionalGeneration",)


@dataclass(frozen=True)
class FamilyLine:
    """One family of models.

    Attributes:
        name: short name, for messages.
        title: name as people write it.
        architectures: class names in ``config.json`` that may be this family's; of a family
            without code of its own, transformers' class.
        home: module of :mod:`vlm_prune_ext.models` with its code; ``auto``: it needs none.
        tower: methods that work in the vision tower apply (it is CLIP's).
        behind: methods that read the tower apply behind it; without, those that choose among its
            tokens by these alone do (DivPrune, RandomDrop).
        video: its prompts may hold videos; each frame is pruned like a picture.
        fast: it can run on fixed shapes (``fast=True`` of ``load``).
    """

    name: str
    title: str
    architectures: tuple[str, ...] = ()
    home: str = "auto"
    tower: bool = False
    behind: bool = True
    video: bool = False
    fast: bool = False


_ORIGINAL = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")

FAMILIES: dict[str, FamilyLine] = {
    line.name: line
    for line in (
        FamilyLine(
            "llava",
            "LLaVA-1.5",
            ("LlavaForConditionalGeneration", *_ORIGINAL),
            home="llava",
            tower=True,
            fast=True,
        ),
        FamilyLine(
            "llava_next",
            "LLaVA-NeXT",
            ("LlavaNextForConditionalGeneration", *_ORIGINAL),
            home="llava",
            tower=True,
            fast=True,
        ),
        FamilyLine(
            "llava_onevision", "LLaVA-OneVision", _hf("LlavaOnevision"), video=True, fast=True
        ),
        FamilyLine("llava_next_video", "LLaVA-NeXT-Video", _hf("LlavaNextVideo"), video=True),
        FamilyLine("video_llava", "Video-LLaVA", _hf("VideoLlava"), video=True),
        FamilyLine("qwen2_vl", "Qwen2-VL", _hf("Qwen2VL"), video=True, fast=True),
        FamilyLine("qwen2_5_vl", "Qwen2.5-VL", _hf("Qwen2_5_VL"), video=True, fast=True),
        FamilyLine("qwen3_vl", "Qwen3-VL", _hf("Qwen3VL"), video=True, fast=True),
        FamilyLine("qwen3_5", "Qwen3.5", _hf("Qwen3_5"), video=True),
        FamilyLine("internvl", "InternVL", _hf("InternVL"), fast=True),
        FamilyLine(
            "internvl_chat",
            "InternVL, published format",
            ("InternVLChatModel",),
            home="internvl_chat",
            fast=True,
        ),
        FamilyLine("gemma3", "Gemma 3", _hf("Gemma3")),
        FamilyLine("gemma4", "Gemma 4", _hf("Gemma4"), behind=False, video=True),
        FamilyLine("paligemma", "PaliGemma", _hf("PaliGemma")),
        FamilyLine("idefics3", "Idefics3", _hf("Idefics3"), fast=True),
        FamilyLine("smolvlm", "SmolVLM", _hf("SmolVLM"), fast=True),
        FamilyLine("mistral3", "Mistral 3", _hf("Mistral3"), behind=False, fast=True),
        FamilyLine("aya_vision", "Aya Vision", _hf("AyaVision")),
        FamilyLine("ovis2", "Ovis2", _hf("Ovis2"), behind=False, fast=True),
        FamilyLine("glm4v", "GLM-4.1V", _hf("Glm4v"), video=True, fast=True),
        FamilyLine("blip2", "BLIP-2 (OPT)", _hf("Blip2"), behind=False, home="blip"),
        FamilyLine(
            "instructblip", "InstructBLIP (Vicuna)", _hf("InstructBlip"), behind=False, home="blip"
        ),
        FamilyLine("fuyu", "Fuyu", ("FuyuForCausalLM",), home="fuyu", behind=False),
    )
}
"""Families that load, by short name. A new one that transformers knows, with a processor and with
placeholders for visual tokens in its prompts, is one line more."""


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: short name.
        model_id: ``owner/name`` on the Hugging Face hub.
        family: name of its :class:`FamilyLine`.
        size: parameters of the whole model, in billions.
        licence: of the weights, as its publisher names it.
        llm_side: methods that drop visual tokens in the language model apply.
        note: what one should know before choosing it.
    """

    name: str
    model_id: str
    family: str
    size: float
    licence: str
    llm_side: bool = True
    note: str = ""

    def record(self) -> dict[str, Any]:
        """All that is known of it, its family's part included."""
        line = FAMILIES[self.family]
        return {
            "name": self.name,
            "model_id": self.model_id,
            "family": self.family,
            "size": self.size,
            "title": line.title,
            "licence": self.licence,
            "evaluate": True,
            "batch": True,
            "llm_side": self.llm_side,
            "vision_side": line.tower,
            "behind_tower": self.llm_side and line.behind,
            "video": line.video,
            "fast": line.fast,
            "note": self.note,
        }


_T5 = "encoder-decoder: its decoder does not take visual tokens as positions"
_REMOTE = "published format: only with --trust-remote-code (read natively, its code is not run)"
_LLAMA2, _APACHE = "Llama 2", "Apache 2.0"

CATALOGUE: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("llava-1.5-7b", "liuhaotian/llava-v1.5-7b", "llava", 7.1, _LLAMA2),
        Entry("llava-1.5-13b", "liuhaotian/llava-v1.5-13b", "llava", 13.4, _LLAMA2),
        Entry(
            "llava-1.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", 7.6, _APACHE
        ),
        Entry(
            "llava-1.6-vicuna-13b", "llava-hf/llava-v1.6-vicuna-13b-hf", "llava_next", 13.4, _LLAMA2
        ),
        Entry(
            "llava-onevision-7b",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "llava_onevision",
            8.0,
            _APACHE,
        ),
        Entry(
            "llava-next-video-7b",
            "llava-hf/LLaVA-NeXT-Video-7B-hf",
            "llava_next_video",
            7.1,
            _LLAMA2,
        ),
        Entry("video-llava-7b", "LanguageBind/Video-LLaVA-7B-hf", "video_llava", 7.4, _APACHE),
        Entry("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", 8.3, _APACHE),
        Entry("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3.8, "Qwen research"),
        Entry("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8.3, _APACHE),
        Entry("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 8.8, _APACHE),
        Entry("qwen3.5-9b", "Qwen/Qwen3.5-9B", "qwen3_5", 9.4, _APACHE),
        Entry("gemma-3-4b", "google/gemma-3-4b-it", "gemma3", 4.3, "Gemma"),
        Entry("gemma-4-26b", "google/gemma-4-26B-A4B-it", "gemma4", 26.0, _APACHE),
        Entry("paligemma2-3b", "google/paligemma2-3b-mix-224", "paligemma", 3.0, "Gemma"),
        Entry("smolvlm2-2.2b", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", 2.2, _APACHE),
        Entry("idefics3-8b", "HuggingFaceM4/Idefics3-8B-Llama3", "idefics3", 8.5, _APACHE),
        Entry(
            "mistral-small-3.1-24b",
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            "mistral3",
            24.0,
            _APACHE,
        ),
        Entry("aya-vision-8b", "CohereLabs/aya-vision-8b", "aya_vision", 8.6, "CC-BY-NC 4.0"),
        Entry("ovis2-2b", "thisisiron/Ovis2-2B-hf", "ovis2", 2.5, _APACHE),
        Entry("glm-4.1v-9b", "zai-org/GLM-4.1V-9B-Thinking", "glm4v", 10.3, "MIT"),
        Entry("internvl3-2b", "OpenGVLab/InternVL3-2B-hf", "internvl", 2.1, _APACHE),
        Entry("internvl2-2b", "OpenGVLab/InternVL2-2B", "internvl_chat", 2.2, "MIT", note=_REMOTE),
        Entry("blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b", "blip2", 3.7, "MIT"),
        Entry(
            "blip2-flan-t5-xl",
            "Salesforce/blip2-flan-t5-xl",
            "blip2",
            3.9,
            "MIT",
            llm_side=False,
            note=_T5,
        ),
        Entry(
            "instructblip-vicuna-7b",
            "Salesforce/instructblip-vicuna-7b",
            "instructblip",
            7.9,
            "research only",
        ),
        Entry("fuyu-8b", "adept/fuyu-8b", "fuyu", 9.4, "CC-BY-NC 4.0", note="one image per prompt"),
    )
}


def resolve(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The hub's name of a short name; anything else as it is.

    A folder of that name comes first.

    Raises:
        InputError: it is no path, but nearly a short name.
    """
    name = os.fspath(name_or_path)
    if name == "demo" and not Path(name).exists():
        return DEMO
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
