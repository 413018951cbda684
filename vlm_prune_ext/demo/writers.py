"""Demo data sets as files: TSVs for VLMEvalKit, parquet for lmms-eval, a CSV for captioning.

Each writer works in a hidden folder inside the target and moves finished files out of it, so a
failure leaves nothing half-written. Wrong input is an `InputError` (a `ValueError`).
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlm_prune_ext.errors import InputError

from .drawing import FIRST_TRAINING_SEED, make_scene, render
from .questions import (
    KINDS,
    LETTERS,
    YES_NO_SUFFIX,
    check_count,
    samples,
    yes_no_question,
)

TSV_NAMES = {
    "mcq": "Shapes_MCQ.tsv",
    "yn": "Shapes_YN.tsv",
    "vqa": "Shapes_VQA.tsv",
    "caption": "Shapes_Caption.tsv",
}
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

# VQA scores count how many of ten people gave an answer; a drawn scene leaves no two opinions.
_PEOPLE = 10
_GROUPS = dict.fromkeys(("position", "count", "relation", "comparison"), "relation")
# Those of our categories that MME has, and its own name where that differs.
_MME_NAMES = {
    "existence": "existence",
    "color": "color",
    "position": "position",
    "count": "count",
    "text": "OCR",
}


def _picture(scene_seed: int) -> bytes:
    """The scene as a JPEG of high quality: a fifth of the size of a PNG of the same noise."""
    file = io.BytesIO()
    render(make_scene(scene_seed)).save(file, format="JPEG", quality=92, subsampling=0)
    return file.getvalue()


def _group(category: str) -> str:
    return _GROUPS.get(category, "attribute")


@contextmanager
def _target(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder inside `folder`; what is in it at the end is moved into `folder`."""
    target = Path(folder)
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=target))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield part
        _move_into(part, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _move_into(source: Path, target: Path) -> None:
    """Move all of `source` into `target`, folders before files, replacing what has the name."""
    for path in sorted(source.iterdir(), key=lambda p: (p.is_file(), p.name)):
        if path.is_dir() and (target / path.name).is_dir():
            _move_into(path, target / path.name)
        else:
            path.replace(target / path.name)


def _unwritable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(
        f"folder {str(folder)!r} cannot be written ({reason}); a folder that can be made or "
        "written is accepted."
    )


def _check(seed: Any, count: Any) -> None:
    check_count("samples", count)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; a whole number of at least 0 is accepted.")


# ----------------------------------------------------------------------------- VLMEvalKit


def write_vlmeval_tsv(folder: str | os.PathLike[str], seed: int, samples: int) -> dict[str, Path]:
    """Write `Shapes_MCQ.tsv`, `Shapes_YN.tsv`, `Shapes_VQA.tsv` and `Shapes_Caption.tsv`.

    Args:
        folder: where to; made if missing.
        seed: another seed gives other scenes.
        samples: how many per set.

    Returns:
        the path of each kind's file.
    """
    _check(seed, samples)
    with _target(folder) as part:
        for kind in KINDS:
            _write_tsv(part / TSV_NAMES[kind], kind, seed, samples)
    return {kind: Path(folder) / name for kind, name in TSV_NAMES.items()}


def _write_tsv(path: Path, kind: str, seed: int, count: int) -> None:
    import pandas as pd

    rows = []
    for sample in samples(kind, seed, count):
        row: dict[str, Any] = {
            "index": sample["index"],
            "image": base64.b64encode(_picture(sample["scene_seed"])).decode("ascii"),
        }
        # Without a question, VLMEvalKit puts its own request for a caption.
        if kind != "caption":
            row["question"] = sample["question"]
        row |= dict(zip(LETTERS, sample.get("options", ()), strict=False))
        row["answer"] = _tsv_answer(kind, sample["answer"])
        row["category"] = sample["category"]
        row["l2-category"] = _group(sample["category"])
        rows.append(row)
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)


def _tsv_answer(kind: str, answer: str) -> str:
    """VLMEvalKit evaluates lists of reference answers as Python source."""
    if kind == "vqa":
        return repr([answer] * _PEOPLE)
    return repr([answer]) if kind == "caption" else answer


# ----------------------------------------------------------------------------- lmms-eval


def write_lmms_parquet(folder: str | os.PathLike[str], seed: int, samples: int) -> dict[str, Path]:
    """Write `mcq`, `yn`, `mme`, `vqa` and `caption` as `.parquet`.

    Columns are those of MMBench, POPE, MME (two questions per picture, one answered yes and one
    no), TextVQA and COCO captions, with the picture as `{bytes, path}`.

    Args:
        folder: where to; made if missing.
        seed: another seed gives other scenes.
        samples: how many per set (`mme`: rounded up to whole pairs).

    Returns:
        the path of each set's file.
    """
    _check(seed, samples)
    makers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "mcq": _mcq_row,
        "yn": _yn_row,
        "vqa": _vqa_row,
        "caption": _caption_row,
    }
    with _target(folder) as part:
        for kind, make_row in makers.items():
            rows = (make_row(sample) for sample in _samples(kind, seed, samples))
            _write_parquet(part / f"{kind}.parquet", list(rows))
        _write_parquet(part / "mme.parquet", list(_mme_rows(seed, samples)))
    return {kind: Path(folder) / f"{kind}.parquet" for kind in (*makers, "mme")}


# The argument `samples` hides the function of that name in the writers.
_samples = samples


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


def _image(name: str, scene_seed: int) -> dict[str, Any]:
    return {"bytes": _picture(scene_seed), "path": f"{name}.jpg"}


def _common(sample: dict[str, Any]) -> dict[str, Any]:
    """Columns of all sets but MME's."""
    kind, index = sample["kind"], sample["index"]
    return {
        "index": index,
        "question_id": f"shapes_{kind}_{index}",
        "image": _image(f"shapes_{kind}_{index}", sample["scene_seed"]),
        "question": sample["question"],
        "answer": sample["answer"],
        "category": sample["category"],
    }


def _mcq_row(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        **_common(sample),
        **dict(zip(LETTERS, sample["options"], strict=True)),
        "options": sample["options"],
        "hint": "nan",  # how MMBench spells that there is none
        "L2-category": _group(sample["category"]),
        "source": "shapes",
        "split": "test",
    }


def _yn_row(sample: dict[str, Any]) -> dict[str, Any]:
    row = _common(sample)
    return {**row, "answer": sample["answer"].lower(), "image_source": row["question_id"]}


def _vqa_row(sample: dict[str, Any]) -> dict[str, Any]:
    row = _common(sample)
    return {**row, "image_id": row["question_id"], "answers": [sample["answer"]] * _PEOPLE}


def _caption_row(sample: dict[str, Any]) -> dict[str, Any]:
    return {**_common(sample), "id": sample["index"], "answer": [sample["answer"]]}


def _mme_rows(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """A question answered yes and one answered no for each picture."""
    rng = np.random.default_rng([len(KINDS), seed])
    categories = tuple(_MME_NAMES)
    for pair in range(-(-count // 2)):
        category = categories[pair % len(categories)]
        questions: list[Any] = [None, None]
        while None in questions:
            scene = make_scene(int(rng.integers(FIRST_TRAINING_SEED)))
            questions = [yes_no_question(scene, category, truth, rng) for truth in (True, False)]
        name = f"shapes_mme_{pair}"
        image = _image(name, scene.seed)
        for question in questions:
            yield {
                "question_id": name,
                "image": image,
                "question": question.text + YES_NO_SUFFIX,
                "answer": question.answer,
                "category": _MME_NAMES[category],
            }


# ----------------------------------------------------------------------------- captioning CSV


def write_caption_csv(folder: str | os.PathLike[str], seed: int, samples: int) -> Path:
    """Write `captions.csv` with columns image, prompt, reference, and the pictures in `images/`.

    Args:
        folder: where to; made if missing.
        seed: another seed gives other scenes.
        samples: how many pictures.

    Returns:
        the path of the CSV; `image` is relative to its folder.
    """
    import pandas as pd

    _check(seed, samples)
    with _target(folder) as part:
        (part / "images").mkdir()
        rows = []
        for sample in _samples("caption", seed, samples):
            name = f"images/shapes_{seed}_{sample['index']:05d}.jpg"
            (part / name).write_bytes(_picture(sample["scene_seed"]))
            rows.append({"image": name, "prompt": CAPTION_PROMPT, "reference": sample["answer"]})
        pd.DataFrame(rows).to_csv(part / "captions.csv", index=False)
    return Path(folder) / "captions.csv"
