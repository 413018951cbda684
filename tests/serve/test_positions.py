"""Positions of several axes, planned before and completed after images are encoded."""

from __future__ import annotations

import pytest
import torch

from vlm_prune_ext.serve.positions import (
    planned_positions,
    read_places,
    with_places,
)

GRIDS = [(3, 5), (6, 2)]
KEPT = [torch.tensor([0, 4, 7, 14]), torch.tensor([3, 11])]


def whole() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of an unpruned prompt, as Qwen counts, which tokens are images', which stay."""
    parts, images, stays, corner = [], [], [], 0
    for count, grid, kept in [(4, GRIDS[0], KEPT[0]), (3, GRIDS[1], KEPT[1]), (5, None, None)]:
        text = torch.arange(corner, corner + count)
        parts.append(text.expand(3, -1))
        images.append(torch.zeros(count, dtype=torch.bool))
        stays.append(torch.ones(count, dtype=torch.bool))
        corner += count
        if grid is not None and kept is not None:
            place = torch.arange(grid[0] * grid[1])
            image = torch.stack([torch.zeros_like(place), place // grid[1], place % grid[1]])
            parts.append(image + corner)
            images.append(torch.ones(len(place), dtype=torch.bool))
            stays.append(torch.zeros(len(place), dtype=torch.bool).index_fill(0, kept, True))
            corner += max(grid)
    return torch.cat(parts, dim=1), torch.cat(images), torch.cat(stays)


def test_tokens_that_stay_keep_their_positions() -> None:
    positions, is_image, stays = whole()
    wanted, is_image = positions[:, stays], is_image[stays]
    images = [(4, 4, *GRIDS[0]), (11, 2, *GRIDS[1])]
    made, beyond = planned_positions(wanted.shape[1], images)
    assert wanted.shape[1] + beyond == int(positions.max()) + 1
    assert torch.equal(made[:, ~is_image], wanted[:, ~is_image])
    rows = [
        with_places(torch.zeros(len(kept), 8, dtype=torch.bfloat16), kept, grid[1])
        for kept, grid in zip(KEPT, GRIDS, strict=True)
    ]
    made[:, is_image] += torch.cat([read_places(one)[1] for one in rows], dim=1)
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_survive_the_trip_in_any_float_type(dtype: torch.dtype) -> None:
    places = torch.tensor([0, 63, 64, 4095, 4096, 123456, 999999])
    rows = torch.randn(len(places), 6).to(dtype)
    back, found = read_places(with_places(rows, places, 1000))
    assert torch.equal(back, rows)
    assert torch.equal(found[1] * 1000 + found[2], places)
    assert not found[0].any()
