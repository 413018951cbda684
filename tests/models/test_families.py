"""The other families: loaded by their own classes, in batches, every method on every decoder, and
proof that what a drop leaves is what the unpruned model computes with the same tokens hidden."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import family_makers, flash_standin, makers, tables
from tests.pruning_checks import check_preprocessing_on_the_device, fingerprint
from vlm_prune_ext.models import parts_of

TEXTS = ["What is this?", "How many circles are there in the picture?", "Red?"]
STEPS = 5
NAMES = [name for name in family_makers.KINDS if name != "blip2_t5"]
ATTENTIONS = ["eager", "sdpa"]
# Some of these decoders have four layers, the last of them behind every drop.
SAINT = vp.SAINT(start=1, end=2, threshold=0.2, min_neighbors=1)
METHODS = tables.pick(*tables.EVERYWHERE) | {"saint": SAINT}
# Rows are added, positions counted anew, or counts depend on the picture: not the masked model.
OTHERS = {
    "vtw": vp.VTW(layer=1),
    "pdrop": vp.PyramidDrop(layers=(1, 2), ratios=(0.6, 0.3)),
    "dart": vp.DART(layer=1, max_num_trunction=4, pivot_image_token=1, pivot_text_token=1),
    "sparsevlm": vp.SparseVLM(stages=((0, 3), (1, 2))),
    "sparsevlm_plus": vp.SparseVLMPlus(stages=((0, 3), (1, 2))),
    "feather": vp.FEATHER(layers=(1, 2), reduction_ratio=0.4, stride=2),
}
KEEP_ALL = {
    name: replace(SAINT, threshold=1.0, min_neighbors=10**6)
    if name == "saint"
    else tables.KEEP_ALL[name]
    for name in METHODS
}


@dataclass
class Form:
    """A loaded family."""

    name: str
    folder: Path
    model: Any
    processor: Any

    def inputs(self, samples: list[int]) -> Any:
        pictures = makers.photos(len(TEXTS))
        return self.processor.batch([TEXTS[i] for i in samples], [[pictures[i]] for i in samples])

    def generate(self, inputs: Any, steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
        """New tokens ``(batch, steps)`` and their logits ``(batch, steps, vocabulary)``."""
        out = self.model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return out.sequences[:, -steps:], torch.stack(out.logits, dim=1)


def never_ending(model: Any) -> None:
    """Answers of equal length, so that batches can be compared row by row."""
    model.generation_config.eos_token_id = None
    if hasattr(model, "language_model") and hasattr(model.language_model, "generation_config"):
        model.language_model.generation_config.eos_token_id = None


def load_form(name: str, folder: Path, attention: str = "sdpa") -> Form:
    model, processor = vp.load(folder, attn_implementation=attention)
    never_ending(model)
    return Form(name, folder, model, processor)


@pytest.fixture(scope="module", params=[f"{n}/{a}" for n in NAMES for a in ATTENTIONS])
def form(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Form:
    name, attention = request.param.split("/")
    return load_form(name, folders[name], attention)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def baseline(form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return form.generate(form.inputs([0, 1, 2]))


# ------------------------------------------------------------------------- as transformers


def of_transformers(processor: Any, style: Any, text: str, picture: Any, places: bool) -> Any:
    """What plain transformers makes of a question with one picture, asked as the checkpoint's chat
    template has it, where there is one."""
    if getattr(processor, "chat_template", None) is None:
        said = style.single(text, 1).replace("<image>", processor.image_token if places else "")
        return processor(text=said, images=picture, return_tensors="pt")
    before, _, after = text.rpartition("<image>")
    items = [before, picture, after] if before else [picture, after]
    content = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "image", "image": item}
        for item in items
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def check_inputs_and_answers(form: Form, kind: family_makers.Kind) -> None:
    """Prompts, pixels and tokens equal what plain transformers makes of the same folder."""
    processor = kind.processor.from_pretrained(form.folder)
    model = kind.model.from_pretrained(form.folder).eval()
    never_ending(model)
    style = form.processor.styles[form.processor.default_style]
    pictures, expected = makers.photos(len(TEXTS)), []
    said = [TEXTS[0], "Say what <image> shows." if kind.places else TEXTS[1], TEXTS[2]]
    for text, picture in zip(said, pictures, strict=True):
        theirs = of_transformers(processor, style, text, picture, kind.places)
        theirs.pop("labels", None)  # PaliGemma's, for training
        ours = form.processor.prompt(text, picture)
        assert set(ours) == set(theirs)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=0, rtol=0, check_dtype=False)
        out = model.generate(**theirs, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        expected.append(out[0, -STEPS:])
    batch = form.processor.batch(said, [[picture] for picture in pictures])
    check_preprocessing_on_the_device(form.processor, pictures)
    assert torch.equal(form.generate(batch)[0], torch.stack(expected))


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_inputs_and_answers_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    check_inputs_and_answers(load_form(name, folders[name]), family_makers.KINDS[name])


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_a_batch_equals_singles(name: str, folders: dict[str, Path]) -> None:
    form = load_form(name, folders[name])
    tokens, logits = form.generate(form.inputs([0, 1, 2]))
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    for i in range(3):
        one_tokens, one_logits = form.generate(form.inputs([i]))
        assert torch.equal(tokens[i], one_tokens[0])
        torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------- every method


@pytest.mark.parametrize("name", KEEP_ALL)
def test_keep_all_is_the_baseline(form: Form, baseline, name: str) -> None:
    with vp.prune(form.model, KEEP_ALL[name]):
        tokens, logits = form.generate(form.inputs([0, 1, 2]))
    assert torch.equal(tokens, baseline[0])
    assert torch.equal(logits, baseline[1])


@pytest.mark.parametrize("name", METHODS)
def test_kept_rows_are_those_of_the_masked_model(form: Form, baseline, name: str) -> None:
    """Counts are exact, the text stays, and prefill and cached decoding equal the unpruned,
    uncached model in which the dropped tokens are hidden as keys from the same layer on."""
    inputs = form.inputs([0, 1, 2])
    with vp.prune(form.model, METHODS[name]) as trace:
        with Recorder(form.model) as seen:
            tokens, logits = form.generate(inputs)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
        check_counts(name, trace)
    check_text_stays(form, inputs, kept)
    with HiddenKeys(form.model, kept), Recorder(form.model) as masked:
        reference = forward(form, inputs, tokens[:, :-1])
    prompt = inputs["input_ids"].shape[1]
    compare_rows(seen.first, masked.first, last_kept(form, kept, prompt), inputs)
    torch.testing.assert_close(logits, reference[:, prompt - 1 :], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, baseline[1], atol=1e-3)


# Learned positions cannot be counted anew; Gemma 3 has two rotary embeddings, OPT none.
REFUSED = {
    "blip2_opt": ("pdrop", "sparsevlm", "sparsevlm_plus"),
    "gemma3": ("sparsevlm_plus",),
}


@pytest.mark.parametrize("name", ["fastv", "saint", "random", *OTHERS])
def test_batch_and_cache_change_nothing(form: Form, name: str) -> None:
    method = (METHODS | OTHERS)[name]
    if name in REFUSED.get(form.name, ()):
        with pytest.raises(vp.InputError, match="rotary"), vp.prune(form.model, method):
            form.generate(form.inputs([1]), steps=1)
        return
    with vp.prune(form.model, method):
        tokens, logits = form.generate(form.inputs([0, 1, 2]))
        one_tokens, one_logits = form.generate(form.inputs([1]))
        assert torch.equal(tokens[1], one_tokens[0])
        torch.testing.assert_close(logits[1], one_logits[0], atol=1e-4, rtol=1e-4)
        _, uncached = form.generate(form.inputs([1]), steps=1, use_cache=False)
    torch.testing.assert_close(uncached[0], one_logits[0, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "random"])
def test_a_plain_forward_is_the_first_step(form: Form, name: str) -> None:
    """Without `generate`, which states positions, families count them in ways of their own."""
    inputs = form.inputs([0, 1, 2])
    with vp.prune(form.model, METHODS[name]):
        _, logits = form.generate(inputs, steps=1)
        plain = form.model(**inputs).logits
    torch.testing.assert_close(plain[:, -1:], logits, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_behind(form: Form, baseline) -> None:
    def state() -> Any:
        return {name: value[0::3] + value[2:3] for name, value in fingerprint(form.model).items()}

    before = state()
    with vp.prune(form.model, METHODS["himap"]):
        form.generate(form.inputs([0]), steps=2)
    assert state() == before
    assert torch.equal(form.generate(form.inputs([0, 1, 2]))[1], baseline[1])


def test_several_images_and_none(form: Form) -> None:
    """Samples with two images, none and one go together, pruned per image."""
    pictures = makers.photos(3)
    images = [[pictures[0], pictures[1]], [], [pictures[2]]]
    if form.name == "fuyu":
        with pytest.raises(vp.InputError, match=r"2 image\(s\): Fuyu takes one image"):
            form.processor.batch(["What?"], [images[0]])
        images[0] = images[0][:1]
    with vp.prune(form.model, METHODS["fastv"]) as trace:
        tokens, logits = form.generate(form.processor.batch(TEXTS, images))
        kept = trace.visual_tokens[2]
        assert kept[1] == 0 and kept[0] > 0 and kept[2] > 0
        for i in range(3):
            inputs = form.processor.prompt(TEXTS[i], images[i])
            one_tokens, one_logits = form.generate(inputs)
            assert torch.equal(tokens[i], one_tokens[0])
            torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)


def test_vision_side_methods_say_why_not(form: Form) -> None:
    for method in (vp.SAINT(vit=vp.SAINTViT(layers=(1,)), start=None),):
        with (
            pytest.raises(vp.InputError, match=r"works on the vision tower: .* apply") as told,
            vp.prune(form.model, method),
        ):
            pass
        assert str(told.value).count("\n") == 0


# ------------------------------------------------------------------------ special to some


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("order", ["full first", "sliding last"])
@pytest.mark.parametrize("name", METHODS)
def test_windows_wherever_they_are(tmp_path: Path, order: str, attention: str, name: str) -> None:
    """The model sizes its decode masks by the first layer of each kind, which may itself hold a
    part of the prompt only."""
    kinds = {
        "full first": ("full", "full", "sliding", "full", "sliding"),
        "sliding last": ("sliding", "full", "full", "sliding"),
    }[order]
    family_makers.gemma3(tmp_path, kinds, window=24)
    form = load_form("gemma3", tmp_path, attention)
    test_kept_rows_are_those_of_the_masked_model(form, form.generate(form.inputs([0, 1, 2])), name)


@pytest.mark.parametrize("name", ["fastv", "himap", "saint", "random"])
@pytest.mark.parametrize("window", [28, 300])
def test_static_cache(tmp_path: Path, name: str, window: int) -> None:
    family_makers.gemma3(tmp_path, window=window)
    form = load_form("gemma3", tmp_path)
    with vp.prune(form.model, METHODS[name]):
        tokens, logits = form.generate(form.inputs([0, 1, 2]))
        static = form.generate(form.inputs([0, 1, 2]), cache_implementation="static")
    assert torch.equal(tokens, static[0])
    torch.testing.assert_close(logits, static[1], atol=1e-4, rtol=1e-4)


FLASH = flash_standin.register()


@pytest.mark.parametrize("method", ["fastv", "saint", "random"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "fuyu"])
def test_as_flash_attention_takes_it(name: str, method: str, folders: dict[str, Path]) -> None:
    """2-D masks, and gaps in positions that must not be read as borders of packed prompts."""
    form, flash = (load_form(name, folders[name], kind) for kind in ("sdpa", FLASH))
    if name == "qwen2_5_vl":  # its tower packs windows, which the stand-in does not do
        flash.model.model.visual = form.model.model.visual
    expected, got = [], []
    for each, out in ((form, expected), (flash, got)):
        with vp.prune(each.model, METHODS[method]):
            out += [each.generate(each.inputs([0, 1, 2]))[1], each.generate(each.inputs([1]))[1]]
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_flash_attention_counts_windows_in_what_is_left(folders: dict[str, Path]) -> None:
    form = load_form("gemma3", folders["gemma3"], FLASH)
    with (
        pytest.raises(vp.InputError, match=r"sliding window of layer 3 .*use sdpa or eager"),
        vp.prune(form.model, METHODS["fastv"]),
    ):
        form.generate(form.inputs([0]))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "blip2_opt"])
def test_beams(name: str, folders: dict[str, Path]) -> None:
    form = load_form(name, folders[name])
    inputs = form.inputs([0, 1])
    options = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    plain = form.model.generate(**inputs, **options)
    with vp.prune(form.model, KEEP_ALL["fastv"]):
        assert torch.equal(form.model.generate(**inputs, **options), plain)
    with vp.prune(form.model, METHODS["fastv"]) as trace:
        pruned = form.model.generate(**inputs, **options)
    assert len(trace.visual_tokens[2]) == 4 and pruned.shape == plain.shape


def test_all_axes_of_qwen_positions_are_kept(folders: dict[str, Path]) -> None:
    """What each layer rotates by is, on all three axes, what those tokens had before the drop."""
    form = load_form("qwen2_5_vl", folders["qwen2_5_vl"])
    layers, seen = parts_of(form.model).layers, {}
    inputs = form.inputs([0, 1, 2])

    def watch(index: int) -> None:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            seen[index] = kwargs["position_embeddings"]

        layers[index].self_attn.register_forward_pre_hook(see, with_kwargs=True)

    watch(0)
    watch(len(layers) - 1)
    with vp.prune(form.model, METHODS["fastv"]) as trace:
        form.generate(inputs, steps=1)
    kept = trace.kept[2]
    for before, after in zip(seen[0], seen[len(layers) - 1], strict=True):
        for row in range(3):
            valid = kept[row] >= 0
            assert torch.equal(before[row][kept[row][valid]], after[row][valid])
    # Height and width differ inside an image: the sections of the channels turn differently.
    assert form.model.model.rope_deltas.abs().sum() > 0


def test_mask_mode_needs_all_keys(folders: dict[str, Path]) -> None:
    form = load_form("gemma3", folders["gemma3"])
    method = vp.FastV(agg_layer=2, attention_rank=0.4, mode="mask")
    with (
        pytest.raises(vp.InputError, match="mode='mask' chooses anew"),
        vp.prune(form.model, method),
    ):
        form.generate(form.inputs([0]))
    method = vp.FastV(agg_layer=3, attention_rank=0.4, mode="mask")
    with vp.prune(form.model, method) as trace:
        _, logits = form.generate(form.inputs([0, 1, 2]))
        assert trace.visual_tokens[3] == [6, 6, 6]
        one = form.generate(form.inputs([1]))[1]
    torch.testing.assert_close(logits[1], one[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "blip2_opt", "fuyu"])
def test_reference_positions_are_for_llama(name: str, folders: dict[str, Path]) -> None:
    form = load_form(name, folders[name])
    method = vp.SAINT(start=1, end=2, reference_positions=True)
    if name == "fuyu":
        with vp.prune(form.model, method):
            form.generate(form.inputs([0]), steps=2)
        return
    with (
        pytest.raises(vp.InputError, match="reference_positions=True"),
        vp.prune(form.model, method),
    ):
        pass


@pytest.mark.parametrize("name", ["blip2_opt", "instructblip"])
def test_the_language_model_by_itself(name: str, folders: dict[str, Path]) -> None:
    """What it embeds on its own is no image's place in a later call."""
    form = load_form(name, folders[name])
    ids = torch.arange(3, 9)[None]
    plain = form.model.language_model(input_ids=ids).logits
    with vp.prune(form.model, METHODS["fastv"]) as trace:
        assert torch.equal(form.model.language_model(input_ids=ids).logits, plain)
        again = form.model.language_model(inputs_embeds=form.model.get_input_embeddings()(ids))
        assert torch.equal(again.logits, plain)
        form.generate(form.inputs([0, 1]), steps=2)
        assert trace.visual_tokens[2] == [6, 6]


def test_flan_t5_runs_and_says_why_it_is_not_pruned(folders: dict[str, Path]) -> None:
    from vlm_prune_ext.evals.answer import Answerer, Query

    form = load_form("blip2_t5", folders["blip2_t5"])
    with (
        pytest.raises(vp.InputError, match=r"encoder-decoder model.*nothing to prune"),
        vp.prune(form.model, METHODS["fastv"]),
    ):
        pass
    queries = [Query(TEXTS[i], [makers.photos(3)[i]], max_new_tokens=4) for i in range(3)]
    answers = Answerer(form.model, form.processor).answer(queries)
    assert [answer.visual_tokens for answer in answers] == [16, 16, 16]
    assert all(answer.new_tokens == 4 for answer in answers)


def test_answers_through_the_evaluation_layer(form: Form) -> None:
    from vlm_prune_ext.evals.answer import Answerer, Query

    pictures = makers.photos(3)
    queries = [Query(TEXTS[i], [pictures[i]], max_new_tokens=4) for i in range(3)]
    answers = Answerer(form.model, form.processor, METHODS["fastv"]).answer(queries)
    counts = form.processor.count_visual_tokens(form.inputs([0, 1, 2]))
    assert [answer.visual_tokens for answer in answers] == counts
    assert [answer.visual_kept[2] for answer in answers] == [round(0.4 * n) for n in counts]


def test_reset_calls(form: Form) -> None:
    fields = {"use_fast_v": True, "fast_v_agg_layer": 2, "fast_v_attention_rank": 3}
    attachment = vp.attach(form.model)
    try:
        for name, value in fields.items():
            setattr(form.model.config, name, value)
        form.model.reset_fastv()
        form.generate(form.inputs([0]), steps=1)
        assert attachment.trace.visual_tokens[2] == [3]
    finally:
        vp.detach(form.model)
        for name in fields:
            delattr(form.model.config, name)


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_bfloat16(name: str, folders: dict[str, Path]) -> None:
    model, processor = vp.load(folders[name], dtype="bfloat16")
    never_ending(model)
    form = Form(name, folders[name], model, processor)
    method = None if name == "blip2_t5" else METHODS["saint"]
    with vp.prune(model, method):
        tokens, logits = form.generate(form.inputs([0, 1, 2]))
    assert tokens.shape == (3, STEPS) and logits.isfinite().all()


def test_conversations(form: Form) -> None:
    picture = makers.photo()
    chat = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Red?"},
    ]
    text, images = form.processor.messages(chat)
    places = [text.index(part) for part in ("Be brief.", "What is this?", "A cat.", "Red?")]
    assert places == sorted(places) and images[0].size == picture.size
    inputs = form.processor.prompt(text, images, style="plain")
    assert form.processor.count_visual_tokens(inputs)[0] > 0
    said = form.processor.decode(form.model.generate(**inputs, max_new_tokens=3), inputs)
    assert len(said) == 1


# ------------------------------------------------------------------------------- bad input


def edit_config(folder: Path, target: Path, **fields: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_a_checkpoint_without_processor(name: str, folders: dict[str, Path], tmp_path: Path):
    folder = edit_config(folders[name], tmp_path / "x")
    (folder / "processor_config.json").unlink()
    with pytest.raises(vp.InputError, match=r"no image processor: preprocessor_config\.json"):
        vp.load(folder)
    folder = edit_config(folders[name], tmp_path / "y")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(vp.InputError, match=r"no tokenizer: .*tokenizer\.json"):
        vp.load(folder)


def test_unknown_family_and_remote_code(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["internvl"]
    other = edit_config(folder, tmp_path / "a", architectures=["MolmoForCausalLM"])
    with pytest.raises(vp.InputError, match=r"'MolmoForCausalLM', which is not known.*Qwen2_5_VL"):
        vp.load(other)
    remote = edit_config(folder, tmp_path / "b", architectures=["InternVLChatModel"])
    with pytest.raises(vp.InputError, match=r"code from the checkpoint.*trust_remote_code.*-hf"):
        vp.load(remote)
    with pytest.raises(vp.InputError, match=r"has no llm_config"):
        vp.load(remote, trust_remote_code=True)


# --------------------------------------------------------------------------------- helpers


class Recorder:
    """What enters the final norm in the first call of the decoder (the prefill)."""

    def __init__(self, model: Any) -> None:
        self.norm, self.first = parts_of(model).final_norm, torch.empty(0)

    def __enter__(self) -> Recorder:
        def see(module: Any, args: Any) -> None:
            if not self.first.numel():
                self.first = args[0]

        self.handle = self.norm.register_forward_pre_hook(see)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


class HiddenKeys:
    """The unpruned model, in which tokens that are not kept are hidden as keys from a layer on."""

    def __init__(self, model: Any, kept: dict[int, torch.Tensor]) -> None:
        self.layers, self.kept = parts_of(model).layers, kept

    def __enter__(self) -> HiddenKeys:
        self.handles = [
            layer.register_forward_pre_hook(self.hook(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        return self

    def hook(self, index: int) -> Any:
        stage = max((layer for layer in self.kept if layer <= index), default=None)

        def hide(module: Any, args: Any, kwargs: Any) -> Any:
            if stage is None:
                return None
            batch, length = args[0].shape[:2]
            rows = self.kept[stage]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            width = mask.shape[-1]
            shown = torch.zeros(batch, width, dtype=torch.bool)
            for row, own in zip(shown, rows, strict=True):
                row[own[own >= 0]] = True
            shown[:, self.prompt_length(rows) :] = True  # what was decoded since
            shown = shown[:, None, None, :]
            if mask.dtype == torch.bool:
                mask = mask & shown
            else:
                mask = mask.expand(batch, -1, -1, -1).masked_fill(
                    ~shown, torch.finfo(mask.dtype).min
                )
            return args, {**kwargs, "attention_mask": mask}

        return hide

    @staticmethod
    def prompt_length(rows: torch.Tensor) -> int:
        return int(rows.max()) + 1  # the last token of a prompt is text and always stays

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


class CutRows:
    """The unpruned model on one prompt without padding, whose hidden states are cut by hand in
    front of a stage's layer: what follows sees a shorter sequence at the rotary positions that its
    tokens had. The comparison for layers that have no keys to hide (linear attention)."""

    def __init__(self, model: Any, kept: dict[int, torch.Tensor], prompt: int) -> None:
        self.layers, self.kept, self.prompt = parts_of(model).layers, kept, prompt

    def __enter__(self) -> CutRows:
        self.handles = [
            layer.register_forward_pre_hook(self.hook(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        return self

    def hook(self, index: int) -> Any:
        stages = [layer for layer in self.kept if layer <= index]

        def cut(module: Any, args: Any, kwargs: Any) -> Any:
            if not stages:
                return None
            turns = kwargs["position_embeddings"]
            behind = torch.arange(self.prompt, turns[0].shape[1])
            rows = torch.cat([self.kept[max(stages)], behind])
            hidden = args[0]
            if index in self.kept:
                before = [layer for layer in stages if layer < index]
                held = torch.cat([self.kept[max(before)], behind]) if before else None
                here = rows if held is None else torch.searchsorted(held, rows)
                hidden = hidden[:, here]
            turns = tuple(part[:, rows] for part in turns)
            return (hidden,), {**kwargs, "position_embeddings": turns, "attention_mask": None}

        return cut

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def forward(form: Form, inputs: Any, more: torch.Tensor) -> torch.Tensor:
    """Logits ``(batch, seq, vocabulary)`` of prompt and ``more`` tokens in one uncached call."""
    batch, extra = more.shape
    given = dict(inputs)
    given["input_ids"] = torch.cat([given["input_ids"], more], dim=1)
    kind = int(form.name == "paligemma")  # its prompt, of kind 0, is seen in both directions
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", kind)):
        if name in given:
            tail = torch.full((batch, extra), value)
            given[name] = torch.cat([given[name], tail], dim=1)
    return form.model(**given, use_cache=False).logits


def check_counts(name: str, trace: Any) -> None:
    totals = trace.visual_input
    last = trace.visual_tokens[max(trace.visual_tokens)]
    if name == "saint":
        assert all(a < b for a, b in zip(last, totals, strict=True))
        return
    assert last == [tables.LEFT[name](total) for total in totals]


def check_text_stays(form: Form, inputs: Any, kept: dict[int, torch.Tensor]) -> None:
    ids = inputs["input_ids"]
    for rows in kept.values():
        for row, own in enumerate(rows):
            text = (ids[row] != form.processor.image_token_id).nonzero()[:, 0].tolist()
            if form.name == "fuyu":  # a newline after a patch belongs to the image
                text = [place for place in text if ids[row, place] != form.processor.newline]
            assert set(text) <= set(own.tolist())
            assert own[own >= 0].tolist() == sorted(set(own[own >= 0].tolist()))


def last_kept(form: Form, kept: dict[int, torch.Tensor], prompt: int) -> torch.Tensor:
    layers = len(parts_of(form.model).layers)
    return kept[max(layer for layer in kept if layer <= layers)]


def compare_rows(
    pruned: Any,
    masked: Any,
    kept: torch.Tensor,
    inputs: Any,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> None:
    """Rows that stayed and are not padding."""
    real = inputs["attention_mask"].bool()
    for row, own in enumerate(kept):
        rows = [i for i, place in enumerate(own.tolist()) if place >= 0 and real[row, place]]
        torch.testing.assert_close(pruned[row][rows], masked[row][own[rows]], atol=atol, rtol=rtol)
