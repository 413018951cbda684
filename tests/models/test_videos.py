"""Prompts with videos: inputs are those of the checkpoint's own processor, whatever mixture of
media a batch has; and what is wrong with a video is one sentence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import load_video

import vlm_prune_ext as vp
from tests import family_makers, makers, tables, video_makers
from tests.models import test_families as families
from vlm_prune_ext.errors import RowError
from vlm_prune_ext.methods import base
from vlm_prune_ext.models.clips import read_clip
from vlm_prune_ext.models.images import digest_of

Clip = vp.Clip
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "glm4v", "gemma4")
NAMES += tuple(family_makers.VIDEO)


@pytest.fixture(scope="module", params=NAMES)
def form(request: pytest.FixtureRequest, folders: Any) -> families.Form:
    return families.load_form(request.param, folders[request.param])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_makers.mp4(tmp_path_factory.mktemp("clips") / "two seconds.mp4")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def chat(source: Any, text: str = "What moves?", **how: Any) -> list[dict[str, Any]]:
    content = [{"type": "video", "video": source, **how}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def ask(form: families.Form, messages: Any) -> Any:
    text, media = form.processor.messages(messages)
    return form.processor.prompt(text, media, style="plain")


def test_inputs_are_those_of_the_processor(form: families.Form, clip: Path) -> None:
    """Bit for bit what ``AutoProcessor`` makes of the same file, decoded by transformers' own
    reader and sampled by the processor."""
    theirs: Any = AutoProcessor.from_pretrained(form.folder)
    pixels, metadata = load_video(
        str(clip), backend="pyav", sample_indices_fn=lambda metadata, **_: list(range(24))
    )
    text = theirs.apply_chat_template(chat(str(clip)), tokenize=False, add_generation_prompt=True)
    if form.name == "gemma4":
        text = text.removeprefix("<bos>")
    sampled: dict[str, Any] = {"fps": None, "num_frames": 4}
    if form.name == "glm4v":
        sampled = {"fps": 2}
    expected = theirs(
        text=[text],
        videos=[pixels],
        video_metadata=[metadata],
        do_sample_frames=True,
        return_tensors="pt",
        **sampled,
    )
    how = {"fps": 2} if form.name == "glm4v" else {"nframes": 4}
    for where in ("device", None):
        form.processor.preprocess = where
        made = ask(form, chat(str(clip), **how))
        assert set(made) == set(expected)
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(value), made[name].cpu()), name


@pytest.mark.parametrize("form", [n for n in NAMES if n != "gemma4"], indirect=True)  # 500 tokens
def test_a_batch_of_videos_pictures_and_text_equals_singles(
    form: families.Form, clip: Path
) -> None:
    photo, processor = makers.photo(), form.processor
    media: list[list[Any]] = [[Clip(clip, 4)], [photo], [], [Clip(clip, 4), photo]]
    texts = ["What?", "Red?", "Why is it so?", "Both?"]
    if form.name == "glm4v":  # transformers takes its frames for pictures
        with pytest.raises(RowError, match=r"GLM-4\.1V takes pictures or videos in one call"):
            processor.batch(texts, media)
        media[1], media[3] = [Clip(clip, 2)], [Clip(clip, 4), Clip(clip, 2)]
    with vp.prune(form.model, vp.FastV(agg_layer=2, attention_rank=0.5)) as trace:
        batch = processor.batch(texts, media)
        tokens, logits = form.generate(batch, steps=2)
        counts = list(trace.visual_tokens[2])
        assert [sum(count for _, count in own) for own in trace.spans] == trace.visual_input
        for row, own in enumerate(media):
            one, alone = form.generate(processor.prompt(texts[row], own), steps=2)
            assert torch.equal(tokens[row], one[0])
            assert trace.visual_tokens.get(2, [0]) == [counts[row]]
            torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"], indirect=True)
@pytest.mark.parametrize("name", [*tables.EVERYWHERE, *families.OTHERS])
def test_every_method_by_frame_and_by_video(form: families.Form, clip: Path, name: str) -> None:
    """A budget is of each frame, or of the whole video; keeping all is the unpruned model."""
    inputs = form.processor.prompt("What?", Clip(clip, 4))
    methods = {**families.METHODS, **families.OTHERS}
    with vp.prune(form.model, methods[name], video="frame") as trace:
        form.generate(inputs, steps=1)
        frames = [count for _, count in trace.spans[0]]
        left = trace.visual_tokens[max(trace.visual_tokens)][0]
    with vp.prune(form.model, methods[name], video="video") as trace:
        form.generate(inputs, steps=1)
        assert [count for _, count in trace.spans[0]] == frames and len(frames) in (2, 4)
        whole = trace.visual_tokens[max(trace.visual_tokens)][0]
    if name in tables.LEFT and name in families.METHODS:
        assert left == sum(map(tables.LEFT[name], frames))
        assert whole == tables.LEFT[name](sum(frames))
    if name == "dart":  # a count: as many for the video as for each of its frames
        assert whole < left
    if name in families.KEEP_ALL:
        plain = form.generate(inputs, steps=1)[1]
        for video in ("frame", "video"):
            with vp.prune(form.model, families.KEEP_ALL[name], video=video):
                assert torch.equal(form.generate(inputs, steps=1)[1], plain)


def test_what_is_left_of_a_whole_video_is_what_the_masked_model_computes(
    form: families.Form, clip: Path
) -> None:
    inputs = form.processor.prompt("What?", Clip(clip, 4))
    with vp.prune(form.model, vp.FastV(agg_layer=2, attention_rank=5), video="video") as trace:
        with families.Recorder(form.model) as seen:
            form.model(**inputs, use_cache=False)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
        assert trace.visual_tokens[2] == [5]
    with families.HiddenKeys(form.model, kept), families.Recorder(form.model) as masked:
        form.model(**inputs, use_cache=False)
    scale = {"atol": 1e-5 * float(masked.first.abs().max()), "rtol": 0.0}
    families.compare_rows(seen.first, masked.first, kept[2], inputs, **scale)


@pytest.mark.parametrize("method", [vp.FasterVLM(budget=2), vp.DivPrune(ratio=0.5)])
def test_methods_behind_the_tower_by_frame(form: families.Form, clip: Path, method: Any) -> None:
    """Frames are chosen from one by one, as if each were a picture; where a model pools them, a
    method that needs the tower's patches says so."""
    inputs = form.processor.prompt("What?", Clip(clip, 4))
    try:
        with vp.prune(form.model, method) as trace:
            form.generate(inputs, steps=1)
    except vp.InputError as error:
        assert isinstance(method, vp.FasterVLM), error
        assert "pools in videos" in str(error) or "of the vision tower: " in str(error)
        assert form.name not in ("qwen2_5_vl", "qwen3_vl")
        return
    frames = [count for _, count in trace.spans[0]]
    each = [2 if isinstance(method, vp.FasterVLM) else round(0.5 * n) for n in frames]
    assert trace.visual_tokens[0] == [sum(each)]
    kept = trace.vision_kept[max(trace.vision_kept)]
    assert [int((row >= 0).sum()) for row in kept] == each


def test_sources_of_one_video_give_one_input(folders: Any, clip: Path) -> None:
    """A file, its bytes, its decoded frames as an array, a tensor, pictures and decord's reader."""
    decord = pytest.importorskip("decord")
    form = families.load_form("qwen3_vl", folders["qwen3_vl"])
    whole = read_clip(Clip(clip), lambda count, rate: range(count))
    assert whole.pixels.shape == (24, 48, 64, 3) and whole.rate == 12.0
    pictures = [Image.fromarray(frame) for frame in whole.pixels]
    tensor = torch.from_numpy(whole.pixels).permute(0, 3, 1, 2)
    sources = [clip, clip.read_bytes(), whole.pixels, tensor, pictures]
    made = [form.processor.prompt("?", Clip(one, 4, rate=12.0)) for one in sources]
    for other in made[1:]:
        assert all(torch.equal(other[name], value) for name, value in made[0].items())
    reader = form.processor.prompt("?", Clip(decord.VideoReader(str(clip)), 4))
    assert torch.equal(reader["input_ids"], made[0]["input_ids"])
    digests = [digest_of(Clip(one, 4)) for one in sources[:3]]
    assert digests[0] == digests[1] == digest_of(Clip(str(clip), 4)) != digest_of(Clip(clip, 5))


def test_which_frames_are_shown(folders: Any, clip: Path) -> None:
    _, processor = vp.load(folders["llava_onevision"])
    shown = {
        (None, None): list(range(24)),  # fewer than 32
        (8, None): list(range(0, 24, 3)),
        (99, None): list(range(24)),
        (None, 2): [0, 6, 12, 18],
        (None, 0.1): [0],
    }
    for (frames, fps), indices in shown.items():
        assert processor.read_clip(Clip(clip, frames, fps)).indices == indices
    assert processor.read_clip(Clip(clip, 3, start=1, end=1.5)).indices == [12, 14, 16]
    _, processor = vp.load(folders["qwen3_vl"], frames=6)
    assert len(processor.read_clip(Clip(clip)).indices) == 6
    assert len(processor.read_clip(Clip(clip, 4)).indices) == 4


def test_what_is_wrong_with_a_video_is_one_sentence(
    folders: Any, clip: Path, tmp_path: Path
) -> None:
    broken, cut = tmp_path / "broken.mp4", tmp_path / "cut.mp4"
    broken.write_bytes(b"no video at all")
    cut.write_bytes(clip.read_bytes()[:-1500])
    _, processor = vp.load(folders["qwen2_5_vl"])
    still = io.BytesIO()
    makers.photo(20, 20).save(still, "PNG")
    wrong: dict[str, Any] = {
        "does not exist": Clip(tmp_path / "nowhere.mp4"),
        "does not decode": Clip(broken),
        r"does not decode|missing": Clip(cut),
        "has no frames: it holds no video stream": Clip(video_makers.sound(tmp_path / "a.mp4")),
        "has no frames: one": Clip([]),
        "between start=9 and end=None": Clip(clip, start=9),
        "several sizes": Clip([makers.photo(20, 20), makers.photo(30, 20)]),
        "is uint8": Clip(np.zeros((2, 8, 8, 3))),
        "is not known": Clip([still.getvalue()] * 9, fps=2),
        "type int": Clip(3),
    }
    for sentence, video in wrong.items():
        with pytest.raises(RowError, match=sentence) as told:
            processor.prompt("What?", video)
        assert "\n" not in str(told.value)
    for arguments in ({"frames": 0}, {"fps": -1}, {"frames": 2, "fps": 2}, {"start": 3, "end": 2}):
        with pytest.raises(vp.InputError, match=r"is not valid|one of them"):
            Clip(clip, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RowError, match=r"1 <video> marker\(s\) for 2 video"):
        processor.prompt("<video>?", [Clip(clip, 2), Clip(clip, 2)])
    with pytest.raises(vp.InputError, match="video budget 'clip'"):
        vp.prune(processor._live_model(), vp.FastV(), video="clip")


def test_budgets_below_one_token_per_frame(
    folders: Any, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ratio keeps one token of each frame, a count for a whole video none of some: each is said
    once, in one sentence."""
    form = families.load_form("qwen3_vl", folders["qwen3_vl"])
    inputs = form.processor.prompt("What?", Clip(clip, 8))
    base._SAID.clear()
    for budget, video, left, said in (
        (0.001, "frame", 4, "attention_rank=0.001 is below one token of some images or frames"),
        (
            3,
            "video",
            3,
            "a budget of 3 tokens for a video of 4 frames is below one token per frame",
        ),
    ):
        method = vp.FastV(agg_layer=2, attention_rank=budget)
        caplog.clear()
        for _ in range(2):
            with vp.prune(form.model, method, video=video) as trace:
                form.generate(inputs, steps=1)
            assert trace.visual_tokens[2] == [left]
        assert [said in line for line in caplog.messages if "below" in line] == [True]


def test_families_that_take_none(folders: Any, clip: Path, tmp_path: Path) -> None:
    for folder in (makers.tiny_original(tmp_path / "llava"), folders["idefics3"]):
        _, processor = vp.load(folder)
        assert not processor.takes_videos
        with pytest.raises(RowError, match="takes no videos here: pictures and text are"):
            processor.prompt("What?", Clip(clip))
        with pytest.raises(vp.InputError, match=r"frames is no setting of \S+, which takes no"):
            vp.load(folder, frames=4)


def test_seconds_are_not_rounded_with_the_pixels(folders: Any, clip: Path) -> None:
    """1.99 seconds between Qwen2.5-VL's frames count as one; bfloat16 knows no such number."""
    _, processor = vp.load(folders["qwen2_5_vl"], dtype="bfloat16")
    made = processor.prompt("?", Clip(video_makers.frames(4), rate=1.005))
    assert made["pixel_values_videos"].dtype == torch.bfloat16
    assert 1.98 < float(made["second_per_grid_ts"]) < 2.0
