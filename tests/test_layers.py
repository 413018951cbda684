"""The package's shape: imports point one way, importing costs nothing and changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlm_prune_ext"

# Layer of each part, lowest first. A module may import from its own part and from lower layers.
LAYERS = [
    {"errors", "lazy"},
    {"select", "tables"},
    {"methods"},
    {"experiment"},
    {"engine"},
    {"fast"},
    {"models"},
    {"pruning", "demo"},
    {"serve"},
    {"evals"},
    {"bench"},
    {"profiling", "ablation", "pages"},
    {"commands"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)
MODULES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}
NAMES = {path: name for name, path in MODULES.items()}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """Files of this package that a file imports, wherever in it, also inside functions.

    ``from folder import file`` is an import of the file alone, though Python runs the folder's
    ``__init__`` on the way to it.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(PACKAGE.parent).parts[: -node.level or None])
            module = ".".join(filter(None, (base if node.level else "", node.module)))
            inside = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else module for name in inside}
    return frozenset({MODULES[name] for name in found if name in MODULES} - {path})


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_down(path: Path) -> None:
    mine = part_of(path)
    for other in {part_of(found) for found in imports_of(path)}:
        if other in RANK and other != part_of(path):
            assert RANK[other] < RANK[mine], f"{mine} imports {other}"


def test_no_circles() -> None:
    """Files can be read one after the other: none imports, by way of others, itself."""
    above: list[Path] = []
    done: set[Path] = set()

    def visit(path: Path) -> None:
        assert path not in above, " -> ".join(NAMES[p] for p in [*above, path])
        if path in done:
            return
        above.append(path)
        for other in sorted(imports_of(path)):
            visit(other)
        above.pop()
        done.add(path)

    for path in FILES:
        visit(path)


def test_methods_do_not_import_each_other() -> None:
    shared = {"base", "evidence", "option", "registry", "__init__"}
    files = {p.stem for p in (PACKAGE / "methods").glob("*.py")} - shared
    for name in files:
        tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not {f"vlm_prune_ext.methods.{other}" for other in files} & modules, name


def test_only_evals_know_the_frameworks() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        roots = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
        if {"vlmeval", "lmms_eval"} & roots:
            assert part_of(path) == "evals", path


def test_import_is_free() -> None:
    """No torch, no transformers, no framework is imported, and nothing of them is changed."""
    code = (
        "import sys, vlm_prune_ext, vlm_prune_ext.methods.registry as registry;"
        "import vlm_prune_ext.select, vlm_prune_ext.experiment.settings;"
        "assert len(registry.METHODS) > 6;"
        "heavy = {'torch', 'transformers', 'vlmeval', 'lmms_eval'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve() -> None:
    import vlm_prune_ext

    for name in vlm_prune_ext.__all__:
        assert getattr(vlm_prune_ext, name) is not None
    with pytest.raises(AttributeError):
        vlm_prune_ext.nothing_of_the_kind  # noqa: B018
