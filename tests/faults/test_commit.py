"""Commit and compaction at their worst: killed anywhere, the disk full or failing, everyone at once."""

from __future__ import annotations

import datetime as dt
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

import storage.commit
from storage import upkeep
from storage.commit import RESERVE_BYTES, commit, replace, room
from storage.errors import StoreError
from storage.machine import machine
from storage.records import Task
from storage.rowfiles import Problem, parquet
from storage.schema import REQUIRED, rows_to_table
from storage.sql import connection, run_query
from storage.store import Store
from tests.faults.crowd import play, whose
from tests.faults.kills import CONTENT, NAME, STEPS, STORE, deaths
from tests.rows import NOON, ORACLE, done, failed, plan, tasks, tree

LOCAL = pafs.LocalFileSystem()
TASK = Task(ORACLE, 0, 0)
OLD = b"old"
WAYS = {"commit": commit, "replace": replace}

Seen = dict[str, Any]


def one_row() -> bytes:
    """A row file with one row, larger than what is written at once."""
    return parquet(rows_to_table([done(TASK, kept_network="x" * 20_000)]))


def seen(folder: Path) -> Seen:
    """All that readers see of a store's rows, sorted."""
    store, reported = Store(folder), list[Problem]()
    with connection(store, reported.append) as con:
        attempts = con.sql("select * from attempts order by task_id, file, status, host").to_arrow_table()
        rows = con.sql("select * from rows order by task_id").to_arrow_table()
    return {
        "attempts": attempts.to_pylist(),
        "rows": rows.to_pylist(),
        "statuses": store.statuses(),
        "problems": sorted(problem.file for problem in reported),
    }


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {name: found for name, found in tree(folder).items() if (folder / name).is_file()}


def temporaries(folder: Path) -> list[str]:
    """The temporary files below a folder."""
    return sorted(name for name in tree(folder) if name.endswith(".tmp"))


def plain(name: str) -> str:
    """A file's name without what is new in it every time."""
    if name.endswith(".tmp"):
        return str(Path(name).with_name("temporary"))
    return re.sub(r"(compact|aside/)-?[0-9a-f]{8,40}", r"\1", name)


def distinct(folders: list[Path]) -> list[Path]:
    """One of all folders with the same files in their stores: readers find nothing but these."""

    def same(content: bytes) -> bytes:
        return re.sub(rb"(prunesweep\.commit..)[0-9a-f]{32}", rb"\1", content, flags=re.DOTALL)

    kinds = {frozenset((plain(n), same(c)) for n, c in tree(folder / STORE).items()): folder for folder in folders}
    return list(kinds.values())


def tidy(folder: Path) -> None:
    """Upkeep of a store in which every task is done."""
    upkeep.tidy(Store(folder), lambda task_id: True)


# -- killed -------------------------------------------------------------------------------------------


def template_for_commit(template: Path, way: str, *, there: bool) -> bytes:
    """A store about to get one more file, whose content this returns; its folder may be there already."""
    (template / STORE).mkdir(parents=True)
    (template / CONTENT).write_bytes(one_row())
    if there:
        (template / STORE / NAME).parent.mkdir()
    if way == "replace" and there:
        (template / STORE / NAME).write_bytes(OLD)
    return (template / CONTENT).read_bytes()


@pytest.mark.parametrize("there", [True, False], ids=["folder", "no folder"])
def test_a_commit_killed_before_any_of_its_calls_is_whole_or_absent(there: bool, tmp_path: Path) -> None:
    """A kill leaves no row or one, never a part; tidying removes the rest, and the commit works again."""
    whole = template_for_commit(tmp_path / "template", "commit", there=there)
    killed = deaths("commit", tmp_path / "template", tmp_path / "out")
    assert len(killed) > 60
    kinds = distinct(killed)
    found = {(temporary_sizes(folder), (folder / STORE / NAME).exists()) for folder in kinds}
    size = len(whole)
    assert found == {((), False), ((0,), False), ((size,), False), ((size,), True), ((), True)}
    for folder in kinds:
        check_commit(folder / STORE, whole)


def temporary_sizes(folder: Path) -> tuple[int, ...]:
    """The sizes of the temporary files below a folder."""
    return tuple((folder / STORE / name).stat().st_size for name in temporaries(folder / STORE))


def check_commit(store: Path, whole: bytes) -> None:
    """After a kill: a whole row or none, which tidying does not change, and committing makes it one."""
    committed = (store / NAME).exists()
    for _ in range(2):
        assert not committed or (store / NAME).read_bytes() == whole
        (store / "rows").mkdir(parents=True, exist_ok=True)  # where the kill came first, there is no store to read yet
        found = seen(store)
        assert (len(found["attempts"]), len(found["rows"])) == (committed, committed)
        assert found["statuses"] == ({TASK.task_id: "done"} if committed else {})
        assert found["problems"] == []
        tidy(store)
        assert temporaries(store) == []
    Store(store).commit(NAME, whole)
    assert tree(store) == {"rows": b"", NAME: whole}
    once = seen(store)
    assert (len(once["attempts"]), len(once["rows"])) == (1, 1)
    assert Store(store).compact().rows == 1
    assert seen(store) == once


@pytest.mark.parametrize("there", [True, False], ids=["file", "no folder"])
def test_a_replacement_killed_before_any_of_its_calls_is_old_or_new(there: bool, tmp_path: Path) -> None:
    """Whatever a kill leaves under the name is the old content or the new one, whole, and the next works."""
    new = template_for_commit(tmp_path / "template", "replace", there=there)
    killed = deaths("replace", tmp_path / "template", tmp_path / "out")
    assert len(killed) > 60
    contents = set[bytes | None]()
    for folder in distinct(killed):
        path = folder / STORE / NAME
        contents.add(path.read_bytes() if path.exists() else None)
        tidy(folder / STORE)
        assert temporaries(folder / STORE) == []
        replace(LOCAL, str(path), new)
        assert tree(folder / STORE) == {"rows": b"", NAME: new}
    assert contents == {OLD if there else None, new}


@pytest.mark.parametrize("way", WAYS)
def test_a_kill_in_the_middle_of_writing_leaves_no_part_under_the_name(way: str, tmp_path: Path) -> None:
    """A part of the content, of any length, is under a temporary name only, and tidying removes it."""
    whole = template_for_commit(tmp_path / "template", way, there=True)
    sizes = [1, 4096, 8191, 8192, 8193, len(whole) // 2, len(whole) - 1]
    killed = deaths(way, tmp_path / "template", tmp_path / "out", ",".join(map(str, sizes)))
    assert sorted(temporary_sizes(folder) for folder in killed) == [(size,) for size in sorted(sizes)]
    for folder in killed:
        path = folder / STORE / NAME
        assert (path.read_bytes() if path.exists() else None) == (OLD if way == "replace" else None)
        tidy(folder / STORE)
        WAYS[way](LOCAL, str(path), whole)
        assert tree(folder / STORE) == {"rows": b"", NAME: whole}


def template_for_compaction(template: Path) -> Seen:
    """A store with row files of all kinds: several attempts at a task, an earlier compaction whose files
    did not all go, one that is none of ours; and what its readers see."""
    folder = template / STORE
    store, (a, b, c, d) = Store(folder), tasks(ORACLE, 4)
    early = store.commit_rows("s0", [failed(a), done(b)])
    kept = (folder / early).read_bytes()
    store.commit_rows("s1", [done(a, host="late", finished_at=NOON + dt.timedelta(seconds=1)), done(b)])
    assert store.compact().written == 1
    (folder / early).write_bytes(kept)
    for shard, rows in (("s0", [done(c, host="twin")]), ("s1", [done(c), failed(d)]), ("s1", [])):
        store.commit_rows(shard, rows)
    (folder / "rows" / "s2-torn.parquet").write_bytes(kept[: len(kept) // 2])
    return seen(folder)


@pytest.mark.parametrize("steps", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_a_compaction_killed_before_any_of_its_calls_changes_no_answer(steps: str, tmp_path: Path) -> None:
    """Readers see the very same rows after a kill, and the next compaction leaves one file and nothing else."""
    before = template_for_compaction(tmp_path / "template")
    assert (len(before["attempts"]), len(before["rows"]), before["problems"]) == (7, 4, ["rows/s2-torn.parquet"])
    killed = deaths("compact", tmp_path / "template", tmp_path / "out", steps)
    assert len(killed) > {"few": 25, "all": 250}[steps]
    kinds = distinct(killed)
    # As it was, one set aside, an empty temporary, a whole one, with its name, without, and five gone in turn.
    assert len(kinds) == 11
    for folder in kinds:
        check_compaction(folder / STORE, before)


def check_compaction(store: Path, before: Seen) -> None:
    """After a kill, and after the compaction that follows, readers see what they saw."""
    assert seen(store) == before | ({"problems": []} if files(store / "aside") else {})
    Store(store).compact()
    tidy(store)
    assert [plain(name) for name in sorted(tree(store / "rows"))] == ["compact.parquet"]
    assert len(files(store / "aside")) == 1
    assert seen(store) == before | {"problems": []}


# -- errors of the system -----------------------------------------------------------------------------


@contextmanager
def told_of_steps(told: Callable[[str], None]) -> Iterator[None]:
    """While it lasts `told` hears of each of STEPS before this thread makes it; if it raises, it is not made."""
    earlier = sys.getprofile()

    def watch(frame: FrameType, event: str, call: Any) -> None:
        if event == "c_call" and call.__name__ in STEPS and frame.f_globals["__name__"] != "contextlib":
            told(call.__name__)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(earlier)


def refuse(step: int, code: int) -> Callable[[str], None]:
    """Raise an OSError before the step of this number, once."""
    left = step

    def told(_: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(code, os.strerror(code))

    return told


def steps_of(way: str, path: Path, whole: bytes) -> list[str]:
    """The steps of a commit that is not refused."""
    steps: list[str] = []
    with told_of_steps(steps.append):
        WAYS[way](LOCAL, str(path), whole)
    return steps


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("there", [True, False], ids=["folder", "no folder"])
@pytest.mark.parametrize("way", WAYS)
def test_an_error_at_any_step_is_a_store_error_and_leaves_no_part(
    way: str, there: bool, code: int, tmp_path: Path
) -> None:
    """It says which file and why; the file is absent or whole, no temporary stays, the next commit works."""
    whole = template_for_commit(tmp_path / "template", way, there=there)
    steps = steps_of(way, Path(shutil.copytree(tmp_path / "template", tmp_path / "whole")) / STORE / NAME, whole)
    naming = steps.index("link" if way == "commit" else "replace")
    assert {"open", "write", "fsync", "__exit__", "unlink"} <= set(steps)
    for number, step in enumerate(steps):
        path = Path(shutil.copytree(tmp_path / "template", tmp_path / f"{number}-{step}")) / STORE / NAME
        with pytest.raises(StoreError) as caught, told_of_steps(refuse(number, code)):
            WAYS[way](LOCAL, str(path), whole)
        assert str(caught.value) == f"cannot write {path}: {os.strerror(code)}"
        before = OLD if way == "replace" and there else None
        assert (path.read_bytes() if path.exists() else None) == (whole if number > naming else before)
        assert len(temporaries(path.parents[1])) == (step == "unlink" and way == "commit"), step
        WAYS[way](LOCAL, str(path), whole)
        assert path.read_bytes() == whole


def test_a_temporary_file_stays_while_its_writer_lives_and_goes_with_it(tmp_path: Path) -> None:
    """Tidying takes nothing from a commit that is under way, here or elsewhere, and all that nobody needs."""
    with subprocess.Popen(["true"]) as gone:
        pass
    (tmp_path / "rows").mkdir()
    ours, dead = (f".x.parquet.{machine()}-{pid}-0123456789ab.tmp" for pid in (os.getpid(), gone.pid))
    elsewhere, forgotten = (f".x.parquet.{'0' * 8}-{pid}-0123456789ab.tmp" for pid in (gone.pid, 1))
    for name in (ours, dead, elsewhere, forgotten):
        (tmp_path / "rows" / name).touch()
    os.utime(tmp_path / "rows" / forgotten, (0, 0))
    tidy(tmp_path)
    assert temporaries(tmp_path) == sorted(f"rows/{name}" for name in (ours, elsewhere))


# -- a real disk that is full, or read-only -----------------------------------------------------------


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own at `folder`; skips the test where none may be mounted."""
    folder.mkdir()
    try:
        mounting = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        mounted = subprocess.run(mounting, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


def fill(store: Store, size: int) -> tuple[dict[str, bytes], str]:
    """Commit files until the store says no: all that was committed, and what it said."""
    committed: dict[str, bytes] = {}
    for n in range(1000):
        name, body = f"networks/{n}", os.urandom(size)
        try:
            store.commit(name, body)
        except StoreError as error:
            return committed, str(error)
        committed[name] = body
    raise AssertionError("the disk was never full")


def test_the_store_stops_before_the_disk_is_full(tmp_path: Path) -> None:
    """It says `full` with its reserve untouched, all that was committed stays, and with room it goes on."""
    with disk(tmp_path / "disk", f"size={RESERVE_BYTES + 2**20}") as folder:
        store = Store(folder)
        row = store.commit_rows("s0", [done(TASK)])
        before = files(folder)
        committed, said = fill(store, 100_000)
        assert said == f"the disk of {folder}/networks is full (64 MiB are kept free): make room and resume"
        assert len(committed) >= 8
        assert 0 <= room(folder) < 100_000
        with pytest.raises(StoreError, match="full"):
            store.scratch.save_checkpoint("x", bytes(100_000))
        assert files(folder) == committed | before
        assert seen(folder)["attempts"][0]["file"] == row
        store.delete("networks/0")
        store.commit("networks/0", committed["networks/0"])
        assert files(folder) == committed | before


def test_a_compaction_without_room_removes_nothing(tmp_path: Path) -> None:
    """On a full disk compaction is a StoreError that says so, and every row file stays; with room it works."""
    with disk(tmp_path / "disk", f"size={RESERVE_BYTES + 2**20}") as folder:
        store = Store(folder)
        for some in (tasks(ORACLE, 5), tasks(ORACLE, 2)):
            store.commit_rows("s0", [done(task) for task in some])
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(room(folder) - 4096))
        before, answers = files(folder), seen(folder)
        with pytest.raises(StoreError, match=rf"the disk of {folder}/rows is full"):
            store.compact()
        assert files(folder) == before
        ballast.unlink()
        assert store.compact().merged == 2
        assert seen(folder) == answers


@pytest.mark.parametrize(
    ("options", "reserve", "said"),
    [
        ("size=1m", 0, r"is full \(0 MiB are kept free\)"),
        ("size=1m", -(2**40), "No space left on device"),
        ("size=65m,nr_inodes=12", RESERVE_BYTES, "No space left on device"),
    ],
    ids=["no reserve", "no guard", "no inodes"],
)
def test_a_disk_that_is_really_full_tears_nothing(
    options: str, reserve: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reserve the system's own refusal is a StoreError, and nothing of the refused file stays."""
    monkeypatch.setattr(storage.commit, "RESERVE_BYTES", reserve)
    with disk(tmp_path / "disk", options) as folder:
        store = Store(folder)
        row = store.commit_rows("s0", [done(TASK)])
        before = files(folder)
        committed, message = fill(store, 30_000)
        assert re.search(said, message)
        assert str(folder / "networks") in message
        assert files(folder) == committed | before
        assert seen(folder)["attempts"][0]["file"] == row
        store.delete("networks/0")
        store.commit("networks/0", committed["networks/0"])
        assert files(folder) == committed | before


def test_a_read_only_disk_is_a_store_error_and_can_be_read(tmp_path: Path) -> None:
    """Whatever would write says that it cannot, and every answer stays what it was."""
    with disk(tmp_path / "disk", f"size={RESERVE_BYTES + 2**20}") as folder:
        store = Store(folder)
        for some in (tasks(ORACLE, 5), tasks(ORACLE, 2)):
            name = store.commit_rows("s0", [done(task) for task in some])
        plan(store, "mini", tasks(ORACLE, 5))
        before, answers = files(folder), seen(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=20)
        for refused in (
            store.check_writable,
            store.compact,
            lambda: store.commit_rows("s0", [done(TASK)]),
            lambda: store.scratch.renew("drivers/x", {}),
            lambda: store.delete(name),
            lambda: store.move(name, "aside/x"),
            lambda: store.remove_sweep("mini"),
        ):
            with pytest.raises(StoreError, match=rf"{folder}.*Read-only file system"):
                refused()
        assert files(folder) == before
        assert seen(folder) == answers
        assert run_query(store, "select count(*) as n from tasks").to_pylist() == [{"n": 5}]


def test_tidying_a_disk_that_refuses_does_no_harm(tmp_path: Path) -> None:
    """What cannot be removed now stays for the next time."""
    with disk(tmp_path / "disk", "size=1m") as folder:
        left = folder / "rows" / ".s0-1.parquet.00000000-1-0123456789ab.tmp"
        left.parent.mkdir()
        left.touch()
        os.utime(left, (0, 0))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=20)
        assert storage.commit.sweep_temporaries(str(folder), ["rows"]) == []
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, timeout=20)
        assert storage.commit.sweep_temporaries(str(folder), ["rows"]) == [str(left.relative_to(folder))]
        assert not left.exists()


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mounts refuse to sync a folder: the file is as durable there as it gets, and the commit has worked."""
    sync = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    commit(LOCAL, str(tmp_path / "new" / "one"), OLD)
    assert (tmp_path / "new" / "one").read_bytes() == OLD


def test_a_folder_that_comes_and_goes_while_it_is_listed(tmp_path: Path) -> None:
    """Listing answers with what is there, never with an error, though pyarrow has one for that moment."""
    store, folder, end = Store(tmp_path), tmp_path / "rows", threading.Event()

    def churn() -> None:
        while not end.is_set():
            folder.mkdir()
            folder.rmdir()

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        assert all(store.names("rows") == [] for _ in range(20_000))
    finally:
        end.set()
        churning.join()


# -- files that are none of ours -----------------------------------------------------------------------


def written(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def damaged(good: bytes) -> dict[str, bytes]:
    """Files that are no rows, by name."""
    table = pq.read_table(io.BytesIO(good))
    lacking = {f"rows/s1-no-{name}.parquet": written(table.drop_columns([name])) for name in REQUIRED}
    cut = {f"rows/s1-{size}.parquet": good[:size] for size in (0, 1, 4, 8, len(good) // 2, len(good) - 1)}
    return (
        lacking
        | cut
        | {
            "rows/s1-zeros.parquet": bytes(len(good)),
            "rows/s1-text.parquet": b"PAR1 not parquet PAR1",
            "rows/s1-no-rows.parquet": written(pa.table({"x": pa.array([], pa.int64())})),
            "rows/s1-foreign.parquet": written(pa.table({"task_id": [1], "x": [2.0]})),
            "rows/s1-null.parquet": written(table.set_column(0, "task_id", pa.nulls(len(table), pa.string()))),
            "rows/s1-status.parquet": written(
                table.set_column(table.column_names.index("status"), "status", pa.array(["maybe"] * len(table)))
            ),
            "rows/compact-no-origin.parquet": good,
            "rows/compact-torn.parquet": good[:-9],
        }
    )


def test_compaction_sets_what_is_none_of_ours_aside_and_says_so_once(tmp_path: Path) -> None:
    """Before, queries answer without it; then it is named once, kept in aside/ as it was, and gone."""
    store = Store(tmp_path)
    names = [store.commit_rows("s0", [done(task)]) for task in tasks(ORACLE, 3)]
    bad = damaged((tmp_path / names[0]).read_bytes())
    for name, found in bad.items():
        (tmp_path / name).write_bytes(found)
    before = seen(tmp_path)
    assert (len(before["rows"]), before["problems"]) == (3, sorted(bad))
    told = store.compact().aside
    assert sorted(problem.file for problem in told) == sorted(bad)
    assert all(problem.reason and "\n" not in problem.reason for problem in told)
    kept = {name.partition("-")[2]: found for name, found in files(tmp_path / "aside").items()}
    assert kept == {name.replace("/", "-"): found for name, found in bad.items()}
    assert seen(tmp_path) == before | {"problems": []}
    assert store.compact().aside == ()
    assert [plain(name) for name in tree(tmp_path / "rows")] == ["compact.parquet"]


def test_rows_of_an_older_or_a_newer_version_count(tmp_path: Path) -> None:
    """A file that lacks a column that may be null, or has one more, counts; compaction leaves the second as it is."""
    store, (old, new) = Store(tmp_path), tasks(ORACLE, 2)
    older, newer = (rows_to_table([done(task, host="here")]) for task in (old, new))
    store.commit("rows/s0-old.parquet", written(older.drop_columns(["host"])))
    store.commit("rows/s0-new.parquet", written(newer.append_column("invented", pa.array([1]))))
    before = seen(tmp_path)
    assert {row["task_id"]: row["host"] for row in before["rows"]} == {old.task_id: None, new.task_id: "here"}
    assert before["problems"] == []
    assert (store.compact().merged, store.compact().merged, store.compact().aside) == (1, 0, ())
    assert seen(tmp_path) == before
    assert pq.read_table(tmp_path / "rows" / "s0-new.parquet")["invented"].to_pylist() == [1]


# -- order --------------------------------------------------------------------------------------------


def watch_order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that make a file durable or take one away, and of what, in the order in which they ended."""
    calls: list[tuple[str, str]] = []

    def watch(owner: Any, name: str, of_what: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> None:
            what = of_what(*arguments)
            real(*arguments, **more)
            calls.append((name, plain(what).rpartition("/")[2]))

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fsync", lambda handle: str(Path(f"/proc/self/fd/{handle}").readlink()))
    watch(os, "mkdir", lambda path, *_: str(path))
    for name in ("link", "replace"):
        watch(os, name, lambda _, target: str(target))
    watch(Store, "delete", lambda _, name: "a row file")
    return calls


@pytest.mark.parametrize(("way", "naming"), [("commit", "link"), ("replace", "replace")])
def test_a_name_is_given_to_what_is_durable_and_made_durable_itself(
    way: str, naming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced before it gets its name, its folder after; a new folder is made durable first."""
    calls = watch_order(monkeypatch)
    folders = [("mkdir", "far"), ("fsync", tmp_path.name), ("mkdir", "new"), ("fsync", "far")]
    for name, before in (("x", folders), ("y", [])):
        WAYS[way](LOCAL, str(tmp_path / "far" / "new" / name), OLD)
        assert calls == [*before, ("fsync", "temporary"), (naming, name), ("fsync", "new")]
        calls.clear()


def test_a_compaction_removes_rows_only_when_their_copy_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged file is synced, named and its name synced before the first of its origins goes."""
    for task in tasks(ORACLE, 3):
        Store(tmp_path).commit_rows("s0", [done(task)])
    calls = watch_order(monkeypatch)
    Store(tmp_path).compact()
    copied = [("fsync", "temporary"), ("link", "compact.parquet"), ("fsync", "rows")]
    assert calls == copied + [("delete", "a row file")] * 3


# -- everyone at once ---------------------------------------------------------------------------------


def test_a_thousand_commits_of_one_task_are_as_many_attempts_and_one_row(tmp_path: Path) -> None:
    """None is lost, and readers that meet the rows in another order choose the same one."""
    commits = 1000
    answers = play("attempts", str(tmp_path), commits, 5)
    names = sorted((tmp_path / "rows").iterdir())
    assert len(names) == commits
    tables = (pq.read_table(name, columns=["status", "host"]) for name in names)
    chosen = next(row for table in tables for row in table.to_pylist() if row["status"] == "done")
    assert answers == [[commits, commits, chosen["host"]]] * 5


@pytest.mark.parametrize("way", WAYS)
def test_of_many_commits_under_one_name_every_reader_sees_whole_ones(way: str, tmp_path: Path) -> None:
    """Of a commit everyone sees the same content, at all times; of a replacement always a whole one."""
    names = 20
    answers = play("one_name", str(tmp_path), way, names)
    writers = {str(n) for n in range(20)}
    assert sorted(tree(tmp_path)) == sorted(map(str, range(names)))
    for name in range(names):
        last = whose((tmp_path / str(name)).read_bytes())
        seen = set().union(*(answer[name] for answer in answers))
        assert last in seen <= writers
        assert way == "replace" or seen == {last}
    everyone = set().union(*(found for answer in answers for found in answer))
    assert way == "commit" or len(everyone) > 1


@pytest.mark.parametrize(
    ("seconds", "compactors"), [(2.0, 1), pytest.param(30.0, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_readers_miss_nothing_while_others_write_and_compact(seconds: float, compactors: int, tmp_path: Path) -> None:
    """Every look finds what was committed before it began, nothing twice, and nothing that nobody wrote."""
    found = play("traffic", str(tmp_path), seconds, compactors)
    for before, rows, distinct_tasks, after in found["looks"]:
        assert before <= rows == distinct_tasks <= after
    Store(tmp_path).compact()
    tidy(tmp_path)
    assert [plain(name) for name in tree(tmp_path / "rows")] == ["compact.parquet"]
    assert len(seen(tmp_path)["attempts"]) == len(seen(tmp_path)["rows"]) == found["rows"] > 0
