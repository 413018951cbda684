"""Broken checkpoints and wrong arguments: one sentence that names the field and what is accepted,
in place of what libraries raise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import vlm_prune_ext as vp
from tests import family_makers

NAMES = (*family_makers.KINDS, "internvl_chat", "llava", "llava_hf")
TEXT = {"llava": "", "internvl_chat": "llm_config"}
Case = tuple[str, dict[str, Any], str]


@pytest.fixture
def made(folders: Any) -> Any:
    return folders


def load(folder: Path, **more: Any) -> None:
    trust = {"trust_remote_code": True} if "internvl_chat" in str(folder) else {}
    vp.load(folder, device="cpu", **trust, **more)


def refused(folder: Path, **more: Any) -> str:
    """What is said, in one line."""
    with pytest.raises(vp.InputError) as told:
        load(folder, **more)
    assert "\n" not in str(told.value)
    return str(told.value)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / folder.name))


def edited(folder: Path, target: Path, part: str, **fields: Any) -> Path:
    copy = copied(folder, target)
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


HEADS: list[Case] = [
    ("num_attention_heads", {"num_attention_heads": 0}, "an integer of at least 1"),
    ("num_attention_heads", {"num_attention_heads": "4"}, "an integer of at least 1"),
    ("num_attention_heads", {"num_attention_heads": 7, "head_dim": None}, "a divisor of hidden_si"),
    ("num_key_value_heads", {"num_key_value_heads": 3}, "a divisor of num_attention_heads, 4"),
    ("hidden_size", {"hidden_size": -64}, "an integer of at least 1"),
    ("hidden_act", {"hidden_act": "selu2"}, "relu, relu2"),
]


@pytest.mark.parametrize("case", HEADS, ids=lambda case: str(case[1]))
@pytest.mark.parametrize("name", ["llava", "llava_hf", "qwen2_5_vl", "gemma3", "internvl_chat"])
def test_fields_of_the_language_model(name: str, case: Case, made: Any, tmp_path: Path) -> None:
    field, fields, accepted = case
    part = TEXT.get(name, "text_config")
    said = refused(edited(made[name], tmp_path, part, **fields))
    start = f"{part}.{field}=" if part else f"{field}="
    assert said.startswith(start + repr(fields[field])) and accepted in said


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl", "blip2_opt", "llava_hf"])
def test_fields_of_the_tower(name: str, made: Any, tmp_path: Path) -> None:
    field = "num_heads" if name == "qwen2_5_vl" else "num_attention_heads"
    said = refused(edited(made[name], tmp_path / "a", "vision_config", **{field: 3}))
    assert said.startswith("vision_config.") and "=3" in said and "a divisor of hidden_size" in said
    said = refused(edited(made[name], tmp_path / "b", "vision_config", hidden_act="gelu2"))
    assert said.startswith("vision_config.hidden_act='gelu2'") and "quick_gelu" in said


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_not_json(name: str, made: Any, tmp_path: Path) -> None:
    folder = copied(made[name], tmp_path)
    (folder / "generation_config.json").write_text("{'eos_token_id': 2}")
    said = refused(folder)
    assert "generation_config.json" in said and "is not valid JSON" in said


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_that_is_not_there(
    name: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused(made[name], attn_implementation="flash_attention_2")
    assert "pip install flash-attn" in said and "'sdpa'" in said


def test_unknown_keywords(made: Any) -> None:
    said = refused(made["llava"], device_maps="auto")
    assert said.startswith("Unknown keyword of load() 'device_maps'. Did you mean 'device_map'?")
    assert "attn_implementation" in said and "revision" in said
    said = refused(made["qwen2_5_vl"], device_map="autos")
    assert "does not load (ValueError" in said and "'auto'" in said


def test_how_to_fetch_reaches_the_hub(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def download(name: str, **given: Any) -> str:
        seen.append({"name": name, **given})
        return str(made["gemma3"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load(Path("google/gemma-3-4b-it"), token="secret", cache_dir="here", revision="main")
    (given,) = seen
    assert given["name"] == "google/gemma-3-4b-it" and given["revision"] == "main"
    assert given["token"] == "secret" and given["cache_dir"] == "here"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "blip2_opt", "fuyu", "internvl"])
def test_weights_of_another_shape(name: str, made: Any, tmp_path: Path) -> None:
    said = refused(edited(made[name], tmp_path, "text_config", vocab_size=100))
    shapes = f"({family_makers.VOCAB}, 64), but its config.json makes it (100, 64)"
    assert "has shape" in said and shapes in said


def test_odd_configurations(made: Any, tmp_path: Path) -> None:
    folder = made["gemma3"]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("", {"architectures": 7}, r"architectures=7 .* a list with the name"),
        ("", {"text_config": "x"}, r"text_config='x' .* an object with fields"),
        ("text_config", {"rope_scaling": {"type": "ntk"}}, r"rope_type='ntk' .* yarn"),
        ("text_config", {"rms_norm_eps": "x"}, r"'rms_norm_eps' expected float, got str"),
    ]
    for place, (part, fields, said) in enumerate(cases):
        with pytest.raises(vp.InputError, match=said):
            load(edited(folder, tmp_path / str(place), part, **fields))


def test_a_sound_checkpoint_still_loads(made: Any) -> None:
    """Nothing above is refused for a reason of its own."""
    for name in NAMES:
        load(made[name])
