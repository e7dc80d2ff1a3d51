"""Drivers that die, freeze, meet, or find their store elsewhere, in quick sweeps."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.quick import spec
from tests.faults.runs import end_group, quick, wait_until_gone
from tests.sweeps import assert_invariants, committed, rows

FEW_OR_MANY = [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("many", FEW_OR_MANY)
def test_drivers_killed_at_random(many: bool, tmp_path: Path) -> None:
    """A driver that is killed, with all it started or alone: `status` is true at once, what is committed stays,
    its workers end by themselves, and the next resume goes on."""
    times, order = (50, random.Random(50)) if many else (3, random.Random(3))  # a few: on Ray, inline, on Ray
    sweep = quick(tmp_path, spec(count=45, seeds=8 if many else 1), seconds=0.3)
    alone = True
    for _ in range(times):
        enough = len(committed(sweep.store)) + 1 + order.randrange(3)
        process = sweep.start("run", "quick.yaml", *([] if many or alone else ["--inline"]))
        if not sweep.wait_for(lambda: len(committed(sweep.store)) >= enough, process):  # noqa: B023
            break
        notes = sweep.notes()
        if alone:
            process.kill()
            process.wait(30)
        else:
            end_group(process)
        wait_until_gone(notes)
        before = committed(sweep.store)
        code, said = sweep.run("status", "quick", "-f", "csv")
        assert code == 0 and ", 0 running," in said and "at work" not in said
        alone = not alone
    before = committed(sweep.store)
    sweep.resume()
    assert_invariants(sweep.store, "quick", before, sweep.reference())


def test_a_frozen_worker_that_comes_back_does_no_harm(tmp_path: Path) -> None:
    """A driver frozen until another has run its shards, then continued: its late row is legal, every view has
    each task once, and it ends well."""
    sweep = quick(tmp_path, spec(count=8), seconds=0.4, QUICK_STALE="15")
    frozen = sweep.start("run", "quick.yaml", "--inline")
    assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 2, frozen)
    os.killpg(frozen.pid, signal.SIGSTOP)
    code, said = sweep.run("resume", "quick", "--inline")
    assert code == 0, said
    os.killpg(frozen.pid, signal.SIGCONT)
    assert frozen.wait(60) == 0, sweep.said()
    for view in ("rows", "tasks"):
        query = f"select count(*), count(distinct task_id) from {view} where status = 'done'"
        assert sweep.store.sql(query).fetchall() == [(8, 8)]
    assert len(committed(sweep.store)) <= 9  # at most the one it was at
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())


def test_two_resumes_at_once(tmp_path: Path) -> None:
    """Two drivers on one sweep: every task once in every view, at most a tenth of them run twice."""
    sweep = quick(tmp_path, spec(count=40), seconds=0.15)
    both = [sweep.start("run", "quick.yaml", "--inline"), sweep.start("run", "quick.yaml", "--inline")]
    assert [process.wait(120) for process in both] == [0, 0], sweep.said()
    assert 40 <= len(committed(sweep.store)) <= 44
    assert sweep.store.sql("select count(*), count(distinct task_id) from rows").fetchall() == [(40, 40)]
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())


def test_a_cell_that_always_fails_is_paused(tmp_path: Path) -> None:
    """The same traceback so many times: the cell's other tasks stay pending, and the run says so."""
    sweep = quick(tmp_path, spec(count=20), poison=dict.fromkeys(range(20), "raise"))
    code, said = sweep.run("run", "quick.yaml", "--inline")
    assert code == 3
    assert "is paused: 5 of its tasks failed at the same place (ValueError: poisoned)" in said
    assert len(rows(sweep.store, "failed")) in (5, 6)  # the shard that was at work has two tasks
    assert "0 tasks done" in said and "14 pending" in said


def test_a_store_that_was_moved(tmp_path: Path) -> None:
    """A store is its files: under another path, after its driver was killed, it goes on from where it was."""
    sweep = quick(tmp_path, spec(count=12), seconds=0.2)
    driver = sweep.start("run", "quick.yaml", "--inline")
    assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 3, driver)
    end_group(driver)
    before = committed(sweep.store)
    moved = quick(tmp_path / "elsewhere", sweep.text)
    moved.folder.mkdir()
    (tmp_path / "results").rename(moved.folder / "results")
    moved.resume()
    assert_invariants(moved.store, "quick", before, sweep.reference())


def test_a_wider_grid_runs_what_is_new(tmp_path: Path) -> None:
    """Edit the file and run it again: what is done is never run again, and the sweep is the wider one."""
    narrow, wide = quick(tmp_path, spec(count=4)), quick(tmp_path, spec(count=9, seeds=2))
    assert narrow.run("run", "quick.yaml", "--inline")[0] == 0
    before = committed(narrow.store)
    code, said = wide.run("run", "quick.yaml", "--inline")
    assert code == 0 and "quick: 18 tasks in 1 cell, 4 done, 14 to run" in said
    assert_invariants(wide.store, "quick", before, wide.reference())


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5, 3])
def test_a_run_that_is_stopped_while_ray_starts(tmp_path: Path, seconds: float) -> None:
    """SIGTERM before the first worker is there: exit 130 and the command that resumes, whoever handled it."""
    sweep = quick(tmp_path)
    driver = sweep.start("run", "quick.yaml")
    assert sweep.wait_for(lambda: "to run in" in sweep.said(), driver)
    time.sleep(seconds)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 130, sweep.said()
    assert "prunesweep resume quick" in sweep.said() and "Traceback" not in sweep.said()
