"""Cells on a Ray cluster: the same cells, log and resuming, on many machines.

Ray places workers, one per GPU (one per CPU where there is none), and tells when one is gone. A
worker holds its model from cell to cell; one that dies, with its node or alone, costs its cell a
retry. Nodes need this package at one path, and one folder of results that all of them see.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import FAILED, Cell, Job, Line, Watch, do, line_of, next_cell

_POLL = 0.5  # seconds between two looks at what workers do
_PATIENCE = 60.0  # seconds without any worker before it is said
_PASSED_ON = ("PYTHONPATH", "LMUData", "XDG_CACHE_HOME", "VLM_PRUNE_DEMO_DATA", "HF_HOME")


def needs_ray() -> None:
    """Raise InputError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError('--launcher ray needs Ray: pip install -e ".[cluster]" brings it.')


def check_address(address: str) -> None:
    """Refuse an address at which nobody listens: Ray itself would try for minutes.

    Raises:
        InputError: naming it.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--address {address!r}: no Ray cluster answers there; HOST:PORT of `ray start --head` "
            "is accepted."
        ) from error


class _Worker:
    """What an actor runs: cells, one at a time.

    Args:
        folder: that relative paths are meant from.
        make_job, arguments: as :func:`vlm_prune_ext.experiment.grid.run` takes them.
    """

    def __init__(
        self, folder: str, make_job: Callable[..., Job], arguments: tuple[Any, ...]
    ) -> None:
        os.chdir(folder)
        self._make, self._arguments, self._job = make_job, arguments, None

    def do(self, cell: Cell) -> Line:
        """The line of a cell, whatever goes wrong with it."""

        def job(cell: Cell) -> Any:
            self._job = self._job or self._make(*self._arguments)  # type: ignore[assignment]
            assert self._job is not None
            return self._job(cell)

        return do(cell, job, tell=True)


def run_on_ray(
    cells: Sequence[Cell],
    make_job: Callable[..., Job],
    arguments: tuple[Any, ...] = (),
    *,
    address: str | None = None,
    retries: int = 2,
    watch: Watch = lambda cells: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Line]:
    """Do the cells on a cluster, and yield a line for each as it is done.

    Args:
        cells: in order.
        make_job: called once per worker with ``arguments``; returns what does cells.
        arguments: its.
        address: of the cluster; ``None``: the one that ``RAY_ADDRESS`` names, else Ray is started
            on this machine.
        retries: how often a cell is tried again whose worker died.
        watch: called with the cells that are being done.
        say: called with a line about the cluster.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    needs_ray()
    if address is not None:
        check_address(address)
    import ray
    from ray.exceptions import RayError

    started = not ray.is_initialized()
    if started:
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": passed},
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address is None else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--address {address!r}: no Ray cluster answers there.") from error
    try:
        yield from _work(ray, RayError, cells, make_job, arguments, retries, watch, say)
    finally:
        if started:
            ray.shutdown()


def _work(
    ray: Any,
    error: type[Exception],
    cells: Sequence[Cell],
    make_job: Callable[..., Job],
    arguments: tuple[Any, ...],
    retries: int,
    watch: Watch,
    say: Callable[[str], None],
) -> Iterator[Line]:
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    one = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    actor = ray.remote(**one, max_restarts=0)(_Worker)
    waiting, tries = list(cells), dict.fromkeys((cell.key for cell in cells), 0)
    idle: list[tuple[Any, str | None]] = []  # an actor, and the group that it holds
    busy: dict[Any, tuple[Any, Cell]] = {}
    said, alone = "", time.monotonic()
    try:
        while waiting or busy:
            room = int(ray.cluster_resources().get(kind, 0))
            now = f"{room} workers on {_nodes(ray)} nodes of a Ray cluster"
            if now != said:
                said = now
                say(said)
            while waiting and (idle or len(busy) < room):
                if not idle:
                    idle.append((actor.remote(str(Path.cwd()), make_job, arguments), None))
                worker, group = idle.pop()
                cell = waiting.pop(next_cell(waiting, group))
                busy[worker.do.remote(cell)] = (worker, cell)
            watch([cell for _, cell in busy.values()])
            if not busy and time.monotonic() - alone > _PATIENCE:
                raise InputError("The Ray cluster has no worker left: start nodes, and go on.")
            alone = time.monotonic() if busy else alone
            if not busy:
                time.sleep(_POLL)
                continue
            ready, _ = ray.wait(list(busy), timeout=_POLL)
            for future in ready:
                worker, cell = busy.pop(future)
                try:
                    line = ray.get(future)
                except error as why:  # the worker is gone, or its node
                    tries[cell.key] += 1
                    if tries[cell.key] <= retries:
                        waiting.insert(0, cell)
                    else:
                        text = f"its worker ended {tries[cell.key]} times ({type(why).__name__})"
                        yield line_of(cell, FAILED, why=text)
                    continue
                idle.append((worker, cell.group))
                yield line
    finally:
        for worker, _ in [*idle, *busy.values()]:
            ray.kill(worker)


def _nodes(ray: Any) -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())
