"""DyCoke's temporal merging against the paper's words, token by token, and in models."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlm_prune_ext as vp
from tests import family_makers, makers, video_makers
from vlm_prune_ext.methods import base
from vlm_prune_ext.methods.evidence import FeatureEvidence
from vlm_prune_ext.models.clips import Clip


def kept_by_hand(video: list[list[list[float]]], rate: float) -> list[int]:
    """Places that stay of a video, ``video[frame][token]`` a vector: window after window of four
    frames, one cosine at a time."""

    def cosine(a: list[float], b: list[float]) -> float:
        size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / size

    stays = [list(range(len(frame))) for frame in video]
    for first in range(0, len(video), 4):
        window = range(first, min(first + 4, len(video)))
        for frame, earlier in ((first + 1, first), (first + 3, first + 2), (first + 2, first)):
            if frame not in window:
                continue
            count = min(len(video[frame]), len(video[earlier]))
            like = {n: cosine(video[frame][n], video[earlier][n]) for n in range(count)}
            left = max(1, math.floor((1 - rate) * count))
            different = sorted(like, key=lambda n: (like[n], n))[:left]
            stays[frame] = sorted(different) + list(range(count, len(video[frame])))
    starts = np.cumsum([0, *map(len, video)])
    return [int(starts[frame]) + place for frame, own in enumerate(stays) for place in own]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("frames", [(9,) * 8, (9,) * 6, (5,), (7,) * 4 + (8,), (6, 6, 7)])
def test_the_rule(frames: tuple[int, ...], rate: float) -> None:
    made = torch.Generator().manual_seed(sum(frames))
    tokens = torch.randn(3, sum(frames), 12, generator=made)
    found = (
        vp.DyCoke(pruning_rate=rate)
        .feature_stage()
        .rule(FeatureEvidence(sum(frames), frames=frames, projected=tokens))
    )
    assert isinstance(found, torch.Tensor)
    for row, kept in zip(tokens, found, strict=True):
        video = [part.tolist() for part in row.split(list(frames))]
        assert kept.tolist() == kept_by_hand(video, rate)


def test_the_count_and_equal_frames() -> None:
    """Of frames that repeat the first one, the lower places stay: all cosines are one."""
    tokens = torch.randn(1, 10, 8).repeat(1, 8, 1)
    kept = (
        vp.DyCoke()
        .feature_stage()
        .rule(FeatureEvidence(80, frames=(10,) * 8, projected=tokens.round(decimals=1)))
    )
    assert isinstance(kept, torch.Tensor)
    by_frame = [[p % 10 for p in kept[0].tolist() if p // 10 == frame] for frame in range(8)]
    assert [len(own) for own in by_frame] == [10, 3, 3, 3] * 2 and kept.shape[1] == 2 * (10 + 9)
    with pytest.raises(vp.InputError, match="pruning_rate=1"):
        vp.DyCoke(pruning_rate=1.0)


@pytest.fixture(scope="module", params=["qwen3_vl", "llava_onevision"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    folder.mkdir()
    family_makers.TABLE[request.param].make(folder)
    return vp.load(folder)


def generate(model: Any, inputs: Any) -> tuple[list[list[int]], torch.Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new.tolist(), torch.stack(out.logits, dim=1)


def test_in_models(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What stays is what the embedded prompt says by hand, whatever the budget is of; a batch of
    videos of two lengths, a picture and text equals its singles; a rate of 0 changes nothing."""
    model, processor = loaded
    videos = [Clip(video_makers.frames(count, seed=count), rate=12.0) for count in (12, 8)]
    media: list[list[Any]] = [[videos[0]], [makers.photo()], [], [videos[1]]]
    texts = ["What moves?", "Red?", "Why is it so?", "Where to?"]
    if processor.shape_of([processor.opened(videos[0])]) is not None:  # of one length in a batch
        media[3] = [videos[0]]
    inputs = processor.batch(texts, media)
    seen: dict[str, torch.Tensor] = {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    base._SAID.clear()
    with vp.prune(model, vp.DyCoke()) as trace, caplog.at_level(logging.WARNING):
        tokens, logits = generate(model, inputs)
        visual, spans = list(trace.visual_tokens[0]), [list(own) for own in trace.spans]
        places = trace.vision_kept[-1]
    assert [line for line in caplog.messages if "pictures keep all" in line]
    rows = [row for row, own in enumerate(media) if own]
    for number, row in enumerate(rows):
        own = [seen["embeds"][row, start : start + count].tolist() for start, count in spans[row]]
        expected = kept_by_hand(own, 0.7) if row != 1 else list(range(len(own[0])))
        kept = [place for place in places[number].tolist() if place >= 0]
        assert kept == expected and visual[row] == len(expected)
    assert visual[1] == sum(count for _, count in spans[1]) and visual[2] == 0
    assert visual[0] < 0.6 * sum(count for _, count in spans[0])
    for video in ("frame", "video"):
        with vp.prune(model, vp.DyCoke(), video=video):
            for row, own in enumerate(media):
                one, alone = generate(model, processor.prompt(texts[row], own))
                assert one[0] == tokens[row]
                torch.testing.assert_close(alone[0], logits[row], atol=1e-4, rtol=1e-4)
    plain = generate(model, inputs)
    with vp.prune(model, vp.DyCoke(pruning_rate=0.0)):
        kept_all = generate(model, inputs)
    assert plain[0] == kept_all[0]
    torch.testing.assert_close(plain[1], kept_all[1], atol=1e-5, rtol=1e-5)
