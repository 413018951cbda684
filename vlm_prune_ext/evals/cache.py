"""Where files that can be made again are kept, the demo's data among them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from vlm_prune_ext.errors import InputError

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
