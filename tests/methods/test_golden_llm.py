"""VTW, PyramidDrop, DART, SparseVLM, SparseVLM+ and FEATHER against the outputs of their published
codes, eager and SDPA (tests/golden/README_llm.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_prune_ext as vp
from tests.golden_cases import Case, close, language_model, load_case, run_ids, runs

PREFIXES = ("vtw_", "pdrop_", "dart_", "sparsevlm_", "feather_")
RUNS = [pair for prefix in PREFIXES for pair in runs(prefix)]
NAMES = {"VTW": "vtw", "PyramidDrop": "pdrop", "DART": "dart", "FEATHER": "feather"}


def method_of(case: Case, run: dict) -> Any:
    if run["mode"] == "off":
        return None
    name = case.name.rsplit("_", 1)[0].removesuffix("_gqa")
    fields = {k: v for k, v in run.items() if k not in ("name", "mode", "depends_on_noise")}
    method = vp.get_method(name, **fields)
    if not run.get("depends_on_noise"):
        return method
    stored = case.of(run["name"])
    noise = [stored[f"noise.{layer + 1}"] for layer, _ in run["stages"]]
    return vp.SparseVLM(stages=run["stages"], noise=noise)


class Seen:
    """Positions that each layer's keys are rotated by, read off what the layers receive."""

    def __init__(self, model: Any) -> None:
        self.calls: list[list[torch.Tensor]] = []
        self.handles = [
            layer.register_forward_pre_hook(self._note, with_kwargs=True)
            for layer in model.model.layers
        ]
        self.rotary, self.count = model.model.rotary_emb, len(model.model.layers)

    def _note(self, module: Any, args: tuple, kwargs: dict) -> None:
        positions = kwargs["position_ids"]
        cos, sin = self.rotary(args[0], position_ids=positions)
        for made, given in zip((cos, sin), kwargs["position_embeddings"], strict=True):
            torch.testing.assert_close(made, given)
        if not self.calls or len(self.calls[-1]) == self.count:
            self.calls.append([])
        self.calls[-1].append(positions)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "run"), RUNS, ids=run_ids(RUNS))
@torch.no_grad()
def test_run(name: str, run: dict, attention: str) -> None:
    case = load_case(name)
    model, want, method = (
        language_model(case, attention),
        case.of(run["name"]),
        method_of(case, run),
    )
    with vp.prune(model, method, visual_span=case.span) as trace:
        seen = Seen(model)
        out = model.model(inputs_embeds=case.embeds, use_cache=True)
        close(out.last_hidden_state, want["last_hidden_state"])
        logits = [model.lm_head(out.last_hidden_state[0, -1])]
        close(logits[0], want["logits_last"])
        cache = out.past_key_values
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == want["cache_lens"].tolist()
        if method is not None:
            check_trace(trace, want, case, seen.calls[0])
        for _ in range(4):
            token = logits[-1].argmax().view(1, 1)
            logits.append(model(input_ids=token, past_key_values=cache).logits[0, -1])
    assert [int(row.argmax()) for row in logits] == want["greedy.tokens"].tolist()
    close(torch.stack(logits), want["greedy.logits"])
    steps = torch.stack([torch.cat(call)[:, 0] for call in seen.calls[1:]])
    assert torch.equal(steps, want["greedy.position_ids"])


def check_trace(trace: Any, want: dict, case: Case, positions: list[torch.Tensor]) -> None:
    """What every layer got: lengths, rows in order, positions, and what was added."""
    assert trace.lengths == want["seq_lens"].tolist()
    layers = sorted(int(key.split(".")[1]) for key in want if key.startswith("kept."))
    assert sorted(trace.kept) == layers
    total = case.embeds.shape[1]
    for layer in layers:
        kept, stored = want[f"kept.{layer}"], want[f"position_ids.{layer}"]
        assert torch.equal(trace.kept[layer][0], kept)
        assert torch.equal(positions[layer][0], stored)
        anew = not torch.equal(stored, kept)
        assert (layer in trace.positions) == anew
        if anew:
            assert torch.equal(trace.positions[layer][0], stored)
        recycled = want.get(f"recycled.{layer}")
        assert trace.merged.get(layer, 0) == (0 if recycled is None else len(recycled))
        assert trace.visual_tokens[layer] == [len(kept) - total + case.info["image_length"]]


MERGES = [(name, run) for name, run in RUNS if run["mode"] == "merge"]


@pytest.mark.parametrize(("name", "run"), MERGES, ids=run_ids(MERGES))
@torch.no_grad()
def test_recycled_rows(name: str, run: dict) -> None:
    """What SparseVLM merges enters the next layer as stored."""
    case = load_case(name)
    model, want = language_model(case, "sdpa"), case.of(run["name"])
    entered: list[torch.Tensor] = []
    with vp.prune(model, method_of(case, run), visual_span=case.span) as trace:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda module, args: entered.append(args[0][0]))
        model(inputs_embeds=case.embeds)
    for layer, kept in trace.kept.items():
        stored = want[f"recycled.{layer}"]
        newest = kept[0] > kept[0].max() - len(stored)
        close(entered[layer][newest], stored)
