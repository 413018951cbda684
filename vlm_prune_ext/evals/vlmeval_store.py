"""What a run of VLMEvalKit's leaves in its folder, and which answers of it still hold.

Every answer is a line of a log, with what it cost and with fingerprints of what it depends on. A
run goes on from that log, whatever number of processes it had; rows that are not what they were are
asked anew.

VLMEvalKit (checked: 0.0.20) writes pictures straight to their place, where another process, or the
next run after a kill, takes the first half of one for the whole; and its scoring of multiple choice
writes ``/tmp/<time to the second>.xlsx`` and reads it back, which two processes do in the same
second. It scores short answers in 16 processes, each a copy of one that holds a model: starting
them takes seconds, what they do takes milliseconds. Its readers take ``None``, ``NA`` and ``null``,
which options and answers may be, for missing values, and it finds out what a text is by running it
as Python. :func:`own_files` and :func:`own_reading` see to all of it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import multiprocessing
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pandas as pd
from vlmeval.dataset.utils import multiple_choice, vqa_eval
from vlmeval.smp import dump, get_pred_file_path, load, misc, vlm
from vlmeval.smp import file as reading

from vlm_prune_ext.errors import InputError, make_folder
from vlm_prune_ext.evals.names import run_name
from vlm_prune_ext.experiment.log import Log, put_aside, read_json, write_json
from vlm_prune_ext.experiment.record import Sample, SampleLog, Stretch, changed, digest
from vlm_prune_ext.experiment.report import say
from vlm_prune_ext.experiment.settings import Settings
from vlm_prune_ext.tables import BadRow, read_leniently

DECISIVE = (
    *("method", "seed", "dtype", "attn_implementation", "max_new_tokens", "fast"),
    *("checkpoint", "weights", "prompts", "min_pixels", "max_pixels", "frames", "fps"),
    *("video_budget", "backend"),
)
"""What decides predictions: where one of these differs, all rows are asked anew."""

# Column of a row -> part that its answer depends on; further columns are "other".
_PARTS = {
    **{"question": "question", "hint": "hint"},
    **dict.fromkeys(("image", "image_path", "video", "video_path"), "picture"),
}
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


SHARES = "shares"
"""Folder, below that of all results, of runs of a part of the rows: see :func:`adopt`."""


def adopt(
    files: Files, config: Mapping[str, Any], rows: Mapping[int | str, dict[str, str]]
) -> bool:
    """Take over what runs of parts of these rows have answered, as if it had been answered here.

    Args:
        files: of the run, made ready by :func:`start_files`.
        config, rows: as there.

    Returns:
        whether there was anything.
    """
    known = {sample.index for sample in files.log().samples()[0]}
    decisive = {name: config.get(name) for name in DECISIVE}
    found: list[Sample | Stretch] = []
    for folder in sorted(files.folder.parent.glob(f"{SHARES}/*/{files.stem}")):
        before = read_json(folder / files.ours("config.json").name)
        if not isinstance(before, dict) or changed(before, decisive):
            continue
        for path in sorted(folder.glob(f"{files.stem}_samples*.jsonl")):
            samples, stretches = SampleLog(path).samples()
            mine = [
                one
                for one in samples
                if one.failed is None and one.index not in known and rows.get(one.index) == one.row
            ]
            known.update(one.index for one in mine)
            found += [*mine, *stretches] if mine else []
    files.log().add(*found)
    return bool(found)


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
    videos = Path(getattr(dataset, "data_root", root))
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
            if name in VIDEO_COLUMNS:
                value = _video_state(value, videos)
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


VIDEO_COLUMNS = ("video", "video_path")


def _video_state(value: Any, root: Path) -> str:
    """A video that is named by its file or its stem, with the file's size and time: its content
    would take long to read."""
    name = str(value)
    for path in (root / name, root / f"{name}.mp4", root / "video" / f"{name}.mp4"):
        with contextlib.suppress(OSError, ValueError):
            found = path.stat()
            return digest([name, found.st_size, found.st_mtime_ns])
    return name


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


# -- VLMEvalKit's own files ------------------------------------------------------------------------
@contextmanager
def own_files() -> Iterator[None]:
    """While this is open, pictures appear whole or not at all, scoring files have own names, rows
    are scored in this process, and tables are read as :func:`own_reading` has it.

    Only names inside VLMEvalKit's modules are exchanged, and they are put back.
    """
    tag = uuid.uuid4().hex
    with own_reading([]), ExitStack() as stack:
        for module in _users_of(vlm.decode_base64_to_image_file):
            exchange(stack, module, "decode_base64_to_image_file", whole(module))
        for name in ("mp", "multiprocessing"):
            for module in _users_of(multiprocessing, name):
                exchange(stack, module, name, _OneProcess())
        plain = multiple_choice.timestr
        exchange(stack, multiple_choice, "timestr", lambda: f"{plain()}_{tag}")
        try:
            yield
        finally:
            for left in Path("/tmp").glob(f"*_{tag}.*"):  # the folder is VLMEvalKit's choice
                left.unlink(missing_ok=True)


@contextmanager
def own_reading(bad: list[BadRow]) -> Iterator[None]:
    """While this is open, VLMEvalKit reads tables so that words stay words, and rows break alone.

    Args:
        bad: takes the broken rows of TSV files.
    """
    with ExitStack() as stack:
        exchange(stack, reading, "pd", _Pandas(bad))
        exchange(stack, pd.DataFrame, "to_excel", _as_text(pd.DataFrame.to_excel))
        for module in {*_users_of(misc.istype), *_users_of(vqa_eval.istype)}:
            exchange(stack, module, "istype", is_spelled)
        yield


def is_spelled(value: Any, kind: type) -> bool:
    """VLMEvalKit's ``istype``, which runs a text (an index) as Python to see what it is: whether a
    value is of a kind, or a text that spells one as Python writes it."""
    if isinstance(value, kind) or not isinstance(value, str):
        return isinstance(value, kind)
    if kind is int:  # what int() reads, and no more: 0x10 and 1_0 are names
        return re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", value) is not None
    try:
        return isinstance(ast.literal_eval(value), kind)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


class _OneProcess:
    """``multiprocessing``, whose pools are one thread."""

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    @staticmethod
    def Pool(*_: Any, **__: Any) -> ThreadPool:
        """A pool that forks nothing."""
        return ThreadPool(1)


class _Pandas:
    """pandas, as far as the module of VLMEvalKit's that reads files uses it."""

    def __init__(self, bad: list[BadRow]) -> None:
        self._bad = bad

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    def read_csv(self, path: Any, sep: str = ",", **options: Any) -> pd.DataFrame:
        """A table's whole rows."""
        data, bad = read_leniently(Path(path), sep, **options)
        self._bad += bad
        return data

    def read_excel(self, path: Any, **options: Any) -> pd.DataFrame:
        """A sheet whose texts are what was written: words, and signs that XML has no place for."""
        options = {"dtype": object, "keep_default_na": False, "na_values": [""], **options}
        found = pd.read_excel(path, **options).infer_objects()  # 007 stays a text
        found = found.map(lambda cell: _plain(cell) if isinstance(cell, str) else cell)
        if "prediction" in found:  # an empty answer is an answer
            found["prediction"] = found["prediction"].astype(object).fillna("")
        return found


_ESCAPED = re.compile(r"_x(00[01][0-9A-F])_")


def _plain(text: str) -> str:
    """Without the way in which xlsx writes control characters, which openpyxl leaves as it is."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def _as_text(write: Callable[..., Any]) -> Callable[..., Any]:
    """``DataFrame.to_excel`` whose cells stay the texts they are: VLMEvalKit's makes formulas and
    links of answers that look like some."""

    def to_excel(self: pd.DataFrame, *args: Any, **options: Any) -> Any:
        if options.get("engine") == "xlsxwriter":
            kinds = ("formulas", "urls", "numbers")
            plain = {f"strings_to_{kind}": False for kind in kinds}
            options["engine_kwargs"] = {"options": plain}
        return write(self, *args, **options)

    return to_excel


def exchange(stack: ExitStack, module: Any, name: str, new: Any) -> None:
    """Another thing under a module's name, until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, new)


def _users_of(thing: Any, name: str = "") -> list[Any]:
    """VLMEvalKit's modules that have a function under its name, or anything under a stated one."""
    name = name or thing.__name__
    loaded = [module for key, module in list(sys.modules.items()) if key.startswith("vlmeval")]
    return [module for module in loaded if vars(module).get(name) is thing]


def whole(module: Any) -> Callable[..., None]:
    """The module's writer of pictures, writing beside the place and moving there when done."""
    write = module.decode_base64_to_image_file

    def write_whole(data: str, image_path: str, *args: Any, **kwargs: Any) -> None:
        place = Path(image_path)
        part = place.with_name(f".{uuid.uuid4().hex}{place.suffix}")
        try:
            write(data, str(part), *args, **kwargs)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)

    return write_whole


# -- what was asked --------------------------------------------------------------------------------
# Columns in which VLMEvalKit's scoring writes each row's share of the score, in [0, 1].
_SCORES = ("eval_score", "hit", "score")
_TEXTS = ("question", "hint", "answer", "category", "l2-category")


def row_scores(paths: Iterable[Path]) -> dict[str, float]:
    """Index -> score of a row in [0, 1], from the tables that scoring left; empty: there is none
    (captions are scored as a whole)."""
    for path in sorted(paths):
        if path.suffix != ".xlsx":
            continue
        table = load(str(path))
        column = next((name for name in _SCORES if name in table), None)
        if column is not None and "index" in table:
            pairs = zip(table["index"], table[column], strict=True)
            found = {str(index_of(index)): _share(score) for index, score in pairs}
            return {index: score for index, score in found.items() if score is not None}
    return {}


def what_is_asked(dataset: Any) -> list[dict[str, Any]]:
    """Index, texts, options and picture files of each row of a data set of VLMEvalKit's. To be
    called before it is answered: inference takes the pictures out of the table."""
    return [_row(dataset, row) for row in dataset.data.to_dict("records")]


def write_rows(path: Path, asked: Iterable[dict[str, Any]], scores: dict[str, float]) -> None:
    """Write the file.

    Args:
        path: of it.
        asked: as :func:`what_is_asked` gives it.
        scores: as :func:`row_scores` gives them.
    """
    Log(path).replace({**row, "score": scores.get(row["index"])} for row in asked)


def _row(dataset: Any, row: dict[Any, Any]) -> dict[str, Any]:
    options = {n: row[n] for n in row if len(str(n)) == 1 and str(n).isupper()}
    texts = {name: row.get(name) for name in _TEXTS}
    pictures: list[str] = []
    with contextlib.suppress(Exception):  # a row without its picture has failed, and says so
        pictures = list(map(str, dataset.dump_image(pd.Series(row, dtype=object))))
    return {
        "index": str(index_of(row["index"])),
        **{name: str(text) for name, text in texts.items() if _is_there(text)},
        "options": {n: str(text) for n, text in options.items() if _is_there(text)},
        "pictures": pictures,
    }


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and pd.isna(value))


def _share(value: Any) -> float | None:
    try:
        return float(json.loads(str(value).lower()))
    except (ValueError, TypeError):
        return None
