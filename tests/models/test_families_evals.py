"""Both evaluation frameworks' models on every family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import vlm_prune_ext as vp
from tests import family_makers, makers

FASTV = {"agg_layer": 2, "attention_rank": 3}


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_vlmeval(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("vlmeval")
    from vlm_prune_ext.evals.vlmeval import LLaVABaseline, LLaVAFastV

    makers.photo().save(tmp_path / "a.png")
    message = [
        {"type": "image", "value": str(tmp_path / "a.png")},
        {"type": "text", "value": "What is this?"},
    ]
    folder, options = str(folders[name]), {"max_new_tokens": 4, "device": "cpu"}
    pruned = name != "blip2_t5"
    model: Any = (
        LLaVAFastV(folder, **FASTV, **options) if pruned else LLaVABaseline(folder, **options)
    )
    assert isinstance(model.generate_inner(message), str)
    assert model.last.visual_tokens > 3 and 1 <= model.last.new_tokens <= 4
    if pruned:
        assert model.last.visual_kept[2] == 3


CHATS = {
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhich is "
        "red? <|vision_start|><image><|vision_end|> or <|vision_start|><image><|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    ),
    "gemma3": (  # its template takes blanks off both ends of each text
        "<bos><start_of_turn>user\nWhich is red?\n\n<start_of_image><image><end_of_image>\n\nor"
        "\n\n<start_of_image><image><end_of_image>\n\n<end_of_turn>\n<start_of_turn>model\n"
    ),
    "internvl": (
        "<|im_start|>user\nWhich is red? <img><image></img>\n or <img><image></img>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "blip2_opt": "<image></s>Question: Which is red?  or  Answer:",
    "instructblip": "<image><s>Which is red?  or ",
}


@pytest.mark.parametrize("name", CHATS)
def test_vlmeval_asks_in_the_family_s_own_chat(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Placeholders stand where the message has its images, in the family's frame."""
    pytest.importorskip("vlmeval")
    from vlm_prune_ext.evals.vlmeval import LLaVABaseline

    message = []
    for place, text in enumerate(("Which is red? ", " or ")):
        makers.photo(seed=place).save(tmp_path / f"{place}.png")
        message.append({"type": "text", "value": text})
        message.append({"type": "image", "value": str(tmp_path / f"{place}.png")})
    model: Any = LLaVABaseline(str(folders[name]), device="cpu")
    query = model.query(message)
    inputs = model.processor.batch([query.text], [query.images], style=query.style)
    ids, token = inputs["input_ids"][0].tolist(), model.processor.image_token_id
    assert ids.count(token) == model.processor.count_visual_tokens(inputs)[0] > 3
    # As text, each unbroken stretch of placeholders as one image.
    said = model.processor.tokenizer.decode(ids)
    name_of_token = model.processor.tokenizer.convert_ids_to_tokens(token)
    said = re.sub(f"({re.escape(name_of_token)})+", "<image>", said)
    assert said == CHATS[name]


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_vlmeval_command(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """All the way to the record, whatever the family's tower and decoder are built like."""
    pytest.importorskip("vlmeval")
    from run_vlmeval import main

    words = ["--model-path", str(folders[name]), "--data", "Shapes_YN", "--limit", "2"]
    words += ["--work-dir", str(tmp_path), "--device", "cpu", "--max-new-tokens", "4"]
    if name != "blip2_t5":
        words += ["--method", "fastv:3", "--set", "agg_layer=2"]
    assert main(words) == 0
    (path,) = tmp_path.rglob("*_results.json")
    record = json.loads(path.read_text())
    assert record["samples"] == 2 and record["failed"] == []
    if name == "blip2_t5":
        assert record["flops"] is None
        return
    assert 0 < record["flops"]["ratio"] < 1
    assert record["visual_tokens"][-1]["after"] == 3


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_lmms(name: str, folders: dict[str, Path]) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from vlm_prune_ext.evals import lmms

    docs = [
        {"image": image, "question": text}
        for image, text in zip(makers.photos(3), makers.QUESTIONS, strict=False)
    ]
    kind, settings = lmms.LlavaFastvChat, ",agg_layer=2,attention_rank=3"
    if name == "blip2_t5":
        kind, settings = lmms.LlavaBaselineChat, ""
    model = kind.create_from_arg_string(
        f"pretrained={folders[name]},device=cpu{settings}", {"batch_size": 3, "device": None}
    )
    model.task_dict = {"t": {"test": docs}}

    def messages(doc: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        content = [
            {"type": "image", "url": doc["image"]},
            {"type": "text", "text": doc["question"]},
        ]
        return [{"role": "user", "content": content}]

    given = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", messages, dict(given), doc, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": doc, "repeats": 1},
        )
        for doc in range(3)
    ]
    results = model.generate_until(requests)
    assert len(results) == 3 and all(result.token_counts.output_tokens > 0 for result in results)


def test_sizes_reach_the_processor_from_both_frameworks(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four visual tokens are 56 x 56 pixels; the limit leaves room for rounding."""
    pytest.importorskip("vlmeval")
    pytest.importorskip("lmms_eval")
    from vlm_prune_ext import cli
    from vlm_prune_ext.evals import lmms

    words = ["--model-path", str(folders["qwen2_5_vl"]), "--data", "Shapes_YN", "--limit", "2"]
    words += ["--work-dir", str(tmp_path), "--device", "cpu", "--max-new-tokens", "2"]
    assert cli.main(["eval", *words]) == 0
    # Other sizes are other pictures: answers that are there are not taken for theirs.
    assert cli.main(["eval", *words, "--max-pixels", str(60 * 60)]) == 0
    path = max(tmp_path.rglob("*_results.json"), key=lambda path: path.stat().st_mtime_ns)
    record = json.loads(path.read_text())
    assert record["visual_tokens"][0]["before"] == 4
    model = lmms.LlavaBaselineChat.create_from_arg_string(
        f"pretrained={folders['qwen2_5_vl']},device=cpu,max_pixels={60 * 60}", {"batch_size": 1}
    )
    processor = model.answerer.processor
    inputs = processor.prompt("Red?", makers.photo(300, 300))
    assert processor.count_visual_tokens(inputs) == [4]
    with pytest.raises(vp.InputError, match="max_pixels='many' is not valid: pixels of an image"):
        vp.load(folders["qwen2_5_vl"], max_pixels="many")
    words[1] = str(folders["gemma3"])
    assert cli.main(["eval", *words, "--max-pixels", str(60 * 60), "--fresh"]) != 0
    assert "max_pixels is no setting of Gemma3ImageProcessor" in capsys.readouterr().err
