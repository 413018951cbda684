"""Which patches of a picture a method kept, layer by layer, drawn over the picture.

One rule for every place that shows it (``inspect``, ``show``, ``play``): a :class:`Panel` says what
is left, and its :func:`veil` is laid over the picture as the model sees it.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREY = 176
DROPPED_OPACITY = 0.14
"""How much of a dropped patch still shines through."""
_LINE = 16  # pixels of a veil per cell, where only the lines of a grid are drawn


@dataclass(frozen=True)
class Panel:
    """One copy of the picture.

    Attributes:
        title: what happened, with counts.
        kept: ``(side, side)`` bool, patches that are still there; ``None``: all of them.
        cells: draw the lines of a grid of this many cells per side; 0: none.
    """

    title: str
    kept: np.ndarray | None = None
    cells: int = 0


@dataclass(frozen=True)
class Kept:
    """What one prompt with one picture kept.

    Attributes:
        method: registry name of what ran.
        total: visual tokens of the prompt, before anything was dropped.
        side: patches per side of the (first tile's) grid.
        layers: decoder layers.
        counts: decoder layer -> visual tokens that enter it.
        decoder: decoder layer -> places of those, among the visual tokens that entered layer 0;
            where a rule chose.
        tower: tower layer (-1: behind the tower) -> rows of the first tile that stay.
    """

    method: str
    total: int
    side: int
    layers: int
    counts: Mapping[int, int]
    decoder: Mapping[int, Sequence[int]]
    tower: Mapping[int, Sequence[int]]


def side_of(visual_tokens: int) -> int:
    """Patches per side of a picture that became one square grid of tokens; 0: it did not."""
    side = math.isqrt(visual_tokens)
    return side if side * side == visual_tokens else 0


def panels(kept: Kept) -> list[Panel]:
    """The picture itself, then one panel per drop, in the order in which they happen."""
    total, patches = kept.total, kept.side**2
    found = [Panel(f"what the model sees\n{total} visual tokens")]
    if kept.method == "downsample":
        cells = math.isqrt(kept.counts.get(0, total))
        if cells < kept.side:
            title = f"averaged to {cells} x {cells}\n{kept.counts[0]} of {total} tokens"
            found.append(Panel(title, cells=cells))
        return found
    left = list(range(patches))  # patches of the tile that became visual tokens, in order
    for layer, rows in sorted(kept.tower.items(), key=lambda one: (one[0] < 0, one[0])):
        left = _patches(rows, kept.method)
        where = f"after vision layer {layer}" if layer >= 0 else "behind the vision tower"
        title = f"{where}\n{len(left)} of {patches} patches kept"
        found.append(Panel(title, _grid(left, kept.side)))
    for layer, places in sorted(kept.decoder.items()):
        here = [left[place] for place in places if place < len(left)]
        inside = layer < kept.layers
        title = f"entering layer {layer}" if inside else "in the last layer's output"
        title += f"\n{kept.counts[layer]} of {total} visual tokens kept"
        if total != patches:
            title += f", {len(here)} here"
        found.append(Panel(title, _grid(here, kept.side)))
    return found


def _patches(rows: Sequence[int], method: str) -> list[int]:
    """Patches of some rows of the tower: without filling (-1), and without CLS, which VisionZip
    counts as row 0."""
    cls = int(method == "visionzip" and 0 in rows)
    return sorted(row - cls for row in rows if row >= cls)


def _grid(places: Sequence[int], side: int) -> np.ndarray:
    kept = np.zeros(side * side, dtype=bool)
    kept[list(places)] = True
    return kept.reshape(side, side)


# -- drawing -----------------------------------------------------------------------------------
def veil(panel: Panel) -> Image.Image | None:
    """What is laid over the picture, stretched to its size without smoothing: grey where patches
    are gone, white lines around averaged ones. Grey with opacity (LA); ``None``: nothing."""
    if panel.kept is not None:
        opacity = np.where(panel.kept, 0, round(255 * (1 - DROPPED_OPACITY)))
        grey = np.full_like(opacity, GREY)
    elif panel.cells:
        opacity = np.zeros((panel.cells * _LINE,) * 2, dtype=int)
        opacity[::_LINE] = opacity[:, ::_LINE] = 255
        grey = np.full_like(opacity, 255)
    else:
        return None
    return Image.fromarray(np.stack([grey, opacity], axis=2).astype(np.uint8), "LA")


def grey_out(image: np.ndarray, panel: Panel) -> np.ndarray:
    """``image`` ``(height, width, 3)`` uint8 under the panel's veil."""
    over = veil(panel)
    if over is None:
        return image
    height, width = image.shape[:2]
    rows = np.arange(height) * over.height // height
    columns = np.arange(width) * over.width // width
    grey, opacity = np.asarray(over)[rows[:, None], columns[None, :]].transpose(2, 0, 1)
    share = opacity[..., None].astype(np.float32) / 255
    return ((1 - share) * image + share * grey[..., None]).round().astype(np.uint8)


def data_uri(image: Image.Image, kind: str = "png", **options: Any) -> str:
    """A picture as a text that pages show without asking anybody for it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- the picture in the model's eyes -------------------------------------------------------------
def framing(model: str) -> str:
    """How a checkpoint makes a picture square: ``pad``, ``crop``, or empty: not known.

    Args:
        model: its folder; ``demo`` is the demo's.
    """
    from vlm_prune_ext.demo import CHECKPOINT

    folder = Path(CHECKPOINT if model == "demo" else model)
    config, pictures = (_json(folder / f"{n}.json") for n in ("config", "preprocessor_config"))
    if config.get("image_aspect_ratio") == "pad" or pictures.get("do_pad"):
        return "pad"
    return "crop" if pictures.get("do_center_crop") else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def as_seen(image: Image.Image, how: str) -> Image.Image | None:
    """A picture made square as :func:`framing` says; ``None``: that is not known."""
    width, height = image.size
    if width == height:
        return image
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    if how == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), (GREY, GREY, GREY))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square
    return None
