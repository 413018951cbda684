"""Names of runs in files, and of data sets, before VLMEvalKit is imported (which takes seconds)."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from functools import cache
from pathlib import Path

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.methods.base import Method, label_text

SHAPES = ("Shapes_MCQ", "Shapes_YN", "Shapes_VQA", "Shapes_Caption")
"""The demo's data sets."""

LMUDATA = "LMUData"

_WORDS = re.compile(r"""["']([\w.+() -]{2,80})["']""")
_STARTS = re.compile(r"""\bf["']([\w.+-]{4,})\{""")


def data_root() -> Path:
    """VLMEvalKit's data folder, without making it."""
    named = os.environ.get(LMUDATA)
    return Path(named) if named and Path(named).is_dir() else Path("~/LMUData").expanduser()


def keep_out_of_lmudata() -> None:
    """VLMEvalKit makes its data folder as soon as it is imported. Where only the demo's data are
    asked for and there is no such folder, it gets one in the cache."""
    if LMUDATA in os.environ or Path("~/LMUData").expanduser().exists():
        return
    folder = cache_folder() / "LMUData"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[LMUDATA] = str(folder)


def import_quietly() -> None:
    """Import VLMEvalKit, which reports a missing file of API keys, which nothing here needs, as an
    error."""
    logging.disable(logging.ERROR)
    try:
        import vlmeval  # noqa: F401
    finally:
        logging.disable(logging.NOTSET)


def own_table(name: str) -> Path:
    """Where a data set of one's own would be, or is, where :func:`table_name` was told its path."""
    return _TABLES.get(name) or data_root() / f"{name}.tsv"


_TABLES: dict[str, Path] = {}
"""Name -> table that was named by its path."""


def is_by_path(name: str) -> bool:
    """Whether a data set's table was named by its path."""
    return name in _TABLES


def is_ours(data: str) -> bool:
    """Whether a data set has nothing to do with VLMEvalKit's data folder: one of the demo's, a
    table that is named by its path, or a task of lmms-eval."""
    name = table_name(data)
    return data in SHAPES or is_by_path(name) or task_file(name) is not None


def table_name(data: str) -> str:
    """The name of a data set. A table (``path.tsv``, ``path.csv``) is known by its stem from here
    on, in this process, and a task of lmms-eval (a YAML file, or a folder of one) by its own name;
    other texts are names already.

    Raises:
        InputError: no such file, a folder of several tasks, a name that is a data set of
            VLMEvalKit's, or that another file of this process has.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in _OF_TASKS or (path.is_dir() and _tasks_of(path)):
        path, name = _task_at(data, path)
    elif path.suffix.lower() in (".tsv", ".csv"):
        name = label_text(path.stem)
    else:
        return data
    if not path.is_file():
        raise InputError(f"data={data!r} does not exist: a table (.tsv, .csv) is accepted.")
    if name in SHAPES or name in _spelled()[0]:
        raise InputError(f"data={data!r} has the name of a benchmark: rename the file.")
    if (other := _TABLES.setdefault(name, path.resolve())) != path.resolve():
        raise InputError(f"data={data!r} has the name of {str(other)!r}: rename one of them.")
    return name


# -- tasks of lmms-eval ----------------------------------------------------------------------------
_OF_TASKS = (".yaml", ".yml")
_TASK = re.compile(r"""^(task|group):[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)


def task_file(name: str) -> Path | None:
    """File of a task of lmms-eval: one that was named by its path, or one of lmms-eval's own and of
    this package's; ``None``: a name of VLMEvalKit's, or of nobody's."""
    if name in _TABLES:
        return _TABLES[name] if _TABLES[name].suffix.lower() in _OF_TASKS else None
    if name in SHAPES or own_table(name).is_file():
        return None
    found = _known_tasks().get(name)
    theirs = name[:1].isupper() and name in _spelled()[0]
    return None if found is None or theirs else found[0]


@cache
def _known_tasks() -> dict[str, tuple[Path, str]]:
    """Name -> file and kind (``task`` or ``group``), by the texts of lmms-eval's files and ours."""
    found = importlib.util.find_spec("lmms_eval")
    folders = (found.submodule_search_locations or []) if found else []
    known: dict[str, tuple[Path, str]] = {}
    for folder in [Path(__file__).parent, *map(Path, folders)]:
        known = {**_tasks_of(folder / "tasks"), **known}
    return known


def _tasks_of(folder: Path) -> dict[str, tuple[Path, str]]:
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        for kind, name in _TASK.findall(path.read_text("utf-8", "replace")):
            found[name] = (path, kind)
    return found


def _task_at(data: str, path: Path) -> tuple[Path, str]:
    """File and name of the only task that a path names."""
    if path.is_dir():
        found = {name: own for name, (own, kind) in _tasks_of(path).items() if kind == "task"}
    else:
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        found = {name: path for kind, name in _TASK.findall(text) if kind == "task"}
    if len(found) != 1:
        what = f"{len(found)} tasks ({', '.join(found)})" if found else "no task of lmms-eval"
        raise InputError(f"data={data!r} has {what}: the YAML file of one is accepted.")
    ((name, own),) = found.items()
    return own, name


def _check_task(name: str) -> None:
    """lmms-eval is there, and a name is that of one task whose rows have one answer each."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(f'data={name!r} needs lmms-eval: pip install -e ".[lmms]" brings it.')
    if name not in _TABLES and (found := _known_tasks()[name])[1] == "group":
        beside = _tasks_of(found[0].parent)
        some = ", ".join([task for task, (_, kind) in beside.items() if kind == "task"][:8])
        raise InputError(
            f"data={name!r} is a group of tasks of lmms-eval: name its tasks ({some})."
        )

    path = task_file(name)
    kind = _OUTPUT.search(path.read_text("utf-8", "replace")) if path is not None else None
    if kind is not None and kind[1] != "generate_until":
        raise InputError(f"data={name!r} is a task of lmms-eval of the kind {kind[1]}: {_BY_LMMS}.")


_OUTPUT = re.compile(r"""^output_type:[ \t]*["']?(\w+)""", re.MULTILINE)
_BY_LMMS = "./run_lmms.sh evaluates these"


def check_by_sight(name: str) -> None:
    """Refuse a name that stands nowhere in VLMEvalKit's code, is no task of lmms-eval's and no
    file.

    The sources of VLMEvalKit are searched for the name as a text: all of its data sets are spelled
    out there, or begin with what an f-string does. What passes is looked up properly once it is
    imported.

    Raises:
        InputError: with the near name.
    """
    name = table_name(name)
    if name in SHAPES:
        return
    if task_file(name) is not None:
        _check_task(name)
        return
    words, starts = _spelled()
    known = name in words or name.startswith(tuple(starts)) or own_table(name).is_file()
    if words and not known:
        raise unknown_dataset(name, {word for word in words if word[:1].isupper()})


def unknown_dataset(name: str, known: set[str]) -> InputError:
    """The error for a name that no data set has."""
    every = {*known, *SHAPES} if name[:1].isupper() else {*known, *SHAPES, *_known_tasks()}
    short = str(unknown_name("dataset", name, every)).split(" Accepted: ")[0]
    return InputError(
        f"{short} Accepted: VLMEvalKit's data sets, tasks of lmms-eval, {', '.join(SHAPES)}, a "
        f"table or a task by its path (.tsv, .csv, .yaml), or a TSV of your own at "
        f"{str(own_table(name))!r}."
    )


@cache
def _spelled() -> tuple[set[str], set[str]]:
    """Texts in the sources of VLMEvalKit's data sets, and beginnings of f-strings."""
    found = importlib.util.find_spec("vlmeval")
    words: set[str] = set()
    starts: set[str] = set()
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in Path(folder, "dataset").rglob("*.py"):
            text = path.read_text("utf-8", "replace")
            words.update(_WORDS.findall(text))
            starts.update(_STARTS.findall(text))
    return words, starts


# -- runs ------------------------------------------------------------------------------------------
def model_name(model_path: str | None) -> str:
    """A checkpoint's name in file names: ``liuhaotian/llava-v1.5-7b`` -> ``llava-1.5-7b``."""
    path = Path(model_path) if model_path else CHECKPOINT
    if path.exists():
        path = path.resolve()
    if path == CHECKPOINT.resolve():
        return "llava-demo"
    name = path.name
    if path.parent.name == "snapshots":  # the hub's cache: models--owner--name/snapshots/commit
        name = path.parent.parent.name.rpartition("--")[2]
    elif name.startswith("checkpoint"):  # a step of a training run
        name = f"{path.parent.name}-{name}"
    return label_text(re.sub(r"-v(?=\d)", "-", name))


def run_name(model_path: str | None, method: Method | None) -> str:
    """Name of a model with a method: ``llava-1.5-7b-fastv_rank100``."""
    return f"{model_name(model_path)}-{method.label() if method is not None else 'baseline'}"


# -- files that can be made again ------------------------------------------------------------------
VARIABLE = "VLM_PRUNE_DEMO_DATA"
"""Environment variable: a folder made by ``vlm-prune demo-data``, in place of the fixed set."""

SEED = 0
SAMPLES = 100
# The code that draws pictures, asks questions and writes files.
_RECIPE = ("drawing", "questions", "writers")


def cache_folder() -> Path:
    """``vlm_prune_ext`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "vlm_prune_ext"


def demo_data(form: str) -> Path:
    """Where the demo's data sets are; a fixed set is generated first where nobody named a folder.

    Args:
        form: ``"tsv"`` (VLMEvalKit) or ``"parquet"`` (lmms-eval).

    Raises:
        InputError: the cache folder cannot be written.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    folder = cache_folder() / f"shapes_{form}_seed{SEED}_samples{SAMPLES}_{_recipe()}"
    if not folder.is_dir():
        _generate(form, folder)
    return folder


def _recipe() -> str:
    """Changes when the code that makes the data does."""
    from vlm_prune_ext import demo

    digest = hashlib.sha1(usedforsecurity=False)
    for name in _RECIPE:
        path = Path(demo.__file__).with_name(f"{name}.py")
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:8]


def _generate(form: str, folder: Path) -> None:
    """Write the fixed set beside its place and move it there, so that it is whole or absent."""
    from vlm_prune_ext.demo import writers

    write = {"tsv": writers.write_vlmeval_tsv, "parquet": writers.write_lmms_parquet}[form]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shapes_") as part:
            write(Path(part) / "data", SEED, SAMPLES)
            try:
                (Path(part) / "data").rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise InputError(
            f"Demo data cannot be written to {str(folder)!r} ({error.strerror}): set "
            f"XDG_CACHE_HOME to a folder that can, or {VARIABLE} to one made by "
            "`vlm-prune demo-data`."
        ) from error
