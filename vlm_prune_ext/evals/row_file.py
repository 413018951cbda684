"""What a page about a run needs of each row: how it was scored, what was asked, where its picture
is. One line a row, beside the record; the answer itself is in the log."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from vlmeval.smp import load

from vlm_prune_ext.experiment.log import Log

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
            found = {_key(index): _share(score) for index, score in pairs}
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
        "index": _key(row["index"]),
        **{name: str(text) for name, text in texts.items() if _is_there(text)},
        "options": {n: str(text) for n, text in options.items() if _is_there(text)},
        "pictures": pictures,
    }


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and pd.isna(value))


def _key(index: Any) -> str:
    return index if isinstance(index, str) else str(int(index))


def _share(value: Any) -> float | None:
    try:
        return float(json.loads(str(value).lower()))
    except (ValueError, TypeError):
        return None
