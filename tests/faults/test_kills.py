"""Runs that are killed, or find no room, at moments drawn by lot: no answer is lost, none is twice.

Each campaign starts a command, kills it (SIGKILL, with all that it started), starts it again, and
so on until it is through; then its answers must be those of a run that nobody disturbed, with one
line of its log for each row.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("needs VLMEvalKit", allow_module_level=True)

from tests.faults import FULL
from tests.faults.zygote import Zygote
from tests.makers import tiny_original
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo.drawing import make_scene, render
from vlm_prune_ext.demo.questions import samples
from vlm_prune_ext.experiment.record import SampleLog

NAME = "llava-tiny"
ROWS = 24 if FULL else 6
KILLS = {"eval": 20, "sweep": 20, "ablate": 20} if FULL else {"eval": 2}
SIZES = [512, 2048, 8192, 32768, 131072] if FULL else [2048]  # bytes that a file may have


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of captions, and beside it the checkpoint that all commands run: a tiny one, so that
    kills fall into every part of a run and not into its answers alone."""
    folder = tmp_path_factory.mktemp("captions")
    with (folder / "d.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "caption"])
        for place, one in enumerate(samples("caption", 5, ROWS)):
            render(make_scene(one["scene_seed"])).save(folder / f"{place}.png")
            table.writerow([f"{place}.png", one["question"], one["answer"]])
    tiny_original(folder / NAME, layers=2)
    return folder / "d.csv"


def words_of(command: str, out: Path, captions: Path) -> list[str]:
    short = ["--max-new-tokens", "4", "--limit", str(ROWS), "--device", "cpu"]
    short += ["--model", str(captions.parent / NAME), "--out", str(out)]
    if command == "eval":
        return ["eval", "--data", "Shapes_VQA", "--method", "random:8", *short]
    if command == "sweep":
        chosen = ["--data", "Shapes_VQA", "--method", "random", "--budget", "8", "4"]
        chosen += ["--no-controls"]
        return ["sweep", *chosen, *short, "--workers", "1"]
    return ["ablate", "--data", str(captions), "--method", "none", "random:8", *short]


def answers(command: str, out: Path) -> dict[str, Any]:
    """Answers by log and row; a row that stands twice in a log is an error."""
    found: dict[str, Any] = {}
    if command == "ablate":
        for path in sorted(out.glob("*_predictions.csv")):
            with path.open(newline="") as file:
                for place, row in enumerate(csv.DictReader(file)):
                    key = f"{path.name}:{row.get('index', place)}"
                    assert key not in found
                    found[key] = row["prediction"]
        return found
    for path in sorted(out.rglob("*_samples.jsonl")):
        if any(part.startswith("previous") for part in path.parts):
            continue
        mine, _ = SampleLog(path).samples()
        for sample in mine:
            key = f"{path.name}:{sample.index}"
            assert key not in found, f"{key} is there twice"
            found[key] = sample.prediction
    return found


Undisturbed = Callable[[str], tuple[dict[str, Any], float]]


@pytest.fixture(scope="module")
def undisturbed(
    zygote: Zygote, captions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """Answers of a command that nobody disturbs, and how long it takes."""

    @functools.cache
    def run(command: str) -> tuple[dict[str, Any], float]:
        out = tmp_path_factory.mktemp(command) / "out"
        done = zygote.run(*words_of(command, out, captions))
        assert done["code"] == 0, done["said"]
        made = answers(command, out)
        assert made and len(made) % ROWS == 0
        return made, done["seconds"]

    return run


@pytest.mark.parametrize("command", KILLS)
def test_killed_at_any_moment(
    zygote: Zygote,
    captions: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    command: str,
) -> None:
    expected, seconds = undisturbed(command)
    rng, kills, campaign = random.Random(command), 0, 0
    while kills < KILLS[command]:
        campaign += 1
        out = tmp_path / str(campaign)
        code = None
        while code is None:
            limit = rng.uniform(0.1, 1.0) * seconds if kills < KILLS[command] else None
            done = zygote.run(*words_of(command, out, captions), kill_after=limit)
            code = done["code"]
            kills += code is None
            if code is not None and limit is not None:  # imports and caches were cold before
                seconds = min(seconds, done["seconds"])
        assert code == 0, done["said"]
        assert "Traceback" not in done["said"]
        assert answers(command, out) == expected
    print(f"{command}: {kills} kills in {campaign} campaigns of {ROWS} rows")


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    zygote: Zygote,
    captions: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    size: int,
) -> None:
    out = tmp_path / "out"
    words = words_of("eval", out, captions)
    starved = zygote.run(*words, largest=size)
    assert "Traceback" not in starved["said"]
    before = answers("eval", out)
    if starved["code"] != 0:
        assert starved["code"] == 2
        assert "cannot be" in starved["said"].strip().splitlines()[-1]
    done = zygote.run(*words)
    assert done["code"] == 0, done["said"]
    after = answers("eval", out)
    assert after == undisturbed("eval")[0]
    assert before.items() <= after.items()
    folder = next(out.iterdir())
    record = json.loads(next(folder.glob("*_results.json")).read_text())
    assert record["samples"] == ROWS and not record["failed"]


class Planted:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def test_planted_pickles_are_not_opened(
    zygote: Zygote, captions: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Files of the names that VLMEvalKit or torch would load, among results and weights."""
    out, mark = tmp_path / "out", tmp_path / "ran"
    name = f"{NAME}-random_keep8"
    folder = out / f"{name}_Shapes_VQA"
    folder.mkdir(parents=True)
    endings = ["_PREV", "_checkpoint", "_exact_matching_result", "_exact_matching", "_structs"]
    names = [f"{name}_Shapes_VQA{ending}.pkl" for ending in endings] + ["01_Shapes_VQA.pkl"]
    for planted in names:
        (folder / planted).write_bytes(pickle.dumps({0: Planted(mark)}))
    done = zygote.run(*words_of("eval", out, captions))
    assert done["code"] == 0, done["said"]
    assert answers("eval", out) == undisturbed("eval")[0]
    weights = shutil.copytree(CHECKPOINT, tmp_path / "weights")
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Planted(mark)}))
    chosen = ["--model-path", str(weights), "--work-dir", str(tmp_path / "other")]
    done = zygote.run("eval", "--data", "Shapes_VQA", "--baseline", "--limit", "1", *chosen)
    assert done["code"] == 2 and "Traceback" not in done["said"], done["said"]
    assert not mark.exists()
