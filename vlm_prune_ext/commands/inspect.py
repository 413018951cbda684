"""Draw which patches of a picture a method drops: a PNG with the picture once per dropping layer
(of the vision tower and of the language model), dropped patches greyed out, and the answers with
and without pruning below. The picture is drawn as the model sees it: padded or resized to a
square; of LLaVA-NeXT's tiles, the one that shows the whole picture.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm_prune_ext.commands.common import MethodSettings, chosen_method, load_model
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import (
    METHOD_HELP,
    WHOLE,
    add_options,
    option,
    required,
    text,
)

if TYPE_CHECKING:
    import numpy as np

    from vlm_prune_ext.commands.patch_figure import Panel
    from vlm_prune_ext.engine.trace import Trace
    from vlm_prune_ext.methods.base import Method


@dataclass(frozen=True)
class InspectSettings(MethodSettings):
    """What is drawn, and how it is asked about."""

    question: str = option("", required(text("the text of a question", "TEXT")), "")
    method: str = option("", required(text("a method")), METHOD_HELP)
    out: str | None = option(
        None, text("a file", "FILE.png"), "default: <image>_<method>.png in this folder"
    )
    max_new_tokens: int = option(64, WHOLE, "default: 64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    add_options(parser, of=InspectSettings)


def run(args: argparse.Namespace) -> int:
    """Answer with and without pruning, and draw."""
    said = InspectSettings.of(vars(args))
    method = chosen_method(said)
    if method is None:
        raise InputError(f"--method {said.method} drops nothing: name one that does.")
    # Arguments that are no valid UTF-8 come as lone surrogates, which cannot be printed.
    question = said.question.encode("utf-8", "replace").decode()
    from vlm_prune_ext.models.images import open_image

    image = open_image(args.image)
    out = check_out(said.out or f"{Path(args.image).stem}_{method.label()}.png")
    model, processor = load_model(said)
    seen = look(model, processor, method, image, question, said.max_new_tokens)

    from vlm_prune_ext.commands.patch_figure import draw

    panels = make_panels(seen.trace, method, seen.start, seen.side)
    texts = [
        ("Question", question),
        ("Without pruning", seen.answer),
        (f"With {method.label()}", seen.pruned_answer),
    ]
    try:
        missing = draw(seen.picture, panels, texts, out)
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written ({error.strerror}).") from error
    for label, answer in texts:
        say(f"{label}: {answer}")
    for panel in panels[1:]:
        print(panel.title.replace("\n", " "))
    if missing:
        print(f"No installed font has {' '.join(missing)}: boxes in the picture.")
    print(f"Written: {out}")
    return 0


def check_out(text: str) -> Path:
    """A path that a PNG can be written to, checked before a model is loaded.

    Raises:
        InputError: not a ``.png`` name, or no folder to write in.
    """
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {text!r} is not valid: a name that ends in .png.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"--out {text!r} cannot be written: {path.parent} must be a folder to write in."
        )
    return path


@dataclass
class Seen:
    """What one look gave: both answers, what was kept, and the picture in the model's eyes.

    Attributes:
        answer, pruned_answer: without and with the method.
        trace: what the method kept.
        start: place of the first visual token in the prompt.
        side: patches per side.
        picture: ``(height, width, 3)`` uint8.
    """

    answer: str
    pruned_answer: str
    trace: Trace
    start: int
    side: int
    picture: np.ndarray


def look(
    model: Any, processor: Any, method: Method, image: Image.Image, question: str, new_tokens: int
) -> Seen:
    """Answer one question with and without ``method``.

    Raises:
        InputError: the model has no square grid of patches to draw, or the method does not fit it.
    """
    from vlm_prune_ext.models import parts_of
    from vlm_prune_ext.pruning import prune

    parts = parts_of(model)
    if parts.vision is None:
        raise InputError(
            "inspect draws the square patch grid of LLaVA-1.5 and LLaVA-NeXT models; "
            f"in this one, {parts.why_no_vision}."
        )
    inputs = processor.prompt(question, image)

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return processor.decode(output, inputs)[0].strip()

    with prune(model, method) as trace:
        pruned_answer = answer()
    plain_answer = answer()
    visual = inputs["input_ids"][0] == processor.image_token_id
    picture = _picture(inputs, processor)
    start, side = int(visual.int().argmax()), parts.vision.grid
    return Seen(plain_answer, pruned_answer, trace, start, side, picture)


def _picture(inputs: Any, processor: Any) -> np.ndarray:
    """The first tile of the pixel values, with the normalisation undone."""
    pixels = inputs["pixel_values"].detach().float().cpu()
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].permute(1, 2, 0).numpy()
    scale = processor.image_processor
    pixels = pixels * scale.image_std + scale.image_mean
    return (pixels.clip(0, 1) * 255).round().astype("uint8")


# -- what to draw ------------------------------------------------------------------------------
def make_panels(trace: Trace, method: Method, start: int, side: int) -> list[Panel]:
    """The picture itself, then one panel per drop, in the order in which they happen.

    Args:
        trace: of a run with one sample.
        method: what ran.
        start: place of the first visual token in the prompt.
        side: patches per side of the grid.
    """
    from vlm_prune_ext.commands.patch_figure import Panel

    total, patches = trace.visual_input[0], side * side
    panels = [Panel(f"what the model sees\n{total} visual tokens")]
    left = list(range(patches))  # patches of the tile that became visual tokens, in order
    pooled = _pooled_side(method, side)
    for layer, rows in sorted(trace.vision_kept.items()) if not pooled else ():
        left = _patches(rows[0].tolist(), method)
        where = f"after vision layer {layer}" if layer >= 0 else "behind the vision tower"
        title = f"{where}\n{len(left)} of {patches} patches kept"
        panels.append(Panel(title, _grid(left, side)))
    if pooled:
        title = f"averaged to {pooled} x {pooled}\n{trace.visual_tokens[0][0]} of {total} tokens"
        panels.append(Panel(title, cells=pooled))
    for layer, rows in sorted(trace.kept.items()):
        places = [place - start for place in rows[0].tolist()]
        here = [left[place] for place in places if 0 <= place < len(left)]
        where = f"layer {layer}" if layer < len(trace.lengths) else "the last layer's output"
        title = f"entering {where}" if layer < len(trace.lengths) else f"in {where}"
        title += f"\n{trace.visual_tokens[layer][0]} of {total} visual tokens kept"
        if total != patches:
            title += f", {len(here)} here"
        panels.append(Panel(title, _grid(here, side)))
    return panels


def _patches(kept: list[int], method: Method) -> list[int]:
    """Patches of one row of ``Trace.vision_kept``: without filling, and without CLS in front."""
    from vlm_prune_ext.methods.visionzip import VisionZip

    cls = int(isinstance(method, VisionZip) and 0 in kept)
    return sorted(place - cls for place in kept if place >= cls)


def _grid(places: list[int], side: int) -> np.ndarray:
    import numpy as np

    kept = np.zeros(side * side, dtype=bool)
    kept[places] = True
    return kept.reshape(side, side)


def _pooled_side(method: Method, side: int) -> int:
    """Cells per side that a resizing method leaves; 0 where it does not resize."""
    import torch

    from vlm_prune_ext.methods.downsample import Downsample

    if not isinstance(method, Downsample):
        return 0
    small = method.resize(torch.zeros(1, side, side, 1))
    return 0 if small is None else small.shape[1]
