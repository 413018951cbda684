"""The fast path: the same answers and the same trace as the ordinary one, from fixed shapes.

On a CPU the pieces run without being recorded; on a GPU the same tests record CUDA graphs.
VLM_PRUNE_FAST_SAMPLES=500 compares so many demo questions for every method.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

import vlm_prune_ext as vp
from tests import family_makers, makers
from tests.pruning_checks import fingerprint
from vlm_prune_ext.cli import main
from vlm_prune_ext.demo import CHECKPOINT, questions
from vlm_prune_ext.engine.prune import steady_attention
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import scenes
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.fast import pieces, run
from vlm_prune_ext.fast.generate import FastGenerate
from vlm_prune_ext.fast.graphs import Recorded, RecordingError
from vlm_prune_ext.models import families, parts_of
from vlm_prune_ext.models.catalogue import CATALOGUE

SAMPLES = int(os.environ.get("VLM_PRUNE_FAST_SAMPLES", "8"))
SEED = 71  # fresh scenes
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STEP_BY_STEP = ("none", "fastv", "himap", "random", "pdrop", "sparsevlm", "visionzip")
FORMS = ("original", "huggingface", "next-vicuna", "next-mistral", "next-original")
VIT = vp.SAINTViT(layers=(1, 3), keep_num=(13, 10), r=3)
METHODS: dict[str, Any] = {
    "none": None,
    "fastv": vp.FastV(agg_layer=2, attention_rank=0.4),
    "fastv-all": vp.FastV(agg_layer=3, attention_rank=1.0),
    "himap": vp.HiMAP(attn_txt_layer=1, attn_txt_rank=0.6, attn_img_layer=3, attn_img_rank=0.3),
    "saint-vit": vp.SAINT(start=None, vit=VIT),
    "attention": vp.CustomSelection(kept_tokens=5, agg_layer=2),
    "sampling": vp.CustomSelection(method="sampling", kept_tokens=0.5, agg_layer=2),
    "similarity": vp.CustomSelection(method="similarity", kept_tokens=0.5, agg_layer=4),
    "norm": vp.CustomSelection(method="norm", kept_tokens=0.5, agg_layer=1),
    "uniform": vp.CustomSelection(method="uniform", kept_tokens=0.5, agg_layer=1),
    "random": vp.RandomDrop(keep=0.5),
    "random-later": vp.RandomDrop(keep=0.5, layer=3),
    "downsample": vp.Downsample(keep=0.25),
    "fastervlm": vp.FasterVLM(budget=6),
    "vispruner": vp.VisPruner(budget=6),
    "divprune": vp.DivPrune(ratio=5),
    "scope": vp.SCOPE(budget=6),
    "holov": vp.HoloV(budget=6, crops=4),
    "visionzip": vp.VisionZip(dominant=4, contextual=3),
    "prumerge": vp.PruMerge(ratio=0.3),
    "vtw": vp.VTW(layer=2),
    "pdrop": vp.PyramidDrop(layers=(1, 3), ratios=(0.6, 0.3)),
    "dart": vp.DART(layer=2, max_num_trunction=8, pivot_image_token=2, pivot_text_token=2),
    "sparsevlm": vp.SparseVLM(stages=((1, 9), (3, 4))),
    "sparsevlm-plus": vp.SparseVLMPlus(stages=((1, 9), (3, 4))),
}
VARYING = {
    "saint": vp.SAINT(start=1, end=3, threshold=0.2, min_neighbors=1),
    "prumerge-free": vp.PruMerge(),
    "prumerge-plus": vp.PruMergePlus(ratio=0.12),
    "feather": vp.FEATHER(layers=(1, 3)),
}
"""Of counts that depend on the picture."""
METHODS |= VARYING
NOT_STATIC = {
    "mask": vp.FastV(agg_layer=2, attention_rank=0.4, mode="mask"),
    "behind": vp.SAINT(start=4, end=5, threshold=0.2, min_neighbors=1),
}
TEXTS = ("What is this?", "How many circles are there in the picture?", "Red?")
BATCHES: dict[str, Any] = {
    "single": lambda p: ([TEXTS[1]], [[p[0]]]),
    "padded": lambda p: (list(TEXTS), [[p[0]], [p[1]], [p[2]]]),
    "uneven": lambda p: (list(TEXTS), [[p[0]], [], [p[1], p[2]]]),
    "text": lambda p: (list(TEXTS[:2]), [[], []]),
}


def write(folder: Path, form: str) -> Path:
    if form == "original":
        return makers.tiny_original(folder)
    if form == "huggingface":
        return makers.tiny_hf_llava(folder)
    backbone = "mistral" if "mistral" in form else "vicuna"
    return makers.tiny_next(folder, backbone, "original" if "original" in form else "hf")


def make_fast(model: Any, **options: Any) -> FastGenerate:
    return FastGenerate(model, parts_of(model), **{"capture": GPU, **options})


@pytest.fixture(scope="module", params=FORMS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write(tmp_path_factory.mktemp("fast") / "model", request.param)
    model, processor = vp.load(folder, device=DEVICE, dtype="float32", fast=False)
    # transformers puts recording hooks on a model's first run, and leaves them there.
    generate(model.generate, processor.prompt("Red?", makers.photo()))
    return model, processor, make_fast(model)


@pytest.fixture
def original(tmp_path: Path) -> Any:
    return vp.load(
        makers.tiny_original(tmp_path / "model"), device=DEVICE, dtype="float32", fast=False
    )


def generate(function: Any, inputs: Any, **more: Any) -> torch.Tensor:
    return function(**inputs, **{"max_new_tokens": 6, "do_sample": False, **more})


def assert_same_trace(one: vp.Trace, other: vp.Trace) -> None:
    assert one.kept.keys() == other.kept.keys()
    for layer, kept in one.kept.items():
        assert torch.equal(kept, other.kept[layer])
    assert one.lengths == other.lengths
    assert one.visual_tokens == other.visual_tokens
    assert one.visual_input == other.visual_input
    assert one.merged == other.merged
    for mine, theirs in ((one.vision_kept, other.vision_kept), (one.positions, other.positions)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[layer]) for layer, value in mine.items())


# -- the same answers --------------------------------------------------------------------------
WIDELY = ("none", "fastv", "saint-vit", "random")  # with every kind of batch
FORMER = list(METHODS)[: list(METHODS).index("downsample") + 1]
COMBINATIONS = [
    (name, batch)
    for name in METHODS
    for batch in BATCHES
    if batch == "uneven" or (batch == "padded" and name in FORMER) or name in WIDELY
]


@pytest.mark.parametrize(("name", "batch"), COMBINATIONS)
def test_tokens_and_trace_are_those_of_the_ordinary_path(tiny: Any, name: str, batch: str) -> None:
    model, processor, fast = tiny
    inputs = processor.batch(*BATCHES[batch](makers.photos(3)))
    before = fingerprint(model)
    with vp.prune(model, METHODS[name]) as ordinary:
        expected = generate(model.generate, inputs)
    with vp.prune(model, METHODS[name]) as trace:
        for _ in range(2):  # recorded, and replayed
            found = generate(fast, inputs)
            assert torch.equal(expected, found)
            assert_same_trace(ordinary, trace)
            assert trace.backend == "graphs"
    assert ordinary.backend == ("transformers" if METHODS[name] is None else "hooks")
    assert fingerprint(model) == before
    assert not found.is_inference()


OTHERS = [("internvl", name) for name in ("none", "fastv", "himap", "random", "pdrop")]
MROPE = ("none", "fastv", "himap", "random", "random-later", "divprune", "sparsevlm", "dart")
OTHERS += [(family, name) for name in MROPE for family in ("qwen2_5_vl", "qwen3_vl")]
PLAIN = ("qwen2_vl", "llava_onevision", "smolvlm", "idefics3", "ovis2", "mistral3", "glm4v")
OTHERS += [(family, name) for name in ("none", "fastv") for family in PLAIN]


@pytest.mark.parametrize(("family", "name"), OTHERS)
def test_other_families(tmp_path_factory: pytest.TempPathFactory, family: str, name: str) -> None:
    folder = tmp_path_factory.mktemp(family)
    getattr(family_makers, family)(folder, layers=6)
    model, processor = vp.load(folder, device=DEVICE, dtype="float32", fast=False)
    inputs = processor.batch(*BATCHES["uneven"](makers.photos(3)))
    with vp.prune(model, METHODS[name]) as ordinary:
        expected = generate(model.generate, inputs)
    fast = make_fast(model, forced=True)
    with vp.prune(model, METHODS[name]) as trace:
        assert torch.equal(generate(fast, inputs), expected)
    assert_same_trace(ordinary, trace)
    assert fast.captures > 1


def test_the_catalogue_says_which_families_have_it() -> None:
    by_name = {family.line.name: family.line.fast for family in families()}
    assert by_name["internvl_chat"] == by_name["internvl"]  # read into the same modules
    for entry in CATALOGUE.values():
        assert entry.record()["fast"] == by_name[entry.family]


def test_a_family_without_it(tmp_path: Path) -> None:
    family_makers.gemma3(tmp_path)
    with pytest.raises(InputError, match="Gemma 3 has no fast path"):
        vp.load(tmp_path, fast=True)


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_logits_are_those_of_the_ordinary_path(original: Any, name: str) -> None:
    model, processor = original
    inputs = processor.batch(*BATCHES["padded"](makers.photos(3)))
    seen: dict[str, list[torch.Tensor]] = {"ordinary": [], "fast": []}
    for way, function in (("ordinary", model.generate), ("fast", make_fast(model))):

        class Keep(LogitsProcessor):
            kept = seen[way]

            def __call__(self, input_ids: Any, scores: Any) -> Any:
                self.kept.append(scores.clone())
                return scores

        with vp.prune(model, METHODS[name]):
            generate(function, inputs, logits_processor=[Keep()])
    assert len(seen["fast"]) == len(seen["ordinary"]) > 1
    for one, other in zip(seen["ordinary"], seen["fast"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        None,
        vp.FastV(attention_rank=100),
        vp.HiMAP(),
        vp.CustomSelection(kept_tokens=64),
        vp.RandomDrop(keep=64),
        vp.Downsample(keep=144),
        vp.SAINT(start=None, vit=vp.SAINTViT(layers=(2,), keep_num=301, r=100)),
    ],
    ids=lambda method: method.label() if method else "baseline",
)
def test_answers_of_the_demo_model(method: Any) -> None:
    model, processor = vp.load(CHECKPOINT, device=DEVICE, dtype="float32", fast=False)
    queries = demo_queries(SAMPLES)
    plain = Answerer(model, processor, method)
    expected = [a for i in range(0, SAMPLES, 4) for a in plain.answer(queries[i : i + 4])]
    model.generate = make_fast(model, forced=True)
    quick = Answerer(model, processor, method)
    found = [a for i in range(0, SAMPLES, 4) for a in quick.answer(queries[i : i + 4])]
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.lengths for a in found] == [a.lengths for a in expected]
    assert all(a.fast for a in found) and not any(a.fast for a in expected)
    assert len({a.text for a in found}) > 1


@pytest.mark.parametrize("name", METHODS)
def test_nothing_reads_what_a_later_piece_may_overwrite(
    original: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded pieces share memory: the output of one is gone when the next one runs."""
    model, processor = original
    inputs = processor.batch(*BATCHES["uneven"](makers.photos(3)))
    earlier: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    plain = Recorded._run

    def run(self: Recorded, work: Any) -> Any:
        for tensor in earlier:
            tensor.fill_(float("nan"))
        output = plain(self, work)
        segment = getattr(work, "__self__", None)
        attended = segment.memory.attended if hasattr(segment, "memory") else None
        earlier[:] = [t for t in (output, attended) if isinstance(t, torch.Tensor)]
        return output

    class Keep(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            kept.append(scores)
            return scores

    with vp.prune(model, METHODS[name]):
        expected = generate(model.generate, inputs)
        monkeypatch.setattr(Recorded, "_run", run)
        monkeypatch.setattr(Recorded, "_record", None)  # not while recording on a GPU
        fast = make_fast(model, capture=False)
        assert torch.equal(generate(fast, inputs, logits_processor=[Keep()]), expected)
    assert all(bool(scores.isfinite().all()) for scores in kept)


# -- what stays as it is -----------------------------------------------------------------------
def test_options_that_it_does_not_know_go_to_transformers(
    original: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    for options in (
        {"num_beams": 2},
        {"do_sample": True, "top_k": 5},
        {"no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True},
        {"max_new_tokens": None, "max_length": 90},
    ):
        torch.manual_seed(0)
        expected = generate(model.generate, inputs, **options)
        caplog.clear()
        torch.manual_seed(0)
        with caplog.at_level(logging.WARNING, "vlm_prune_ext"):
            found = generate(fast, inputs, **options)
            torch.manual_seed(0)
            generate(fast, inputs, **options)
        assert len([r for r in caplog.records if "fast path is not taken" in r.message]) == 1
        if not isinstance(found, torch.Tensor):
            expected, found = expected.sequences, found.sequences
        assert torch.equal(expected, found)
    assert fast.captures == 0


def test_a_generation_config_that_is_not_greedy(original: Any) -> None:
    model, processor = original
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.eos_token_id = None
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    generate(fast, inputs, max_new_tokens=1)
    assert fast.captures == 0


def test_answers_of_a_batch_end_one_by_one(original: Any) -> None:
    model, processor = original
    inputs = processor.batch(*BATCHES["padded"](makers.photos(3)))
    free = generate(model.generate, inputs, max_new_tokens=8, eos_token_id=-1)
    new = free[:, inputs["input_ids"].shape[1] :]
    stop = [int(new[0, 2]), int(new[1, 4])]
    options = {"max_new_tokens": 8, "eos_token_id": stop, "pad_token_id": 0}
    expected = generate(model.generate, inputs, **options)
    assert torch.equal(generate(make_fast(model), inputs, **options), expected)


def test_stopping_criteria_are_asked(original: Any) -> None:
    model, processor = original

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            stop = input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3
            return torch.full((input_ids.shape[0],), stop, device=input_ids.device)

    inputs = processor.prompt("Red?", makers.photo())
    options = {"stopping_criteria": StoppingCriteriaList([AfterThree()]), "eos_token_id": -1}
    found = generate(make_fast(model), inputs, **options)
    assert torch.equal(found, generate(model.generate, inputs, **options))
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", NOT_STATIC)
def test_a_method_without_fixed_counts(
    original: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = original
    inputs = processor.prompt("Red?", makers.photo())
    with vp.prune(model, NOT_STATIC[name]) as trace:
        expected = generate(model.generate, inputs)
        with caplog.at_level(logging.WARNING, "vlm_prune_ext"):
            assert torch.equal(generate(make_fast(model), inputs), expected)
        assert "fast path is not taken" in caplog.text and trace.backend == "hooks"
        with pytest.raises(InputError, match="fast=True is not possible: "):
            generate(make_fast(model, forced=True), inputs)
    model.generate = make_fast(model, forced=True)
    with pytest.raises(InputError, match="fast=True is not possible: "):
        Answerer(model, processor, NOT_STATIC[name])


def test_an_exception_leaves_the_model_as_it_was(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    before = fingerprint(model)

    class Fault(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            raise KeyError("fault")

    with pytest.raises(KeyError), vp.prune(model, METHODS["fastv"]):
        generate(fast, inputs, logits_processor=[Fault()])
    assert fingerprint(model) == before
    with pytest.raises(InputError), vp.prune(model, vp.FastV(agg_layer=2, image_token_length=3)):
        generate(fast, inputs)
    assert fingerprint(model) == before
    assert torch.equal(generate(fast, inputs), generate(model.generate, inputs))


# -- memory ------------------------------------------------------------------------------------
def test_few_recordings_for_many_lengths(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    text = "What is in the picture and where is it and how large and of what colour is it"
    words = text.split(" ")

    def ask() -> None:
        for count in (len(words) - 1, *range(1, len(words))):  # the longest makes room for all
            with vp.prune(model, METHODS["fastv"]):
                generate(fast, processor.prompt(" ".join(words[:count]), makers.photo()))

    ask()
    prompts = [processor.prompt(" ".join(words[:n]), makers.photo()) for n in range(1, len(words))]
    lengths = [inputs["input_ids"].shape[1] for inputs in prompts]
    lost = 16 - 6  # 0.4 of 16
    buckets = [{-(-(n - gone) // pieces.PROMPT_STEP) for n in lengths} for gone in (0, lost)]
    expected = sum(map(len, buckets)) + int(GPU)  # and the tower
    # Each bucket once; one step, or two where a cache of 128 places is too short.
    first = fast.captures
    assert expected + 1 <= first <= expected + 2
    ask()
    assert fast.captures == first


@pytest.mark.parametrize("name", ["none", "fastv", "himap"])
@pytest.mark.parametrize("batch", ["single", "uneven"])
def test_long_answers_get_room_as_they_grow(
    original: Any, name: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOM", 3)
    monkeypatch.setattr(pieces, "CACHE_STEP", 4)
    model, processor = original
    fast = make_fast(model)
    inputs = processor.batch(*BATCHES[batch](makers.photos(3)))
    with vp.prune(model, METHODS[name]):
        for limit in (40, 2, 41):
            options = {"max_new_tokens": limit, "eos_token_id": -1, "pad_token_id": 0}
            expected = generate(model.generate, inputs, **options)
            assert torch.equal(generate(fast, inputs, **options), expected)
    widths = {cache.width for cache in fast.pieces.recent.caches._items.values()}
    assert len(widths) > 3


def test_memory_grows_with_the_longest_prompt_alone(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    blocks = fast.pieces.arena._blocks

    def ask(words: int, photos: int) -> int:
        inputs = processor.batch(["Red? " * words] * photos, [[p] for p in makers.photos(photos)])
        with vp.prune(model, METHODS["fastv"]):
            expected = generate(model.generate, inputs)
            assert torch.equal(generate(fast, inputs), expected)
        return sum(block.nbytes for block in blocks.values())

    first = ask(30, 3)
    assert all(ask(words, photos) == first for words in (1, 9, 20) for photos in (1, 2, 3))
    largest = ask(90, 4)
    assert largest > first
    assert all(ask(words, photos) == largest for words in (3, 30) for photos in (1, 4))


@pytest.mark.slow
def test_many_samples_with_mixed_lengths_and_budgets() -> None:
    """No growth after all was used twice, and nothing is recorded twice."""
    count = 200 if GPU else 16
    model, processor = vp.load(CHECKPOINT, device=DEVICE, dtype="float32", fast=False)
    fast = model.generate = make_fast(model, forced=True)
    methods = [vp.FastV(attention_rank=rank) for rank in (288, 100, 32)]
    answerers = [Answerer(model, processor, method) for method in (None, *methods)]
    queries = sorted(demo_queries(count), key=lambda query: -len(query.text))

    def ask() -> tuple[int, int]:
        for start in range(0, count, 8):
            for answerer in answerers:
                answerer.answer(queries[start : start + 4])
                answerer.answer(queries[start + 4 : start + 5])
        gc.collect()
        taken = torch.cuda.memory_allocated() if GPU else 0
        return fast.captures, taken + sum(b.nbytes for b in fast.pieces.arena._blocks.values())

    ask()  # pieces are recorded at their second use, and known pictures are shared from then on
    first, memory = ask()
    again, later = ask()
    assert again == first and later <= 1.001 * memory
    recent = fast.pieces.recent
    pieces = [*_segments(fast), *recent.follows._items.values(), *recent.steps._items.values()]
    assert first == len(pieces) + (len(fast._tower._shapes._items) if fast._tower else 0)
    print(f"{first} recordings in {fast.capture_seconds:.1f} s, {memory / 2**20:.0f} MiB")
    assert fast.capture_seconds < 60


def test_calls_that_go_to_transformers_wait_too(original: Any) -> None:
    """While something is recorded, layers are not what transformers expects."""
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs, max_new_tokens=1)
    found: list[tuple[bool, bool]] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            own = generate(fast, inputs, max_new_tokens=1)  # a call inside must not wait
            found.append((fast._lock.locked(), torch.equal(own, expected)))
            return scores

    generate(fast, inputs, num_beams=2, logits_processor=[Look()], max_new_tokens=2)
    assert found == [(True, True)] * 2
    assert not fast._lock.locked()


def test_what_is_no_number_does_not_stay(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs)
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], float("nan"))}
    generate(fast, broken)
    assert torch.equal(generate(fast, inputs), expected)


def test_weights_that_were_changed_afterwards(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    generate(fast, inputs)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)
    captures = fast.captures
    assert torch.equal(generate(fast, inputs), generate(model.generate, inputs))
    assert fast.captures == captures  # counted anew


@pytest.mark.parametrize("part", ["layer", "norm", "head", "tower"])
def test_whatever_is_changed_is_noticed(tmp_path: Path, part: str) -> None:
    model, processor = vp.load(
        makers.tiny_hf_llava(tmp_path / "m"), device=DEVICE, dtype="float32", fast=False
    )
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    generate(fast, inputs)
    before = fast.pieces
    parts = parts_of(model)
    if part == "layer":
        old = parts.layers[2].self_attn.q_proj
        parts.layers[2].self_attn.q_proj = copy.deepcopy(old)
        parts.layers[2].self_attn.q_proj.weight.data.mul_(-1)
    elif part == "head":
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
        model.get_output_embeddings().weight.data.copy_(
            model.get_output_embeddings().weight.data.flip(0)
        )
    elif part == "norm":
        parts.final_norm.weight.data = -parts.final_norm.weight.data
    else:
        weight = parts.vision.layers[1].self_attn.k_proj.weight
        weight.data = -weight.data
    assert torch.equal(generate(fast, inputs), generate(model.generate, inputs))
    assert fast.pieces is not before  # recorded anew
    before = fast.pieces
    generate(fast, inputs)
    assert fast.pieces is before


def test_threads_take_turns(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    prompts = [processor.prompt(text, makers.photos(3)[i]) for i, text in enumerate(TEXTS)]
    expected = [generate(model.generate, inputs) for inputs in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            found = list(pool.map(lambda inputs: generate(fast, inputs), prompts))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_processor_that_asks_the_model(original: Any) -> None:
    model, processor = original
    fast = model.generate = make_fast(model)
    inputs, other = (processor.prompt(text, makers.photo()) for text in TEXTS[1:])
    expected = generate(fast, inputs), generate(fast, other)

    class Ask(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            assert torch.equal(generate(model.generate, other), expected[1])
            return scores

    assert torch.equal(generate(fast, inputs, logits_processor=[Ask()]), expected[0])


def test_an_exception_leaves_nothing_that_is_no_number(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs)

    class Fault(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            raise KeyError

    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], float("nan"))}
    with pytest.raises(KeyError):
        generate(fast, broken, logits_processor=[Fault()])
    assert torch.equal(generate(fast, inputs), expected)


def test_prompts_that_are_not_padded_in_front_go_to_transformers(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = dict(processor.prompt("Red?", makers.photo()))
    for change in (lambda mask: mask[:, :-1], lambda mask: mask.clone().fill_(1).roll(1)):
        mask = change(inputs["attention_mask"])
        if mask.shape == inputs["attention_mask"].shape:
            mask[:, -1] = 0
        with vp.prune(model, None) as trace:
            generate(fast, inputs)
            assert trace.backend == "graphs"
            with contextlib.suppress(Exception):  # whatever transformers makes of it
                generate(fast, {**inputs, "attention_mask": mask})
            assert trace.backend == "transformers"


def test_a_decoder_that_does_more_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteModel

    model, _ = vp.load(makers.tiny_hf_llava(tmp_path / "m"), device=DEVICE, fast=False)
    config = GraniteConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model.model.language_model = GraniteModel(config)
    with pytest.raises(InputError, match="GraniteModel is not one of LlamaModel"):
        make_fast(model)


def test_hooks_of_others_are_called(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    inputs = processor.prompt("Red?", makers.photo())
    generate(fast, inputs)
    layer = parts_of(model).layers[1]
    seen: list[int] = []
    handle = layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    generate(fast, inputs, max_new_tokens=2)
    assert len(seen) == 2
    handle.remove()
    generate(fast, inputs, max_new_tokens=2)
    assert len(seen) == 2


def test_old_shapes_make_room_for_new_ones(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CACHES", 2)
    model, processor = original
    fast = make_fast(model)
    for rank in (2, 3, 4, 2):
        for batch in ("single", "padded", "text"):
            inputs = processor.batch(*BATCHES[batch](makers.photos(3)))
            with vp.prune(model, vp.FastV(agg_layer=2, attention_rank=rank)):
                expected = generate(model.generate, inputs)
                assert torch.equal(generate(fast, inputs), expected)
    assert len(fast.pieces.recent.caches._items) <= 2
    assert all(s.cache in fast.pieces.recent.caches._items.values() for s in _segments(fast))


def _segments(fast: FastGenerate) -> Iterator[Any]:
    return iter(fast.pieces.recent.segments._items.values())


def test_the_model_is_let_go_of(tmp_path: Path) -> None:
    model, processor = vp.load(makers.tiny_original(tmp_path / "m"), device=DEVICE, fast=False)
    model.generate = make_fast(model)
    generate(model.generate, processor.prompt("Red?", makers.photo()))
    blocks = model.generate.pieces.arena._blocks
    seen = [weakref.ref(thing) for thing in (model, *model.parameters(), *blocks.values())]
    del blocks
    with without_collector():
        del model
        assert all(thing() is None for thing in seen)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_memory_that_was_too_small_is_let_go_of(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)

    def ask(words: int) -> None:
        generate(fast, processor.prompt("Red? " * words, makers.photo()), max_new_tokens=2)

    ask(1)
    blocks = fast.pieces.arena._blocks
    seen = {name: weakref.ref(block) for name, block in blocks.items()}
    with without_collector():
        ask(200)
        grown = [name for name, block in blocks.items() if seen[name]() is not block]
        assert {"hidden", ("keys", 0)} <= set(grown)
        assert all(seen[name]() is None for name in grown)


@pytest.mark.gpu
def test_recording_while_the_collector_is_busy(original: Any) -> None:
    """Other recordings become garbage in circles; that must not end one that is being made."""
    model, processor = original
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs)
    before = gc.get_threshold()
    for _ in range(5):
        circle: list[Any] = [make_fast(model)]
        assert torch.equal(generate(circle[0], inputs), expected)
        circle.append(circle)
    try:
        gc.set_threshold(1, 1, 1)
        del circle
        assert torch.equal(generate(make_fast(model, forced=True), inputs), expected)
    finally:
        gc.set_threshold(*before)


def test_a_copy_of_the_model_is_its_own(original: Any) -> None:
    model, processor = original
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs)
    model.generate = make_fast(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(generate(copied.generate, inputs), expected)
    assert not torch.equal(generate(model.generate, inputs), expected)


# -- switches ----------------------------------------------------------------------------------
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = makers.tiny_original(tmp_path / "m")
    model, _ = vp.load(folder)
    assert not isinstance(model.generate, FastGenerate)
    with pytest.raises(InputError, match="fast=True is not possible: it needs a CUDA device"):
        vp.load(folder, fast=True)
    makers.photo().save(tmp_path / "photo.png")
    argv = ["inspect", str(tmp_path / "photo.png"), "--question", "Red?", "--method", "fastv"]
    assert main([*argv, "--model", str(folder), "--fast"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_eager_attention_is_refused(tmp_path: Path) -> None:
    model, _ = vp.load(
        makers.tiny_original(tmp_path / "m"), attn_implementation="eager", fast=False
    )
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        make_fast(model)


def test_attention_that_was_changed_afterwards(original: Any) -> None:
    model, processor = original
    fast = make_fast(model)
    model.set_attn_implementation("eager")
    inputs = processor.batch(*BATCHES["padded"](makers.photos(3)))
    assert torch.equal(generate(fast, inputs), generate(model.generate, inputs))
    assert fast.captures == 0


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    folder = makers.tiny_original(tmp_path / "m")
    for wanted, forced in ((True, True), (None, False)):
        function = vp.load(folder, fast=wanted)[0].generate
        assert isinstance(function, FastGenerate) and function.forced is forced
    assert not isinstance(vp.load(folder, fast=False)[0].generate, FastGenerate)


def test_a_piece_that_cuda_cannot_record(
    original: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = original
    inputs = processor.prompt("Red?", makers.photo())
    expected = generate(model.generate, inputs)

    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Recorded, "_record", fail)
    for forced in (False, True):
        fast = make_fast(model, forced=forced)
        fast.pieces.recorder.capture = True
        fast._tower = None
        if forced:
            with pytest.raises(RecordingError, match="could not record"):
                generate(fast, inputs)
            continue
        with caplog.at_level(logging.WARNING, "vlm_prune_ext"):
            for _ in range(2):
                assert torch.equal(generate(fast, inputs), expected)
        assert len([r for r in caplog.records if "not permitted" in r.message]) == 1


def test_cudnn_is_left_out_and_let_in_again(original: Any) -> None:
    model, _ = original
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with vp.prune(model, None), vp.prune(model, METHODS["fastv"]):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        with pytest.raises(KeyError), steady_attention():
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def demo_queries(count: int) -> list[Query]:
    """Questions of the demo, of all four formats in turn."""
    share = -(-count // len(questions.KINDS))
    sets = [scenes.cases(kind, SEED, share) for kind in questions.KINDS]
    mixed = [case for turn in zip(*sets, strict=True) for case in turn]
    return [replace(case.query, max_new_tokens=48) for case in mixed[:count]]
