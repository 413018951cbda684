"""Synthetic scenes: coloured shapes, often a sign with characters, on grey or on a photograph.

A scene is a pure function of one integer, so a data set is a list of integers and anybody can draw
fresh, never-seen images. Seeds below `FIRST_TRAINING_SEED` are for evaluation, seeds from there on
for training; the two never meet.

Objects are small on purpose: 2 to 4 of the model's 14-pixel patches across, so that an object
covers few of the 576 visual tokens and losing the wrong tokens really hurts. Questions differ in
how many tokens they need: a colour needs those of one object, a count those of all of them, a sign
each of its characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_prune_ext.errors import InputError

IMAGE_SIZE = 336
PATCH = 14
GRID = IMAGE_SIZE // PATCH
FIRST_TRAINING_SEED = 10_000_000

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (244, 136, 20),
    "yellow": (240, 226, 50),
    "green": (34, 160, 50),
    "cyan": (50, 214, 222),
    "blue": (36, 62, 216),
    "purple": (150, 40, 180),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
RADII = {"small": (11.0, 14.0), "large": (20.0, 25.0)}
# Letters of "USER" and "ASSISTANT" are left out: the tokenizer has pieces of several of them.
CHARACTERS = "BCDFGHJKLMPVXZ234679"
TEXT_LENGTHS = (3, 4, 5)
MAX_OBJECTS = 9
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
# Photographs that ship with scikit-image, all CC0 or public domain; see the folder's README.
PHOTOGRAPHS = Path(__file__).with_name("photographs")

# Two objects never share a column this closely: "left to right" is then never a matter of taste.
_MIN_X_GAP = 14.0
# Nothing is asked about the side of an object whose centre is closer than this to the middle.
_MIDDLE_BAND = 20.0
# A patch belongs to the object that covers at least this many of its 196 pixels.
_OWNED_PIXELS = 24

# 5 x 7 bitmaps, one string of rows per character.
_GLYPHS = {
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "6": "01110 10000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "9": "01110 10001 10001 01111 00001 00001 01110",
}


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `x` and `y` are its centre in pixels, `radius` half its extent."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Colour and shape, which name an object uniquely within its scene."""
        return f"{self.color} {self.shape}"

    @property
    def side(self) -> str | None:
        """`left` or `right` half of the image, `None` when too close to the middle to say."""
        if abs(self.x - IMAGE_SIZE / 2) < _MIDDLE_BAND:
            return None
        return "left" if self.x < IMAGE_SIZE / 2 else "right"

    @property
    def level(self) -> str | None:
        """`top` or `bottom` half of the image, `None` when too close to the middle to say."""
        if abs(self.y - IMAGE_SIZE / 2) < _MIDDLE_BAND:
            return None
        return "top" if self.y < IMAGE_SIZE / 2 else "bottom"

    @property
    def quadrant(self) -> str | None:
        """One of `QUADRANTS`, `None` when too close to a border between two of them."""
        return f"{self.level} {self.side}" if self.level and self.side else None


@dataclass(frozen=True)
class SceneText:
    """A sign: characters drawn with square pixels of `scale` image pixels, centred at `x`, `y`, on
    a plate that is dark where they are light."""

    text: str
    x: float
    y: float
    scale: int
    rgb: tuple[int, int, int]

    @property
    def width(self) -> int:
        """In pixels of the image, margins included; a character and its gap are 6 square pixels."""
        return (6 * len(self.text) + 1) * self.scale

    @property
    def plate(self) -> tuple[int, int, int]:
        """Colour behind the characters."""
        return (40, 42, 46) if self.rgb[0] > 128 else (226, 224, 218)


@dataclass(frozen=True)
class Clutter:
    """A thin line or a dot (`length` 0): drawn below the objects, never asked about."""

    x: float
    y: float
    angle: float
    length: int
    width: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """Two colours blended along `angle`, a ripple of `ripple` grey levels, and pixel noise; or a
    piece of photograph number `photograph` that begins at `corner`, mirrored or not."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    ripple: float
    noise: int
    noise_offset: tuple[int, int]
    photograph: int | None = None
    corner: tuple[int, int] = (0, 0)
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """All that is in one image. `objects` are ordered from left to right."""

    seed: int
    background: Background
    clutter: tuple[Clutter, ...]
    objects: tuple[SceneObject, ...]
    text: SceneText | None

    @property
    def caption(self) -> str:
        """`A red circle, an orange star and a blue ring.`, from left to right."""
        names = [f"{'an' if o.color[0] in 'aeiou' else 'a'} {o.name}" for o in self.objects]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        return listed[0].upper() + listed[1:] + "."


def _pick(rng: np.random.Generator, values: tuple) -> Any:
    """One of `values`; plain Python, unlike `rng.choice`, and ten times as fast."""
    return values[int(rng.integers(len(values)))]


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int], amount: int) -> tuple:
    shift = rng.integers(-amount, amount + 1, size=3)
    return tuple(int(min(255, max(0, c + s))) for c, s in zip(rgb, shift, strict=True))


def _make_background(rng: np.random.Generator) -> Background:
    """Low-saturation mid greys, so that each object colour stands out from each background."""
    grey = int(rng.integers(50, 140))
    first = _jitter(rng, (grey, grey, grey), 14)
    style = int(rng.integers(3))
    second = first
    if style == 1:
        other = int(rng.integers(50, 140))
        second = _jitter(rng, (other, other, other), 14)
    return Background(
        first=first,
        second=second,
        angle=float(rng.uniform(0, 2 * np.pi)),
        ripple=float(rng.uniform(3, 8)) if style == 2 else 0.0,
        noise=int(rng.integers(len(_NOISE_SIGMAS))),
        noise_offset=(int(rng.integers(_NOISE_SIZE)), int(rng.integers(_NOISE_SIZE))),
        photograph=int(rng.integers(len(PHOTOGRAPH_NAMES))) if rng.random() < 0.4 else None,
        corner=(int(rng.integers(_PHOTOGRAPH_ROOM)), int(rng.integers(_PHOTOGRAPH_ROOM))),
        mirrored=bool(rng.random() < 0.5),
    )


def _make_clutter(rng: np.random.Generator) -> tuple[Clutter, ...]:
    items = []
    for _ in range(int(rng.integers(0, 6))):
        grey = int(_pick(rng, (20, 40, 160, 180)))
        items.append(
            Clutter(
                x=float(rng.uniform(10, IMAGE_SIZE - 10)),
                y=float(rng.uniform(10, IMAGE_SIZE - 10)),
                angle=float(rng.uniform(0, np.pi)),
                length=0 if rng.random() < 0.4 else int(rng.integers(30, 90)),
                width=int(rng.integers(1, 3)),
                rgb=_jitter(rng, (grey, grey, grey), 10),
            )
        )
    return tuple(items)


Disc = tuple[float, float, float]


def _place(
    rng: np.random.Generator, radius: float, objects: Sequence[Disc], fixed: Sequence[Disc]
) -> Disc | None:
    """A disc of `radius` that touches nothing, in no other object's column."""
    for _ in range(60):
        x, y = rng.uniform(radius + 4, IMAGE_SIZE - radius - 4, size=2).tolist()
        apart = all(
            (x - u) ** 2 + (y - v) ** 2 > (radius + r + 6) ** 2 for u, v, r in (*objects, *fixed)
        )
        if apart and all(abs(x - u) > _MIN_X_GAP for u, _, _ in objects):
            return x, y, radius
    return None


def _make_text(rng: np.random.Generator) -> SceneText:
    length = int(_pick(rng, TEXT_LENGTHS))
    string = "".join(_pick(rng, tuple(CHARACTERS)) for _ in range(length))
    scale = 4
    half = (6 * length + 1) * scale / 2
    x = float(rng.uniform(half + 4, IMAGE_SIZE - half - 4))
    y = float(rng.uniform(4.5 * scale + 4, IMAGE_SIZE - 4.5 * scale - 4))
    rgb = (250, 250, 250) if rng.random() < 0.5 else (8, 8, 8)
    return SceneText(string, x, y, scale, rgb)


def _discs_of(text: SceneText) -> list[Disc]:
    """What a sign takes up, as discs in a row that objects keep away from."""
    radius = 4.5 * text.scale
    reach = max(0.0, text.width / 2 - radius)
    count = 1 + math.ceil(2 * reach / radius)
    return [(float(x), text.y, radius) for x in np.linspace(-reach, reach, count) + text.x]


def _pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` different pairs of colour and shape; in a third of the scenes most share one of the
    two, or there would never be many circles or many red things to count."""
    theme, share = float(rng.random()), 0.75
    color, shape = str(_pick(rng, tuple(COLORS))), str(_pick(rng, SHAPES))
    pairs: list[tuple[str, str]] = []
    for _ in range(20 * count):
        own = (str(_pick(rng, tuple(COLORS))), str(_pick(rng, SHAPES)))
        if theme < 0.2 and rng.random() < share:
            own = (own[0], shape)
        elif theme < 0.35 and rng.random() < share:
            own = (color, own[1])
        if own not in pairs:
            pairs.append(own)
        if len(pairs) == count:
            break
    return pairs


def make_scene(seed: int) -> Scene:
    """The scene of `seed`: always the same one, on every machine."""
    if seed < 0:
        raise InputError(f"seed is {seed}; a scene's seed is a whole number of at least 0.")
    rng = np.random.default_rng([1730, seed])
    background = _make_background(rng)
    clutter = _make_clutter(rng)
    text = _make_text(rng) if rng.random() < 0.5 else None
    fixed = _discs_of(text) if text else []
    objects: list[SceneObject] = []
    centres: list[Disc] = []
    for color, shape in _pairs(rng, int(rng.integers(1, MAX_OBJECTS + 1))):
        size = str(_pick(rng, tuple(RADII)))
        spot = _place(rng, float(rng.uniform(*RADII[size])), centres, fixed)
        if spot is None:
            continue
        centres.append(spot)
        rgb = _jitter(rng, COLORS[color], 10)
        objects.append(SceneObject(color, shape, size, *spot, rgb))
    return Scene(seed, background, clutter, tuple(sorted(objects, key=lambda o: o.x)), text)


# ----------------------------------------------------------------------------- drawing

_NOISE_SIGMAS = (2.0, 5.0, 8.0)
_NOISE_SIZE = 256


@lru_cache(maxsize=1)
def _noise_banks() -> list[np.ndarray]:
    """Fixed noise, drawn once: shifting a bank is far cheaper than a third of a million draws."""
    rng = np.random.default_rng(31337)
    shape = (IMAGE_SIZE + _NOISE_SIZE, 3 * (IMAGE_SIZE + _NOISE_SIZE))
    return [rng.normal(0, sigma, shape).round().astype(np.int16) for sigma in _NOISE_SIGMAS]


PHOTOGRAPH_NAMES = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "grass",
    "gravel",
    "rocket",
)
_PHOTOGRAPH_SIZE = 400
_PHOTOGRAPH_ROOM = _PHOTOGRAPH_SIZE - IMAGE_SIZE


@lru_cache(maxsize=1)
def _photographs() -> list[np.ndarray]:
    """`(400, 400, 3)` int16 each, darkened and washed out, so that each colour stands out."""
    found = []
    for name in PHOTOGRAPH_NAMES:
        with Image.open(PHOTOGRAPHS / f"{name}.jpg") as file:
            pixels = np.asarray(file.convert("RGB"), dtype=np.float32)
        grey = pixels.mean(axis=2, keepdims=True)
        found.append((40 + 0.4 * grey + 0.15 * (pixels - grey)).astype(np.int16))
    return found


@lru_cache(maxsize=1)
def _axis() -> np.ndarray:
    return np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2


def _draw_background(background: Background) -> np.ndarray:
    """`(336, 336, 3)` int16, room below 0 and above 255 for what is added later.

    Works on rows of 336 * 3 numbers: numpy is several times slower where the innermost axis is 3.
    """
    row, column = background.noise_offset
    noise = _noise_banks()[background.noise]
    noise = noise[row : row + IMAGE_SIZE, 3 * column : 3 * (column + IMAGE_SIZE)]
    if background.photograph is not None:
        top, left = background.corner
        piece = _photographs()[background.photograph]
        piece = piece[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        piece = piece[:, ::-1] if background.mirrored else piece
        return piece + noise.reshape(IMAGE_SIZE, IMAGE_SIZE, 3) // 2
    canvas = noise + np.tile(np.array(background.first, dtype=np.int16), IMAGE_SIZE)
    cos, sin = np.float32(np.cos(background.angle)), np.float32(np.sin(background.angle))
    along = (_axis()[None, :] * cos + _axis()[:, None] * sin) / np.float32(IMAGE_SIZE)
    if background.ripple:
        wave = np.sin(along * np.float32(90)) * np.float32(background.ripple)
        canvas += np.repeat(wave.astype(np.int16), 3, axis=1)
    elif background.first != background.second:
        span = np.array(background.second, dtype=np.float32) - background.first
        blend = np.repeat(np.clip(along + np.float32(0.5), 0, 1), 3, axis=1)
        canvas += (blend * np.tile(span.astype(np.float32), IMAGE_SIZE)).astype(np.int16)
    return canvas.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


def _shape_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Roughly the signed distance in pixels from each point to the outline, below 0 inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * r
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.05 * r) * 0.7071
    if shape == "cross":
        bar, arm = 0.32 * r, r
        across = np.maximum(np.abs(x) - arm, np.abs(y) - bar)
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - arm)
        return np.minimum(across, upright)
    if shape == "triangle":
        return np.maximum(y - 0.75 * r, (np.abs(x) * 1.75 - y - 0.95 * r) * 0.4961)
    # A five-pointed star: in polar form, the edge between an outer and an inner corner.
    angle = np.arctan2(x, -y)
    sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    rho = np.hypot(x, y)
    px, py = rho * np.cos(sector), rho * np.sin(sector)
    outer, inner = 1.08 * r, 0.45 * r
    ex, ey = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
    return (ey * (px - outer) - ex * py) / np.hypot(ex, ey)


def _window(centre: float, reach: float) -> slice:
    return slice(max(0, int(centre - reach)), min(IMAGE_SIZE, int(centre + reach) + 2))


def _paint(canvas: np.ndarray, rows: slice, columns: slice, alpha: np.ndarray, rgb: tuple) -> None:
    patch = canvas[rows, columns]
    mixed = patch + alpha[..., None] * (np.array(rgb, dtype=np.float32) - patch)
    canvas[rows, columns] = mixed.astype(np.int16)


def _draw_clutter(canvas: np.ndarray, item: Clutter) -> None:
    reach = item.length / 2 + item.width + 2
    rows, columns = _window(item.y, reach), _window(item.x, reach)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - item.x
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - item.y
    along = x * np.cos(item.angle) + y * np.sin(item.angle)
    across = y * np.cos(item.angle) - x * np.sin(item.angle)
    distance = np.hypot(np.maximum(np.abs(along) - item.length / 2, 0), across) - item.width
    _paint(canvas, rows, columns, np.clip(0.5 - distance, 0, 1), item.rgb)


def _object_alpha(item: SceneObject) -> tuple[slice, slice, np.ndarray]:
    rows, columns = _window(item.y, 1.1 * item.radius + 2), _window(item.x, 1.1 * item.radius + 2)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - item.x
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - item.y
    return rows, columns, np.clip(0.5 - _shape_distance(item.shape, x, y, item.radius), 0, 1)


@lru_cache(maxsize=64)
def _text_bitmap(text: str, scale: int) -> np.ndarray:
    glyphs = []
    for character in text:
        rows = _GLYPHS[character].split()
        glyphs.append(np.array([[float(bit) for bit in row] + [0.0] for row in rows]))
    bitmap = np.pad(np.concatenate(glyphs, axis=1)[:, :-1], 1)  # the plate's margin
    return np.kron(bitmap, np.ones((scale, scale))).astype(np.float32)


def _text_alpha(item: SceneText) -> tuple[slice, slice, np.ndarray]:
    alpha = _text_bitmap(item.text, item.scale)
    top, left = int(item.y - alpha.shape[0] / 2), int(item.x - alpha.shape[1] / 2)
    return slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1]), alpha


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture and who owns which patch.

    Returns `(336, 336, 3)` uint8 and `(576,)` int8 in grid order: 0 for background, `i + 1` for
    object `i`, `-1` for the sign.
    """
    canvas = _draw_background(scene.background)
    for item in scene.clutter:
        _draw_clutter(canvas, item)
    owners = np.zeros(GRID * GRID, dtype=np.int8)
    for index, thing in enumerate((*scene.objects, scene.text)):
        if thing is None:
            continue
        if isinstance(thing, SceneText):
            rows, columns, alpha = _text_alpha(thing)
            box = np.ones_like(alpha)  # gaps between strokes belong to the sign as well
            owner = -1
            _paint(canvas, rows, columns, box, thing.plate)
        else:
            rows, columns, alpha = _object_alpha(thing)
            box, owner = alpha, index + 1
        _paint(canvas, rows, columns, alpha, thing.rgb)
        _own_patches(owners, rows, columns, box, owner)
    return np.clip(canvas, 0, 255).astype(np.uint8), owners


def _own_patches(
    owners: np.ndarray, rows: slice, columns: slice, alpha: np.ndarray, owner: int
) -> None:
    """Mark the patches that `alpha` covers by enough pixels."""
    first_row, first_column = rows.start // PATCH, columns.start // PATCH
    height = -(-rows.stop // PATCH) - first_row
    width = -(-columns.stop // PATCH) - first_column
    local = np.zeros((height * PATCH, width * PATCH), dtype=np.float32)
    top, left = rows.start - first_row * PATCH, columns.start - first_column * PATCH
    local[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    covered = local.reshape(height, PATCH, width, PATCH).sum(axis=(1, 3)) >= _OWNED_PIXELS
    grid = owners.reshape(GRID, GRID)
    block = grid[first_row : first_row + height, first_column : first_column + width]
    block[covered] = owner


def render(scene: Scene) -> Image.Image:
    """The scene as a 336 x 336 RGB picture."""
    return Image.fromarray(draw(scene)[0])
