"""Files of an ablation: predictions as they come, and the tables at the end.

Whatever is written whole is the old file or the new one, never half of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.metrics import CAPTION, METRICS, everywhere
from vlm_prune_ext.jsonl import cut_unfinished, whole_lines


def metric_names() -> list[str]:
    """What captions are scored by, and the metrics that every command shows."""
    return [*CAPTION, *everywhere()]


# -- where everything is -------------------------------------------------------------------------
@dataclass(frozen=True)
class Folder:
    """The output folder of a study."""

    path: Path

    def log(self, name: str) -> Path:
        """What the process of a run printed."""
        return self.path / "logs" / f"{name}.log"

    def job(self, name: str) -> Path:
        """What the process of a run is to do."""
        return self.path / "logs" / f"{name}.job.json"

    def result(self, name: str) -> Path:
        """How the process of a run ended."""
        return self.path / "logs" / f"{name}.result.json"

    def lines(self, name: str) -> Path:
        """Predictions as they come."""
        return self.path / f"{name}_predictions.jsonl"

    def predictions(self, name: str) -> Path:
        """Predictions beside references."""
        return self.path / f"{name}_predictions.csv"

    def metrics(self, name: str) -> Path:
        """Scores of a finished run."""
        return self.path / f"{name}_metrics.json"

    @property
    def summary(self) -> Path:
        """All runs, failed ones too."""
        return self.path / "all_models_summary.json"

    @property
    def comparison(self) -> Path:
        """Finished runs, ranked."""
        return self.path / "comparison.csv"

    @property
    def chart(self) -> Path:
        """The same as bars."""
        return self.path / "comparison.png"

    def forget(self, name: str) -> None:
        """Remove what a run left."""
        for path in (self.lines(name), self.predictions(name), self.metrics(name)):
            path.unlink(missing_ok=True)

    def open(self) -> None:
        """Make it.

        Raises:
            InputError: it cannot be made or written.
        """
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path / "logs"):
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise InputError(
                f"--output-dir {str(self.path)!r} cannot be written ({error.strerror}): a folder "
                "that can be made or written is accepted."
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other studies out while this one writes.

        Raises:
            InputError: another one is writing.
        """
        import fcntl

        with (self.path / "logs" / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"--output-dir {str(self.path)!r} is in use by another run: wait for it, or "
                    "give another folder."
                ) from error
            yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by new content."""
    part = path.with_name(f".{path.name}.part")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# -- predictions ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prediction:
    """One answered (or failed) row.

    Attributes:
        index: of the row in the CSV.
        text: as the model gave it.
        failed: why there is none; ``None`` if all went well.
        seconds: its share of its batch, reading the picture included.
        warm_up: whether it was in the first batch of its process.
        batch: rows that were answered together.
        prompt_tokens, new_tokens, visual_tokens, visual_kept: see
            :class:`vlm_prune_ext.evals.answer.Answer`.
        peak_memory_bytes: of the process so far.
    """

    index: int
    text: str
    failed: str | None = None
    seconds: float = 0.0
    warm_up: bool = False
    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    visual_tokens: int = 0
    visual_kept: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int = 0


class Lines:
    """A JSONL file: what decides the predictions in its first line, then one row a line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start anew."""
        write_whole(self.path, json.dumps({"settings": settings}, ensure_ascii=False) + "\n")

    def repair(self) -> None:
        """Take away a line that a killed process left unfinished."""
        cut_unfinished(self.path)

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add rows at once."""
        lines = [json.dumps({"row": asdict(p)}, ensure_ascii=False) + "\n" for p in predictions]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def read(self) -> tuple[dict[str, Any] | None, dict[int, Prediction]]:
        """Settings (``None``: there is no such file, or it is of something else) and rows by
        index; of a row that failed and was asked again, the last line counts."""
        if not self.path.exists():
            return None, {}
        settings, rows = None, {}
        for line in whole_lines(self.path):
            try:
                entry = json.loads(line)
                if "settings" in entry:
                    settings = dict(entry["settings"])
                else:
                    row = Prediction(**entry["row"])
                    rows[row.index] = row
            except (ValueError, TypeError, KeyError):
                return None, {}
        return settings, rows


def predictions_csv(rows: Sequence[Mapping[str, Any]], references: int) -> str:
    """A table of predictions beside references.

    Args:
        rows: each with ``index``, ``image``, ``prompt``, ``prediction``, ``raw_prediction``,
            ``references`` and ``failed``.
        references: the most that a row has.
    """
    names = [f"reference_{i + 1}" for i in range(references)] if references > 1 else ["reference"]
    head = ["index", "image", "prompt", "prediction", *names, "raw_prediction", "failed"]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(head)
    for row in rows:
        given = [*row["references"], *[""] * (len(names) - len(row["references"]))]
        start = [row[key] for key in ("index", "image", "prompt", "prediction")]
        table.writerow([*start, *given, row["raw_prediction"], row["failed"] or ""])
    return out.getvalue()


# -- tables of all runs --------------------------------------------------------------------------
def ranked(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Metrics files, best BLEU-4 first; equals and those without one keep their order."""

    def key(record: Mapping[str, Any]) -> tuple[bool, float]:
        value = record["metrics"]["bleu4"]
        return value is None, -(value or 0.0)

    return sorted(records, key=key)


def comparison_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Finished runs ranked by BLEU-4; a metric that could not be had is empty."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    costs, names = ("num_samples", "seconds_per_sample", "peak_memory_gib"), metric_names()
    table.writerow(["rank", "model_name", "model_id", "method", *names, *costs])
    for rank, record in enumerate(ranked(records), 1):
        scores = [record["metrics"].get(name) for name in names]
        peak = record["peak_memory_bytes"]
        table.writerow(
            [
                rank,
                *(record[key] for key in ("model_name", "model_id", "method")),
                *("" if score is None else f"{score:.6f}" for score in scores),
                record["num_samples"],
                f"{record['seconds_per_sample']:.4f}",
                "" if peak is None else f"{peak / 2**30:.3f}",
            ]
        )
    return out.getvalue()


def chart_png(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Bars of every metric that there is, runs in the order of their BLEU-4."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = ranked(records)
    there = [
        name
        for name in metric_names()
        if any(record["metrics"].get(name) is not None for record in order)
    ] or [CAPTION[0]]
    height = 1.2 + 0.32 * max(len(order), 2)
    figure = Figure(figsize=(2.2 + 2.3 * len(there), height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(there), sharey=True, squeeze=False)[0]
    places = range(len(order))
    for panel, name in zip(panels, there, strict=True):
        values = [record["metrics"].get(name) for record in order]
        bars = panel.barh(places, [v or 0.0 for v in values], color="#4c78a8")
        panel.bar_label(bars, ["–" if v is None else f"{v:.3f}" for v in values], padding=2)
        panel.set_title(METRICS[name].title, fontsize=10)
        panel.set_xlim(0, 1.3 * max([v for v in values if v], default=1.0))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [record["model_name"] for record in order])
    panels[0].set_ylim(len(order) - 0.4, -0.6)  # the best on top
    out = io.BytesIO()
    canvas.print_figure(out, format="png", dpi=150)
    return out.getvalue()
