"""One checkpoint three ways (native loader, `llava` package, Hugging Face): same pixels, same
prompt ids, same logits. Storage layouts, LLaVA-NeXT, conversion, prompts, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchEncoding,
    CLIPVisionModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import vlm_prune_ext as vp
from tests import makers
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import PromptProcessor, load, parts_of
from vlm_prune_ext.models.convert import convert_to_hf
from vlm_prune_ext.models.images import open_image
from vlm_prune_ext.models.prompts import STYLES

VOCAB = makers.VOCAB
QUESTIONS = makers.QUESTIONS
STYLE_NAMES = ("vicuna_v1", "vlmeval", "plain")
Loaded = tuple[Any, PromptProcessor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that tests only read."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "original": makers.tiny_original(root / "original", tower="folder"),
        "hf": makers.tiny_hf_llava(root / "hf"),
        "next-vicuna": makers.tiny_next(root / "nv", "vicuna", "original", tower="folder"),
        "next-vicuna-hf": makers.tiny_next(root / "nvh", "vicuna", "hf"),
        "next-mistral": makers.tiny_next(root / "nm", "mistral", "original", tower="folder"),
        "next-mistral-hf": makers.tiny_next(root / "nmh", "mistral", "hf"),
    }


@pytest.fixture(scope="module")
def original(folders: dict[str, Path]) -> Loaded:
    return load(folders["original"], device="cpu")


@pytest.fixture(scope="module")
def converted(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_to_hf(folders["original"], tmp_path_factory.mktemp("out") / "converted")


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generate(model: Any, inputs: Any, tokens: int = 8, **more: Any) -> torch.Tensor:
    return model.generate(**inputs, **more, max_new_tokens=tokens, do_sample=False)


def collapsed(ids: list[int], image: int) -> list[int]:
    """Ids with each run of placeholders as one -200, the way the `llava` package writes it."""
    out: list[int] = []
    for token in ids:
        if token == image:
            token = -200
            if out and out[-1] == -200:
                continue
        out.append(token)
    return out


# --------------------------------------------------------------- against the llava package


class Sentencepiece:
    """The tokenizer that LLaVA ran with: sentencepiece itself. transformers' reading of the same
    file joins runs of blanks first and leaves out the blank in front of another one."""

    bos_token_id = 1

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def __call__(self, text: str) -> BatchEncoding:
        return BatchEncoding({"input_ids": [self.bos_token_id, *self.pieces.encode(text)]})


class Package:
    """A checkpoint in the `llava` package, asked with its own functions."""

    def __init__(self, folder: Path) -> None:
        _, self.model, self.image_processor = makers.llava_package_model(folder)
        self.tokenizer = Sentencepiece(folder / "tokenizer.model")

    def inputs(self, text: str, images: list[Any]) -> dict[str, Any]:
        from llava.mm_utils import process_images, tokenizer_image_token

        ids = tokenizer_image_token(text, self.tokenizer, -200, return_tensors="pt")
        pixels = process_images(images, self.image_processor, self.model.config)
        sizes = [image.size for image in images]
        return {"input_ids": ids[None], "images": pixels, "image_sizes": sizes}

    def generate(self, inputs: dict[str, Any]) -> torch.Tensor:
        given = dict(inputs)
        return generate(self.model, given | {"inputs": given.pop("input_ids")}, pad_token_id=0)


@pytest.fixture(scope="module", params=["original", "next-vicuna", "next-mistral"])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Loaded, Package]:
    pytest.importorskip("llava")
    folder = folders[request.param]
    return load(folder, device="cpu"), Package(folder)


def test_pixels_ids_logits_and_text_equal_the_llava_package(pair: tuple[Loaded, Package]) -> None:
    (model, processor), package = pair
    styles = dict.fromkeys((processor.default_style, *STYLE_NAMES))
    for index, image in enumerate(makers.photos(4)):
        for style in styles:
            question = QUESTIONS[index]
            inputs = processor.prompt(question, image, style=style)
            theirs = package.inputs(STYLES[style].single(question, 1), [image])
            assert torch.equal(inputs["pixel_values"], theirs["images"])
            own = collapsed(inputs["input_ids"][0].tolist(), processor.image_token_id)
            assert own == theirs["input_ids"][0].tolist()
            expected = logits(package.model, theirs)
            assert torch.equal(logits(model, inputs), expected)
            assert expected.std() > 1
        answer = processor.decode(generate(model, inputs), inputs)
        assert answer == processor.decode(package.generate(theirs), theirs)


def test_several_images_equal_the_llava_package(pair: tuple[Loaded, Package]) -> None:
    (model, processor), package = pair
    images = makers.photos(3)
    if any(image.size != images[0].size for image in images) and processor.family != "llava":
        images = [makers.photo(90, 60, seed) for seed in range(3)]  # the package stacks tiles
    for text in ("<image><image>\nFirst <image> what?", "Where <image> or <image> and <image>"):
        inputs = processor.prompt(text, images)
        theirs = package.inputs(STYLES[processor.default_style].single(text, 3), images)
        assert torch.equal(logits(model, inputs), logits(package.model, theirs))


def test_package_batch_equals_ours(folders: dict[str, Path], original: Loaded) -> None:
    pytest.importorskip("llava")
    model, processor = original
    package = Package(folders["original"])
    package.model.config.tokenizer_padding_side = "left"
    images = makers.photos(2)
    inputs = processor.batch(QUESTIONS[:2], [[image] for image in images])
    texts = [STYLES["vicuna_v1"].single(question, 1) for question in QUESTIONS[:2]]
    singles = [package.inputs(text, [image]) for text, image in zip(texts, images, strict=True)]
    width = max(single["input_ids"].shape[1] for single in singles)
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        ids[row, width - length :] = single["input_ids"][0]
        mask[row, width - length :] = 1
    pixels = torch.cat([single["images"] for single in singles])
    given = {"images": pixels, "attention_mask": mask}
    ours = generate(model, inputs)
    theirs = generate(package.model, given | {"inputs": ids}, pad_token_id=0)
    assert processor.decode(ours, inputs) == processor.decode(theirs, {})
    with torch.no_grad():
        expected = package.model(input_ids=ids, **given).logits
    real = inputs["attention_mask"].bool()
    assert (logits(model, inputs)[real] - expected[real]).abs().max() < 1e-4


# ------------------------------------------------------------------- spans in live models


def watched(model: Any, call: Any) -> list[tuple[torch.Tensor, Any]]:
    """What the adapter reports while `call()` runs."""
    seen: list[tuple[torch.Tensor, Any]] = []
    watch = parts_of(model).watch_spans
    assert watch is not None
    undos = watch(lambda mask, lengths: seen.append((mask.cpu(), lengths)))
    try:
        call()
    finally:
        for undo in undos:
            undo()
    return seen


@pytest.mark.parametrize("name", ["original", "hf", "next-vicuna", "next-mistral-hf"])
def test_each_prefill_reports_its_spans_and_no_decode_step(
    folders: dict[str, Path], name: str
) -> None:
    model, processor = load(folders[name], device="cpu")
    images = makers.photos(3)
    texts = ["<image><image> which?", "What?", "<image> x"]
    inputs = processor.batch(texts, [images[:2], [], images[2:]])
    seen = watched(model, lambda: [generate(model, inputs) for _ in range(2)])
    assert len(seen) == 2
    for mask, lengths in seen:
        assert torch.equal(mask, inputs["input_ids"] == processor.image_token_id)
        assert [sum(own) for own in lengths] == processor.count_visual_tokens(inputs)
        assert [len(own) for own in lengths] == [2, 0, 1]
    assert not model.model._forward_pre_hooks
    text_only = processor.prompt("What?")
    seen = watched(model, lambda: logits(model, text_only))
    assert len(seen) == 1 and not seen[0][0].any()


def test_spans_are_found_in_given_embeddings(original: Loaded) -> None:
    model, processor = original
    inputs = processor.prompt("What?", makers.photo())
    expected = inputs["input_ids"] == processor.image_token_id
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    [(mask, _)] = watched(model, lambda: logits(model, {**inputs, "inputs_embeds": embeds}))
    assert torch.equal(mask, expected)


def test_package_spans_and_results(pair: tuple[Loaded, Package]) -> None:
    (_, processor), package = pair
    model, name = package.model, "prepare_inputs_labels_for_multimodal"
    images = [makers.photo(90, 60, seed) for seed in range(3)]
    text = "a <image><image> b <image> c"
    inputs = package.inputs(text, images)
    expected = processor.prompt(text, images, style="plain")
    mask_expected = expected["input_ids"] == processor.image_token_id
    before = logits(model, inputs)
    after: list[torch.Tensor] = []
    [(mask, lengths)] = watched(model, lambda: after.append(logits(model, inputs)))
    assert torch.equal(mask, mask_expected)
    assert [len(own) for own in lengths] == [3] and sum(lengths[0]) == mask.sum()
    assert torch.equal(before, after[0])
    assert name not in vars(model)
    assert len(watched(model, lambda: package.generate(inputs))) == 1


def test_package_labels_and_padding_come_back_as_ever(folders: dict[str, Path]) -> None:
    pytest.importorskip("llava")
    model, name = Package(folders["original"]).model, "prepare_inputs_labels_for_multimodal"
    ids = torch.tensor([[1, -200, 300, 301], [1, 300, -200, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 300, 301], [-100, 300, -100, -100]])
    images = torch.randn(2, 3, 56, 56)
    for given_mask in (None, mask):
        for given_labels in (None, labels):
            call = (ids, None, given_mask, None, given_labels, images)
            plain = model.prepare_inputs_labels_for_multimodal(*call)
            results: list[Any] = []
            seen = watched(model, lambda c=call, r=results: r.append(getattr(model, name)(*c)))
            for one, other in zip(plain, results[0], strict=True):
                same = torch.equal(one, other) if torch.is_tensor(one) else one is other
                assert same
            assert seen[0][0].sum(dim=1).tolist() == [16, 16]
            assert seen[0][1] == [[16], [16]]
    # Unequal lengths and no mask: padding must not be taken for visual tokens, and is masked.
    uneven = torch.tensor([[1, -200, 300, -200], [1, 300, -200, 301]])
    results = []
    call = (uneven, None, None, None, None, torch.randn(3, 3, 56, 56))
    seen = watched(model, lambda: results.append(getattr(model, name)(*call)))
    assert seen[0][0].sum(dim=1).tolist() == [32, 16]
    assert results[0][2].sum(dim=1).tolist() == [34, 19]


# --------------------------------------------------------------------- Hugging Face format


def test_three_formats_agree(original: Loaded, folders: dict[str, Path], converted: Path) -> None:
    model, processor = original
    others = [load(folders["hf"], device="cpu"), load(converted, device="cpu")]
    images = makers.photos(4)
    for style in STYLE_NAMES:
        inputs = processor.batch(QUESTIONS[2:], [images[:1], images[1:3]], style=style)
        expected = logits(model, inputs)
        for other, other_processor in others:
            same = other_processor.batch(QUESTIONS[2:], [images[:1], images[1:3]], style=style)
            real = inputs["attention_mask"].bool()  # the filling token has another id there
            assert torch.equal(inputs["input_ids"][real], same["input_ids"][real])
            assert torch.equal(inputs["attention_mask"], same["attention_mask"])
            assert torch.equal(inputs["pixel_values"], same["pixel_values"])
            found = logits(other, same)[..., :VOCAB]
            assert (found - expected)[real].abs().max() < 1e-4
            answers = processor.decode(generate(model, inputs), inputs)
            assert other_processor.decode(generate(other, same), same) == answers


def test_text_that_spells_a_placeholder(folders: dict[str, Path]) -> None:
    _, processor = load(folders["hf"], device="cpu")
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("</s>")
    with pytest.raises(InputError, match=r"The text contains '</s>', which stands for a part of"):
        processor.prompt("What </s> is this?", makers.photo())


def test_published_form_of_tokenizer_json_gives_the_same_ids(
    original: Loaded, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Published conversions carry a `tokenizer.json` of older transformers: with a normalizer
    that puts a blank in front of each text, and nothing that splits it."""
    folder = shutil.copytree(folders["hf"], tmp_path / "published")
    stored = json.loads((folder / "tokenizer.json").read_text())
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    stored["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    stored["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    _, processor = load(folder, device="cpu")
    for style in STYLE_NAMES:
        for text in ("Why?", "a <image> b\n\n<image>", " two  blanks "):
            images = [makers.photo()] * max(1, text.count("<image>"))
            found = processor.prompt(text, images, style=style)["input_ids"]
            assert torch.equal(found, original[1].prompt(text, images, style=style)["input_ids"])


@pytest.mark.parametrize("name", ["original", "next-vicuna", "next-mistral"])
def test_conversion_loads_in_plain_transformers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = load(folders[name], device="cpu")
    target = convert_to_hf(folders[name], tmp_path / "converted")
    plain: Any = AutoModelForImageTextToText.from_pretrained(target)
    hf_processor: Any = AutoProcessor.from_pretrained(target)
    hf_processor.tokenizer.padding_side = "left"
    for question, image in zip(QUESTIONS, makers.photos(4), strict=True):
        item = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": item}]
        text = hf_processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == processor.styles[processor.default_style].single(question, 1)
        theirs = hf_processor(images=image, text=text, return_tensors="pt")
        inputs = processor.prompt(question, image)
        assert torch.equal(theirs["input_ids"], inputs["input_ids"])
        if name == "original":  # transformers tiles and resizes in another order than LLaVA-1.6
            assert torch.equal(theirs["pixel_values"], inputs["pixel_values"])
        found = logits(plain, inputs)
        assert torch.equal(found[..., :VOCAB], logits(model, inputs))
        assert (found[..., VOCAB:] <= found[..., :1]).all()
        assert torch.equal(generate(plain, inputs), generate(model, inputs))


def published_names(layers: int, tower_layers: int, next_too: bool) -> set[str]:
    """Weights of a checkpoint as llava-hf published them (llava-1.5-7b-hf, llava-v1.6-*-hf)."""
    text, tower = "language_model.model.", "vision_tower.vision_model."
    names = {"language_model.lm_head.weight", f"{text}embed_tokens.weight", f"{text}norm.weight"}
    names |= {"image_newline"} if next_too else set()
    for layer in range(layers):
        names |= {f"{text}layers.{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        names |= {f"{text}layers.{layer}.self_attn.{p}_proj.weight" for p in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"{text}layers.{layer}.{norm}.weight" for norm in norms}
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    names |= {f"{tower}embeddings.{name}" for name in embeddings}
    pairs = [f"multi_modal_projector.linear_{n}" for n in (1, 2)]
    pairs += [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    for layer in range(tower_layers):
        inside = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        inside += tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
        pairs += [f"{tower}encoder.layers.{layer}.{name}" for name in inside]
    return names | {f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["original", "next-vicuna", "next-mistral"])
def test_conversion_writes_the_published_names(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What other engines look for; and our own loader reads it back, weight for weight."""
    folder = convert_to_hf(folders[name], tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = set(file.keys())
    model, _ = load(folder, device="cpu")
    layers, tower = model.config.text_config, model.config.vision_config
    counts = (layers.num_hidden_layers, tower.num_hidden_layers)
    assert written == published_names(*counts, name.startswith("next"))
    before = load(folders[name], device="cpu")[0].state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value[: len(before[key])], before[key][: len(value)])


def test_conversion_template_takes_every_form_of_chat(converted: Path, original: Loaded) -> None:
    hf_processor: Any = AutoProcessor.from_pretrained(converted)
    chat = [
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'a "b"\n{}'}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    text = hf_processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == 'Be short. USER: <image>\na "b"\n{} ASSISTANT: c</s>USER: d ASSISTANT:'
    chat[1]["content"][0]["image"] = makers.photo()
    assert original[1].messages(chat)[0] == text


def test_conversion_keeps_or_changes_the_stored_type(tmp_path: Path) -> None:
    source = makers.tiny_original(tmp_path / "half", dtype=torch.float16, layers=1)
    for dtype, stored in ((None, "float16"), ("bfloat16", "bfloat16")):
        target = convert_to_hf(source, tmp_path / stored, dtype=dtype)
        assert json.loads((target / "config.json").read_text())["dtype"] == stored
    assert not list(tmp_path.glob(".convert-*"))
    with pytest.raises(InputError, match="new or empty"):
        convert_to_hf(source, target)
    with pytest.raises(InputError, match="original format"):
        convert_to_hf(target, tmp_path / "again")


# ------------------------------------------------------------------------ storage layouts


@pytest.mark.parametrize("tower", ["inside", "folder"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_all_layouts_load_equal(
    kind: Any, sharded: bool, tower: Any, original: Loaded, tmp_path: Path
) -> None:
    folder = makers.tiny_original(tmp_path / "x", weights=kind, sharded=sharded, tower=tower)
    model, _ = load(folder, device="cpu")
    expected = original[0].state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_old_files_with_buffers_and_a_whole_clip_load(original: Loaded, tmp_path: Path) -> None:
    folder = makers.tiny_original(
        tmp_path / "x", weights="bin", tower="folder", model_type="llava", pad_token_id=-1
    )
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    vision = makers.tower_weights(image_size=56, patch=14)
    vision["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    vision["text_model.final_layer_norm.weight"] = torch.ones(4)
    (folder / "vision_tower" / "model.safetensors").unlink()
    torch.save(vision, folder / "vision_tower" / "pytorch_model.bin")
    inner = json.loads((folder / "vision_tower" / "config.json").read_text())
    whole = {"model_type": "clip", "vision_config": inner}
    (folder / "vision_tower" / "config.json").write_text(json.dumps(whole))
    model, processor = load(folder, device="cpu")
    inputs = processor.prompt("What?", makers.photo())
    assert torch.equal(logits(model, inputs), logits(original[0], inputs))
    assert processor.tokenizer("x y").input_ids == original[1].tokenizer("x y").input_ids


def test_tower_is_found_by_path_and_by_known_name(
    original: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = original[1].prompt("What?", makers.photo())
    away = makers.tiny_original(tmp_path / "away", tower="folder")
    shutil.move(away / "vision_tower", tmp_path / "my_tower")
    config = json.loads((away / "config.json").read_text())
    for name in (str(tmp_path / "my_tower"), "my_tower"):
        (away / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
        monkeypatch.chdir(tmp_path)
        assert torch.equal(logits(load(away, device="cpu")[0], inputs), logits(original[0], inputs))
    from vlm_prune_ext.models import original as module

    known = "openai/clip-vit-large-patch14-336"
    sizes = makers.vision_config(56, 14)
    monkeypatch.setattr(module, "KNOWN_TOWERS", {known: sizes})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    inside = makers.tiny_original(tmp_path / "inside", mm_vision_tower=known)
    shutil.rmtree(inside / "vision_tower")
    model, processor = load(inside, device="cpu")
    again = processor.prompt("What?", makers.photo())
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    assert torch.equal(logits(model, inputs), logits(original[0], inputs))


@pytest.mark.parametrize("name", ["original", "hf", "next-mistral"])
def test_dtype_attention_and_device_map_are_passed_on(name: str, folders: dict[str, Path]) -> None:
    model, processor = load(
        folders[name], dtype="bfloat16", device="cpu", attn_implementation="eager"
    )
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "eager"
    inputs = processor.prompt("What?", makers.photo())
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert logits(model, inputs).isfinite().all()
    assert not model.training
    automatic, _ = load(folders[name], dtype=torch.float32, device_map="auto")
    assert next(automatic.parameters()).device.type in ("cpu", "cuda")


def test_default_type_on_a_cpu_is_float32(tmp_path: Path) -> None:
    folder = makers.tiny_original(tmp_path, dtype=torch.float16, layers=1)
    assert load(folder, device="cpu")[0].dtype == torch.float32
    assert load(folder, device="cpu", dtype="auto")[0].dtype == torch.float16


# ----------------------------------------------------------------------------- LLaVA-NeXT


@pytest.mark.parametrize("backbone", ["vicuna", "mistral"])
def test_next_formats_agree_and_batches_equal_singles(
    backbone: str, folders: dict[str, Path]
) -> None:
    model, processor = load(folders[f"next-{backbone}"], device="cpu")
    other, other_processor = load(folders[f"next-{backbone}-hf"], device="cpu")
    assert processor.default_style == other_processor.default_style
    images, texts = makers.photos(3), list(QUESTIONS[:3])
    batch = processor.batch(texts, [[image] for image in images])
    same = other_processor.batch(texts, [[image] for image in images])
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][real], same["input_ids"][real])
    assert torch.equal(batch["pixel_values"], same["pixel_values"])
    assert torch.equal(batch["image_sizes"], same["image_sizes"])
    whole = logits(model, batch)
    assert (logits(other, same)[..., :VOCAB] - whole)[real].abs().max() < 1e-4
    assert len(set(processor.count_visual_tokens(batch))) == 3
    answers = processor.decode(generate(model, batch), batch)
    assert other_processor.decode(generate(other, same), same) == answers
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        single = processor.prompt(text, image)
        alone = logits(model, single)[0]
        assert (whole[row, real[row]] - alone).abs().max() < 1e-4
        assert processor.decode(generate(model, single), single) == [answers[row]]


def test_next_counts_what_the_model_packs(folders: dict[str, Path]) -> None:
    model, processor = load(folders["next-vicuna-hf"], device="cpu")
    for index in range(40):
        image = makers.photo(20 + 37 * index % 211, 20 + 53 * index % 197, seed=index)
        inputs = processor.prompt("x", image)
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        assert [len(f) for f in features.pooler_output] == processor.count_visual_tokens(inputs)


# --------------------------------------------------------------------------------- prompts


def test_prompts_read_as_the_originals_do(original: Loaded) -> None:
    _, processor = original
    curious = (
        "A chat between a curious {0} and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the {0}'s questions. "
    )
    user, human = curious.format("user"), curious.format("human")
    single = {name: style.single("Why?", 1) for name, style in STYLES.items()}
    assert single["vicuna_v1"] == user + "USER: <image>\nWhy? ASSISTANT:"
    assert single["vlmeval"] == human + "USER:  <image> Why? ASSISTANT: "
    assert single["mistral_instruct"] == "[INST] <image>\nWhy? [/INST]"
    assert single["plain"] == "<image>\nWhy?"
    placed = "Is <image> like <image>?"
    assert STYLES["vicuna_v1"].single(placed, 2) == user + f"USER: {placed} ASSISTANT:"
    assert processor.family == "llava" and processor.default_style == "vicuna_v1"


def test_conversations_equal_the_llava_package() -> None:
    conversation = pytest.importorskip("llava.conversation")
    for name in ("vicuna_v1", "mistral_instruct"):
        theirs = conversation.conv_templates[name].copy()
        for role, said in zip((0, 1, 0, 1), ("<image>\nq1", "a1", "q2", None), strict=True):
            theirs.append_message(theirs.roles[role], said)
        chat = [
            {"role": "user", "content": [_image(), {"type": "text", "text": "q1"}]},
            {"role": "assistant", "content": "a1"},
            {"role": "user", "content": [{"type": "text", "value": "q2"}]},
        ]
        holder = PromptProcessor.__new__(PromptProcessor)
        holder.styles, holder.default_style = STYLES, name
        text, images = holder.messages(chat)
        assert text == theirs.get_prompt() and len(images) == 1


def _image() -> dict[str, Any]:
    return {"type": "image", "image": makers.photo()}


def test_messages_make_the_same_inputs_as_prompt(original: Loaded) -> None:
    _, processor = original
    for style in ("vicuna_v1", "vlmeval"):
        chat = [{"role": "user", "content": [_image(), {"type": "text", "text": "Why?"}]}]
        text, images = processor.messages(chat, style=style)
        one = processor.prompt(text, images, style="plain")
        other = processor.prompt("Why?", makers.photo(), style=style)
        assert torch.equal(one["input_ids"], other["input_ids"])
    chat.append({"role": "assistant", "content": "The cat"})
    assert processor.messages(chat)[0].endswith("Why? ASSISTANT: The cat")


def test_batches_fill_on_the_left_and_equal_singles(original: Loaded) -> None:
    model, processor = original
    images = makers.photos(3)
    sets: list[list[Any]] = [[images[0]], [], images[1:]]
    batch = processor.batch(QUESTIONS[:3], sets)
    assert processor.count_visual_tokens(batch) == [16, 0, 32]
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    assert processor.pad_token_id != processor.image_token_id
    answers = processor.decode(generate(model, batch), batch)
    for row in range(3):
        single = processor.prompt(QUESTIONS[row], sets[row])
        assert ("pixel_values" in single) == bool(sets[row])
        assert processor.decode(generate(model, single), single) == [answers[row]]


def test_decoding_takes_prompt_or_new_tokens_only(original: Loaded) -> None:
    model, processor = original
    inputs = processor.prompt("What?", makers.photo())
    whole = generate(model, inputs)
    new = whole[:, inputs["input_ids"].shape[1] :]
    assert processor.decode(whole, inputs) == processor.decode(new, inputs) != [""]
    assert processor.decode(inputs["input_ids"], inputs) == [""]


def test_decoding_takes_what_generate_returns_however_asked(original: Loaded) -> None:
    model, processor = original
    inputs = processor.batch(["What?", "What is it?"], [makers.photo()] * 2)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    plain = model.generate(**inputs, **options)
    width = inputs["input_ids"].shape[1]
    texts = processor.decode(plain[:, width:], {})
    assert len(texts) == 6
    assert processor.decode(plain, inputs) == texts
    dict_output = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert processor.decode(dict_output, inputs) == texts
    for wrong in ("text", {"logits": plain}, plain[0]):
        with pytest.raises(InputError, match="what generate"):
            processor.decode(wrong, inputs)


def test_images_from_files_bytes_and_odd_modes(original: Loaded, tmp_path: Path) -> None:
    image = makers.photo()
    path = tmp_path / "a.png"
    image.save(path)
    expected = original[1].prompt("x", image)["pixel_values"]
    for form in (path, str(path), path.read_bytes()):
        assert torch.equal(original[1].prompt("x", form)["pixel_values"], expected)
    for mode in ("L", "RGBA", "P", "CMYK", "I;16", "1"):
        converted = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        assert open_image(converted).mode == "RGB"


# ---------------------------------------------------------------------------- live parts


def test_bare_models_have_parts(folders: dict[str, Path], original: Loaded) -> None:
    bare = makers.tiny_bare_llama()
    for model in (bare, bare.model, LlamaModel(bare.config)):
        parts = parts_of(model)
        assert len(parts.layers) == 6 and parts.watch_spans is None and parts.vision is None
    tower = CLIPVisionModel.from_pretrained(folders["original"] / "vision_tower")
    parts = parts_of(tower)
    assert parts.decoder is None and parts.vision is not None
    assert (parts.vision.feature_layer, parts.vision.grid) == (None, 4)
    inner = parts_of(original[0].model)
    assert inner.decoder is original[0].model.language_model and inner.vision is not None
    whole = parts_of(original[0])
    assert whole.decoder is original[0].model.language_model and whole.vision is not None
    assert whole.vision.feature_layer == makers.VISION_LAYERS - 2


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_projections_are_what_the_layers_compute(kv_heads: int) -> None:
    model = makers.tiny_bare_llama(kv_heads=kv_heads)
    parts, embeds = parts_of(model), torch.randn(2, 9, 64)
    caught: dict[str, Any] = {}

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.update(kwargs)

    handle = model.model.layers[2].self_attn.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
        handle.remove()
        attn, hidden = parts.layers[2].self_attn, caught["hidden_states"]
        assert parts.keys is not None and parts.queries is not None
        found = parts.keys(attn, hidden, caught["position_embeddings"])
        cos, sin = caught["position_embeddings"]
        last = parts.queries(attn, hidden[:, -1:], (cos[:, -1:], sin[:, -1:]))
        every = parts.queries(attn, hidden, (cos, sin))
    assert torch.allclose(found, cache.layers[2].keys, atol=1e-6)
    assert last.shape == (2, 4, 1, 16)
    assert torch.allclose(last, every[:, :, -1:], atol=1e-6)


# ------------------------------------------------------------------------------ bad input


def broken(folder: Path, **config: Any) -> Path:
    """A tiny checkpoint with fields of config.json changed; `None` takes one away."""
    makers.tiny_original(folder, layers=1)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {
        "nowhere/to/be/found": "does not exist",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "empty"): r"no config\.json",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            vp.load(name)
    (tmp_path / "empty" / "config.json").write_text("{broken")
    with pytest.raises(InputError, match="not valid JSON"):
        vp.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*Accepted: .*Llava"),
        ({"architectures": None}, "architecture None"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'.*accepted: 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"hidden_size": None}, "hidden_size"),
        ({"mm_vision_tower": "no_such_tower"}, "vision tower 'no_such_tower'"),
        ({"num_hidden_layers": 2}, r"lacks 9 weight\(s\): model\.language_model\.layers\.1"),
        ({"vocab_size": 500}, r"embed_tokens\.weight has shape \(480, 64\).*\(500, 64\)"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type='flat'"),
    ],
)
def test_wrong_configurations_are_named(
    config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        vp.load(broken(tmp_path / "x", **config))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    def fresh(name: str, **options: Any) -> Path:
        return makers.tiny_original(tmp_path / name, layers=1, **options)

    folder = fresh("a")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load(folder)
    folder = fresh("b")
    (folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"tokenizer .* cannot be read"):
        load(folder)
    folder = fresh("c")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        load(folder)
    folder = fresh("d", sharded=True, weights="bin")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match=r"is incomplete.*00002-of-00003"):
        load(folder)
    folder = fresh("e")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load(folder)
    folder = fresh("f", weights="bin")
    torch.save({"x": Path("code")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load(folder)
    folder = fresh("g")
    (folder / "vision_tower" / "config.json").unlink()
    with pytest.raises(InputError, match=r"vision tower .* no config\.json"):
        load(folder)
    folder = makers.tiny_hf_llava(tmp_path / "h", layers=1)
    (folder / "processor_config.json").unlink()
    with pytest.raises(InputError, match="no image processor"):
        load(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("clip_vision_model", "siglip_vision_model"))
    with pytest.raises(InputError, match=r"vision_config\.model_type='siglip_vision_model'"):
        load(folder)
    folder = fresh("i", tower="folder")
    (folder / "vision_tower" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="vision tower 'vision_tower' has no weights"):
        load(folder)
    folder = fresh("j", weights="bin")
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path) | {"model.odd": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"no module takes: model\.language_model\.odd"):
        load(folder)


def test_wrong_arguments_are_named(folders: dict[str, Path], original: Loaded) -> None:
    for arguments, sentence in (
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "cuda:77"}, "device='cuda:77'"),
        ({"attn_implementation": "fast"}, "attn_implementation='fast'.*sdpa"),
    ):
        with pytest.raises(InputError, match=sentence):
            load(folders["original"], **arguments)
    processor = original[1]
    image = makers.photo()
    with pytest.raises(InputError, match=r"2 <image> marker\(s\) and 1 image"):
        processor.prompt("<image> and <image>", image)
    with pytest.raises(InputError, match=r"1 <image> marker\(s\) and 2 image"):
        processor.prompt("<image>", [image, image])
    with pytest.raises(InputError, match=r"Unknown style 'vicuna_v2'.*'vicuna_v1'"):
        processor.prompt("x", style="vicuna_v2")
    with pytest.raises(InputError, match="lists of equal length"):
        processor.batch(["x"], [])
    with pytest.raises(InputError, match="Unknown role"):
        processor.messages([{"role": "bot", "content": "x"}])
    with pytest.raises(InputError, match="Unknown type of a message item"):
        processor.messages([{"role": "user", "content": [{"type": "smell"}]}])
    with pytest.raises(InputError, match="needs one of"):
        processor.messages([{"role": "user", "content": [{"type": "image"}]}])


def test_images_that_do_not_decode_are_named(
    original: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both evaluation frameworks set this for the whole process when they are imported.
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
    processor = original[1]
    path = tmp_path / "cut.png"
    makers.photo().save(path)
    path.write_bytes(path.read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    for image, sentence in (
        (path, r"cut\.png' does not decode"),
        (tmp_path / "text.png", r"text\.png' does not decode"),
        (b"\x89PNG\r\n", "does not decode"),
        (tmp_path / "none.png", "does not exist"),
        (3.5, "type float"),
    ):
        with pytest.raises(InputError, match=sentence):
            processor.prompt("x", image)


def test_models_that_cannot_be_pruned_are_named() -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match=r"encoder-decoder.*Accepted: LLaVA-1\.5"):
        parts_of(T5ForConditionalGeneration(config))
    with pytest.raises(InputError, match="Linear is not a model that can be pruned"):
        parts_of(torch.nn.Linear(2, 2))


def test_odd_values_in_files_are_named(
    folders: dict[str, Path], converted: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="checkpoint 5 is not valid"):
        load(5)  # type: ignore[arg-type]
    for field, value in (("mm_vision_tower", 5), ("num_attention_heads", 0)):
        folder = makers.tiny_original(tmp_path / field, layers=2, **{field: value})
        with pytest.raises(InputError, match=field):
            load(folder)
    folder = makers.tiny_original(tmp_path / "tower", layers=2)
    path = folder / "vision_tower" / "config.json"
    makers.write_json(path, json.loads(path.read_text()) | {"model_type": "siglip_vision_model"})
    with pytest.raises(InputError, match="model_type='siglip_vision_model'"):
        load(folder)
    folder = makers.tiny_original(tmp_path / "shards", layers=2, weights="bin", sharded=True)
    torch.save([1, 2], folder / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(InputError, match="a list, not tensors by name"):
        load(folder)
    makers.write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": 5}})
    with pytest.raises(InputError, match="weight_map"):
        load(folder)
    shutil.copytree(converted, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "hf")
