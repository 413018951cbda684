"""Rotary positions of several axes (Qwen) for images that are left with fewer tokens.

A token that stays keeps its row and column, and text behind an image goes on where it would have
without pruning: as the published models count, and as :func:`vlm_prune_ext.prune` does. The engine
plans a prompt's positions before its images are encoded, when text's are known already, and only
the corner of an image. Where in it a token stands comes with its row, as channels behind the
embedding, and is added when the token enters the language model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

BASE = 64
CHANNELS = 4
"""Row and column, two digits each: exact in bfloat16 up to 16383."""


def with_places(rows: torch.Tensor, places: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows ``(n, D)`` with their places in a grid of so many columns, ``(n, D + CHANNELS)``."""
    row, column = places // columns, places % columns
    digits = [row // BASE, row % BASE, column // BASE, column % BASE]
    return torch.cat([rows, torch.stack(digits, dim=-1).to(rows)], dim=-1)


def read_places(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`with_places` was given: ``(n, D)``, and int64 ``(3, n)``, time, row and column
    of each, from the image's corner."""
    digits = rows[:, -CHANNELS:].long()
    row, column = digits[:, 0] * BASE + digits[:, 1], digits[:, 2] * BASE + digits[:, 3]
    return rows[:, :-CHANNELS], torch.stack([torch.zeros_like(row), row, column])


def planned_positions(
    length: int, images: Iterable[tuple[int, int, int, int]]
) -> tuple[torch.Tensor, int]:
    """Positions of a prompt before its images are encoded.

    Args:
        length: tokens of the prompt.
        images: place of the first token, tokens that are left, rows and columns of the whole image;
            in order.

    Returns:
        int64 ``(3, length)``, in which all tokens of an image have the position of its corner; and
        what a decoded token's position is beyond its place.
    """
    parts, place, position = [], 0, 0

    def text(count: int) -> None:
        nonlocal position
        parts.append(torch.arange(position, position + count))
        position += count

    for start, count, rows, columns in images:
        text(start - place)
        parts.append(torch.full((count,), position))
        position += max(rows, columns)
        place = start + count
    text(length - place)
    return torch.cat(parts).expand(3, -1).clone(), position - length
