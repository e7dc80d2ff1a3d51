"""The plan: which tasks are unfinished, the shards they run in, and who starts when."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.plan import Plan, estimate, make_plan, pack, plan_of_spec, plan_of_sweep, planned
from orchestrator.queue import Queue
from orchestrator.spec import load_spec
from storage.records import Dense, Shard, Task, row_for
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
    unfinished = [one for one in specs.plan_of(document) if draw.random() < share]
    shards = pack(unfinished, {})
    assert Counter(tasks_of(shards)) == Counter(one.task.task_id for one in unfinished)
    assert len({shard.shard_id for shard in shards}) == len(shards)
    for shard in shards:
        assert len({task.cell.cell_id for task in shard.tasks}) == 1
        assert len({task.candidate // block for task in shard.tasks}) == 1
    assert {shard.shard_id for shard in shards} == {one.shard for one in unfinished}


def test_shards_are_full() -> None:
    """No more shards than blocks of candidates: 10 and 45 candidates in blocks of 8 are 2 and 6 shards."""
    shards = pack(specs.plan_of(specs.document(TWO_CELLS, resources={"candidates_per_shard": 8})), {})
    assert [len(shard.tasks) for shard in shards] == [16, 4, 16, 16, 16, 16, 16, 10]


def test_a_shard_keeps_what_its_recipe_says() -> None:
    """`retrain.keep` reaches the shards of its own recipe, and no others."""
    document = specs.document(retrain=[specs.TRAINING | {"keep": "best"}, specs.TRAINING | {"epochs": 2}])
    shards = pack(specs.plan_of(document), expand.keeps(load_spec(document).retrain))
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


# -- the queue ----------------------------------------------------------------------------------

SMALL = {"ratio": 0.2, "model": ["lenet5_mini", "lenet5_mini_w20", "lenet5_mini_d6"]}
SOME = {"mode": "sample", "count": 8}


def small(precision: list[str] | None = None) -> tuple[tuple[Shard, ...], tuple[Dense, ...]]:
    """Shards of 3, 3 and 2 tasks of three models for each precision, and the models' dense trainings."""
    grid = SMALL | {"precision": precision or ["fp32"]}
    shards = pack(specs.plan_of(specs.document(grid, candidates=SOME, resources={"candidates_per_shard": 3})), {})
    return shards, tuple({shard.needs.dense_id: shard.needs for shard in shards}.values())


def drain(queue: Queue, precision: str = "fp32") -> list[Shard]:
    """Every shard that can start now."""
    found: list[Shard] = []
    while (shard := queue.next(precision)) is not None:
        found.append(shard)
    return found


def test_dense_models_first_and_dependents_wait() -> None:
    """Dense models start at once; what starts from one starts when it is there, and the rest at once."""
    shards, denses = small()
    queue = Queue.of(shards, denses[:2], random.Random(0))
    first = drain(queue)
    assert [shard.dense for shard in first[:2]] == list(denses[:2])
    assert {shard.needs for shard in first[2:]} == {denses[2]}
    assert len(first) == 2 + 3
    assert queue.next("fp32") is None
    assert not queue.exhausted("fp32")
    queue.succeeded(first[1].shard_id)
    assert {shard.needs for shard in drain(queue)} == {denses[1]}


def test_one_precision_after_the_other() -> None:
    """A process holds one precision: shards are given out by it, fp32 first, which trains the dense models."""
    shards, denses = small(["bf16", "fp32", "fp16"])
    queue = Queue.of(shards, denses, random.Random(0))
    assert queue.precisions == ["fp32", "bf16", "fp16"]
    assert drain(queue, "bf16") == []
    dense = drain(queue)
    assert [shard.dense for shard in dense] == list(denses)
    for shard in dense:
        queue.succeeded(shard.shard_id)
    for precision in ("fp32", "bf16", "fp16"):
        assert not queue.exhausted(precision)
        found = drain(queue, precision)
        assert sorted(shard.shard_id for shard in found) == sorted(
            s.shard_id for s in shards if s.precision == precision
        )
        for shard in found:
            queue.succeeded(shard.shard_id)
        assert queue.exhausted(precision)
    assert queue.precisions == []


def test_two_drivers_take_shards_in_orders_of_their_own() -> None:
    """Two drivers on one sweep seldom meet: each shuffles, and neither leaves one out."""
    shards, _ = small()
    orders = [[shard.shard_id for shard in Queue.of(shards, (), random.Random(seed)).waiting] for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1]) == {shard.shard_id for shard in shards}


def test_tasks_of_a_dead_shard_run_one_by_one() -> None:
    """One poisoned task cannot take its neighbours down: next they run alone, before anything else."""
    queue = Queue.of(small()[0], (), random.Random(0))
    dead = queue.next("fp32")
    assert dead
    queue.died(dead.shard_id)
    alone = [shard for _ in dead.tasks if (shard := queue.next("fp32"))]
    assert [shard.tasks for shard in alone] == [(task,) for task in dead.tasks]
    assert {shard.filed_under for shard in alone} == {dead.shard_id}
    assert len({shard.shard_id for shard in alone}) == len(dead.tasks)
    assert (queue.suspects, queue.problems) == ([], [])


def test_a_task_that_dies_alone_is_a_suspect() -> None:
    """The first death may be the machine's: it is tried once more, alone. Then the driver writes its failed row."""
    shards, _ = small()
    single = replace(shards[0], tasks=shards[0].tasks[:1])
    queue = Queue([single])
    assert queue.next("fp32") == single
    queue.died(single.shard_id)
    assert queue.suspects == []
    again = queue.next("fp32")
    assert again is not None and (again.tasks, again.filed_under) == (single.tasks, single.shard_id)
    queue.died(again.shard_id)
    assert queue.suspects == [again]
    assert queue.exhausted("fp32")


@pytest.mark.parametrize("dies", [True, False])
def test_a_lost_dense_model_takes_its_dependents_along(dies: bool) -> None:
    """Their tasks stay pending, the problem names the network, and other networks go on."""
    shards, denses = small()
    queue = Queue.of(shards, denses, random.Random(0))
    first = drain(queue)
    queue.died(first[0].shard_id) if dies else queue.failed(first[0].shard_id, "RuntimeError: out of memory")
    (problem,) = queue.problems
    assert "the dense model lenet5_mini on synthetic could not be trained, so 8 tasks stay pending" in problem
    assert problem.endswith("died" if dies else "RuntimeError: out of memory")
    assert drain(queue) == []
    for shard in first[1:]:
        queue.succeeded(shard.shard_id)
    rest = drain(queue)
    assert {shard.needs for shard in rest} == set(denses[1:])
    for shard in rest:
        queue.succeeded(shard.shard_id)
    assert queue.exhausted("fp32")
    assert queue.suspects == []


def test_a_shard_that_cannot_go_on_is_a_problem() -> None:
    """An error that is no task's own (the store is full) is told, and the tasks stay pending, untried."""
    queue = Queue.of(small()[0], (), random.Random(0))
    shard = queue.next("fp32")
    assert shard
    queue.failed(shard.shard_id, "StoreError: no space left")
    assert queue.problems == [
        f"shard {shard.shard_id} stopped, and its tasks stay pending: StoreError: no space left",
    ]
    assert queue.suspects == []
    assert shard.shard_id not in {other.shard_id for other in drain(queue)}


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.floats(0, 1), st.integers(0, 3))
def test_every_task_ends_exactly_once(draw: random.Random, workers: int, deaths: float, missing: int) -> None:
    """Whatever dies and in whatever order, each task is run to an end, suspected, or left with a problem told."""
    shards, denses = small(["fp32", "bf16"])
    queue = Queue.of(shards, denses[:missing], draw)
    trained = {dense.dense_id for dense in denses[missing:]}
    running: list[Shard] = []
    ended: list[Task] = []
    stopped: list[Shard] = []
    while queue.precisions:
        precision = queue.precisions[0]
        while not queue.exhausted(precision):
            while len(running) < workers and (shard := queue.next(precision)) is not None:
                assert shard.precision == precision
                assert shard.dense or shard.needs.dense_id in trained
                running.append(shard)
            assert running, "nothing runs and nothing ends: a run would hang"
            shard = running.pop(draw.randrange(len(running)))
            if draw.random() >= deaths:
                queue.succeeded(shard.shard_id)
                ended += shard.tasks
                trained |= {shard.dense.dense_id} if shard.dense else set()
            elif draw.random() < 0.2:
                queue.failed(shard.shard_id, "store")
                stopped.append(shard)
            else:
                queue.died(shard.shard_id)
                stopped += [shard] if shard.dense else []
        assert not running
    left = [task for shard in stopped for task in shard.tasks]
    lost = {shard.dense.dense_id for shard in stopped if shard.dense}
    left += [task for shard in shards for task in shard.tasks if task.cell.dense.dense_id in lost]
    ended += [task for shard in queue.suspects for task in shard.tasks]
    every = Counter(task.task_id for shard in shards for task in shard.tasks)
    assert Counter(task.task_id for task in [*ended, *left]) == every
    assert all(len(shard.tasks) == 1 for shard in queue.suspects)
    assert len(queue.problems) == len(stopped)


def test_planned_tasks_know_their_shard() -> None:
    """The plan names each task's shard by its block of candidates, the same for every seed."""
    document = specs.document(TWO_CELLS, resources={"candidates_per_shard": 4})
    found: dict[tuple[str, int], set[str]] = {}
    for one in specs.plan_of(document):
        found.setdefault((one.task.cell.cell_id, one.task.candidate // 4), set()).add(one.shard)
    assert all(len(names) == 1 for names in found.values())
    assert len(found) == 3 + 12
