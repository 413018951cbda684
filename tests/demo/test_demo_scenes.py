"""The demo's scenes, questions and data set files."""

from __future__ import annotations

import ast
import base64
import io
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlm_prune_ext.demo import drawing, questions, writers
from vlm_prune_ext.errors import InputError

WRITERS = [writers.write_vlmeval_tsv, writers.write_lmms_parquet, writers.write_caption_csv]


def test_a_seed_is_a_picture():
    first, again = drawing.draw(drawing.make_scene(12)), drawing.draw(drawing.make_scene(12))
    assert np.array_equal(first[0], again[0])
    assert first[0].shape == (336, 336, 3)
    assert first[0].dtype == np.uint8
    assert not np.array_equal(first[0], drawing.draw(drawing.make_scene(13))[0])
    # Pinned: the shipped model was trained on exactly such pictures.
    assert drawing.make_scene(12).caption == PINNED_CAPTION
    assert int(first[0].astype(np.int64).sum()) == PINNED_SUM


PINNED_CAPTION = (
    "A white triangle, a white circle, a white ring, a white diamond, "
    "a white cross, a yellow star, a white star, a white square and a red cross."
)
PINNED_SUM = 23_738_281


def test_scenes_are_well_formed():
    counts = Counter()
    for seed in range(300):
        scene = drawing.make_scene(seed)
        counts[len(scene.objects)] += 1
        names = [o.name for o in scene.objects]
        assert len(set(names)) == len(names)
        assert [o.x for o in scene.objects] == sorted(o.x for o in scene.objects)
        _, owners = drawing.draw(scene)
        wanted = set(range(1, len(names) + 1)) | ({-1} if scene.text else set())
        assert set(owners.tolist()) - {0} == wanted
        # Small objects are the point: losing the wrong tokens has to hurt.
        assert all((owners == i).sum() <= 25 for i in range(1, len(names) + 1))
    assert set(counts) == set(range(1, 10))


def test_evaluation_and_training_never_share_a_scene():
    for kind in questions.KINDS:
        seeds = [s["scene_seed"] for s in questions.samples(kind, 3, 60)]
        assert len(set(seeds)) == 60
        assert max(seeds) < drawing.FIRST_TRAINING_SEED


def test_samples_depend_on_nothing_but_the_arguments():
    for kind in questions.KINDS:
        assert questions.samples(kind, 5, 20) == questions.samples(kind, 5, 20)
        assert questions.samples(kind, 5, 20) != questions.samples(kind, 6, 20)


def test_samples_may_be_of_one_category():
    many = questions.samples("vqa", 5, 40)
    for category in ("color", "text"):
        found = questions.samples("vqa", 5, 20, category)
        assert {one["category"] for one in found} == {category}
        assert not {one["scene_seed"] for one in found} & {one["scene_seed"] for one in many}
    with pytest.raises(InputError, match="category is 'age'; accepted for vqa are color, shape"):
        questions.samples("vqa", 5, 20, "age")


@pytest.mark.parametrize("kind", questions.KINDS)
def test_answers_are_true(kind):
    """Each by a way of its own to the answer: the words of the question and the scene's lists."""
    for sample in questions.samples(kind, 8, 140):
        scene = drawing.make_scene(sample["scene_seed"])
        answer, text = sample["answer"], sample["question"]
        if kind == "caption":
            assert answer == scene.caption
            assert len(scene.objects) <= questions.CAPTION_OBJECTS
        elif kind == "yn":
            assert text.endswith(" Please answer yes or no.")
            said = text.removesuffix(" Please answer yes or no.")
            assert (answer == "Yes") == _holds(scene, sample["category"], said), text
        else:
            options = sample.get("options")
            if kind == "mcq":
                answer = options["ABCD".index(answer)]
                assert len(set(options)) == 4
            assert answer == _open_answer(scene, sample["category"], text, options), text


def _count(scene: drawing.Scene, what: str) -> int:
    """`shapes`, `red shapes` or `circles`."""
    if what == "shapes":
        return len(scene.objects)
    if what.endswith(" shapes"):
        return sum(o.color == what.removesuffix(" shapes") for o in scene.objects)
    return sum(what in (f"{o.shape}s", f"{o.shape}es") for o in scene.objects)


def _open_answer(scene: drawing.Scene, category: str, text: str, options: list | None) -> str:
    named = {o.name: o for o in scene.objects}
    if category == "count":
        found = re.fullmatch(r"How many (.+?) are (there|in the image)\?", text)
        return str(_count(scene, found[1]))
    if category == "text":
        return scene.text.text
    if category == "color":
        (one,) = [o for o in scene.objects if f" {o.shape}?" in text]
        return one.color
    if category == "shape":
        (one,) = [o for o in scene.objects if f" {o.color} object" in text]
        return one.shape
    if category == "position":
        return named[text.removeprefix("In which quadrant of the image is the ")[:-1]].quadrant
    if found := re.fullmatch(r"(?:What|Which of these) is furthest to the (\w+)\?", text):
        ways = {"left": ("x", min), "right": ("x", max), "top": ("y", min), "bottom": ("y", max)}
        axis, most = ways[found[1]]
        return most(options or named, key=lambda name: getattr(named[name], axis))
    one, way, other = re.fullmatch(
        r"Is the (.+?) (left or right of|above or below) the (.+)\?", text
    ).groups()
    first, second = named[one], named[other]
    if way.startswith("left"):
        return "left" if first.x < second.x else "right"
    return "above" if first.y < second.y else "below"


def _holds(scene: drawing.Scene, category: str, text: str) -> bool:
    named = {o.name: o for o in scene.objects}
    if category == "existence":
        return re.fullmatch(r"Is there an? (.+) in the image\?", text)[1] in named
    if category == "color":
        shape, color = re.fullmatch(r"Is the (\w+) (\w+)\?", text).groups()
        return color in [o.color for o in scene.objects if o.shape == shape]
    if category == "count":
        what, count = re.fullmatch(r"Is the number of (.+) in the image (\d)\?", text).groups()
        return _count(scene, what) == int(count)
    if category == "text":
        return text == f"Does the sign say {scene.text.text}?"
    if category == "position":
        name, half = re.fullmatch(r"Is the (.+) in the (\w+) half of the image\?", text).groups()
        return half in (named[name].side, named[name].level)
    if found := re.fullmatch(r"Do the (\w+) and the (\w+) have the same color\?", text):
        colors = {o.shape: o.color for o in scene.objects}
        return colors[found[1]] == colors[found[2]]
    if found := re.fullmatch(r"Is the (.+) (smaller|larger) than the (.+)\?", text):
        first, second = named[found[1]].radius, named[found[3]].radius
        return first < second if found[2] == "smaller" else first > second
    one, way, other = re.fullmatch(
        r"Is the (.+?) (to the left of|to the right of|above|below) the (.+)\?", text
    ).groups()
    first, second = named[one], named[other]
    return {
        "to the left of": first.x < second.x,
        "to the right of": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[way]


def test_no_constant_answer_gets_far():
    share = {}
    for kind in ("mcq", "yn", "vqa"):
        answers = Counter(s["answer"] for s in questions.samples(kind, 1, 240))
        share[kind] = answers.most_common(1)[0][1] / 240
        by_category = Counter((s["category"], s["answer"]) for s in questions.samples(kind, 1, 240))
        if kind != "vqa":
            values = by_category.values()
            assert max(values) / min(values) <= 2  # existence comes up twice as often
    assert share["mcq"] <= 0.26
    assert share["yn"] == 0.5
    assert share["vqa"] <= 0.12


def test_distractors_are_other_objects_first():
    scene = next(
        s for s in map(drawing.make_scene, range(100)) if len({o.color for o in s.objects}) == 4
    )
    question = None
    rng = np.random.default_rng(0)
    while question is None:
        question = questions.choice_question(scene, "color", "A", rng)
    assert set(question.options) == {o.color for o in scene.objects}


def test_vlmeval_files(tmp_path):
    paths = writers.write_vlmeval_tsv(tmp_path / "new", 1, 6)
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
    paths = writers.write_lmms_parquet(tmp_path, 1, 5)
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
    path = writers.write_caption_csv(tmp_path, 1, 4)
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
