"""Upkeep: compact, rm and tidy remove what nobody needs, and never anything else; a full disk is told first."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.plan import ROW_BYTES
from storage.commit import ABANDONED_SECONDS
from storage.errors import StoreError
from storage.machine import machine, process_started
from storage.manifest import planned_tasks
from storage.records import Row, utc_now
from storage.removal import remove_rows, unplanned_rows
from storage.schema import table_to_rows
from storage.store import Store
from storage.upkeep import tidy
from tests.rows import DENSE, L1, ORACLE, SAMPLED, done, failed, plan, tasks, tree
from tests.test_interrupt import in_process

A, B = tasks(ORACLE, 3), tasks(L1, 2)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of a working directory: two sweeps with a dense model each, rows, a kept network."""
    monkeypatch.chdir(tmp_path)
    made = Store(tmp_path / "results")
    plan(made, "mini", A)
    plan(made, "other", B)
    made.commit_rows("s0", [done(A[0]), failed(A[1])])
    made.commit_rows("s0", [done(A[1])])
    made.commit_rows("s1", [done(B[0])])
    made.commit_dense(DENSE.dense_id, b"mini's weights")
    made.commit_dense(L1.dense.dense_id, b"other's weights")
    made.commit_network(A[0].task_id, b"a network")
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in this process, with an answer on its standard input: exit code, stdout, stderr."""

    def command(*arguments: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        return in_process(capsys, *arguments)

    return command


def files(store: Store) -> dict[str, bytes]:
    """Every file of a store with its content."""
    return {name: content for name, content in tree(Path(store.root)).items() if Path(store.root, name).is_file()}


def rows(store: Store) -> list[Row]:
    """Every row, in one order, whichever file it is in."""
    return sorted(table_to_rows(store.row_files()[0]), key=lambda row: (row.task_id, row.status))


def note(store: Store, name: str, **about: Any) -> None:
    """A note of this process, alive, or with something else said."""
    now = utc_now().isoformat()
    who = {"host": "here", "machine": machine(), "pid": os.getpid(), "process_started": process_started(os.getpid())}
    store.scratch.renew(name, {**who, "started_at": now, "beat_at": now, "sweep": "mini", "task": None, **about})


def ended_process() -> tuple[int, float]:
    """The id and the start of a process that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    started = process_started(gone.pid)
    gone.wait()
    return gone.pid, started


# -- compact ------------------------------------------------------------------------------------------


def test_compact_says_what_it_did(store: Store, run: Run) -> None:
    """It merges the row files into one, without losing or changing a row, and then there is nothing to merge."""
    before = rows(store)
    kept = {name: content for name, content in files(store).items() if not name.startswith("rows/")}
    assert run("compact") == (0, "", "merged 3 files into 1, 4 rows\n")
    (name,) = store.row_file_names()
    after = files(store)
    assert rows(store) == before
    assert {n: content for n, content in after.items() if n != name} == kept
    assert run("compact") == (0, "", "nothing to merge\n")
    assert files(store) == after
    store.commit_rows("s2", [done(B[1])])
    assert run("compact") == (0, "", "merged 2 files into 1, 5 rows\n")
    assert [row.status for row in rows(store)].count("done") == 4


def test_compact_sets_aside_what_is_no_row_file(store: Store, run: Run) -> None:
    """A torn or foreign file is moved out of the way and named, not removed; the rows are merged all the same."""
    before, junk = rows(store), {"rows/torn.parquet": b"PAR1", "rows/words.parquet": b"no parquet\n"}
    for name, content in junk.items():
        Path(store.root, name).write_bytes(content)
    code, out, err = run("compact")
    assert (code, out) == (0, "")
    said = err.splitlines()
    assert [line.split(": ")[0] for line in said[:2]] == [f"set aside {name}" for name in sorted(junk)]
    assert all(line.split(": ", 1)[1] for line in said[:2]) and said[2:] == ["merged 3 files into 1, 4 rows"]
    aside = {name: content for name, content in files(store).items() if name.startswith("aside/")}
    assert sorted(aside.values()) == sorted(junk.values())
    assert rows(store) == before and store.row_files()[1] == []
    assert run("compact")[2] == "nothing to merge\n"


def test_compact_without_rows(store: Store, run: Run) -> None:
    """A store that has no row yet has nothing to merge."""
    for name in store.row_file_names():
        store.delete(name)
    before = tree(Path(store.root))
    assert run("compact") == (0, "", "nothing to merge\n")
    assert tree(Path(store.root)) == before


# -- rm SWEEP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [("n\n", 2, "nothing was removed"), ("\n", 2, "nothing was removed"), ("", 2, "give --yes")],
)
def test_rm_asks(store: Store, run: Run, answer: str, code: int, told: str) -> None:
    """Whoever does not say yes, or cannot answer, keeps the sweep."""
    before = tree(Path(store.root))
    found, _, err = run("rm", "mini", answer=answer)
    assert found == code and told in err and "remove the sweep mini of 3 tasks from results?" in err
    assert "Traceback" not in err
    assert tree(Path(store.root)) == before


@pytest.mark.parametrize(("arguments", "answer"), [(("--yes",), ""), ((), "y\n")])
def test_rm_removes_the_sweep_and_no_row(store: Store, run: Run, arguments: tuple[str, ...], answer: str) -> None:
    """Every expansion goes, and nothing else; planning its tasks again finds its rows."""
    plan(store, "mini", A[:2])
    before = files(store)
    code, _, err = run("rm", "mini", *arguments, answer=answer)
    assert code == 0 and "removed the sweep mini; its rows stay" in err
    after = files(store)
    assert before.keys() - after.keys() == {name for name in before if name.startswith("sweeps/mini/")}
    assert after == {name: before[name] for name in after}
    assert store.sweeps() == ["other"] and not Path(store.root, "sweeps", "mini").exists()
    code, _, err = run("status", "mini")
    assert code == 2 and "there are: other" in err
    plan(store, "mini", A)
    assert store.sql("select done, failed, pending from sweeps where sweep = 'mini'").fetchall() == [(2, 0, 1)]


def test_rm_refuses_while_a_driver_is_at_work(store: Store, run: Run) -> None:
    """A sweep is not taken from under a driver, on this machine or another; one that is gone, or at another sweep,
    keeps nobody."""
    pid, started = ended_process()
    note(store, "drivers/gone", pid=pid, process_started=started)
    note(store, "drivers/others", sweep="other")
    for about in ({}, {"machine": "00000000", "pid": 1}):
        note(store, "drivers/living", **about)
        before = tree(Path(store.root))
        code, _, err = run("rm", "mini", "--yes")
        assert code == 2 and "a driver is at work on mini: `prunesweep stop mini` first" in err
        assert tree(Path(store.root)) == before
    store.scratch.forget("drivers/living")
    assert run("rm", "mini", "--yes")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("nosuch", "--yes"), 2, "no sweep nosuch in results; there are: mini, other"),
        (("../rows", "--yes"), 2, "no sweep ../rows in results"),
        ((), 2, "give a SWEEP, or --unused"),
        (("mini", "--unused", "--yes"), 2, "give a SWEEP, or --unused"),
        (("mini", "--yes", "--store", "elsewhere"), 5, "no store at elsewhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_rm_of_what_is_not_there(store: Store, run: Run, arguments: tuple[str, ...], code: int, told: str) -> None:
    """A mistake is told, and nothing is removed."""
    before = tree(Path.cwd())
    found, out, err = run("rm", *arguments)
    assert (found, out) == (code, "") and told in err
    assert tree(Path.cwd()) == before


# -- rm --unused --------------------------------------------------------------------------------------


def test_rm_unused_removes_what_no_sweep_needs(store: Store, run: Run) -> None:
    """Dense weights and checkpoints of a removed sweep are listed and go; those that a sweep needs, the rows and
    the kept networks stay."""
    for key in (A[2].task_id, B[1].task_id, DENSE.dense_id, "0" * 16):
        store.scratch.save_checkpoint(key, b"half a training")
    assert run("rm", "mini", "--yes")[0] == 0
    before = files(store)
    unneeded = {name for name in before if DENSE.dense_id in name or A[2].task_id in name or "0" * 16 in name}
    assert len(unneeded) == 4
    code, out, err = run("rm", "--unused", answer="n\n")
    assert code == 2 and "nothing was removed" in err
    assert out.split() == sorted(unneeded)
    assert files(store) == before
    code, out, err = run("rm", "--unused", answer="y\n")
    assert code == 0 and "remove 4 files, 155 bytes, from results?" in err
    assert err.endswith("removed 4 files, 155 bytes\n")
    after = files(store)
    assert before.keys() - after.keys() == unneeded
    assert after == {name: before[name] for name in after}
    assert {name.split("/")[0] for name in after} == {"sweeps", "rows", "dense", "networks", "scratch"}
    assert run("rm", "--unused") == (0, "", "removed 0 files, 0 bytes\n")
    assert files(store) == after


def test_rm_unused_keeps_what_the_newest_expansion_needs(store: Store, run: Run) -> None:
    """A dense model that only an older expansion started from goes; one that two sweeps need stays for one."""
    plan(store, "third", tasks(SAMPLED, 1))
    plan(store, "mini", B[:1])
    assert run("rm", "other", "--yes")[0] == 0
    assert run("rm", "--unused", "--yes")[:2] == (0, "")
    assert store.dense_ids() == {DENSE.dense_id, L1.dense.dense_id}
    plan(store, "mini", tasks(ORACLE, 1))
    code, out, _ = run("rm", "--unused", "--yes")
    assert code == 0 and [Path(name).name.split("-")[0] for name in out.splitlines()] == [L1.dense.dense_id]
    assert store.dense_ids() == {DENSE.dense_id}


def test_rm_unused_where_only_dense_weights_are_left(tmp_path: Path, run: Run) -> None:
    """Dense weights of sweeps that were removed before their first row can be removed as well."""
    store = Store(tmp_path / "results")
    store.commit_dense(DENSE.dense_id, b"weights")
    code, out, _ = run("rm", "--unused", "--yes", "--store", store.root)
    assert code == 0 and DENSE.dense_id in out
    assert store.dense_ids() == set()


# -- rm --rows, --networks, --dry-run --------------------------------------------------------------------


def test_rm_rows_removes_what_no_sweep_plans(store: Store, run: Run) -> None:
    """Rows of tasks that no newest expansion plans go, out of files that hold planned ones too; all else stays, and
    the bytes are those that the folder lost."""
    store.commit_rows("s0", [done(A[2]), done(B[1])])
    plan(store, "mini", A[:1])
    planned = {A[0].task_id, *(task.task_id for task in B)}
    kept = [row for row in rows(store) if row.task_id in planned]
    size = sum(store.sizes("rows").values())
    before = files(store)
    code, _, err = run("rm", "--rows", "--dry-run")
    assert code == 0 and "would remove 3 rows that no sweep plans, " in err and files(store) == before
    assert run("rm", "--rows", answer="n\n")[0] == 2 and files(store) == before
    code, _, err = run("rm", "--rows", "--yes")
    assert code == 0 and rows(store) == kept
    freed = size - sum(store.sizes("rows").values())
    assert f"removed 3 rows that no sweep plans, {freed:,} bytes" in err
    others = {name: content for name, content in before.items() if not name.startswith("rows/")}
    assert {name: content for name, content in files(store).items() if not name.startswith("rows/")} == others
    after = files(store)
    assert "removed 0 rows" in run("rm", "--rows", "--yes")[2] and files(store) == after


@pytest.mark.parametrize("option", ["--rows", "--networks"])
def test_rm_rows_and_networks_refuse_while_anything_is_at_work(store: Store, run: Run, option: str) -> None:
    """A driver or worker of any sweep, anywhere; a dry run shows what would go all the same."""
    plan(store, "mini", A[1:])
    for folder in ("drivers", "workers"):
        note(store, f"{folder}/living", sweep="other", machine="00000000", pid=1)
        before = files(store)
        code, _, err = run("rm", option, "--yes")
        assert code == 2 and "is at work" in err and files(store) == before
        assert run("rm", option, "--dry-run")[0] == 0 and files(store) == before
        store.scratch.forget(f"{folder}/living")
    assert run("rm", option, "--yes")[0] == 0 and files(store) != before


def test_rm_networks_removes_those_without_a_planned_task_or_a_row(store: Store, run: Run) -> None:
    """The network that a row of a planned task names stays, and foreign files do."""
    kept = store.commit_network(B[1].task_id, b"named")
    store.commit_rows("s1", [done(B[1], kept_network=kept)])
    lost = store.commit_network(B[0].task_id, b"no row names it")
    (old,) = [f"networks/{name}" for name in store.names("networks") if name.startswith(A[0].task_id)]
    Path(store.root, "networks", "mine.txt").write_text("mine")
    code, out, err = run("rm", "--networks", "--dry-run")
    assert code == 0 and out.split() == sorted([lost, old]) and "would remove 2 files, 24 bytes" in err
    assert run("rm", "--networks", "--yes")[2] == "removed 2 files, 24 bytes\n"
    assert sorted(store.names("networks")) == sorted([Path(kept).name, "mine.txt"])


def test_rm_networks_keeps_those_that_a_damaged_row_file_may_name(store: Store, run: Run) -> None:
    """Its row cannot be read: networks of planned tasks stay, and one of a task that no sweep plans goes."""
    store.commit_network("0" * 16, b"not planned")
    kept = store.commit_network(B[1].task_id, b"named")
    rows = Path(store.root, store.commit_rows("s1", [done(B[1], kept_network=kept)]))
    rows.write_bytes(rows.read_bytes()[:-1])
    assert run("rm", "--networks", "--yes")[2].endswith("removed 1 file, 11 bytes\n")
    assert Path(kept).name in store.names("networks")


@pytest.mark.parametrize("arguments", [("mini",), ("--unused",), ("--rows",), ("--networks",), ("--rows", "--unused")])
def test_a_dry_run_removes_nothing(store: Store, run: Run, arguments: tuple[str, ...]) -> None:
    """For every form of rm: what would go is shown with its bytes, nothing is asked."""
    if arguments != ("mini",):
        store.remove_sweep("mini")
    pid, started = ended_process()
    note(store, "drivers/gone", pid=pid, process_started=started)
    before = files(store)
    code, out, err = run("rm", *arguments, "--dry-run")
    assert code == 0 and "would remove" in err and " bytes" in err and files(store) == before
    assert ("scratch/drivers/gone.json" in out) == ("--unused" in arguments)
    if arguments == ("mini",):
        assert set(out.split()) == {name for name in before if name.startswith("sweeps/mini/")}


class Killed(Exception):
    """What ends a process."""


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=5),
    st.sets(st.integers(0, 9)),
    st.integers(0, 12),
    st.booleans(),
)
def test_rows_that_are_removed_by_a_process_that_is_killed(
    tmp_path: Path, committed: list[list[int]], planned: set[int], step: int, compacted: bool
) -> None:
    """After each step every planned row counts, once, and no other row is new; the next attempt ends it. What a
    compaction that was killed left in addition does no harm."""
    store = Store(tmp_path / uuid.uuid4().hex)
    given_tasks = tasks(ORACLE, 10)
    plan(store, "mini", [given_tasks[i] for i in sorted(planned)] or tasks(L1, 1))
    for numbers in committed:
        store.commit_rows("s0", [done(given_tasks[i]) for i in numbers])
    if compacted:
        originals = {name: store.read(name) for name in store.row_file_names()}
        store.compact()
        for name, content in list(originals.items())[::2]:
            store.commit(name, content)
    ids = {given_tasks[i].task_id for i in planned}
    before = lines(store)
    wanted = Counter({line: n for line, n in before.items() if line[0] in ids})

    class Dying(Store):
        left = step

        def delete(self, name: str) -> None:
            self.die()
            super().delete(name)
            check()

        def commit(self, name: str, content: bytes) -> None:
            self.die()
            super().commit(name, content)
            check()

        def die(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def check() -> None:
        found = lines(store)
        assert {line: n for line, n in found.items() if line[0] in ids} == wanted and found <= before

    dying = Dying(store.root)
    with suppress(Killed):
        remove_rows(dying, unplanned_rows(dying))
    check()
    remove_rows(store, unplanned_rows(store))
    assert lines(store) == wanted and unplanned_rows(store).rows == 0
    store.compact()
    assert lines(store) == wanted


def lines(store: Store) -> Counter[tuple[str, str]]:
    """Every row that counts, as its task and the file it was committed in."""
    table, _ = store.row_files(["task_id"])
    return Counter(zip(table["task_id"].to_pylist(), table["file"].to_pylist(), strict=True))


def test_rows_that_are_planned_meanwhile_stay(store: Store) -> None:
    """A sweep that is planned between the look and the removal keeps its rows, and what was written goes."""
    store.remove_sweep("mini")
    found = unplanned_rows(store)
    assert found.rows == 3
    plan(store, "third", A)
    before = files(store)
    with pytest.raises(StoreError, match="a sweep was planned or removed meanwhile"):
        remove_rows(store, found)
    assert files(store) == before


# -- tidy ---------------------------------------------------------------------------------------------


def test_tidy_removes_what_is_left_over_and_nothing_of_the_living(store: Store) -> None:
    """Notes of the dead, wishes to stop that nobody is left to heed, checkpoints of what is done, temporary files
    of writers that are gone: they go, at the end of every run and by rm --unused; what lives stays."""
    pid, started = ended_process()
    dead = {"pid": pid, "process_started": started}
    living = {"machine": "00000000", "pid": 1, "process_started": 1.0}
    for folder in ("drivers", "workers"):
        note(store, f"{folder}/here")
        note(store, f"{folder}/there", **living)
        note(store, f"{folder}/gone", **dead)
        note(store, f"{folder}/silent", **living, beat_at="2025-01-31T12:00:00")
        store.scratch.renew(f"{folder}/foreign", {"pid": 1})
    for driver in ("here", "there", "gone", "nobody"):
        store.scratch.note(f"stops/{driver}", {})
    for key in (A[0].task_id, A[2].task_id, B[1].task_id, DENSE.dense_id, "f" * 16):
        store.scratch.save_checkpoint(key, b"half a training")
    store.scratch.note("execution/0123", {"threads": 1})
    temporary = {
        name: Path(store.root, folder, f".x.parquet.{writer}-{uuid.uuid4().hex[:12]}.tmp")
        for name, folder, writer in (
            ("mine", "rows", f"{machine()}-{os.getpid()}"),
            ("gone", "rows", f"{machine()}-{pid}"),
            ("young", "scratch/checkpoints", "00000000-1"),
            ("old", "dense", "00000000-1"),
        )
    }
    for path in temporary.values():
        path.write_bytes(b"half a file")
    long_ago = time.time() - ABANDONED_SECONDS - 1
    os.utime(temporary["old"], (long_ago, long_ago))

    before = files(store)
    tidy(store, lambda task_id: store.statuses().get(task_id) == "done")
    after = files(store)
    removed = {"scratch/stops/gone.json", "scratch/stops/nobody.json"}
    removed |= {f"scratch/{f}/{name}.json" for f in ("drivers", "workers") for name in ("gone", "silent", "foreign")}
    removed |= {f"scratch/checkpoints/{key}.checkpoint" for key in (A[0].task_id, DENSE.dense_id)}
    removed |= {str(temporary[name].relative_to(store.root)) for name in ("gone", "old")}
    assert before.keys() - after.keys() == removed
    assert after == {name: before[name] for name in after}
    tidy(store, lambda task_id: store.statuses().get(task_id) == "done")
    assert files(store) == after


def test_rm_unused_tidies(store: Store, run: Run) -> None:
    """It removes the notes of the dead, too, and the checkpoint of a task that is done."""
    pid, started = ended_process()
    note(store, "drivers/gone", pid=pid, process_started=started)
    note(store, "drivers/here")
    store.scratch.save_checkpoint(A[0].task_id, b"half a training")
    store.scratch.save_checkpoint(A[2].task_id, b"half a training")
    assert run("rm", "--unused", "--yes")[0] == 0
    assert sorted(store.scratch.notes("drivers")) == ["drivers/here"]
    assert store.scratch.checkpoints() == [A[2].task_id]


# -- room ---------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_anything_runs(
    tmp_path: Path, tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose rows do not fit ends at once, with the store's exit code, how much is needed and what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.run.drive", lambda *_: pytest.fail("it was run all the same"))
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 8 * ROW_BYTES - 1)
    code, out, err = run("run", "tiny.yaml", "--inline")
    assert (code, out) == (5, "")
    assert re.search(r"about 0\.1 MB will be written to results, and its disk has 0\.1 MB to spare: make room", err)
    assert "--store" in err and "Traceback" not in err
    assert not {name.split("/")[0] for name in files(Store("results"))} & {"rows", "dense", "scratch"}


def test_room_for_exactly_what_is_left_is_enough(
    tmp_path: Path, tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is unfinished has to fit, with the networks to keep; and a sweep that is done needs nothing."""
    monkeypatch.chdir(tmp_path)
    driven: list[int] = []

    def drive(_: object, found: Any, *__: object) -> list[str]:
        driven.append(found.unfinished)
        return []

    monkeypatch.setattr("orchestrator.run.drive", drive)
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 8 * ROW_BYTES)
    assert run("run", "tiny.yaml", "--inline")[0] == 3 and driven == [8]
    store = Store("results")
    planned = [one.task for one in planned_tasks(store.plan_table(store.newest("tiny")))]
    store.commit_rows("s0", [done(task) for task in planned[:3]])
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 5 * ROW_BYTES - 1)
    assert run("resume", "tiny", "--inline")[0] == 5 and driven == [8]
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 5 * ROW_BYTES)
    assert run("resume", "tiny", "--inline")[0] == 3 and driven == [8, 5]

    keeping = ("run", "tiny.yaml", "--inline", "--set", "retrain.keep=last")
    assert run(*keeping)[0] == 3 and driven == [8, 5, 5]
    store.commit_dense(planned[0].cell.dense.dense_id, bytes(1000))
    assert run(*keeping)[0] == 5 and driven == [8, 5, 5]
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 5 * ROW_BYTES + 5000)
    assert run(*keeping)[0] == 3 and driven == [8, 5, 5, 5]

    store.commit_rows("s0", [done(task) for task in planned[3:]])
    monkeypatch.setattr("orchestrator.plan.room", lambda _: 0)
    assert run("resume", "tiny", "--inline")[0] == 0 and driven == [8, 5, 5, 5]


def test_a_disk_that_is_full_takes_nothing(
    tmp_path: Path, tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept free on the store's disk stays free: not even the plan is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("storage.commit.RESERVE_BYTES", 2**80)
    code, out, err = run("run", "tiny.yaml", "--inline")
    assert (code, out) == (5, "") and "is full" in err and "make room and resume" in err
    assert files(Store("results")) == {}
