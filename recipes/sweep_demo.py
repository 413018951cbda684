"""A sweep killed five times, beside one that nobody disturbed, and beside single runs.

Six methods (two of them the controls) at three budgets on the demo's four sets: in one go, timed;
again, ended by SIGKILL after each sixth of its cells and started anew; and some of the single runs
that it stands for, whose mean times their number is what all of them would take. Answers, scores
and counts of both sweeps must be equal to the digit. Writes its part of docs/sweep.md and the
figure there: `python recipes/sweep_demo.py [ROWS]`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.comparison import summary_table
from vlm_prune_ext.experiment.results import read

ROOT = Path(__file__).parents[1]
METHODS = ("fastv", "pdrop", "visionzip", "divprune", "random", "downsample")
BUDGETS = ("0.5", "0.25", "0.1")
SETTINGS = len(METHODS) * len(BUDGETS) + 1  # and unpruned
CELLS = 4 * SETTINGS
SINGLE = ("none", "fastv:0.5", "visionzip:0.25", "random:0.1")
KILLS = 5
SAME = ("method", "data", "score", "kept", "flops_ratio", "delta", "p", "p_holm", "right")


def words(out: Path, rows: int) -> list[str]:
    """The sweep's command."""
    line = [sys.executable, "-m", "vlm_prune_ext.cli", "sweep", "--method", *METHODS]
    line += ["--budget", *BUDGETS, "--limit", str(rows), "--device", "cpu", "--out", str(out)]
    return line


def run(line: list[str], output: Path) -> float:
    """Run a command; its seconds."""
    start = time.perf_counter()
    with output.open("a") as file:
        subprocess.run(line, stdout=file, stderr=file, check=True)
    return time.perf_counter() - start


def done(out: Path) -> int:
    """Cells that are done so far, whatever start did them."""
    return len(list(out.glob("*/*_results.json")))


def run_killed(line: list[str], out: Path, output: Path) -> int:
    """Run a command that is killed :data:`KILLS` times; how often it was."""
    killed = 0
    while True:
        with output.open("a") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file)
        while process.poll() is None:
            if killed < KILLS and done(out) >= (killed + 1) * CELLS / (KILLS + 1):
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                time.sleep(2)  # its workers see that it is gone
                break
            time.sleep(0.05)
        else:
            if process.returncode:
                raise SystemExit(output.read_text()[-2000:])
            return killed


def answers(out: Path) -> dict[str, Any]:
    """Every answer by cell and row, and every figure that is no time."""
    found: dict[str, Any] = {}
    for run_ in read(out).done:
        for index, one in run_.answers.items():
            found[f"{run_.setting} {run_.data} {index}"] = (one.prediction, one.score, one.kept)
    for row in json.loads((out / "sweep.json").read_text()):
        found[f"{row['method']} {row['data']}"] = [row[name] for name in SAME]
    return found


BEGIN, END = "<!-- sweep_demo: begin -->\n", "<!-- sweep_demo: end -->"
PAGE = """
Six methods at three budgets and the unpruned model on the demo's four sets, {rows} rows each:
{cells} runs by one command, {date}, {cpu}, {cores} cores{note}.

| | seconds |
|---|---:|
| the sweep, one command | {sweep:.0f} |
| {settings} single runs (`eval`, all four sets), by {measured}: {each:.1f} s each | {single:.0f} |
| ratio | {ratio:.2f} |

Killed {killed} times on the way (SIGKILL after each sixth of its runs) and started again, the sweep
gave the same {answers} answers, scores, tests and counts, to the digit.

![score against visual tokens](images/sweep_demo.png)

95 % intervals (Wilson's; captions have none). Dotted: settings that no other beats in score and
tokens. Papers mean different things by a budget; the x axis is the mean over layers.

{table}"""


def main() -> None:
    """Measure and write."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    note = sys.argv[2] if len(sys.argv) > 2 else ""
    work = Path(tempfile.mkdtemp(prefix="sweep_demo"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    one_go, killed = work / "one_go", work / "killed"
    seconds = run(words(one_go, rows), work / "one_go.log")
    kills = run_killed(words(killed, rows), killed, work / "killed.log")
    first, second = answers(one_go), answers(killed)
    if first != second:
        different = [key for key in first if first[key] != second.get(key)]
        raise SystemExit(f"{len(different)} of {len(first)} differ, the first: {different[:3]}")
    single = []
    for name in SINGLE:
        line = [sys.executable, "run_vlmeval.py", "--method", name, "--limit", str(rows)]
        line += ["--device", "cpu", "--data", *read(one_go).data]
        single.append(run([*line, "--work-dir", str(work / "single")], work / "single.log"))
    each = sum(single) / len(single)
    hardware = host.hardware("cpu")
    page = PAGE.format(
        rows=rows,
        cells=CELLS,
        date=time.strftime("%Y-%m-%d"),
        cpu=hardware["cpu"],
        cores=hardware["cores"],
        note=note,
        sweep=seconds,
        settings=SETTINGS,
        measured=len(single),
        each=each,
        single=each * SETTINGS,
        ratio=seconds / (each * SETTINGS),
        killed=kills,
        answers=CELLS * rows,
        table=summary_table(read(one_go), title="").markdown(),
    )
    path = ROOT / "docs" / "sweep.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + page + rest[rest.index(END) :])
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    shutil.copy(one_go / "sweep.png", ROOT / "docs" / "images" / "sweep_demo.png")
    print(page, f"Files: {work}", sep="\n")


if __name__ == "__main__":
    main()
