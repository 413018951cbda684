"""README and docs say what there is: methods, commands, options, files, where tables come from."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recipes.results import recipes
from tests.contract.test_contract import takes
from vlm_prune_ext import cli
from vlm_prune_ext.methods.registry import METHODS, classes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def test_readme_is_short_and_has_every_method_and_command() -> None:
    assert README.count("\n") <= 180
    table = README.split("## Methods")[1].split("## Families")[0]
    rows = set(re.findall(r"`(\w+)`", table))
    assert {cls.__name__ for cls in classes()} | (set(METHODS) - {"none"}) <= rows
    listed = README.split("## All commands")[1].split("##")[0]
    assert set(cli.COMMANDS) <= set(re.findall(r"`([\w-]+)`", listed))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def command_lines() -> list[tuple[str, str]]:
    """Every command of ours that a page or a recipe shows, with where it stands."""
    texts = {path.name: path.read_text() for path in PAGES}
    texts |= {name: "\n".join(recipe.run) for name, recipe in recipes().items()}
    found = []
    for name, text in texts.items():
        plain = text.replace("\\\n", " ").replace("`", "\n")
        for line in re.findall(r"(?:python run_vlmeval\.py|vlm-prune) (?=\w|--)[^\n]*", plain):
            found.append((name, " ".join(line.partition("  #")[0].split())))
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_that_are_shown_exist(page: str, line: str) -> None:
    words = line.removeprefix("vlm-prune ").removeprefix("python ").split()
    if words[0] in ("COMMAND", "--version", "--help") or not re.fullmatch(r"[\w.-]+", words[0]):
        return
    assert words[0] == "run_vlmeval.py" or words[0] in cli.COMMANDS, line
    for word in words[1:]:
        if re.fullmatch(r"--[a-z][a-z-]+", word) and word != "--help":
            assert takes(words[0], word), (page, line)


def test_every_table_has_a_recipe_and_every_recipe_a_place() -> None:
    known = recipes()
    for path in (ROOT / "docs" / "results").glob("*.md"):
        named = re.search(r"`python recipes/results\.py (\w+)`", path.read_text())
        assert named is not None, path
        assert known[named[1]].writes == path.relative_to(ROOT).as_posix()
    for recipe in known.values():
        assert (ROOT / recipe.writes).is_file()
        for line in recipe.run:
            files = [
                word for word in shlex.split(line) if word.startswith(("scripts/", "configs/"))
            ]
            assert all((ROOT / file).is_file() for file in files)
