"""Make a table of the docs again: ``python recipes/results.py NAME`` (no name: which there are).

A recipe, ``recipes/results/NAME.yaml``, says what the table is about, which file it stands in, and
the commands that print its figures. Those that write the file themselves name it; of the others a
person takes the rows over, with date and hardware.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    """One table: what it is about, where it stands, and the commands behind it."""

    about: str
    writes: str
    run: list[str]


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    paths = sorted((ROOT / "recipes" / "results").glob("*.yaml"))
    return {path.stem: Recipe(**yaml.safe_load(path.read_text())) for path in paths}


def main(names: list[str]) -> int:
    """Run recipes, the commands of this interpreter's environment first; returns the exit code."""
    known = recipes()
    if not names:
        for name, recipe in known.items():
            print(f"{name:16} {recipe.about} ({recipe.writes})")
        return 0
    if unknown := [name for name in names if name not in known]:
        print(f"Unknown recipe {unknown[0]!r}. Accepted: {', '.join(known)}.", file=sys.stderr)
        return 2
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(places), "PYTHONPATH": str(ROOT)}
    for name in names:
        for line in known[name].run:
            print(f"+ {line}", file=sys.stderr)
            done = subprocess.run(line, shell=True, cwd=ROOT, env=environment)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
