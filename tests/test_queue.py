"""The queue: what follows from how a shard ended, each kind of failure with its own budget."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.account import Account
from orchestrator.endings import End, Ending, seen
from orchestrator.progress import Progress
from orchestrator.queue import (
    ALONE_TRIES,
    IN_A_ROW,
    NODE_LOSSES,
    PROCESS_DIED,
    SHARD_DEATHS,
    STARTS_LOST,
    TIMED_OUT,
    Burial,
    Queue,
)
from storage.errors import StoreError
from storage.records import Cell, Dense, Shard, Task
from storage.schema import table_to_rows
from storage.store import Store
from tests.rows import DENSE, L1, ORACLE, SAMPLED, failed, tasks
from workers.worker import OUT_OF_MEMORY, PAUSE_AFTER

BF16 = replace(ORACLE, precision="bf16")
"""A cell in another precision that starts from the same dense model as ORACLE and SAMPLED."""

TRAINING = f"dense-{DENSE.dense_id}"


def shard(name: str = "s0", n: int = 3, cell: Cell = ORACLE) -> Shard:
    """A shard of `n` tasks."""
    return Shard(name, tuple(tasks(cell, n)), keep="last")


def queue(*shards: Shard, denses: Iterable[Dense] = ()) -> Queue:
    """A queue of shards, in this order."""
    made = Queue.of((), denses, random.Random(0))
    made.waiting.extend(shards)
    return made


def start(of: Queue, precision: str = "fp32") -> Shard:
    """The next shard, which must be there."""
    found = of.next(precision)
    assert found is not None
    return found


def end(of: Queue, shard: Shard, kind: End, at: Task | None = None) -> list[Burial]:
    """A shard ends at a task, or nobody knows where."""
    return of.ended(shard.shard_id, Ending(kind, f"because of {kind}", at.task_id if at else None))


def is_over(of: Queue) -> bool:
    """Nothing waits and nothing runs."""
    return not of.waiting and not of.running and of.precision is None and of.exhausted("fp32")


# -- what starts when ---------------------------------------------------------------------------------


def test_a_driver_has_an_order_of_its_own() -> None:
    """Dense models come first; the shards come whole, once each, in an order that the random source gives."""
    shards = [shard(f"s{i}") for i in range(20)]
    orders = []
    for seed in (0, 0, 1):
        made = Queue.of(shards, [DENSE], random.Random(seed))
        assert made.waiting[0].dense == DENSE
        orders.append([one.shard_id for one in made.waiting[1:]])
    assert sorted(orders[0]) == sorted(one.shard_id for one in shards)
    assert orders[0] == orders[1] != orders[2]


def test_what_starts_from_a_dense_model_waits_for_it() -> None:
    """A shard starts once its dense model is there; those of other dense models do not wait with it."""
    of = queue(shard("mine"), shard("other", cell=L1), denses=[DENSE])
    training = start(of)
    assert (training.shard_id, training.dense, training.tasks) == (TRAINING, DENSE, ())
    assert of.next("fp32") is None and not of.exhausted("fp32")
    assert start(of, "bf16").shard_id == "other"
    assert end(of, training, End.FINISHED) == []
    assert start(of).shard_id == "mine"


def test_a_shard_that_another_driver_has_waits() -> None:
    """It is handed out once the other driver is gone, its tasks run alone too; meanwhile the queue is not
    exhausted, and the others go on."""
    of = queue(shard("s0"), shard("s1"))
    assert of.next("fp32", frozenset({"s0"})) == shard("s1")
    assert of.next("fp32", frozenset({"s0", "s1"})) is None
    end(of, shard("s1"), End.FINISHED)
    assert of.precision == "fp32" and not of.exhausted("fp32")
    for _ in range(SHARD_DEATHS + 1):
        assert start(of).shard_id == "s0"
        end(of, shard("s0"), End.DIED)
    assert of.next("fp32", frozenset({"s0"})) is None and of.next("fp32", frozenset({"s1"})) is not None


def test_one_precision_after_the_other() -> None:
    """fp32 comes first, a precision is handed out only when asked for, and is over when none of it is left."""
    of = queue(shard("low", cell=BF16), shard("high"))
    assert of.precision == "fp32"
    high = start(of)
    assert of.precision == "bf16" and not of.exhausted("fp32")
    assert of.next("fp32") is None
    end(of, high, End.FINISHED)
    assert of.exhausted("fp32") and not of.exhausted("bf16")
    end(of, start(of, "bf16"), End.FINISHED)
    assert is_over(of)


def test_a_dense_model_that_another_precision_needs_again_is_no_dead_end() -> None:
    """bf16 shards whose dense model is gone end their precision; its training in fp32 comes next, then they."""
    of = queue(shard("a", cell=BF16), shard("b", cell=BF16))
    for one in [start(of, "bf16"), start(of, "bf16")]:
        assert end(of, one, End.NO_DENSE) == []
    assert of.exhausted("bf16") and of.next("bf16") is None
    assert of.precision == "fp32"
    training = start(of)
    assert training.dense == DENSE and of.exhausted("bf16") is False
    assert of.precision is None and of.next("fp32") is None
    end(of, training, End.FINISHED)
    assert of.exhausted("fp32") and of.precision == "bf16"
    assert [start(of, "bf16").shard_id for _ in range(2)] == ["a", "b"]
    assert of.problems == []


# -- what follows from how a shard ended --------------------------------------------------------------


@pytest.mark.parametrize("kind", [End.FINISHED, End.STOPPED, End.REPEATED])
def test_what_has_ended_for_good(kind: End) -> None:
    """A shard that finished, was stopped, or failed again and again at one place does not come back."""
    of = queue(shard())
    assert end(of, start(of), kind) == []
    assert is_over(of) and of.problems == [] and of.store_problem is None


def test_deaths() -> None:
    """A shard whose process died runs again whole, then its tasks one by one; one that dies twice alone has
    failed, and its neighbours go on."""
    of = queue(whole := shard())
    for _ in range(SHARD_DEATHS + 1):
        assert start(of) == whole
        assert end(of, whole, End.DIED, whole.tasks[1]) == []
    alone = [start(of) for _ in range(3)]
    assert of.waiting == [] and [one.tasks for one in alone] == [(task,) for task in whole.tasks]
    assert len({one.shard_id for one in alone}) == 3
    assert {(one.filed_under, one.keep) for one in alone} == {("s0", "last")}

    deadly = alone[1]
    for _ in range(ALONE_TRIES - 1):
        assert end(of, deadly, End.DIED, deadly.tasks[0]) == []
        assert start(of) == deadly
    (burial,) = end(of, deadly, End.DIED, deadly.tasks[0])
    assert (burial.filed_under, burial.task, burial.error_class) == ("s0", whole.tasks[1], PROCESS_DIED)
    assert "because of died" in burial.error and str(ALONE_TRIES) in burial.error
    assert [end(of, one, End.FINISHED) for one in (alone[0], alone[2])] == [[], []]
    assert is_over(of) and of.problems == []


def test_a_dense_model_whose_process_dies_twice() -> None:
    """It takes what starts from it along: said once, with how many tasks stay pending."""
    of = queue(shard("a", 3), shard("b", 2, SAMPLED), shard("c", cell=L1), denses=[DENSE])
    for _ in range(SHARD_DEATHS + 1):
        assert of.problems == []
        assert end(of, start(of), End.DIED) == []
    (problem,) = of.problems
    assert "lenet5_mini on mnist could not be trained, so 5 tasks stay pending" in problem and "died" in problem
    assert [one.shard_id for one in of.waiting] == ["c"]


def test_preemption_costs_nothing() -> None:
    """A machine that is taken away is nobody's fault: the shard comes back however often it happens."""
    of = queue(whole := shard())
    for _ in range(50):
        assert start(of) == whole
        assert end(of, whole, End.PREEMPTED, whole.tasks[0]) == []
    assert start(of) == whole and of.problems == []
    for _ in range(SHARD_DEATHS):  # nor does it count as a death
        end(of, whole, End.DIED)
        assert start(of) == whole


def test_a_shard_that_a_worker_found_elsewhere_comes_last() -> None:
    """Another driver's worker is at it: it costs nothing, however often, and whatever else there is comes first."""
    of = queue(shard("s0"), shard("s1"), shard("s2"))
    for _ in range(10):
        assert end(of, first := start(of), End.ELSEWHERE) == []
        assert of.waiting[-1] == first
    assert sorted(one.shard_id for one in of.waiting) == ["s0", "s1", "s2"] and of.problems == []


def test_memory_short_beside_others_and_alone() -> None:
    """A task that ran out of memory beside others runs alone, its neighbours without it; alone, it has failed."""
    of = queue(whole := shard())
    assert end(of, start(of), End.NO_MEMORY, whole.tasks[1]) == []
    alone, rest = start(of), start(of)
    assert alone.tasks == whole.tasks[1:2] and alone.filed_under == "s0" and alone.shard_id != "s0"
    assert rest == replace(whole, tasks=(whole.tasks[0], whole.tasks[2]))
    reason = "because of no memory"
    assert end(of, alone, End.NO_MEMORY, whole.tasks[1]) == [Burial("s0", whole.tasks[1], OUT_OF_MEMORY, reason)]
    # The next one of the same shard is set apart likewise, down to the last: what ran before it may be in its way.
    assert end(of, rest, End.NO_MEMORY, whole.tasks[0]) == []
    assert start(of).tasks == whole.tasks[:1]
    last = start(of)
    assert last == replace(whole, tasks=whole.tasks[2:])
    assert end(of, last, End.NO_MEMORY, whole.tasks[2]) == []
    again = start(of)
    assert again.tasks == last.tasks and again.shard_id != last.shard_id
    assert [b.task for b in end(of, again, End.NO_MEMORY, whole.tasks[2])] == [whole.tasks[2]]
    assert of.waiting == [] and of.problems == []


def test_memory_short_at_no_task_is_a_death() -> None:
    """Memory that ran out before the first task, or of a dense model, has the budget of a death."""
    of = queue(whole := shard(), denses=[Dense("lenet5", "mnist", DENSE.recipe)])
    for _ in range(SHARD_DEATHS + 1):
        assert end(of, start(of), End.NO_MEMORY) == []
    assert len(of.problems) == 1 and "the dense model lenet5 on mnist" in of.problems[0]
    for _ in range(SHARD_DEATHS + 1):
        assert start(of) == whole
        assert end(of, whole, End.NO_MEMORY) == []
    assert [one.tasks for one in of.waiting] == [(task,) for task in whole.tasks]


def test_nodes_that_are_lost() -> None:
    """A shard whose node is lost is run again whole, some times at each task; then as if its process had died. Where it
    had not begun, workers that started there are not held to have failed."""
    of = queue(whole := shard())

    def lost(note: dict[str, object] | None) -> None:
        assert of.ended(start(of).shard_id, seen(note, "gone", node_lost=True)) == []

    for _ in range(STARTS_LOST):
        lost(None)
        assert of.waiting == [whole] and of.problems == []
    at: list[dict[str, object]] = [{"task": task.task_id} for task in whole.tasks[:2]]
    assert seen(at[0], "gone", node_lost=True, preempted=True).kind is End.PREEMPTED
    for note in [*at * NODE_LOSSES, at[0]]:
        lost(note)
        assert of.waiting == [whole]
    lost(at[0])
    assert [one.tasks for one in of.waiting] == [(task,) for task in whole.tasks]


def test_a_shard_whose_nodes_are_lost_as_it_begins() -> None:
    """It is not begun for ever: its tasks stay pending, and the run says so."""
    of = queue(shard())
    for _ in range(STARTS_LOST + 1):
        assert of.ended(start(of).shard_id, seen(None, "gone", node_lost=True)) == []
    assert of.waiting == [] and "its tasks stay pending: gone" in of.problems[0]


def test_out_of_time() -> None:
    """A task that did not end within its limit has failed at once; the rest of its shard goes on."""
    of = queue(whole := shard())
    (burial,) = end(of, start(of), End.TIME, whole.tasks[0])
    assert (burial.filed_under, burial.task, burial.error_class) == ("s0", whole.tasks[0], TIMED_OUT)
    rest = start(of)
    assert rest == replace(whole, tasks=whole.tasks[1:])
    assert [b.task for b in end(of, rest, End.TIME, whole.tasks[2])] == [whole.tasks[2]]
    last = start(of)
    assert [b.task for b in end(of, last, End.TIME, whole.tasks[1])] == [whole.tasks[1]]
    assert is_over(of) and of.problems == []


@pytest.mark.parametrize("dense", [False, True], ids=["tasks", "dense"])
def test_out_of_time_at_no_task_does_not_go_on_for_ever(dense: bool) -> None:
    """A time limit that is over before the first task has a budget too, and leaves nothing waiting unsaid."""
    of = queue(shard(), denses=[DENSE] if dense else [])
    for _ in range(50):
        if is_over(of):
            break
        end(of, start(of), End.TIME)
    assert is_over(of)


@pytest.mark.parametrize("kind", [End.STORE, End.NOT_STARTED])
def test_three_in_a_row_end_the_run(kind: End) -> None:
    """A store that gives out, or workers that do not start, end the run at the third time, and it says why."""
    of = queue(*(shard(f"s{i}") for i in range(5)))
    started = [start(of) for _ in range(IN_A_ROW)]
    for one in started[:-1]:
        assert end(of, one, kind) == []
        assert of.waiting[0] == one and (of.problems, of.store_problem) == ([], None)
    assert end(of, started[-1], kind) == []
    assert is_over(of)
    reason = f"because of {kind}"
    if kind is End.STORE:
        assert (of.store_problem, of.problems) == (reason, [])
    else:
        assert of.store_problem is None and len(of.problems) == 1 and of.problems[0].endswith(reason)


@pytest.mark.parametrize("kind", [End.STORE, End.NOT_STARTED])
@pytest.mark.parametrize("between", [kind for kind in End if kind not in (End.STORE, End.NOT_STARTED)])
def test_any_other_ending_is_a_new_start(kind: End, between: End) -> None:
    """Only failures in a row count: after any other ending the store and the workers have all their tries."""
    of = queue(*(shard(f"s{i}", cell=replace(ORACLE, dense=replace(DENSE, model=f"m{i}"))) for i in range(9)))

    def problems() -> int:
        return (of.store_problem is not None) + sum("did not start" in problem for problem in of.problems)

    for _ in range(IN_A_ROW - 1):
        end(of, start(of), kind)
    end(of, one := start(of), between, one.tasks[0])
    for _ in range(IN_A_ROW - 1):
        end(of, start(of), kind)
    assert problems() == 0
    end(of, start(of), kind)
    assert problems() == 1 and of.waiting == []


def test_dense_weights_that_are_gone() -> None:
    """They are trained again, once, while all that starts from them waits; the second time is a problem."""
    of = queue(shard("a"), shard("b"), shard("c", cell=SAMPLED), shard("d", cell=L1))
    first, second = start(of), start(of)
    assert end(of, first, End.NO_DENSE) == end(of, second, End.NO_DENSE) == []
    assert [one.shard_id for one in of.waiting if one.dense] == [TRAINING]
    training = start(of)
    assert training.shard_id == TRAINING and of.next("fp32") is None
    end(of, training, End.FINISHED)
    again = [start(of) for _ in range(3)]
    assert [one.shard_id for one in again] == ["c", "a", "b"]
    assert of.problems == []
    assert end(of, again[0], End.NO_DENSE) == []
    (problem,) = of.problems
    assert problem.startswith("shard c stopped, and its tasks stay pending")
    assert [one.shard_id for one in of.waiting] == ["d"]


def test_a_dense_model_that_cannot_be_trained() -> None:
    """An error of its training takes the shards that start from it along, and no others."""
    of = queue(shard("a"), shard("b", 2, BF16), shard("c", cell=L1), denses=[DENSE, L1.dense])
    assert end(of, start(of), End.ERROR) == []
    (problem,) = of.problems
    assert problem.startswith("the dense model lenet5_mini on mnist could not be trained, so 5 tasks stay pending")
    assert problem.endswith("because of error")
    assert [one.shard_id for one in of.waiting] == [f"dense-{L1.dense.dense_id}", "c"]


def test_what_ran_while_its_dense_model_could_not_be_trained_again() -> None:
    """A shard that comes back after that does not wait for ever: it finds no dense weights, and that is said."""
    of = queue(shard("a"), shard("b"))
    first, second = start(of), start(of)
    end(of, first, End.NO_DENSE)
    end(of, start(of), End.ERROR)
    end(of, second, End.PREEMPTED)
    end(of, start(of), End.NO_DENSE)
    assert is_over(of)
    assert [problem.split(",")[0].split(" could")[0] for problem in of.problems] == [
        "the dense model lenet5_mini on mnist",
        "shard b stopped",
    ]


def test_an_error_that_is_no_tasks_own() -> None:
    """What the shard did not do stays pending and is said; the others go on."""
    of = queue(shard("a"), shard("b"))
    assert end(of, start(of), End.ERROR) == []
    assert of.problems == ["shard a stopped, and its tasks stay pending: because of error"]
    assert [one.shard_id for one in of.waiting] == ["b"]


# -- a cell that fails --------------------------------------------------------------------------------


def fail(of: Queue, task: Task, line: int = 1) -> None:
    """A task's failed row comes in, with a traceback that ends at a line."""
    error = f'Traceback (most recent call last):\n  File "task.py", line {line}, in run\nRuntimeError: boom {task.seed}'
    Account(Store("nowhere"), of, Progress(9)).row(failed(task, error=error))


def test_a_cell_whose_tasks_fail_at_one_place_is_paused() -> None:
    """After so many the cell's shards are no longer handed out, which is said once; other cells go on."""
    of = queue(shard("a"), shard("b", cell=SAMPLED), shard("c"))
    several = tasks(ORACLE, 1, seeds=2 * PAUSE_AFTER)
    for task in several[: PAUSE_AFTER - 1]:
        fail(of, task)
    assert len(of.waiting) == 3 and of.problems == []
    fail(of, several[PAUSE_AFTER - 1])
    assert [one.shard_id for one in of.waiting] == ["b"]
    (problem,) = of.problems
    assert problem.startswith(f"cell {ORACLE.cell_id} is paused")
    assert f"(RuntimeError: boom {PAUSE_AFTER - 1})" in problem
    for task in several:
        fail(of, task)
        fail(of, task, line=2)
    assert of.problems == [problem]


def test_failures_here_and_there_pause_nothing() -> None:
    """Failures at different places, or in different cells, are tasks' own."""
    of = queue(shard("a"), shard("b", cell=SAMPLED), denses=[DENSE])
    for i, task in enumerate(tasks(ORACLE, 4 * PAUSE_AFTER)):
        fail(of, task, line=i)
    for cell in (ORACLE, SAMPLED):
        for task in tasks(cell, PAUSE_AFTER - 1):
            fail(of, task, line=100)
    assert len(of.waiting) == 3 and of.problems == []


def test_one_task_that_fails_again_and_again_pauses_nothing() -> None:
    """A shard that is preempted often tries its failed task as often: still it is one task that failed."""
    of = queue(whole := shard("a"))
    for _ in range(2 * PAUSE_AFTER):
        started = start(of)
        fail(of, whole.tasks[0])
        end(of, started, End.PREEMPTED)
    assert of.problems == [] and of.waiting


def test_a_paused_cell_leaves_its_dense_model_alone() -> None:
    """Pausing a cell takes tasks, not the training of what others start from."""
    of = queue(shard("a"), denses=[DENSE])
    for task in tasks(ORACLE, PAUSE_AFTER):
        fail(of, task)
    assert [one.shard_id for one in of.waiting] == [TRAINING]


AFTERWARDS = [kind for kind in End if kind not in (End.FINISHED, End.STOPPED, End.REPEATED, End.ERROR)]
"""Endings after which a shard, or a part of it, would run again."""


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_a_paused_cell_stays_paused(kind: End) -> None:
    """A shard of it that was running then, and would run again, does not."""
    of = queue(shard("a"), shard("b", cell=SAMPLED))
    running = start(of)
    for task in tasks(ORACLE, PAUSE_AFTER):
        fail(of, task)
    end(of, running, kind, running.tasks[0])
    assert [one.shard_id for one in of.waiting if one.tasks] == ["b"]


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_a_halted_queue_hands_out_nothing_more(kind: End) -> None:
    """What was running when the run was halted may end, and does not start again."""
    of = queue(shard("a"), shard("b"))
    running = start(of)
    of.halt()
    end(of, running, kind, running.tasks[0])
    assert is_over(of)


# -- burials ------------------------------------------------------------------------------------------


def test_a_buried_task_has_a_failed_row(tmp_path: Path) -> None:
    """The driver writes it, filed as the shard's others are, and counts it."""
    of, store, shown = queue(whole := shard()), Store(tmp_path), Progress(3)
    end(of, start(of), End.NO_MEMORY, whole.tasks[1])
    alone = start(of)
    account = Account(store, of, shown)
    account.ended(alone.shard_id, Ending(End.NO_MEMORY, "it was too large", whole.tasks[1].task_id))
    (row,) = table_to_rows(store.row_files()[0])
    assert (row.task_id, row.status, row.error_class) == (whole.tasks[1].task_id, "failed", OUT_OF_MEMORY)
    assert row.error == "it was too large" and row.finished_at is not None and row.host
    assert store.row_file_names()[0].startswith("rows/s0-")
    assert (shown.done, shown.failed) == (0, 1)


def test_a_burial_that_the_store_does_not_take_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that would be lost is not passed over."""

    def full(*_: object) -> str:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "commit_rows", full)
    of = queue(whole := shard(), shard("s1"))
    account = Account(Store(tmp_path), of, shown := Progress(3))
    account.ended(start(of).shard_id, Ending(End.TIME, "", whole.tasks[0].task_id))
    assert of.store_problem == "the disk is full" and is_over(of)
    assert (shown.done, shown.failed) == (0, 0)


# -- whatever happens ---------------------------------------------------------------------------------

GOOD, KILLS, EATS, HANGS, RAISES = "good", "kills", "eats", "hangs", "raises"
VERDICTS = {KILLS: PROCESS_DIED, EATS: OUT_OF_MEMORY, HANGS: TIMED_OUT, RAISES: "ValueError"}
DENSE_FATES = (GOOD, KILLS, RAISES)
CELLS = (ORACLE, SAMPLED, BF16, L1)


@dataclass
class Pretended:
    """A runner that trains nothing: each task and each dense model has a fate, and the rest is chance.

    It does as workers do: a task that is done is skipped, one that failed is tried again. What happens
    from outside happens less often than the budgets allow, but for preemption, which has none.
    """

    queue: Queue
    fates: dict[str, str]
    chance: random.Random
    slots: int
    trained: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    buried: Counter[str] = field(default_factory=Counter)
    outside: Counter[End] = field(
        default_factory=lambda: Counter(
            {
                End.PREEMPTED: 20,
                End.NODE_LOST: NODE_LOSSES,
                End.ELSEWHERE: 20,
                End.STORE: IN_A_ROW - 1,
                End.NOT_STARTED: IN_A_ROW - 1,
                End.DIED: ALONE_TRIES - 1,
            }
        )
    )
    steps: int = 0

    def run(self) -> None:
        """As both runners do, to the end."""
        while precision := self.queue.precision:
            while not self.queue.exhausted(precision):
                self.steps += 1
                assert self.steps < 5000, "the queue does not end"
                self._step(precision)

    def _step(self, precision: str) -> None:
        running = list(self.queue.running.values())
        if len(running) < self.slots and (not running or self.chance.random() < 0.5):
            names = {one.filed_under for one in self.queue.waiting}
            elsewhere = frozenset(name for name in names if self.chance.random() < 0.2)
            started = self.queue.next(precision, elsewhere)
            if started is not None:
                assert started.precision == precision and started.filed_under not in elsewhere
                assert started.dense or started.needs.dense_id not in self.queue.pending_dense
            self._check_once()
        elif running:
            one = self.chance.choice(running)
            for burial in self.queue.ended(one.shard_id, self._run(one)):
                assert burial.filed_under == one.filed_under
                self.buried[burial.task.task_id] += 1
                self.verdicts.setdefault(burial.task.task_id, []).append(burial.error_class)
            self._check_once()

    def _check_once(self) -> None:
        """No task is twice in the queue, and no two shards have one name."""
        shards = [*self.queue.waiting, *self.queue.running.values()]
        assert max(Counter(one.shard_id for one in shards).values(), default=1) == 1
        assert max(Counter(task.task_id for one in shards for task in one.tasks).values(), default=1) == 1

    def _run(self, shard: Shard) -> Ending:
        """What comes of a shard, to its end."""
        left = +self.outside
        outside = self.chance.choice([*left, None, None]) if left else None
        if outside is not None and self.chance.random() < 0.5:
            self.outside[outside] -= 1
            begun = outside not in (End.NOT_STARTED, End.ELSEWHERE)
            done = self.chance.randrange(len(shard.tasks) + 1) if begun else 0
            ended = self._work(replace(shard, tasks=shard.tasks[:done])) if done else None
            return ended if ended and ended.kind is not End.FINISHED else Ending(outside, "outside")
        if shard.dense:
            return self._train(shard.dense.dense_id)
        return self._work(shard)

    def _train(self, dense_id: str) -> Ending:
        fate = self.fates[dense_id]
        if fate != GOOD:
            return Ending(End.DIED if fate == KILLS else End.ERROR, "diverged")
        self.trained.add(dense_id)
        return Ending(End.FINISHED)

    def _work(self, shard: Shard) -> Ending:
        if shard.needs.dense_id not in self.trained:
            return Ending(End.NO_DENSE)
        for task in shard.tasks:
            fate = self.fates[task.task_id]
            if self.done[task.task_id]:
                continue
            if fate == GOOD:
                self.done[task.task_id] += 1
            elif fate == RAISES:
                self.verdicts.setdefault(task.task_id, []).append("ValueError")
                fail(self.queue, task, line=self.steps)
            else:
                return Ending({KILLS: End.DIED, EATS: End.NO_MEMORY, HANGS: End.TIME}[fate], "", task.task_id)
        return Ending(End.FINISHED)


@st.composite
def pretended(draw: st.DrawFn) -> Pretended:
    """Up to eight shards of four cells, each of up to five tasks, and their dense models, there or not."""
    sizes = draw(st.lists(st.tuples(st.integers(0, len(CELLS) - 1), st.integers(1, 5)), min_size=1, max_size=8))
    begun: Counter[int] = Counter()
    shards = []
    for i, (cell, n) in enumerate(sizes):
        shards.append(Shard(f"s{i}", tuple(Task(CELLS[cell], begun[cell] + k, 0) for k in range(n))))
        begun[cell] += n
    weighted = st.sampled_from([GOOD, GOOD, GOOD, *VERDICTS])
    fates = {task.task_id: draw(weighted) for one in shards for task in one.tasks}
    denses = {one.needs.dense_id: one.needs for one in shards}
    fates |= {dense_id: draw(st.sampled_from((GOOD, GOOD, *DENSE_FATES))) for dense_id in denses}
    missing = [dense for dense in denses.values() if draw(st.booleans())]
    # Those that a store says to have, and of which the file is damaged, are found missing by the workers.
    damaged = {dense_id for dense_id in denses if draw(st.booleans())}
    chance = random.Random(draw(st.integers(0, 2**32)))
    trained = denses.keys() - {dense.dense_id for dense in missing} - damaged
    return Pretended(Queue.of(shards, missing, chance), fates, chance, draw(st.integers(1, 4)), set(trained))


@given(pretended())
def test_whatever_happens_no_good_task_is_lost_and_no_bad_one_goes_free(runner: Pretended) -> None:
    """The queue ends; a good task is done once; a bad one gets the verdict it deserves and no other; what
    cannot run, for want of its dense model, is said to stay pending."""
    all_tasks = [task for one in runner.queue.waiting for task in one.tasks]
    runner.run()
    assert runner.queue.running == {} and runner.queue.waiting == []
    assert runner.queue.store_problem is None
    lost = {t.task_id for t in all_tasks if t.cell.dense.dense_id not in runner.trained}
    assert bool(runner.queue.problems) == bool(lost)
    for task in all_tasks:
        fate, verdicts = runner.fates[task.task_id], runner.verdicts.get(task.task_id, [])
        if task.task_id in lost:
            assert (runner.done[task.task_id], verdicts) == (0, [])
        elif fate == GOOD:
            assert (runner.done[task.task_id], verdicts) == (1, [])
        else:
            assert set(verdicts) == {VERDICTS[fate]} and runner.done[task.task_id] == 0
            assert runner.buried[task.task_id] == (fate != RAISES)
