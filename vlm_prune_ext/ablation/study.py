"""The whole ablation: one process a run, scores after each, one summary.

Nothing that is done is done twice: predictions are kept line by line, a finished run is left
alone, and the summary is written anew after every run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm_prune_ext.ablation.captions import clean
from vlm_prune_ext.ablation.console import Console, duration
from vlm_prune_ext.ablation.plan import AblationSettings, Run
from vlm_prune_ext.ablation.worker import Folder, Lines, Work, make_job
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.examples import Data, Example
from vlm_prune_ext.experiment import grid, metrics
from vlm_prune_ext.experiment.coco import Tools
from vlm_prune_ext.experiment.log import Log, lock, read_json, write_json, write_whole
from vlm_prune_ext.experiment.measure import settled_memory, used_memory
from vlm_prune_ext.experiment.metrics import CAPTION, METRICS, metric_names
from vlm_prune_ext.experiment.record import Sample, changed
from vlm_prune_ext.experiment.report import Figure, Table, bar_plot, csv_text, write_table

DONE, FAILED, OPEN = grid.DONE, grid.FAILED, "open"
Record = Mapping[str, Any]
"""What a run's metrics file says."""
SUMMARY = "all_models_summary.json"
PROCESSES = True  # false: runs are done in this process, which saves starting one


class Study:
    """An ablation.

    Args:
        runs: in order.
        data: what is described.
        folder: where everything goes.
        options: how.
        redo: names of runs that start anew.

    Raises:
        InputError: the folder cannot be written, or holds predictions that were made with other
            settings (nothing is run then).
    """

    def __init__(
        self,
        runs: Sequence[Run],
        data: Data,
        folder: Folder,
        options: AblationSettings,
        redo: frozenset[str],
    ) -> None:
        self.runs, self.data, self.folder, self.options = list(runs), data, folder, options
        self.redo, self.load = redo, options.load()
        self.console = Console(options.lang)
        self.entries: dict[str, dict[str, Any]] = {}
        self._digests = data.digests()
        self._started = time.time()
        self._began: dict[str, tuple[str, float]] = {}
        self._memory: dict[str, int] | None = None
        folder.open()
        for run in self.runs:
            self._check_same(run)

    # -- before anything runs --------------------------------------------------------------------
    def settings(self, run: Run) -> dict[str, Any]:
        """What decides a run's predictions and scores, as kept beside them."""
        return {
            "model_id": run.model.model_id,
            "checkpoint": run.model.fingerprint,
            "method": run.label,
            "max_new_tokens": self.options.max_new_tokens,
            "prompt": self.options.prompt,
            "dtype": self.options.dtype,
            "rows": len(self.data.rows),
            **{name: value for name, value in self.load.items() if name.endswith("_pixels")},
            **self._digests,
        }

    def _check_same(self, run: Run) -> None:
        if run.name in self.redo:
            return
        lines, record = Lines(self.folder.of(run.name, "lines")), self._record_of(run)
        before = lines.settings() if record is None else record.get("settings")
        if record is None and not lines.rows():
            return
        where = f"{run.name!r} in {str(self.folder.path)!r}"
        accepted = f"another --output-dir, or --rerun {run.name} is accepted."
        if before is None:
            raise InputError(f"{where} has files that are not of this command: {accepted}")
        if other := changed(before, self.settings(run)):
            what = other[0].replace(", now ", ", now it is ")
            raise InputError(
                f"{where} was made with {what}: the same settings and data, {accepted}"
            )

    def _record_of(self, run: Run) -> dict[str, Any] | None:
        """What the metrics file of a finished run says."""
        found = read_json(self.folder.of(run.name, "metrics"))
        return found if isinstance(found, dict) else None

    # -- all runs --------------------------------------------------------------------------------
    def carry_out(self) -> int:
        """Go through all runs.

        Returns:
            0, or 1 where a run or a row of one failed.
        """
        with lock(self.folder.logs), Tools(self.folder.logs / "scoring.log") as tools:
            sizes = {"batch": self.options.batch_size, "tokens": self.options.max_new_tokens}
            self.console.opens(self.runs, self.data, self.folder.path, sizes)
            try:
                self._carry_out(tools)
            except BaseException:
                self._write_tables()
                self.console.say(self.console.text("interrupted"))
                raise
            return self._close_banner()

    def _carry_out(self, tools: Tools) -> None:
        by_name = {run.name: run for run in self.runs}
        cells = [cell for run in self.runs if (cell := self._prepare(run, tools)) is not None]
        work = Work(
            self.folder,
            self.data.rows,
            self.options.batch_size,
            self.options.max_new_tokens,
            self.load,
            tuple(self.options.device),
        )
        workers = max(len(self.options.device), 1) if PROCESSES else 0
        lines = grid.run(
            cells,
            make_job,
            (work,),
            workers=workers,
            retries=0,
            output=self.folder.logs if PROCESSES else None,
            fresh=True,
            watch=self._watch,
        )
        for line in lines:
            self.console.rests()
            self._end(by_name[line.cell["name"]], line, tools)
            self._write_tables()

    def _prepare(self, run: Run, tools: Tools) -> grid.Cell | None:
        """What is to be done for a run; ``None``: nothing, it is finished."""
        if run.name in self.redo:
            self.folder.put_aside(run.name)
        elif (record := self._record_of(run)) is not None:
            self.entries[run.name] = self._entry(run, DONE, record=record)
            self.console.say(f"\n✓ {self._place(run)} {self.console.text('kept', name=run.name)}")
            self.console.metrics(record)
            return None
        lines = Lines(self.folder.of(run.name, "lines"))
        answered = lines.answered()
        if not lines.rows():
            lines.begin(self.settings(run))
        own = {"name": run.name, "source": run.model.source, "asked": run.method}
        cell = grid.Cell({**self.settings(run), **own}, run.model.name, run.name)
        result = read_json(self.folder.of(run.name, "result"))
        if len(answered) == len(self.data.rows) and isinstance(result, dict):
            # Every row was answered in an earlier study, which ended before they were scored.
            self._began[run.name] = (stamp(), time.monotonic())
            self._end(run, grid.line_of(cell, DONE, result=result), tools)
            return None
        self.folder.of(run.name, "result").unlink(missing_ok=True)
        return cell

    def _place(self, run: Run) -> str:
        return f"[{self.runs.index(run) + 1}/{len(self.runs)}]"

    def _watch(self, cells: Sequence[grid.Cell]) -> None:
        """Say which runs begin, and show how far they are."""
        for cell in cells:
            name = cell.settings["name"]
            if name not in self._began:
                if len(self._began) == 0:
                    self._memory = used_memory()
                self._began[name] = (stamp(), time.monotonic())
                run = next(run for run in self.runs if run.name == name)
                lines = Lines(self.folder.of(name, "lines"))
                self.console.starts(self._place(run), name, lines, len(self.data.rows))
        self.console.shows([cell.settings["name"] for cell in cells])

    def _end(self, run: Run, line: grid.Line, tools: Tools) -> None:
        """Score a run that is through, or say why it failed."""
        started, start = self._began[run.name]
        why, record = line.why, None
        if why is None:
            try:
                record = self._record(run, dict(line.result or {}), started, start, tools)
            except Exception as error:  # whatever it is, the other runs go on
                why = str(error) or type(error).__name__
        status = FAILED if why is not None else DONE
        ended = replace(line, status=status, result=record, why=why)
        Log(self.folder.path / "runs.jsonl").append(vars(ended))
        say, text, spent = self.console.say, self.console.text, time.monotonic() - start
        facts = {"name": run.name, "time": time.strftime("%H:%M:%S"), "seconds": duration(spent)}
        if record is not None:
            self.entries[run.name] = self._entry(run, DONE, record=record)
            self.console.metrics(record)
            say(f"✓ {self._place(run)} {text('done', **facts)}")
            return
        log = self.folder.of(run.name, "log")
        entry = self._entry(run, FAILED, reason=why, log=str(log))
        self.entries[run.name] = {**entry, "started": started, "seconds": round(spent, 1)}
        say(f"✗ {self._place(run)} {text('failed', reason=why, **facts)}")
        say(f"  {text('log', path=log)}")

    def _record(
        self, run: Run, result: Mapping[str, Any], started: str, start: float, tools: Tools
    ) -> dict[str, Any]:
        """Score a run, write its predictions beside the references; what its metrics file says."""
        samples = Lines(self.folder.of(run.name, "lines")).rows()
        missing = [row.index for row in self.data.rows if row.index not in samples]
        if missing:
            raise InputError(f"its process ended without answers for {len(missing)} rows")
        table = [_table_row(row, samples[row.index]) for row in self.data.rows]
        good = [row for row in table if row["failed"] is None]
        cleaned = [replace(samples[r["index"]], prediction=r["prediction"]) for r in good]
        scored = metrics.Scored(cleaned, [row["references"] for row in good], tools)
        most = max(len(row["references"]) for row in table)
        write_whole(self.folder.of(run.name, "predictions"), predictions_csv(table, most))
        after = settled_memory(self._memory) if len(self.options.device) < 2 else None
        before = self._memory
        record = {
            "model_name": run.name,
            "model_id": run.model.model_id,
            "num_samples": len(good),
            **_scores(metrics.evaluate(scored, metric_names())),
            "method": run.label,
            **_costs(cleaned, result),
            "failed_rows": [
                {"index": row["index"], "reason": row["failed"]} for row in table if row["failed"]
            ],
            "skipped_rows": len(self.data.skipped),
            "batch_size": self.options.batch_size,
            **{key: result[key] for key in ("largest_batch", "load_seconds", "dtype")},
            "settings": self.settings(run),
            **{key: result[key] for key in ("versions", "commit", "hardware")},
            "gpu_memory": {"before": before, "after": after} if before and after else None,
            "started": started,
            "ended": stamp(),
            "seconds": round(time.monotonic() - start, 1),
        }
        write_json(self.folder.of(run.name, "metrics"), record)
        return record

    # -- tables ----------------------------------------------------------------------------------
    def _entry(
        self,
        run: Run,
        status: str,
        *,
        record: Mapping[str, Any] | None = None,
        reason: str | None = None,
        log: str | None = None,
    ) -> dict[str, Any]:
        entry = {
            "model_name": run.name,
            "model_id": run.model.model_id,
            "method": run.label,
            "status": status,
            "reason": reason,
            "log": log,
        }
        return {**entry, **(record or {})}

    def _write_tables(self) -> None:
        entries = [
            self.entries.get(run.name) or self._entry(run, OPEN, reason="not run yet")
            for run in self.runs
        ]
        done = [entry for entry in entries if entry["status"] == DONE]
        summary = {
            "data": str(self.data.path),
            "columns": asdict(self.data.columns),
            "num_rows": len(self.data.rows),
            "skipped_rows": [asdict(row) for row in self.data.skipped],
            "batch_size": self.options.batch_size,
            "max_new_tokens": self.options.max_new_tokens,
            "prompt": self.options.prompt,
            "started": stamp(self._started),
            "ended": stamp(),
            "seconds": round(time.time() - self._started, 1),
            "done": len(done),
            "failed": sum(entry["status"] == FAILED for entry in entries),
            "models": entries,
        }
        write_json(self.folder.path / SUMMARY, summary)
        write_comparison(self.folder.path, done)

    def _close_banner(self) -> int:
        self._write_tables()
        entries = list(self.entries.values())
        failed = [entry for entry in entries if entry["status"] == FAILED]
        done = f"{len(entries) - len(failed)}/{len(self.runs)}"
        files = ", ".join(str(self.folder.path / name) for name in (SUMMARY, "comparison.csv"))
        self.console.closes(time.time() - self._started, done, len(failed), files)
        for entry in failed:
            self.console.say(f"✗ {entry['model_name']}: {entry['reason']}")
        return 1 if failed or any(entry.get("failed_rows") for entry in entries) else 0


# -- parts of a run ------------------------------------------------------------------------------
def _table_row(row: Example, sample: Sample) -> dict[str, Any]:
    return {
        "index": row.index,
        "image": row.image,
        "prompt": row.prompt,
        "prediction": clean(sample.prediction, row.prompt),
        "raw_prediction": sample.prediction,
        "references": row.references,
        "failed": sample.failed,
    }


def _scores(scores: Mapping[str, metrics.Value]) -> dict[str, Any]:
    return {
        "metrics": {name: one.value for name, one in scores.items()},
        "missing": {name: one.reason for name, one in scores.items() if one.reason is not None},
        "raw": {name: one.raw for name, one in scores.items() if one.raw is not None},
        "bleu_signature": scores["bleu4"].signature,
    }


def _costs(samples: Sequence[Sample], result: Mapping[str, Any]) -> dict[str, Any]:
    """Time, memory and tokens; the first batch of a process only warms up."""
    warm = [sample for sample in samples if not sample.warm_up] or list(samples)

    def mean(values: Sequence[float]) -> float:
        return round(statistics.fmean(values), 6) if values else 0.0

    layers = sorted({int(layer) for sample in samples for layer in sample.visual_kept})
    kept = {
        str(layer): mean(
            [s.visual_kept[str(layer)] for s in samples if str(layer) in s.visual_kept]
        )
        for layer in layers
    }
    return {
        "seconds_per_sample": mean([sample.seconds for sample in warm]),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "tokens": {
            "prompt_mean": mean([sample.prompt_tokens for sample in samples]),
            "visual_mean": mean([sample.visual_tokens for sample in samples]),
            "visual_kept_mean": kept,
            "new_mean": mean([sample.new_tokens for sample in samples]),
            "new_total": sum(sample.new_tokens for sample in samples),
        },
    }


def stamp(seconds: float | None = None) -> str:
    """Date and time with the zone, to the second."""
    moment = datetime.fromtimestamp(seconds) if seconds is not None else datetime.now()
    return moment.astimezone().isoformat(timespec="seconds")


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
    places = [{**record, "rank": rank} for rank, record in enumerate(ranked(records), 1)]
    return Table.of(columns, places, title="Captioning ablation")


def write_comparison(folder: Path, records: Sequence[Record]) -> None:
    """Write the table in every form; bars too where a run is finished."""
    write_table(folder, "comparison", comparison(records), ("csv", "md", "html"))
    chart = folder / "comparison.png"
    if records:
        draw(records, chart)
    else:
        chart.unlink(missing_ok=True)


def draw(records: Sequence[Record], path: Path) -> None:
    """Bars of every metric that there is, runs in the order of their BLEU-4."""
    order = ranked(records)
    values = {name: [one["metrics"].get(name) for one in order] for name in metric_names()}
    there = [n for n in values if any(value is not None for value in values[n])] or CAPTION[:1]
    panels = {METRICS[name].title: values[name] for name in there}
    bar_plot(panels, [record["model_name"] for record in order], path)
