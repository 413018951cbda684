"""A sweep killed five times, beside one that nobody disturbed, and beside single runs.

Six methods (two of them the controls) at three budgets on the demo's four sets: in one go, timed;
again, ended by SIGKILL after each sixth of its cells and started anew; and some of the single runs
that it stands for, whose mean times their number is what all of them would take. Answers, scores
and counts of both sweeps must be equal to the digit. Writes its part of docs/sweep.md and the
pictures there and in docs/pages.md: ``python recipes/sweep_demo.py --rows 50 --work DIR``.

Whatever ends it, the same command goes on: what each start took is in DIR/took.json. CPU seconds
are those of all processes of a start; on a machine that others use as well they say more than the
wall clock does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.comparison import summary_table
from vlm_prune_ext.experiment.results import read
from vlm_prune_ext.pages.show import write_page

ROOT = Path(__file__).parents[1]
METHODS = ("fastv", "pdrop", "visionzip", "divprune", "random", "downsample")
BUDGETS = ("0.5", "0.25", "0.1")
DATA = ("Shapes_MCQ", "Shapes_YN", "Shapes_VQA", "Shapes_Caption")
SETTINGS = len(METHODS) * len(BUDGETS) + 1  # and unpruned
CELLS = len(DATA) * SETTINGS
SINGLE = ("none", "fastv:0.5", "visionzip:0.25", "random:0.1")
KILLS = 5
SAME = ("method", "data", "score", "kept", "flops_ratio", "delta", "p", "p_holm", "right")
POLL = 0.25  # seconds


# -- what things take ------------------------------------------------------------------------------
@dataclass
class Took:
    """A start of a command, as far as it came.

    Attributes:
        wall, cpu: seconds; ``cpu`` is that of all its processes.
        busy: processor seconds of the whole machine meanwhile.
        ended: ``done``, ``killed`` (by us) or ``lost`` (with us).
    """

    wall: float = 0.0
    cpu: float = 0.0
    busy: float = 0.0
    ended: str = "lost"


class Notes:
    """What each start of each step took, in a file that is written as they run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.steps = {name: [Took(**one) for one in starts] for name, starts in known.items()}

    def add(self, step: str) -> Took:
        """A new start of a step."""
        self.steps.setdefault(step, []).append(Took())
        return self.steps[step][-1]

    def write(self) -> None:
        """Write the file, whole or not at all."""
        plain = {name: [asdict(one) for one in starts] for name, starts in self.steps.items()}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(plain, indent=1))
        part.replace(self.path)

    def is_done(self, step: str) -> bool:
        """Whether a step came to its end."""
        return any(one.ended == "done" for one in self.steps.get(step, ()))

    def total(self, step: str) -> Took:
        """All starts of a step together."""
        starts = self.steps[step]
        return Took(
            *(sum(getattr(one, name) for one in starts) for name in ("wall", "cpu", "busy"))
        )

    def kills(self, step: str) -> int:
        """How often a step was killed."""
        return sum(one.ended == "killed" for one in self.steps.get(step, ()))


def cpu_of(process: psutil.Process) -> float:
    """Processor seconds of a process, of those below it, and of those that it has waited for."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:4])
        except psutil.Error:  # it ended just now: whoever waits for it has its time
            continue
    return total


def busy() -> float:
    """Processor seconds of the machine that were not idle."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def run(step: str, line: Sequence[str], notes: Notes, out: Path | None = None) -> None:
    """Run a step's command until it is done.

    Args:
        step: its name.
        line: the command; a new start of it goes on.
        notes: take what it took.
        out: of a sweep that is killed after each sixth of its cells, :data:`KILLS` times in all.
    """
    while not notes.is_done(step):
        took, start, before = notes.add(step), time.perf_counter(), busy()
        with (notes.path.parent / f"{step.replace(':', '_')}.log").open("a") as file:
            process = psutil.Popen(line, stdout=file, stderr=file, cwd=ROOT, env=environment())
        while process.poll() is None:
            took.wall, took.busy = time.perf_counter() - start, busy() - before
            took.cpu = max(took.cpu, cpu_of(process))
            notes.write()
            killed = notes.kills(step)
            if (
                out is not None
                and killed < KILLS
                and done(out) >= (killed + 1) * CELLS / (KILLS + 1)
            ):
                process.send_signal(signal.SIGKILL)
                took.ended = "killed"
            time.sleep(POLL)
        if took.ended != "killed":
            if process.returncode:
                raise SystemExit(f"{step} ended with {process.returncode}: see its log")
            took.ended = "done"
        notes.write()
        time.sleep(2)  # workers of a killed one see that it is gone


def environment() -> dict[str, str]:
    """Each command decides on its threads."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def done(out: Path) -> int:
    """Cells that are done so far, whatever start did them."""
    return len(list(out.glob("*/*_results.json")))


# -- the commands ----------------------------------------------------------------------------------
def sweep(out: Path, rows: int) -> list[str]:
    """The sweep's command."""
    line = [sys.executable, "-m", "vlm_prune_ext.cli", "sweep", "--method", *METHODS]
    line += ["--budget", *BUDGETS, "--data", *DATA]
    return [*line, "--limit", str(rows), "--device", "cpu", "--out", str(out)]


def single(out: Path, name: str, rows: int) -> list[str]:
    """One of the runs that it stands for, on all four sets."""
    line = [sys.executable, "run_vlmeval.py", "--method", name, "--data", *DATA]
    return [*line, "--limit", str(rows), "--device", "cpu", "--work-dir", str(out)]


def answers(out: Path) -> dict[str, Any]:
    """Every answer by cell and row, and every figure that is no time."""
    found: dict[str, Any] = {}
    for run_ in read(out).done:
        for index, one in run_.answers.items():
            found[f"{run_.setting} {run_.data} {index}"] = (one.prediction, one.score, one.kept)
    for row in json.loads((out / "sweep.json").read_text()):
        found[f"{row['method']} {row['data']}"] = [row[name] for name in SAME]
    return found


# -- the page --------------------------------------------------------------------------------------
BEGIN, END = "<!-- sweep_demo: begin -->\n", "<!-- sweep_demo: end -->"
PAGE = """
Six methods at three budgets and the unpruned model on the demo's four sets, {rows} rows each:
{cells} runs by one command, {date}, {cpu}, {cores} cores, of which other work had {others:.0f} %.

| | wall seconds | CPU seconds |
|---|---:|---:|
| the sweep, one command | {sweep.wall:.0f} | {sweep.cpu:.0f} |
| {settings} single runs (`eval`, four sets) by {measured} of them | {wall:.0f} | {work:.0f} |
| ratio | {ratio} | {ratio_cpu:.2f} |

Single runs that were measured: {which}.{again}

![score against visual tokens](images/sweep_demo.png)

95 % intervals (Wilson's; captions have none). Dotted: settings that no other beats in score and
tokens. Papers mean different things by a budget; the x axis is the mean over layers.

{table}"""


AGAIN = """ The sweep killed {killed} times on the way
(SIGKILL after each sixth of its runs) and started again ({took.cpu:.0f} s CPU) gave the same
{answers} answers, scores, tests and counts, to the digit."""
BUSY = """
Wall times are those of a busy machine, each start's another, so their ratio and times to first
token are left out."""
MUCH = 10  # % of the cores that other work may have where wall times still mean something


def page(notes: Notes, out: Path, rows: int) -> str:
    """The part of docs/sweep.md."""
    names = [name for name in SINGLE if notes.is_done(f"single {name}")]
    whole, singles = notes.total("sweep"), [notes.total(f"single {name}") for name in names]
    again = ""
    if notes.is_done("killed"):
        kills, took = notes.kills("killed"), notes.total("killed")
        again = AGAIN.format(killed=kills, took=took, answers=CELLS * rows)
    wall = SETTINGS * sum(one.wall for one in singles) / len(singles)
    work = SETTINGS * sum(one.cpu for one in singles) / len(singles)
    hardware = host.hardware("cpu")
    spent = [whole, *singles]
    others = sum(one.busy - one.cpu for one in spent) / sum(one.wall for one in spent)
    others *= 100 / hardware["cores"]
    table = summary_table(read(out), title="")
    if others >= MUCH:
        place = next(n for n, one in enumerate(table.columns) if one.name == "prefill")
        table.columns = [one for n, one in enumerate(table.columns) if n != place]
        table.rows = [[one for n, one in enumerate(row) if n != place] for row in table.rows]
    return PAGE.format(
        rows=rows,
        cells=CELLS,
        date=time.strftime("%Y-%m-%d"),
        cpu=hardware["cpu"],
        cores=hardware["cores"],
        others=others,
        sweep=whole,
        again=(BUSY if others >= MUCH else "") + again,
        settings=SETTINGS,
        measured=len(names),
        wall=wall,
        work=work,
        ratio=f"{whole.wall / wall:.2f}" if others < MUCH else "–",
        ratio_cpu=whole.cpu / work,
        which=", ".join(
            f"`{name}` {one.wall:.0f} s ({one.cpu:.0f} s CPU)"
            for name, one in zip(names, singles, strict=True)
        ),
        table=table.markdown(),
    )


def picture(html: Path, target: Path) -> None:
    """The sweep's page as Chromium shows it, where there is one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print(f"No Chromium: {target.name} stays as it is.", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1280, "height": 900})
        window.goto(html.resolve().as_uri())
        window.wait_for_selector("#plots[data-ready]")
        window.screenshot(path=target, full_page=True)
        browser.close()


def main() -> None:
    """Measure, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("outputs_sweep_demo"))
    parser.add_argument(
        "--write", action="store_true", help="measure nothing: write what was measured so far"
    )
    given = parser.parse_args()
    work, rows = given.work.resolve(), given.rows
    work.mkdir(parents=True, exist_ok=True)
    notes = Notes(work / "took.json")
    if given.write:
        write(notes, work / "sweep", rows)
        return

    def alone(name: str) -> None:
        run(f"single {name}", single(work / "single", name, rows), notes)

    alone(SINGLE[0])
    alone(SINGLE[1])  # single runs before and after the sweep: the machine may be another's, too
    run("sweep", sweep(work / "sweep", rows), notes)
    alone(SINGLE[2])
    alone(SINGLE[3])
    run("killed", sweep(work / "killed", rows), notes, work / "killed")

    first, second = answers(work / "sweep"), answers(work / "killed")
    if first != second:
        different = [key for key in first if first[key] != second.get(key)]
        raise SystemExit(f"{len(different)} of {len(first)} differ, the first: {different[:3]}")
    write(notes, work / "sweep", rows)


def write(notes: Notes, out: Path, rows: int) -> None:
    """The part of docs/sweep.md, and the pictures."""
    made = page(notes, out, rows)
    print(made)
    path = ROOT / "docs" / "sweep.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + made + rest[rest.index(END) :])
    images = ROOT / "docs" / "images"
    shutil.copy(out / "sweep.png", images / "sweep_demo.png")
    picture(write_page(read(out)), images / "show.png")


if __name__ == "__main__":
    main()
