"""Are answers the same however rows are put together? `python recipes/equal_answers.py --out DIR`.

Questions about scenes, eight a picture, answered by the demo model (or `--model`, whose weights may
be random) in float32 under every method: one at a time with whole prompts, sixteen at a time, in
batches of the size that the machine takes (`auto`), with what a picture's questions share computed
once, and by VLMEvalKit's loop in a process that is killed (SIGKILL) at moments drawn by lot and
started again. Each answer is a line of `DIR/answers.jsonl`; the same command goes on from there,
with more rows or methods if it names more. The table is written to `DIR/equal.md`; the exit code is
1 where an answer differs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vlm_prune_ext as vp
from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo.drawing import make_scene, render
from vlm_prune_ext.demo.questions import OPEN_QUESTIONS, open_question
from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.log import Log, write_whole
from vlm_prune_ext.methods.registry import parse_method

TOKENS, A_PICTURE, DATA = 4, 8, "Equal_openended"
AT_BUDGET = (
    *("fastv", "himap", "pdrop", "dart", "sparsevlm", "sparsevlm_plus", "visionzip"),
    *("fastervlm", "vispruner", "divprune", "cdpruner", "scope", "holov"),
    *("custom", "random", "downsample"),
)
OTHERS = ("vtw:6", "saint:0.7,start=3,end=6", "feather", "prumerge", "prumerge_plus")
WAYS: dict[str, tuple[int | str, bool]] = {  # batch size, and whether pictures are shared
    "one": (1, False),
    "sixteen": (16, False),
    "auto": ("auto", False),
    "shared": (16, True),
}
KILLED = "killed"


def write_data(folder: Path, rows: int) -> None:
    """The table for VLMEvalKit, and a PNG for each picture."""
    import base64

    rng = np.random.default_rng(17)
    made: list[list[Any]] = []
    for seed in range(rows):
        scene, asked = make_scene(seed), list[Any]()
        for turn in range(3 * A_PICTURE):
            category = list(OPEN_QUESTIONS)[turn % len(OPEN_QUESTIONS)]
            question = open_question(scene, category, rng)
            if question is not None and question.text not in [one.text for one in asked]:
                asked.append(question)
        asked = asked[:A_PICTURE]
        render(scene).save(folder / f"{seed}.png")
        image = base64.b64encode((folder / f"{seed}.png").read_bytes()).decode()
        made += [[len(made) + n, image, one.text, one.answer, seed] for n, one in enumerate(asked)]
        if len(made) >= rows:
            break
    with (folder / f"{DATA}.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer", "picture"])
        table.writerows(made[:rows])


def questions(folder: Path, rows: int) -> list[tuple[str, Path]]:
    """Question and picture of the first rows."""
    csv.field_size_limit(1 << 30)
    with (folder / f"{DATA}.tsv").open(newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        found = [(row["question"], folder / f"{row['picture']}.png") for row in table]
    return found[:rows]


def answer(
    loaded: tuple[Any, Any], text: str, way: str, asked: Sequence[tuple[str, Path]], first: int
) -> Iterator[tuple[int, str]]:
    """Answers to the rows from one on, as they are made."""
    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.evals.feed import answer_rows
    from vlm_prune_ext.evals.vlmeval import PrunedVLM

    method, (size, share) = parse_method(text), WAYS[way]
    words = PrunedVLM(loaded=loaded, method=method, max_new_tokens=TOKENS)

    def query(place: int) -> Callable[[], Any]:
        question, picture = asked[place]
        image = {"type": "image", "value": str(picture)}
        return lambda: words.query([image, {"type": "text", "value": question}], DATA)

    rows = ((place, query(place)) for place in range(first, len(asked)))
    answerer = Answerer(*loaded, method, share=share)
    for sample in answer_rows(answerer, rows, size):
        yield int(sample.index), sample.prediction


# -- the process that is killed --------------------------------------------------------------------
def through_vlmevalkit(said: argparse.Namespace) -> None:
    """All methods, one after the other, by VLMEvalKit's loop; what is there is gone on with."""
    from vlm_prune_ext.evals.vlmeval_run import Models, run_dataset

    os.environ |= {"LMUData": str(said.out)}
    for text in said.methods:
        settings = vlmevalkit_settings(said, text)
        run_dataset(settings, DATA, Models(settings))


def vlmevalkit_settings(said: argparse.Namespace, text: str) -> Any:
    """Of a run."""
    from vlm_prune_ext.experiment.settings import Settings

    return Settings(
        model_path=said.model,
        method=parse_method(text),
        data=(DATA,),
        work_dir=str(said.out / "vlmevalkit"),
        limit=said.rows,
        mode="infer",
        batch_size="auto",
        device="cpu",
        max_new_tokens=TOKENS,
    )


def killed_answers(said: argparse.Namespace, text: str) -> dict[int, str]:
    """What VLMEvalKit's loop has so far."""
    from vlm_prune_ext.evals.vlmeval_store import Files

    files = Files(vlmevalkit_settings(said, text), DATA)
    samples = [one for log in files.logs() for one in log.samples()[0]]
    return {int(one.index): one.prediction for one in samples if int(one.index) < said.rows}


def written(folder: Path) -> int:
    """Bytes of the answers that VLMEvalKit's loop has written down."""
    return sum(path.stat().st_size for path in folder.glob("vlmevalkit/*/*_samples*.jsonl"))


def kill_and_go_on(said: argparse.Namespace, until: float) -> int:
    """Run the child, and kill it on the way; returns how often it was."""
    line = [sys.executable, __file__, "--out", str(said.out), "--rows", str(said.rows), "--child"]
    line += ["--model", said.model, "--methods", *said.methods]
    drawn, done = random.Random(17), 0
    while time.monotonic() < until:
        with (said.out / "child.log").open("a") as log:
            child = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        if done < said.kills:
            before = written(said.out)
            while child.poll() is None and written(said.out) == before:
                time.sleep(0.2)
        left = max(1.0, until - time.monotonic())
        try:
            if child.wait(drawn.uniform(0, 10) if done < said.kills else left):
                raise SystemExit(f"the child ended by itself: {log.name} says why.")
            return done
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            done += 1
    return done


# -- the table -------------------------------------------------------------------------------------
def compare(
    found: dict[tuple[str, str], dict[int, str]], methods: Sequence[str]
) -> tuple[str, int]:
    """Markdown, and how many answers differ from those given one at a time."""
    ways = [way for way in (*WAYS, KILLED) if way != "one"]
    head = ["method", "answers, one at a time", *(f"equal: {way}" for way in ways)]
    lines, wrong = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)], 0
    for text in methods:
        one, cells = found.get((text, "one"), {}), list[str]()
        for way in ways:
            other = found.get((text, way), {})
            both = one.keys() & other.keys()
            equal = sum(one[row] == other[row] for row in both)
            wrong += len(both) - equal
            cells.append(f"{equal} of {len(both)}" if both else "–")
        lines.append(f"| {text} | {len(one)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", wrong


def arguments() -> argparse.Namespace:
    """What was said."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--budget", type=int, default=64, help="visual tokens that stay")
    parser.add_argument("--methods", nargs="+", help="default: all at the budget")
    parser.add_argument("--ways", nargs="+", default=[*WAYS, KILLED])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after about so many")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    at_budget = [f"{name}:{said.budget}" for name in AT_BUDGET]
    said.methods = said.methods or ["none", *at_budget, *OTHERS]
    return said


def fits(model: Any, text: str) -> bool:
    """Whether a method applies to the model; says why not (CDPruner needs a whole CLIP)."""
    try:
        with vp.prune(model, parse_method(text)):
            return True
    except vp.InputError as error:
        print(f"{text} is left out: {error}")
        return False


def main() -> int:
    """Go on, and write the table."""
    said = arguments()
    until = time.monotonic() + 60 * said.minutes
    said.out.mkdir(parents=True, exist_ok=True)
    if not (said.out / f"{DATA}.tsv").is_file():
        write_data(said.out, 500)
    if said.child:
        through_vlmevalkit(said)
        return 0
    log, asked = Log(said.out / "answers.jsonl"), questions(said.out, said.rows)
    found: dict[tuple[str, str], dict[int, str]] = {}
    for line in log.read():
        found.setdefault((line["method"], line["way"]), {})[line["row"]] = line["text"]
    loaded = vp.load(said.model, device="cpu", dtype="float32")
    said.methods = [text for text in said.methods if fits(loaded[0], text)]
    for text in said.methods:
        for way in (way for way in WAYS if way in said.ways):
            mine = found.setdefault((text, way), {})
            if time.monotonic() > until:
                break
            for row, prediction in answer(loaded, text, way, asked, len(mine)):
                mine[row] = prediction
                log.append({"method": text, "way": way, "row": row, "text": prediction})
                if time.monotonic() > until:
                    break
    kills = kill_and_go_on(said, until) if KILLED in said.ways else 0
    for text in said.methods:
        found[text, KILLED] = killed_answers(said, text)
    table, wrong = compare(found, said.methods)
    about = f"{host.hardware(loaded[0].device)}. Killed {kills} times in this call.\n\n"
    write_whole(said.out / "equal.md", about + table)
    print(about + table)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
