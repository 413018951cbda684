"""What every method behind the tower holds to: pictures in crops, several pictures, rows without
one, towers of other families, and rules at their limits (tests of LLaVA's forms stand in
test_model_matrix.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

import vlm_prune_ext as vp
from tests import family_makers, makers
from tests.models.test_families import Form, load_form
from tests.pruning_checks import fingerprint
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.cdpruner import cdpruner, dpp_order, relevance
from vlm_prune_ext.methods.divprune import max_min_order
from vlm_prune_ext.methods.fastervlm import fastervlm
from vlm_prune_ext.methods.holov import holov
from vlm_prune_ext.methods.prumerge import prumerge, prumerge_plus
from vlm_prune_ext.methods.scope import coverage_order
from vlm_prune_ext.methods.visionzip import visionzip
from vlm_prune_ext.methods.vispruner import vispruner
from vlm_prune_ext.select import take_rows

CHOOSING: dict[str, Method] = {
    "divprune": vp.DivPrune(ratio=0.5),
    "fastervlm": vp.FasterVLM(budget=0.5),
    "vispruner": vp.VisPruner(budget=0.5),
    "scope": vp.SCOPE(budget=0.5),
    "holov": vp.HoloV(budget=0.5, crops=2),
    "downsample": vp.Downsample(keep=0.3),
}
MERGING: dict[str, Method] = {
    "visionzip": vp.VisionZip(dominant=4, contextual=2),
    "prumerge": vp.PruMerge(ratio=0.25),
    "prumerge_plus": vp.PruMergePlus(),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- other families ----------------------------------------------------------------------------
JOINING = ("qwen2_5_vl", "qwen3_vl", "glm4v", "idefics3", "gemma3", "internvl", "aya_vision")
"""Patches, in the projector."""
FAMILIES = (*JOINING, "llava_onevision", "paligemma")
WITH_CLS = ("internvl",)


@pytest.fixture(scope="module", params=FAMILIES)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Form:
    folder = tmp_path_factory.mktemp(request.param)
    getattr(family_makers, request.param)(folder)
    return load_form(request.param, folder)


def traces(model: Any) -> dict[str, tuple]:
    """As fingerprint, but for what Qwen's models remember of their last prompt."""
    found = fingerprint(model)
    for _, attributes, *_ in found.values():
        attributes.pop("rope_deltas", None)
    return found


@pytest.mark.parametrize("name", [*CHOOSING, *MERGING])
def test_family(form: Form, name: str) -> None:
    """Batch equals singles, a first step without a cache equals that with one, nothing is left."""
    method = (CHOOSING | MERGING)[name]
    before = traces(form.model)
    if name in MERGING and form.name in JOINING:
        told = pytest.raises(vp.InputError, match="makes one token of several patches")
        with told, vp.prune(form.model, method):
            form.generate(form.inputs([0]), 1)
        assert traces(form.model) == before
        return
    with vp.prune(form.model, method) as trace:
        tokens, logits = form.generate(form.inputs([0, 1, 2]), 3)
        counts, totals = list(trace.visual_tokens[0]), list(trace.visual_input)
        assert all(0 < count < total for count, total in zip(counts, totals, strict=True))
        assert bool(trace.merged[-1]) == (name in MERGING or name == "downsample")
        for i in range(3):
            one_tokens, one_logits = form.generate(form.inputs([i]), 3)
            assert torch.equal(tokens[i], one_tokens[0])
            torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)
            assert trace.visual_tokens[0] == [counts[i]]
        _, uncached = form.generate(form.inputs([2]), 1, use_cache=False)
    torch.testing.assert_close(uncached[0, 0], logits[2, 0], atol=1e-4, rtol=1e-4)
    assert traces(form.model) == before
    if name == "divprune":
        assert counts == [max(1, round(0.5 * total)) for total in totals]
    who = None if name in ("divprune", "downsample") else "received"
    assert trace.vision_attention == ("cls" if who and form.name in WITH_CLS else who)


MROPE = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v")


@pytest.mark.parametrize("name", MROPE)
def test_positions_of_what_is_left_are_unchanged(name: str, tmp_path: Path) -> None:
    """On all three axes, padded, with several pictures and none; and a batch is its singles."""
    getattr(family_makers, name)(tmp_path)
    form = load_form(name, tmp_path)
    pictures = makers.photos(3)
    images = [pictures[:1], pictures[1:], [], pictures[2:]]
    texts = ["What is this?", "Which of them is red?", "Hello!", "How many?"]
    inputs = form.processor.batch(texts, images)
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["position_ids"][-3:])

    decoder: Any = vp.models.parts_of(form.model).decoder
    for method in (None, vp.DivPrune(ratio=0.5)):
        with vp.prune(form.model, method) as trace:
            handle = decoder.register_forward_pre_hook(see, with_kwargs=True)
            tokens, logits = form.generate(inputs, 3)
            handle.remove()
    whole, left = seen
    kept, row = next(iter(trace.vision_kept.values())), 0
    merge = form.model.config.vision_config.spatial_merge_size
    lengths = (inputs["image_grid_thw"].prod(dim=1) // merge**2).tolist()
    for sample, own in enumerate(images):
        visual = inputs["input_ids"][sample] == form.processor.image_token_id
        stays, places = ~visual, visual.nonzero()[:, 0]
        first = 0
        for _ in own:
            mine = kept[row][kept[row] >= 0]
            stays[places[first : first + lengths[row]][mine]] = True
            first, row = first + lengths[row], row + 1
        assert first == len(places) and int(stays[visual].sum()) < max(1, first)
        expected = whole[:, sample, stays]
        assert torch.equal(left[:, sample, -expected.shape[1] :], expected)
        with vp.prune(form.model, vp.DivPrune(ratio=0.5)):
            one = form.generate(form.processor.batch([texts[sample]], [own]), 3)
        assert torch.equal(one[0][0], tokens[sample])
        torch.testing.assert_close(one[1][0], logits[sample], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral3", "ovis2", "gemma4", "blip2_opt"])
def test_towers_that_are_not_read(name: str, tmp_path: Path) -> None:
    """What reads the tower says what it reads and what fits; what reads tokens alone applies."""
    getattr(family_makers, name)(tmp_path)
    form = load_form(name, tmp_path)
    for method, what in (
        (vp.FasterVLM(budget=3), "reads attention of the vision tower: .*DivPrune"),
        (vp.SCOPE(budget=3), "reads (attention|features).* of the vision tower: .*DivPrune"),
    ):
        with pytest.raises(vp.InputError, match=what) as told, vp.prune(form.model, method):
            pass
        assert "\n" not in str(told.value)
    with vp.prune(form.model, vp.DivPrune(ratio=0.5)) as trace:
        tokens, logits = form.generate(form.inputs([0, 1]), 3)
        assert trace.visual_tokens[0] == [max(1, round(0.5 * n)) for n in trace.visual_input]
        for i in range(2):
            one = form.generate(form.inputs([i]), 3)
            assert torch.equal(one[0][0], tokens[i])
            torch.testing.assert_close(one[1][0], logits[i], atol=1e-4, rtol=1e-4)


def test_text_between_tiles_stays_where_it_is(form: Form) -> None:
    """A rule with an order of its own does not move tokens from one tile's run to another's."""
    if form.name != "idefics3":
        pytest.skip("no text between tiles")
    seen: list[torch.Tensor] = []
    decoder = vp.models.parts_of(form.model).decoder
    handle = decoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    inputs = form.inputs([0])
    form.model(**inputs)
    with vp.prune(form.model, vp.HoloV(budget=0.5, crops=2)) as trace:
        handle.remove()
        handle = decoder.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        form.model(**inputs)
    handle.remove()
    visual = (inputs["input_ids"][0] == form.model.config.image_token_id).nonzero()[:, 0]
    (kept,) = trace.vision_kept.values()
    stays = torch.ones(len(seen[0]), dtype=torch.bool)
    stays[visual] = False
    stays[visual[kept[0]]] = True
    assert torch.equal(seen[1], seen[0][stays])


def test_keep_all_is_the_baseline(form: Form) -> None:
    tokens, logits = form.generate(form.inputs([0, 1, 2]), 3)
    with vp.prune(form.model, vp.DivPrune(ratio=1.0)):
        kept, same = form.generate(form.inputs([0, 1, 2]), 3)
    assert torch.equal(kept, tokens)
    assert torch.equal(same, logits)


# -- pictures in crops -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("next")
    makers.tiny_next(folder, "vicuna", "hf")
    return vp.load(folder)


def decoder_rows(model: Any, inputs: Any) -> torch.Tensor:
    """What the language model is given."""
    seen: list[torch.Tensor] = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0][0]


def packed_codes(model: Any, inputs: Any, tiles: int, patches: int) -> list[int]:
    """``tile * patches + place`` of each visual token, as the model's own code packs them, -1 at
    row ends."""
    codes = torch.arange(tiles * patches, dtype=torch.float32).view(tiles, patches, 1)
    width = model.config.text_config.hidden_size
    rows, _ = model.model.pack_image_features(
        [codes.expand(-1, -1, width)],
        inputs["image_sizes"],
        vision_feature_select_strategy="default",
        image_newline=torch.full((width,), -1.0),
    )
    return rows[0][:, 0].long().tolist()


@pytest.mark.parametrize("picture", [0, 1, 2, 3])
def test_crops(crops: tuple[Any, Any], picture: int) -> None:
    """FasterVLM: what each crop keeps, in the order of the mosaic, without row ends. VisionZip:
    the overview, the mosaic's dominant patches, the other crops' CLS, their merged tokens."""
    model, processor = crops
    inputs = processor.prompt("What is this?", makers.photos(4)[picture])
    whole = decoder_rows(model, inputs)
    start = int((inputs["input_ids"][0] == model.config.image_token_id).int().argmax())
    with vp.prune(model, vp.FasterVLM(budget=6)) as trace:
        rows = decoder_rows(model, inputs)
    (kept,) = trace.vision_kept.values()
    codes = packed_codes(model, inputs, len(kept), 16)
    named = {tile * 16 + place for tile, row in enumerate(kept.tolist()) for place in row}
    slots = [start + slot for slot, code in enumerate(codes) if code in named]
    end = start + len(slots)
    assert torch.equal(rows[start:end], whole[slots])
    assert torch.equal(rows[end:], whole[start + len(codes) :])

    method = vp.VisionZip(dominant=4, contextual=2)
    with vp.prune(model, method) as trace:
        rows = decoder_rows(model, inputs)
    (kept,) = trace.vision_kept.values()
    assert (kept[:, 0] == 0).all()
    places = (kept[:, 1:] - 1).tolist()
    base = [start + codes.index(place) for place in places[0]]
    assert torch.equal(rows[start + 1 : start + 4], whole[base])
    named = {tile * 16 + place for tile, row in enumerate(places) if tile for place in row}
    mosaic = [start + slot for slot, code in enumerate(codes) if code in named]
    first = start + 6
    assert torch.equal(rows[first : first + len(mosaic)], whole[mosaic])
    others = len(kept) - 1
    assert trace.visual_tokens[0] == [6 + len(mosaic) + others + 2 * others]
    own = model.model.vision_tower(
        inputs["pixel_values"][0, : len(kept)], output_hidden_states=True
    )
    cls = model.model.multi_modal_projector(own.hidden_states[-2][:, :1])[:, 0]
    torch.testing.assert_close(rows[start], cls[0], atol=1e-4, rtol=1e-4)
    at = first + len(mosaic)
    torch.testing.assert_close(rows[at : at + others], cls[1:], atol=1e-4, rtol=1e-4)


# -- several pictures, and none ----------------------------------------------------------------
def all_methods() -> dict[str, Method]:
    half = makers.text_tower()
    return CHOOSING | MERGING | {"cdpruner": vp.CDPruner(budget=5, text_tower=half)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("llava")
    makers.tiny_hf_llava(folder)
    model, processor = vp.load(folder)
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.mark.parametrize("name", all_methods())
def test_several_pictures_and_none(llava: tuple[Any, Any], name: str) -> None:
    """Two pictures, none, and one in a batch: each picture for itself, each row as if alone."""
    model, processor = llava
    pictures = makers.photos(3)
    texts = ["Which of them is red, the first or the second?", "Hello!", "How many?"]
    images = [pictures[:2], [], pictures[2:]]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with vp.prune(model, all_methods()[name]) as trace:
        together = model.generate(**processor.batch(texts, images), **options)[:, -3:]
        kept = next(iter(trace.vision_kept.values()))
        counts = list(trace.visual_tokens[0])
        assert counts[1] == 0
        row = 0
        for sample, (text, own) in enumerate(zip(texts, images, strict=True)):
            alone = model.generate(**processor.batch([text], [own]), **options)[:, -3:]
            assert torch.equal(alone[0], together[sample]), sample
            if not own:
                assert not trace.vision_kept
                continue
            (mine,) = trace.vision_kept.values()
            width = min(mine.shape[1], kept.shape[1])
            assert torch.equal(mine[:, :width], kept[row : row + len(own), :width])
            row += len(own)
            if name != "cdpruner":  # its choice depends on the question
                inputs = processor.batch([text], [own[:1]])
                model.generate(**inputs, **options)
                (first,) = trace.vision_kept.values()
                width = min(first.shape[1], mine.shape[1])
                assert torch.equal(first[0, :width], mine[0, :width])


def test_questions_reach_their_own_sample(llava: tuple[Any, Any]) -> None:
    """One picture, two questions: CDPruner chooses by each, in whatever batch."""
    model, processor = llava
    picture = makers.photo(70, 70, 4)
    texts = ["zzzz", "What colour is the cat? And where is the dog, and what does it do there?"]
    method = vp.CDPruner(budget=5, text_tower=makers.text_tower())
    with vp.prune(model, method) as trace:
        model(**processor.batch(texts, [[picture], [picture]]))
        (kept,) = (rows.clone() for rows in trace.vision_kept.values())
        for sample, text in enumerate(texts):
            model(**processor.prompt(text, picture))
            (alone,) = trace.vision_kept.values()
            assert torch.equal(alone[0], kept[sample])
    assert not torch.equal(kept[0], kept[1])
    assert method.label() == "cdpruner_keep5_textTextTower"
    assert vp.CDPruner(5, "openai/clip").label() == "cdpruner_keep5_textopenai.clip"


def test_no_text_tower(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    with pytest.raises(vp.InputError, match="it is not known which checkpoint"):
        vp.prune(model, vp.CDPruner()).__enter__()
    half = makers.text_tower()
    wrong = torch.nn.Linear(7, 20, bias=False)
    with pytest.raises(vp.InputError, match="belongs to a vision tower of width 7"):
        vp.prune(model, vp.CDPruner(text_tower=(half.model, wrong))).__enter__()
    with pytest.raises(vp.InputError, match="has no text_model"):
        vp.prune(model, vp.CDPruner(text_tower=wrong)).__enter__()
    parts = (half.model, half.visual_projection)
    told = pytest.raises(vp.InputError, match="no tokenizer for the question 'Red")
    with told, vp.prune(model, vp.CDPruner(budget=5, text_tower=parts)):
        model(**processor.prompt("Red?", makers.photo()))


def test_text_half_of_the_towers_own_checkpoint(tmp_path: Path) -> None:
    """``None`` finds it where the tower came from; a folder names another."""
    folder = makers.tiny_original(tmp_path / "llava", tower="folder")
    model, processor = vp.load(folder)
    inputs = processor.prompt("Where is the cat?", makers.photo(70, 70, 4))
    with pytest.raises(vp.InputError, match="is a vision tower alone"):
        vp.prune(model, vp.CDPruner()).__enter__()
    vision = CLIPVisionConfig.from_pretrained(folder / "vision_tower")
    text = makers.text_tower().model.config.to_dict() | {"vocab_size": 600}
    whole = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=20)
    )
    whole.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    whole.save_pretrained(folder / "vision_tower")
    family_makers.fast_tokenizer(["<pad>"], pad_token="<pad>").save_pretrained(
        folder / "vision_tower"
    )
    again, processor = vp.load(folder)
    methods = [
        vp.CDPruner(budget=5),
        vp.CDPruner(budget=5, text_tower=str(folder / "vision_tower")),
        vp.CDPruner(budget=5, text_tower=(whole, lambda text: [1, 2])),
    ]
    kept = []
    for method in methods:
        with vp.prune(again, method) as trace:
            again(**inputs)
        kept.append(next(iter(trace.vision_kept.values()))[0].tolist())
    assert kept[0] == kept[1]
    assert all(len(set(row)) == 5 for row in kept)


# -- rules at their limits ---------------------------------------------------------------------
def rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(images: int, heads: int, n: int, seed: int = 1) -> torch.Tensor:
    return rng(images, heads, n, seed=seed).softmax(dim=-1)


def different(rows: torch.Tensor) -> bool:
    return all(len(set(row)) == len(row) for row in rows.tolist())


def test_identical_tokens_are_picked_once() -> None:
    tokens = rng(2, 4, 8).repeat(1, 5, 1)  # 4 different ones, 20 in all
    weights = torch.ones(2, 20)
    for count in (1, 4, 8, 20):
        assert different(max_min_order(tokens, count))
        assert different(coverage_order(tokens, weights, count))
        assert different(cdpruner(tokens, weights, count))


@pytest.mark.parametrize("count", [6, 9, 24])
def test_budgets_above_the_rank(count: int) -> None:
    """All of the rank first, then what matters most; a batch chooses as each image alone."""
    factors = rng(4, 24, 6)
    kernel = factors @ factors.transpose(1, 2)
    order = dpp_order(kernel, count)
    assert different(order)
    for image in range(4):
        assert torch.equal(dpp_order(kernel[image, None], count)[0], order[image])
    if count > 6:
        rest = kernel.diagonal(dim1=1, dim2=2).gather(1, order[:, 6:])
        assert (rest[:, 1:] <= rest[:, :-1]).all()


def test_ties_go_to_the_lower_place() -> None:
    same, even = torch.ones(1, 12, 4), torch.full((1, 2, 12), 0.08)
    assert fastervlm(even, 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert max_min_order(same, 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert coverage_order(same, even.sum(1), 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert cdpruner(same, relevance(same, same[:, :1]), 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert visionzip(same, even[..., 1:], same, 5, 0).kept[0].tolist() == [0, 1, 2, 3, 4]
    assert holov(same, even.mean(1), 4, 4)[0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("n", [2, 5, 9, 16])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_pools_of_any_size(n: int, ratio: float) -> None:
    features, seen = rng(3, n, 6), attention(3, 2, n)
    for budget in range(1, n + 1):
        kept = vispruner(features, seen, budget, ratio)
        assert kept.shape == (3, budget)
        assert different(kept)
        for image in range(3):
            one = vispruner(features[image, None], seen[image, None], budget, ratio)
            assert torch.equal(one[0], kept[image])


@pytest.mark.parametrize("n", [1, 3, 10, 40])
def test_few_patches_and_no_outliers(n: int) -> None:
    features, keys = rng(2, n, 5), rng(2, n, 4)
    flat = torch.full((2, n), 1 / n)
    merged = prumerge(features, keys, flat)
    assert merged.counts.tolist() == [1, 1]
    assert merged.centres.tolist() == [[0], [0]]
    mean = features[:, 1:].sum(dim=1) / n
    torch.testing.assert_close(merged.tokens[:, 1], mean)
    more = prumerge_plus(features, keys, flat)
    assert different(more.centres)
    assert more.tokens.shape[1] == more.centres.shape[1] + 1
    assert different(prumerge_plus(features, keys, attention(2, 1, n)[:, 0], 1.0, 32, n).centres)


def test_each_picture_has_a_number_of_centres_of_its_own() -> None:
    seen = torch.full((2, 36), 0.01)
    seen[0, :6], seen[1, :3] = 0.5, 0.5
    features, keys = rng(2, 36, 5), rng(2, 36, 4)
    merged = prumerge(features, keys, seen)
    assert merged.counts.tolist() == [6, 3]
    for image in range(2):
        alone = prumerge(features[image, None], keys[image, None], seen[image, None])
        count = int(alone.counts)
        assert torch.equal(alone.centres[0], merged.centres[image, :count])
        assert torch.equal(alone.tokens[0], merged.tokens[image, : count + 1])


def test_visionzip_without_and_with_too_many_contextual_tokens() -> None:
    features, seen, keys = rng(2, 13, 5), attention(2, 2, 12), rng(2, 13, 4)
    plain = visionzip(features, seen, keys, 6, 0)
    assert torch.equal(plain.tokens, take_rows(features, plain.kept))
    many = visionzip(features, seen, keys, 6, 50)
    assert many.tokens.shape[1] == 13
    assert different(torch.cat([many.kept, many.centres], dim=1))
    rest = take_rows(features, many.centres)
    assert torch.equal(many.tokens[:, 6:], rest)  # every row is its own centre
    assert visionzip(features, seen, keys, 13, 10).tokens.shape[1] == 13


def test_holov_hands_out_exactly_the_budget() -> None:
    features, seen = rng(3, 26, 5), (8 * rng(3, 26, seed=2)).softmax(dim=-1)
    for crops in (1, 4, 7, 26, 40):
        for budget in (1, 9, 26):
            places = holov(features, seen, budget, crops)
            assert places.shape == (3, budget)
            assert different(places)
            other = holov(rng(3, 26, 5, seed=9), seen, budget, crops)
            assert torch.equal(places, other)  # what tokens hold has no say
