"""Every method on every form of model: original LLaVA-1.5, Hugging Face, the `llava` package,
LLaVA-NeXT with both backbones, on eager, SDPA and what FlashAttention-2 takes.

All pairs of method and form, of method and attention, and of form and attention are there; one
method of each kind goes through all three."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests import flash_standin, makers, tables
from tests.pruning_checks import fingerprint
from tests.tables import EVERYWHERE, KEEP_ALL_OF_ONE_CROP, LEFT, LEFT_OF_A_CROP, TOWER, pick
from vlm_prune_ext.models.clip_text import TextTower

ATTENTIONS = ["eager", "sdpa", flash_standin.register()]
FORMS = ["original", "huggingface", "llava-package", "next-vicuna", "next-mistral", "next-original"]
TEXTS = ["What is this?", "How many circles are there in the picture?", "Red?"]
STEPS = 4
LATER = ("vtw", "pdrop", "dart", "sparsevlm", "sparsevlm_plus", "feather")
METHODS = pick(*EVERYWHERE, "fastv-mask", *LATER, *TOWER)
KEEP_ALL = {name: method for name, method in tables.KEEP_ALL.items() if name in METHODS}
THROUGH_ALL = ("fastv", "fastv-mask", "himap", "saint-hybrid", "visionzip", "downsample")
ALL_ATTENTIONS = "next-mistral"  # the form with crops, padding between them and grouped heads


def cases(names: Iterable[str]) -> pytest.MarkDecorator:
    """Which methods run on which form with which attention."""
    made = []
    for form in FORMS:
        for attention in ATTENTIONS:
            where = f"{form}/{attention}"
            whole = attention == "sdpa" or form == ALL_ATTENTIONS
            mine = [name for name in names if whole or name in THROUGH_ALL]
            made += [pytest.param(where, name, id=f"{name}-{where}") for name in mine]
    return pytest.mark.parametrize(("form", "name"), made, indirect=["form"])


@dataclass
class Form:
    """One way of having a model, behind one way of asking it."""

    name: str
    model: Any
    processor: Any
    image_processor: Any = None

    def inputs(self, samples: list[int]) -> dict[str, Any]:
        pictures = makers.photos(len(TEXTS))
        texts = [TEXTS[i] for i in samples]
        images = [pictures[i] for i in samples]
        if self.name != "llava-package":
            return dict(self.processor.batch(texts, [[image] for image in images]))
        return self._llava_inputs(texts, images)

    def method(self, name: str, methods: dict[str, Any]) -> Any:
        """By name; who made this prompt knows what is asked, but for the `llava` package's."""
        if name != "cdpruner" or self.name != "llava-package":
            return methods[name]
        half = methods[name].text_tower
        asked = TextTower(half.model, half.visual_projection, half.tokenizer, question=self.asked)
        return vp.CDPruner(budget=methods[name].budget, text_tower=asked)

    def asked(self, ids: torch.Tensor) -> list[str]:
        return [self.processor.decode(row[row > 0]) for row in ids]

    def _llava_inputs(self, texts: list[str], images: list[Any]) -> dict[str, Any]:
        from llava.mm_utils import process_images, tokenizer_image_token

        rows = [
            tokenizer_image_token(f"USER: <image>\n{text} ASSISTANT:", self.processor)
            for text in texts
        ]
        width = max(map(len, rows))
        self.model.config.tokenizer_padding_side = "left"
        return {
            "inputs": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            "images": process_images(images, self.image_processor, self.model.config),
            "image_sizes": [image.size for image in images],
        }

    @cached_property
    def baseline(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all samples, unpruned."""
        with torch.no_grad():
            return self.generate([0, 1, 2])

    def generate(self, samples: list[int], steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens ``(batch, steps)`` and their logits."""
        out = self.model.generate(
            **self.inputs(samples),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, -steps:], torch.stack(out.logits, dim=1)


def load_form(name: str, attention: str, folder: Any) -> Form:
    if name == "llava-package":
        pytest.importorskip("llava")
        makers.tiny_original(folder, tower="folder")
        tokenizer, model, images = makers.llava_package_model(folder)
        model.set_attn_implementation(attention)
        model.get_vision_tower().vision_tower.set_attn_implementation(attention)
        form = Form(name, model, tokenizer, images)
    else:
        if name == "original":
            makers.tiny_original(folder)
        elif name == "huggingface":
            makers.tiny_hf_llava(folder)
        elif name == "next-original":
            makers.tiny_next(folder, "vicuna", "original")
        else:
            makers.tiny_next(folder, name.removeprefix("next-"), "hf")
        form = Form(name, *vp.load(folder, attn_implementation=attention))
    form.model.generation_config.eos_token_id = None
    return form


@pytest.fixture(scope="module")
def made() -> dict[str, Form]:
    """Each form with each attention once, whatever order tests run in."""
    return {}


@pytest.fixture
def form(
    request: pytest.FixtureRequest,
    made: dict[str, Form],
    tmp_path_factory: pytest.TempPathFactory,
) -> Form:
    if request.param not in made:
        name, attention = request.param.split("/")
        made[request.param] = load_form(name, attention, tmp_path_factory.mktemp("model"))
    return made[request.param]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def baseline(form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    return form.baseline


@cases([*KEEP_ALL, *KEEP_ALL_OF_ONE_CROP])
def test_keep_all_is_the_baseline(form: Form, baseline, name: str) -> None:
    if name in KEEP_ALL_OF_ONE_CROP and form.name.startswith("next"):
        pytest.skip("row-end tokens go")
    with vp.prune(form.model, form.method(name, KEEP_ALL | KEEP_ALL_OF_ONE_CROP)):
        tokens, logits = form.generate([0, 1, 2])
    assert torch.equal(tokens, baseline[0])
    assert torch.equal(logits, baseline[1])


@cases(METHODS)
def test_batch_equals_singles(form: Form, baseline, name: str) -> None:
    with vp.prune(form.model, form.method(name, METHODS)) as trace:
        tokens, logits = form.generate([0, 1, 2])
        counts = {layer: list(row) for layer, row in trace.visual_tokens.items()}
        for i in range(3):
            one_tokens, one_logits = form.generate([i])
            assert torch.equal(tokens[i], one_tokens[0])
            torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)
            assert {k: v[i] for k, v in counts.items()} == {
                k: v[0] for k, v in trace.visual_tokens.items()
            }
    assert not torch.allclose(logits, baseline[1], atol=1e-4)


@cases(METHODS)
def test_counts(form: Form, name: str) -> None:
    """Budgets are kept per image; the text is never touched."""
    with vp.prune(form.model, form.method(name, METHODS)) as trace:
        form.generate([1], steps=1)
    total = trace.visual_input[0]
    first, last = trace.visual_tokens[0][0], trace.visual_tokens[max(trace.visual_tokens)][0]
    text = trace.lengths[0] - first
    if name == "himap":
        assert trace.visual_tokens[1][0] == round(0.6 * total)
    if name in LEFT:
        assert last == LEFT[name](total)
    elif name in ("saint-vit", "saint-hybrid"):
        assert trace.vision_kept[1].shape[1] == 12 and trace.vision_kept[3].shape[1] == 9
    if name in LEFT_OF_A_CROP and not form.name.startswith("next"):
        assert first == LEFT_OF_A_CROP[name]
    if name != "fastv-mask":
        assert trace.lengths[-1] == text + last or name.startswith("saint")
    for layer, rows in trace.kept.items():
        kept = (rows[0] >= 0).sum()
        assert kept == text + trace.visual_tokens[layer][0]


@cases(METHODS)
def test_cached_equals_uncached(form: Form, name: str) -> None:
    """The answers of a first, uncached step and of the cached run agree, and cached decoding goes
    on from it (what later steps must be is proved in test_engine.py)."""
    with vp.prune(form.model, form.method(name, METHODS)) as trace:
        _, logits = form.generate([1], steps=1)
        kept = {k: v.clone() for k, v in trace.kept.items()}
        out = form.model.generate(
            **form.inputs([1]),
            max_new_tokens=1,
            do_sample=False,
            use_cache=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    torch.testing.assert_close(out.logits[0], logits[:, 0], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, kept[k]) for k, v in trace.kept.items())


@cases(METHODS)
def test_restored_after_an_exception(form: Form, baseline, name: str) -> None:
    class Broken(Exception):
        pass

    def fail(*args: object) -> None:
        raise Broken

    layers = vp.models.parts_of(form.model).layers
    before = fingerprint(form.model)
    with pytest.raises(Broken), vp.prune(form.model, form.method(name, METHODS)):
        handle = layers[-1].mlp.register_forward_pre_hook(fail)
        try:
            form.generate([0])
        finally:
            handle.remove()
    assert fingerprint(form.model) == before
    assert torch.equal(form.generate([0, 1, 2])[1], baseline[1])


def test_never_run_before(tmp_path) -> None:
    """Even what transformers itself attaches on a model's first run is gone afterwards."""
    form = load_form("original", "sdpa", tmp_path)
    before = fingerprint(form.model)
    with vp.prune(form.model, METHODS["saint-hybrid"]):
        form.generate([0])
    assert fingerprint(form.model) == before
