"""Nothing that people or programs outside rely on is gone: see the package's docstring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract import observe
from tests.contract.observe import FROZEN, ROOT, Shape, call

UNIFIED = {
    ("bench", "--methods"): "--method",
    ("bench", "--batch-sizes"): "--batch-size",
    ("bench", "--new-tokens"): "--max-new-tokens",
    ("bench", "--ways"): "--backend",
}
"""Options that the one vocabulary of all commands may replace: no seed document uses them."""

UNKNOWN = re.compile(r"Unknown option[^']*'([^']+)'")
STRAY = "--no-such-option"


def frozen(name: str) -> Any:
    return json.loads((FROZEN / f"{name}.json").read_text())


# -- options -------------------------------------------------------------------------------------
def takes(program: str, option: str) -> bool:
    """Whether a command knows an option, listed in its help or not. Options are looked at in order
    before anything is done, so a stray one behind it is what gets refused."""
    code, _, said = call(program, option, STRAY)
    refused = UNKNOWN.search(said)
    assert code == 2 and refused, said
    return refused[1] == STRAY


def known(program: str, option: str) -> bool:
    new = UNIFIED.get((program, option))
    return takes(program, option) or (new is not None and takes(program, new))


def test_a_missing_option_would_be_seen() -> None:
    assert not takes("bench", "--no-such")
    assert not takes("run_vlmeval.py", "--no-such")


@pytest.mark.parametrize("program", frozen("options"))
def test_options(program: str) -> None:
    missing = [option for option in frozen("options")[program] if not known(program, option)]
    assert missing == []


@pytest.mark.parametrize("program", frozen("options"))
def test_defaults(program: str) -> None:
    """Those that the help states in one word; an option that became a hidden alias states none."""
    now = observe.help_of(program)
    for option, default in frozen("options")[program].items():
        if default is not None and option in now:
            assert (option, now[option]) == (option, default)


@pytest.mark.parametrize("line", (FROZEN / "lines.txt").read_text().splitlines())
def test_command_lines_of_the_documents(line: str) -> None:
    program, *words = line.removeprefix("vlm-prune ").split()
    options = [word for word in words if word.startswith("--")]
    assert options and all(known(program, option) for option in options)


def test_run_lmms_lists_what_it_takes() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "run_lmms.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    said = set(re.split(r"[\s,]+", done.stdout + done.stderr))
    words = set((FROZEN / "lmms_words.txt").read_text().split())
    assert words - said == set()


# -- results -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> observe.Runs:
    return observe.Runs(tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("command", observe.RUNS)
def test_files_and_keys(command: str, runs: observe.Runs) -> None:
    """Every file is where it was and has the keys it had, with values of the same type."""
    now = runs.of(command)
    before: dict[str, Shape | None] = frozen("results")[command]
    assert before.keys() - now.keys() == set()
    for file, shape in before.items():
        there = now[file] or {}
        lost = [key for key, kind in (shape or {}).items() if not _same(kind, there.get(key))]
        assert (file, lost) == (file, [])


def _same(before: str, now: str | None) -> bool:
    """Values that a machine or a run may not have are null there, lists may be empty."""
    open_kinds = ("null", "empty")
    return now is not None and (before == now or before in open_kinds or now in open_kinds)


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("program", "line", "parts"), frozen("refusals"))
def test_refusals(
    program: str, line: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence on standard error with field and value, exit code 2, and nothing written.

    A budget above the tokens of a picture is no longer one of them: it keeps all, as in Python.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("LMUData", "XDG_CACHE_HOME"):
        folder = tmp_path.parent / f"{tmp_path.name}_{name}"
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    code, out, said = call(program, *line.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"[^\n]+[.?)]\n", said), said
    assert [part for part in parts if part not in said] == [], said
    assert list(tmp_path.iterdir()) == []


# -- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["vp", "commands", "lmms"])
def test_names(kind: str) -> None:
    assert set(frozen("names")[kind]) - set(observe.names()[kind]) == set()


def test_parameters_of_methods() -> None:
    """Defaults and `model.config` names; new fields and names are free to come."""
    now = observe.names()["methods"]
    for name, fields in frozen("names")["methods"].items():
        for key, (default, *config_names) in fields.items():
            assert now[name][key][0] == default
            assert set(config_names) <= set(now[name][key][1:])
