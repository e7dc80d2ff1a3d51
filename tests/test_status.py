"""How a sweep stands: its rows, and what living drivers and workers show of themselves, nobody else."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers import Driver, hurry
from orchestrator.status import BY, DRIVER_SCHEMA, WINDOW_SECONDS, standing
from storage.errors import QueryError
from storage.machine import machine, process_started
from storage.manifest import PlannedTask
from storage.phases import TRAINING_DENSE, Phase
from storage.records import Task, utc_now
from storage.signs import BEAT_SECONDS, STALE_SECONDS, living
from storage.store import Store
from tests.rows import DENSE, ORACLE, SAMPLED, done, failed, plan, tasks
from tests.test_interrupt import in_process
from workers.pulse import Limits, Pulse, stop_note

ELSEWHERE = "00000000"
"""A machine that is not this one."""

A, B = tasks(ORACLE, 3, seeds=2), tasks(SAMPLED, 2)
NOTHING_AT_WORK = {"drivers": 0, "tasks_per_hour": None, "seconds_left": None}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of a working directory: two cells in three shards; of eight tasks four are done, two failed."""
    monkeypatch.chdir(tmp_path)
    made = Store(tmp_path / "results")
    shards = [*(PlannedTask("s0", t) for t in A[:4]), *(PlannedTask("s1", t) for t in A[4:])]
    made.write_manifest("mini", "name: mini\n", [*shards, *(PlannedTask("s2", t) for t in B)])
    made.commit_rows("s0", [done(A[0]), done(A[1]), done(A[2]), failed(A[3])])
    made.commit_rows("s1", [done(A[4])])
    made.commit_rows("s2", [failed(B[0], error_class="OutOfMemory", error="Traceback\nOutOfMemory: 9 GB\n")])
    return made


def note(store: Store, folder: str, *, beat: float = 0.0, since: float = 100.0, **about: Any) -> None:
    """The note of a process: this one, if nothing else is said, `since` seconds at work, `beat` since its last."""
    who = {"host": "here", "machine": machine(), "pid": os.getpid(), "process_started": process_started(os.getpid())}
    times = {"started_at": _before(since).isoformat(), "beat_at": _before(beat).isoformat()}
    store.scratch.renew(f"{folder}/{uuid.uuid4().hex}", {**who, **times, **about})


def at(store: Store, task: Task | None, **about: Any) -> None:
    """The note of a worker at a task."""
    note(store, "workers", driver="d", shard="s0", task=task.task_id if task else None, **about)


def drives(store: Store, sweep: str = "mini", **about: Any) -> None:
    """The note of a driver of a sweep."""
    note(store, "drivers", sweep=sweep, **{"address": None, "to_run": 4, "done": 1, "failed": 0} | about)


def _before(seconds: float) -> dt.datetime:
    return utc_now() - dt.timedelta(seconds=seconds)


def counts(store: Store, by: str = "sweep") -> list[tuple[int, int, int, int, int]]:
    """Tasks, done, failed, running, pending: a line each."""
    names = ("tasks", "done", "failed", "running", "pending")
    lines = standing(store, "mini", by).table.select(names).to_pylist()
    return [(line["tasks"], line["done"], line["failed"], line["running"], line["pending"]) for line in lines]


# -- counts -------------------------------------------------------------------------------------------


def test_what_is_done_failed_and_pending(store: Store) -> None:
    """Every planned task is counted once, in the grid's order, by sweep, by cell and by shard."""
    found = standing(store, "mini", "sweep")
    assert found.whole == {"sweep": "mini", "tasks": 8, "done": 4, "failed": 2, "running": 0, "pending": 2} | (
        NOTHING_AT_WORK
    )
    assert found.table.to_pylist() == [found.whole]
    assert counts(store, "cell") == [(6, 4, 1, 0, 1), (2, 0, 1, 0, 1)]
    assert counts(store, "shard") == [(4, 3, 1, 0, 0), (2, 1, 0, 0, 1), (2, 0, 1, 0, 1)]
    assert standing(store, "mini", "shard").table["shard"].to_pylist() == ["s0", "s1", "s2"]
    cells = standing(store, "mini", "cell").table.to_pylist()
    assert [(line["cell_id"], line["ratio"], line["layers"]) for line in cells] == [
        (ORACLE.cell_id, "0.2", ["conv1"]),
        (SAMPLED.cell_id, "0.2+0.4", ["conv1", "conv3"]),
    ]


def test_a_sweep_is_what_its_newest_expansion_plans(store: Store) -> None:
    """Rows that other sweeps of the store, or older expansions, have planned are not counted."""
    plan(store, "other", [*A, Task(ORACLE, 9, 9)])
    plan(store, "mini", [A[0], A[3], Task(ORACLE, 7, 0)])
    store.commit_rows("s9", [done(Task(ORACLE, 9, 9))])
    assert counts(store) == [(3, 1, 1, 0, 1)]
    with pytest.raises(QueryError, match=r"no sweep nosuch .*: mini, other$"):
        standing(store, "nosuch", "cell")


def test_what_failed_with_an_example(store: Store) -> None:
    """One line per error class, the most frequent first, with how many shards and one task's own traceback."""
    more = [Task(ORACLE, 8, i) for i in range(3)]
    store.write_manifest("mini", "more", [PlannedTask(f"s{i}", t) for i, t in enumerate([A[3], B[0], *more])])
    store.commit_rows("s8", [failed(t, error=f"Traceback\nRuntimeError: {t.task_id}") for t in more])
    found = standing(store, "mini", "failure")
    assert found.failures == found.table.to_pylist()
    often, once = found.failures
    assert (often["error_class"], often["tasks"], often["shards"]) == ("RuntimeError", 4, 4)
    example = often["example_task"]
    assert example == min(t.task_id for t in [A[3], *more])
    assert often["example_error"] == (
        "Traceback: boom" if example == A[3].task_id else f"Traceback\nRuntimeError: {example}"
    )
    assert (once["error_class"], once["tasks"], once["example_task"]) == ("OutOfMemory", 1, B[0].task_id)
    assert standing(store, "mini", "sweep").failures == found.failures


# -- who is at work -----------------------------------------------------------------------------------


def test_a_task_is_running_while_its_worker_lives(store: Store) -> None:
    """A note that counts makes its task running, from this machine or another; two of them make it so once."""
    at(store, A[5])
    at(store, A[5], machine=ELSEWHERE, pid=1, process_started=1.0, beat=STALE_SECONDS - 20)
    assert counts(store) == [(8, 4, 2, 1, 1)]
    assert counts(store, "cell") == [(6, 4, 1, 1, 0), (2, 0, 1, 0, 1)]
    at(store, B[1], machine=ELSEWHERE, pid=1, process_started=1.0)
    assert counts(store) == [(8, 4, 2, 2, 0)]


def test_a_worker_that_shows_no_life_runs_nothing(store: Store) -> None:
    """Nor does one whose process is gone from this machine, or is another one by now, or that is at no shard, at
    another sweep's dense model, shard or task; nor a note that is none."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    started = process_started(gone.pid)
    gone.wait()
    at(store, A[5], pid=gone.pid, process_started=started)
    at(store, A[5], process_started=process_started(os.getpid()) - 100)
    at(store, A[5], beat=STALE_SECONDS + 1)
    at(store, A[5], machine=ELSEWHERE, beat=STALE_SECONDS + 1)
    note(store, "workers", driver="d", shard=None, task=None)
    note(store, "workers", driver="d", shard="s9", task=None)
    at(store, Task(ORACLE, 99, 0))
    other = replace(DENSE, model="lenet5").dense_id
    note(store, "workers", driver="d", shard=f"dense-{other}", task=other)
    store.scratch.renew("workers/foreign", {"task": A[5].task_id})
    (Path(store.root) / "scratch" / "workers" / "torn.json").write_text('{"task": ')
    assert counts(store) == [(8, 4, 2, 0, 2)]


def test_a_dense_model_in_training_counts_as_running(store: Store) -> None:
    """A worker at it is at the first task that waits for it: once, however many workers say so, and in its cell."""
    for _ in range(2):
        note(store, "workers", driver="d", shard=f"dense-{DENSE.dense_id}", task=DENSE.dense_id)
    assert counts(store) == [(8, 4, 2, 1, 1)]
    assert counts(store, "cell") == [(6, 4, 1, 1, 0), (2, 0, 1, 0, 1)]
    assert counts(store, "shard") == [(4, 3, 1, 0, 0), (2, 1, 0, 1, 0), (2, 0, 1, 0, 1)]


def test_a_worker_that_prepares_a_shard_counts_as_running(store: Store) -> None:
    """Until it is at a task it is at the first that is left of its shard; of a task run alone, at that task."""
    at(store, None)
    assert counts(store, "shard") == [(4, 3, 0, 1, 0), (2, 1, 0, 0, 1), (2, 0, 1, 0, 1)]
    note(store, "workers", driver="d", shard=f"s2.{B[1].task_id}", task=None)
    assert counts(store, "shard") == [(4, 3, 0, 1, 0), (2, 1, 0, 0, 1), (2, 0, 1, 1, 0)]


def test_phases_of_the_sweeps_own_workers(store: Store) -> None:
    """Those at a dense model or preparing a shard, by phase; a task in retraining is in the counts, another sweep's
    worker is not ours."""
    drives(store, phase="starting Ray")
    (mine,) = (name.removeprefix("drivers/") for name in living(store, "drivers"))
    dense = Phase(f"{TRAINING_DENSE} lenet5 on mnist", 4, 30, "epoch")
    loading, retraining = Phase("loading mnist"), Phase("retraining", 1, 2, "epoch")
    note(store, "workers", driver=mine, shard="dense-x", task="x", phase=dense.to_dict())
    for _ in range(2):
        note(store, "workers", driver=mine, shard="s0", task=None, phase=loading.to_dict())
    note(store, "workers", driver=mine, shard="s0", task=A[3].task_id, phase=retraining.to_dict())
    note(store, "workers", driver="another", shard="s0", task=None, phase=Phase("choosing").to_dict())
    found = standing(store, "mini", "driver")
    assert found.phases == ["2 workers: loading mnist", "training the dense model lenet5 on mnist (epoch 4 of 30)"]
    assert [driver["phase"] for driver in found.drivers] == ["starting Ray"]


def test_a_failed_task_that_is_run_again_is_running_and_a_done_one_is_done(store: Store) -> None:
    """What is done stays done, whoever runs it again; a failure that is tried again is no failure meanwhile."""
    at(store, A[0])
    at(store, A[3])
    assert counts(store) == [(8, 4, 1, 1, 2)]
    assert [one["error_class"] for one in standing(store, "mini", "cell").failures] == ["OutOfMemory"]


def test_drivers_at_work(store: Store) -> None:
    """Every living driver of the sweep is shown with what it says of itself; dead ones and others' are not."""
    drives(store, since=50.0, beat=3.0, address="auto", to_run=8, done=5, failed=1)
    drives(store, machine=ELSEWHERE, host="there", pid=7, process_started=1.0)
    drives(store, beat=STALE_SECONDS + 1)
    drives(store, sweep="other")
    found = standing(store, "mini", "driver")
    assert found.table.schema == DRIVER_SCHEMA
    lines = sorted(found.table.to_pylist(), key=lambda line: line["host"])
    assert [(line["host"], line["pid"], line["to_run"]) for line in lines] == [
        ("here", os.getpid(), 8),
        ("there", 7, 4),
    ]
    assert (lines[0]["address"], lines[0]["done"], lines[0]["failed"]) == ("auto", 5, 1)
    assert 3.0 <= lines[0]["seconds_since_sign"] < 30
    assert found.whole["drivers"] == 2
    assert sorted(found.drivers, key=lambda line: line["host"]) == lines


def test_a_driver_as_it_is(store: Store) -> None:
    """A real driver is at work as long as it is one, with its run's counts."""
    with Driver(store, "mini", None, lambda: {"to_run": 4, "done": 1, "failed": 2}):
        (line,) = standing(store, "mini", "driver").drivers
        assert (line["pid"], line["to_run"], line["done"], line["failed"]) == (os.getpid(), 4, 1, 2)
        assert 0 <= line["seconds_since_sign"] < BEAT_SECONDS
    assert standing(store, "mini", "driver").drivers == []


def test_a_note_that_is_none_is_passed_over(store: Store) -> None:
    """Scratch may hold anything: what is no sign of life counts as none, for drivers and for status."""
    for folder in ("workers", "drivers"):
        store.scratch.renew(f"{folder}/x", {"shard": "s0"})
    with Driver(store, "mini", None, dict) as driver:
        assert driver.elsewhere == frozenset()
        assert driver.note_of("s0") is None
        assert len(standing(store, "mini", "driver").drivers) == 1


def test_a_worker_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real worker's task is running while it is at it, and its failure is not over before its row is there."""
    monkeypatch.setattr("workers.pulse.NOTE_SECONDS", 0)
    with Pulse(store, "d", Limits()) as pulse:
        assert counts(store) == [(8, 4, 2, 0, 2)]
        for task in (A[5], B[0]):
            with pulse.at("s2", task.task_id):
                assert counts(store) == [(8, 4, 2 - (task is B[0]), 1, 2 - (task is A[5]))]
    assert counts(store) == [(8, 4, 2, 0, 2)]


def test_a_task_that_lasts_is_shown_and_one_that_does_not_may_not_be(store: Store) -> None:
    """The second task of a shard that begins at once is not written down, unless it still runs at the next tick."""
    with Pulse(store, "d", Limits()) as pulse:
        for task in A[:2]:
            with pulse.at("s0", task.task_id):
                assert _shown(store) == ("s0", A[0].task_id)
        with pulse.at("s0", A[2].task_id):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and _shown(store)[1] != A[2].task_id:
                time.sleep(0.05)
            assert _shown(store) == ("s0", A[2].task_id)
        with pulse.at("s1", A[3].task_id):
            assert _shown(store) == ("s1", A[3].task_id)


def test_a_worker_that_has_ended_its_shard_soon_shows_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver would wait for that shard as long as the worker lives, for its next shard perhaps."""
    monkeypatch.setattr("storage.signs.BEAT_SECONDS", 0.05)
    with Pulse(store, "somebody", Limits()) as pulse, Driver(store, "mini", None, dict) as driver:
        with pulse.at("s0", A[0].task_id):
            assert _shown(store) == ("s0", A[0].task_id)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (_shown(store) != (None, None) or driver.elsewhere):
            time.sleep(0.05)
        assert _shown(store) == (None, None) and driver.elsewhere == frozenset()


def _shown(store: Store) -> tuple[str | None, str | None]:
    """What the one worker shows that it is at."""
    (shown,) = living(store, "workers").values()
    return shown["shard"], shown["task"]


def test_a_driver_sees_what_is_elsewhere(store: Store) -> None:
    """It leaves shards that living workers of other drivers are at; not its own workers', nor those of the dead."""
    note(store, "workers", driver="another", shard=f"s0.{A[0].task_id}", task=A[0].task_id)
    note(store, "workers", driver="another", shard=None, task=None)
    note(store, "workers", driver="another", shard="s1", task=None, beat=STALE_SECONDS + 1)
    with Driver(store, "mini", None, dict) as driver:
        note(store, "workers", driver=driver.id, shard="s2", task=None)
        with Driver(store, "mini", None, dict) as other:
            assert (driver.elsewhere, other.elsewhere) == ({"s0"}, {"s0", "s2"})


def test_who_is_hurried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop --now` of a job is for the driver that is that job, not for others of the sweep in the same store."""
    told = {"runtime_env": {}, "metadata": {"job_submission_id": "mini-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    with Driver(store, "mini", None, dict) as mine:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "no JSON")
        with Driver(store, "mini", None, dict) as other:
            assert not hurry(store, "mini-2")
            assert hurry(store, "mini-1")
            assert store.scratch.noted(stop_note(mine.id)) == {"now": True}
            assert store.scratch.noted(stop_note(other.id)) is None


def test_a_job_is_stopped_through_ray(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the machine of its driver too: a signal of our own would make it a job that failed."""
    asked: list[int] = []
    monkeypatch.setattr("orchestrator.cli_cluster._signal", lambda pid, drain: asked.append(pid))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "mini-1"}}))
    with Driver(store, "mini", None, dict):
        code, _, err = in_process(capsys, "stop", "mini", "--store", store.location)
        assert code == 2 and "`prunesweep stop mini-1 --address http://HOST:8265` stops it" in err
        assert asked == []


# -- pace ---------------------------------------------------------------------------------------------


def finished(store: Store, *seconds: float) -> None:
    """Of a plan of ten tasks, one was done each of these seconds ago."""
    ten = tasks(ORACLE, 10)
    plan(store, "mini", ten)
    for name in store.row_file_names():
        store.delete(name)
    store.commit_rows("s0", [done(t, finished_at=_before(ago)) for t, ago in zip(ten, seconds, strict=False)])


def test_pace(store: Store) -> None:
    """Tasks an hour since the oldest driver began; what is left at that pace, failed tasks aside."""
    finished(store, 10, 20, 30, 2000)
    store.commit_rows("s0", [failed(Task(ORACLE, 9, 0), finished_at=_before(5))])
    assert {k: standing(store, "mini", "cell").whole[k] for k in NOTHING_AT_WORK} == NOTHING_AT_WORK
    drives(store, since=100.0)
    drives(store, since=50.0)
    whole = standing(store, "mini", "cell").whole
    assert (whole["done"], whole["failed"], whole["pending"]) == (4, 1, 5)
    assert whole["tasks_per_hour"] == pytest.approx(4 * 36, rel=0.1)
    assert whole["seconds_left"] == pytest.approx(5 * 25, rel=0.1)
    at(store, Task(ORACLE, 8, 0))  # what is running is left, too
    whole = standing(store, "mini", "cell").whole
    assert (whole["running"], whole["pending"]) == (1, 4)
    assert whole["seconds_left"] == pytest.approx(5 * 25, rel=0.1)


def test_pace_is_of_the_last_minutes(store: Store) -> None:
    """Of a driver that has been at work for days only the window counts, and it has a pace only if it finished
    something there."""
    finished(store, WINDOW_SECONDS + 10, 3600, 7200)
    drives(store, since=100_000.0)
    assert standing(store, "mini", "cell").whole["tasks_per_hour"] is None
    finished(store, WINDOW_SECONDS - 10, WINDOW_SECONDS + 10, 3600)
    assert standing(store, "mini", "cell").whole["tasks_per_hour"] == pytest.approx(6.0, rel=0.01)


def test_pace_without_a_driver_that_lives(store: Store) -> None:
    """What dead drivers left behind says nothing about when the sweep will be done."""
    finished(store, 10, 20)
    drives(store, beat=STALE_SECONDS + 1)
    drives(store, sweep="other")
    assert {k: standing(store, "mini", "cell").whole[k] for k in NOTHING_AT_WORK} == NOTHING_AT_WORK


# -- the command --------------------------------------------------------------------------------------


def test_the_command_by_each(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """--by prints the table asked for as data, and what is true of the whole sweep for people, the same each time."""
    drives(store, since=60.0, beat=2.0)
    at(store, A[5])
    for by in BY:
        code, out, err = in_process(capsys, "status", "mini", "--by", by, "-f", "json")
        assert code == 0
        expected = standing(store, "mini", by).table
        lines = json.loads(out)
        assert [list(line) for line in lines] == [expected.column_names] * len(expected)
        said = err.splitlines()
        assert said[0] == "mini: 8 tasks: 4 done, 2 failed, 1 running, 1 pending"
        assert said[1] == f"failed: OutOfMemory, 1 task, as {B[0].task_id}: OutOfMemory: 9 GB"
        assert said[2] == f"failed: RuntimeError, 1 task, as {A[3].task_id}: Traceback: boom"
        assert said[3].startswith(f"a driver is at work on here, process {os.getpid()}, since ")
        assert len(said) == 4


def test_the_command_tells_the_pace(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """While a driver is at work and finishes tasks, a person is told how fast and how long."""
    finished(store, 1, 2, 3, 4)
    drives(store, since=3600.0)
    code, out, err = in_process(capsys, "status", "mini", "--by", "sweep", "-f", "json")
    (whole,) = json.loads(out)
    assert code == 0 and whole["tasks_per_hour"] == pytest.approx(24.0, rel=0.01)
    assert "0 failed, 0 running, 6 pending; 24 tasks an hour, about 15 min left" in err


def test_the_command_shows_what_failed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """--failed is --by failure, whatever else is said."""
    shown = {
        arguments: in_process(capsys, "status", "mini", *arguments, "-f", "json")
        for arguments in (("--failed",), ("--by", "failure"), ("--by", "cell", "--failed"))
    }
    assert len({out for _, out, _ in shown.values()}) == 1
    found = json.loads(shown["--failed",][1])
    assert [(line["error_class"], line["tasks"], line["example_task"]) for line in found] == [
        ("OutOfMemory", 1, B[0].task_id),
        ("RuntimeError", 1, A[3].task_id),
    ]
    assert found[0]["example_error"] == "Traceback\nOutOfMemory: 9 GB\n"


def test_watching_ends_once_nothing_is_left_to_run(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--watch shows the sweep again and again, and ends by itself, with the last word, once nobody is at work and
    nothing is pending; what has failed does not keep it."""
    left = [A[5], B[1]]

    def meanwhile(_: float) -> None:
        store.commit_rows("s3", [done(left.pop())])

    monkeypatch.setattr(time, "sleep", meanwhile)
    code, out, err = in_process(capsys, "status", "mini", "--by", "sweep", "--watch", "-f", "jsonl")
    assert code == 0 and left == []
    assert [json.loads(line)["done"] for line in out.splitlines()] == [4, 5, 6]
    assert "mini: 8 tasks: 6 done, 2 failed, 0 running, 0 pending" in err.splitlines()
    code, out, _ = in_process(capsys, "status", "mini", "--watch", "-f", "jsonl")
    assert code == 0 and len(out.splitlines()) == 2


def test_status_of_a_torn_row_file(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in rows/ that is none is warned of, and the others count."""
    (Path(store.root) / "rows" / "s0-torn.parquet").write_bytes(b"PAR1")
    code, _, err = in_process(capsys, "status", "mini")
    assert code == 0 and "warning: skipped rows/s0-torn.parquet: " in err
    assert "4 done, 2 failed, 0 running, 2 pending" in err
