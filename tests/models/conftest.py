"""Checkpoints of every family, made once for all tests that only read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import family_makers, makers

_KINDS = family_makers.KINDS | family_makers.TABLE | family_makers.VIDEO
FAMILIES: dict[str, Callable[[Path], Any]] = {
    **{name: kind.make for name, kind in _KINDS.items()},
    "internvl_chat": lambda folder: family_makers.internvl_chat(folder, "LlamaForCausalLM"),
    "llava": makers.tiny_original,
    "llava_hf": makers.tiny_hf_llava,
}


class Folders(dict[str, Path]):
    """A family's folder, made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        folder = self[name] = self.factory.mktemp(name, numbered=False)
        FAMILIES[name](folder)
        return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Name of a family -> its checkpoint; not to be written to."""
    return Folders(tmp_path_factory)
