"""Files of JSON lines that processes append to, and may be killed while they do."""

from __future__ import annotations

from pathlib import Path


def whole_lines(path: Path) -> list[bytes]:
    """All lines that were finished; none where there is no such file."""
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def cut_unfinished(path: Path) -> None:
    """Take away a last line that was not finished, so that the next one stands alone."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
