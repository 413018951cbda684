"""Small TSV files in the formats of VLMEvalKit's data sets."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tests.makers import photo

Row = dict[str, Any]


def picture(seed: int) -> str:
    """A photo as base64 of a PNG."""
    file = io.BytesIO()
    photo(60, 44, seed=seed).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def mcq_rows(count: int) -> list[Row]:
    return [
        {
            "index": i,
            "image": picture(i),
            "question": f"Which letter is number {i}?",
            "hint": "Count." if i % 2 else None,
            **dict(zip("ABCD", ("one", "two", "three", "four"), strict=True)),
            "answer": "ABCD"[i % 4],
            "category": "counting",
            "l2-category": "attribute",
            "split": "dev",
        }
        for i in range(count)
    ]


def caption_rows(count: int) -> list[Row]:
    answers = repr(["A photo of areas.", "Areas in many colours."])
    return [{"index": i, "image": picture(i), "answer": answers} for i in range(count)]


def yes_no_rows(count: int, categories: Sequence[str]) -> list[Row]:
    """Two questions per picture, one answered yes and one no, as MME has them."""
    return [
        {
            "index": i,
            "image": picture(i // 2),
            "image_path": f"{i // 2}.png",
            "question": f"Is there a dog in picture {i}? Please answer yes or no.",
            "answer": "No" if i % 2 else "Yes",
            "category": categories[(i // 2) % len(categories)],
        }
        for i in range(count)
    ]


def vqa_rows(count: int) -> list[Row]:
    answers = repr(["cat"] * 10)
    return [
        {"index": i, "image": picture(i), "question": "What is it?", "answer": answers}
        for i in range(count)
    ]


MAKERS: dict[str, Callable[[int], list[Row]]] = {
    "MMBench_DEV_EN_V11": mcq_rows,
    "COCO_VAL": caption_rows,
    "MME": lambda count: yes_no_rows(count, ("existence", "color", "code_reasoning")),
    "POPE": lambda count: yes_no_rows(count, ("random", "popular", "adversarial")),
    "TextVQA_VAL": vqa_rows,
}


def write(folder: Path, name: str, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tsv"
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
