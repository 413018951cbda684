"""The recipe of the demo model: tokenizer, prompts, packing, and a few steps from nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlm_prune_ext as vp
from recipes import demo_model as recipe
from vlm_prune_ext.demo import CHECKPOINT, drawing

TOKENIZER = (CHECKPOINT / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def loaded() -> Any:
    return vp.load(CHECKPOINT, dtype=torch.float32, device="cpu")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """The demo's files with sizes too small to learn much."""
    folder = tmp_path / "template"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for path, layers in ((folder, 3), (folder / "vision_tower", 2)):
        config = json.loads((path / "config.json").read_text())
        more = {"num_hidden_layers": layers, "num_key_value_heads": 2, "mm_hidden_size": 16}
        config |= small | {key: value for key, value in more.items() if key in config}
        (path / "config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_is_the_one_that_ships() -> None:
    assert recipe.train_tokenizer() == TOKENIZER


def test_prompts_are_those_of_the_processor(loaded: Any) -> None:
    _, processor = loaded
    encode = recipe.Encoder(TOKENIZER)
    rng = np.random.default_rng(0)
    for seed in range(20):
        scene = drawing.make_scene(seed)
        for kind, category in recipe.ASKED:
            question = recipe.random_question(scene, kind, category, rng)
            if question is None:
                continue
            text = recipe.word_question(question, kind, rng)
            before, after = recipe.image_prefix("llava"), recipe.after_image("llava", text)
            ids = [1, *encode(before), processor.image_token_id, *encode(after)]
            assert processor.token_ids(before + "<image>" + after, [1]) == ids


@torch.no_grad()
def test_a_packed_question_has_the_logits_of_a_single_one(loaded: Any) -> None:
    """With the shipped weights and pictures prepared by the processor."""
    model, processor = loaded
    batch = next(iter(recipe.Batches(1, 0, encode=recipe.Encoder(TOKENIZER))))
    packed = model.lm_head(recipe.answer_states(model, batch))[0]
    image = drawing.render(drawing.make_scene(drawing.FIRST_TRAINING_SEED))
    pixels = processor.pixels([image])["pixel_values"]
    picture = torch.full((recipe.PATCHES,), processor.image_token_id)
    assert batch["slot"].max() >= 15
    for slot in (1, 7, int(batch["slot"].max())):
        at = (batch["slot"][0] == slot).nonzero()[:, 0]
        ids = torch.cat([batch["prefix"], picture, batch["ids"][0, at]])
        alone = model(input_ids=ids[None], pixel_values=pixels).logits[0, -len(at) :]
        torch.testing.assert_close(packed[at], alone, atol=2e-4, rtol=1e-4)


def test_the_sparse_mask_is_the_dense_one() -> None:
    """What FlexAttention skips on a GPU is what the ordinary mask hides."""
    batch = next(iter(recipe.Batches(2, 0, encode=recipe.Encoder(TOKENIZER))))
    positions, dense = recipe.packed_layout(batch)
    again, sees = recipe.packed_layout(batch, rule=True)
    order = torch.arange(dense.shape[-1])
    found = sees(torch.arange(2)[:, None, None], None, order[:, None], order[None])
    assert torch.equal(positions, again)
    assert torch.equal(found, dense[:, 0])


def test_batches_are_a_function_of_their_number() -> None:
    encode = recipe.Encoder(TOKENIZER)
    first = iter(recipe.Batches(2, 0, encode=encode))
    next(first)
    second, resumed = next(first), next(iter(recipe.Batches(2, 1, encode=encode)))
    assert all(torch.equal(second[name], resumed[name]) for name in second)
    answered = [
        set(batch_slots[known].tolist())
        for batch_slots, known in zip(
            second["slot"], second["labels"] != recipe.IGNORE, strict=True
        )
    ]
    assert answered == [set(range(1, int(row.max()) + 1)) for row in second["slot"]]


def test_the_text_half_tells_its_tokens() -> None:
    """CLIP reads a text at its largest id, so the end token has to be it."""
    tokenizer = recipe.train_text_tokenizer()
    ids = tokenizer("a red circle, a sign that says K7F2")["input_ids"]
    assert max(ids) == ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert "<|endoftext|>" not in tokenizer.decode(ids[1:-1])


def test_it_learns_resumes_and_leaves_a_checkpoint(template: Path, tmp_path: Path) -> None:
    """A few steps of each stage: it gets better, a second call adds only what is missing."""
    out = tmp_path / "out"

    def run(steps: int) -> list[dict[str, Any]]:
        plans = (
            recipe.Plan("tower", 12, 2, peak=1e-2, every=4),
            recipe.Plan("language", steps, 1, peak=1e-2, every=4),
        )
        with torch.enable_grad():
            recipe.train(out, template, *plans, torch.device("cpu"), workers=0)
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    stages = [(r["stage"], r["step"]) for r in run(8)]
    assert stages == [("tower", 4), ("tower", 8), ("tower", 12), ("language", 4), ("language", 8)]
    records = run(12)
    assert [(r["stage"], r["step"]) for r in records] == [*stages, ("language", 12)]
    tower, together = ([r for r in records if r["stage"] == name] for name in ("tower", "language"))
    assert tower[-1]["kind"] > tower[0]["kind"] + 0.1  # of patches: background, object or text
    assert together[-1]["loss"] < together[0]["loss"] - 0.1
    assert together[-1]["seconds"] > together[-2]["seconds"]
    assert (out / "curve.png").stat().st_size > 5_000

    saved = torch.load(out / "work" / "language.pt", weights_only=True)["module"]
    model, processor = vp.load(out / "checkpoint", dtype=torch.float32, device="cpu")
    state = model.state_dict()
    rows = model.config.text_config.vocab_size  # one more for the placeholder
    for name, value in saved.items():
        loaded_rows = state[name][:rows] if "embed_tokens" in name else state[name]
        assert torch.equal(loaded_rows, value.bfloat16().float())
    inputs = processor.prompt("Red?", drawing.render(drawing.make_scene(1)))
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
