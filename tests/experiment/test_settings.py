"""Settings: defaults, then the file, then the command line; wrong ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.words import settings_of
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import Settings, method_options, read_file, resolve
from vlm_prune_ext.methods.custom import CustomSelection
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.random_drop import RandomDrop
from vlm_prune_ext.methods.registry import METHODS
from vlm_prune_ext.methods.saint import SAINT, SAINTViT

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*"))
    if not path.name.startswith("profile_")  # grids: see test_profile.py
]


def test_command_line_wins_over_file_wins_over_defaults() -> None:
    file = {"method": "fastv", "attention_rank": 50, "agg_layer": 2, "limit": 9, "work_dir": "a"}
    settings, given = resolve({"fast_v_attention_rank": 7, "limit": 3}, file)
    assert settings.method == FastV(attention_rank=7, agg_layer=2)
    assert (settings.limit, settings.work_dir, settings.seed) == (3, "a", Settings().seed)
    assert given == {"method", "limit", "work_dir"}


@pytest.mark.parametrize(
    ("line", "file", "method"),
    [
        ({"use_fast_v": True}, {}, FastV()),
        ({}, {"use_fast_v": True, "fast_v_attention_rank": 9}, FastV(attention_rank=9)),
        ({}, {"use_fast_v": True, "use_saint": False, "saint_start": 2}, FastV()),
        ({"method": "random:9"}, {"method": "fastv", "attention_rank": 3}, RandomDrop(keep=9)),
        ({"baseline": True}, {"method": "fastv", "attention_rank": 3}, None),
        ({"fast_v_inplace": True}, {"method": "fastv", "mode": "mask"}, FastV()),
        ({}, {"method": "fastv", "mode": "mask"}, FastV(mode="mask")),
        ({}, {"method": {"name": "custom", "method": "norm"}}, CustomSelection(method="norm")),
        ({"seed": 4}, {"method": "random:9"}, RandomDrop(keep=9, seed=4)),
        (
            {"use_saint": True, "saint_keep_num": 20},
            {"saint_prune_mode": "iterative_drop_full_graph", "use_saint": True},
            SAINT(vit=SAINTViT(layers=None, keep_num=20)),
        ),
    ],
)
def test_methods(line: dict[str, Any], file: dict[str, Any], method: Any) -> None:
    assert resolve(line, file)[0].method == method


@pytest.mark.parametrize(
    ("line", "file", "said"),
    [
        ({}, {"limt": 3}, "'limit'"),
        ({}, {"method": "fastv", "atention_rank": 3}, "'attention_rank'"),
        ({"fast_v_attention_rank": 3}, {}, "needs its method"),
        ({"use_fast_v": True, "saint_start": 3}, {}, "the method is fastv"),
        ({"baseline": True, "fast_v_attention_rank": 3}, {}, "the baseline takes none"),
        ({"use_fast_v": True, "use_saint": True}, {}, "fastv, saint"),
        ({}, {"use_fast_v": "yes"}, "use_fast_v='yes'"),
        ({"limit": 0}, {}, "limit=0"),
        ({"limit": True}, {}, "limit=True"),
        ({"dtype": "float8"}, {}, "float8"),
        ({"mode": "mask"}, {}, "mode='mask'"),
        ({}, {"data": [3]}, "data=(3,)"),
        ({}, {"seed": -1}, "seed=-1"),
        ({}, {"method": 3}, "method=3"),
    ],
)
def test_what_is_not_accepted_is_named(
    line: dict[str, Any], file: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolve(line, file)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_shipped_configs_resolve(path: Path) -> None:
    settings, given = resolve({}, read_file(path))
    assert "method" in given
    assert (settings.method is None) == (path.stem == "baseline")


def test_resolved_settings_resolve_to_themselves() -> None:
    """What is saved beside results can be given as --config."""
    line = {"method": "saint:0.7", "vit": {"layers": [3], "keep_num": 99}, "data": ["MME"]}
    settings, _ = resolve(line)
    saved = json.loads(json.dumps(settings.as_json()))
    assert resolve({}, saved)[0] == settings


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"limit": 3,}', "not valid JSON"),
        ("a.yaml", "limit: [3", "not valid YAML"),
        ("a.yaml", "- limit", "names and values"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_file(tmp_path / "absent.json")


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"method": "fastv", "attention-rank": 3}')
    (tmp_path / "a.yaml").write_text("method: fastv\nattention_rank: 3\n")
    assert read_file(tmp_path / "a.json") == read_file(tmp_path / "a.yaml")


# -- the command's options -----------------------------------------------------------------------
def test_every_method_has_options() -> None:
    options = list(method_options())
    assert {option.method for option in options} == set(METHODS) - {"none"}
    assert len({option.option for option in options}) == len(options)


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ("--use-fast-v --fast-v-attention-rank 64 --fast-v-agg-layer 2", "fastv_rank64_k2"),
        ("--use-fast-v --fast-v-attention-rank 0.5", "fastv_rank0.5"),
        ("--method saint --saint-start 3 --saint-end 5 --saint-threshold 0.9", "saint_s3_e5_t0.9"),
        ("--method himap --hmap-v-attn-txt-rank 200 --set attn_img_rank=9", "himap_txt200_img9"),
        ("--method custom --custom-selection-method norm", "custom_norm100"),
        ("--method random --random-keep 5 --random-layer 2", "random_keep5_k2"),
        ("--method downsample --downsample-keep 36", "downsample_keep36"),
        ("--baseline", "baseline"),
    ],
)
def test_options_of_methods(words: str, label: str) -> None:
    settings, given = settings_of(words.split())
    assert settings.label == label
    assert given == {"method"}


def test_option_of_another_method_is_refused() -> None:
    with pytest.raises(
        InputError, match="--random-keep is a parameter of random, but the method is"
    ):
        settings_of(["--method", "downsample:9", "--random-keep", "5"])
    for method in ("random:9", "fastv:9", "none"):
        with pytest.raises(InputError, match="--downsample-keep is a parameter of downsample"):
            settings_of(["--method", method, "--downsample-keep", "64"])


@pytest.mark.parametrize("text", ["pdrop:0.5", "feather", "sparsevlm:192", "sparsevlm:64", "saint"])
def test_a_record_builds_the_same_method_for_a_shallower_model(text: str) -> None:
    """A cell of a grid is plain values: its layers that nobody stated still give way."""
    first, _ = resolve({"method": text, "data": "Shapes_MCQ"})
    again, _ = resolve({}, json.loads(json.dumps(first.as_json())))
    assert again.method == first.method
    assert first.method is not None and again.method is not None
    layers = [stage.layer for stage in first.method.decoder_stages(12)]
    assert [stage.layer for stage in again.method.decoder_stages(12)] == layers
    assert max(layers) <= 12
