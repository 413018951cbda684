"""Short names of models, what `vlm-prune models` says of them, and minimum versions."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

import vlm_prune_ext as vp
from vlm_prune_ext import cli
from vlm_prune_ext.models import catalogue, families


def test_each_entry_belongs_to_a_family_that_loads():
    loadable = {family.line.name for family in families() if family.load is not None}
    for entry in catalogue.CATALOGUE.values():
        assert entry.family in loadable
        assert entry.model_id.count("/") == 1 and entry.size > 1
    assert {"llava-1.5-7b", "gemma-3-4b", "fuyu-8b"} <= set(catalogue.CATALOGUE)


def test_vision_side_is_what_the_adapters_offer():
    """Only LLaVA's towers are CLIP-like."""
    sided = {line.name for line in catalogue.FAMILIES.values() if line.tower}
    assert sided == {"llava", "llava_next"}


def test_short_names(tmp_path, monkeypatch):
    assert catalogue.resolve("Fuyu-8B") == "adept/fuyu-8b"
    assert catalogue.resolve("adept/fuyu-8b") == "adept/fuyu-8b"
    assert catalogue.resolve("something else") == "something else"
    with pytest.raises(vp.InputError, match=r"'gema-3-4b'.*'gemma-3-4b'"):
        vp.load("gema-3-4b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fuyu-8b").mkdir()
    assert catalogue.resolve("fuyu-8b") == "fuyu-8b"
    with pytest.raises(vp.InputError, match=r"'fuyu-8b' has no config\.json"):
        vp.load("fuyu-8b")


def test_the_demo_by_its_name_and_without_one():
    from vlm_prune_ext.demo import CHECKPOINT

    assert catalogue.resolve("demo") == CHECKPOINT
    (first, _), (second, processor) = vp.load(device="cpu"), vp.load("demo", device="cpu")
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert processor.family == "llava"


def test_the_list_is_fast_and_needs_no_library():
    """`vlm-prune models` is data: nothing heavy is imported for it."""
    code = (
        "import sys; from vlm_prune_ext import cli; cli.main(['models']);"
        "heavy = {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 2


def test_versions_that_are_too_old(monkeypatch):
    catalogue.check_versions()
    old = {"transformers": "4.57.1", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(catalogue, "version", old.__getitem__)
    with pytest.raises(vp.InputError, match=r"transformers 4\.57\.1 is too old.*pip install"):
        vp.load("fuyu-8b")


def test_command_lists_all(capsys):
    assert cli.main(["models"]) == 0
    said = capsys.readouterr().out
    for entry in catalogue.CATALOGUE.values():
        line = next(line for line in said.splitlines() if line.startswith(f"{entry.name} "))
        assert entry.model_id in line and f"{entry.size:g}B" in line
    assert "needs transformers 5.17 or newer" in said


def test_command_says_everything_about_one(capsys):
    assert cli.main(["models", "blip2-flan-t5-xl"]) == 0
    said = capsys.readouterr().out
    assert "llm_side: no" in said and "encoder-decoder" in said
    assert cli.main(["models", "fuyu-8b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == "adept/fuyu-8b"
    assert cli.main(["models", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(catalogue.CATALOGUE)


def test_command_suggests_the_near_name(capsys):
    assert cli.main(["models", "fuyu-8c"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "'fuyu-8b'" in captured.err
