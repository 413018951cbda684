"""SAINT against the outputs of its published code: language model and vision tower."""

from __future__ import annotations

import pytest
import torch

import vlm_prune_ext as vp
from tests.golden_cases import (
    close,
    greedy_with_cache,
    language_model,
    load_case,
    run_ids,
    runs,
    vision_tower,
)

LLM = runs("saint_llm_")
VIT = runs("saint_vit_")


def llm_method(run: dict, **extra: bool) -> vp.SAINT | None:
    if run["mode"] == "off":
        return None
    return vp.SAINT(start=run["start"], end=run["end"], threshold=run["threshold"], **extra)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reference", [False, True], ids=["corrected", "reference"])
@pytest.mark.parametrize(("name", "run"), LLM, ids=run_ids(LLM))
@torch.no_grad()
def test_language_model(name: str, run: dict, reference: bool, attention: str) -> None:
    case = load_case(name)
    model, want = language_model(case, attention), case.of(run["name"])
    method = llm_method(run, reference_positions=reference)
    with vp.prune(model, method, visual_span=case.span) as trace:
        out = model.model(inputs_embeds=case.embeds, use_cache=True)
        close(out.last_hidden_state, want["last_hidden_state"])
        kept, lengths = dict(trace.kept), list(trace.lengths)
        tokens, logits, caches = greedy_with_cache(model, case, 5)
    key = "greedy" if reference or method is None else "greedy_fixedpos"
    assert tokens == want[f"{key}.tokens"].tolist()
    close(logits, want[f"{key}.logits"])
    assert caches == want["cache_lens"].tolist()
    if method is None:
        return
    assert lengths == want["seq_lens"].tolist()
    for layer in range(run["start"], run["end"] + 1):
        assert torch.equal(kept[layer + 1][0], want[f"event.{layer}.kept"])
    assert torch.equal(kept[run["end"] + 1][0], want["final_positions"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), LLM, ids=run_ids(LLM))
@torch.no_grad()
def test_without_cache(name: str, run: dict, attention: str) -> None:
    case = load_case(name)
    model, want = language_model(case, attention), case.of(run["name"])
    with vp.prune(model, llm_method(run), visual_span=case.span):
        out = model.model(inputs_embeds=case.embeds, use_cache=False)
    close(out.last_hidden_state, want["last_hidden_state"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("hidden", [True, False], ids=["all_states", "plain"])
@pytest.mark.parametrize(("name", "run"), VIT, ids=run_ids(VIT))
@torch.no_grad()
def test_vision_tower(name: str, run: dict, hidden: bool, attention: str) -> None:
    case = load_case(name)
    model, want = vision_tower(case, attention), case.of(run["name"])
    method = None
    if "layers" in run or run.get("use_reference_constants"):
        layers = run.get("layers", [4])
        vit = vp.SAINTViT(
            layers=tuple(layers),
            keep_num=tuple(run["keep_num"]) if "keep_num" in run else 376,
            r=tuple(run["r"]) if "r" in run else 16,
        )
        method = vp.SAINT(start=None, vit=vit)
    seen: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
        for layer in model.encoder.layers
    ]
    with vp.prune(model, method) as trace:
        out = model(case.tensors["pixel_values"], output_hidden_states=hidden)
    for handle in handles:
        handle.remove()
    close(out.last_hidden_state, want["last_hidden_state"])
    close(out.pooler_output, want["pooler_output"])
    assert seen == want["seq_lens"].tolist()
    if hidden:
        close(out.hidden_states[-2][:, 1:], want["features_minus2_no_cls"])
    if method is not None:
        for layer in layers:
            assert torch.equal(trace.vision_kept[layer][0], want[f"event.{layer}.kept_patches"])
