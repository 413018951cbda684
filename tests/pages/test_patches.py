"""Kept patches are led back to places in the picture, and drawn there and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_prune_ext.pages.patches import (
    DROPPED_OPACITY,
    GREY,
    Kept,
    Panel,
    as_seen,
    framing,
    grey_out,
    panels,
    side_of,
    veil,
)


def kept(method="fastv", **more) -> Kept:
    given = {"total": 16, "side": 4, "layers": 8, "counts": {}, "decoder": {}, "tower": {}}
    return Kept(method, **{**given, **more})


def places(panel: Panel) -> list[int]:
    return np.flatnonzero(panel.kept).tolist()


def test_places_behind_the_tower_count_what_it_left():
    first, tower, decoder = panels(
        kept(tower={3: [2, 5, 9, 15]}, decoder={4: [0, 3]}, counts={4: 2})
    )
    assert first.kept is None and places(tower) == [2, 5, 9, 15] and places(decoder) == [2, 15]
    assert decoder.title == "entering layer 4\n2 of 16 visual tokens kept"


def test_class_token_and_filling_are_no_patches():
    assert places(panels(kept("visionzip", tower={3: [0, 1, 16]}))[1]) == [0, 15]
    assert places(panels(kept("divprune", tower={-1: [-1, 0, 7]}))[1]) == [0, 7]


def test_the_tower_comes_first_and_behind_it_last():
    order = [p.title.split("\n")[0] for p in panels(kept(tower={-1: [1], 2: [1], 10: [1]}))[1:]]
    assert order == ["after vision layer 2", "after vision layer 10", "behind the vision tower"]


def test_other_tiles_are_not_drawn_over_the_first():
    panel = panels(kept(total=48, decoder={2: [1, 17, 40]}, counts={2: 3}))[1]
    assert places(panel) == [1] and panel.title.endswith("3 of 48 visual tokens kept, 1 here")


def test_averaged_patches_are_a_coarser_grid():
    (_, panel) = panels(kept("downsample", counts={0: 4}, tower={3: [0, 1]}))
    assert (panel.cells, panel.kept) == (2, None)
    grid = np.asarray(veil(panel))
    assert grid.shape[0] % 2 == 0 and (grid[0, :, 1] == 255).all() and not grid[1:5, 1:5, 1].any()


@pytest.mark.parametrize("shape", [(48, 48), (60, 36)])
def test_a_veil_covers_exactly_what_is_gone(shape):
    mask = np.random.default_rng(0).random((6, 6)) < 0.5
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    drawn = grey_out(image, Panel("", mask))
    rows, columns = (np.arange(size) * 6 // size for size in shape)
    stays = mask[rows[:, None], columns[None, :]]
    assert (drawn[stays] == image[stays]).all()
    wanted = DROPPED_OPACITY * image[~stays] + (1 - DROPPED_OPACITY) * GREY
    assert np.abs(drawn[~stays] - wanted).max() < 1.5


def test_sides():
    assert [side_of(n) for n in (576, 1, 2880, 575)] == [24, 1, 0, 0]


def test_pictures_are_framed_as_the_checkpoint_does(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    assert framing("demo") == "pad" and framing(str(tmp_path)) == ""
    (tmp_path / "preprocessor_config.json").write_text('{"do_center_crop": true}')
    assert framing(str(tmp_path)) == "crop"
    padded, cropped = as_seen(wide, "pad"), as_seen(wide, "crop")
    assert padded.size == (40, 40) and padded.getpixel((1, 1)) == (GREY,) * 3
    assert padded.getpixel((1, 20)) == (255, 0, 0) and cropped.size == (20, 20)
    assert as_seen(wide, "") is None
