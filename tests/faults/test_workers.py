"""Workers that die or freeze, in quick sweeps on real Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from storage.machine import is_alive
from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.sweeps import assert_invariants, committed, rows

FEW_OR_MANY = [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]


def kill_workers(sweep: Sweep, process: subprocess.Popen[str], times: int, order: random.Random) -> int:
    """SIGKILL a worker at a random moment, so many times or until the driver has ended; how often it was done."""
    killed = 0
    while killed < times:
        time.sleep(order.uniform(0, 0.5))
        if process.poll() is not None:
            break
        notes = [note for note in sweep.notes().values() if note["shard"]]
        alive = [note for note in notes if is_alive(note["pid"], note["process_started"])]
        if alive:
            os.kill(order.choice(alive)["pid"], signal.SIGKILL)
            killed += 1
    return killed


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("many", FEW_OR_MANY)
def test_workers_killed_at_random(many: bool, tmp_path: Path) -> None:
    """Whatever was killed: exit code and message are true, nothing committed is lost or run again, and after one
    resume every task has its row; a killed worker costs at most the task it was at."""
    times = 200 if many else 10
    text = spec(count=10 * times, resources=f"candidates_per_shard: {5 if many else 2}, workers: 2")
    sweep = quick(tmp_path, text.replace("conv1", "[[conv1, conv2, conv3]]"), seconds=0.3)
    process = sweep.start("run", "quick.yaml")
    killed = kill_workers(sweep, process, times, random.Random(times))
    code = process.wait(600 if many else 200)
    assert killed >= times // 2, sweep.said()
    failed = rows(sweep.store, "failed")
    assert code == (3 if failed else 0), sweep.said()
    assert {row.error_class for row in failed.values()} <= {"ProcessDied"}
    before = committed(sweep.store)
    sweep.resume()
    assert_invariants(sweep.store, "quick", before, sweep.reference())


def test_a_worker_that_freezes_is_given_up(tmp_path: Path) -> None:
    """A worker stopped with SIGSTOP in the middle of its shard is ended by the driver, and the run goes on."""
    sweep = quick(tmp_path, spec(resources="candidates_per_shard: 5, workers: 1"), seconds=0.5, QUICK_FROZEN="12")
    process = sweep.start("run", "quick.yaml")
    assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 2, process)
    (note,) = [note for note in sweep.notes().values() if note["shard"]]
    os.kill(note["pid"], signal.SIGSTOP)
    assert process.wait(120) == 0, sweep.said()
    assert not is_alive(note["pid"], note["process_started"])
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())
