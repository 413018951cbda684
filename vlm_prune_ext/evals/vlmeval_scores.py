"""VLMEvalKit's scores, without a judge model."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from vlm_prune_ext.errors import reason_of
from vlm_prune_ext.evals.vlmeval_files import own_files
from vlm_prune_ext.evals.vlmeval_store import Files
from vlm_prune_ext.experiment.record import Score


def score(files: Files, dataset: Any) -> tuple[dict[str, float], str | None]:
    """VLMEvalKit's scores, flat, without a judge model; and a note if it has none."""
    for path in files.scoring_files():  # of other predictions
        path.unlink()
    try:
        with own_files():
            result = dataset.evaluate(str(files.predictions), model="exact_matching")
    except Exception as error:  # data sets fail in many ways without a judge
        return {}, (
            f"VLMEvalKit cannot score {files.dataset} by exact matching ({reason_of(error)}); the "
            f"predictions are in {files.predictions.name}."
        )
    return flatten(result), None


def flatten(result: Any) -> dict[str, float]:
    """Numbers of what ``evaluate`` returned, by name.

    Columns of text name the rows of a table: ``random/acc``. The only row, and rows called
    ``none`` or ``Overall``, need no name.
    """
    if isinstance(result, pd.DataFrame):
        text = [c for c in result if result[c].dtype.kind not in "iufb"]
        flat: dict[str, float] = {}
        for _, row in result.iterrows():
            names = [str(row[c]) for c in text if str(row[c]) not in ("none", "Overall", "nan")]
            start = "/".join(names) + "/" if names and len(result) > 1 else ""
            flat |= {f"{start}{c}": float(row[c]) for c in result if c not in text}
        return flat
    flat = {}
    for key, value in (result or {}).items():
        if isinstance(value, list | tuple):
            flat |= {f"{key}_{i}": float(v) for i, v in enumerate(value, 1)}
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": v for name, v in flatten(value).items()}
        elif isinstance(value, int | float):
            flat[str(key)] = float(value)
    return flat


def headline(dataset: Any, name: str, scores: dict[str, float], count: int) -> Score | None:
    """The score that a data set is known by."""
    if {"perception", "reasoning"} <= set(scores):
        return Score("perception + reasoning", scores["perception"] + scores["reasoning"])
    if getattr(dataset, "TYPE", "") == "Caption":
        known = "Bleu_4" if name.startswith("Shapes_") else "CIDEr"
        return Score(known, scores[known]) if known in scores else None
    key = "Overall" if "Overall" in scores else next((k for k in scores if _overall(k)), None)
    if key is None or math.isnan(scores[key]):
        return None
    value = scores[key]
    is_choice = getattr(dataset, "TYPE", "") == "MCQ"
    if is_choice and value <= 1.0:  # VLMEvalKit gives shares for these, percent for others
        value *= 100.0
    single = name.startswith("Shapes_") or (is_choice and "mmbench" not in name.lower())
    return Score(key, value, share_error(value, count) if single and count else None)


def share_error(percent: float, count: int) -> float:
    """Standard error of a share in percent, after Agresti and Coull: not 0 if all are right."""
    share = (percent / 100.0 * count + 2.0) / (count + 4.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / (count + 4.0))


def _overall(key: str) -> bool:
    return bool(re.search(r"overall|(^|/)acc(uracy)?$", key, re.IGNORECASE))
