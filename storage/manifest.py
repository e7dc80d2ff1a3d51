"""A sweep's expansion as a table: one line per planned task, with the shard it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from storage.records import Cell, Task

PLAN_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("shard", pa.string()),
        ("task_id", pa.string()),
        ("cell_id", pa.string()),
        ("candidate_id", pa.string()),
        ("model", pa.string()),
        ("dataset", pa.string()),
        ("dense_id", pa.string()),
        ("granularity", pa.string()),
        ("layers", pa.list_(pa.string())),
        ("ratios", pa.list_(pa.float64())),
        ("pruning_ratio", pa.float64()),
        ("pruner", pa.string()),
        ("propagation", pa.string()),
        ("schedule", pa.string()),
        ("precision", pa.string()),
        ("recipe_id", pa.string()),
        ("recipe", pa.string()),
        ("candidate", pa.int64()),
        ("seed", pa.int64()),
    ]
)
_BATCH = 8192


@dataclass(frozen=True)
class Manifest:
    """An expansion in the store: `sweeps/<sweep>/<stem>.{yaml,parquet}`."""

    sweep: str
    stem: str

    @property
    def expanded_at(self) -> str:
        return self.stem.split("-")[0]


@dataclass(frozen=True)
class PlannedTask:
    """A task and the shard it runs in."""

    shard: str
    task: Task


def plan_batches(planned: Iterable[PlannedTask]) -> Iterator[pa.RecordBatch]:
    """The tasks as record batches of PLAN_SCHEMA; a million tasks never are in memory at once."""
    rest, position = iter(planned), 0
    while chunk := list(islice(rest, _BATCH)):
        yield pa.RecordBatch.from_pylist([_line(position + k, one) for k, one in enumerate(chunk)], schema=PLAN_SCHEMA)
        position += len(chunk)


def _line(position: int, planned: PlannedTask) -> dict[str, object]:
    task, cell = planned.task, planned.task.cell
    return {
        "position": position,
        "shard": planned.shard,
        "task_id": task.task_id,
        "cell_id": cell.cell_id,
        "candidate_id": task.candidate_id,
        "model": cell.dense.model,
        "dataset": cell.dense.dataset,
        "dense_id": cell.dense.dense_id,
        "granularity": cell.granularity,
        "layers": [name for name, _ in cell.layers],
        "ratios": [ratio for _, ratio in cell.layers],
        "pruning_ratio": cell.pruning_ratio,
        "pruner": cell.pruner,
        "propagation": cell.propagation,
        "schedule": cell.schedule,
        "precision": cell.precision,
        "recipe_id": cell.retrain.recipe_id,
        "recipe": cell.json,
        "candidate": task.candidate,
        "seed": task.seed,
    }


def planned_tasks(plan: pa.Table) -> Iterator[PlannedTask]:
    """The tasks of a plan table, rebuilt; a cell is parsed once."""
    cells: dict[str, Cell] = {}
    for batch in plan.select(["shard", "recipe", "candidate", "seed"]).to_batches():
        for shard, recipe, candidate, seed in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            if recipe not in cells:
                cells[recipe] = Cell.from_json(recipe)
            yield PlannedTask(shard, Task(cells[recipe], candidate, seed))
