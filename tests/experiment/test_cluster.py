"""Cells on a local Ray cluster of two nodes, one of which is ended half-way."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.cluster import run_on_ray
from vlm_prune_ext.experiment.grid import DONE, FAILED, Cell

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray (the extra cluster)"
)
ROOT = Path(__file__).parents[2]


class Job:
    """Notes which process began and ended a cell; one cell may end its process."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, cell: Cell) -> dict[str, Any]:
        number, node = cell.settings["number"], os.environ.get("RAY_NODE_ID", "")
        with (self.folder / f"{number}.begun").open("a") as file:
            file.write(f"{os.getpid()} {node}\n")
        if cell.settings.get("deadly"):
            os._exit(1)
        time.sleep(0.4)
        return {"square": number * number, "pid": os.getpid()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def cells(count: int) -> list[Cell]:
    return [Cell({"number": number}, group="one") for number in range(count)]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", ":", "127.0.0.1:port"])
def test_an_address_without_a_cluster_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match="no Ray cluster answers"):
        list(run_on_ray([], Job, address=address))


@pytest.mark.slow
def test_a_node_that_is_ended_costs_its_cell_a_retry(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    asked, lines, said, killed = cells(14), [], [], False
    running = run_on_ray(asked, Job, (str(tmp_path),), address=cluster.address, say=said.append)
    for line in running:
        lines.append(line)
        if len(lines) == 5 and not killed:
            killed = True
            cluster.remove_node(second, allow_graceful=False)
    assert sorted(line.result["square"] for line in lines if line.result) == [
        number * number for number in range(14)
    ]
    assert all(line.status == DONE for line in lines) and len(lines) == 14
    assert "2 workers on 2 nodes" in said[0] and "1 workers on 1 nodes" in said[-1]
    pids = {line.result["pid"] for line in lines if line.result}
    assert len(pids) >= 2
    begun = {n: (tmp_path / f"{n}.begun").read_text().count("\n") for n in range(14)}
    assert max(begun.values()) <= 2 and sum(begun.values()) <= 15  # one cell at most was lost


@pytest.mark.slow
def test_a_worker_that_always_dies_fails_its_cell_alone(cluster: Any, tmp_path: Path) -> None:
    asked = [*cells(3), Cell({"number": 9, "deadly": True}, group="one")]
    lines = list(run_on_ray(asked, Job, (str(tmp_path),), address=cluster.address, retries=1))
    by_number = {line.cell["number"]: line for line in lines}
    assert by_number[9].status == FAILED and "ended 2 times" in str(by_number[9].why)
    assert [by_number[n].status for n in range(3)] == [DONE] * 3
