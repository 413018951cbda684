"""InternVL in its published format: read into transformers' modules, or run by its own code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import InternVLForConditionalGeneration

import vlm_prune_ext as vp
from run_vlmeval import main
from tests import family_makers, makers
from tests.models import test_families as families
from vlm_prune_ext.commands import common
from vlm_prune_ext.experiment.settings import add_options
from vlm_prune_ext.models import parts_of

FASTV = vp.FastV(agg_layer=2, attention_rank=0.4)
TEXTS = families.TEXTS


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Checkpoint and the model that was saved there, by decoder; ``own``: one that only its own
    code can run."""
    found = {}
    for name in (*family_makers.CHAT_DECODERS, "own"):
        folder = tmp_path_factory.mktemp(name)
        decoder, more = (name, {}) if name != "own" else ("LlamaForCausalLM", {"ps_version": "v1"})
        found[name] = folder, family_makers.internvl_chat(folder, decoder, **more)
    return found


def load_form(name: str, folder: Path, attention: str = "sdpa") -> families.Form:
    model, processor = vp.load(folder, attn_implementation=attention, trust_remote_code=True)
    families.never_ending(model)
    return families.Form(name, folder, model, processor)


@pytest.fixture(scope="module", params=(*family_makers.CHAT_DECODERS, "own"))
def form(request: pytest.FixtureRequest, made: dict[str, tuple[Path, Any]]) -> families.Form:
    return load_form(request.param, made[request.param][0])


def widened(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, count), value=1)


# --------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", family_makers.CHAT_DECODERS)
def test_logits_are_those_of_the_published_interface(name: str, made: dict[str, Any]) -> None:
    folder, reference = made[name]
    form = load_form(name, folder)
    assert isinstance(form.model, InternVLForConditionalGeneration)
    inputs = form.inputs([0, 1, 2])
    real = inputs["attention_mask"].bool()
    ours, theirs = form.model(**inputs).logits, reference(**inputs).logits
    assert theirs[real].std() > 0.5
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
    tokens, _ = form.generate(inputs)
    for step in range(families.STEPS):  # the reference chooses the same words, without a cache
        assert torch.equal(theirs[:, -1].argmax(-1), tokens[:, step])
        new = tokens[:, step : step + 1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(
            inputs["attention_mask"], (0, 1), value=1
        )
        theirs = reference(**inputs).logits


def test_prompts_are_those_of_the_published_code(made: dict[str, Any]) -> None:
    """Template, tiles, tokens of a tile, and InternLM2's words as sentencepiece makes them."""
    folder, reference = made["InternLM2ForCausalLM"]
    _, processor = vp.load(folder, trust_remote_code=True)
    tokenizer, image = processor.tokenizer, makers.photo(112, 56)
    ids = processor.prompt("Où est  le chat?", image)["input_ids"][0].tolist()
    said = tokenizer.decode(ids).replace("<IMG_CONTEXT>", "")
    assert said.startswith("<s><|im_start|>system\n你是由")
    assert said.endswith(
        "。<|im_end|><|im_start|>user\n<img></img>\nOù est  le chat?<|im_end|>"
        "<|im_start|>assistant\n"
    )
    tiles = 2 + 1  # side by side, and the whole image behind them
    assert ids.count(reference.img_context_token_id) == tiles * reference.num_image_token
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("What colour is the cat?", " two  blanks ", "日本 é\n\nnew line", "A.B,c!"):
        assert tokenizer(text, add_special_tokens=False).input_ids == plain.encode(text)
        assert tokenizer.decode(plain.encode(text)) == text
    stored = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(stored) == 8
    for place, entry in stored.items():
        assert tokenizer.convert_tokens_to_ids(entry["content"]) == int(place)
        assert tokenizer(entry["content"], add_special_tokens=False).input_ids == [int(place)]


def test_answers_end_with_the_turn(made: dict[str, Any]) -> None:
    for name in ("InternLM2ForCausalLM", "own"):
        model, processor = vp.load(made[name][0], trust_remote_code=True)
        stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert model.generation_config.eos_token_id == stop
        inner = model.language_model if name == "own" else model
        assert inner.generation_config.eos_token_id == stop


def test_a_batch_equals_singles(form: families.Form) -> None:
    """Several tiles, two images and none."""
    pictures = makers.photos(3)
    images = [[pictures[0], pictures[1]], [], [pictures[2]]]
    tokens, logits = form.generate(form.processor.batch(TEXTS, images))
    for i in range(3):
        one_tokens, one_logits = form.generate(form.processor.prompt(TEXTS[i], images[i]))
        assert torch.equal(tokens[i], one_tokens[0])
        torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("name", families.METHODS)
def test_pruning(form: families.Form, name: str) -> None:
    """Keep-all changes nothing; counts are exact; what stays is what the masked model has."""
    inputs = form.inputs([0, 1, 2])
    plain = form.generate(inputs)
    with vp.prune(form.model, families.KEEP_ALL[name]):
        everything = form.generate(inputs)
    assert torch.equal(everything[0], plain[0]) and torch.equal(everything[1], plain[1])
    with vp.prune(form.model, families.METHODS[name]) as trace:
        placeholder = [form.processor.image_token_id]  # its place would be taken for an image's
        tokens, logits = form.generate(inputs, suppress_tokens=placeholder)
        families.check_counts(name, trace)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
    families.check_text_stays(form, inputs, kept)
    more = tokens[:, :-1]
    with families.HiddenKeys(form.model, kept):
        given = {
            "pixel_values": inputs["pixel_values"],
            "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
            "attention_mask": widened(inputs["attention_mask"], more.shape[1]),
        }
        if form.name == "own":  # `generate` of transformers states positions, its forward does not
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        reference = form.model(**given, use_cache=False).logits
    prompt = inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits, reference[:, prompt - 1 :], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, plain[1], atol=1e-3)


def test_every_attention_of_its_own_code(made: dict[str, Any]) -> None:
    expected = None
    for attention in ("sdpa", "eager"):
        form = load_form("own", made["own"][0], attention)
        assert type(form.model).__module__.startswith("transformers_modules")
        with vp.prune(form.model, FASTV):
            logits = form.generate(form.inputs([0, 1, 2]))[1]
        if expected is not None:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        expected = logits


def test_through_the_evaluation_layer(form: families.Form) -> None:
    from vlm_prune_ext.evals.answer import Answerer, Query

    queries = [Query(TEXTS[i], [makers.photos(3)[i]], max_new_tokens=4) for i in range(3)]
    answers = Answerer(form.model, form.processor, FASTV).answer(queries)
    counts = form.processor.count_visual_tokens(form.inputs([0, 1, 2]))
    assert [answer.visual_tokens for answer in answers] == counts
    assert [answer.visual_kept[2] for answer in answers] == [round(0.4 * n) for n in counts]


def test_tower_methods_say_why_not(form: families.Form) -> None:
    with (
        pytest.raises(vp.InputError, match=r"is not CLIP-like"),
        vp.prune(form.model, vp.SAINT(vit=vp.SAINTViT(layers=(1,)), start=None)),
    ):
        pass


def test_a_live_model_that_is_built_otherwise(made: dict[str, Any]) -> None:
    with pytest.raises(vp.InputError, match=r"InternLM2 inside InternVLChatModel is not built"):
        parts_of(made["InternLM2ForCausalLM"][1])


# ------------------------------------------------------------------------------- bad input


def test_only_where_the_user_says_so(made: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    folder = made["InternLM2ForCausalLM"][0]
    said = r"trust_remote_code=True \(--trust-remote-code\).*-hf"
    with pytest.raises(vp.InputError, match=said):
        vp.load(folder)
    with pytest.raises(vp.InputError, match="trust_remote_code='yes' is not valid: True or False"):
        vp.load(folder, trust_remote_code="yes")
    parser = argparse.ArgumentParser()
    add_options(parser, of=common.MethodSettings)
    words = ["--model-path", str(folder), "--device", "cpu"]
    with pytest.raises(vp.InputError, match=said):
        common.load_model(parser.parse_args(words))
    model, _ = common.load_model(parser.parse_args([*words, "--trust-remote-code"]))
    assert isinstance(model, InternVLForConditionalGeneration)
    pytest.importorskip("vlmeval")
    assert main([*words, "--data", "Shapes_YN", "--work-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--trust-remote-code" in told and "-hf" in told


def test_launchers_refuse_before_they_start(made: dict[str, Any], capsys: Any) -> None:
    pytest.importorskip("lmms_eval")
    from vlm_prune_ext.evals import lmms_launch

    settings = {"pretrained": str(made["InternLM2ForCausalLM"][0]), "method": "fastv"}
    with pytest.raises(vp.InputError, match="--trust-remote-code"):
        lmms_launch._check_checkpoint("vlm_prune", settings)
    settings["trust_remote_code"] = "true"
    lmms_launch._check_checkpoint("vlm_prune", settings)
    with pytest.raises(vp.InputError, match=r"agg_layer=9 is not valid.*a model of 4 layers"):
        lmms_launch._check_checkpoint("vlm_prune", {**settings, "agg_layer": "9"})


def test_both_frameworks(made: dict[str, Any], tmp_path: Path) -> None:
    """VLMEvalKit by its command line, scores and all; lmms-eval by its model_args."""
    pytest.importorskip("vlmeval")
    pytest.importorskip("lmms_eval")
    from vlm_prune_ext.evals import lmms

    folder = made["InternLM2ForCausalLM"][0]
    words = ["--model-path", str(folder), "--data", "Shapes_YN", "--work-dir", str(tmp_path)]
    words += ["--limit", "2", "--method", "fastv:3", "--set", "agg_layer=2", "--device", "cpu"]
    assert main([*words, "--trust-remote-code"]) == 0
    (record,) = tmp_path.rglob("*_results.json")
    record = json.loads(record.read_text())
    assert record["config"]["trust_remote_code"] is True and record["samples"] == 2
    text = f"pretrained={folder},device=cpu,agg_layer=2,attention_rank=3"
    sizes = {"batch_size": 1, "device": None}
    with pytest.raises(vp.InputError, match="--trust-remote-code"):
        lmms.LlavaFastvChat.create_from_arg_string(text, sizes)
    model = lmms.LlavaFastvChat.create_from_arg_string(f"{text},trust_remote_code=true", sizes)
    assert model.answerer.processor.family == "internvl_chat"


def edit(folder: Path, target: Path, **fields: Any) -> Path:
    return families.edit_config(folder, target, **fields)


def test_settings_that_are_not_known(made: dict[str, Any], tmp_path: Path) -> None:
    folder = made["LlamaForCausalLM"][0]
    text = json.loads((folder / "config.json").read_text())["llm_config"]
    text["architectures"] = ["Phi3ForCausalLM"]
    cases = {
        r"llm_config\.architectures='Phi3ForCausalLM' .*InternLM2ForCausalLM": {"llm_config": text},
        r"ps_version='v1' .*accepted: v2\.": {"ps_version": "v1"},
        r"template='vicuna' .*internvl2_5": {"template": "vicuna"},
        r"has no vision_config": {"vision_config": None},
        r"force_image_size=56 .*accepted: 28": {"force_image_size": 56},
    }
    for place, (said, fields) in enumerate(cases.items()):
        broken = edit(folder, tmp_path / str(place), auto_map={}, **fields)
        with pytest.raises(vp.InputError, match=said):
            vp.load(broken, trust_remote_code=True)


def test_code_that_does_not_run(made: dict[str, Any], tmp_path: Path) -> None:
    broken = edit(made["own"][0], tmp_path / "x")
    (broken / "modeling_internvl_chat.py").write_text("raise RuntimeError('made for 4.37')\n")
    with pytest.raises(vp.InputError) as told:
        vp.load(broken, trust_remote_code=True)
    said = str(told.value)
    assert "made for 4.37" in said and "ps_version='v1'" in said and "-hf" in said
    assert said.count("\n") == 0


def test_tokenizer_that_does_not_fit(made: dict[str, Any], tmp_path: Path) -> None:
    folder = edit(made["InternLM2ForCausalLM"][0], tmp_path / "x")
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    stored["added_tokens_decoder"]["999"] = {"content": "<far>"}
    path.write_text(json.dumps(stored))
    with pytest.raises(vp.InputError, match=r"puts '<far>' at 999, but the vocabulary"):
        vp.load(folder, trust_remote_code=True)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(vp.InputError, match=r"no tokenizer"):
        vp.load(folder, trust_remote_code=True)
