"""Properties of pruning on a bare language model: every method, three attention back ends."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlm_prune_ext as vp
from tests import flash_standin
from tests.pruning_checks import Recorded, fingerprint
from tests.tables import DECODER, KEEP_ALL, LEFT

LAYERS, WIDTH = 5, 32
ATTENTIONS = ["eager", "sdpa", flash_standin.register()]
# (text in front, image, text behind) of four prompts of different lengths
PROMPTS = [(3, 20, 5), (7, 20, 2), (2, 20, 9), (5, 14, 4)]

METHODS = DECODER
FASTV = vp.FastV(agg_layer=2, attention_rank=7)


def make(attention: str, kv_heads: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
        eos_token_id=None,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)  # attention far from uniform
    return model


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return make(request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prompts() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, sum(parts), WIDTH) for parts in PROMPTS]


def padded() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]], list[int]]:
    """Left-padded batch: embeddings, mask, spans, padding of each sample."""
    rows = prompts()
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    embeds = torch.cat(
        [torch.nn.functional.pad(r, (0, 0, p, 0)) for r, p in zip(rows, pads, strict=True)]
    )
    mask = torch.tensor([[0] * p + [1] * (longest - p) for p in pads])
    spans = [(p + parts[0], parts[1]) for p, parts in zip(pads, PROMPTS, strict=True)]
    return embeds, mask, spans, pads


def generate(model, embeds: torch.Tensor, steps: int = 5, **extra):
    extra.setdefault("attention_mask", torch.ones(embeds.shape[:2], dtype=torch.int64))
    out = model.generate(
        inputs_embeds=embeds,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **extra,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("name", [name for name in KEEP_ALL if name in METHODS])
def test_keep_all_is_the_baseline(model: LlamaForCausalLM, name: str) -> None:
    embeds, mask, spans, _ = padded()
    for batch, extra, span in (
        (embeds, {"attention_mask": mask}, spans),
        (embeds[:1, 2:], {}, (spans[0][0] - 2, 20)),
    ):
        want = generate(model, batch, **extra)
        with vp.prune(model, KEEP_ALL[name], visual_span=span) as trace:
            got = generate(model, batch, **extra)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert trace.lengths == [batch.shape[1]] * LAYERS


@pytest.mark.parametrize("name", METHODS)
def test_counts_and_text(model: LlamaForCausalLM, name: str) -> None:
    (front, image, behind), embeds = PROMPTS[0], prompts()[0]
    with vp.prune(model, METHODS[name], visual_span=(front, image)) as trace:
        generate(model, embeds, steps=2)
    last = max(trace.kept)
    kept = trace.kept[last][0].tolist()
    total = embeds.shape[1]
    text = [*range(front), *range(front + image, total)]
    prompt = [token for token in kept if token < total]
    assert prompt == sorted(set(prompt)) and set(text) <= set(prompt)
    # What was added stands behind the image's tokens and in front of the text.
    added = kept[len(prompt) - behind : len(kept) - behind]
    assert len(added) == len(kept) - len(prompt) and all(token >= total for token in added)
    assert (len(added) > 0) == bool(trace.merged) == (name == "sparsevlm")
    assert len(kept) < total
    assert trace.visual_input == [image]
    assert trace.visual_tokens[last] == [len(kept) - len(text)]
    if name in LEFT:
        assert len(kept) == len(text) + LEFT[name](image)
    if name != "fastv-mask" and last < LAYERS:
        assert trace.lengths[last] == len(kept)


@pytest.mark.parametrize("name", METHODS)
def test_batch_equals_singles(model: LlamaForCausalLM, name: str) -> None:
    embeds, mask, spans, pads = padded()
    with vp.prune(model, METHODS[name], visual_span=spans) as trace:
        tokens, logits = generate(model, embeds, attention_mask=mask)
        kept = {layer: rows.clone() for layer, rows in trace.kept.items()}
    for i, (row, parts) in enumerate(zip(prompts(), PROMPTS, strict=True)):
        with vp.prune(model, METHODS[name], visual_span=parts[:2]) as alone:
            one_tokens, one_logits = generate(model, row)
        assert torch.equal(tokens[i], one_tokens[0])
        torch.testing.assert_close(logits[i], one_logits[0], atol=1e-4, rtol=1e-4)
        for layer, rows in alone.kept.items():
            mine = kept[layer][i]
            assert torch.equal(mine[mine >= pads[i]] - pads[i], rows[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "fastv-mask"])
def test_cached_equals_rerun(model: LlamaForCausalLM, name: str, cache: str) -> None:
    """Decoding from the pruned cache = running everything again over the same kept set."""
    if cache == "static" and model.config._attn_implementation == flash_standin.NAME:
        pytest.skip("FlashAttention-2 does not take static caches")
    front, image, _ = PROMPTS[1]
    embeds = prompts()[1]
    how = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    recorded = Recorded(METHODS[name])
    with vp.prune(model, recorded, visual_span=(front, image)):
        tokens, logits = generate(model, embeds, **how)
    with vp.prune(model, Recorded(METHODS[name], recorded), visual_span=(front, image)):
        for step in range(tokens.shape[1]):
            out = model(inputs_embeds=embeds, use_cache=False)
            torch.testing.assert_close(out.logits[0, -1], logits[0, step], atol=1e-4, rtol=1e-4)
            new = model.get_input_embeddings()(tokens[:, step : step + 1])
            embeds = torch.cat([embeds, new], dim=1)


@pytest.mark.parametrize("name", METHODS)
def test_static_cache_equals_dynamic(model: LlamaForCausalLM, name: str) -> None:
    if model.config._attn_implementation == flash_standin.NAME:
        pytest.skip("FlashAttention-2 does not take static caches")
    embeds, mask, spans, _ = padded()
    with vp.prune(model, METHODS[name], visual_span=spans):
        want = generate(model, embeds, attention_mask=mask)
        got = generate(
            model, embeds, attention_mask=mask, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_several_tokens_at_once(model: LlamaForCausalLM, name: str) -> None:
    """Text fed in one piece after the prompt equals the same text fed token by token."""
    if name == "fastv-mask" and model.config._attn_implementation == flash_standin.NAME:
        pytest.skip("FlashAttention-2 has one mask for all tokens of a call")
    embeds, mask, spans, _ = padded()
    text = torch.tensor([[5, 6, 7]]).expand(4, 3)
    logits = []
    for pieces in ([3], [1, 1, 1]):
        seen, rows = mask, []
        with vp.prune(model, METHODS[name], visual_span=spans):
            out = model(inputs_embeds=embeds, attention_mask=seen, use_cache=True)
            for piece in text.split(pieces, dim=1):
                seen = torch.cat([seen, torch.ones_like(piece)], dim=1)
                out = model(
                    input_ids=piece, attention_mask=seen, past_key_values=out.past_key_values
                )
                rows.append(out.logits)
        logits.append(torch.cat(rows, dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "saint", "random", "pdrop", "sparsevlm"])
def test_beams(model: LlamaForCausalLM, name: str) -> None:
    """Beam search reorders the cache; the layouts must fit every beam."""
    embeds, mask, spans, _ = padded()
    spans = [span for span in spans for _ in range(2)]
    recorded = Recorded(METHODS[name])
    with vp.prune(model, recorded, visual_span=spans):
        got = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            num_beams=2,
            max_new_tokens=4,
            do_sample=False,
        )
    with vp.prune(model, Recorded(METHODS[name], recorded), visual_span=spans):
        want = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            num_beams=2,
            max_new_tokens=4,
            do_sample=False,
        )
    assert torch.equal(got, want)


def test_two_caches_in_turn(model: LlamaForCausalLM) -> None:
    """State belongs to a cache: decoding two prompts step by step in turn mixes nothing up."""
    rows = prompts()[:2]
    method = FASTV
    alone = []
    for row, parts in zip(rows, PROMPTS[:2], strict=True):
        with vp.prune(model, method, visual_span=parts[:2]):
            alone.append(generate(model, row, steps=4)[1])
    with vp.prune(model, FASTV, visual_span=PROMPTS[0][:2]):
        one = model(inputs_embeds=rows[0], use_cache=True)
        two = model(inputs_embeds=rows[0].flip(1), use_cache=True)
        logits = [one.logits[:, -1]]
        for _ in range(3):
            two = model(input_ids=torch.tensor([[5]]), past_key_values=two.past_key_values)
            step = logits[-1].argmax(-1, keepdim=True)
            one = model(input_ids=step, past_key_values=one.past_key_values)
            logits.append(one.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_model_is_restored(model: LlamaForCausalLM, name: str) -> None:
    front, image, _ = PROMPTS[0]
    before, weights = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    with vp.prune(model, METHODS[name], visual_span=(front, image)):
        model(inputs_embeds=prompts()[0])
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_model_is_restored_after_an_exception(model: LlamaForCausalLM, name: str) -> None:
    """An exception in the middle of a prefill, from a layer behind the first drop."""

    class Broken(Exception):
        pass

    def fail(*args):
        raise Broken

    before = fingerprint(model)
    with pytest.raises(Broken), vp.prune(model, METHODS[name], visual_span=PROMPTS[0][:2]):
        handle = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
        try:
            model(inputs_embeds=prompts()[0])
        finally:
            handle.remove()
    assert fingerprint(model) == before
    want = generate(model, prompts()[0])[1]
    with vp.prune(model, METHODS[name], visual_span=PROMPTS[0][:2]):
        generate(model, prompts()[0])
    assert torch.equal(generate(model, prompts()[0])[1], want)


def test_baseline_attaches_nothing(model: LlamaForCausalLM) -> None:
    before = fingerprint(model)
    with vp.prune(model, None):
        assert fingerprint(model) == before


def test_state_goes_with_the_cache(model: LlamaForCausalLM) -> None:
    """Nothing of a finished prompt stays: growth over many prompts is none."""
    with vp.prune(model, FASTV, visual_span=PROMPTS[0][:2]):
        counts = []
        for _ in range(6):
            generate(model, prompts()[0], steps=2)
            gc.collect()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    assert counts[-1] == counts[1]


def test_right_padding(model: LlamaForCausalLM) -> None:
    """The last token that counts asks, not the padding behind it."""
    front, image, _ = PROMPTS[0]
    row = prompts()[0]
    embeds = torch.nn.functional.pad(row, (0, 0, 0, 3))
    mask = torch.tensor([[1] * row.shape[1] + [0] * 3])
    with vp.prune(model, FASTV, visual_span=(front, image)) as trace:
        model(inputs_embeds=embeds, attention_mask=mask)
        kept = trace.kept[2][0]
        model(inputs_embeds=row)
    assert torch.equal(kept[kept < row.shape[1]], trace.kept[2][0])


def test_two_images(model: LlamaForCausalLM) -> None:
    """A count is a count per image."""
    embeds = prompts()[1]
    with vp.prune(model, FASTV, visual_span=[[(2, 10), (14, 12)]]) as trace:
        model(inputs_embeds=embeds)
    kept = trace.kept[2][0]
    assert ((kept >= 2) & (kept < 12)).sum() == 7
    assert ((kept >= 14) & (kept < 26)).sum() == 7
    assert trace.visual_tokens[2] == [14]


def test_sample_without_an_image(model: LlamaForCausalLM) -> None:
    embeds = torch.cat([prompts()[0], prompts()[0]])
    with vp.prune(model, FASTV, visual_span=[[(3, 20)], []]) as trace:
        out = model(inputs_embeds=embeds)
    want = model(inputs_embeds=embeds[1:])
    torch.testing.assert_close(out.logits[1, -1], want.logits[0, -1], atol=1e-4, rtol=1e-4)
    assert trace.visual_tokens[2] == [7, 0]


class TestBadInput:
    def test_nested(self) -> None:
        model = make("sdpa")
        with (
            vp.prune(model, FASTV, visual_span=(3, 20)),
            pytest.raises(vp.InputError, match="already"),
            vp.prune(model, METHODS["random"], visual_span=(3, 20)),
        ):
            pass

    def test_no_span(self) -> None:
        model = make("sdpa")
        with pytest.raises(vp.InputError, match="visual_span"), vp.prune(model, FASTV):
            model(inputs_embeds=prompts()[0])

    def test_stated_lengths_serve_as_span(self) -> None:
        model = make("sdpa")
        stated = vp.FastV(agg_layer=2, attention_rank=7, sys_length=3, image_token_length=20)
        with vp.prune(model, stated) as trace:
            model(inputs_embeds=prompts()[0])
        assert trace.visual_tokens[2] == [7]

    @pytest.mark.parametrize(
        ("fields", "said"),
        [({"sys_length": 4}, "sys_length=4.*3 tokens"), ({"image_token_length": 19}, "19.*20")],
    )
    def test_stated_lengths_that_contradict(self, fields: dict, said: str) -> None:
        model = make("sdpa")
        method = vp.FastV(agg_layer=2, attention_rank=7, **fields)
        with (
            pytest.raises(vp.InputError, match=said),
            vp.prune(model, method, visual_span=(3, 20)),
        ):
            model(inputs_embeds=prompts()[0])

    @pytest.mark.parametrize("span", [(3, 99), (-1, 5), (3, 0), "3,20", [(1, 2), (3, 4)], 7])
    def test_bad_span(self, span: object) -> None:
        model = make("sdpa")
        with (
            pytest.raises(vp.InputError, match="visual_span"),
            vp.prune(model, FASTV, visual_span=span),  # type: ignore[arg-type]
        ):
            model(inputs_embeds=prompts()[0])

    def test_budget_above_what_is_there_keeps_all(self) -> None:
        model, embeds = make("sdpa"), prompts()[0]
        method = vp.FastV(agg_layer=2, attention_rank=21)
        with torch.no_grad():
            whole = model(inputs_embeds=embeds).logits
            with vp.prune(model, method, visual_span=(3, 20)) as trace:
                assert torch.equal(model(inputs_embeds=embeds).logits, whole)
        assert trace.visual_tokens[2] == [20]

    def test_layer_beyond_the_model(self) -> None:
        with (
            pytest.raises(vp.InputError, match=r"agg_layer=5.*1 \.\.\. 4"),
            vp.prune(make("sdpa"), vp.FastV(agg_layer=5), visual_span=(3, 20)),
        ):
            pass

    def test_vision_method_on_a_language_model(self) -> None:
        for method, why in (
            (vp.Downsample(keep=4), "averages over a grid"),
            (vp.SAINT(start=None, vit=vp.SAINTViT()), "no vision tower"),
            (vp.FasterVLM(budget=4), "no vision tower"),
        ):
            model = make("sdpa")
            with (
                pytest.raises(vp.InputError, match=why),
                vp.prune(model, method, visual_span=(3, 20)),
            ):
                model(inputs_embeds=prompts()[0])
