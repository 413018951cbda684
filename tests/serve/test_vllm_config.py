"""What vLLM is told when a configuration asks for pruning, and what keys its caches get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import family_makers
from tests.makers import photo

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from tests.serve.engine import Served, config  # noqa: E402


def test_without_the_key_nothing_is_ours(demo: Path) -> None:
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    assert get_model_cls(config(demo, None).model_config) is LlavaForConditionalGeneration
    pruned = get_model_cls(config(demo, "divprune:64").model_config)
    assert pruned.__name__ == "PrunedLlava"
    # Two engines of one process: the engine's memory of classes holds both.
    assert get_model_cls(config(demo, None).model_config) is LlavaForConditionalGeneration


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("fastv:100", "in front of layer 3"),
        ("cdpruner:64", "depends on the question"),
        ("divprune:577", "an image has 576 visual tokens at most"),
        ("divprun:64", "Did you mean 'divprune'"),
    ],
)
def test_refused_before_weights_are_read(
    demo: Path, tmp_path: Path, method: str, said: str
) -> None:
    """There are none to read."""
    for file in demo.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=said):
        config(tmp_path, method)


def test_an_unknown_family(tmp_path: Path) -> None:
    family_makers.qwen2_vl(tmp_path)
    with pytest.raises(ValueError, match="not possible with Qwen2VLForConditionalGeneration"):
        config(tmp_path, "divprune:6")
    config(tmp_path, None)


def test_another_version(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    with pytest.raises(ValueError, match=r"this is vLLM 0\.40\.1"):
        config(demo, "divprune:64")
    config(demo, None)


def test_a_near_key(demo: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'vlm_prune'"):
        config(demo, None, hf_overrides={"vlm-prune": "divprune:64"})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder=True"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder=True"),
        ({"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode='data'"),
    ],
)
def test_what_passes_a_rule_by(
    tiny: Callable[[str], Path], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Served(tiny("qwen2_5_vl"), "fastervlm:5", **more)


def test_methods_do_not_share_what_is_cached(demo: Path) -> None:
    """One cache handed to two methods: an image has another key, which is that of the encoder's
    rows and of blocks of the prefix too."""
    from vllm.multimodal.cache import processor_only_cache_from_config
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs
    from vllm.multimodal.registry import MultiModalRegistry

    picture, keys, cache = photo(seed=1), [], None
    for method, count in ((None, 576), ("divprune:64", 64), ("divprune:32", 32), ("scope:32", 32)):
        made = config(demo, method)
        processor = MultiModalRegistry().create_processor(made.model_config)
        cache = cache or processor_only_cache_from_config(made)
        for _ in range(2):
            items = processor.info.parse_mm_data({"image": [picture]})
            prompt = processor.info.get_tokenizer().encode("<image>What?")
            given = ProcessorInputs(prompt=prompt, mm_data_items=items, cache=cache)
            got = processor.apply(given, TimingContext(enabled=False))
            assert got["mm_placeholders"]["image"][0].length == count
            keys.append(got["mm_hashes"]["image"][0])
    assert len(set(keys)) == 4 and keys[::2] == keys[1::2]


def test_an_images_key_of_the_users_own(demo: Path) -> None:
    served = [Served(demo, method) for method in (None, "divprune:64")]
    from vllm.multimodal.processing.inputs import ProcessorInputs

    for one in served:
        items = one.processor.info.parse_mm_data({"image": [photo()]})
        given = ProcessorInputs([1], items, mm_uuid_items={"image": ["mine"]})
        key = one.processor._get_mm_hashes(given)["image"][0]
        assert (key == "mine") == (one is served[0])


def test_a_step_encodes_no_more_than_the_unpruned_engine_would(demo: Path) -> None:
    served = Served(demo, "fastervlm:8", max_num_batched_tokens=1200)
    pictures = [photo(seed=seed) for seed in range(5)]
    calls: list[int] = []
    tower = served.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    rows = served.rows(served.inputs("<image>" * 5, pictures))
    handle.remove()
    assert calls == [2, 2, 1] and [len(one) for one in rows] == [8] * 5
