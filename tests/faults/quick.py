"""prunesweep with tasks that take no time: everything is real but what a task computes.

Run as a script it is the command `prunesweep`; its Ray workers run `plant` first. What a task does is in
the environment: QUICK_SECONDS, and QUICK_POISON, candidate -> what is wrong with it, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.records import Dense, Row, Task
    from workers.worker import Worker

SPEC = """\
name: quick
grid:
  model: lenet5_mini
  dataset: synthetic
  layers: conv1
  ratio: 0.2
  pruner: oracle
  seed: [{seeds}]
candidates: {{mode: sample, count: {count}, seed: 0}}
dense:   {{epochs: 1, batch_size: 32, lr: 0.05}}
retrain: {{epochs: 1, batch_size: 64, lr: 0.01}}
resources: {{{resources}}}
"""


def spec(count: int = 10, seeds: int = 1, resources: str = "candidates_per_shard: 2") -> str:
    """A sweep of `count` candidates x `seeds`."""
    return SPEC.format(count=count, seeds=", ".join(map(str, range(seeds))), resources=resources)


def quick_row(task: Task, attempt: int = 1) -> Row:
    """The row of a task: numbers that only the task decides."""
    from storage.records import row_for, utc_now

    measured = {
        "dense_sha256": "0" * 64,
        "pruned_train_loss": int(task.candidate_id[:8], 16) / 2**32,
        "best_test_accuracy": int(task.task_id[:8], 16) / 2**32,
        "diverged": False,
        "attempt": attempt,
        "execution": "{}",
        "started_at": utc_now(),
        "finished_at": utc_now(),
    }
    return row_for(task, "done", measured)


def misbehave(how: str) -> None:
    """What a poisoned task does to its process."""
    import ctypes

    if how == "segfault":
        ctypes.string_at(0)
    elif how == "hang":
        time.sleep(10**6)
    elif how == "held":  # no thread of Python runs meanwhile
        ctypes.PyDLL(None).usleep(10**9)
    elif how == "memory":
        held: list[bytearray] = []
        while True:
            held.append(bytearray(b"x") * 20_000_000)
            time.sleep(0.01)
    elif how == "memory error":
        raise MemoryError("no room for it")
    elif how == "raise":
        raise ValueError("poisoned")


def plant() -> None:
    """Claim the rooms as a worker does, then replace what a task computes. Torch is not imported."""
    import types

    import prunesweep

    prunesweep.claim_rooms()
    from workers.worker import DenseMissing, Worker

    seconds = float(os.environ.get("QUICK_SECONDS", "0.05"))
    poison = {int(k): v for k, v in json.loads(os.environ.get("QUICK_POISON", "{}")).items()}

    def run_tasks(tasks: Sequence[Task], worker: Worker, *, keep: str, attempts: Sequence[int]) -> list[Row]:
        (task,), (attempt,) = tasks, attempts
        misbehave(poison.get(task.candidate, ""))
        if seconds:
            time.sleep(seconds)
        row = quick_row(task, attempt)
        return [replace(row, diverged=True, best_test_accuracy=None) if poison.get(task.candidate) == "nan" else row]

    def train_dense(worker: Worker, dense: Dense) -> None:
        worker._set_damaged_aside(dense)
        worker.store.commit_dense(dense.dense_id, b"quick")

    def load_dense(worker: Worker, dense: Dense) -> None:
        if worker.store.dense(dense.dense_id) is None:
            raise DenseMissing(worker._set_damaged_aside(dense))

    module = types.ModuleType("workers.task")
    vars(module).update(run_tasks=run_tasks, provenance=lambda attempt: {"attempt": attempt})
    sys.modules["workers.task"] = module
    patched: Any = Worker
    patched.train_dense, patched.dense = train_dense, load_dense
    patched._has_accelerator = lambda _: False  # to look would import torch


def main() -> None:
    """The command, planted here and in its workers."""
    plant()
    import orchestrator.cluster
    import orchestrator.drivers
    import orchestrator.vacating
    import storage.signs
    from orchestrator.cli import entry

    orchestrator.cluster.SETUP_HOOK = plant
    orchestrator.drivers.FROZEN_SECONDS = float(os.environ.get("QUICK_FROZEN", "120"))
    orchestrator.vacating.STARVED_SECONDS = float(os.environ.get("QUICK_STARVED", "60"))
    storage.signs.STALE_SECONDS = float(os.environ.get("QUICK_STALE", "60"))
    entry()


if __name__ == "__main__":
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    main()
