"""The whole ablation: one process a run, scores after each, one summary.

Nothing that is done is done twice: predictions are kept line by line, a finished run is left
alone, and the summary is written anew after every run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm_prune_ext.ablation.clean import clean
from vlm_prune_ext.ablation.console import LISTED, Console, clock, duration
from vlm_prune_ext.ablation.data import Data, Row
from vlm_prune_ext.ablation.files import (
    Folder,
    Lines,
    Prediction,
    chart_png,
    comparison_csv,
    metric_names,
    predictions_csv,
    read_object,
    write_json,
    write_whole,
)
from vlm_prune_ext.ablation.plan import Run
from vlm_prune_ext.ablation.worker import Job, RunFailed, why_failed
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import metrics
from vlm_prune_ext.experiment.coco import Tools
from vlm_prune_ext.experiment.measure import settled_memory, used_memory

DONE, FAILED, OPEN = "done", "failed", "open"
_GRACE = 5.0  # seconds that a process is given to end by itself


@dataclass(frozen=True)
class Options:
    """How runs are carried out.

    Attributes:
        batch_size, max_new_tokens: of ``generate``.
        prompt: as given on the command line, for messages.
        load: further arguments of :func:`vlm_prune_ext.load`.
        redo: names of runs that start anew.
        language: of what is printed.
    """

    batch_size: int = 2
    max_new_tokens: int = 64
    prompt: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    redo: frozenset[str] = frozenset()
    language: str = "en"


class Study:
    """An ablation.

    Args:
        runs: in order.
        data: what is described.
        folder: where everything goes.
        options: how.

    Raises:
        InputError: the folder cannot be written, or holds predictions that were made with other
            settings (nothing is run then).
    """

    def __init__(self, runs: Sequence[Run], data: Data, folder: Folder, options: Options) -> None:
        self.runs, self.data, self.folder, self.options = list(runs), data, folder, options
        self.console = Console(options.language)
        self.entries: dict[str, dict[str, Any]] = {}
        self._digests = data.digests()
        self._started = time.time()
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
            "dtype": self.options.load.get("dtype"),
            "rows": len(self.data.rows),
            **self._digests,
        }

    def _check_same(self, run: Run) -> None:
        if run.name in self.options.redo:
            return
        before, rows = Lines(self.folder.lines(run.name)).read()
        record = read_object(self.folder.metrics(run.name))
        if record is not None:
            before = record.get("settings")
        elif not rows:
            return
        now = self.settings(run)
        if before is None:
            raise InputError(
                f"{str(self.folder.path)!r} has files of {run.name!r} that are not of this "
                f"command: another --output-dir or --rerun {run.name} is accepted."
            )
        for key, value in now.items():
            if before.get(key) != value:
                raise InputError(
                    f"{run.name!r} in {str(self.folder.path)!r} was made with {key}="
                    f"{before.get(key)!r}, now it is {value!r}: the same settings and data, "
                    f"another --output-dir, or --rerun {run.name} is accepted."
                )

    # -- all runs --------------------------------------------------------------------------------
    def carry_out(self) -> int:
        """Go through all runs.

        Returns:
            0, or 1 where a run or a row of one failed.
        """
        with self.folder.lock(), Tools(self.folder.path / "logs" / "scoring.log") as tools:
            self._open_banner()
            try:
                for number, run in enumerate(self.runs, 1):
                    self._carry_out(f"[{number}/{len(self.runs)}]", run, tools)
                    self._write_tables()
            except BaseException:
                self._write_tables()
                self.console.say(self.console.text("interrupted"))
                raise
            return self._close_banner()

    def _carry_out(self, place: str, run: Run, tools: Tools) -> None:
        say, text = self.console.say, self.console.text
        finished = self._finished(run)
        if finished is not None:
            self.entries[run.name] = self._entry(run, DONE, record=finished)
            say(f"\n✓ {place} {text('kept', name=run.name)}")
            self.console.metrics(finished)
            return
        start, started = time.monotonic(), stamp()
        try:
            record = self._run(place, run, tools, started)
        except Exception as error:  # whatever it is, the other runs go on
            spent = time.monotonic() - start
            log = self.folder.log(run.name)
            if not isinstance(error, RunFailed):
                with log.open("a", encoding="utf-8") as file:
                    traceback.print_exc(file=file)
            entry = self._entry(run, FAILED, reason=why_failed(error), log=log)
            self.entries[run.name] = {**entry, "started": started, "seconds": round(spent, 1)}
            said = text(
                "failed",
                name=run.name,
                time=clock(),
                seconds=duration(spent),
                reason=entry["reason"],
            )
            say(f"✗ {place} {said}")
            say(f"  {text('log', path=log)}")
            return
        self.entries[run.name] = self._entry(run, DONE, record=record)
        self.console.metrics(record)
        spent = time.monotonic() - start
        say(f"✓ {place} {text('done', name=run.name, time=clock(), seconds=duration(spent))}")

    def _finished(self, run: Run) -> dict[str, Any] | None:
        """The metrics file of a run that is not to be done again."""
        if run.name in self.options.redo:
            return None
        return read_object(self.folder.metrics(run.name))

    # -- one run ---------------------------------------------------------------------------------
    def _run(self, place: str, run: Run, tools: Tools, started: str) -> dict[str, Any]:
        lines = Lines(self.folder.lines(run.name))
        if run.name in self.options.redo:
            self.folder.forget(run.name)
        done = _answered(lines)
        if not done:
            lines.begin(self.settings(run))
        self.console.starts(place, run.name, done, len(self.data.rows))
        start = time.monotonic()
        before = used_memory()
        result = self._result_of(run, done) or self._process(run, done)
        after = settled_memory(before)
        predictions = lines.read()[1]
        missing = [row.index for row in self.data.rows if row.index not in predictions]
        if missing:
            raise RunFailed(f"its process ended without answers for {len(missing)} rows")
        record = self._record(run, predictions, result, tools)
        record |= {
            "gpu_memory": {"before": before, "after": after} if before and after else None,
            "started": started,
            "ended": stamp(),
            "seconds": round(time.monotonic() - start, 1),
        }
        write_json(self.folder.metrics(run.name), record)
        return record

    def _result_of(self, run: Run, done: int) -> dict[str, Any] | None:
        """What a process said that answered every row in an earlier study; ``None``: none did."""
        if done < len(self.data.rows):
            return None
        result = read_object(self.folder.result(run.name))
        return result if result and "reason" not in result else None

    def job(self, run: Run) -> Job:
        """What the process of a run is to do."""
        return Job(
            source=run.model.source,
            method=run.method,
            rows=self.data.rows,
            lines=str(self.folder.lines(run.name)),
            result=str(self.folder.result(run.name)),
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
            load=dict(self.options.load),
            parent=os.getpid(),
        )

    def _process(self, run: Run, done: int) -> dict[str, Any]:
        """Have a process of its own answer the rows; its result."""
        self.job(run).write(self.folder.job(run.name))
        self.folder.result(run.name).unlink(missing_ok=True)
        command = [sys.executable, "-m", f"{__package__}.worker", str(self.folder.job(run.name))]
        with self.folder.log(run.name).open("a", encoding="utf-8") as log:
            log.write(f"-- {stamp()}\n")
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        counter = _Counter(self.folder.lines(run.name))
        try:
            self.console.watch(
                run.name,
                done,
                len(self.data.rows),
                counter.rows,
                lambda: process.poll() is not None,
            )
        finally:
            _end(process)
        result = read_object(self.folder.result(run.name)) or {}
        if process.returncode or not result:
            raise RunFailed(result.get("reason") or _how_it_ended(process.returncode))
        return result

    def _record(
        self,
        run: Run,
        predictions: Mapping[int, Prediction],
        result: Mapping[str, Any],
        tools: Tools,
    ) -> dict[str, Any]:
        """Score a run, write its predictions beside the references; what its metrics file says."""
        table = [_table_row(row, predictions[row.index]) for row in self.data.rows]
        good = [row for row in table if row["failed"] is None]
        scored = metrics.Scored(
            [row["prediction"] for row in good], [row["references"] for row in good], tools
        )
        scores = metrics.evaluate(scored, metric_names())
        most = max(len(row["references"]) for row in table)
        write_whole(self.folder.predictions(run.name), predictions_csv(table, most))
        return {
            "model_name": run.name,
            "model_id": run.model.model_id,
            "num_samples": len(good),
            **_scores(scores),
            "method": run.label,
            **_costs([p for p in predictions.values() if p.failed is None]),
            "failed_rows": [
                {"index": row["index"], "reason": row["failed"]} for row in table if row["failed"]
            ],
            "skipped_rows": len(self.data.skipped),
            "batch_size": self.options.batch_size,
            "largest_batch": result["largest_batch"],
            "load_seconds": result["load_seconds"],
            "dtype": result["dtype"],
            "settings": self.settings(run),
            "versions": result["versions"],
            "commit": result["commit"],
            "hardware": result["hardware"],
        }

    # -- tables and banners ----------------------------------------------------------------------
    def _entry(
        self,
        run: Run,
        status: str,
        *,
        record: Mapping[str, Any] | None = None,
        reason: str | None = None,
        log: Path | None = None,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "model_name": run.name,
            "model_id": run.model.model_id,
            "method": run.label,
            "status": status,
            "reason": reason,
            "log": str(log) if log is not None else None,
        }
        return entry if record is None else {**entry, **record}

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
        write_json(self.folder.summary, summary)
        write_whole(self.folder.comparison, comparison_csv(done))
        if done:
            write_whole(self.folder.chart, chart_png(done))
        else:
            self.folder.chart.unlink(missing_ok=True)

    def _open_banner(self) -> None:
        console, text = self.console, self.console.text
        models = list(dict.fromkeys(run.model.name for run in self.runs))
        methods = list(dict.fromkeys(run.method for run in self.runs))
        columns = self.data.columns
        used = [columns.image, *([columns.prompt] if columns.prompt else []), *columns.references]
        skipped = self.data.skipped
        rows = text(
            "skipped" if skipped else "rows",
            path=self.data.path,
            rows=len(self.data.rows),
            skipped=len(skipped),
        )
        facts = [(text("models"), f"{len(models)} ({', '.join(models)})")]
        if methods != ["none"]:
            said = text("runs", methods=", ".join(methods), runs=len(self.runs))
            facts.append((text("methods"), said))
        facts += [
            (text("data"), rows),
            (text("columns"), ", ".join(used)),
            (text("output"), str(self.folder.path)),
            (text("batch"), str(self.options.batch_size)),
            (text("tokens"), str(self.options.max_new_tokens)),
        ]
        console.banner(text("title"), facts)
        for row in skipped[:LISTED]:
            said = text("row_skipped", index=row.index, image=row.image, reason=row.reason)
            console.say(said)
        if len(skipped) > LISTED:
            console.say(text("more_skipped", count=len(skipped) - LISTED))

    def _close_banner(self) -> int:
        text = self.console.text
        states = [entry["status"] for entry in self.entries.values()]
        done, failed = states.count(DONE), states.count(FAILED)
        facts = [
            (text("time"), duration(time.time() - self._started)),
            (text("result"), text("counts", done=f"{done}/{len(self.runs)}", failed=failed)),
            (text("files"), f"{self.folder.summary}, {self.folder.comparison}"),
        ]
        self.console.say()
        self.console.banner(text("end"), facts)
        for entry in self.entries.values():
            if entry["status"] == FAILED:
                self.console.say(f"✗ {entry['model_name']}: {entry['reason']}")
        rows_failed = any(entry.get("failed_rows") for entry in self.entries.values())
        return 1 if failed or rows_failed else 0


# -- parts of a run ------------------------------------------------------------------------------
class _Counter:
    """Counts the rows of a growing file, reading only what is new."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.count = path, 0, -1  # the first line has the settings

    def rows(self) -> int:
        with self.path.open("rb") as file:
            file.seek(self.place)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self.place += whole
        self.count += new[:whole].count(b"\n")
        return max(self.count, 0)


def _answered(lines: Lines) -> int:
    return sum(row.failed is None for row in lines.read()[1].values())


def _end(process: subprocess.Popen[Any]) -> None:
    """See to it that a process is gone."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(code: int) -> str:
    if code < 0:
        hint = " (often: main memory ran out)" if code == -9 else ""
        return f"its process was ended by signal {-code}{hint}"
    return f"its process ended with exit code {code}"


def _table_row(row: Row, prediction: Prediction) -> dict[str, Any]:
    return {
        "index": row.index,
        "image": row.image,
        "prompt": row.prompt,
        "prediction": clean(prediction.text, row.prompt),
        "raw_prediction": prediction.text,
        "references": row.references,
        "failed": prediction.failed,
    }


def _scores(scores: Mapping[str, metrics.Value]) -> dict[str, Any]:
    return {
        "metrics": {name: one.value for name, one in scores.items()},
        "missing": {name: one.reason for name, one in scores.items() if one.reason is not None},
        "raw": {name: one.raw for name, one in scores.items() if one.raw is not None},
        "bleu_signature": scores["bleu4"].signature,
    }


def _costs(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Time, memory and tokens; the first batch of a process only warms up."""
    warm = [p for p in predictions if not p.warm_up] or list(predictions)

    def mean(values: Sequence[float]) -> float:
        return round(statistics.fmean(values), 6) if values else 0.0

    layers = sorted({int(layer) for p in predictions for layer in p.visual_kept})
    kept = {
        str(layer): mean(
            [p.visual_kept[str(layer)] for p in predictions if str(layer) in p.visual_kept]
        )
        for layer in layers
    }
    return {
        "seconds_per_sample": mean([p.seconds for p in warm]),
        "peak_memory_bytes": max((p.peak_memory_bytes for p in predictions), default=None),
        "tokens": {
            "prompt_mean": mean([p.prompt_tokens for p in predictions]),
            "visual_mean": mean([p.visual_tokens for p in predictions]),
            "visual_kept_mean": kept,
            "new_mean": mean([p.new_tokens for p in predictions]),
            "new_total": sum(p.new_tokens for p in predictions),
        },
    }


def stamp(seconds: float | None = None) -> str:
    """Date and time with the zone, to the second."""
    moment = datetime.fromtimestamp(seconds) if seconds is not None else datetime.now()
    return moment.astimezone().isoformat(timespec="seconds")
