"""One of two processes that run shards together; the first prints what came of each, as JSON.

`python -m tests.joined STORE`, with the variables of torch.distributed set.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch

import workers.task
import workers.training
import workers.worker
from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.schema import PROVENANCE, SCHEMA, rows_to_table, table_to_rows
from storage.store import Store
from workers.pulse import Limits, Pulse, Stopped
from workers.worker import Parted, Worker

DENSE = Dense("lenet5_mini", "synthetic", Recipe(1, 64, ((0, 0.05),), momentum=0.9, seed=0))
# Of 512 samples the last minibatch has one: a process of two has none of it.
RETRAIN = Recipe(2, 73, ((0, 0.02),), momentum=0.9, weight_decay=1e-4, accumulate=2, label_smoothing=0.1, clip_norm=5.0)
CELL = Cell(DENSE, (("conv1", 0.4),), "oracle", RETRAIN)
TASKS = (Task(CELL, 0, 0), Task(CELL, 1, 1))
TWICE, POISONED = Task(CELL, 2, 0), Task(CELL, 3, 0)
STOP_AFTER = 9


def measured(rows: list[Row]) -> list[dict[str, Any]]:
    """What rows say but provenance, as a file would hold it, and their execution."""
    names = [n for n in SCHEMA.names if n not in PROVENANCE and n != "removed"] + ["execution", "error_class"]
    return [{n: getattr(row, n) for n in names} for row in table_to_rows(rows_to_table(rows))]


def stopping(step: Any) -> Any:
    """A training step that is the last one a process makes, after so many."""
    made = [0]

    def counted(*arguments: Any) -> torch.Tensor:
        made[0] += 1
        if made[0] > STOP_AFTER:
            raise Stopped
        return step(*arguments)

    return counted


def main(location: str) -> None:
    store = Store(location)
    worker = Worker(store, "none", cpu=True, joined=True)
    # A checkpoint before every step: whoever stops can go on from there.
    pulse = Pulse(store, "driver", Limits(checkpoint_seconds=0.0)) if worker.leads else None
    worker.pulse = pulse
    told: dict[str, Any] = {}
    with pulse or nullcontext():
        told["dense"] = len(list(worker.run_shard(Shard("dense", dense=DENSE))))
        worker._agreed(None)  # the first has written the dense model
        told["rows"] = measured(list(worker.run_shard(Shard("s0", TASKS))))
        step = workers.training._step
        workers.training._step = stopping(step)
        try:
            list(worker.run_shard(Shard("s1", (TWICE,))))
        except Stopped:
            told["checkpoints"] = len(store.scratch.checkpoints())
        workers.training._step = step
        worker._agreed(None)
        told["resumed"] = measured(list(worker.run_shard(Shard("s1", (TWICE,)))))
        workers.worker.PART_SECONDS = 1.0
        workers.task.prune_task = lambda *_: 1 / 0  # type: ignore[assignment]
        rows: list[Row] = []
        try:
            rows += worker.run_shard(Shard("s2", (POISONED, Task(CELL, 4, 0))))
        except Parted:
            told["parted"] = True
        except ZeroDivisionError:
            told["raised"] = True
        told["failed"] = len(store.statuses())
    if worker.leads:
        print(json.dumps(told))
    else:
        assert told["raised"]


if __name__ == "__main__":
    main(sys.argv[1])
