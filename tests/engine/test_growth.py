"""Memory does not grow with the number of samples, whatever the method.

By default few samples run, so that the suite stays quick; VLM_PRUNE_GROWTH_SAMPLES=1000 runs what
the README states.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import psutil
import pytest
import torch

import vlm_prune_ext as vp
from tests import tables
from tests.makers import photos, tiny_original

SAMPLES = int(os.environ.get("VLM_PRUNE_GROWTH_SAMPLES", "150"))
WARM_UP = 50
METHODS = tables.pick("none", "fastv-mask", "saint-hybrid", "downsample", *tables.EVERYWHERE)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return vp.load(tiny_original(tmp_path_factory.mktemp("growth")))


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_no_growth(loaded, name: str) -> None:
    model, processor = loaded
    images = photos(3)

    def prompt(sample: int) -> Any:
        return processor.prompt(f"What is in picture {sample % 7}?", images[sample % 3])

    known = [prompt(sample) for sample in range(21)]
    start = 0
    for sample in range(SAMPLES):
        # Making prompts is the same for all methods.
        inputs = prompt(sample) if name == "none" else known[sample % 21]
        with vp.prune(model, METHODS[name]):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        if sample + 1 == WARM_UP:
            start = resident()
    assert resident() < start * 1.01
