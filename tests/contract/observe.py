"""Look at the commands from outside: their help, the files they leave, the keys in those files.

``python -m tests.contract.observe`` writes what it sees over ``frozen/*.json``. That is for a
version whose contract is meant to be the new one; the tests call the same functions and compare.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run_vlmeval
from tests import makers, vlmeval_files
from tests.makers import photo
from vlm_prune_ext import cli

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).parent / "frozen"
MODEL = "llava-v1.5-7b"
FASTV = "fastv:5,agg_layer=2"
SHORT = ("--max-new-tokens", "3", "--device", "cpu")
INTERNAL = r"(^|/)logs/|_samples\.jsonl$|_predictions\.jsonl$|\.lock$"
RUNS = ("vlmeval", "profile", "bench", "ablate", "scienceqa", "inspect", "demo-data", "lmms")
Shape = dict[str, str]
Files = dict[str, Shape | None]


# -- commands --------------------------------------------------------------------------------------
def call(program: str, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if program == "run_vlmeval.py":
            code = run_vlmeval.main(list(words))
        else:
            code = cli.main([program, *words])
    return code, out.getvalue(), err.getvalue()


def programs() -> list[str]:
    return ["run_vlmeval.py", *cli.COMMANDS]


def help_of(program: str) -> dict[str, str | None]:
    """Option -> its default, where the help states one as a single word; aliases in one key."""
    code, said, _ = call(program, "--help")
    assert code == 0
    found: dict[str, str | None] = {}
    names: list[str] = []
    text = ""
    for line in [*said.splitlines(), "  --end"]:
        if not (heading := re.match(r"  (-{1,2}[a-zA-Z].*)$", line)):
            text += " " + line.strip()
            continue
        for name in names:
            match = re.search(r"default: ([^\s;,()]+)[;,)]?(?: *$|[;)])", text)
            found[name] = match[1] if match else None
        usage, _, text = heading[1].partition("   ")
        names = re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", usage)
    found.pop("--help", None)
    return found


# -- results ---------------------------------------------------------------------------------------
def shape_of(value: Any, path: str = "") -> Shape:
    """Key path -> type of each leaf; items of a list are taken together."""
    if isinstance(value, dict):
        parts = [shape_of(item, f"{path}.{key}" if path else key) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [shape_of(item, f"{path}[]") for item in value]
    else:
        kind = {type(None): "null", bool: "bool", int: "number", float: "number", str: "text"}
        return {path: kind[type(value)]}
    if not parts:
        return {path: "empty"}
    merged: Shape = {}
    for part in parts:
        for key, kind in part.items():
            if merged.get(key, "null") == "null":
                merged[key] = kind
    return merged


def shape_of_file(path: Path) -> Shape | None:
    """Of JSON, JSON lines, CSV and Excel; ``None`` of what only people read."""
    if path.suffix == ".json":
        return shape_of(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return shape_of([json.loads(line) for line in path.read_text().splitlines()])
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return dict.fromkeys(next(csv.reader(file)), "column")
    if path.suffix == ".xlsx":
        import pandas

        return dict.fromkeys(map(str, pandas.read_excel(path).columns), "column")
    return None


def folder_of(folder: Path) -> Files:
    """Every file below a folder of results, and what is in it; not the logs of runs under way."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {n: shape_of_file(p) for n, p in names.items() if not re.search(INTERNAL, n)}


# -- one small run a command -----------------------------------------------------------------------
class Runs:
    """Each command once on one tiny checkpoint. Results are kept, so that tests share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, Files] = {}
        self.model = str(makers.tiny_original(folder / "models" / MODEL))
        photo(80, 60).save(folder / "picture.png")

    def of(self, name: str) -> Files:
        """Files of a command's run, and the keys in them."""
        if name not in self._seen:
            (self.folder / "LMUData").mkdir(exist_ok=True)
            places = {"LMUData": self.folder / "LMUData", "XDG_CACHE_HOME": self.folder / "cache"}
            with environment(**{key: str(path) for key, path in places.items()}):
                self._seen[name] = getattr(self, name.replace("-", "_"))()
        return self._seen[name]

    def vlmeval(self) -> Files:
        """The seed documents' line, on a multiple-choice and a caption set."""
        vlmeval_files.write(self.folder / "LMUData", "Mine", vlmeval_files.mcq_rows(2))
        words = ["--model-path", self.model, "--use-fast-v", "--fast-v-attention-rank", "5"]
        words += ["--fast-v-agg-layer", "2", "--data", "Mine", "Shapes_Caption", "--limit", "2"]
        return self._folder("run_vlmeval.py", *words, "--work-dir", str(self.folder / "vlmeval"))

    def profile(self) -> Files:
        data = self.folder / "examples"
        code, _, said = call(
            "profile-data", "--from", "demo:vqa", "--samples", "1", "--out", str(data)
        )
        assert code == 0, said
        words = ["--src-folder", str(data), "--model-name", self.model, "--method", "none", FASTV]
        words += ["--repeat", "1", "--warmup", "0", "--energy-seconds", "0"]
        return self._folder("profile", *words, "--out", str(self.folder / "profile"))

    def bench(self) -> Files:
        words = ["--model-path", self.model, "--methods", "none", FASTV, "--batch-sizes", "1"]
        words += ["--repeat", "1", "--new-tokens", "2", "--device", "cpu"]
        return self._folder("bench", *words, "--out", str(self.folder / "bench"), short=False)

    def ablate(self) -> Files:
        from vlm_prune_ext.demo.writers import write_caption_csv

        data = write_caption_csv(self.folder / "captions", 1, 2)
        words = ["--data", str(data), "--models", f"tiny={self.model}", "--methods", "fastv:5"]
        with environment(PATH=""):  # METEOR's Java takes long to start
            return self._folder("ablate", *words, "--output-dir", str(self.folder / "ablate"))

    def scienceqa(self) -> Files:
        turns = [
            {"from": "human", "value": "<image>\nWhich one?\nA. red\nB. blue"},
            {"from": "gpt", "value": "The answer is A."},
        ]
        questions = self.folder / "questions.json"
        entry = {"id": "1", "conversations": turns, "image": "picture.png"}
        questions.write_text(json.dumps([entry]))
        out = self.folder / "scienceqa"
        words = ["--question-file", str(questions), "--image-folder", str(self.folder)]
        words += ["--model-path", self.model, "--method", FASTV]
        return self._folder("scienceqa", *words, "--answers-file", str(out / "answers.jsonl"))

    def inspect(self) -> Files:
        out = self.folder / "inspect"
        out.mkdir()
        words = [str(self.folder / "picture.png"), "--question", "Red?", "--method", FASTV]
        words += ["--model-path", self.model]
        return self._folder("inspect", *words, "--out", str(out / "picture.png"))

    def demo_data(self) -> Files:
        words = ["--samples", "1", "--format", "tsv,parquet,csv"]
        return self._folder("demo-data", *words, "--out", str(self.folder / "data"), short=False)

    def lmms(self) -> Files:
        """What lmms-eval's own evaluator says of the run's efficiency."""
        from lmms_eval import evaluator
        from lmms_eval.tasks import TaskManager

        from vlm_prune_ext.evals.lmms_launch import TASKS

        data = self.folder / "data"
        if not data.exists():
            self.demo_data()
        manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
        with environment(VLM_PRUNE_DEMO_DATA=str(data), LMMS_EVAL_DATASETS_CACHE=str(data / "hf")):
            results = evaluator.simple_evaluate(
                model="llava_fastv",
                model_args=f"pretrained={self.model},device=cpu,attention_rank=5,agg_layer=2",
                tasks=["shapes_vqa"],
                batch_size=1,
                limit=1,
                task_manager=manager,
                cli_args=Namespace(process_with_media=False, output_path=None),
                bootstrap_iters=0,
            )
        return {"throughput": shape_of(results["throughput"])}

    def _folder(self, program: str, *words: str, short: bool = True) -> Files:
        code, _, said = call(program, *words, *(SHORT if short else ()))
        assert code == 0, said
        out = Path(words[-1])
        return folder_of(out.parent if out.suffix else out)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- names -----------------------------------------------------------------------------------------
def names() -> dict[str, Any]:
    """What Python code imports, what frameworks are told, and how each method is set."""
    import vlm_prune_ext as vp
    from vlm_prune_ext.evals import lmms_plugin

    _, said, _ = call("methods", "--json")
    methods = {
        method["name"]: {
            field["name"]: [field["default"], *field["config_names"]]
            for field in method["parameters"]
        }
        for method in json.loads(said)
    }
    return {
        "vp": sorted(dir(vp)),
        "commands": sorted(cli.COMMANDS),
        "lmms": sorted(manifest.model_id for manifest in lmms_plugin.manifests()),
        "methods": methods,
    }


def _freeze() -> None:
    FROZEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        results = {name: runs.of(name) for name in RUNS}
    _write("results", results)
    _write("options", {program: help_of(program) for program in programs()})
    _write("names", names())


def _write(name: str, groups: dict[str, Any]) -> None:
    """Two levels of keys a line each, the rest on that line."""
    blocks = []
    for group, items in groups.items():
        if isinstance(items, dict):
            rows = [f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in items.items()]
            blocks.append(f" {json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            blocks.append(f" {json.dumps(group)}: {json.dumps(items)}")
    (FROZEN / f"{name}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    _freeze()
