"""The plan: which tasks a sweep has, which of them are unfinished, and the shards they run in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.minibatches import check_minibatches
from orchestrator.spec import SweepSpec, load_spec
from storage.commit import room
from storage.errors import StoreError
from storage.identity import join_id
from storage.manifest import REPEATING, Manifest, plan_batches
from storage.phases import Report, silent
from storage.records import Cell, Dense, Shard, Tasks
from workers.datasets import find_dataset, missing_message

if TYPE_CHECKING:
    from storage.store import Store

SMALLEST_BLOCK = 8
STATUSES = ("done", "failed", "pending")
PLAN_COLUMNS = ("shard", "task_id", "recipe", "candidate", "seed")
"""What a plan needs of the manifest."""

ROW_BYTES = 16_384
"""What a task's row takes on a disk until it is compacted, with its folder entry."""


@dataclass(frozen=True)
class CellPlan:
    """A cell of a plan, and how many of its tasks have which status."""

    cell: Cell
    statuses: Counter[str]


@dataclass(frozen=True)
class Plan:
    """A sweep laid against a store. `denses` are the dense models still to train."""

    spec: SweepSpec
    cells: tuple[CellPlan, ...]
    shards: tuple[Shard, ...]
    denses: tuple[Dense, ...]

    @property
    def statuses(self) -> dict[str, int]:
        """The sweep's tasks by status."""
        return {status: sum(one.statuses[status] for one in self.cells) for status in STATUSES}

    @property
    def total(self) -> int:
        return sum(self.statuses.values())

    @property
    def unfinished(self) -> int:
        return sum(len(shard.tasks) for shard in self.shards)


def planned(
    spec: SweepSpec, document: Document, data_root: str | None = None, report: Report = silent
) -> Iterator[Shard]:
    """Every task of a spec in its shard, in the order of the grid: cell, candidate, seed."""
    cells = list(expand.cells(spec, document, data_root, report))
    counts = [expand.candidate_count(cell, spec.candidates.count, data_root) for cell in cells]
    block = block_size(spec, sum(counts))
    for place, (cell, count) in enumerate(zip(cells, counts, strict=True), 1):
        report("planning the tasks of cell", place, len(cells))
        for first in range(0, count, block):
            pairs = product(range(first, min(first + block, count)), spec.grid.seed)
            yield Shard(shard_id(cell.cell_id, first, block), Tasks.from_pairs(cell, pairs), block=block)


def block_size(spec: SweepSpec, candidates: int) -> int:
    """How many candidates a shard has. `auto`, for a grid of so many in all cells, is about half the square
    root, a power of two: shards become longer and more at once, so that neither starting them nor waiting for
    the last one costs much."""
    given = spec.resources.candidates_per_shard
    half = max(SMALLEST_BLOCK, math.isqrt(candidates) // 2)
    return given if given != "auto" else 1 << (half.bit_length() - 1)


def shard_id(cell_id: str, candidate: int, block: int) -> str:
    """The shard of a candidate: a block of candidate numbers, whatever is done already."""
    return join_id("shard", cell_id, block, candidate // block)


def pack(planned: pa.Table, keep: Mapping[str, str], block: int) -> tuple[Shard, ...]:
    """The shards of planned tasks (PLAN_COLUMNS); `keep` says what to keep, by recipe id."""
    shards, recipes = Codes.of(planned["shard"]), Codes.of(planned["recipe"])
    cells = [Cell.from_json(recipe) for recipe in recipes.values]
    pairs = np.stack([planned[name].to_numpy() for name in ("candidate", "seed")], axis=1)
    starts = np.flatnonzero(np.diff(shards.codes, prepend=-1))
    packed: list[Shard] = []
    for start, end in pairwise([*starts.tolist(), len(planned)]):
        cell = cells[recipes.codes[start]]
        tasks = Tasks(cell, pairs[start:end].tobytes())
        name, kept = shards.values[shards.codes[start]], keep.get(cell.retrain.recipe_id, "none")
        packed.append(Shard(name, tasks, keep=kept, block=block))
    return tuple(packed)


@dataclass(frozen=True)
class Codes:
    """A column of strings that repeat: their places among `values`."""

    codes: np.ndarray
    values: list[str]

    @staticmethod
    def of(column: pa.ChunkedArray) -> Codes:
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        encoded = column.unify_dictionaries().combine_chunks()
        return Codes(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())


def check(document: Document, data_root: str | None = None, report: Report = silent) -> SweepSpec:
    """The spec of a document, checked to the last cell. Raises UserError."""
    report("checking the spec")
    spec = load_spec(document)
    for _ in expand.cells(spec, document, data_root, report):
        pass
    expand.check_data_fits(spec, document, data_root)
    check_minibatches(spec, document, data_root, report)
    return spec


def check_data(datasets: Iterable[str], data_root: str) -> None:
    """Raise UserError, saying where it was looked for and how to get it, where a data set cannot be had."""
    for name in datasets:
        try:
            missing = find_dataset(name, data_root).missing(data_root)
        except ValueError as error:
            raise UserError(str(error)) from None
        if missing:
            raise UserError(missing_message(name, data_root))


def check_room(store: Store, plan: Plan) -> None:
    """Raise StoreError where what a plan will write does not fit on the store's disk. Nothing is known of
    an object store's room, nor of the size of networks to keep before their dense model is there."""
    if not store.is_local:
        return
    weights = {name.split("-")[0]: size for name, size in store.sizes("dense").items()}
    kept = sum(weights.get(s.needs.dense_id, 0) * len(s.tasks) for s in plan.shards if s.keep != "none")
    needed = plan.unfinished * ROW_BYTES + kept
    free = room(store.root)
    if free < needed:
        raise StoreError(
            f"about {_size(needed)} will be written to {store.location}, and its disk has {_size(free)} to spare: "
            "make room, or use another --store"
        )


def _size(n: float) -> str:
    return f"{max(0, n) / 1e9:.2f} GB" if n >= 1e8 else f"{max(0, n) / 1e6:.1f} MB"


def make_plan(store: Store, spec: SweepSpec, planned: pa.Table, only: frozenset[str] | None = None) -> Plan:
    """Lay planned tasks (PLAN_COLUMNS) against the store: unfinished = those without a row `done`.

    `only` narrows what is run to those task ids.
    """
    status = statuses_of(store, planned["task_id"])
    wanted = status != STATUSES.index("done")
    if only is not None:
        wanted &= is_in(planned["task_id"], only)
    block = block_size(spec, len(planned) // len(spec.grid.seed))
    shards = pack(planned.filter(pa.array(wanted)), expand.keeps(spec.retrain), block)
    return Plan(spec, cell_plans(planned["recipe"], status), shards, missing_denses(store, shards))


def statuses_of(store: Store, task_ids: pa.ChunkedArray) -> np.ndarray:
    """Each task's status as its place in STATUSES."""
    found = store.statuses() if store.exists() else {}
    there = {status: is_in(task_ids, (i for i, s in found.items() if s == status)) for status in ("done", "failed")}
    return np.select(list(there.values()), [STATUSES.index(status) for status in there], STATUSES.index("pending"))


def is_in(task_ids: pa.ChunkedArray, these: Iterable[str]) -> np.ndarray:
    """Which of the task ids are among `these`."""
    wanted = pc.SetLookupOptions(pa.array(list(these), pa.string()))
    return pc.call_function("is_in", [task_ids], wanted).to_numpy()


def cell_plans(recipes: pa.ChunkedArray, status: np.ndarray) -> tuple[CellPlan, ...]:
    """The cells of tasks, in the order of the grid, each with its tasks by status."""
    cells = Codes.of(recipes)
    counts = np.bincount(cells.codes * len(STATUSES) + status, minlength=len(cells.values) * len(STATUSES))
    by_cell = counts.reshape(-1, len(STATUSES)).tolist()
    return tuple(
        CellPlan(Cell.from_json(recipe), Counter({s: n for s, n in zip(STATUSES, found, strict=True) if n}))
        for recipe, found in zip(cells.values, by_cell, strict=True)
    )


def missing_denses(store: Store, shards: Iterable[Shard]) -> tuple[Dense, ...]:
    """The dense models that `shards` start from and the store does not have."""
    there = store.dense_ids()
    needed = {shard.needs.dense_id: shard.needs for shard in shards}
    return tuple(dense for dense_id, dense in needed.items() if dense_id not in there)


def plan_of_spec(
    store: Store, spec: SweepSpec, document: Document, data_root: str | None = None, report: Report = silent
) -> Plan:
    """The plan of a spec that has not been recorded yet."""
    return make_plan(store, spec, planned_table(spec, document, data_root, report))


def planned_table(
    spec: SweepSpec, document: Document, data_root: str | None = None, report: Report = silent
) -> pa.Table:
    """Return PLAN_COLUMNS of every task of a spec, in the order of the grid."""
    batches = plan_batches(planned(spec, document, data_root, report))
    return pa.Table.from_batches(_for_a_plan(batch) for batch in batches)


def _for_a_plan(batch: pa.RecordBatch) -> pa.RecordBatch:
    """PLAN_COLUMNS of a batch as a recorded sweep has them: strings that repeat only once."""
    columns = {name: batch[name].dictionary_encode() if name in REPEATING else batch[name] for name in PLAN_COLUMNS}
    return pa.RecordBatch.from_pydict(columns)


def plan_of_sweep(store: Store, manifest: Manifest, only: frozenset[str] | None = None) -> Plan:
    """The plan of a recorded sweep: its tasks come from the store, nothing is expanded again."""
    spec = load_spec(Document(manifest.sweep, store.spec_text(manifest)))
    return make_plan(store, spec, store.plan_table(manifest, PLAN_COLUMNS), only)


@dataclass(frozen=True)
class Cost:
    """What is left, estimated from rows of the same model, data set and recipe: seconds of one
    worker; `unknown` tasks have no such row yet."""

    worker_seconds: float
    unknown: int


def estimate(store: Store, plan: Plan) -> Cost:
    """The cost of a plan's unfinished tasks, from what finished ones took."""
    query = (
        "select model, dataset, recipe_id, avg(seconds_prune + seconds_retrain) from rows"
        " where status = 'done' group by all"
    )
    lines = store.sql(query).fetchall() if store.exists() else []
    known = {line[:3]: line[3] for line in lines}
    seconds, unknown = 0.0, 0
    for shard in plan.shards:
        cell = shard.tasks[0].cell
        one = known.get((cell.dense.model, cell.dense.dataset, cell.retrain.recipe_id))
        seconds, unknown = (
            (seconds, unknown + len(shard.tasks)) if one is None else (seconds + one * len(shard.tasks), unknown)
        )
    return Cost(seconds, unknown)
