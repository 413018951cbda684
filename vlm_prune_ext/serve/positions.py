"""Rotary positions of several axes (Qwen) for images that are left with fewer tokens.

A token that stays keeps its row and column, and text behind an image goes on where it would have
without pruning: as the published models count, and as :func:`vlm_prune_ext.prune` does. The engine
plans a prompt's positions before its images are encoded, when text's are known already; those of
the images' tokens come with their rows, as channels behind the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """What :func:`with_places` was given: ``(n, D)``, and int64 ``(3, n)`` time, row, column."""
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


def placed_positions(
    positions: torch.Tensor, is_image: torch.Tensor, places: Sequence[torch.Tensor], computed: int
) -> torch.Tensor:
    """The plan with the tokens of some images at their places.

    Args:
        positions: int64 ``(3, n)``, of the prompt.
        is_image: bool ``(n,)``, its tokens that are images'.
        places: int64 ``(3, k)`` each, of the images' tokens from ``computed`` on, in order.
        computed: tokens of the prompt in front of those.

    Returns:
        int64 ``(3, n)``; the same if it is done again.
    """
    made = positions.clone()
    if not places:
        return made
    index = torch.arange(len(is_image), device=is_image.device)
    tokens = index[is_image & (index >= computed)]
    moved = torch.cat(list(places), dim=1)
    tokens = tokens[: moved.shape[1]]
    # Text in front of an image stands right before its corner.
    before = torch.where(is_image, -1, index).cummax(dim=0).values[tokens]
    corner = torch.where(before >= 0, positions[0, before.clamp(min=0)] + 1, 0)
    made[:, tokens] = corner + moved.to(made)
    return made
