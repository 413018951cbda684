"""Names of runs in files, and of data sets, before VLMEvalKit is imported (which takes seconds)."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from pathlib import Path

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError, unknown_name
from vlm_prune_ext.evals.cache import cache_folder
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
    """Where a data set of one's own would be."""
    return data_root() / f"{name}.tsv"


def check_by_sight(name: str) -> None:
    """Refuse a name that stands nowhere in VLMEvalKit's code and is no file.

    Its sources are searched for the name as a text: all of its data sets are spelled out there, or
    begin with what an f-string does. What passes is looked up properly once it is imported.

    Raises:
        InputError: with the near name.
    """
    if name in SHAPES or own_table(name).is_file():
        return
    words, starts = _spelled()
    if words and name not in words and not name.startswith(tuple(starts)):
        raise unknown_dataset(name, {word for word in words if word[:1].isupper()})


def unknown_dataset(name: str, known: set[str]) -> InputError:
    """The error for a name that no data set has."""
    short = str(unknown_name("dataset", name, {*known, *SHAPES})).split(" Accepted: ")[0]
    return InputError(
        f"{short} Accepted: VLMEvalKit's data sets, {', '.join(SHAPES)}, or a TSV of your own at "
        f"{str(own_table(name))!r}."
    )


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
