"""Rows that are committed together: those of tasks that take no time, and nothing waits for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.records import Row, Shard
from storage.store import Store
from tests.rows import ORACLE, done, failed, tasks
from workers import worker
from workers.worker import Worker, grouped

TASKS = tasks(ORACLE, 6)


class Clock:
    """A clock that only rows move."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def rows(self, seconds: dict[int, float], fails: int = -1, ends: Exception | None = None) -> Iterator[Row]:
        """A row per task, each after its seconds."""
        for i, task in enumerate(TASKS):
            self.now += seconds.get(i, 0.0)
            yield failed(task) if i == fails else done(task)
        if ends:
            raise ends


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(worker, "time", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "fails", "sizes"),
    [
        ({}, -1, [6]),
        (dict.fromkeys(range(6), 1.5 * worker.QUICK_SECONDS), -1, [1] * 6),
        (dict.fromkeys(range(6), 0.9 * worker.QUICK_SECONDS), -1, [6]),
        ({2: 100.0}, -1, [3, 3]),
        ({}, 1, [2, 4]),
        ({}, 5, [6]),
    ],
)
def test_who_waits_for_whom(clock: Clock, seconds: dict[int, float], fails: int, sizes: list[int]) -> None:
    """A row of a task that took no time waits, no longer than for the next that took some; a failed row goes at
    once, and takes along who waits."""
    groups = list(grouped(clock.rows(seconds, fails)))
    assert [len(group) for group in groups] == sizes
    assert [row.task_id for group in groups for row in group] == [task.task_id for task in TASKS]


def test_nobody_waits_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick the tasks are, a group ends so long after it began."""
    monkeypatch.setattr(worker, "GROUP_SECONDS", 2.5 * worker.QUICK_SECONDS)
    groups = list(grouped(clock.rows(dict.fromkeys(range(6), 0.9 * worker.QUICK_SECONDS))))
    assert [len(group) for group in groups] == [3, 3]


def test_what_ends_a_shard_loses_no_row(clock: Clock) -> None:
    """Rows that wait when a worker is stopped, or finds its store gone, are handed over before that is raised."""
    groups: list[list[Row]] = []
    with pytest.raises(KeyError):
        groups.extend(grouped(clock.rows({}, ends=KeyError("ended"))))
    assert [len(group) for group in groups] == [6]


def test_rows_are_durable_when_they_are_yielded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row that a worker hands over has all of its group in the store."""
    store = Store(tmp_path)
    monkeypatch.setattr(Worker, "_attempts", lambda *_: map(done, TASKS))
    rows = Worker(store, "none").run_shard(Shard("s0", TASKS))
    assert next(rows).task_id == TASKS[0].task_id
    table, _ = store.row_files()
    assert table["task_id"].to_pylist() == [task.task_id for task in TASKS]
    assert len(list(rows)) == 5 and len(store.row_file_names()) == 1
