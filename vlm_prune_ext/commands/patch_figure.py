"""The picture that `vlm-prune inspect` writes: one panel per drop, the answers below."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from vlm_prune_ext.pages.patches import Panel, grey_out

PANEL_INCHES = 2.9
TITLE_INCHES = 0.42
LINE_INCHES = 0.19
PARAGRAPH_INCHES = 0.05
MARGIN_INCHES = 0.12
MAX_COLUMNS = 4
DPI = 100
FONT_SIZE = 9.5
# Longest text drawn; the terminal shows all of it.
MAX_CHARACTERS = 1200
MAX_LINES = 10


def draw(
    image: np.ndarray, panels: Sequence[Panel], texts: Sequence[tuple[str, str]], path: Path
) -> list[str]:
    """Write the figure as PNG.

    Args:
        image: ``(height, width, 3)`` uint8, what the model saw.
        panels: at least one.
        texts: ``(label, text)`` pairs to write below, in any language.
        path: where to; replaced only once the picture is complete.

    Returns:
        the characters of ``texts`` that no installed font has; a box stands in their place.
    """
    families, missing = fonts_for("".join(text for _, text in texts))
    columns = min(MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(columns, 2) * (PANEL_INCHES + MARGIN_INCHES) + MARGIN_INCHES
    figure = Figure(figsize=(width, 1), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    lines = _text_lines(figure, texts, width - 2 * MARGIN_INCHES, families, missing)
    panel_row = PANEL_INCHES + TITLE_INCHES
    gaps = list(accumulate(PARAGRAPH_INCHES * bold for _, bold in lines))
    text_height = LINE_INCHES * len(lines) + gaps[-1] + 2 * MARGIN_INCHES
    height = rows * panel_row + text_height
    figure.set_size_inches(width, height)
    for index, panel in enumerate(panels):
        left = MARGIN_INCHES + index % columns * (PANEL_INCHES + MARGIN_INCHES)
        bottom = height - (index // columns + 1) * panel_row
        box = (left / width, bottom / height, PANEL_INCHES / width, PANEL_INCHES / height)
        _draw_panel(figure, box, image, panel)
    for index, (line, bold) in enumerate(lines):
        y = (text_height - MARGIN_INCHES - LINE_INCHES * index - gaps[index]) / height
        figure.text(
            MARGIN_INCHES / width,
            y,
            line,
            va="top",
            fontsize=FONT_SIZE,
            fontfamily=families,
            weight="bold" if bold else "normal",
            parse_math=False,
        )
    _save(canvas, path)
    return missing


def _draw_panel(
    figure: Figure, box: tuple[float, float, float, float], image: np.ndarray, panel: Panel
) -> None:
    axes = figure.add_axes(box)
    axes.imshow(grey_out(image, panel), interpolation="lanczos")
    axes.set_title(panel.title, fontsize=FONT_SIZE, pad=4)
    axes.set_axis_off()


def _save(canvas: FigureCanvasAgg, path: Path) -> None:
    """Through a palette: a quarter of the size, and hardly a visible difference. An octree's keeps
    colours of small areas, which other ways of choosing one sacrifice."""
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, format="png", optimize=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -- text --------------------------------------------------------------------------------------
def fonts_for(text: str) -> tuple[list[str], list[str]]:
    """Font families that together have the characters of ``text``.

    Returns:
        families, matplotlib's own first, then installed ones that add something; and the
        characters that none of them has.
    """
    families = ["DejaVu Sans"]
    wanted = {ord(c) for c in text if not c.isspace() and unicodedata.category(c)[0] != "C"}
    wanted -= _characters(font_manager.findfont(families[0]))
    for entry in font_manager.fontManager.ttflist:
        if not wanted:
            break
        # Matplotlib's last-resort font draws a box with the script's name for everything.
        if entry.name in families or entry.name.startswith("Last Resort"):
            continue
        found = wanted & _characters(entry.fname)
        if found:
            families.append(entry.name)
            wanted -= found
    return families, [chr(code) for code in sorted(wanted)]


def _characters(path: str) -> set[int]:
    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return set()


def _text_lines(
    figure: Figure,
    texts: Sequence[tuple[str, str]],
    inches: float,
    families: list[str],
    missing: list[str],
) -> list[tuple[str, bool]]:
    """``(line, bold)`` for each line below the panels: every label, then its text."""
    probe = figure.text(0, 0, "", fontsize=FONT_SIZE, fontfamily=families, parse_math=False)

    def fits(line: str) -> bool:
        probe.set_text(line)
        return probe.get_window_extent().width <= inches * DPI

    lines: list[tuple[str, bool]] = []
    for label, text in texts:
        clean = _printable(text, missing)
        lines.append((label, True))
        lines += [(line, False) for line in wrap(clean, fits)]
    if missing:
        note = f"□: {len(missing)} character(s) that no installed font has; see the terminal"
        lines.append((note, False))
    probe.remove()
    return lines


def _printable(text: str, missing: Sequence[str]) -> str:
    """Boxes for what cannot be drawn, spaces for control characters, an end for long texts."""
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS] + " …"
    gone = set(missing)
    drawn = [
        "\n" if c == "\n" else "□" if c in gone else " " if unicodedata.category(c) == "Cc" else c
        for c in text
    ]
    return "".join(drawn).encode("utf-8", "replace").decode().strip()


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break ``text`` into lines for which ``fits(line)`` holds: at spaces where there are some,
    inside words (and scripts without spaces) where there are not. At most ``MAX_LINES`` lines.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if fits(joined):
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = _break_word(word, fits)
            lines += full
        lines.append(line)
    lines = [line for line in lines if line] or ["(nothing)"]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "…"]
    return lines


def _break_word(word: str, fits: Callable[[str], bool]) -> list[str]:
    pieces, piece = [], ""
    for character in word:
        if piece and not fits(piece + character):
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece]
