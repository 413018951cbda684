"""Settings from hostile hands: each is accepted as it reads, or one sentence and exit code 2."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import family_makers as fm
from tests import makers
from vlm_prune_ext import cli
from vlm_prune_ext.commands import eval as command
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import RUN_KEYS, method_options, read_file, resolve

CASES = 1000
NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e400", "1_0", "0x10", "1e2", "9" * 25, "", " "]
YAML = [
    "null",
    "none",
    "true",
    "[]",
    "[1]",
    "[[[",
    "{",
    "{a: b}",
    "&x [*x]",
    "*x",
    "!!python/name:x.y",
]
TEXTS = [
    "../../etc/passwd",
    "/",
    "~",
    "a\0b",
    "x" * 5000,
    "\x1b[2J",
    "a\nb",
    "\u2028",
    "\udcff",
    "%s{0}",
]
METHODS = ["fastv:", "fastv:nan", "fastv:-1", "fastv:1:2", ":5", "random:32", "custom:os:system"]
VALUES: list[Any] = [*NUMBERS, *YAML, *TEXTS, *METHODS]
NESTED: list[Any] = [None, True, False, 0, -1, 2**70, 1.5, float("nan"), float("inf"), [], {}, [[]]]
NESTED += [["a", 1], {"name": "fastv"}, {"name": ["fastv"]}, {"name": None, "x": 1}, [None], [{}]]
KEYS = [*RUN_KEYS, *dict.fromkeys(option.key for option in method_options()), "method"]


def spoilt(key: str, rng: random.Random) -> str:
    """A name that is nearly right, now and then."""
    if rng.random() < 0.85:
        return key
    return rng.choice([key[1:], key + "s", key.upper(), key.replace("_", "-"), "", "__class__"])


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings that would have run; nothing is run."""
    found: list[Any] = []
    monkeypatch.setattr(command, "_run", lambda settings: found.append(settings) or 0)
    monkeypatch.setattr(command, "_compare", lambda settings: found.append(settings) or 0)
    return found


def test_a_thousand_hostile_settings(
    accepted: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(15)
    options = [option for option in method_options() if not option.flag]
    refused = 0
    for case in range(CASES):
        words = ["eval"]
        if case % 2:
            entries = {
                spoilt(rng.choice(KEYS), rng): rng.choice([*NESTED, *VALUES])
                for _ in range(rng.randrange(1, 4))
            }
            path = tmp_path / f"c.{rng.choice(['json', 'yaml'])}"
            path.write_text(json.dumps(entries), "utf-8")
            words += ["--config", str(path)]
        else:
            for _ in range(rng.randrange(1, 4)):
                key = rng.choice([*RUN_KEYS, *(o.key for o in options)])
                words += [f"--{spoilt(key, rng).replace('_', '-')}", str(rng.choice(VALUES))]
        before = len(accepted)
        code = cli.main(words)
        said = capsys.readouterr().err
        assert code in (0, 2), (words, said)
        if code == 2:
            refused += 1
            assert len(accepted) == before
            assert "Traceback" not in said and said.strip(), (words, said)
            assert "\x1b" not in said, (words, said)
        else:
            assert len(accepted) == before + 1
    assert refused > CASES / 2


@pytest.mark.parametrize(
    "text",
    [
        "method: fastv\nattention_rank: &a [*a]\n",
        "data: &a [*a]\n",
        "data: [[a]]\n",
        "data: &a {b: *a}\n",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n"
            for i in range(9)
        ),
        "data: " + "[" * 5000 + "]" * 5000,
    ],
    ids=["parameter", "data", "list-in-list", "mapping", "laughs", "deep"],
)
def test_yaml_that_holds_itself(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        resolve({}, read_file(path))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "use_custom_selection: true\ncustom_selection_method: planted:f\n",
        "custom-selection-method: planted:f\n",
        "method: {name: custom, method: 'planted:f'}\n",
        "method: custom:planted:f\n",
        "method: custom:method=planted:f\n",
        "method: 'custom:9,method=\"planted:f\",agg_layer=0 '\n",
        "method: {name: custom, method: 'planted:C.f'}\n",
        'use_custom_selection: true\ncustom_selection_method: "planted:f\\t"\n',
        "trust_remote_code: true\n",
        "trust-remote-code: yes\n",
    ],
)
def test_code_in_a_file_needs_the_command_lines_word(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    module = f"open({str(ran)!r}, 'w').close()\ndef f(evidence, keep): return []\n"
    (tmp_path / "planted.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="--allow-code"):
        command.settings_of({"config": str(path)})
    assert not ran.exists() and "planted" not in sys.modules


TWICE = [("c.yaml", "seed: 1\nseed: 2\n"), ("c.json", '{"seed": 1, "seed": 2}')]
TWICE += [("c.yaml", "method: {name: fastv, agg_layer: 2, agg_layer: 3}\n")]


@pytest.mark.parametrize(("name", "text"), TWICE)
def test_a_setting_stated_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    """The last one would win without a word."""
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="stands in it twice"):
        read_file(tmp_path / name)


@pytest.mark.parametrize("name", ["DIST_TIMEOUT", "WORLD_SIZE", "RANK"])
@pytest.mark.parametrize("value", ["two", "-1", "1e3", "1.5"])
def test_numbers_of_the_environment(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vlmeval")
    from vlm_prune_ext.evals.vlmeval_run import Ranks

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}='{value}'"), Ranks.here().connected("cpu"):
        pass


@pytest.mark.parametrize(("stated", "seconds"), [(None, 3600), ("120", 120), (" ", 3600)])
def test_processes_wait_for_each_other_for_an_hour_or_what_is_said(
    stated: str | None, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first may download or score for long: a library's own ten minutes end such runs."""
    pytest.importorskip("vlmeval")
    from vlm_prune_ext.evals import vlmeval_run

    waits: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("DIST_TIMEOUT", raising=False)
    if stated is not None:
        monkeypatch.setenv("DIST_TIMEOUT", stated)

    def begin(backend: str, timeout: Any) -> None:
        waits.append(timeout.total_seconds())

    monkeypatch.setattr(vlmeval_run.dist, "init_process_group", begin)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(vlmeval_run.dist, name, lambda: None)
    with vlmeval_run.Ranks.here().connected("cpu"):
        pass
    assert waits == [seconds]


def test_no_spelling_of_a_file_gets_past_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were its text not seen to name code, the import itself would still ask who said so."""
    monkeypatch.setattr("vlm_prune_ext.experiment.settings._code_in", lambda value: None)
    (tmp_path / "planted.py").write_text("def f(evidence, keep): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("method: custom:method=planted:f\n")
    with pytest.raises(InputError, match="--allow-code"):
        command.settings_of({"config": str(path)})
    assert "planted" not in sys.modules
    settings, _ = command.settings_of({"config": str(path), "method": "custom:method=planted:f"})
    assert settings.method is not None and sys.modules.pop("planted")


def test_allowed_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def f(evidence, keep): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("use_custom_selection: true\ncustom_selection_method: mine:f\n")
    settings, _ = command.settings_of({"config": str(path), "allow_code": True})
    assert settings.method is not None and settings.method.name == "custom"


@pytest.mark.parametrize("command_words", [["eval"], ["sweep", "--method", "none"]])
@pytest.mark.parametrize("form", ["original", "idefics3"])
def test_a_setting_that_no_processor_has_ends_a_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, command_words: list[str]
) -> None:
    """The demo's pictures have one size; Idefics3's processor counts no pixels."""
    model = tmp_path / "model"
    if form == "original":
        makers.tiny_original(model, layers=2)
    else:
        model.mkdir()
        fm.TABLE["idefics3"].make(model)
    words = [*command_words, "--model", str(model), "--data", "Shapes_VQA", "--max-pixels", "900"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "max_pixels is no setting of" in said[-1] and "accepted" in said[-1]
    assert not (tmp_path / "out").exists()
