"""How large the house is, and how much of it one prompt walks through: ``python recipes/house.py``.

A column for each checkout that is named (none: this one), so that before and after stand side by
side: ``git worktree add ../before REV; python recipes/house.py ../before .``. Lines are those of
Python files, and of functions those from ``def`` to the last. Files and functions entered are the
package's, by ``sys.settrace``; what an import alone runs (bodies of modules and classes) stands
apart. Start-up is CPU time, the least of three starts. ``HOUSE_FILES=1`` names the files.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "vlm_prune_ext"
COMMANDS = {
    "vlm-prune methods": ["-m", f"{PACKAGE}.cli", "methods"],
    "vlm-prune models": ["-m", f"{PACKAGE}.cli", "models"],
    "a refused argument": ["run_vlmeval.py", "--method", "fastv:nonsense", "--data", "Shapes_MCQ"],
}


# -- lines ---------------------------------------------------------------------------------------
def sizes(root: Path) -> dict[str, Any]:
    """Files and lines of each room, and lengths of functions."""
    found: dict[str, Any] = {}
    lengths: list[int] = []
    files = lines = 0
    for path in sorted((root / PACKAGE).rglob("*.py")):
        place = path.relative_to(root / PACKAGE).parts
        room = place[0] if len(place) > 1 else "(top)"
        text = path.read_text()
        own = found.setdefault(room, [0, 0])
        own[0], own[1] = own[0] + 1, own[1] + text.count("\n")
        files, lines = files + 1, lines + text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
    rooms = {f"{room}: files, lines": "{}, {}".format(*found[room]) for room in sorted(found)}
    tests = [p.read_text().count("\n") for p in (root / "tests").rglob("*.py")]
    lengths.sort()
    return {
        "all: files, lines": f"{files}, {lines}",
        **rooms,
        "tests: files, lines": f"{len(tests)}, {sum(tests)}",
        "functions: number": str(len(lengths)),
        "function length: median, p90, max": f"{statistics.median(lengths):.0f}, "
        f"{lengths[int(0.9 * len(lengths))]}, {lengths[-1]}",
    }


# -- what one prompt and one row enter -----------------------------------------------------------
def traced(what: str) -> dict[str, int]:
    """Files and functions of the package that are entered (in a process of its own)."""
    import vlm_prune_ext as vp

    home = str(Path(vp.__file__).parent)
    entered: set[tuple[str, str, int]] = set()
    imported: set[str] = set()

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(home):
            imported.add(code.co_filename)
            if code.co_flags & inspect.CO_OPTIMIZED:  # a function
                entered.add((code.co_filename, code.co_name, code.co_firstlineno))

    {"prompt": prompt, "inside": inside, "row": row}[what](look)
    if os.environ.get("HOUSE_FILES"):
        for name in sorted({name for name, *_ in entered}):
            mine = sorted(function for file, function, _ in entered if file == name)
            print(f"{name.removeprefix(home)}: {', '.join(mine)}", file=sys.stderr)
    files = {name for name, *_ in entered}
    return {"files": len(files), "functions": len(entered), "imported": len(imported | files)}


def prompt(look: Any) -> None:
    """One FastV answer of the demo model, which is loaded and was asked before."""
    import vlm_prune_ext as vp
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.demo.drawing import make_scene, render

    model, processor = vp.load(CHECKPOINT)
    picture = render(make_scene(0))

    def ask() -> None:
        with vp.prune(model, vp.FastV(agg_layer=2, attention_rank=20)):
            model.generate(**processor.prompt("What is this?", picture), max_new_tokens=4)

    ask()
    sys.settrace(look)
    ask()
    sys.settrace(None)


def inside(look: Any) -> None:
    """The same where ``prune`` is open and the prompt is made: what each of many prompts costs."""
    import vlm_prune_ext as vp
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.demo.drawing import make_scene, render

    model, processor = vp.load(CHECKPOINT)
    inputs = processor.prompt("What is this?", render(make_scene(0)))
    with vp.prune(model, vp.FastV(agg_layer=2, attention_rank=20)):
        model.generate(**inputs, max_new_tokens=4)
        sys.settrace(look)
        model.generate(**inputs, max_new_tokens=4)
        sys.settrace(None)


def row(look: Any) -> None:
    """The whole of ``run_vlmeval.py`` for one row, from its arguments to its table."""
    words = ["--data", "Shapes_MCQ", "--method", "fastv:20", "--limit", "1", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        sys.argv = ["run_vlmeval.py", *words, "--work-dir", str(Path(folder, "out"))]
        sys.settrace(look)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code
        sys.settrace(None)


# -- all of it -----------------------------------------------------------------------------------
def measured(root: Path) -> dict[str, str]:
    """All figures of a checkout."""
    found = sizes(root)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    here = {"cwd": root, "env": environment}
    for what, name in (
        ("prompt", "one FastV prompt"),
        ("inside", "its answer alone, prune being open"),
        ("row", "one VLMEvalKit row"),
    ):
        words = [sys.executable, str(Path(__file__).resolve()), "--traced", what]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, **here)  # type: ignore[call-overload]
        found[f"{name}: files, functions (files, imports included)"] = (
            "{files}, {functions} ({imported})".format(**json.loads(done.stdout.splitlines()[-1]))
        )
    for name, words in COMMANDS.items():
        found[f"start-up, CPU s: {name}"] = f"{min(_cpu(words, here) for _ in range(3)):.2f}"
    return found


def _cpu(words: list[str], here: dict[str, Any]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, **here)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(words: list[str]) -> int:
    """Print the table."""
    if words[:1] == ["--traced"]:
        print(json.dumps(traced(words[1])))
        return 0
    roots = [Path(word).resolve() for word in words] or [Path(__file__).resolve().parents[1]]
    columns = [measured(root) for root in roots]
    print(f"| | {' | '.join(root.name for root in roots)} |\n|---|{'---:|' * len(roots)}")
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"| {name} | {' | '.join(column.get(name, '-') for column in columns)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
