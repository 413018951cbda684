"""Families that are a line of the table: no file of ours knows them. Inputs are those of
transformers, what a drop leaves is what the unpruned model computes with the same tokens hidden."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen3_5 import modeling_qwen3_5

import vlm_prune_ext as vp
from tests import family_makers, makers
from tests.models import test_families as families
from tests.pruning_checks import fingerprint
from vlm_prune_ext.experiment import flops
from vlm_prune_ext.models import catalogue, parts_of
from vlm_prune_ext.models import families as all_families

METHODS = ("fastv", "himap", "saint", "random")
EXACT = {"atol": 1e-5, "rtol": 1e-5}


LINEAR = ("qwen3_5",)  # most layers carry a state on, which has no keys to hide
LOOSER = {"atol": 1e-4, "rtol": 1e-4}  # unpruned, too, a batch is 3e-5 from its singles


def scaled(values: torch.Tensor) -> dict[str, float]:
    """1e-5 of the largest value: weights are drawn so that hidden states reach 50 and more."""
    return {"atol": 1e-5 * float(values.abs().max()), "rtol": 0.0}


def exactly(form: families.Form) -> dict[str, float]:
    """How near a batch is to its singles, and a cached step to one without a cache."""
    return LOOSER if form.name in LINEAR else EXACT


@pytest.fixture(scope="module", params=family_makers.TABLE)
def form(request: pytest.FixtureRequest, folders: Any) -> families.Form:
    return families.load_form(request.param, folders[request.param])


@pytest.fixture(scope="module")
def baseline(form: families.Form) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return form.generate(form.inputs([0, 1, 2]))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_no_file_of_ours_knows_them() -> None:
    for name in family_makers.TABLE:
        assert catalogue.FAMILIES[name].home == "auto"
    for path in (Path(catalogue.__file__).parent).glob("*.py"):
        if path.name != "catalogue.py":
            text = path.read_text()
            assert not [k.name for k in family_makers.TABLE.values() if f"{k.name}For" in text], (
                path
            )


def test_inputs_and_answers_are_those_of_transformers(form: families.Form) -> None:
    families.check_inputs_and_answers(form, family_makers.TABLE[form.name])


@pytest.mark.parametrize("name", METHODS)
def test_kept_rows_are_those_of_the_masked_model(
    form: families.Form, baseline: Any, name: str
) -> None:
    """Prefill and cached decoding, to 1e-5, on a batch with padding; and a batch is its singles."""
    method, inputs = families.METHODS[name], form.inputs([0, 1, 2])
    with vp.prune(form.model, method) as trace, families.Recorder(form.model) as seen:
        tokens, logits = form.generate(inputs)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
    families.check_text_stays(form, inputs, kept)
    if form.name in LINEAR:
        check_cut_rows(form, kept, tokens, logits)
    else:
        with families.HiddenKeys(form.model, kept), families.Recorder(form.model) as masked:
            reference = families.forward(form, inputs, tokens[:, :-1])
        prompt = inputs["input_ids"].shape[1]
        last = families.last_kept(form, kept, prompt)
        families.compare_rows(seen.first, masked.first, last, inputs, **scaled(masked.first))
        torch.testing.assert_close(logits, reference[:, prompt - 1 :], **scaled(reference))
    assert not torch.allclose(logits, baseline[1], atol=1e-3)
    with vp.prune(form.model, method):
        one_tokens, one_logits = form.generate(form.inputs([1]))
        _, uncached = form.generate(form.inputs([1]), steps=1, use_cache=False)
    assert torch.equal(tokens[1], one_tokens[0])
    exact = exactly(form)
    torch.testing.assert_close(logits[1], one_logits[0], **exact)
    torch.testing.assert_close(uncached[0], one_logits[0, :1], **exact)


def check_cut_rows(form: families.Form, kept: Any, tokens: Any, logits: Any) -> None:
    """Each sample of a padded, cached batch equals the uncached model of that sample alone whose
    rows are cut by hand: the layers behind a drop run over what is left, states included."""
    width = form.inputs([0, 1, 2])["input_ids"].shape[1]
    for i in range(3):
        inputs = form.inputs([i])
        prompt = inputs["input_ids"].shape[1]
        own = {layer: rows[i] - (width - prompt) for layer, rows in kept.items()}
        own = {layer: rows[rows >= 0] for layer, rows in own.items()}
        with families.CutRows(form.model, own, prompt):
            alone = families.forward(form, inputs, tokens[i : i + 1, :-1])
        expected = alone[0, -tokens.shape[1] :]
        torch.testing.assert_close(logits[i], expected, **scaled(expected))


@pytest.mark.parametrize("name", METHODS)
def test_keep_all_is_the_baseline(form: families.Form, baseline: Any, name: str) -> None:
    with vp.prune(form.model, families.KEEP_ALL[name]):
        tokens, logits = form.generate(form.inputs([0, 1, 2]))
    assert torch.equal(tokens, baseline[0])
    assert torch.equal(logits, baseline[1])


def test_restored_after_an_exception(form: families.Form, baseline: Any) -> None:
    def fail(*_: object) -> None:
        raise KeyError

    def state() -> Any:  # but for the offsets that Qwen's models note at every call
        found = fingerprint(form.model).items()
        return {
            name: (value[0], {k: v for k, v in value[1].items() if k != "rope_deltas"}, *value[2:])
            for name, value in found
        }

    before = state()
    layers: Any = parts_of(form.model).layers
    with pytest.raises(KeyError), vp.prune(form.model, families.METHODS["fastv"]):
        handle = layers[-1].mlp.register_forward_pre_hook(fail)
        try:
            form.generate(form.inputs([0]))
        finally:
            handle.remove()
    assert state() == before
    assert torch.equal(form.generate(form.inputs([0, 1, 2]))[1], baseline[1])


def test_several_images_and_none(form: families.Form) -> None:
    """Samples with two images, none and one in one batch of four equal singles."""
    pictures, texts = makers.photos(3), [*families.TEXTS, "And what is that, in a few words?"]
    images = [[pictures[0], pictures[1]], [], [pictures[2]], [pictures[1]]]
    if form.name == "paligemma":
        with pytest.raises(vp.InputError, match="PaliGemmaProcessor does not take images of no"):
            form.processor.prompt(families.TEXTS[1])
        images[1] = [pictures[1]]
    with vp.prune(form.model, families.METHODS["fastv"]) as trace:
        tokens, logits = form.generate(form.processor.batch(texts, images))
        assert trace.visual_input[1] == 0 or form.name == "paligemma"
        for i in range(4):
            inputs = form.processor.prompt(texts[i], images[i])
            one_tokens, one_logits = form.generate(inputs)
            assert torch.equal(tokens[i], one_tokens[0])
            torch.testing.assert_close(logits[i], one_logits[0], **exactly(form))


def test_the_table_says_whether_the_tower_is_read(form: families.Form) -> None:
    found = parts_of(form.model).vision is not None
    assert catalogue.FAMILIES[form.name].behind == found


def test_text_that_spells_a_part_of_an_image(form: families.Form) -> None:
    token = form.processor.tokenizer.convert_ids_to_tokens(form.processor.image_token_id)
    said = "<image>|marker" if token == "<image>" else "which stands for a part of an image"
    with pytest.raises(vp.InputError, match=said) as told:
        form.processor.prompt(f"What is {token}{token}?", makers.photo())
    assert "\n" not in str(told.value)


def test_a_new_family_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of transformers that is not in the table: with a line, and nothing else, it is
    loaded, asked and pruned."""
    family_makers.llava_onevision(tmp_path)
    known = catalogue.FAMILIES["llava_onevision"].architectures
    monkeypatch.delitem(catalogue.FAMILIES, "llava_onevision")
    with pytest.raises(vp.InputError, match=f"'{known[0]}', which is not known"):
        vp.load(tmp_path)
    line = catalogue.FamilyLine("dummy", "Dummy", known)
    monkeypatch.setitem(catalogue.FAMILIES, "dummy", line)
    form = families.load_form("dummy", tmp_path)
    assert form.processor.family == "dummy"
    assert next(family.line for family in all_families() if family.owns(form.model)) is line
    inputs = form.inputs([0, 1, 2])
    with vp.prune(form.model, families.METHODS["fastv"]) as trace:
        form.generate(inputs)
    counts = form.processor.count_visual_tokens(inputs)
    assert trace.visual_tokens[2] == [round(0.4 * count) for count in counts]


def test_a_live_model_needs_no_line_at_all(
    form: families.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a decoder whose attention is computed in another way is refused by what reads it."""
    monkeypatch.delitem(catalogue.FAMILIES, form.name)
    with vp.prune(form.model, families.METHODS["fastv"]) as trace:
        form.generate(form.inputs([0]), steps=1)
    assert 0 < trace.visual_tokens[2][0] < trace.visual_input[0]
    with pytest.raises(vp.InputError, match="is not known"):
        vp.load(form.folder)


def test_attention_that_cannot_be_read(
    form: families.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model that no line knows, keys that are more than projected, normed and turned are
    noticed; methods that read none go on."""
    monkeypatch.delitem(catalogue.FAMILIES, form.name)
    attn: Any = parts_of(form.model).layers[1].self_attn
    forward = attn.forward

    def other(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        given = Doubling(past_key_values) if past_key_values is not None else None
        return forward(*args, past_key_values=given, **kwargs)

    monkeypatch.setattr(attn, "forward", other)
    with (
        pytest.raises(vp.InputError, match="computes its queries and keys in a way"),
        vp.prune(form.model, families.METHODS["fastv"]),
    ):
        form.generate(form.inputs([0]), steps=1)
    with vp.prune(form.model, families.METHODS["random"]) as trace:
        form.generate(form.inputs([0]), steps=1)
    assert 0 < trace.visual_tokens[0][0] < trace.visual_input[0]


class Doubling:
    """A cache that is handed keys of twice the size."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return self.cache.update(2 * keys, *rest, **more)


def test_deepstack_features_follow_a_drop_inside_their_layers(tmp_path: Path) -> None:
    """Qwen3-VL adds features of three tower layers behind its first three layers: dropped in front
    of each of them, of none, and in front of layer 0."""
    family_makers.qwen3_vl(tmp_path, layers=5)
    form = families.load_form("qwen3_vl", tmp_path)
    inputs = form.inputs([0, 1, 2])
    method: Any
    for method in [vp.FastV(agg_layer=k, attention_rank=0.4) for k in (1, 2, 3)] + [
        vp.RandomDrop(keep=0.4)
    ]:
        with vp.prune(form.model, method) as trace, families.Recorder(form.model) as seen:
            form.generate(inputs, steps=1)
            kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
        with families.HiddenKeys(form.model, kept), families.Recorder(form.model) as masked:
            form.model(**inputs, use_cache=False)
        rows = next(iter(kept.values()))
        families.compare_rows(seen.first, masked.first, rows, inputs, **scaled(masked.first))


def test_sizes_reach_the_processor(form: families.Form) -> None:
    """Settings of the family's own image processor; others are refused in one sentence."""
    setting = {"qwen2_vl": {"max_pixels": 28 * 28 * 4}, "qwen3_vl": {"max_pixels": 32 * 32 * 4}}
    if form.name not in setting:
        tiled = form.name in ("aya_vision", "ovis2")
        wrong: Any = {"do_image_splitting" if tiled else "min_patches": 3}
        with pytest.raises(vp.InputError, match=r"is no setting of \w+Processor"):
            vp.load(form.folder, **wrong)
        return
    _, processor = vp.load(form.folder, **setting[form.name])
    picture = makers.photo(200, 200)
    before = form.processor.count_visual_tokens(form.processor.prompt("?", picture))[0]
    assert processor.count_visual_tokens(processor.prompt("?", picture))[0] == 4 < before


def test_an_image_in_several_runs_has_one_budget(form: families.Form) -> None:
    """Tiles and rows with other tokens between them are one picture to a rule; several pictures
    are told apart, in a batch and beside text alone."""
    pictures = makers.photos(3)
    images = [[pictures[0]], [pictures[1], pictures[2]], [pictures[1]]]
    inputs = form.processor.batch(families.TEXTS, images)
    total = form.processor.count_visual_tokens(inputs)
    with vp.prune(form.model, vp.FastV(agg_layer=2, attention_rank=3)) as trace:
        form.generate(inputs, steps=1)
        assert trace.visual_input == total
        assert trace.visual_tokens[2] == [3, 6, 3]
        one = form.processor.prompt(families.TEXTS[1], images[1])
        kept = trace.kept[2][1]
        form.generate(one, steps=1)
    alone = trace.kept[2][0]
    assert torch.equal(kept[kept >= 0][-len(alone) :] - (kept.max() - alone.max()), alone)


VIDEO = {
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>Red?",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>Red?",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>Red?",
    "llava_onevision": "<video>Red?",
}


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_is_pruned_frame_by_frame(name: str, folders: Any) -> None:
    """Each frame (of Qwen's models, each pair of them) has a budget of its own; what is left is
    what the unpruned model computes with the same tokens hidden."""
    form = families.load_form(name, folders[name])
    clip = torch.stack([torch.full((3, 64, 64), 40 * k, dtype=torch.uint8) for k in range(4)])
    clip = clip + (torch.rand(clip.shape, generator=torch.Generator().manual_seed(0)) * 90).byte()
    inputs = form.processor.processor(
        text=[VIDEO[form.name]], videos=[clip], return_tensors="pt", do_sample_frames=False
    )
    token = form.model.config.video_token_id
    video = int((inputs["input_ids"] == token).sum())
    with vp.prune(form.model, vp.FastV(agg_layer=2, attention_rank=1)) as trace:
        with families.Recorder(form.model) as seen:
            form.model(**inputs, use_cache=False)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
        frames = 4 if form.name == "llava_onevision" else 2
        assert trace.visual_input == [video] and trace.visual_tokens[2] == [frames]
    with families.HiddenKeys(form.model, kept), families.Recorder(form.model) as masked:
        form.model(**inputs, use_cache=False)
    families.compare_rows(seen.first, masked.first, kept[2], inputs, **scaled(masked.first))


def test_queries_and_keys_are_what_every_layer_computes(form: families.Form) -> None:
    """Through the layer's own keys and its own attention weights, so that norms, rotary positions
    (or none) and scaling are the family's."""
    model, _ = vp.load(form.folder, attn_implementation="eager")
    inputs, parts = form.inputs([0]), parts_of(model)
    seen: dict[int, Any] = {}
    attending = [n for n in range(len(parts.layers)) if n not in parts.linear]
    for index in attending:
        attn: Any = parts.layers[index].self_attn
        attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: seen.update({index: kwargs}), with_kwargs=True
        )
    out = model(**inputs, use_cache=True, output_attentions=True)
    assert parts.keys is not None and parts.queries is not None
    for place, index in enumerate(attending):
        attn, given = parts.layers[index].self_attn, seen[index]
        made = [
            project(attn, given["hidden_states"], given["position_embeddings"])
            for project in (parts.queries, parts.keys)
        ]
        width = out.past_key_values.layers[index].keys.shape[-2]
        cached = out.past_key_values.layers[index].keys
        torch.testing.assert_close(made[1][..., -width:, :], cached, **EXACT)
        groups = made[0].shape[1] // made[1].shape[1]
        scores = made[0] @ made[1].repeat_interleave(groups, 1).mT * parts.scaling(attn)
        hidden = out.attentions[place] == 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights, out.attentions[place], **EXACT)


def test_decoders_that_cannot_drop_say_why() -> None:
    """Small Gemma 4 has inputs of each layer's own."""
    text = {**family_makers._text(4), "head_dim": 16}
    small = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config={**text, "vocab_size_per_layer_input": 384},
            vision_config={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
            audio_config=None,
        )
    )
    told = pytest.raises(vp.InputError, match="per_layer_inputs between its layers")
    with told, vp.prune(small, families.METHODS["random"]):
        pass


def test_layers_without_attention_are_not_read(
    folders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In Qwen3.5 every fourth layer attends: what a method reads moves to the nearest of them, in
    its order, said in one line; what reads nothing stays; what cannot be is refused."""
    form = families.load_form("qwen3_5", folders["qwen3_5"])
    with vp.prune(form.model, vp.FastV(agg_layer=3, attention_rank=1)) as trace:
        form.generate(form.inputs([0]), steps=2)
        assert set(trace.kept) == {2} and trace.visual_tokens[2] == [1]
    assert caplog.messages[-1] == (
        "fastv: Qwen3_5TextModel attends in layers 1, 3, 5 only, next to which its tokens go: in "
        "front of layer 2 instead of 3."
    )
    with vp.prune(form.model, vp.RandomDrop(keep=1, layer=3)) as trace:
        form.generate(form.inputs([0]), steps=2)
        assert set(trace.kept) == {3}
    many = vp.SAINT(start=1, end=4, threshold=0.1, min_neighbors=1)
    hides = vp.FastV(agg_layer=2, mode="mask")
    for method, said in ((many, "4 stages that read attention"), (hides, "mode='mask' hides keys")):
        with pytest.raises(vp.InputError, match=said) as told, vp.prune(form.model, method):
            pass
        assert "\n" not in str(told.value)


def test_flops_are_what_torch_counts(form: families.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tower and projector, and of the language model, from the config and shapes alone; of
    towers that take tiles also sample by sample, which records of answers need."""
    if form.name == "qwen3_5":  # its rule is computed in blocks here: counted apart, by hand
        name = "torch_chunk_gated_delta_rule"
        monkeypatch.setattr(
            modeling_qwen3_5, name, lambda q, k, v, **_: (torch.zeros_like(v), None)
        )
    inputs, config = form.inputs([0, 1]), form.model.config
    with flops.count_flops(flops.vision_modules(form.model)) as count:
        form.model(**inputs, use_cache=False, logits_to_keep=1)
    said = flops.prefill_flops(config, inputs)
    assert said is not None
    assert said.vision == pytest.approx(count.vision, rel=0.001)
    rule, text = 0.0, config.get_text_config()
    if form.name == "qwen3_5":
        one = 6 * text.linear_num_value_heads * text.linear_key_head_dim
        tokens = inputs["input_ids"].numel()
        linear = text.layer_types.count("linear_attention")
        rule = one * text.linear_value_head_dim * tokens * linear
    assert said.language - rule == pytest.approx(count.total - count.vision, rel=0.002)
    sizes = flops.Sizes.of(config)
    by_size = ("qwen2_vl", "qwen3_vl", "qwen3_5", "mistral3", "glm4v", "gemma4")
    assert (sizes.tile is None) == (form.name in by_size) and sizes.decoder is not None
    if sizes.tile is not None:
        tiles = flops.tower_images(config, inputs, [1, 1])
        assert sum(tiles) * sizes.tile == pytest.approx(count.vision, rel=0.001)
