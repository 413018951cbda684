"""The demo's data sets as VLMEvalKit data sets: subclasses of its own, scored by its own code.

Files: ``Shapes_*.tsv`` as ``vlm-prune demo-data`` writes them, in the folder that
``VLM_PRUNE_DEMO_DATA`` names. Where that is not set, a fixed set is generated on first use and kept
in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``). VLMEvalKit's own data folder
(``LMUData``) is neither read nor written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import vlmeval.dataset
from vlmeval.dataset import ImageCaptionDataset, ImageMCQDataset, ImageVQADataset, ImageYORNDataset
from vlmeval.smp import load

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.cache import VARIABLE, demo_data
from vlm_prune_ext.evals.names import LMUDATA

# Answers in these sets are short; VLMEvalKit's limit for LLaVA (2048) would only let a model that
# does not stop by itself babble.
MAX_NEW_TOKENS = {"Shapes_MCQ": 16, "Shapes_YN": 16, "Shapes_VQA": 16, "Shapes_Caption": 64}


class _Shapes:
    """What the four classes share: data and pictures in a folder of their own."""

    def __init__(self, dataset: str, **kwargs: Any) -> None:
        with _no_lmudata():
            super().__init__(dataset=dataset, **kwargs)  # type: ignore[call-arg]

    def prepare_tsv(self, url: str, file_md5: str | None = None) -> Any:
        """The table, from our folder instead of a download."""
        name = self.dataset_name  # type: ignore[attr-defined]
        path = demo_data("tsv") / f"{name}.tsv"
        if not path.is_file():
            raise InputError(
                f"{str(path)!r} is missing: {VARIABLE} must name a folder made by "
                "`vlm-prune demo-data`, or not be set."
            )
        self.data_path = str(path)
        return load(str(path))


@contextmanager
def _no_lmudata() -> Iterator[None]:
    """VLMEvalKit makes its data folder when a data set is built; here it gets an existing one."""
    before = os.environ.get(LMUDATA)
    os.environ[LMUDATA] = tempfile.gettempdir()
    try:
        yield
    finally:
        if before is None:
            del os.environ[LMUDATA]
        else:
            os.environ[LMUDATA] = before


class ShapesMCQ(_Shapes, ImageMCQDataset):
    """Multiple choice."""

    DATASET_URL: ClassVar[dict[str, str]] = {"Shapes_MCQ": ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}


class ShapesYN(_Shapes, ImageYORNDataset):
    """Yes or no."""

    DATASET_URL: ClassVar[dict[str, str]] = {"Shapes_YN": ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}


class ShapesVQA(_Shapes, ImageVQADataset):
    """Short answers."""

    DATASET_URL: ClassVar[dict[str, str]] = {"Shapes_VQA": ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}


class ShapesCaption(_Shapes, ImageCaptionDataset):
    """Captions."""

    DATASET_URL: ClassVar[dict[str, str]] = {"Shapes_Caption": ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}


CLASSES = (ShapesMCQ, ShapesYN, ShapesVQA, ShapesCaption)
NAMES = tuple(name for cls in CLASSES for name in cls.DATASET_URL)


def register_datasets() -> None:
    """Make VLMEvalKit know the four data sets. A second call does nothing."""
    known = vlmeval.dataset.DATASET_CLASSES
    for cls in CLASSES:
        if cls not in known:
            known.append(cls)
            vlmeval.dataset.SUPPORTED_DATASETS.extend(cls.DATASET_URL)
