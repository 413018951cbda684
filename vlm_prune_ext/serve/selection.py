"""What a serving engine can be asked for: methods, families, and how many tokens are left.

The engine makes room for an image's tokens before it has looked at the image, so how many a method
leaves must follow from the image's size. Nothing here knows the engine or a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import Method, Stage, resolve_budget
from vlm_prune_ext.methods.evidence import FeatureStage
from vlm_prune_ext.methods.registry import classes, parse_method

KEY = "vlm_prune"
"""The key of ``hf_overrides``; its value is a method's short form."""

SUPPORTED = ((0, 32), (0, 33))
"""Versions of vLLM: from the first, to below the second. Its interfaces change with every one."""

Tower = Literal["one", "tiles", "resized", "packed"]


@dataclass(frozen=True)
class ServedFamily:
    """A family that the plug-in serves.

    Attributes:
        title: for messages.
        architecture: what ``config.json`` calls it.
        class_name: our class, in ``serve.models``.
        tower: what an image is there: ``"one"`` crop; several ``"tiles"``, of which padding is cut
            off; the same, but ``"resized"`` behind the projector; or all images in one sequence
            (``"packed"``), several patches to a token.
    """

    title: str
    architecture: str
    class_name: str
    tower: Tower


FAMILIES = {
    line.architecture: line
    for line in (
        ServedFamily("LLaVA-1.5", "LlavaForConditionalGeneration", "PrunedLlava", "one"),
        ServedFamily("LLaVA-NeXT", "LlavaNextForConditionalGeneration", "PrunedLlavaNext", "tiles"),
        ServedFamily(
            "LLaVA-OneVision",
            "LlavaOnevisionForConditionalGeneration",
            "PrunedLlavaOnevision",
            "resized",
        ),
        ServedFamily(
            "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "PrunedQwen2_5_VL", "packed"
        ),
        ServedFamily("Qwen3-VL", "Qwen3VLForConditionalGeneration", "PrunedQwen3VL", "packed"),
    )
}


@dataclass(frozen=True)
class Picture:
    """What is known of an image before the engine encodes it.

    Attributes:
        tokens: visual tokens that the unpruned model would get.
        tiles: crops that go through the tower.
        patches: tokens that the tower makes of each.
    """

    tokens: int
    tiles: int = 1
    patches: int = 0


@dataclass(frozen=True)
class Selection:
    """A method's one selection in front of the language model.

    Attributes:
        method: what was asked for.
        stage: between tower and language model, or at layer 0.
        uses_tower: the rule looks at more than the tokens.
    """

    method: Method
    stage: FeatureStage | Stage
    uses_tower: bool

    def left(self, picture: Picture) -> int:
        """Tokens that an image is left with.

        Raises:
            InputError: more than it has.
        """
        stage, total = self.stage, picture.tokens
        if isinstance(stage, FeatureStage):
            if stage.over == "picture" and picture.tiles > 1:
                total = picture.tiles * picture.patches
            known = None if stage.left is None else stage.left(total)
        else:
            known = None if stage.left is None else stage.left(total, total)
        if known is None:
            assert stage.budget is not None
            known = resolve_budget(self.method.budget_field, stage.budget, total)
        if known > picture.tokens:
            raise InputError(
                f"{self.method.label()} leaves {known} tokens of an image that has "
                f"{picture.tokens}: a lower budget is needed."
            )
        return known

    @property
    def identity(self) -> str:
        """Text that differs where what is kept may differ, for keys of caches."""
        return repr(self.method)


# -- what is asked for ---------------------------------------------------------------------------
def asked_for(value: Any, overrides: Iterable[str]) -> str | None:
    """The method that a model's configuration names; ``None``: none.

    Args:
        value: of :data:`KEY` in the configuration, ``None`` where it is not there.
        overrides: all keys of ``hf_overrides``.

    Raises:
        InputError: a value of another type, or a key that is nearly ours.
    """
    if value is None:
        near = difflib.get_close_matches(KEY, overrides, n=1, cutoff=0.8)
        if near and near[0] != KEY:
            raise unknown_name("key of hf_overrides", near[0], [KEY])
        return None
    if isinstance(value, str):
        return value
    raise InputError(
        f'{KEY}={value!r} in hf_overrides is not valid: a method as text, such as "divprune:64".'
    )


def selection_for(text: str, architecture: str, num_layers: int) -> Selection | None:
    """What a configuration asks for, checked as far as names and numbers go.

    Args:
        text: a method's short form.
        architecture: of the model.
        num_layers: decoder layers of the model.

    Returns:
        ``None`` for ``"none"``.

    Raises:
        InputError: an unknown method or family, or a method that does not fit.
    """
    method = parse_method(text)
    if method is None:
        return None
    if architecture not in FAMILIES:
        raise InputError(
            f"{KEY}={text!r} is not possible with {architecture}: "
            f"{', '.join(line.title for line in FAMILIES.values())} can be pruned in the engine."
        )
    family = FAMILIES[architecture]
    found = _fit(method, family, num_layers)
    if isinstance(found, str):
        fit = ", ".join(_fitting(family))
        raise InputError(
            f"{KEY}={text!r} is not possible with {family.title}: {found}; methods that fit: {fit}."
        )
    return found


def _fit(method: Method, family: ServedFamily, num_layers: int) -> Selection | str:
    """A method's selection, or why a family's engine cannot carry it out."""
    stages, between = method.decoder_stages(num_layers), method.feature_stage()
    why = _why_not(method, stages, between) or _why_not_in(family, between)
    if why:
        return why
    if between is not None:
        return Selection(method, between, uses_tower=between.over != "span")
    return Selection(method, stages[0], uses_tower=False)


def _fitting(family: ServedFamily) -> Iterator[str]:
    """Methods that fit a family as their papers set them, which is for 32 layers."""
    for cls in classes():
        method = cls.from_settings(cls.standard)
        if isinstance(_fit(method, family, 32), Selection):
            yield cls.name


def _why_not(method: Method, stages: tuple[Stage, ...], between: FeatureStage | None) -> str | None:
    """Why no engine can do it that makes room for tokens first; ``None``: one can."""
    if "tower" in method.working_sites:
        return "it drops patches inside the vision tower, which the engine runs whole"
    late = [stage.layer for stage in stages if stage.layer > 0]
    if late:
        return (
            f"it drops in front of layer {late[0]}, and the engine keeps as many tokens in each "
            "layer"
        )
    if method.compares_frames:
        return "it compares the frames of videos, and the engine prunes pictures"
    if between is None:
        return None if stages else "it drops nothing"
    if "joint" in between.needs:
        return "what it keeps depends on the question, and the engine encodes an image for all"
    if "last" in between.needs:
        return "it looks at the tower's last layer, which the engine does not build"
    if between.budget is None and between.left is None:
        return "how many tokens it keeps depends on what the image shows, not on its size"
    return None


def _why_not_in(family: ServedFamily, stage: FeatureStage | None) -> str | None:
    """Why a family's towers do not allow it; ``None``: they do."""
    if stage is None or stage.over == "span":
        return None
    if family.tower == "packed" and "keys" in stage.needs:
        return "it merges in front of the projector, which makes one token of several patches"
    if family.tower == "resized":
        return "this family resizes features behind the projector"
    if family.tower == "tiles" and stage.over == "crop":
        return (
            "it chooses in each tile, and how many of its choices are padding that this family "
            "cuts off depends on what the image shows"
        )
    return None


# -- checks against the model --------------------------------------------------------------------
def check_budget(selection: Selection, most: int, title: str) -> None:
    """Raise InputError for a count above what any image of the model has.

    Args:
        selection: what is asked for.
        most: visual tokens of the largest image.
        title: of the model's family.
    """
    budgets = {name: getattr(selection.method, name) for name in selection.method.budgets()}
    if sum(value for value in budgets.values() if isinstance(value, int)) > most:
        said = ", ".join(f"{name}={value}" for name, value in budgets.items())
        raise InputError(
            f"{said} is not valid for {title}: an image has {most} visual tokens at most."
        )


def check_version(version: str) -> None:
    """Raise InputError for a vLLM that the plug-in was not written for."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    low, high = SUPPORTED
    if not low <= numbers < high:
        accepted = ".".join(map(str, low)), ".".join(map(str, high))
        raise InputError(
            f"{KEY} was asked for, but this is vLLM {version}: from {accepted[0]} to below "
            f"{accepted[1]} is accepted."
        )
