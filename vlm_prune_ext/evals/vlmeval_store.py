"""What a run of VLMEvalKit's leaves in its folder, and which answers of it still hold.

Every answer is a line of a log, with what it cost and with fingerprints of what it depends on. A
run goes on from that log, whatever number of processes it had; rows that are not what they were are
asked anew.
"""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmeval.smp import dump, get_pred_file_path

from vlm_prune_ext.errors import InputError, make_folder
from vlm_prune_ext.evals.names import run_name
from vlm_prune_ext.experiment.log import put_aside, read_json, write_json
from vlm_prune_ext.experiment.record import Sample, SampleLog, Stretch, changed, digest
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import Settings

DECISIVE = (
    *("method", "seed", "dtype", "attn_implementation", "max_new_tokens", "fast"),
    *("checkpoint", "weights", "prompts", "min_pixels", "max_pixels"),
)
"""What decides predictions: where one of these differs, all rows are asked anew."""

# Column of a row -> part that its answer depends on; further columns are "other".
_PARTS = {"question": "question", "hint": "hint", "image": "picture", "image_path": "picture"}
_NOT_ASKED = {"index", "answer", "category", "l2-category", "split"}


class Files:
    """Where a run's files are: ``<work-dir>/<name>_<data>/<name>_<data>...``."""

    def __init__(self, settings: Settings, dataset: str) -> None:
        self.name = run_name(settings.model_path, settings.method)
        self.dataset = dataset
        self.stem = f"{self.name}_{dataset}"
        self.folder = Path(settings.work_dir) / self.stem

    @property
    def predictions(self) -> Path:
        """Written by VLMEvalKit."""
        return Path(get_pred_file_path(str(self.folder), self.name, self.dataset))

    def ours(self, ending: str) -> Path:
        """A file of ours."""
        return self.folder / f"{self.stem}_{ending}"

    def log(self, rank: int | None = None) -> SampleLog:
        """Lines of one process, or of all that ended."""
        return SampleLog(self.ours("samples.jsonl" if rank is None else f"samples_{rank}.jsonl"))

    def logs(self) -> list[SampleLog]:
        """All there are, the oldest lines first."""
        parts = sorted(self.folder.glob(f"{self.stem}_samples_*.jsonl"))
        return [self.log(), *map(SampleLog, parts)]

    def scoring_files(self) -> list[Path]:
        """What VLMEvalKit's scoring left behind, and would take for its own again."""
        ours = ("results.json", "config.json", "rows.jsonl")
        mine = {self.predictions, *map(self.ours, ours), *(log.path for log in self.logs())}
        return [p for p in self.folder.glob(f"{self.stem}*") if p.is_file() and p not in mine]


def start_files(
    files: Files,
    config: dict[str, Any],
    rows: Mapping[int | str, dict[str, str]] | None = None,
    *,
    reuse: bool = False,
    fresh: bool = False,
) -> None:
    """Make the folder ready: the answers that still hold are there for VLMEvalKit to find, all
    else that was there is put aside.

    Args:
        files: of the run.
        config: as :func:`run_config` makes it.
        rows: index -> fingerprints of what its answer depends on; ``None``: ``config`` alone says
            whether rows have changed.
        reuse: whether it was said that what is there is to be gone on from: then it must be of the
            same settings and rows. Otherwise what differs is named and asked anew.
        fresh: whether nothing is to be gone on from.

    Raises:
        InputError: the folder cannot be written, or ``reuse`` and something differs.
    """
    make_folder(files.folder, "work_dir: ")
    kept, why = ([], "") if fresh else _still_right(files, config, rows)
    if why and reuse:
        raise InputError(
            f"--reuse: {str(files.folder)!r}: {why}; run without --reuse to have it asked anew, "
            "or with --fresh to start anew."
        )
    if why:
        aside = put_aside(files.folder)
        say(f"{files.stem}: {why}: asked anew; what was there is in {aside}.", error=True)
        if kept:
            files.log().rewrite(kept)
    elif fresh:
        put_aside(files.folder)
    for path in [*files.folder.glob("*.pkl"), files.predictions]:
        path.unlink(missing_ok=True)
    answers = {s.index: s.prediction for s in kept if isinstance(s, Sample) and s.failed is None}
    try:
        if answers:
            dump(answers, str(files.folder / f"{files.stem}_PREV.pkl"))
    except OSError as error:
        raise InputError(
            f"work_dir: {str(files.folder)!r} cannot be written ({error.strerror}); a folder that "
            "can be made or written is accepted."
        ) from error
    write_json(files.ours("config.json"), config)


def _still_right(
    files: Files, config: dict[str, Any], rows: Mapping[int | str, dict[str, str]] | None
) -> tuple[list[Sample | Stretch], str]:
    """Lines to go on with, and why others are not among them (empty: all are)."""
    path = files.ours("config.json")
    samples, stretches = collect(files)
    before = read_json(path)
    if not path.is_file() and not samples:
        return [], ""
    if not isinstance(before, dict):
        return [], "its settings cannot be read"
    decisive = {name: config.get(name) for name in DECISIVE}
    if rows is None:
        decisive["rows"] = config.get("rows")
    if different := changed(before, decisive):
        return [], f"made with {'; '.join(different)}"
    kept: list[Sample] = []
    parts: Counter[str] = Counter()
    for sample in samples:
        now = (rows or {}).get(sample.index, sample.row)  # a row beyond --limit stays
        if now == sample.row:
            kept.append(sample)
        parts.update(name for name, value in now.items() if sample.row.get(name) != value)
    count = len(samples) - len(kept)
    what = ", ".join(sorted(parts))
    said = f"{count} {'row has' if count == 1 else 'rows have'} changed ({what})" if count else ""
    return [*kept, *stretches], said


def collect(files: Files) -> tuple[list[Sample], list[Stretch]]:
    """Put the logs of all processes into one, the last line of each row winning."""
    samples: dict[int | str, Sample] = {}
    stretches: list[Stretch] = []
    logs = files.logs()
    for log in logs:
        mine, times = log.samples()
        samples.update({sample.index: sample for sample in mine})
        stretches += times
        if log.broken:
            lines = ", ".join(map(str, log.broken))
            say(f"{log.path.name}: line {lines} cannot be read and is left out.", error=True)
    if len(logs) > 1 and (samples or stretches):
        files.log().rewrite([*samples.values(), *stretches])
    for log in logs[1:]:
        log.path.unlink(missing_ok=True)
    return list(samples.values()), stretches


def row_parts(dataset: Any) -> dict[int | str, dict[str, str]]:
    """Fingerprints of what the answer to each row depends on, by index: its question, hint,
    options, picture, and whatever else it has but for the right answer and categories."""
    data, found = dataset.data, {}
    names = {name: _part(name) for name in map(str, data) if name not in _NOT_ASKED}
    root = Path(getattr(dataset, "img_root", "."))
    seen: dict[str, str] = {}  # pictures are large, and have several rows

    def fingerprint(part: str, values: list[Any]) -> str:
        if part != "picture" or len(values) > 1:
            return digest(values)
        key = values[0][1]
        if key not in seen:
            seen[key] = digest(values)
        return seen[key]

    for row in data.to_dict("records"):
        parts: dict[str, list[Any]] = {}
        for name, part in names.items():
            value = row[name]
            if name == "image_path":
                value = _picture_bytes(value, root)
            parts.setdefault(part, []).append([name, str(value)])
        found[index_of(row["index"])] = {
            part: fingerprint(part, values) for part, values in parts.items()
        }
    return found


def _part(column: str) -> str:
    is_option = len(column) == 1 and column.isupper()
    return "options" if is_option else _PARTS.get(column, "other")


def _picture_bytes(value: Any, root: Path) -> str:
    """Pictures that are named by their files, one or a list: what the files hold."""
    text = str(value)
    return digest([text, *(_content(root / name) for name in texts(text))])


def _content(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except (OSError, ValueError):  # the row will fail, and say why
        return ""


def index_of(value: Any) -> int | str:
    """A row's index as a log has it."""
    return value if isinstance(value, str) else int(value)


def texts(cell: str) -> list[str]:
    """A text, or a list of texts as Python writes it."""
    if cell.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            return list(map(str, ast.literal_eval(cell))) or [""]
    return [cell]
