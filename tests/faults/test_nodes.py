"""A node that goes in the middle of a sweep on three of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.machine import is_alive
from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.sweeps import assert_invariants, committed


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and three nodes with one each, all real processes on loopback."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("QUICK_SECONDS", "0.5")  # a cluster's workers have their node's environment
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def lose_nodes(cluster: Any, sweep: Sweep, driver: subprocess.Popen[str], times: int) -> list[dict[str, Any]]:
    """Take a node away while it works, so many times, each after another row; another comes in its place."""
    lost: list[dict[str, Any]] = []
    rows = 0
    while len(lost) < times and driver.poll() is None:
        time.sleep(0.1)
        busy = [note for note in sweep.notes().values() if note["task"]]
        if len(committed(sweep.store)) <= rows or not busy:
            continue
        rows = len(committed(sweep.store))
        node = next((n for n in cluster.worker_nodes if n.node_id == busy[0]["node"]), None)
        if node is not None:
            _power_off(node, busy)
            cluster.remove_node(node, allow_graceful=False)
            lost.append(busy[0])
            cluster.add_node(num_cpus=1)
    return lost


def _power_off(node: Any, busy: list[dict[str, Any]]) -> None:
    """End a node's raylet and its workers at once, as a machine that goes does: workers are missed first."""
    raylets = [one.process.pid for one in node.all_processes["raylet"]]
    for pid in [*raylets, *(note["pid"] for note in busy if note["node"] == node.node_id)]:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_nodes_that_go(nodes: Any, times: int, tmp_path: Path) -> None:
    """A lost node costs the tasks it was at and a worker's start: the sweep is done in the same run."""
    sweep = quick(tmp_path, spec(count=20 if times == 1 else 45, seeds=1 if times == 1 else 3))
    driver = sweep.start("run", "quick.yaml", "--address", nodes.address)
    lost = lose_nodes(nodes, sweep, driver, times)
    assert driver.wait(400) == 0, sweep.said()
    assert len(lost) == times
    assert "a node was lost" in sweep.said() and "process died" not in sweep.said()
    assert not any(is_alive(note["pid"], note["process_started"]) for note in lost)
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())
