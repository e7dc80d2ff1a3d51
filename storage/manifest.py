"""A sweep's expansion as a table: one line per planned task, with the shard it belongs to."""

from __future__ import annotations

import datetime as dt
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.records import Cell, Shard, Task, Tasks

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
_OWN = {"position", "task_id", "candidate_id", "candidate", "seed"}
COMMON = [name for name in PLAN_SCHEMA.names if name not in _OWN]
"""What the tasks of a shard have in common."""

REPEATING = ("shard", "recipe")
"""Of those, what a plan is made from."""

_BATCH = 8192

STEM = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}")
"""The name of an expansion: when it was made, in UTC to the microsecond, and the digest of its two files."""

_TIME = "%Y%m%dT%H%M%S%fZ"


@dataclass(frozen=True)
class Manifest:
    """An expansion in the store: `sweeps/<sweep>/<stem>.{yaml,parquet}`."""

    sweep: str
    stem: str

    @property
    def expanded_at(self) -> str:
        return self.stem.split("-")[0]

    @property
    def files(self) -> tuple[str, str]:
        """The names in the store of its spec and of its tasks."""
        spec, plan = (f"sweeps/{self.sweep}/{self.stem}.{suffix}" for suffix in ("yaml", "parquet"))
        return spec, plan


def next_time(newest: Manifest | None, now: dt.datetime) -> str:
    """Return the time in the name of an expansion that follows `newest`, whatever the clock of its machine said.

    Raises OverflowError where no later time can be written.
    """
    if newest is not None:
        now = max(now, dt.datetime.strptime(newest.expanded_at, _TIME) + dt.timedelta(microseconds=1))
    return now.strftime(_TIME)


@dataclass(frozen=True)
class PlannedTask:
    """A task and the shard it runs in."""

    shard: str
    task: Task


def plan_content(planned: Iterable[Shard | PlannedTask]) -> bytes:
    """The tasks as a Parquet file."""
    buffer = io.BytesIO()
    dictionary: Any = COMMON  # pyarrow's stubs know of a bool only
    with pq.ParquetWriter(buffer, PLAN_SCHEMA, compression="zstd", use_dictionary=dictionary) as writer:
        for batch in plan_batches(planned):
            writer.write_batch(batch)
    return buffer.getvalue()


def read_plan(content: bytes, columns: Sequence[str]) -> pa.Table:
    """Return some columns of the tasks in the bytes of a Parquet file; strings that repeat are dictionaries."""
    return pq.ParquetFile(pa.BufferReader(content), read_dictionary=list(REPEATING)).read(list(columns))


def plan_batches(planned: Iterable[Shard | PlannedTask]) -> Iterator[pa.RecordBatch]:
    """The tasks as record batches of PLAN_SCHEMA; a million tasks never are in memory at once."""
    position, chunk, size = 0, list[Shard](), 0
    for shard in _pieces(planned):
        chunk.append(shard)
        size += len(shard.tasks)
        if size >= _BATCH:
            yield _batch(position, chunk)
            position, chunk, size = position + size, [], 0
    if chunk:
        yield _batch(position, chunk)


def _pieces(planned: Iterable[Shard | PlannedTask]) -> Iterator[Shard]:
    """Shards of at most _BATCH tasks."""
    for one in planned:
        if isinstance(one, PlannedTask):
            yield Shard(one.shard, (one.task,))
        else:
            yield from (Shard(one.shard_id, one.tasks[k : k + _BATCH]) for k in range(0, len(one.tasks), _BATCH))


def _batch(position: int, shards: Sequence[Shard]) -> pa.RecordBatch:
    """One line per task: what its shard's tasks have in common, its numbers, its ids."""
    tasks = [Tasks.of(shard.tasks) for shard in shards]
    own = {
        "position": range(position, position + sum(map(len, tasks))),
        "task_id": chain.from_iterable(one.ids() for one in tasks),
        "candidate_id": chain.from_iterable(one.candidate_ids() for one in tasks),
        "candidate": chain.from_iterable(one.numbers[::2] for one in tasks),
        "seed": chain.from_iterable(one.numbers[1::2] for one in tasks),
    }
    common = [_common(shard.shard_id, one.cell) for shard, one in zip(shards, tasks, strict=True)]
    which = pa.array([i for i, one in enumerate(tasks) for _ in range(len(one))])
    return pa.record_batch(
        [
            pa.array(own[name], kind) if name in own else pa.array([one[name] for one in common], kind).take(which)
            for name, kind in zip(PLAN_SCHEMA.names, PLAN_SCHEMA.types, strict=True)
        ],
        schema=PLAN_SCHEMA,
    )


def _common(shard: str, cell: Cell) -> dict[str, object]:
    return {
        "shard": shard,
        "cell_id": cell.cell_id,
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
    }


def planned_tasks(plan: pa.Table) -> Iterator[PlannedTask]:
    """The tasks of a plan table, rebuilt; a cell is parsed once."""
    cells: dict[str, Cell] = {}
    for batch in plan.select(["shard", "recipe", "candidate", "seed"]).to_batches():
        for shard, recipe, candidate, seed in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            if recipe not in cells:
                cells[recipe] = Cell.from_json(recipe)
            yield PlannedTask(shard, Task(cells[recipe], candidate, seed))
