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
from vlm_prune_ext.pages.asking import Asker

if TYPE_CHECKING:
    import numpy as np

    from vlm_prune_ext.methods.base import Method
    from vlm_prune_ext.pages.patches import Kept, Panel


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

    texts = [
        ("Question", question),
        ("Without pruning", seen.answer),
        (f"With {method.label()}", seen.pruned_answer),
    ]
    try:
        missing = draw(seen.picture, seen.panels, texts, out)
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written ({error.strerror}).") from error
    for label, answer in texts:
        say(f"{label}: {answer}")
    for panel in seen.panels[1:]:
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
    """What one look gave.

    Attributes:
        answer, pruned_answer: without and with the method.
        kept: what the method kept.
        panels: the same, drawn.
        picture: ``(height, width, 3)`` uint8, in the model's eyes.
    """

    answer: str
    pruned_answer: str
    kept: Kept
    panels: list[Panel]
    picture: np.ndarray


def look(
    model: Any, processor: Any, method: Method, image: Image.Image, question: str, new_tokens: int
) -> Seen:
    """Answer one question with and without ``method``.

    Raises:
        InputError: the model has no square grid of patches to draw, or the method does not fit it.
    """
    asker = Asker(model, processor)
    if asker.why_no_grid:
        raise InputError(f"inspect cannot draw: {asker.why_no_grid}")
    pruned = asker.ask(image, question, method, new_tokens)
    plain = asker.ask(image, question, None, new_tokens)
    assert pruned.kept is not None
    said, pruned_said = (reply.sample.prediction for reply in (plain, pruned))
    return Seen(said, pruned_said, pruned.kept, pruned.panels, asker.seen(image))
