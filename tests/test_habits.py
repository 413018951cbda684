"""What people expect of a library's files, where two of them must say the same."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import vlm_prune_ext as vp

ROOT = Path(__file__).parent.parent


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    for hook in hooks:
        for pin in hook.get("additional_dependencies", ()):
            name, version = pin.split("==")
            assert constraints()[name] == version
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    linted = re.findall(r"\$\(BIN\)/(\w+(?: check| format --check)?)", recipe)
    assert linted == ["ruff check", "ruff format --check", "mypy"]
    entries = [hook["entry"].replace("make types", "mypy") for hook in hooks]
    assert [e.removesuffix(" --force-exclude") for e in entries] == linted


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert project is not None
    assert citation["version"] == project[1] == vp.__version__
    assert (
        f"## [{vp.__version__}] - {citation['date-released']}"
        in (ROOT / "CHANGELOG.md").read_text()
    )
