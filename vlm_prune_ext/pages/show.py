"""One page about a sweep that needs no network: the figure, the table, and every row's answers.

Everything is in the file: Vega-Lite (BSD-3-Clause; the bundle that Altair's ``vl-convert`` brings),
the results as JSON, thumbnails, and what each setting kept of each picture. Texts of data sets and
models stay texts: they are never part of the page's markup or code.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_prune_ext import __version__
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.comparison import long_table
from vlm_prune_ext.experiment.log import write_whole
from vlm_prune_ext.experiment.pareto import COSTS, Point, points
from vlm_prune_ext.experiment.results import Results, RowAnswer, Run
from vlm_prune_ext.pages.patches import (
    Kept,
    as_seen,
    data_uri,
    framing,
    panels,
    side_of,
    veil,
)

PAGE = "index.html"
MAX_ROWS = 300
"""Rows of a data set that the page has."""
MAX_TEXT = 4000
"""Characters of an answer that it has."""
PICTURE_BYTES = 6 << 20
"""Of all pictures together; they get smaller, and some are left out, to stay below it."""
_SIDES = (288, 224, 160, 112)
SHOWN = (
    "method",
    "data",
    "score",
    "low",
    "high",
    "visual_tokens",
    "kept",
    "flops_ratio",
    "ttft_ms",
    "delta",
    "p_holm",
)
"""Columns of the table that are not hidden at first."""


def write_page(results: Results, path: Path | None = None) -> Path:
    """Write the page about a sweep.

    Args:
        results: of a sweep, done or under way.
        path: where to; ``None``: ``index.html`` in its folder.

    Returns:
        where it is.

    Raises:
        InputError: nowhere to write, or the extra ``show`` is missing.
    """
    target = path or results.folder / PAGE
    write_whole(target, page(results, library()))
    return target


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script.

    Raises:
        InputError: the package that brings it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(
            "The page needs Vega-Lite: pip install 'vlm-prune-ext[show]' brings it; "
            "--format md csv tex json png pdf does without."
        ) from error
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def page(results: Results, bundle: str) -> str:
    """The page as text."""
    found = json.dumps(content(results), separators=(",", ":"), allow_nan=False)
    return fill(
        "show.html",
        {
            "css": static("base.css") + static("show.css"),
            # Markup cannot begin inside: neither an end of the script, nor a comment.
            "data": found.replace("<", r"\u003c"),
            "library": re.sub(r"<(?=/script|!--|script)", r"\\x3c", bundle, flags=re.I),
            "js": static("base.js") + static("show.js"),
        },
    )


@cache
def static(name: str) -> str:
    """A file of ``static/``."""
    return (resources.files(__package__) / "static" / name).read_text("utf-8")


def fill(name: str, parts: Mapping[str, str]) -> str:
    """A file of ``static/`` with its ``{{ parts }}`` in place; what is put in is not looked at."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: parts[found[1]], static(name))


# -- what the page knows ---------------------------------------------------------------------------
def content(results: Results) -> dict[str, Any]:
    """All that the page shows, in plain values."""
    shelf = Shelf(results)
    return {
        "title": results.folder.resolve().name,
        "facts": _facts(results),
        "settings": [[str(k), _shown(v)] for k, v in results.settings.items() if v is not None],
        "costs": [{"name": c.name or "tokens", "label": c.label, "log": c.log} for c in COSTS],
        "methods": list(dict.fromkeys(run.method for run in results.runs)),
        "points": [_point(data, one) for data in results.data for one in points(results, data)],
        "table": _table(results),
        "data": [_rows(results, data, shelf) for data in results.data],
        "pictures": shelf.pictures,
        "veils": shelf.veils,
    }


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _facts(results: Results) -> list[str]:
    """What was run, on what, when."""
    records = [run.record for run in results.done if run.record is not None]
    hosts = [host for one in records for host in one.hardware]
    devices = dict.fromkeys(str(host.get("gpu") or host.get("cpu") or "") for host in hosts)
    versions = {k: v for one in records for k, v in one.versions.items()}
    told = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    count, whole = len(results.done), len(results.runs)
    return [
        f"{count} runs" if count == whole else f"{count} of {whole} runs",
        *(["model " + ", ".join(Path(model).name for model in results.models)]),
        *filter(None, devices),
        *told,
        f"vlm_prune_ext {__version__}",
        results.started[:10] or f"{datetime.date.today():%Y-%m-%d}",
    ]


def _point(data: str, point: Point) -> dict[str, Any]:
    """A mark of the figure."""
    run, record = point.runs[0], point.runs[0].record
    assert record is not None
    return {
        "data": data,
        "model": Path(run.model).name,
        "method": run.method,
        "setting": run.setting if len(point.runs) == 1 else f"{len(point.runs)} seeds",
        "score": _number(point.score),
        "low": _number(point.low),
        "high": _number(point.high),
        "rows": record.samples,
        "steps": record.token_steps,
        **{cost.name or "tokens": _number(point.costs.get(cost.name)) for cost in COSTS},
    }


def _number(value: Any) -> float | None:
    """A number that JSON has."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _table(results: Results) -> dict[str, Any]:
    """Every run, and every figure of it: values to sort by, and texts to read."""
    table = long_table(results)
    keys = table.keys()
    shown = list(SHOWN)
    if len(results.models) > 1:
        shown.insert(0, "model")
    if len(results.done) < len(results.runs):
        shown += ["status", "why"]
    order = [keys.index(key) for key in (*shown, *(key for key in keys if key not in shown))]
    order = [place for place in order if any(row[place] is not None for row in table.rows)]
    columns = [table.columns[place] for place in order]
    return {
        "columns": [
            {"name": one.name, "note": one.note, "left": one.left, "shown": keys[place] in shown}
            for one, place in zip(columns, order, strict=True)
        ],
        "rows": [
            [[_number(row[place]), str(cells[place])] for place in order]
            for row, cells in zip(table.rows, table.cells(), strict=True)
        ],
    }


# -- rows ------------------------------------------------------------------------------------------
def _rows(results: Results, data: str, shelf: Shelf) -> dict[str, Any]:
    """A data set's rows with the answers of every run; those on which runs disagree go first where
    there are too many."""
    runs = [run for run in results.done if run.data == data]
    questions = results.questions(data)
    asked = list(questions)
    if len(asked) > MAX_ROWS:
        said = {index: _disagree(runs, index) for index in asked}
        chosen = set(sorted(asked, key=lambda index: not said[index])[:MAX_ROWS])
        asked = [index for index in asked if index in chosen]
    rows = []
    for index in asked:
        one = questions[index]
        rows.append(
            {
                "index": index,
                "question": one.question[:MAX_TEXT],
                "hint": one.hint[:MAX_TEXT],
                "options": [[letter, text] for letter, text in one.options.items()],
                "answer": one.answer[:MAX_TEXT],
                "category": one.category,
                "pictures": [shelf.picture(path) for path in one.pictures],
                "answers": [
                    shelf.answer(run, run.answers[index]) if index in run.answers else None
                    for run in runs
                ],
            }
        )
    several = len(results.models) > 1
    names = [f"{Path(r.model).name} {r.setting}" if several else r.setting for r in runs]
    settings = [{"name": n, "method": r.method} for n, r in zip(names, runs, strict=True)]
    return {"name": data, "settings": settings, "total": len(questions), "rows": rows}


def _disagree(runs: Iterable[Run], index: str) -> bool:
    answers = [run.answers[index] for run in runs if index in run.answers]
    scores = {one.score for one in answers}
    return len(scores) > 1 or (scores == {None} and len({one.prediction for one in answers}) > 1)


class Shelf:
    """Pictures and veils of a page, each once.

    Args:
        results: whose rows name the pictures.
    """

    def __init__(self, results: Results) -> None:
        self.framings = [framing(model) for model in results.models]
        self.pictures: list[str] = []
        self.veils: list[str] = []
        self._places: dict[str, int] = {}
        self._square: set[str] = set()
        self._left = PICTURE_BYTES
        count = sum(min(MAX_ROWS, len(results.questions(data))) for data in results.data)
        # A JPEG of photographs has about a fifth of a byte a pixel, base64 a third more.
        fitting = (side for side in _SIDES if side * side * 0.3 * max(1, count) < PICTURE_BYTES)
        self._side = next(fitting, _SIDES[-1])

    def picture(self, path: str) -> int:
        """Place of a picture; -1: it is gone, cannot be read, or there is no room for it."""
        if path not in self._places:
            self._places[path] = self._take(path)
        return self._places[path]

    def _take(self, path: str) -> int:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except Exception:  # decoders raise whatever they like
            return -1
        if len(set(self.framings)) == 1 and (square := as_seen(image, self.framings[0])):
            image = square
        small = image.copy()
        small.thumbnail((self._side, self._side))
        text = data_uri(small, "jpeg", quality=80)
        if len(text) > self._left:
            return -1
        self._left -= len(text)
        self.pictures.append(text)
        return len(self.pictures) - 1

    def answer(self, run: Run, one: RowAnswer) -> dict[str, Any]:
        """What a run said to a row, and what it kept of the picture."""
        return {
            "text": one.prediction[:MAX_TEXT],
            "score": one.score,
            "failed": one.failed,
            "kept": list(one.sample.visual_kept.values())[-1:],
            "panels": self._panels(run, one),
        }

    def _panels(self, run: Run, one: RowAnswer) -> list[list[Any]]:
        side = side_of(one.visual_tokens)
        counts = {int(layer): count for layer, count in one.sample.visual_kept.items()}
        downsampled = run.method == "downsample" and counts
        if not side or not (one.kept or one.patches or downsampled):
            return []
        kept = Kept(
            run.method,
            one.visual_tokens,
            side,
            len(one.sample.lengths),
            counts,
            one.kept,
            one.patches,
        )
        found = []
        for panel in panels(kept)[1:]:
            over = veil(panel)
            found.append([panel.title, self._veil(data_uri(over, optimize=True) if over else "")])
        return found

    def _veil(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.veils)
            self.veils.append(text)
        return self._places[text]
