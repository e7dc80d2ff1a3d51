"""Several processes for one task: the row of one process to rounding, written once, whatever goes wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.run import Options, run_spec
from storage.records import Row, Shard
from storage.schema import rows_to_table, table_to_rows
from storage.store import Store
from tests import joined
from workers.worker import Worker

EXACT = ("task_id", "params", "macs", "removed_units", "best_epoch", "pruned_train_loss_n", "achieved_ratio")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two processes tells of the shards they ran together, and their store."""
    folder, port = tmp_path_factory.mktemp("together"), free_port()
    usual = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.joined", str(folder / "store")],
            env={**os.environ, **usual, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    return {**json.loads(ends[0][0].splitlines()[-1]), "store": Store(str(folder / "store"))}


@pytest.fixture(scope="module")
def alone(told: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the same tasks by one process, from the same dense weights."""
    store = Store(str(tmp_path_factory.mktemp("alone")))
    dense = told["store"].dense(joined.DENSE.dense_id)
    store.commit_dense(joined.DENSE.dense_id, dense.content)
    tasks = (*joined.TASKS, joined.TWICE)
    return joined.measured(list(Worker(store, "none", cpu=True).run_shard(Shard("s0", tasks))))


def differing(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-4) -> list[str]:
    """The columns that are not equal, numbers to a tolerance."""

    def near(x: Any, y: Any) -> bool:
        if isinstance(x, list | tuple) and isinstance(y, list | tuple):
            return len(x) == len(y) and all(map(near, x, y))
        return x == pytest.approx(y, rel=tolerance, abs=1e-7) if isinstance(x, float) else x == y

    return [name for name in a if name != "execution" and not near(a[name], b[name])]


def test_two_processes_give_the_row_of_one(told: dict[str, Any], alone: list[dict[str, Any]]) -> None:
    """With the same global minibatches every column agrees to rounding, uneven last minibatches and parts included."""
    assert told["dense"] == 0
    for together, single in zip([*told["rows"], *told["resumed"]], alone, strict=True):
        assert differing(together, single) == []
        assert json.loads(together["execution"])["processes"] == 2
        assert "processes" not in json.loads(single["execution"])


def test_they_go_on_from_a_checkpoint(told: dict[str, Any]) -> None:
    """Stopped in the middle, both go on from what the first one saved; it goes once the row is there."""
    assert told["checkpoints"] == 1 and len(told["resumed"]) == 1
    assert told["store"].scratch.checkpoints() == []


def test_a_task_that_fails_parts_them(told: dict[str, Any]) -> None:
    """The first writes the failed row and ends the shard there; the other ends with its error."""
    assert told["parted"] is True and told["failed"] == 4
    rows = told["store"].sql("select error_class, count(*) from rows where status = 'failed' group by 1").fetchall()
    assert rows == [("ZeroDivisionError", 1)]


def test_each_row_is_written_once(told: dict[str, Any]) -> None:
    """Only the first process writes."""
    counts = told["store"].sql("select count(*), count(distinct task_id) from attempts").fetchall()
    assert counts == [(4, 4)]


def test_batch_norm_on_processors_is_refused() -> None:
    """It would take its statistics over a part of the minibatch."""
    import torch

    from workers.serial import synchronised

    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert synchronised(plain) is plain
    with pytest.raises(ValueError, match=r"needs GPUs: set resources\.processes to 1"):
        synchronised(torch.nn.Sequential(torch.nn.BatchNorm2d(2)))


def test_more_processes_than_the_cluster_has_room_for() -> None:
    """They would wait for ever: refused with what is asked for and what there is; as many as there are may run, and
    what an autoscaler may add counts."""
    from orchestrator.placement import Placement, check_fits

    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 2.0}]
    check_fits(Placement(2, 1, 2), nodes, {})
    with pytest.raises(UserError, match="asks for 3 processes of 2 CPU, 1 GPU, and the cluster has room for 2"):
        check_fits(Placement(2, 1, 3), nodes, {})
    with pytest.raises(UserError, match="a shard asks for 9 CPU, and no node"):
        check_fits(Placement(9, 0), nodes, {})
    check_fits(Placement(2, 1, 3), nodes, {"CPU": 16, "GPU": 8})


SPEC = """
name: two
grid: {model: lenet5_mini, dataset: synthetic, layers: conv1, ratio: 0.4, pruner: l1, seed: [0, 1]}
dense:   {epochs: 1, batch_size: 64, lr: 0.05, momentum: 0.9}
retrain: {epochs: 2, batch_size: 60, lr: 0.01, momentum: 0.9}
resources: {processes: PROCESSES, gpus: 0}
"""


def test_ray_train_runs_a_sweep(tmp_path: Path) -> None:
    """`resources.processes: 2` on Ray gives the rows of one process in this one, to rounding."""
    store = Store(str(tmp_path / "store"))
    one = run_spec(store, Document("two.yaml", SPEC.replace("PROCESSES", "1")), Options(inline=True))
    assert one.complete
    single = rows_of(store)
    together = Store(str(tmp_path / "together"))
    (file,) = (store.dense(row.dense_id) for row in single[:1])
    assert file is not None
    together.commit_dense(single[0].dense_id, file.content)
    two = run_spec(together, Document("two.yaml", SPEC.replace("PROCESSES", "2")), Options())
    assert two.complete, two.problems
    for a, b in zip(rows_of(together), single, strict=True):
        first, second = joined.measured([replace(a, removed=None), replace(b, removed=None)])
        assert differing(first, second) == [] and '"processes":2' in str(a.execution)


def rows_of(store: Store) -> list[Row]:
    """Its rows by seed."""
    found = table_to_rows(store.row_files()[0])
    return sorted(table_to_rows(rows_to_table(found)), key=lambda row: row.seed)
