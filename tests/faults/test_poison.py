"""Tasks that take their process down, or would, in quick sweeps on real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.quick import spec
from tests.faults.runs import quick
from tests.sweeps import committed, rows


def test_a_shard_with_every_poison(tmp_path: Path) -> None:
    """One that segfaults, hangs, eats memory, runs out of it, raises, or gives NaN, in
    shards with good ones: the good rows are all there, each bad one has one failed row of the right class."""
    poison = {1: "segfault", 2: "hang", 3: "memory", 4: "memory error", 5: "raise", 6: "nan"}
    classes = {1: "ProcessDied", 2: "TimedOut", 3: "OutOfMemory", 4: "OutOfMemory", 5: "ValueError"}
    text = spec(count=10, resources="candidates_per_shard: 10, workers: 1, task_minutes: 0.1, memory_gb: 1")
    sweep = quick(tmp_path, text, poison)
    code, said = sweep.run("run", "quick.yaml")
    assert code == 3, said
    failed = {row.candidate: row.error_class for row in rows(sweep.store, "failed").values()}
    assert failed == classes, said
    done = {row.candidate: row for row in rows(sweep.store).values()}
    assert done.keys() == set(range(10)) - classes.keys()
    assert done[6].diverged and sweep.store.sql("select count(*) from rows where diverged").fetchall() == [(1,)]
    assert sweep.store.sql("select max(n) from (select count(*) as n from attempts group by task_id)").fetchall() == [
        (1,)
    ]
    assert all(str(row.error).strip() for row in rows(sweep.store, "failed").values())
    sweep.environment["QUICK_POISON"] = "{}"
    before = committed(sweep.store)
    sweep.resume()
    reference = sweep.reference()
    assert {t for t, _ in committed(sweep.store)} == reference.keys() and before <= committed(sweep.store)


@pytest.mark.slow
def test_a_task_that_holds_pythons_lock(tmp_path: Path) -> None:
    """It keeps the worker's own threads from running too; the interpreter's timer ends it all the same."""
    text = spec(count=3, resources="candidates_per_shard: 3, workers: 1, task_minutes: 0.05")
    sweep = quick(tmp_path, text, {1: "held"})
    code, said = sweep.run("run", "quick.yaml")
    assert code == 3, said
    assert {row.candidate: row.error_class for row in rows(sweep.store, "failed").values()} == {1: "ProcessDied"}
    assert {row.candidate for row in rows(sweep.store).values()} == {0, 2}
