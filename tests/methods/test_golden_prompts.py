"""Prompts as token ids with LLaMA's real vocabulary (tests/golden/llama_vocabulary.mjs)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2 as sentencepiece

from tests import makers
from tests.golden_cases import FOLDER
from vlm_prune_ext.models.base import PromptProcessor
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.loading import load_tokenizer

GOLDEN = json.loads((FOLDER / "llama_vocabulary.json").read_text("utf-8"))
VOCABULARY, IMAGE, LENGTH = 32_000, 32_000, 7


class Words(PromptProcessor):
    """Text alone: every picture is as many placeholders."""

    def pixels(self, images: list[Any]) -> dict[str, torch.Tensor]:
        return {}

    def visual_lengths(self, images: list[Any]) -> list[int]:
        return [LENGTH] * len(images)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PromptProcessor:
    """`tokenizer.model` with LLaMA's pieces at LLaMA's places, as far as prompts need them."""
    model = sentencepiece.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    known = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3)}
    known |= {3 + byte: (f"<0x{byte:02X}>", 6) for byte in range(256)}
    known |= {place: (piece, 1) for place, piece in GOLDEN["pieces"]}
    for place in range(VOCABULARY):  # the earlier a piece, the earlier its merge; blanks come last
        piece, kind = known.get(place, (f"<unused{place}>", 5))
        blanks = len(piece) > 1 and set(piece) == {"\u2581"}
        model.pieces.add(piece=piece, type=kind, score=-1e9 if blanks else min(259.0 - place, 0.0))
    folder = tmp_path_factory.mktemp("llama")
    makers.write_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    makers.write_json(folder / "config.json", {"architectures": ["LlavaLlamaForCausalLM"]})
    tokenizer = load_tokenizer(Checkpoint(folder))
    bare = torch.nn.Module()
    bare.get_input_embeddings = lambda: torch.nn.Embedding(1, 1)  # type: ignore[assignment]
    bare.dtype = torch.float32  # type: ignore[assignment]
    made = Words(bare, tokenizer, None, IMAGE, "llava", "vicuna_v1")
    made.keep = bare  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("style", list(GOLDEN["prompts"]))
def test_ids_are_those_of_the_published_prompts(processor: PromptProcessor, style: str) -> None:
    for case in GOLDEN["prompts"][style]:
        # VLMEvalKit's message puts the picture's marker in the text; elsewhere it goes in front.
        text = f" <image> {case['question']}" if style == "vlmeval" else case["question"]
        inputs = processor.prompt(text, makers.photo(), style=style)
        expected = [*case["before"], *[IMAGE] * LENGTH, *case["behind"]]
        assert inputs["input_ids"][0].tolist() == expected, case["text"]


@pytest.mark.parametrize("style", ["vicuna_v1", "vlmeval"])
def test_35_tokens_precede_the_picture(processor: PromptProcessor, style: str) -> None:
    text = " <image> What?" if style == "vlmeval" else "What?"
    ids = processor.prompt(text, makers.photo(), style=style)["input_ids"][0].tolist()
    assert ids.index(IMAGE) == 35 and ids[0] == 1
    assert ids[35 + LENGTH] == 29871  # the blank that begins every piece of text
