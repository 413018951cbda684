"""The log and files written whole: nothing that was written is lost, and nobody is in the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.log import Log, lock, put_aside, read_json, write_json, write_whole


def test_what_is_appended_reads_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    assert log.read() == []
    odd = {"text": "a\u2028b\x0b\x85c\r\nd \ud800", "number": 1.5}
    log.append({"a": 1}, odd)
    log.append({"a": 2})
    assert log.read() == [{"a": 1}, odd, {"a": 2}]


@pytest.mark.parametrize("broken", [b'{"a": ', b"\x00\x00\xff", b"[1]", b"", b"[" * 9000])
def test_a_broken_line_costs_that_line_only(tmp_path: Path, broken: bytes) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.append({"a": 1}, {"a": 2}, {"a": 3})
    lines = log.path.read_bytes().split(b"\n")
    lines[1] = broken
    log.path.write_bytes(b"\n".join(lines))
    assert log.read() == [{"a": 1}, {"a": 3}]
    assert log.broken == [2]


def test_every_cut_of_the_last_line_loses_that_line_only(tmp_path: Path) -> None:
    """Whatever byte a kill stops at: earlier lines stay, later ones stand alone."""
    log = Log(tmp_path / "log.jsonl")
    log.append({"a": 1}, {"b": "\u00e9"})
    whole = log.path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        log.path.write_bytes(whole[:end])
        log.append({"c": 3})
        kept = [{"a": 1}, {"b": "\u00e9"}] if end == len(whole) - 1 else [{"a": 1}]
        assert log.read() == [*kept, {"c": 3}], end


WRITER = """
import sys
from pathlib import Path
from vlm_prune_ext.experiment.log import Log
log = Log(Path(sys.argv[1]))
for number in range(100_000):
    log.append({"number": number, "text": "x" * (number % 5000)})
"""


def test_killed_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        before = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < before + 100_000:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    log = Log(path)
    numbers = [entry["number"] for entry in log.read()]
    starts = [place for place, number in enumerate(numbers) if number == 0]
    assert len(starts) == 3
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        assert numbers[start:end] == list(range(end - start))


def test_a_folder_that_is_gone_or_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "absent"):
        with pytest.raises(InputError, match=r"cannot be written .*directory"):
            Log(tmp_path / folder / "log.jsonl").append({})
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "absent" / "x.json", "")
    with pytest.raises(InputError, match="cannot be written"):
        Log(Path("/dev/full")).append({"a": 1})


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    assert read_json(path) is None


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        with pytest.raises(InputError, match="in use by another run"), lock(tmp_path / "run"):
            pass
        with lock(tmp_path / "other"):
            pass
    with lock(tmp_path / "run"):
        pass


def test_nothing_put_aside_is_ever_replaced(tmp_path: Path) -> None:
    assert put_aside(tmp_path) is None
    for number in range(3):
        (tmp_path / "answers").write_text(str(number))
        put_aside(tmp_path)
    found = {p.parent.name: p.read_text() for p in tmp_path.glob("*/answers")}
    assert found == {"previous": "0", "previous-2": "1", "previous-3": "2"}
    assert json.loads(found["previous"]) == 0
