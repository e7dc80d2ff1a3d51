"""The plan: which tasks a sweep has, which of them are unfinished, and the shards they run in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.spec import SweepSpec, load_spec
from storage.commit import room
from storage.errors import StoreError
from storage.identity import join_id
from storage.manifest import Manifest, PlannedTask, planned_tasks
from storage.records import Cell, Dense, Shard
from workers.datasets import DATASETS, missing_message

if TYPE_CHECKING:
    from storage.store import Store

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
        return {status: sum(one.statuses[status] for one in self.cells) for status in ("done", "failed", "pending")}

    @property
    def total(self) -> int:
        return sum(self.statuses.values())

    @property
    def unfinished(self) -> int:
        return sum(len(shard.tasks) for shard in self.shards)


def planned(spec: SweepSpec, document: Document) -> Iterator[PlannedTask]:
    """Every task of a spec with its shard, in the order of the grid."""
    block = spec.resources.candidates_per_shard
    for task in expand.tasks(spec, document):
        yield PlannedTask(shard_id(task.cell.cell_id, task.candidate, block), task)


def shard_id(cell_id: str, candidate: int, block: int) -> str:
    """The shard of a candidate: a block of candidate numbers, whatever is done already."""
    return join_id("shard", cell_id, block, candidate // block)


def pack(planned: Iterable[PlannedTask], keep: Mapping[str, str]) -> tuple[Shard, ...]:
    """The shards of `planned`, each with its tasks; `keep` says what to keep, by recipe id."""
    groups: dict[str, list[PlannedTask]] = {}
    for one in planned:
        groups.setdefault(one.shard, []).append(one)
    return tuple(
        Shard(name, tuple(one.task for one in group), keep=keep.get(group[0].task.cell.retrain.recipe_id, "none"))
        for name, group in groups.items()
    )


def check(document: Document) -> SweepSpec:
    """The spec of a document, checked to the last cell. Raises UserError."""
    spec = load_spec(document)
    for _ in expand.cells(spec, document):
        pass
    expand.check_data_fits(spec, document)
    return spec


def check_data(datasets: Iterable[str], data_root: str) -> None:
    """Raise UserError, saying how to get it, where a data set's files are not under `data_root`."""
    for name in datasets:
        if DATASETS[name].missing(data_root):
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


def make_plan(store: Store, spec: SweepSpec, tasks: Iterable[PlannedTask], only: frozenset[str] | None = None) -> Plan:
    """Lay planned tasks against the store: unfinished = those without a row `done`.

    `only` narrows what is run to those task ids.
    """
    statuses = store.statuses()
    unfinished: list[PlannedTask] = []
    cells: dict[str, CellPlan] = {}
    for one in tasks:
        status = statuses.get(one.task.task_id, "pending")
        cell = one.task.cell
        if cell.cell_id not in cells:
            cells[cell.cell_id] = CellPlan(cell, Counter())
        cells[cell.cell_id].statuses[status] += 1
        if status != "done" and (only is None or one.task.task_id in only):
            unfinished.append(one)
    shards = pack(unfinished, expand.keeps(spec.retrain))
    return Plan(spec, tuple(cells.values()), shards, missing_denses(store, shards))


def missing_denses(store: Store, shards: Iterable[Shard]) -> tuple[Dense, ...]:
    """The dense models that `shards` start from and the store does not have."""
    there = store.dense_ids()
    needed = {shard.needs.dense_id: shard.needs for shard in shards}
    return tuple(dense for dense_id, dense in needed.items() if dense_id not in there)


def plan_of_spec(store: Store, spec: SweepSpec, document: Document) -> Plan:
    """The plan of a spec that has not been recorded yet."""
    return make_plan(store, spec, planned(spec, document))


def plan_of_sweep(store: Store, manifest: Manifest, only: frozenset[str] | None = None) -> Plan:
    """The plan of a recorded sweep: its tasks come from the store, nothing is expanded again."""
    spec = load_spec(Document(manifest.sweep, store.spec_text(manifest)))
    return make_plan(store, spec, planned_tasks(store.plan_table(manifest)), only)


@dataclass(frozen=True)
class Cost:
    """What is left, estimated from rows of the same model, data set and recipe: seconds of one
    worker; `unknown` tasks have no such row yet."""

    worker_seconds: float
    unknown: int


def estimate(store: Store, plan: Plan) -> Cost:
    """The cost of a plan's unfinished tasks, from what finished ones took."""
    lines = store.sql(
        "select model, dataset, recipe_id, avg(seconds_prune + seconds_retrain) from rows"
        " where status = 'done' group by all"
    ).fetchall()
    known = {line[:3]: line[3] for line in lines}
    cells = [task.cell for shard in plan.shards for task in shard.tasks]
    seconds = [known.get((c.dense.model, c.dense.dataset, c.retrain.recipe_id)) for c in cells]
    return Cost(sum(s for s in seconds if s is not None), sum(s is None for s in seconds))
