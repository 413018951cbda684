"""Files of an ablation: where they are, predictions as they come, and the tables at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import put_aside, write_whole
from vlm_prune_ext.experiment.metrics import CAPTION, METRICS, everywhere
from vlm_prune_ext.experiment.record import Sample as Sample
from vlm_prune_ext.experiment.record import SampleLog
from vlm_prune_ext.experiment.report import Figure, Table, bar_plot, csv_text, write_table

Record = Mapping[str, Any]
"""What a run's metrics file says."""


# -- where everything is -------------------------------------------------------------------------
@dataclass(frozen=True)
class Folder:
    """The output folder of a study."""

    path: Path

    @property
    def logs(self) -> Path:
        """What processes printed."""
        return self.path / "logs"

    def log(self, name: str) -> Path:
        """What the process of a run printed."""
        return self.logs / f"{name}.log"

    def result(self, name: str) -> Path:
        """How the process of a run ended."""
        return self.logs / f"{name}.result.json"

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
    def ended(self) -> Path:
        """The log: a line for each run that came to its end, with its record."""
        return self.path / "runs.jsonl"

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

    def put_aside(self, name: str) -> None:
        """Move what a run left into ``previous``, or ``previous-2`` and so on: nothing is lost."""
        put_aside(self.path, [self.lines(name), self.predictions(name), self.metrics(name)])

    def open(self) -> None:
        """Make it.

        Raises:
            InputError: it cannot be made or written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.logs):
                write_whole(folder / ".written", "")
                (folder / ".written").unlink()
        except (OSError, InputError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"--output-dir {str(self.path)!r} cannot be written ({why}): a folder that can be "
                "made or written is accepted."
            ) from error


class Lines(SampleLog):
    """Predictions of a run, under what decides them."""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start anew."""
        self.replace([{"settings": settings}])

    def settings(self) -> dict[str, Any] | None:
        """What decides them; ``None``: there is no such file, or it is of something else."""
        found = [entry["settings"] for entry in self.read() if "settings" in entry]
        return dict(found[-1]) if found and isinstance(found[-1], dict) else None

    def rows(self) -> dict[int, Sample]:
        """By index; of a row that failed and was asked again, the last line counts."""
        return {int(sample.index): sample for sample in self.samples()[0]}

    def answered(self) -> set[int]:
        """Rows that need not be asked again."""
        return {index for index, sample in self.rows().items() if sample.failed is None}


# -- tables --------------------------------------------------------------------------------------
def predictions_csv(rows: Sequence[Mapping[str, Any]], references: int) -> str:
    """A table of predictions beside references.

    Args:
        rows: each with ``index``, ``image``, ``prompt``, ``prediction``, ``raw_prediction``,
            ``references`` and ``failed``.
        references: the most that a row has.
    """
    names = [f"reference_{i + 1}" for i in range(references)] if references > 1 else ["reference"]
    table = [["index", "image", "prompt", "prediction", *names, "raw_prediction", "failed"]]
    for row in rows:
        given = [*row["references"], *[""] * (len(names) - len(row["references"]))]
        start = [row[key] for key in ("index", "image", "prompt", "prediction")]
        table.append([*start, *given, row["raw_prediction"], row["failed"] or ""])
    return csv_text(table)


def metric_names() -> list[str]:
    """What captions are scored by, and the metrics that every command shows."""
    return [*CAPTION, *everywhere()]


def ranked(records: Sequence[Record]) -> list[Record]:
    """Metrics files, best BLEU-4 first; equals and those without one keep their order."""

    def key(record: Record) -> tuple[bool, float]:
        value = record["metrics"]["bleu4"]
        return value is None, -(value or 0.0)

    return sorted(records, key=key)


def comparison(records: Sequence[Record]) -> Table:
    """Finished runs ranked by BLEU-4; a metric that could not be had is empty."""
    shown = (METRICS[name] for name in metric_names())
    columns = [
        Figure("rank", 0, path="rank"),
        Figure("model", left=True, key="model_name", path="model_name"),
        Figure("checkpoint", left=True, key="model_id", path="model_id"),
        Figure("method", left=True, path="method"),
        *(Figure(m.title, m.digits, m.help, key=m.name, path=f"metrics.{m.name}") for m in shown),
        Figure("rows", 0, key="num_samples", path="num_samples"),
        Figure("s/row", 3, key="seconds_per_sample", path="seconds_per_sample"),
        Figure("peak GiB", 2, key="peak_memory_gib", path="peak_memory_bytes", scale=2**-30),
    ]
    made = Table(columns, title="Captioning ablation")
    for rank, record in enumerate(ranked(records), 1):
        made.rows.append([column.of({**record, "rank": rank}) for column in columns])
    return made


def write_comparison(folder: Folder, records: Sequence[Record]) -> None:
    """Write the table in every form; bars too where a run is finished."""
    write_table(folder.path, "comparison", comparison(records), ("csv", "md", "html"))
    if records:
        draw(records, folder.chart)
    else:
        folder.chart.unlink(missing_ok=True)


def draw(records: Sequence[Record], path: Path) -> None:
    """Bars of every metric that there is, runs in the order of their BLEU-4."""
    order = ranked(records)
    values = {name: [one["metrics"].get(name) for one in order] for name in metric_names()}
    there = [n for n in values if any(value is not None for value in values[n])] or CAPTION[:1]
    panels = {METRICS[name].title: values[name] for name in there}
    bar_plot(panels, [record["model_name"] for record in order], path)
