"""Checkpoints that vLLM loads, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import family_makers
from tests.makers import tiny_next
from vlm_prune_ext import cli


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model under its published names."""
    folder = tmp_path_factory.mktemp("served") / "demo"
    assert cli.main(["convert", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's name -> a tiny random checkpoint."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny") / family
        if family == "llava_next":
            tiny_next(folder)
        else:
            getattr(family_makers, family)(folder)
        _publish(folder)
        return folder

    return make


def _publish(folder: Path) -> None:
    """Towers under the names that published checkpoints have, and vLLM reads."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        tower, inside = name.partition("vision_tower.")[1:]
        if tower and not inside.startswith("vision_model."):
            new = name.replace(tower, f"{tower}vision_model.", 1)
            tensors[new] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
