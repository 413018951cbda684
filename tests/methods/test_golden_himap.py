"""HiMAP against the outputs of its published code, eager and SDPA."""

from __future__ import annotations

import pytest
import torch

import vlm_prune_ext as vp
from tests.golden_cases import (
    close,
    greedy_without_cache,
    language_model,
    load_case,
    run_ids,
    runs,
)

RUNS = runs("himap_")


def method_of(run: dict) -> vp.HiMAP | None:
    if run["mode"] == "off":
        return None
    return vp.HiMAP(
        attn_txt_layer=run["txt_layer"],
        attn_txt_rank=run["txt_rank"],
        attn_img_layer=run["img_layer"],
        attn_img_rank=run["img_rank"],
    )


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), RUNS, ids=run_ids(RUNS))
@torch.no_grad()
def test_prefill(name: str, run: dict, attention: str, use_cache: bool) -> None:
    case = load_case(name)
    model, want, method = language_model(case, attention), case.of(run["name"]), method_of(run)
    with vp.prune(model, method, visual_span=case.span) as trace:
        out = model.model(inputs_embeds=case.embeds, use_cache=use_cache)
    close(out.last_hidden_state, want["last_hidden_state"])
    close(model.lm_head(out.last_hidden_state[0, -1]), want["logits_last"])
    if method is None:
        return
    assert trace.lengths == want["seq_lens"].tolist()
    assert torch.equal(trace.kept[run["txt_layer"]][0], want["kept_txt"])
    assert torch.equal(trace.kept[run["img_layer"]][0], want["kept_img"])


GREEDY = [(n, r) for n, r in RUNS if r.get("greedy")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), GREEDY, ids=run_ids(GREEDY))
@torch.no_grad()
def test_greedy(name: str, run: dict, attention: str) -> None:
    case = load_case(name)
    model, method, want = language_model(case, attention), method_of(run), case.of(run["name"])
    start, length = case.span
    kept: dict[str, list[torch.Tensor]] = {"txt": [], "img": []}
    with vp.prune(model, method, visual_span=case.span) as trace:

        def note() -> None:
            for stage, rows in kept.items():
                if method is not None:
                    row = trace.kept[run[f"{stage}_layer"]][0]
                    rows.append(row[(row >= start) & (row < start + length)])

        tokens, logits = greedy_without_cache(model, case, 5, note)
    assert tokens == want["greedy.tokens"].tolist()
    close(logits, want["greedy.logits"])
    for stage, rows in kept.items():
        if method is not None:
            assert torch.equal(torch.stack(rows), want[f"greedy.kept_{stage}_image"])
