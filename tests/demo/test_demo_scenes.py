"""The demo's scenes, questions and data set files."""

from __future__ import annotations

import ast
import base64
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlm_prune_ext.demo import drawing, questions, scenes, writers

WRITERS = [scenes.write_vlmeval_tsv, scenes.write_lmms_parquet, scenes.write_caption_csv]


def test_a_seed_is_a_picture():
    first, again = drawing.draw(scenes.make_scene(12)), drawing.draw(scenes.make_scene(12))
    assert np.array_equal(first[0], again[0])
    assert first[0].shape == (336, 336, 3)
    assert first[0].dtype == np.uint8
    assert not np.array_equal(first[0], drawing.draw(scenes.make_scene(13))[0])
    # Pinned: the shipped model was trained on exactly these pictures.
    assert scenes.make_scene(12).caption == PINNED_CAPTION
    assert int(first[0].astype(np.int64).sum()) == PINNED_SUM


PINNED_CAPTION = "A blue square, a white cross, a green circle and a purple star."
PINNED_SUM = 27_623_219


def test_scenes_are_well_formed():
    counts = Counter()
    for seed in range(300):
        scene = scenes.make_scene(seed)
        counts[len(scene.objects)] += 1
        names = [o.name for o in scene.objects]
        assert len(set(names)) == len(names)
        assert [o.x for o in scene.objects] == sorted(o.x for o in scene.objects)
        _, owners = drawing.draw(scene)
        wanted = set(range(1, len(names) + 1)) | ({-1} if scene.text else set())
        assert set(owners.tolist()) - {0} == wanted
        # Small objects are the point: losing the wrong tokens has to hurt.
        assert all((owners == i).sum() <= 25 for i in range(1, len(names) + 1))
    assert set(counts) == {1, 2, 3, 4, 5}


def test_evaluation_and_training_never_share_a_scene():
    for kind in scenes.KINDS:
        seeds = [s["scene_seed"] for s in scenes.samples(kind, 3, 60)]
        assert len(set(seeds)) == 60
        assert max(seeds) < scenes.FIRST_TRAINING_SEED


def test_samples_depend_on_nothing_but_the_arguments():
    for kind in scenes.KINDS:
        assert scenes.samples(kind, 5, 20) == scenes.samples(kind, 5, 20)
        assert scenes.samples(kind, 5, 20) != scenes.samples(kind, 6, 20)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_are_true(kind):
    for sample in scenes.samples(kind, 8, 120):
        scene = scenes.make_scene(sample["scene_seed"])
        answer, text = sample["answer"], sample["question"]
        if kind == "mcq":
            answer = sample["options"]["ABCD".index(answer)]
            assert len(set(sample["options"])) == 4
        if kind == "caption":
            assert answer == scene.caption
        elif kind == "yn":
            assert text.endswith(" Please answer yes or no.")
            _check_yes_no(scene, sample)
        elif sample["category"] == "count":
            assert answer == str(len(scene.objects))
        elif sample["category"] == "text":
            assert answer == scene.text.text
        elif sample["category"] == "color":
            assert [o.color for o in scene.objects if f" {o.shape}?" in text] == [answer]
        elif sample["category"] == "shape":
            assert [o.shape for o in scene.objects if f" {o.color} object" in text] == [answer]
        else:
            assert [o.quadrant for o in scene.objects if f"{o.name}?" in text] == [answer]


def _check_yes_no(scene: scenes.Scene, sample: dict) -> None:
    text, yes = sample["question"], sample["answer"] == "Yes"
    if sample["category"] == "existence":
        assert yes == any(f" {o.name} in" in text for o in scene.objects)
    elif sample["category"] == "color":
        assert yes == any(f"the {o.shape} {o.color}?" in text for o in scene.objects)
    elif sample["category"] == "count":
        assert yes == (f"image {len(scene.objects)}?" in text)
    elif sample["category"] == "text":
        assert yes == (f" {scene.text.text}?" in text)
    else:
        item = next(o for o in scene.objects if f"the {o.name} in" in text)
        assert yes == any(f"the {place} half" in text for place in (item.side, item.level) if place)


def test_no_constant_answer_gets_far():
    share = {}
    for kind in ("mcq", "yn", "vqa"):
        answers = Counter(s["answer"] for s in scenes.samples(kind, 1, 240))
        share[kind] = answers.most_common(1)[0][1] / 240
        by_category = Counter((s["category"], s["answer"]) for s in scenes.samples(kind, 1, 240))
        if kind != "vqa":
            values = by_category.values()
            assert max(values) / min(values) <= 2  # existence comes up twice as often
    assert share["mcq"] <= 0.26
    assert share["yn"] == 0.5
    assert share["vqa"] <= 0.12


def test_distractors_are_other_objects_first():
    scene = next(
        s for s in map(scenes.make_scene, range(100)) if len({o.color for o in s.objects}) == 4
    )
    question = None
    rng = np.random.default_rng(0)
    while question is None:
        question = questions.choice_question(scene, "color", "A", rng)
    assert set(question.options) == {o.color for o in scene.objects}


def test_vlmeval_files(tmp_path):
    paths = scenes.write_vlmeval_tsv(tmp_path / "new", 1, 6)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(
        p.name for p in paths.values()
    )
    tables = {kind: pd.read_csv(path, sep="\t") for kind, path in paths.items()}
    assert all(len(table) == 6 for table in tables.values())
    assert set("ABCD") <= set(tables["mcq"].columns)
    assert set(tables["yn"]["answer"]) == {"Yes", "No"}
    assert len(set(ast.literal_eval(tables["vqa"]["answer"][0]))) == 1
    assert ast.literal_eval(tables["caption"]["answer"][0])[0].endswith(".")
    image = Image.open(io.BytesIO(base64.b64decode(tables["mcq"]["image"][0])))
    assert image.size == (336, 336)


def test_lmms_files(tmp_path):
    paths = scenes.write_lmms_parquet(tmp_path, 1, 5)
    tables = {kind: pd.read_parquet(path) for kind, path in paths.items()}
    assert {kind: len(table) for kind, table in tables.items()} == {
        "mcq": 5,
        "yn": 5,
        "vqa": 5,
        "caption": 5,
        "mme": 6,
    }
    assert set(tables["yn"]["answer"]) == {"yes", "no"}
    assert len(tables["vqa"]["answers"][0]) == 10
    pairs = tables["mme"].groupby("question_id")["answer"].apply(sorted)
    assert all(pair == ["No", "Yes"] for pair in pairs)
    assert Image.open(io.BytesIO(tables["mcq"]["image"][0]["bytes"])).size == (336, 336)


def test_caption_csv_finds_its_pictures(tmp_path):
    path = scenes.write_caption_csv(tmp_path, 1, 4)
    table = pd.read_csv(path)
    assert list(table.columns) == ["image", "prompt", "reference"]
    assert all((tmp_path / name).is_file() for name in table["image"])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("count", [0, -3, 2.5, True])
def test_wrong_counts_are_one_sentence(writer, count, tmp_path):
    with pytest.raises(ValueError, match=r"^samples is .*; a whole number .* is accepted\.$"):
        writer(tmp_path / "new", 1, count)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_cannot_be_written_is_one_sentence(writer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .* is accepted\.$"):
        writer(tmp_path / "file" / "folder", 1, 2)


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_half_written_stays(writer, tmp_path, monkeypatch):
    done = []

    def fails_later(scene_seed: int) -> bytes:
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        done.append(scene_seed)
        return b"picture"

    monkeypatch.setattr(writers, "_picture", fails_later)
    with pytest.raises(ValueError, match="No space left"):
        writer(tmp_path / "new", 1, 4)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="No space left"):
        writer(tmp_path / "old", 1, 4)
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["mine.txt"]


def test_write_sets_refuses_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match="xml"):
        scenes.write_sets(Path(tmp_path), seed=1, samples=1, formats=("xml",))
