"""Cells, tasks and rows made by hand or by hypothesis, for the tests of storage."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from storage.manifest import PlannedTask
from storage.records import Cell, Dense, Recipe, Removed, Row, Task, row_for
from storage.schema import SCHEMA
from storage.store import Store

DENSE = Dense("lenet5_mini", "mnist", Recipe(30, 256, ((0, 0.01), (20, 0.001)), "sgd", 0.9, False, 1e-4, seed=0))
RETRAIN = Recipe(30, 256, ((0, 0.001), (20, 0.0001)), momentum=0.9, weight_decay=1e-4)

ORACLE = Cell(DENSE, (("conv1", 0.2),), "oracle", RETRAIN)
SAMPLED = Cell(
    DENSE,
    (("conv1", 0.2), ("conv3", 0.4)),
    "oracle",
    RETRAIN,
    candidate_mode="sample",
    sampling_seed=0,
    loss_subset=512,
)
L1 = Cell(
    Dense("resnet56", "cifar10", Recipe(160, 128, ((0, 0.1),), seed=1), validation=0.1),
    (("layer1.0.conv1", 0.5),),
    "l1",
    Recipe(40, 128, ((0, 0.01),), optimizer="adamw", nesterov=True),
    propagation="released",
    precision="bf16",
)

NOON = dt.datetime(2025, 1, 31, 12)
SHA_A, SHA_B = "a" * 64, "b" * 64


def done(task: Task, **measured: Any) -> Row:
    """A finished row of `task`."""
    usual = {"dense_sha256": SHA_A, "started_at": NOON, "finished_at": NOON, "diverged": False}
    return row_for(task, "done", usual | measured)


def failed(task: Task, **measured: Any) -> Row:
    """A row of `task` with an error and no measurements."""
    usual = {"error_class": "RuntimeError", "error": "Traceback: boom", "finished_at": NOON}
    return row_for(task, "failed", usual | measured)


def tasks(cell: Cell, candidates: int, seeds: int = 1) -> list[Task]:
    """Every candidate crossed with every seed."""
    return [Task(cell, candidate, seed) for candidate in range(candidates) for seed in range(seeds)]


def plan(store: Store, name: str, planned: Iterable[Task], shard: str = "s0") -> None:
    """Record `planned` as the newest expansion of a sweep, in one shard."""
    store.write_manifest(name, f"name: {name}\n", [PlannedTask(shard, task) for task in planned])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content; and every folder, empty."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


# -- hypothesis ---------------------------------------------------------------------------------------

_finite = st.floats(allow_nan=False, allow_infinity=False)
_names = st.text(min_size=1, max_size=8)
_steps = st.lists(st.tuples(st.integers(0, 300), _finite), min_size=1, max_size=3).map(tuple)


def recipes(seed: st.SearchStrategy[int | None]) -> st.SearchStrategy[Recipe]:
    """Any recipe, within what JSON can say."""
    count = st.integers(1, 10**6)
    return st.builds(Recipe, count, count, _steps, _names, _finite, st.booleans(), _finite, seed)


def cells() -> st.SearchStrategy[Cell]:
    """Any cell."""
    dense = st.builds(Dense, _names, _names, recipes(st.integers(0, 2**63)), st.floats(0, 1, exclude_max=True))
    layers = st.lists(st.tuples(_names, st.floats(0, 1)), min_size=1, max_size=3).map(tuple)
    maybe = st.none() | st.integers(0, 2**63)
    more = {"granularity": _names, "propagation": _names, "schedule": _names, "precision": _names}
    numbers = {"loss_subset": maybe, "candidate_mode": _names, "sampling_seed": maybe, "pruner_seed": maybe}
    return st.builds(Cell, dense, layers, _names, recipes(st.none()), **(more | numbers))


def any_tasks() -> st.SearchStrategy[Task]:
    """Any task."""
    return st.builds(Task, cells(), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))


_text = st.text(max_size=20)
_int32 = st.integers(-(2**31), 2**31 - 1)
_curve = st.lists(st.none() | st.floats(width=32), max_size=4).map(tuple)
_removed = st.builds(Removed, st.text(max_size=5), st.lists(_int32, max_size=4).map(tuple))
_scores = st.dictionaries(st.text(max_size=5), st.floats(), max_size=3).map(lambda d: tuple(d.items()))
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": _text,
    "int32": _int32,
    "int64": st.integers(-(2**63), 2**63 - 1),
    "double": st.floats(),
    "bool": st.booleans(),
    "timestamp[us]": st.datetimes().map(lambda at: at.replace(fold=0)),
    "list<item: float>": _curve,
    "list<item: struct<layer: string, units: list<item: int32>>>": st.lists(_removed, max_size=3).map(tuple),
    "map<string, double>": _scores,
}


def any_rows() -> st.SearchStrategy[Row]:
    """Any row: identity from any task, every measured column null or any value of its type."""
    identity = {f.name for f in fields(Row) if f.default is not None}
    measured = {f.name: st.none() | _VALUES[str(f.type)] for f in SCHEMA if f.name not in identity}
    return st.builds(row_for, any_tasks(), st.sampled_from(["done", "failed"]), st.fixed_dictionaries(measured))
