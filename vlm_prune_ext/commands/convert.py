"""Turn an original-format LLaVA checkpoint into a folder that Hugging Face transformers loads
(LlavaForConditionalGeneration and its processor), for programs that only know that format.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from vlm_prune_ext.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="folder or repository; default: demo model"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def run(args: argparse.Namespace) -> int:
    """Convert, into a folder that is complete or not there."""
    out = check_folder(args.out)

    from vlm_prune_ext.commands.common import quiet_transformers
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.models.convert import convert_to_hf

    quiet_transformers()
    # Beside its place, then moved there: no half-written folder, whatever happens.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as part:
        convert_to_hf(args.source or str(CHECKPOINT), Path(part) / "model").replace(out)
    print(f"Written: {out}")
    return 0


def check_folder(text: str) -> Path:
    """A folder to fill, checked before anything is loaded.

    Raises:
        InputError: it holds something already, or cannot be made.
    """
    folder = Path(text).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {text!r} is not valid: a new or empty folder.")
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {text!r} cannot be made: {place} is not a folder to write in.")
    return folder
