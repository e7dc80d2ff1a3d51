"""A whole sweep whose store is an S3 bucket: run, killed, resumed, compacted, asked."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.records import Shard
from storage.store import Store
from tests.faults.quick import spec
from tests.faults.runs import end_group, quick
from tests.s3 import BUCKET, s3_server
from tests.sweeps import assert_same, committed, rows
from tests.test_checkpoints import DENSE, SHARD, TASK, measured, run_until_stopped
from workers.worker import Worker

LOCATION = f"s3://{BUCKET}/a/prefix"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    """The S3 server; its address is in the environment of whatever is started meanwhile."""
    with s3_server() as address:
        yield address


def left_over(store: Store) -> list[str]:
    """What a run should not leave behind."""
    folders = ("drivers", "workers", "stops", "checkpoints")
    return [f"{folder}/{name}" for folder in folders for name in store.names(f"scratch/{folder}")]


@pytest.mark.parametrize("how", ["--inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_sweep_on_an_object_store(how: str, tmp_path: Path) -> None:
    """Stopped, killed and resumed, a sweep on S3 ends as one on a disk: one row per task, nothing run again,
    nothing left over, one compacted file; and the commands that read it answer."""
    arguments = ["--inline"] if how == "--inline" else []
    store = Store(f"{LOCATION}/{how}")
    text = spec(count=10, resources="candidates_per_shard: 4, workers: 1")
    sweep = quick(tmp_path, text, seconds=0.4, PRUNESWEEP_STORE=store.location)
    driver = sweep.start("run", "quick.yaml", *arguments)
    assert sweep.wait_for(lambda: len(committed(store)) >= 2, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 130, sweep.said()
    assert f"prunesweep resume quick --store {store.location}" in sweep.said()
    first = committed(store)
    assert 2 <= len(first) < 10
    driver = sweep.start("resume", "quick", *arguments)
    assert sweep.wait_for(lambda: len(committed(store)) >= len(first) + 2, driver)
    end_group(driver)
    before = committed(store)
    assert first < before
    code, said = sweep.run("resume", "quick", "--inline")
    assert code == 0, said
    assert before <= committed(store)
    assert len(committed(store)) == 10
    assert_same(rows(store), sweep.reference())
    assert left_over(store) == []
    assert len(store.row_file_names()) == 1
    for command in (["status", "quick"], ["corr", "quick"], ["ls"], ["query", "from failures"], ["compact"]):
        code, said = sweep.run(*command)
        assert code == 0, said


def test_the_checkpoint_of_a_real_task_on_s3(tmp_path: Path) -> None:
    """Real training, asked to stop: its checkpoint is an object, and going on from it gives the undisturbed row."""
    store, local = Store(f"{LOCATION}/checkpoint"), Store(tmp_path)
    for one in (store, local):
        list(Worker(one, "none").run_shard(Shard("dense", dense=DENSE)))
    (undisturbed,) = Worker(local, "none").run_shard(SHARD)
    assert run_until_stopped(store, SHARD, 20) == []
    assert store.scratch.checkpoints() == [TASK.task_id]
    (row,) = run_until_stopped(store, SHARD, 10**6)
    assert measured(row) == measured(undisturbed)
    assert store.scratch.checkpoints() == []
