"""The wheel alone, without the checkout, has the commands, the demo and its data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left behind must not come along."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vlm_prune_ext", source / "vlm_prune_ext", ignore=ignore)
    pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source)])
    return next(source.glob("*.whl"))


def pip(words: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vlm_prune_ext"}
    kinds = {Path(name).suffix for name in names if "dist-info" not in name}
    data = {".json", ".safetensors", ".model", ".yaml", ".csv", ".jpg", ".md", ""}
    assert kinds == {".py", ".typed", ".html", ".css", ".js"} | data
    assert not [name for name in names if "train" in name]
    assert wheel.stat().st_size < 26e6


@pytest.mark.slow
def test_commands_and_demo_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Beside the libraries of this environment, in front of the checkout that is installed here."""
    pip(["install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)])
    places = [str(tmp_path / "site"), sysconfig.get_paths()["purelib"]]
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HOME": str(tmp_path)}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import vlm_prune_ext; print(vlm_prune_ext.__file__)")
    assert where.startswith(str(tmp_path / "site"))
    script = str(tmp_path / "site" / "bin" / "vlm-prune")
    assert run(script, "--version").startswith("vlm-prune ")
    assert "fast_v_attention_rank" in run(script, "methods")
    run(script, "eval", "--method", "fastv:32", "--data", "Shapes_MCQ", "--limit", "2")
    (result,) = empty.glob("outputs/*/*_results.json")
    assert json.loads(result.read_text())["samples"] == 2
