"""`vlm-prune inspect`: the right patches are greyed out, any text can be drawn, real pictures."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

import vlm_prune_ext as vp
from vlm_prune_ext import cli
from vlm_prune_ext.commands.inspect import look
from vlm_prune_ext.commands.patch_figure import MAX_CHARACTERS, MAX_LINES, draw, fonts_for, wrap
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo.drawing import make_scene, render
from vlm_prune_ext.pages.patches import GREY, Panel, grey_out
from vlm_prune_ext.select import random_places, uniform_places

SIDE = 24
PATCHES = SIDE * SIDE


@pytest.fixture(scope="module")
def demo():
    return vp.load(str(CHECKPOINT))


@pytest.fixture(scope="module")
def scene():
    return render(make_scene(12))


def panels_of(demo, image, method):
    seen = look(*demo, method, image, "What color is the ring?", 2)
    return seen, seen.panels


def places(panel: Panel) -> list[int]:
    assert panel.kept is not None and panel.kept.shape == (SIDE, SIDE)
    return np.flatnonzero(panel.kept.reshape(-1)).tolist()


def test_even_grid_in_front_of_a_later_layer(demo, scene):
    _, panels = panels_of(demo, scene, vp.CustomSelection("uniform", kept_tokens=50, agg_layer=4))
    assert [panel.title for panel in panels] == [
        "what the model sees\n576 visual tokens",
        "entering layer 4\n50 of 576 visual tokens kept",
    ]
    assert panels[0].kept is None
    assert places(panels[1]) == list(uniform_places(PATCHES, 50))


def test_drop_before_layer_0(demo, scene):
    _, panels = panels_of(demo, scene, vp.RandomDrop(keep=64, seed=5))
    assert places(panels[1]) == random_places(PATCHES, 64, 5).tolist()
    assert "entering layer 0\n64 of 576" in panels[1].title


def test_two_stages_shrink(demo, scene):
    _, panels = panels_of(demo, scene, vp.HiMAP(attn_txt_rank=200, attn_img_rank=30))
    shallow, deep = map(places, panels[1:])
    assert (len(shallow), len(deep)) == (200, 30) and set(deep) < set(shallow)


def test_tower_then_language_model(demo, scene):
    """Places behind the tower count what the tower left; they must be led back to patches."""
    vit = vp.SAINTViT(layers=(1, 2), keep_num=(401, 301))
    method = vp.SAINT(start=2, end=3, threshold=0.0, vit=vit)
    seen, panels = panels_of(demo, scene, method)
    kept = list(map(places, panels[1:]))
    assert [len(p) for p in kept[:2]] == [400, 300]
    assert kept[1] == seen.kept.tower[2]
    for before, after in pairwise(kept):
        assert set(after) <= set(before)
    assert len(kept) == 4 and len(kept[-1]) == seen.kept.counts[4] < 300
    # The candidates are the even places among what the tower left: odd ones all stay.
    assert set(kept[1][1::2]) <= set(kept[2])


def test_downsampling_is_drawn_as_a_coarser_grid(demo, scene):
    _, panels = panels_of(demo, scene, vp.Downsample(keep=100))
    assert len(panels) == 2 and panels[1].cells == 10 and panels[1].kept is None
    assert panels[1].title == "averaged to 10 x 10\n100 of 576 tokens"


def test_drop_after_the_last_layer(demo, scene):
    method = vp.SAINT(start=11, end=11, threshold=0.0)
    _, panels = panels_of(demo, scene, method)
    assert "in the last layer's output" in panels[-1].title


@pytest.fixture(scope="module")
def demo_next(tmp_path_factory):
    """The demo model as a LLaVA-NeXT checkpoint: the same weights, tiles, a newline token."""
    folder = tmp_path_factory.mktemp("next") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["model.image_newline"] = torch.zeros(config["hidden_size"], dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
    return vp.load(str(folder))


def test_next_shows_the_whole_picture_tile(demo_next):
    wide = Image.fromarray(data.astronaut()[:200])
    method = vp.CustomSelection("uniform", kept_tokens=300, agg_layer=2)
    seen, panels = panels_of(demo_next, wide, method)
    total = seen.kept.total
    assert total > 1.5 * PATCHES
    here = [place for place in uniform_places(total, 300) if place < PATCHES]
    assert places(panels[1]) == here
    assert panels[1].title.endswith(f"300 of {total} visual tokens kept, {len(here)} here")
    assert seen.picture.shape == (336, 336, 3) and np.ptp(seen.picture[:20]) > 50  # not padded


def test_next_with_dropping_in_the_tower(demo_next):
    vit = vp.SAINTViT(layers=(2,), keep_num=301)
    method = vp.SAINT(start=3, end=3, threshold=0.0, vit=vit)
    seen, panels = panels_of(demo_next, Image.fromarray(data.astronaut()[:200]), method)
    tower, decoder = map(places, panels[1:])
    assert tower == seen.kept.tower[2] and len(tower) == 300
    assert set(tower[1::2]) <= set(decoder) < set(tower)


def test_the_model_is_left_as_it_was(demo, scene):
    model, _ = demo
    before = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    look(*demo, vp.FastV(), scene, "?", 2)
    after = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    assert before == after


def test_the_picture_is_what_the_model_sees(demo):
    """A wide photo is padded to a square, so bands above and below are of one colour."""
    wide = Image.fromarray(data.astronaut()[100:300])
    seen = look(*demo, vp.FastV(), wide, "?", 1)
    picture = seen.picture.astype(int)
    assert picture.shape == (336, 336, 3)
    assert np.ptp(picture[:80], axis=(0, 1)).max() <= 1 < np.ptp(picture[160:180])
    middle = np.asarray(wide.resize((336, 131), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(picture[103:233] - middle[:130]).mean() < 12


# -- the figure --------------------------------------------------------------------------------
def test_grey_out_exactly_the_dropped_patches():
    image = np.zeros((48, 48, 3), dtype=np.uint8)
    kept = np.ones((24, 24), dtype=bool)
    kept[3, 5] = False
    changed = (grey_out(image, Panel("", kept)) != image).any(axis=2)
    assert np.argwhere(changed).tolist() == [[6, 10], [6, 11], [7, 10], [7, 11]]
    assert abs(int(grey_out(image, Panel("", kept))[6, 10, 0]) - GREY) < 40
    assert grey_out(image, Panel("")) is image


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_panels_stand_in_rows_and_keep_their_colours(tmp_path):
    image = np.full((336, 336, 3), (200, 0, 0), dtype=np.uint8)
    kept = np.zeros((24, 24), dtype=bool)
    kept[:, :12] = True
    panels = [Panel("all"), *(Panel(f"half\n{i}", kept) for i in range(5))]
    assert draw(image, panels, [("Question", "?")], tmp_path / "x.png") == []
    picture = read(tmp_path / "x.png")
    red = (abs(picture - (200, 0, 0)).sum(axis=2) < 12).sum()
    area = 290 * 290
    assert abs(red / area - (1 + 5 / 2)) < 0.05
    assert picture.shape[1] > picture.shape[0] > 2 * 290
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    "text",
    [
        "word " * 2000,
        "x" * 3000,
        "пример и παράδειγμα",
        "日本語の長い質問" * 60,
        "한국어, عربي, हिन्दी, 🙂",
        r"costs $5 or $x_{1}$ \frac",
        "two\nlines\tand\x00control\x1b[0m",
        "\ud800 lone surrogate",
        "",
    ],
)
def test_any_text_is_drawn(text, tmp_path):
    image = np.zeros((24, 24, 3), dtype=np.uint8)
    missing = draw(image, [Panel("t")], [("Question", text)], tmp_path / "x.png")
    picture = read(tmp_path / "x.png")
    # Nothing runs over the right edge, and long texts do not make an endless picture.
    assert (picture[:, -4:] > 245).all()
    assert picture.shape[0] < 340 + 20 * (MAX_LINES + 4)
    _, unknown = fonts_for(text[:MAX_CHARACTERS])
    assert set(unknown) <= set(missing)


def test_latin_greek_and_cyrillic_need_no_other_font():
    assert fonts_for("Grüße, παράδειγμα, пример") == (["DejaVu Sans"], [])


def test_wrapping_breaks_at_spaces_and_long_words():
    def fits(line):
        return len(line) <= 6

    assert wrap("ab cd ef ghijklmnop q", fits) == ["ab cd", "ef", "ghijkl", "mnop q"]
    assert wrap("", fits) == ["(nothing)"]
    assert wrap("a\n" * 50, fits)[-1] == "…" and len(wrap("a\n" * 50, fits)) == MAX_LINES


# -- the command -------------------------------------------------------------------------------
@pytest.mark.parametrize("picture", ["scene", "photo"])
def test_command(picture, scene, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = scene if picture == "scene" else Image.fromarray(data.astronaut())
    image.save("in.png")
    words = ["inspect", "in.png", "--question", "What color is it?", "--method", "fastv:64"]
    assert cli.main([*words, "--set", "agg_layer=2", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "entering layer 2 64 of 576 visual tokens kept" in said
    assert "Without pruning:" in said and "With fastv_rank64_k2:" in said
    assert read("in_fastv_rank64_k2.png").shape[0] > 300


def test_layers_the_model_does_not_have(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene.save("in.png")
    words = ["inspect", "in.png", "--question", "?", "--method", "fastv", "--out"]
    assert cli.main([*words, "x.png", "--set", "agg_layer=12"]) == 2
    assert "agg_layer=12" in capsys.readouterr().err
    assert cli.main([*words, "x.jpg"]) == 2
    assert "'x.jpg'" in capsys.readouterr().err
    assert cli.main([*words, "no/x.png"]) == 2
    assert "'no/x.png'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.png"]
