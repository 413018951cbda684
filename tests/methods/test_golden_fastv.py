"""FastV against the outputs of its published code, eager and SDPA."""

from __future__ import annotations

import pytest
import torch

import vlm_prune_ext as vp
from tests.golden_cases import (
    close,
    greedy_with_cache,
    greedy_without_cache,
    language_model,
    load_case,
    run_ids,
    runs,
)

RUNS = runs("fastv_")


def method_of(run: dict) -> vp.FastV | None:
    if run["mode"] == "off":
        return None
    if run["mode"] == "static_cache":
        return vp.FastV(agg_layer=run["k"], attention_rank=1.0 - run["ratio"])
    mode = "mask" if run["mode"] == "mask" else "drop"
    return vp.FastV(agg_layer=run["k"], attention_rank=run["rank"], mode=mode)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), RUNS, ids=run_ids(RUNS))
@torch.no_grad()
def test_prefill(name: str, run: dict, attention: str) -> None:
    case = load_case(name)
    model, want, method = language_model(case, attention), case.of(run["name"]), method_of(run)
    with vp.prune(model, method, visual_span=case.span) as trace:
        out = model.model(inputs_embeds=case.embeds, use_cache=run["mode"] == "static_cache")
    hidden = out.last_hidden_state
    logits = model.lm_head(hidden[0, -1])
    close(logits, want["logits_last"])
    if method is None:
        close(hidden, want["last_hidden_state"])
        return
    assert trace.lengths == want["seq_lens"].tolist()
    assert torch.equal(trace.kept[run["k"]][0], want["kept"])
    if run["mode"] == "mask":
        close(hidden[:, want["kept"]], want["last_hidden_state"][:, want["kept"]])
    else:
        close(hidden, want["last_hidden_state"])
    if "cache_lens" in want:
        got = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        assert got == want["cache_lens"].tolist()


GREEDY = [(n, r) for n, r in RUNS if r.get("greedy") or r.get("greedy_cache")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), GREEDY, ids=run_ids(GREEDY))
@torch.no_grad()
def test_greedy(name: str, run: dict, attention: str) -> None:
    case = load_case(name)
    model, method, want = language_model(case, attention), method_of(run), case.of(run["name"])
    kept: list[torch.Tensor] = []
    start, length = case.span
    with vp.prune(model, method, visual_span=case.span) as trace:

        def note() -> None:
            if method is not None:
                row = trace.kept[run["k"]][0]
                kept.append(row[(row >= start) & (row < start + length)])

        if run["mode"] in ("static_cache", "mask"):
            tokens, logits, _ = greedy_with_cache(model, case, 5, note)
        else:
            tokens, logits = greedy_without_cache(model, case, 5, note)
    key = "greedy_cache" if run["mode"] == "mask" else "greedy"
    assert tokens == want[f"{key}.tokens"].tolist()
    close(logits, want[f"{key}.logits"])
    if f"{key}.kept_image" in want:
        assert torch.equal(torch.stack(kept), want[f"{key}.kept_image"])


def test_decode_positions() -> None:
    """Every layer gets the position the new token would have had without pruning."""
    name, run = next((n, r) for n, r in RUNS if r["mode"] == "static_cache")
    case = load_case(name)
    model, want = language_model(case, "sdpa"), case.of(run["name"])["greedy.position_ids"]
    seen: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda m, a, kw: seen.append(int(kw["position_ids"][0, -1])), with_kwargs=True
        )
    with torch.no_grad(), vp.prune(model, method_of(run), visual_span=case.span):
        greedy_with_cache(model, case, 5)
    steps = torch.tensor(seen).view(-1, len(model.model.layers))[1:]
    assert torch.equal(steps, want)
