"""Commands of the package in processes that may be killed or starved at any moment, often.

Importing takes longer than what is tested, so one process imports everything and forks a child for
each command: ``python -m tests.faults.zygote``, one JSON object a line in, one a line out.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Zygote:
    """Runs ``vlm-prune`` commands.

    Args:
        folder: caches go there.
    """

    def __init__(self, folder: Path) -> None:
        env = {
            **os.environ,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "LMUData": str(folder / "LMUData"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        (folder / "LMUData").mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=env,
            text=True,
        )

    def run(
        self, *words: str, kill_after: float | None = None, largest: int | None = None
    ) -> dict[str, Any]:
        """One command.

        Args:
            words: its command line.
            kill_after: seconds until it is killed (SIGKILL), with all that it started.
            largest: bytes that a file may have at most: what a full disk looks like.

        Returns:
            ``code`` (``None``: it was killed), ``said`` (what it printed), ``seconds``.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"words": words, "kill_after": kill_after, "largest": largest}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from vlm_prune_ext import cli
    from vlm_prune_ext.evals import names

    torch.set_num_threads(1)
    names.import_quietly()
    import vlm_prune_ext.evals.vlmeval_run
    import vlm_prune_ext.models  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(_attempt(cli.main, **asked)) + "\n")
        answers.flush()


def _attempt(
    main: Any, words: Sequence[str], kill_after: float | None, largest: int | None
) -> dict[str, Any]:
    start = time.monotonic()
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # what it starts dies with it
        os.dup2(mouth, 1)
        os.dup2(mouth, 2)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        code = 70
        try:
            code = main(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(mouth)
    said, killed = b"", False
    while True:
        left = None if kill_after is None or killed else start + kill_after - time.monotonic()
        ready, _, _ = select.select([ear], [], [], None if left is None else max(left, 0))
        if not ready:
            os.killpg(child, signal.SIGKILL)
            killed = True
            continue
        part = os.read(ear, 1 << 16)
        if not part:
            break
        said += part
    os.close(ear)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": None if code < 0 else code,
        "said": said.decode(errors="replace"),
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    _serve()
