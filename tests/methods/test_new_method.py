"""A method is one file: registered from a file of nobody's, it is in every list there is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vlm_prune_ext as vp
from tests.makers import tiny_bare_llama
from tests.words import settings_of
from vlm_prune_ext import cli
from vlm_prune_ext.evals import lmms_plugin
from vlm_prune_ext.methods.base import REGISTERED
from vlm_prune_ext.methods.registry import parse_method, standard_method
from vlm_prune_ext.pruning import reset_calls

FILE = '''
"""FirstOnes: keep the first visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Budget, Evidence, Method, Stage, register, resolve_budget
from vlm_prune_ext.methods.option import a_budget, a_layer, option


@register
@dataclass(frozen=True)
class FirstOnes(Method):
    """Keep the first visual tokens of each image."""

    name = "first_ones"
    paper = "none"
    budget_field = "amount"

    amount: Budget = option(7, a_budget(), "Visual tokens kept.", tag="a", always=True)
    start: int = option(2, a_layer(1), "Layer in front of which the others go.")

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage."""
        return (Stage(self.start, (), self._rule, budget=self.amount),)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        keep = resolve_budget("amount", self.amount, evidence.total)
        return torch.arange(keep).expand(len(evidence.places), keep)
'''


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[None]:
    path = tmp_path / "first_ones.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("somebodys_first_ones", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        del sys.modules[spec.name]
        REGISTERED.pop("first_ones", None)


def test_in_python(registered: None) -> None:
    method = vp.FirstOnes(amount=9)
    assert "FirstOnes" in dir(vp) and "first_ones" in vp.METHODS
    assert vp.get_method("first_ones", first_ones_amount=9) == method
    assert parse_method("first_ones:9,start=3") == vp.FirstOnes(9, 3)
    assert vp.FirstOnes(9, 3).label() == "first_ones_a9_start3"
    assert reset_calls()["reset_first_ones"] == "first_ones"
    assert "amount: Visual tokens kept." in type(method).__doc__


def test_in_both_frameworks(registered: None) -> None:
    assert lmms_plugin.models()["llava_first_ones"] == "first_ones"
    assert "llava_first_ones" in {m.model_id for m in lmms_plugin.manifests()}
    given = {"amount": 5, "first_ones_start": 3}
    assert lmms_plugin.method_of("llava_first_ones", given) == vp.FirstOnes(5, 3)
    from vlm_prune_ext.evals import lmms, vlmeval

    assert lmms.LlavaFirstOnesChat.MODEL == "llava_first_ones"
    assert vlmeval.LLaVAFirstOnes.METHOD == "first_ones"
    assert f"llava-demo-{standard_method('first_ones').label()}" in vlmeval.register()


def test_on_command_lines(registered: None, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--method", "first_ones:5"],
        ["--use-first-ones", "--first-ones-amount", "5"],
        ["--method", "first_ones", "--set", "amount=5"],
    ):
        settings, _ = settings_of(words)
        assert settings.method == vp.FirstOnes(5)
    assert cli.main(["methods", "first_ones"]) == 0
    assert "first_ones_amount" in capsys.readouterr().out


def test_its_options_are_refused_elsewhere(registered: None) -> None:
    for method in ("random:9", "downsample:9", "fastv"):
        with pytest.raises(vp.InputError, match="first-ones-amount is a parameter of first_ones"):
            settings_of(["--method", method, "--first-ones-amount", "64"])


def test_it_prunes(registered: None) -> None:
    model = tiny_bare_llama(layers=4)
    with vp.prune(model, vp.FirstOnes(3), visual_span=(2, 10)) as trace, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 16, 64))
    assert trace.kept[2].tolist() == [[0, 1, 2, 3, 4, 12, 13, 14, 15]]
