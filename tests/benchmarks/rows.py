"""Rows as a study of 30 epochs leaves them, without the training: noisy curves, real ids, real provenance."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pyarrow as pa

from storage.identity import canonical_json
from storage.manifest import PlannedTask
from storage.records import Cell, Dense, Execution, Recipe, Removed, Row, Shard, Task, Tasks, row_for

EPOCHS = 30
CANDIDATES, SEEDS = 252, 3
CELL_ROWS = CANDIDATES * SEEDS
"""All ways to remove 5 of 10 filters, three times each."""

LR = ((0, 0.001), (20, 0.0001))
NOON = dt.datetime(2026, 11, 23, 12)
VERSIONS = {
    "accelerate": "1.15.0",
    "numpy": "2.4.6",
    "pyarrow": "26.0.1",
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.15.0",
    "torch-pruning": "1.6.1",
    "torchvision": "0.29.2",
}
MACHINE = "Intel(R) Xeon(R) Processor @ 2.90GHz family 6 model 143 (AVX512)"
EXECUTION = Execution("serial", 1, 1, "channels_last", MACHINE, (("numpy", "2.4.6"), ("torch", "2.15.0")))


def cells(n: int) -> list[Cell]:
    """n cells of one network: the dense model's seed and the retraining's weight decay vary."""
    found = []
    for i in range(n):
        dense = Recipe(EPOCHS, 256, ((0, 0.01), (20, 0.001)), "sgd", 0.9, False, 1e-4, seed=i % 10)
        retrain = Recipe(EPOCHS, 256, LR, momentum=0.9, weight_decay=1e-4 * (1 + i // 10))
        found.append(Cell(Dense("lenet5_mini", "mnist", dense), (("conv1", 0.5),), "oracle", retrain))
    return found


def study(n: int) -> list[Task]:
    """The first n tasks of a study, in the order of its grid: whole cells, then a part of one."""
    some = cells(-(-n // CELL_ROWS))
    return [Task(cell, c, s) for cell in some for c in range(CANDIDATES) for s in range(SEEDS)][:n]


def planned(tasks: list[Task]) -> Iterator[PlannedTask]:
    """`tasks` in shards of 84."""
    return (PlannedTask(shard_of(task), task) for task in tasks)


def shard_of(task: Task) -> str:
    """Which shard a task is in."""
    return f"{task.cell.cell_id[:12]}{task.candidate // 28:04x}"


def shards(n: int) -> Iterator[Shard]:
    """The same tasks, a shard for each cell: where there are millions."""
    pairs = list(product(range(CANDIDATES), range(SEEDS)))
    for i, cell in enumerate(cells(-(-n // CELL_ROWS))):
        yield Shard(cell.cell_id, Tasks.from_pairs(cell, pairs[: n - i * CELL_ROWS]))


def copied(first: pa.Table, shard: Shard) -> pa.Table:
    """The rows of a cell's tasks, measured as `first`, a whole cell, is."""
    tasks, cell = Tasks.of(shard.tasks), shard.tasks[0].cell
    table = first[: len(tasks)]
    new = {"task_id": tasks.ids(), "candidate_id": tasks.candidate_ids()}
    same = {"cell_id": cell.cell_id, "dense_id": cell.dense.dense_id, "recipe_id": cell.retrain.recipe_id}
    for name, value in {**same, "recipe": cell.json, **new}.items():
        values = [value] * len(tasks) if isinstance(value, str) else value
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table


def rows(tasks: list[Task], seed: int = 0) -> list[Row]:
    """A finished row of each task."""
    rng = np.random.default_rng(seed)
    removed = list(combinations(range(10), 5))
    return [row_for(task, "done", measured(task, removed[task.candidate], rng)) for task in tasks]


def measured(task: Task, units: tuple[int, ...], rng: np.random.Generator) -> dict[str, Any]:
    """The columns of a row that a worker fills."""
    decay = np.exp(-np.arange(1, EPOCHS + 1) / 6)
    train = 0.05 + 0.3 * decay + rng.normal(0, 0.004, EPOCHS)
    loss = 0.06 + 0.25 * decay + rng.normal(0, 0.004, EPOCHS)
    accuracy = np.rint((0.982 - 0.1 * decay + rng.normal(0, 0.001, EPOCHS)) * 10_000) / 10_000
    best, last = int(accuracy.argmax()), float(rng.uniform(0.03, 0.06))
    candidate = np.random.default_rng([task.candidate, int(task.cell.cell_id, 16)])
    before, started = candidate.uniform(0.2, 2.0, 5).tolist(), NOON + dt.timedelta(seconds=float(rng.uniform(0, 9e5)))
    seconds = rng.uniform((0.1, 40.0), (0.2, 60.0)).tolist()
    return {
        "dense_sha256": f"{int(task.cell.dense.dense_id, 16):064x}",
        "removed": (Removed("conv1", units),),
        "params": 3165, "macs": 254_240, "dense_params": 5500, "dense_macs": 448_700, "achieved_ratio": 0.5,
        "dense_train_loss": 0.0311, "dense_test_loss": 0.0402, "dense_test_accuracy": 0.9871,
        "pruned_train_loss": before[0], "pruned_train_loss_n": 60_000, "pruned_test_loss": before[1],
        "pruned_test_accuracy": round(before[2] / 4 + 0.3, 4), "equivalence_error": before[3] * 1e-16,
        "best_epoch": best + 1, "best_test_accuracy": float(accuracy[best]), "best_test_loss": float(loss[best]),
        "last_train_loss": last, "last_test_loss": float(loss[-1]), "last_test_accuracy": float(accuracy[-1]),
        "last5_test_loss_mean": float(loss[-5:].mean()), "last5_test_loss_std": float(loss[-5:].std()),
        "last5_test_accuracy_mean": float(accuracy[-5:].mean()), "last5_test_accuracy_std": float(accuracy[-5:].std()),
        "epoch_train_loss": tuple(train.tolist()), "epoch_test_loss": tuple(loss.tolist()),
        "epoch_test_accuracy": tuple(accuracy.tolist()),
        "score_l1": before[4] * 10, "score_l2": before[4] * 3,
        "attempt": 1, "diverged": False, "execution": EXECUTION.json, "device": "cpu",
        "host": f"node-{int(rng.integers(8))}", "seconds_prune": seconds[0], "seconds_retrain": seconds[1],
        "peak_memory_bytes": 900_000_000 + 4096 * int(rng.integers(20_000)), "versions": canonical_json(VERSIONS),
        "started_at": started, "finished_at": started + dt.timedelta(seconds=sum(seconds)),
    }  # fmt: skip
