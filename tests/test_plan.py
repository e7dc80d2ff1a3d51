"""The plan: which tasks are unfinished, the shards they run in, and who starts when."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.plan import Plan, block_size, estimate, make_plan, pack, plan_of_spec, plan_of_sweep, planned
from orchestrator.spec import load_spec
from storage.records import Shard, Task, row_for
from storage.store import Store
from tests import specs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, tasks: Iterable[Task], status: str = "done", **measured: object) -> None:
    """Rows of `tasks`, as a worker leaves them."""
    store.commit_rows("made", [row_for(task, status, measured) for task in tasks])


def plan(store: Store, document: Document) -> Plan:
    """What `run` would do with a document now."""
    return plan_of_spec(store, load_spec(document), document)


def tasks_of(shards: Iterable[Shard]) -> list[str]:
    """The ids of all tasks in some shards."""
    return [task.task_id for shard in shards for task in shard.tasks]


TWO_CELLS = {"ratio": [0.1, 0.2], "seed": [0, 1]}
"""10 and 45 candidates, with two seeds each."""


@settings(max_examples=40)
@given(st.integers(1, 60), st.randoms(use_true_random=False), st.floats(0, 1))
def test_packing_is_a_partition(block: int, draw: random.Random, share: float) -> None:
    """Every unfinished task is in exactly one shard, and a shard is of one cell and one block of candidates."""
    document = specs.document(TWO_CELLS, resources={"candidates_per_shard": block})
    whole = specs.plan_of(document)
    unfinished = whole.filter(pa.array([draw.random() < share for _ in range(len(whole))]))
    shards = pack(unfinished, {}, block)
    assert tasks_of(shards) == unfinished["task_id"].to_pylist()
    assert len({shard.shard_id for shard in shards}) == len(shards)
    for shard in shards:
        assert len({task.cell.cell_id for task in shard.tasks}) == 1
        assert len({task.candidate // block for task in shard.tasks}) == 1
    assert {shard.shard_id for shard in shards} == set(unfinished["shard"].to_pylist())


def test_shards_are_full() -> None:
    """No more shards than blocks of candidates: 10 and 45 candidates in blocks of 8 are 2 and 6 shards."""
    shards = pack(specs.plan_of(specs.document(TWO_CELLS, resources={"candidates_per_shard": 8})), {}, 8)
    assert [len(shard.tasks) for shard in shards] == [16, 4, 16, 16, 16, 16, 16, 10]


def test_shards_grow_with_the_grid() -> None:
    """Unless their size is given: half the square root of all candidates, a power of two, 8 at least."""
    auto, given = load_spec(specs.document()), load_spec(specs.document(resources={"candidates_per_shard": 5}))
    sizes = {n: block_size(auto, n) for n in (1, 100, 1_000, 5_000, 500_000, 10**7)}
    assert sizes == {1: 8, 100: 8, 1_000: 8, 5_000: 32, 500_000: 256, 10**7: 1024}
    assert block_size(given, 10**6) == 5
    candidates = {"mode": "sample", "count": 5_010}
    document = specs.document({"model": "lenet5", "layers": "conv3"}, candidates=candidates)
    shards = list(planned(load_spec(document), document))
    assert {len(shard.tasks) for shard in shards[:-1]} == {32} and {shard.block for shard in shards} == {32}
    assert sum(len(shard.tasks) for shard in shards) == candidates["count"]


def test_a_shard_keeps_what_its_recipe_says() -> None:
    """`retrain.keep` reaches the shards of its own recipe, and no others."""
    document = specs.document(retrain=[specs.TRAINING | {"keep": "best"}, specs.TRAINING | {"epochs": 2}])
    shards = pack(specs.plan_of(document), expand.keeps(load_spec(document).retrain), 8)
    assert {(shard.tasks[0].cell.retrain.epochs, shard.keep) for shard in shards} == {(1, "best"), (2, "none")}


def test_shard_ids_do_not_depend_on_what_is_done(store: Store) -> None:
    """A task runs in the same shard whenever it runs, so that a resumed shard finds its own rows."""
    document = specs.document(TWO_CELLS)
    before = {task.task_id: shard.shard_id for shard in plan(store, document).shards for task in shard.tasks}
    tasks = specs.tasks(document)
    put(store, random.Random(0).sample(tasks, 70))
    after = {task.task_id: shard.shard_id for shard in plan(store, document).shards for task in shard.tasks}
    assert len(after) == len(tasks) - 70
    assert after.items() <= before.items()


def test_unfinished_is_the_anti_join_with_done(store: Store) -> None:
    """What is run is every task without a row `done`: pending and failed ones, in the order of the grid."""
    document = specs.document(TWO_CELLS)
    tasks = specs.tasks(document)
    done, failed, both = tasks[3:50], tasks[50:60], tasks[60:64]
    put(store, [*done, *both])
    put(store, [*failed, *both], "failed")
    found = plan(store, document)
    left = [task.task_id for task in tasks if task not in done and task not in both]
    assert tasks_of(found.shards) == left
    assert (found.total, len(found.cells), found.unfinished) == (110, 2, len(left))
    assert found.statuses == {"done": 51, "failed": 10, "pending": 49}


def test_only_narrows_what_is_run(store: Store) -> None:
    """`resume --where` runs of the unfinished tasks those that were chosen, and counts all."""
    document = specs.document(TWO_CELLS)
    tasks = specs.tasks(document)
    put(store, tasks[:5])
    chosen = frozenset(task.task_id for task in tasks[3:9])
    found = make_plan(store, load_spec(document), specs.plan_of(document), chosen)
    assert tasks_of(found.shards) == [task.task_id for task in tasks[5:9]]
    assert found.statuses == {"done": 5, "failed": 0, "pending": 105}


def test_a_finished_sweep_has_nothing_to_run(store: Store) -> None:
    """Rows belong to tasks, not to sweeps: the same grid under another name is done already."""
    put(store, specs.tasks(specs.document(TWO_CELLS)))
    found = plan(store, specs.document(TWO_CELLS, name="other"))
    assert (found.shards, found.denses, found.statuses["done"]) == ((), (), 110)


@pytest.mark.parametrize(
    ("axis", "values", "new"),
    [("seed", [0, 1, 2], 55), ("ratio", [0.1, 0.2, 0.9], 20), ("pruner", ["oracle", "l1"], 4)],
)
def test_widening_a_grid_adds_only_the_new_tasks(store: Store, axis: str, values: list[object], new: int) -> None:
    """A longer axis keeps every finished task, whichever axis it is."""
    before = specs.tasks(specs.document(TWO_CELLS))
    put(store, before)
    old = {task.task_id for task in before}
    wider = specs.document(TWO_CELLS | {axis: values})
    found = plan(store, wider)
    assert tasks_of(found.shards) == [task_id for task_id in specs.ids(wider) if task_id not in old]
    assert (found.unfinished, found.statuses["done"]) == (new, 110)


def test_a_larger_sample_adds_only_the_new_draws(store: Store) -> None:
    """A sampled sweep grows by its count."""
    few = specs.document(candidates={"mode": "sample", "count": 5})
    put(store, specs.tasks(few))
    more = plan(store, specs.document(candidates={"mode": "sample", "count": 9}))
    assert [task.candidate for shard in more.shards for task in shard.tasks] == [5, 6, 7, 8]


def test_a_recorded_sweep_plans_alike(store: Store) -> None:
    """`resume` reads the tasks from the store: the same shards and dense models as the spec gives."""
    document = specs.document(TWO_CELLS, candidates={"mode": "sample", "count": 7})
    put(store, specs.tasks(document)[::3])
    spec = load_spec(document)
    manifest = store.write_manifest(spec.name, document.text(), planned(spec, document))
    assert plan_of_sweep(store, manifest) == plan_of_spec(store, spec, document)


def test_missing_dense_models_are_listed_once(store: Store) -> None:
    """Each network that unfinished tasks start from is trained once, and not where it is there already."""
    document = specs.document(TWO_CELLS | {"model": ["lenet5_mini", "lenet5_mini_w20"], "dataset": ["digits"]})
    found = plan(store, document)
    assert [dense.model for dense in found.denses] == ["lenet5_mini", "lenet5_mini_w20"]
    store.commit_dense(found.denses[0].dense_id, b"weights")
    assert plan(store, document).denses == found.denses[1:]
    put(store, [task for task in specs.tasks(document) if task.cell.dense == found.denses[1]])
    assert plan(store, document).denses == ()


def test_cost_is_that_of_finished_tasks(store: Store) -> None:
    """The estimate is the mean time of finished tasks of the same recipe; the rest is said to be unknown."""
    document = specs.document(TWO_CELLS, retrain=[specs.TRAINING, specs.TRAINING | {"epochs": 2}])
    tasks = specs.tasks(document)
    known = [task for task in tasks if task.cell.retrain.epochs == 1]
    assert estimate(store, plan(store, document)).unknown == 220
    put(store, known[:2], seconds_prune=1.0, seconds_retrain=2.0)
    put(store, known[2:4], seconds_prune=1.0, seconds_retrain=4.0)
    put(store, known[4:5], "failed", seconds_prune=100.0, seconds_retrain=100.0)
    cost = estimate(store, plan(store, document))
    assert (cost.worker_seconds, cost.unknown) == (4.0 * 106, 110)


def test_planned_tasks_know_their_shard() -> None:
    """The plan names each task's shard by its block of candidates, the same for every seed."""
    document = specs.document(TWO_CELLS, resources={"candidates_per_shard": 4})
    found: dict[tuple[str, int], set[str]] = {}
    for one in specs.plan_of(document).to_pylist():
        found.setdefault((one["cell_id"], one["candidate"] // 4), set()).add(one["shard"])
    assert all(len(names) == 1 for names in found.values())
    assert len(found) == 3 + 12
