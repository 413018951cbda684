"""What a study prints while it runs: banners, one line at start and end of a run, a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.ablation.plan import LANGUAGES
from vlm_prune_ext.experiment.metrics import METRICS, metric_names
from vlm_prune_ext.experiment.report import bars, terminal_text

if TYPE_CHECKING:
    from vlm_prune_ext.ablation.plan import Run
    from vlm_prune_ext.ablation.worker import Lines
    from vlm_prune_ext.evals.examples import Data

# -- texts, in English and Korean ------------------------------------------------------------
TEXTS: dict[str, tuple[str, str]] = {
    "title": ("VLM captioning ablation", "VLM 캡셔닝 절제 실험"),
    "models": ("models", "모델"),
    "runs": ("{methods} ({runs} runs)", "{methods} (실행 {runs}개)"),
    "methods": ("methods", "방법"),
    "data": ("data", "데이터"),
    "rows": ("{path}, {rows} rows", "{path}, {rows}개 행"),
    "skipped": (
        "{path}, {rows} rows ({skipped} skipped)",
        "{path}, {rows}개 행 ({skipped}개 건너뜀)",
    ),
    "columns": ("columns", "열"),
    "output": ("output", "출력 폴더"),
    "batch": ("batch size", "배치 크기"),
    "tokens": ("new tokens", "최대 생성 토큰"),
    "row_skipped": (
        "row {index} skipped: {image!r}: {reason}",
        "{index}번 행 건너뜀: {image!r}: {reason}",
    ),
    "more_skipped": ("... and {count} more rows", "... 외 {count}개 행"),
    "starts": ("{name} starts at {time}", "{name} 시작 {time}"),
    "known": ("{done} of {rows} rows are there already", "{rows}개 행 중 {done}개는 이미 있음"),
    "kept": ("{name} was finished before", "{name} 이미 완료됨"),
    "done": ("{name} done at {time} ({seconds})", "{name} 완료 {time} ({seconds})"),
    "failed": (
        "{name} failed at {time} ({seconds}): {reason}",
        "{name} 실패 {time} ({seconds}): {reason}",
    ),
    "log": ("log: {path}", "로그: {path}"),
    "rows_failed": ("rows without an answer: {count}", "답을 얻지 못한 행: {count}개"),
    "missing": ("{metric} is missing: {reason}", "{metric} 없음: {reason}"),
    "per_sample": (
        "{seconds:.3f} s per sample, peak memory {peak}",
        "샘플당 {seconds:.3f}초, 최대 메모리 {peak}",
    ),
    "gpu": (
        "GPU memory in use before and after: {before} and {after}",
        "GPU 메모리 사용량 전/후: {before} / {after}",
    ),
    "left": (
        "{name}: {done} of {rows}, {left} left",
        "{name}: {rows}개 중 {done}개, 남은 시간 {left}",
    ),
    "end": ("finished", "전체 완료"),
    "interrupted": (
        "interrupted: the same command goes on from here",
        "중단됨: 같은 명령으로 이어서 실행",
    ),
    "time": ("total time", "총 시간"),
    "counts": ("done {done}, failed {failed}", "완료 {done}, 실패 {failed}"),
    "result": ("result", "결과"),
    "files": ("files", "파일"),
}


# -- printing ------------------------------------------------------------------------------------
WIDTH = 78
LISTED = 20
"""Skipped rows that are listed one by one."""
_PLAIN_PERIOD = 30.0  # seconds between lines of progress where there is no terminal


class Console:
    """Prints to standard output; progress goes to standard error.

    Args:
        language: one of :data:`LANGUAGES`.
    """

    def __init__(self, language: str = "en") -> None:
        self._language = LANGUAGES.index(language)
        self._runs: dict[str, _Run] = {}
        self._bars: Any = None
        self._last = time.monotonic()

    def text(self, key: str, **values: object) -> str:
        """A text with its values filled in."""
        return TEXTS[key][self._language].format(**values)

    # -- lines -----------------------------------------------------------------------------------
    def say(self, line: str = "") -> None:
        """Print a line, whatever the terminal's encoding can show of it."""
        encoding = sys.stdout.encoding or "utf-8"
        shown = "\n".join(map(terminal_text, line.split("\n")))
        print(shown.encode(encoding, "replace").decode(encoding), flush=True)

    def banner(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """A title and facts under it, between two rules."""
        self.say("=" * WIDTH)
        self.say(title)
        for name, value in facts:
            self.say(f"  {name}: {value}")
        self.say("=" * WIDTH)

    def opens(
        self, runs: Sequence[Run], data: Data, folder: Path, sizes: Mapping[str, int]
    ) -> None:
        """What is going to be done; ``sizes``: key of a text -> number."""
        text, columns, skipped = self.text, data.columns, data.skipped
        models = list(dict.fromkeys(run.model.name for run in runs))
        methods = list(dict.fromkeys(run.method for run in runs))
        used = [columns.image, *([columns.prompt] if columns.prompt else []), *columns.references]
        rows = text(
            "skipped" if skipped else "rows",
            path=data.path,
            rows=len(data.rows),
            skipped=len(skipped),
        )
        facts = [(text("models"), f"{len(models)} ({', '.join(models)})")]
        if methods != ["none"]:
            said = text("runs", methods=", ".join(methods), runs=len(runs))
            facts.append((text("methods"), said))
        facts += [
            (text("data"), rows),
            (text("columns"), ", ".join(used)),
            (text("output"), str(folder)),
            *((text(name), str(size)) for name, size in sizes.items()),
        ]
        self.banner(text("title"), facts)
        for row in skipped[:LISTED]:
            self.say(text("row_skipped", index=row.index, image=row.image, reason=row.reason))
        if len(skipped) > LISTED:
            self.say(text("more_skipped", count=len(skipped) - LISTED))

    def closes(self, seconds: float, done: str, failed: int, files: str) -> None:
        """What came of it."""
        text = self.text
        facts = [
            (text("time"), duration(seconds)),
            (text("result"), text("counts", done=done, failed=failed)),
            (text("files"), files),
        ]
        self.say()
        self.banner(text("end"), facts)

    def starts(self, place: str, name: str, lines: Lines, rows: int) -> None:
        """A run starts; some of its rows may be there."""
        known = len(lines.answered())
        self._runs[name] = _Run(lines.path, known, rows)
        self.say()
        self.say(f"{place} {self.text('starts', name=name, time=time.strftime('%H:%M:%S'))}")
        if known:
            self.say(f"  {self.text('known', done=known, rows=rows)}")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """The lines of a finished run's scores."""
        for name in metric_names():
            value, title = record["metrics"].get(name), METRICS[name].title
            if value is None:
                reason = record["missing"].get(name, "?")
                self.say(f"  {self.text('missing', metric=title, reason=reason)}")
                continue
            raw = record["raw"].get(name)
            self.say(f"  {title:8} {value:.4f}" + (f" ({raw:.2f})" if raw is not None else ""))
        peak = gib(record["peak_memory_bytes"])
        seconds = record["seconds_per_sample"]
        self.say(f"  {self.text('per_sample', seconds=seconds, peak=peak)}")
        memory = record.get("gpu_memory")
        if memory:
            before, after = (", ".join(map(gib, memory[key].values())) for key in memory)
            self.say(f"  {self.text('gpu', before=before, after=after)}")
        if record["failed_rows"]:
            self.say(f"  {self.text('rows_failed', count=len(record['failed_rows']))}")

    # -- progress --------------------------------------------------------------------------------
    def shows(self, names: Sequence[str]) -> None:
        """How far runs are: a bar each on a terminal, else a line now and then."""
        if sys.stderr.isatty():
            self._show_bars(names)
            return
        now = time.monotonic()
        if now - self._last < _PLAIN_PERIOD:
            return
        self._last = now
        for name in names:
            run = self._runs[name]
            here = run.count()
            left = seconds_left(now - run.start, here - run.known, run.rows - here)
            line = self.text("left", name=name, done=here, rows=run.rows, left=left)
            print(line, file=sys.stderr, flush=True)

    def _show_bars(self, names: Sequence[str]) -> None:
        if self._bars is None:
            self._bars = bars()
            self._bars.start()
        for name in names:
            run = self._runs[name]
            if run.task is None:
                run.task = self._bars.add_task(name, total=run.rows, completed=run.known)
            self._bars.update(run.task, completed=run.count())

    def rests(self) -> None:
        """Take the bars away, so that lines can be printed."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            for run in self._runs.values():
                run.task = None


@dataclass
class _Run:
    """How far a run is: its rows are lines of a growing file."""

    path: Path
    known: int
    rows: int
    start: float = field(default_factory=time.monotonic)
    task: Any = None

    def __post_init__(self) -> None:
        self._before = self._lines()

    def _lines(self) -> int:
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def count(self) -> int:
        """Rows that are there."""
        return min(self.known + self._lines() - self._before, self.rows)


def duration(seconds: float) -> str:
    """``45 s``, ``3:20`` (minutes) or ``2:05:00`` (hours)."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_left(spent: float, done: int, rest: int) -> str:
    """Time left at the pace so far; ``?`` before anything is done."""
    return duration(spent / done * rest) if done > 0 else "?"


def gib(size: int | None) -> str:
    """Bytes in GiB."""
    return "?" if size is None else f"{size / 2**30:.2f} GiB"
