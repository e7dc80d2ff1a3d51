"""The store: files whole or not at all, never replaced; what is not ours is skipped and reported."""

import datetime as dt
import errno
import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from storage.commit import commit
from storage.digests import expansion_digest
from storage.encoding import FEW_ROWS, parquet
from storage.errors import DamagedError, QueryError, SkippedFile, StoreError
from storage.manifest import Manifest, PlannedTask, plan_content, planned_tasks
from storage.records import Removed, Row, Task, utc_now
from storage.rowfiles import Attempts, Problem
from storage.schema import SCHEMA, rows_to_table, table_to_rows
from storage.sql import run_query
from storage.store import Store
from tests.rows import L1, NOON, ORACLE, SAMPLED, done, failed, plan, tasks, tree

LOCAL = pafs.LocalFileSystem()
FIRST, SECOND = b"first", b"second"


def _raise(code: int) -> Callable[..., None]:
    def call(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return call


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


# -- commit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_commit_that_fails_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or dying disk gives StoreError, no file under the final name and no temporary one."""
    monkeypatch.setattr(os, step, _raise(errno.EIO))
    with pytest.raises(StoreError, match=r"rows.*Input/output error"):
        Store(tmp_path).commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    assert tree(tmp_path) == {"rows": b""}


def test_content_is_durable_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is made durable, the file synced whole, then named, then the name made durable."""
    path, seen = tmp_path / "rows" / "one", []
    fsync, link = os.fsync, os.link

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().parent.name, path.exists()))

    def watched_link(source: Path, target: Path) -> None:
        seen.append((source.read_bytes(), target.exists()))
        link(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "link", watched_link)
    commit(LOCAL, str(path), FIRST)
    above = tmp_path.parent.name
    assert seen == [(above, False), ("rows", False), (FIRST, False), (tmp_path.name, True)]
    assert tree(tmp_path) == {"rows": b"", "rows/one": FIRST}


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    """Of two commits to one name the first stays, and the second leaves nothing behind."""
    for content in (FIRST, SECOND):
        commit(LOCAL, str(tmp_path / "one"), content)
    assert tree(tmp_path) == {"one": FIRST}


def test_an_existing_file_is_never_replaced_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that cannot link keeps the promise too."""
    monkeypatch.setattr(os, "link", _raise(errno.EPERM))
    for content in (FIRST, SECOND):
        commit(LOCAL, str(tmp_path / "one"), content)
    assert tree(tmp_path) == {"one": FIRST}


def test_an_existing_object_is_never_replaced(tmp_path: Path) -> None:
    """An object store keeps the promise too, as far as one that is asked first can."""
    objects = pafs.SubTreeFileSystem(str(tmp_path), LOCAL)
    for content in (FIRST, SECOND):
        commit(objects, "one", content)
    assert tree(tmp_path) == {"one": FIRST}


def test_a_temporary_file_left_by_a_killed_writer_is_no_file_of_the_store(tmp_path: Path) -> None:
    """Readers neither read nor report what a killed commit left behind."""
    store = Store(tmp_path)
    name = store.commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    (tmp_path / "rows" / ".s0-1.parquet.2.tmp").write_bytes(b"PAR1")
    table, problems = store.row_files()
    assert (table["file"].to_pylist(), problems) == ([name], [])


def test_a_note_stays_what_it_was(tmp_path: Path) -> None:
    """What was noted first, an execution choice say, is what everyone is told."""
    store = Store(tmp_path)
    assert store.scratch.note("execution/x", {"threads": 1}) == {"threads": 1}
    assert store.scratch.note("execution/x", {"threads": 2}) == {"threads": 1}
    assert store.scratch.notes("execution") == {"execution/x": {"threads": 1}}
    store.scratch.forget("execution/x")
    store.scratch.forget("execution/x")
    assert store.scratch.noted("execution/x") is None


# -- rows ---------------------------------------------------------------------------------------------


def test_rows_come_back_with_their_file(tmp_path: Path) -> None:
    """Every committed row is read back exactly, from one file per commit named after its shard."""
    store, rows = Store(tmp_path), [done(task, pruned_train_loss=task.candidate / 7) for task in tasks(ORACLE, 5, 2)]
    names = [store.commit_rows("s0", rows[:4]), store.commit_rows("s1", rows[4:])]
    table, problems = store.row_files()
    key = [row.task_id for row in rows].index
    assert sorted(table_to_rows(table), key=lambda row: key(row.task_id)) == rows
    assert sorted(set(table["file"].to_pylist())) == sorted(names)
    assert [name.startswith(f"rows/s{i}-") for i, name in enumerate(names)] == [True, True]
    assert problems == []


def test_statuses_and_attempts(tmp_path: Path) -> None:
    """A task with any done row is done, and a shard's own files tell every attempt at its tasks."""
    store, (a, b, c) = Store(tmp_path), tasks(ORACLE, 3)
    for shard, rows in (("s0", [failed(a), done(a), failed(a)]), ("s0", [failed(b)]), ("s01", [done(c)])):
        store.commit_rows(shard, rows)
    assert store.statuses() == {a.task_id: "done", b.task_id: "failed", c.task_id: "done"}
    attempts = Attempts(store, "s0", (a.task_id, b.task_id)).look()
    assert {task: sorted(found) for task, found in attempts.items()} == {
        a.task_id: ["done", "failed", "failed"],
        b.task_id: ["failed"],
    }


def test_of_several_rows_done_beats_failed_then_the_earliest_then_the_file_name(tmp_path: Path) -> None:
    """Zombies and races are legal: every reader chooses the same row, whatever the order of the files."""
    store, (task, other) = Store(tmp_path), tasks(ORACLE, 2)
    later = NOON + dt.timedelta(seconds=1)
    store.commit_rows("s0", [failed(task, host="failed, first", finished_at=NOON - dt.timedelta(days=1))])
    store.commit_rows("s0", [done(task, host="no time", finished_at=None)])
    store.commit_rows("s0", [done(task, host="late", finished_at=later)])
    names = [store.commit_rows("s0", [done(task, host=host)]) for host in ("one", "two", "three")]
    store.commit_rows("s0", [failed(other, host="late failure", finished_at=later)])
    store.commit_rows("s0", [failed(other, host="early failure")])
    first_by_name = dict(zip(names, ("one", "two", "three"), strict=True))[min(names)]
    found = dict(store.sql("select task_id, host from rows").fetchall())
    assert found == {task.task_id: first_by_name, other.task_id: "early failure"}
    assert store.sql("select count(*) from attempts").fetchall() == [(8,)]


def _damaged(good: bytes) -> dict[str, bytes]:
    """Files that are no rows, by name."""
    table = pq.read_table(io.BytesIO(good))
    at = table.column_names.index("seed")
    flipped = bytearray(good)
    flipped[good.index(ORACLE.cell_id.encode()) + 3] ^= 1
    return {
        "empty": b"",
        "text": b"not parquet\n",
        "head": good[:-1],
        "half": good[: len(good) // 2],
        "tail": good[len(good) // 2 :],
        "flipped": bytes(flipped),
        "foreign": _parquet(pa.table({"a": [1]})),
        "lacking": _parquet(table.drop_columns(["status"])),
        "twice": _parquet(table.append_column("seed", table["seed"])),
        "retyped": _parquet(table.set_column(at, "seed", pa.array([[0]]))),
        "words": _parquet(table.set_column(at, "seed", pa.array(["zero"]))),
    }


def test_torn_and_foreign_files_are_skipped_and_reported_once(tmp_path: Path) -> None:
    """No file in rows/ can stop a query or enter its answer, and each one is named with a reason."""
    store, task = Store(tmp_path), Task(ORACLE, 0, 0)
    name = store.commit_rows("s0", [done(task)])
    damaged = _damaged((tmp_path / name).read_bytes())
    for stem, content in damaged.items():
        (tmp_path / "rows" / f"s0-{stem}.parquet").write_bytes(content)
    reported: list[Problem] = []
    answer = run_query(store, "select task_id from attempts", reported.append)
    assert answer["task_id"].to_pylist() == [task.task_id]
    assert sorted(problem.file for problem in reported) == sorted(f"rows/s0-{stem}.parquet" for stem in damaged)
    assert all(problem.reason and "\n" not in problem.reason for problem in reported)
    assert store.statuses() == {task.task_id: "done"}
    assert Attempts(store, "s0", (task.task_id,)).look() == {task.task_id: ["done"]}


# -- sweeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, FEW_ROWS + 1], ids=["plain", "compressed"])
def test_a_file_is_whole_or_none_whatever_columns_are_asked_for(count: int, tmp_path: Path) -> None:
    """A byte that changed in a column nobody asked for takes out the file all the same; what others wrote counts."""
    store, rows = Store(tmp_path), [done(task, host="here") for task in tasks(ORACLE, count)]
    content = parquet(rows_to_table(rows))
    at = content.index(b"here") if count == 1 else len(content) // 2
    damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    others = _parquet(pq.read_table(io.BytesIO(content)))  # it carries our checksum, which is wrong there
    for name, written in (("whole", content), ("damaged", damaged), ("others", others)):
        store.commit(f"rows/s0-{name}.parquet", written)
    for columns in (["status"], ["task_id", "host"], [], None):
        table, problems = store.row_files(columns)
        assert Counter(table["file"].to_pylist()) == {f"rows/s0-{name}.parquet": count for name in ("whole", "others")}
        assert [problem.file for problem in problems] == ["rows/s0-damaged.parquet"]
        assert table.column_names == [*(SCHEMA.names if columns is None else columns), "file"]


def test_many_rows_come_back_from_a_compressed_file(tmp_path: Path) -> None:
    """Every column, of rows that have all of them and of rows that have none."""
    store, task = Store(tmp_path), Task(L1, 0, 0)
    curve: tuple[float | None, ...] = (0.5, None, 0.25)
    full = {
        "epoch_train_loss": curve,
        "epoch_test_loss": curve,
        "epoch_test_accuracy": (),
        "score_extra": (("a", 1.0),),
    }
    removed = (Removed("conv1", (1, 4)), Removed("conv2", ()))
    rows = [done(task, removed=removed, last_test_loss=0.1 * k, **full) for k in range(FEW_ROWS)] + [failed(task)]
    store.commit_rows("s0", rows)
    assert table_to_rows(store.row_files()[0]) == rows


def test_the_same_expansion_twice_is_one_manifest(tmp_path: Path) -> None:
    """`run` again adds nothing, a changed spec or other tasks make the newer expansion the sweep."""
    store, planned = Store(tmp_path), [PlannedTask("s0", task) for task in tasks(ORACLE, 3, 2)]
    first = store.write_manifest("mini", "ratio: 0.2\n", planned)
    before = tree(tmp_path)
    assert store.write_manifest("mini", "ratio: 0.2\n", iter(planned)) == first
    assert tree(tmp_path) == before

    respelt = store.write_manifest("mini", "ratio:  0.2\n", planned)
    grown = store.write_manifest("mini", "ratio:  0.2\n", [*planned, PlannedTask("s1", Task(ORACLE, 3, 0))])
    back = store.write_manifest("mini", "ratio: 0.2\n", planned)
    assert first.stem < respelt.stem < grown.stem < back.stem
    assert store.manifest("mini") == back == store.newest("mini")
    assert len(list((tmp_path / "sweeps" / "mini").iterdir())) == 8


@pytest.mark.parametrize("ahead", [dt.timedelta(hours=5), dt.timedelta(days=36500)])
def test_the_newest_expansion_wins_though_a_clock_is_fast(
    ahead: dt.timedelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine with a fast clock expanded does not hide what others expand afterwards."""
    store, (first, *more) = Store(tmp_path), tasks(ORACLE, 4)
    right = "storage.store.utc_now"
    with monkeypatch.context() as fast:
        fast.setattr(right, lambda: utc_now() + ahead)
        plan(store, "mini", [first])
    for at in range(1, 4):
        plan(store, "mini", [first, *more[:at]])
        assert len(store.plan_table(store.newest("mini"))) == 1 + at
    assert len({file.split("-")[0] for file in store.names("sweeps/mini")}) == 4


def test_no_time_after_the_last(tmp_path: Path) -> None:
    """The end of the calendar is an error of the store, not of the program."""
    store = Store(tmp_path)
    plan(store, "mini", tasks(ORACLE, 1))
    for file in (tmp_path / "sweeps" / "mini").iterdir():
        file.rename(file.with_name(f"99991231T235959999999Z-{file.name.split('-')[1]}"))
    with pytest.raises(StoreError, match=r"99991231T235959999999Z-.*no later time"):
        plan(store, "mini", tasks(ORACLE, 2))


def test_an_expansion_without_tasks_is_an_error(tmp_path: Path) -> None:
    """It is not recorded, and one that someone made by hand is refused."""
    store = Store(tmp_path)
    with pytest.raises(QueryError, match="the sweep mini has no task"):
        plan(store, "mini", [])
    assert tree(tmp_path) == {}
    spec, content = b"name: mini\n", plan_content([])
    for suffix, made in (("yaml", spec), ("parquet", content)):
        name = f"sweeps/mini/20250131T120000000000Z-{expansion_digest(spec, content)}.{suffix}"
        store.commit(name, made)
    for ask in (lambda: store.plan_table(store.newest("mini")), lambda: list(map(store.plan_table, store.manifests()))):
        with pytest.raises(DamagedError, match="it has no task"):
            ask()


def _expanded_twice(store: Store) -> tuple[Manifest, Manifest]:
    found = []
    for count in (1, 2):
        plan(store, "mini", tasks(ORACLE, count))
        found.append(store.newest("mini"))
    return found[0], found[1]


def test_files_with_other_names_are_not_expansions(tmp_path: Path) -> None:
    """Whatever their names sort like, they are not taken for the newest."""
    store = Store(tmp_path)
    _, newest = _expanded_twice(store)
    content = store.read(newest.files[1])
    for name in ("zzz", "A copy", f"{newest.stem} (2)", newest.stem.upper()):
        store.commit(f"sweeps/mini/{name}.parquet", content)
    store.commit("sweeps/only copies/zzz.parquet", content)
    assert (store.manifest("mini"), store.newest("mini"), store.sweeps()) == (newest, newest, ["mini"])


def test_an_expansion_that_was_cut_off_is_a_warning(tmp_path: Path) -> None:
    """Its tasks were never written, or removed: the one before it counts, and the file is named."""
    store = Store(tmp_path)
    older, newest = _expanded_twice(store)
    store.delete(newest.files[1])
    with pytest.warns(SkippedFile, match=rf"{newest.files[1]}: the file is missing.*{older.stem} is used"):
        assert store.newest("mini") == older
    store.delete(older.files[1])
    with pytest.raises(DamagedError, match=rf"{newest.files[1]}: the file is missing.*run its spec again"):
        store.newest("mini")


@pytest.mark.parametrize("which", [0, 1])
def test_running_the_spec_again_heals_a_damaged_expansion(which: int, tmp_path: Path) -> None:
    """The same expansion is written anew; `rm` removes a damaged one."""
    store = Store(tmp_path)
    _, newest = _expanded_twice(store)
    (tmp_path / newest.files[which]).write_bytes(b"")
    with pytest.raises(DamagedError, match=rf"{newest.files[which]}.*digest"):
        store.newest("mini")
    plan(store, "mini", tasks(ORACLE, 2))
    assert len(store.plan_table(store.newest("mini"))) == 2 and store.newest("mini").stem > newest.stem
    store.remove_sweep("mini")
    assert store.sweeps() == [] and not list(tmp_path.glob("sweeps/*"))


def test_an_expansion_comes_back_whole_and_in_order(tmp_path: Path) -> None:
    """The store holds the spec as given and every task with its shard, in the grid's order."""
    store = Store(tmp_path)
    planned = [PlannedTask(f"s{i % 3}", task) for i, task in enumerate(tasks(SAMPLED, 4, 2) + tasks(L1, 1))]
    manifest = store.write_manifest("mini", "# as given\nname: mini\n", planned)
    table = store.plan_table(manifest)
    assert list(planned_tasks(table)) == planned
    assert table["position"].to_pylist() == list(range(9))
    assert table["task_id"].to_pylist() == [one.task.task_id for one in planned]
    assert store.spec_text(manifest) == "# as given\nname: mini\n"
    assert manifest.expanded_at.startswith("20")


def test_sweeps_are_listed_by_name_with_their_newest_expansion(tmp_path: Path) -> None:
    """A store tells its sweeps, and an unknown one is answered with those there are."""
    store = Store(tmp_path)
    assert (store.sweeps(), store.exists(), store.manifest("mini")) == ([], False, None)
    for name, cell in (("mini", ORACLE), ("atom", L1), ("mini", SAMPLED)):
        plan(store, name, tasks(cell, 1))
    assert (store.sweeps(), store.exists()) == (["atom", "mini"], True)
    assert [store.plan_table(m)["cell_id"].to_pylist() for m in store.manifests()] == [[L1.cell_id], [SAMPLED.cell_id]]
    with pytest.raises(QueryError, match=r"no sweep mega .*: atom, mini$"):
        store.newest("mega")


@pytest.mark.parametrize("content", [b"", b"PAR1 torn", _parquet(pa.table({"a": [1]}))], ids=["empty", "torn", "other"])
def test_a_damaged_expansion_is_a_store_error(content: bytes, tmp_path: Path) -> None:
    """A plan that cannot be read stops, naming the file: what a sweep has left to do is never guessed."""
    store = Store(tmp_path)
    plan(store, "mini", tasks(ORACLE, 1))
    manifest = store.newest("mini")
    (tmp_path / "sweeps" / "mini" / f"{manifest.stem}.parquet").write_bytes(content)
    with pytest.raises(StoreError, match=manifest.stem):
        store.plan_table(manifest)


# -- dense weights ------------------------------------------------------------------------------------


def test_the_dense_weights_committed_first_win(tmp_path: Path) -> None:
    """Two trainings of one dense model are legal, and everyone prunes the one committed first."""
    store = Store(tmp_path)
    assert store.dense("d0") is None
    names = {content: store.commit_dense("d0", content) for content in (FIRST, SECOND)}
    other = store.commit_dense("d00", b"another model")
    os.utime(tmp_path / other, ns=(0, 0))
    (tmp_path / "dense" / ".d0-left.tmp").touch()
    for winner, loser in ((FIRST, SECOND), (SECOND, FIRST)):
        os.utime(tmp_path / names[winner], ns=(0, 10**18))
        os.utime(tmp_path / names[loser], ns=(0, 10**18 + 1))
        found = store.dense("d0")
        assert found is not None
        assert (found.name, found.content) == (names[winner], winner)
        assert found.name == f"dense/d0-{found.sha256[:8]}.safetensors"
    assert store.dense_ids() == {"d0", "d00"}


def test_damaged_dense_weights_do_not_count(tmp_path: Path) -> None:
    """Weights that are not what their name says are never pruned, and can be set aside."""
    store = Store(tmp_path)
    name, other = store.commit_dense("d0", FIRST), store.commit_dense("d0", SECOND)
    os.utime(tmp_path / other, ns=(0, 2 * 10**18))
    (tmp_path / name).write_bytes(FIRST[:-1])
    found = store.dense("d0")
    assert found is not None and found.content == SECOND
    assert [problem.file for problem in store.set_damaged_dense_aside("d0")] == [name]
    assert store.set_damaged_dense_aside("d0") == []
    assert (store.names("dense"), len(store.names("aside"))) == ([Path(other).name], 1)


def test_a_kept_network_is_named_by_its_content(tmp_path: Path) -> None:
    """A kept network is found by its task, and the one of another attempt stands beside it."""
    store = Store(tmp_path)
    names = [store.commit_network("t0", content) for content in (FIRST, SECOND, FIRST)]
    assert names[0] == names[2] != names[1]
    assert [(tmp_path / name).read_bytes() for name in names] == [FIRST, SECOND, FIRST]
    assert all(name.startswith("networks/t0-") for name in names)


# -- locations ----------------------------------------------------------------------------------------


def test_check_writable_leaves_no_trace(tmp_path: Path) -> None:
    """Asking first makes no folder and leaves no file, for a store that is there and one that is not."""
    plan(Store(tmp_path / "there"), "mini", tasks(ORACLE, 1))
    before = tree(tmp_path)
    for location in (tmp_path / "there", tmp_path / "not" / "yet", (tmp_path / "uri").as_uri()):
        Store(location).check_writable()
    assert tree(tmp_path) == before


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before a sweep starts, not after its first hour."""
    file = tmp_path / "file"
    file.touch()
    for bad in (file, file / "below", file / "far" / "below", tmp_path / ("long" * 100)):
        with pytest.raises(StoreError):
            Store(bad).check_writable()
        with pytest.raises(StoreError):
            Store(bad).commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    monkeypatch.setattr(Path, "touch", _raise(errno.EROFS))
    with pytest.raises(StoreError, match="not writable: Read-only file system"):
        Store(tmp_path / "new").check_writable()


@pytest.mark.parametrize("location", ["nosuch://bucket/prefix", "file://relative/path"])
def test_a_location_that_is_none_is_a_store_error(location: str) -> None:
    """A mistyped --store is told as such, with the location."""
    with pytest.raises(StoreError, match=location):
        Store(location)


def test_a_file_uri_is_the_path(tmp_path: Path) -> None:
    """A URI and a path to one folder, spaces and all, are one store."""
    folder = tmp_path / "a store"
    path, uri = Store(folder), Store(folder.as_uri() + "/")
    assert "a%20store" in uri.location
    uri.check_writable()
    plan(uri, "mini", tasks(ORACLE, 2))
    name = uri.commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    uri.commit_dense("d0", FIRST)
    assert (folder / name).is_file()
    query = "select task_id, status from tasks order by position"
    assert path.sql(query).fetchall() == uri.sql(query).fetchall() == [(t.task_id, s) for t, s in _two()]
    assert (path.sweeps(), path.dense("d0")) == (["mini"], uri.dense("d0"))
    assert path.row_files()[0].equals(uri.row_files()[0])
    assert path.root == uri.root
    assert uri.is_local


def _two() -> list[tuple[Task, str]]:
    return list(zip(tasks(ORACLE, 2), ("done", "pending"), strict=True))


def test_an_object_store_works_like_a_folder(tmp_path: Path) -> None:
    """Nothing but plain reads, lists and puts is asked of the file system."""
    store = Store(tmp_path)
    store.fs = store._for_small = pafs.SubTreeFileSystem(str(tmp_path), LOCAL)
    store.root = "prefix"
    for folder in ("sweeps/mini", "rows", "dense", "scratch/x"):  # on an object store, folders need not be
        (tmp_path / "prefix" / folder).mkdir(parents=True)
    before = tree(tmp_path)
    store.check_writable()
    assert tree(tmp_path) == before
    plan(store, "mini", tasks(ORACLE, 2))
    store.commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    store.commit_dense("d0", FIRST)
    found = store.dense("d0")
    assert found is not None
    assert found.content == FIRST
    assert [store.scratch.note("x/y", {"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 1}]
    query = "select task_id, status from tasks order by position"
    assert store.sql(query).fetchall() == [(t.task_id, s) for t, s in _two()]
    assert (store.sweeps(), store.is_local) == (["mini"], False)


def test_what_two_compactions_have_is_never_lost_to_a_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction that is slow to remove, one that is killed and one that begins between them: every row stays."""
    store = Store(tmp_path)
    monkeypatch.setattr("storage.rowfiles.COMPACTED_ROWS", 5)
    first, second, both = (done(task) for task in tasks(ORACLE, 3))
    names = {one: f"rows/s0-{i}.parquet" for i, one in enumerate((first, second, both))}

    def table(*some: Row) -> pa.Table:
        whole = rows_to_table(some)
        return whole.append_column("file", pa.array([names[one] for one in some], pa.string()))

    store.commit("rows/compact-1a.parquet", parquet(table(both, first)))
    store.commit("rows/compact-2b.parquet", parquet(table(both, second)))
    before = store.statuses()
    delete, held = Store.delete, list[str]()
    monkeypatch.setattr(Store, "delete", lambda _, name: held.append(name))  # a slow one, and a killed one
    store.compact()
    store.compact()
    monkeypatch.setattr(Store, "delete", delete)
    store.compact()
    assert store.statuses() == before
    for name in held:
        store.delete(name)
    assert store.statuses() == before and len(before) == 3


def test_what_a_newer_version_wrote_is_not_merged(tmp_path: Path) -> None:
    """Its columns are not ours to drop: its rows count, and its file stays as it is."""
    store = Store(tmp_path)
    newer = rows_to_table([replace(done(Task(ORACLE, 0, 0)), schema_version=99)]).append_column("news", pa.array([1]))
    store.commit("rows/s0-0.parquet", parquet(newer))
    for task in tasks(ORACLE, 3)[1:]:
        store.commit_rows("s0", [done(task)])
    store.compact()
    assert "rows/s0-0.parquet" in store.row_file_names() and len(store.row_file_names()) == 2
    assert len(store.statuses()) == 3
    assert b"news" in store.read("rows/s0-0.parquet")


def test_credentials_are_not_taken_from_a_uri() -> None:
    """They would stand in job metadata, in notes and on the screen; the message does not repeat them."""
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as refusal:
        Store("s3://KEY:SECRET@bucket/prefix")
    assert "SECRET" not in str(refusal.value)
