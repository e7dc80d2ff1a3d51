"""The store's contract, on a folder and on a real S3 server alike; nothing here looks below `Store` and its `fs`."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import io
import itertools
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from pyarrow import fs as pafs

from storage import commit, rowfiles, signs
from storage.errors import QueryError, StoreError
from storage.machine import machine, process_started
from storage.manifest import PlannedTask, planned_tasks
from storage.records import Row, Task, utc_now
from storage.rowfiles import Attempts, Compaction, Problem
from storage.schema import table_to_rows
from storage.signs import Sign
from storage.sql import run_query
from storage.store import Store
from storage.upkeep import tidy, unused
from tests.rows import L1, NOON, ORACLE, any_rows, done, failed, plan, tasks
from tests.s3 import BUCKET, s3_server

FIRST, SECOND = b"first", b"second"
NOTHING = Compaction(0, 0, 0, ())
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # every example has names of its own
Rows = Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server, started when the first test needs it."""
    with s3_server() as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store: a folder that is not there yet, or a prefix without objects."""
    monkeypatch.setattr(commit, "RETRY_SECONDS", 0.02)
    if request.param == "local":
        return Store(request.getfixturevalue("tmp_path") / "store")
    request.getfixturevalue("server")
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}/store")


def beside(store: Store) -> Store:
    """Another empty store of the same kind, whose location begins like this one's."""
    return Store(f"{store.location}-{uuid.uuid4().hex}")


def plant(store: Store, name: str, content: bytes) -> None:
    """Write a file behind the store's back."""
    path = f"{store.root}/{name}"
    store.fs.create_dir(path.rpartition("/")[0], recursive=True)
    with store.fs.open_output_stream(path) as file:
        file.write(content)


def contents(store: Store) -> dict[str, bytes]:
    """Every file of a store, hidden ones too; of a folder also the folders in it, empty."""
    infos = store.fs.get_file_info(pafs.FileSelector(store.root, recursive=True, allow_not_found=True))
    names = {info.path.removeprefix(f"{store.root}/"): info.is_file for info in infos}
    return {name: store.read(name) if is_file else b"" for name, is_file in names.items() if is_file or store.is_local}


def rows_of(store: Store) -> Rows:
    """Every row that counts, with the file it was committed in (by repr, where NaN is NaN)."""
    if not store.exists():
        return Counter()
    table, _ = store.row_files()
    return Counter(zip(table["file"].to_pylist(), map(repr, table_to_rows(table)), strict=True))


def expected(*committed: tuple[str, list[Row]]) -> Rows:
    """The same, for rows committed under these names."""
    return Counter((name, repr(row)) for name, rows in committed for row in rows)


def parquet(table: pa.Table) -> bytes:
    """A Parquet file as anyone might write it."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def damaged(good: bytes) -> dict[str, bytes]:
    """Files that are none of ours, by name, made from one that is."""
    table = pq.read_table(io.BytesIO(good))
    return {
        "rows/s0-empty.parquet": b"",
        "rows/s0-text.parquet": b"not parquet\n",
        "rows/s0-head.parquet": good[:-1],
        "rows/s0-half.parquet": good[: len(good) // 2],
        "rows/s0-tail.parquet": good[len(good) // 2 :],
        "rows/s0-foreign.parquet": parquet(pa.table({"a": [1]})),
        "rows/s0-lacking.parquet": parquet(table.drop_columns(["status"])),
        "rows/s0-twice.parquet": parquet(table.append_column("seed", table["seed"])),
        "rows/compact-without-origins.parquet": good,
        "rows/compact-without-an-origin.parquet": parquet(
            table.append_column("file", pa.nulls(len(table), pa.string()))
        ),
        "rows/compact-torn.parquet": good[:-1],
    }


class Killed(Exception):
    """What a process that is killed does not survive."""


def killed(_: Store) -> None:
    """Be killed."""
    raise Killed


@dataclass
class Meanwhile:
    """Calls `act` once, before the `step`-th time that a store is asked for something."""

    act: Callable[[], object]
    step: int
    asked: Iterator[int] = field(default_factory=itertools.count)
    came: bool = False

    def __call__(self) -> None:
        if next(self.asked) == self.step:
            self.came = True
            self.act()


class Watched(Store):
    """A store that calls `before` whenever it is asked for something."""

    def __init__(self, location: str, before: Callable[[], None]) -> None:
        super().__init__(location)
        self._before = before

    def names(self, folder: str) -> list[str]:
        self._before()
        return super().names(folder)

    def read(self, name: str) -> bytes:
        self._before()
        return super().read(name)

    def commit(self, name: str, content: bytes) -> None:
        self._before()
        super().commit(name, content)

    def delete(self, name: str) -> None:
        self._before()
        super().delete(name)

    def move(self, name: str, target: str) -> None:
        self._before()
        super().move(name, target)


def at_every_step(
    store: Store,
    fill: Callable[[Store], object],
    work: Callable[[Store], object],
    act: Callable[[Store], object],
) -> Iterator[tuple[Store, object]]:
    """`work` in a store that was filled, and its result, with `act` before its first step, its second, and so on."""
    for step in itertools.count():
        here = beside(store)
        fill(here)
        meanwhile, result = Meanwhile(functools.partial(act, Store(here.location)), step), None
        with suppress(Killed):
            result = work(Watched(here.location, meanwhile))
        if not meanwhile.came:
            assert step > 1
            return
        yield here, result


def two_files_and_a_torn_one(store: Store) -> None:
    """Two row files, with three rows of two tasks, and one that is none."""
    store.commit_rows("s0", [done(Task(ORACLE, 0, 0)), failed(Task(ORACLE, 1, 0))])
    store.commit_rows("s0", [done(Task(ORACLE, 1, 0))])
    plant(store, "rows/s0-torn.parquet", b"PAR1")


THREE_ROWS = Counter(
    repr(row) for row in (done(Task(ORACLE, 0, 0)), failed(Task(ORACLE, 1, 0)), done(Task(ORACLE, 1, 0)))
)


def rows_alone(store: Store) -> Counter[str]:
    """Every row that counts, whatever its file."""
    return Counter(row for _, row in rows_of(store).elements())


# -- the life of a store ------------------------------------------------------------------------------

LIMIT = 4
SHARDS = {"s0": tasks(ORACLE, 2), "s01": tasks(L1, 2)}
outcomes = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([done, failed])), max_size=LIMIT + 1)


class Life(RuleBasedStateMachine):
    """Commits, files from elsewhere, compactions and compactions cut off, in any order."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = beside(store)
        self.committed: list[tuple[str, list[Row]]] = []
        self.planted: set[str] = set()
        self.watch = {name: Attempts(self.store, name, [t.task_id for t in SHARDS[name]]) for name in SHARDS}

    @rule(shard=st.sampled_from(sorted(SHARDS)), given=outcomes)
    def commit(self, shard: str, given: list[tuple[int, Callable[[Task], Row]]]) -> None:
        rows = [outcome(SHARDS[shard][index]) for index, outcome in given]
        self.committed.append((self.store.commit_rows(shard, rows), rows))

    @rule(kind=st.sampled_from(["s0", "compact"]))
    def plant(self, kind: str) -> None:
        name = f"rows/{kind}-{uuid.uuid4().hex}.parquet"
        plant(self.store, name, b"PAR1")
        self.planted.add(name)

    @rule()
    def compact(self) -> None:
        aside = self.store.compact().aside
        assert Counter(problem.file for problem in aside) == Counter(self.planted)
        self.planted.clear()
        assert self.store.compact() == NOTHING
        rows = sum(len(rows) for _, rows in self.committed)
        assert len(self.store.row_file_names()) <= 2 * rows / LIMIT + 1

    @rule(step=st.integers(0, 12))
    def compact_and_be_killed(self, step: int) -> None:
        with suppress(Killed):
            Watched(self.store.location, Meanwhile(functools.partial(killed, self.store), step)).compact()
        self.planted &= set(self.store.row_file_names())

    @invariant()
    def every_row_counts_once_and_every_damaged_file_is_reported_once(self) -> None:
        if not self.store.exists():  # not yet, or all is set aside
            assert not self.committed and not self.planted
            return
        table, problems = self.store.row_files()
        found = Counter(zip(table["file"].to_pylist(), map(repr, table_to_rows(table)), strict=True))
        assert found == expected(*self.committed)
        assert Counter(problem.file for problem in problems) == Counter(self.planted)

    @invariant()
    def a_worker_knows_every_attempt_at_its_shard(self) -> None:
        for shard, attempts in self.watch.items():
            assert _statuses(attempts) == self.attempts(shard)

    def attempts(self, shard: str) -> dict[str, list[str]]:
        ours = {task.task_id for task in SHARDS[shard]}
        found: dict[str, list[str]] = {}
        for row in (row for _, rows in self.committed for row in rows if row.task_id in ours):
            found.setdefault(row.task_id, []).append(row.status)
        return {task_id: sorted(statuses) for task_id, statuses in found.items()}

    def teardown(self) -> None:
        known = {task: seen for shard in SHARDS for task, seen in self.attempts(shard).items()}
        found = self.store.statuses() if self.store.exists() else {}
        assert found == {task: min(seen) for task, seen in known.items()}  # done sorts before failed


def _statuses(attempts: Attempts) -> dict[str, list[str]]:
    return {task_id: sorted(statuses) for task_id, statuses in attempts.look().items()}


def test_every_row_counts_once_whatever_happens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through commits, damaged files, compactions and killed ones in any order, no row is lost or counted twice."""
    monkeypatch.setattr(rowfiles, "COMPACTED_ROWS", LIMIT)
    often, long = (12, 10) if store.is_local else (5, 8)
    how = settings(
        max_examples=often,
        stateful_step_count=long,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=CHECKS,
    )
    run_state_machine_as_test(functools.partial(Life, store), settings=how)  # pyright: ignore[reportArgumentType]


# -- files --------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=CHECKS)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_a_commit_never_replaces(store: Store, given: list[bytes]) -> None:
    """Of all commits to one name the first stays, byte for byte, empty ones too."""
    name = f"x/{uuid.uuid4().hex}"
    for content in given:
        Store(store.location).commit(name, content)
    assert store.read(name) == given[0]
    assert store.sizes("x")[name.removeprefix("x/")] == len(given[0])


def test_a_large_file_comes_back_whole(store: Store) -> None:
    """A file too big for one part of an upload is written and read whole."""
    content = hashlib.shake_256(b"weights").digest(12 * 2**20)
    store.commit("dense/large", content)
    assert store.read("dense/large") == content


def test_files_come_and_go(store: Store) -> None:
    """What is there is listed with its size and read; what is not is FileNotFoundError, and its removal no error."""
    assert (store.exists(), store.names("x"), store.sizes("x")) == (False, [], {})
    store.commit("x/one", FIRST)
    store.commit("x/.hidden", FIRST)
    store.commit("x/below/two", SECOND)
    assert store.sizes("x") == {"one": len(FIRST)}
    store.move("x/one", "y/far/three")
    assert (store.names("x"), store.read("y/far/three")) == ([], FIRST)
    for _ in range(2):
        store.delete("y/far/three")
        with pytest.raises(FileNotFoundError):
            store.read("y/far/three")
    assert store.read("x/below/two") == SECOND


def test_a_file_that_another_process_moved_is_moved(store: Store) -> None:
    """Of two that move one file, the later one finds nothing left to do."""
    store.commit("rows/one", FIRST)
    Store(store.location).move("rows/one", "aside/mine")
    store.move("rows/one", "aside/yours")
    assert contents(store).get("aside/mine") == FIRST
    assert (store.names("rows"), store.names("aside")) == ([], ["mine"])


def test_check_writable_leaves_no_trace(store: Store) -> None:
    """Asking first leaves no file and no folder, in a store that is there and in one that is not."""
    store.check_writable()
    assert (contents(store), store.exists()) == ({}, False)
    plan(store, "mini", tasks(ORACLE, 1))
    before = contents(store)
    store.check_writable()
    assert contents(store) == before


# -- rows ---------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=CHECKS)
@given(st.lists(st.lists(any_rows(), max_size=3), min_size=1, max_size=3))
def test_rows_come_back_as_they_were_with_their_file(store: Store, given: list[list[Row]]) -> None:
    """Any rows are read back exactly, each with the file it was committed in, before and after compaction."""
    here = beside(store)
    committed = [(here.commit_rows(f"s{i}", rows), rows) for i, rows in enumerate(given)]
    assert rows_of(here) == expected(*committed)
    here.compact()
    assert rows_of(here) == expected(*committed)
    assert not here.exists() or here.row_files()[1] == []


def test_a_row_file_is_named_after_its_shard_and_is_in_one_store_only(store: Store) -> None:
    """A commit makes one new file, named after its shard, which no store of a similar location sees."""
    names = [store.commit_rows(shard, [done(Task(ORACLE, 0, 0))]) for shard in ("s0", "s01", "s0")]
    assert [name.rpartition("-")[0] for name in names] == ["rows/s0", "rows/s01", "rows/s0"]
    assert store.row_file_names() == sorted(set(names))
    assert len(set(names)) == 3
    assert store.exists()
    other = beside(store)
    assert (other.row_file_names(), other.exists(), rows_of(other)) == ([], False, Counter())


def test_damaged_files_are_reported_once_until_compaction_sets_them_aside(store: Store) -> None:
    """No damaged file stops or enters an answer; each is told once with a reason, then kept in aside/ as it was."""
    task = Task(ORACLE, 0, 0)
    name = store.commit_rows("s0", [done(task)])
    files = damaged(store.read(name))
    for planted, content in files.items():
        plant(store, planted, content)
    plant(store, "rows/notes.txt", b"mine")
    plant(store, "rows/.s0-1.parquet.tmp", b"PAR1")

    reported: list[Problem] = []
    answer = run_query(store, "select task_id from attempts", reported.append)
    assert answer["task_id"].to_pylist() == [task.task_id]
    assert Counter(problem.file for problem in reported) == Counter(list(files))
    assert all(problem.reason and "\n" not in problem.reason for problem in reported)
    assert sorted(map(repr, reported)) == sorted(map(repr, store.row_files()[1]))
    assert store.statuses() == {task.task_id: "done"}
    assert Attempts(store, "s0", [task.task_id]).look() == {task.task_id: ["done"]}

    found = store.compact()
    assert sorted(map(repr, found.aside)) == sorted(map(repr, reported))
    assert rows_of(store) == expected((name, [done(task)]))
    assert store.row_files()[1] == []
    assert sorted(store.read(f"aside/{kept}") for kept in store.names("aside")) == sorted(files.values())
    assert store.read("rows/notes.txt") == b"mine"
    assert store.compact() == NOTHING


def test_a_file_with_other_columns_beyond_ours_counts(store: Store) -> None:
    """A row that a newer version wrote is a row; what is not known here is left out."""
    row = done(Task(ORACLE, 0, 0))
    table = pq.read_table(io.BytesIO(store.read(store.commit_rows("s0", [row]))))
    plant(store, "rows/s0-newer.parquet", parquet(table.append_column("rewind", pa.array([7]))))
    assert rows_alone(store) == Counter({repr(row): 2})
    assert store.row_files()[1] == []


def test_a_task_is_done_where_any_of_its_rows_is(store: Store) -> None:
    """Done beats failed in any order of files and rows, and a task without a row has no status."""
    a, b, c, _ = tasks(ORACLE, 4)
    plan(store, "mini", [a])
    assert store.statuses() == {}
    for rows in ([failed(a), done(a), failed(a)], [failed(b)], [done(c)], [failed(c)]):
        store.commit_rows("s0", rows)
    assert store.statuses() == {a.task_id: "done", b.task_id: "failed", c.task_id: "done"}


def test_attempts_are_those_of_the_shard_before_and_after_compaction(store: Store) -> None:
    """A worker counts every attempt at its tasks and no other, by any driver, also of rows that were compacted."""
    (a, b, c), (other,) = tasks(ORACLE, 3), tasks(L1, 1)
    known = Attempts(store, "s0", [t.task_id for t in (a, b, c)])
    assert known.look() == {}
    store.commit_rows("s0", [failed(a)])
    assert known.look() == {a.task_id: ["failed"]}
    store.commit_rows("s0", [failed(a), done(b)])
    store.commit_rows("s01", [done(other)])
    want = {a.task_id: ["failed", "failed"], b.task_id: ["done"]}
    for _ in range(2):
        assert _statuses(known) == want
        assert _statuses(Attempts(Store(store.location), "s0", [t.task_id for t in (a, b, c)])) == want
        store.compact()
    store.commit_rows("s0", [done(a)])
    assert _statuses(known) == want | {a.task_id: ["done", "failed", "failed"]}
    assert Attempts(store, "s01", [other.task_id]).look() == {other.task_id: ["done"]}


def test_a_reader_may_come_before_the_first_row(store: Store) -> None:
    """Readers that look while the very first file is committed see it or nothing, and no error."""
    row = done(Task(ORACLE, 0, 0))
    for _ in range(25 if store.is_local else 3):
        here, over = beside(store), threading.Event()

        def look(here: Store, over: threading.Event) -> list[list[str]]:
            return [here.row_file_names() for _ in iter(over.is_set, True)]

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(look, here, over) for _ in range(2)]
            try:
                name = here.commit_rows("s0", [row])
            finally:
                over.set()
            seen = [names for reader in readers for names in reader.result()]
        assert all(names in ([], [name]) for names in seen)
        assert rows_of(here) == expected((name, [row]))


# -- compaction ---------------------------------------------------------------------------------------


def _many_attempts(store: Store) -> None:
    later = NOON + dt.timedelta(seconds=1)
    a, b = tasks(ORACLE, 2)
    for host in ("one", "two", "three"):
        store.commit_rows("s0", [done(a, host=host), failed(b, host=host)])
    store.commit_rows("s0", [done(a, host="late", finished_at=later), done(a, host="no time", finished_at=None)])
    store.commit_rows("s1", [failed(a, host="early failure", finished_at=NOON - dt.timedelta(days=1))])


def test_compaction_changes_no_answer(store: Store) -> None:
    """Every attempt with its file, and the row chosen among them, are after compaction what they were before."""
    _many_attempts(store)
    questions = ("from attempts order by all", "from rows order by all", "select count(*) from attempts group by all")
    before = [repr(store.sql(f"from ({question})").fetchall()) for question in questions]
    assert "'one'" in before[1] or "'two'" in before[1] or "'three'" in before[1]
    files = len(store.row_file_names())
    assert store.compact() == Compaction(merged=files, written=1, rows=9, aside=())
    assert [repr(store.sql(f"from ({question})").fetchall()) for question in questions] == before
    assert len(store.row_file_names()) == 1


def test_compacting_again_does_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was compacted stays as it is, file by file, also where its rows do not fill whole files."""
    assert store.compact() == NOTHING
    store.commit_rows("s0", [])
    assert store.compact() == Compaction(merged=1, written=0, rows=0, aside=())
    assert (store.compact(), store.row_file_names()) == (NOTHING, [])
    monkeypatch.setattr(rowfiles, "COMPACTED_ROWS", 5)
    for sizes in ((3, 3, 3, 3), *[(2, 4, 2)] * 5):  # often: the order of compacted files is left to chance
        here = beside(store)
        for index, size in enumerate(sizes):
            here.commit_rows(f"s{index}", [done(Task(ORACLE, candidate, index)) for candidate in range(size)])
        here.compact()
        before = contents(here)
        assert here.compact() == NOTHING
        assert contents(here) == before
        assert len(rows_of(here)) == sum(sizes)
        here.commit_rows("s0", [done(Task(ORACLE, 9, 9))])
        assert here.compact() != NOTHING
        assert len(rows_of(here)) == sum(sizes) + 1


def test_a_compaction_killed_at_any_step_loses_nothing_and_the_next_finishes_it(store: Store) -> None:
    """Its union and the files it is of are counted once while both are there, and then only the union is."""
    both, task_id = 0, Task(ORACLE, 1, 0).task_id
    for here, _ in at_every_step(store, two_files_and_a_torn_one, Store.compact, killed):
        left = here.row_file_names()
        both += any(map(rowfiles.is_compacted, left)) and not all(map(rowfiles.is_compacted, left))
        before = rows_of(here)
        assert Counter(row for _, row in before.elements()) == THREE_ROWS
        assert _statuses(Attempts(here, "s0", [task_id])) == {task_id: ["done", "failed"]}
        here.compact()
        assert rows_of(here) == before
        assert len(here.row_file_names()) == 1
        assert here.compact() == NOTHING
        assert [here.read(f"aside/{name}") for name in here.names("aside")] == [b"PAR1"]
    assert both >= 2


def test_two_compactions_at_once_lose_nothing(store: Store) -> None:
    """A whole compaction at any step of another leaves every row once, stops neither, and sets aside what is none."""
    for here, result in at_every_step(store, two_files_and_a_torn_one, Store.compact, Store.compact):
        assert isinstance(result, Compaction)
        assert rows_alone(here) == THREE_ROWS
        here.compact()
        assert rows_alone(here) == THREE_ROWS
        assert len(here.row_file_names()) == 1
        assert {here.read(f"aside/{name}") for name in here.names("aside")} == {b"PAR1"}


def test_a_row_committed_during_a_compaction_is_kept(store: Store) -> None:
    """A worker's commit at any step is seen at once by a reader, and is there after the compaction."""
    row = done(Task(L1, 0, 0))
    seen: list[Counter[str]] = []

    def commit_and_look(here: Store) -> None:
        here.commit_rows("s1", [row])
        seen.append(rows_alone(here))

    want = THREE_ROWS + Counter([repr(row)])
    for here, _ in at_every_step(store, two_files_and_a_torn_one, Store.compact, commit_and_look):
        assert (seen[-1], rows_alone(here)) == (want, want)


@pytest.mark.parametrize("what", ["rows", "attempts"])
def test_a_compaction_at_any_step_of_a_reader_changes_nothing_for_it(what: str, store: Store) -> None:
    """Files that vanish and unions that appear while it reads leave a reader with every row once."""
    a, b = tasks(ORACLE, 2)
    reader: dict[str, Callable[[Store], object]] = {
        "rows": rows_alone,
        "attempts": lambda here: _statuses(Attempts(here, "s0", [a.task_id, b.task_id])),
    }
    want = {"rows": THREE_ROWS, "attempts": {a.task_id: ["done"], b.task_id: ["done", "failed"]}}
    for _, found in at_every_step(store, two_files_and_a_torn_one, reader[what], Store.compact):
        assert found == want[what]


def test_a_listing_torn_by_a_compaction_hides_no_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing is no one moment: one that shows neither a union nor the files it is of is not believed."""
    two_files_and_a_torn_one(store)
    task_id = Task(ORACLE, 1, 0).task_id
    listed = store.names

    def torn(folder: str) -> list[str]:
        monkeypatch.setattr(store, "names", listed)
        before = listed(folder)
        Store(store.location).compact()
        return [name for name in listed(folder) if name in before]

    monkeypatch.setattr(store, "names", torn)
    assert rows_alone(store) == THREE_ROWS
    store.commit_rows("s0", [done(Task(L1, 0, 0))])
    monkeypatch.setattr(store, "names", torn)
    assert _statuses(Attempts(store, "s0", [task_id])) == {task_id: ["done", "failed"]}


def _with_other_values(whole: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(whole))
    return parquet(table.set_column(table.column_names.index("seed"), "seed", pa.array([7] * len(table))))


def test_a_union_that_another_process_sets_aside_removes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A union that was written torn, and is gone from rows/ before it is read back, has replaced no row."""
    for candidate in range(2):
        store.commit_rows("s0", [done(Task(ORACLE, candidate, 0))])
    before, commit_right = rows_of(store), store.commit

    def torn(name: str, content: bytes) -> None:
        commit_right(name, content[:-1])
        Store(store.location).move(name, "aside/torn")

    monkeypatch.setattr(store, "commit", torn)
    with suppress(StoreError):
        store.compact()
    assert rows_of(store) == before


@pytest.mark.parametrize("wrong", [lambda whole: whole[:-1], lambda whole: b"", _with_other_values])
def test_a_union_that_does_not_read_back_removes_nothing(
    wrong: Callable[[bytes], bytes], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is not what was written the compaction is a StoreError, and every row stays where it was."""
    for candidate in range(2):
        store.commit_rows("s0", [done(Task(ORACLE, candidate, 0))])
    before, commit_right = contents(store), store.commit
    monkeypatch.setattr(store, "commit", lambda name, content: commit_right(name, wrong(content)))
    with pytest.raises(StoreError, match="nothing was removed"):
        store.compact()
    assert contents(store) == before


def test_readers_writers_and_compactions_go_together(store: Store) -> None:
    """Every reader sees at least what was committed before it began, and no row twice, while two compact."""
    committed: list[str] = []
    merged: list[int] = []
    over = threading.Event()

    def write(shard: int) -> None:
        here, end = Store(store.location), time.monotonic() + 30
        for candidate in range(12):
            task = Task(ORACLE, candidate, shard)
            here.commit_rows(f"s{shard}", [done(task)])
            committed.append(task.task_id)
            while len(merged) < candidate // 4 and time.monotonic() < end and not over.is_set():
                time.sleep(0.01)  # not all before the first compaction

    def compact() -> None:
        while not over.is_set():
            if (found := Store(store.location).compact()) != NOTHING:
                merged.append(found.merged)

    plan(store, "mini", tasks(ORACLE, 1))

    def read() -> int:
        for looks in itertools.count():
            before, over_already = set(committed), over.is_set()
            found = Store(store.location).row_files()[0]["task_id"].to_pylist()
            assert len(found) == len(set(found))
            assert before <= set(found)
            if over_already:
                return looks
        raise AssertionError

    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write, shard) for shard in (0, 1)]
        compactions, readers = [pool.submit(compact) for _ in range(2)], [pool.submit(read) for _ in range(2)]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        for compaction in compactions:
            compaction.result()
        assert min(reader.result() for reader in readers) > 0
    assert len(merged) >= 2
    assert len(committed) == 24
    store.compact()
    assert Counter(store.row_files()[0]["task_id"].to_pylist()) == Counter(committed)


# -- sweeps -------------------------------------------------------------------------------------------


def test_the_newest_expansion_is_the_sweep_and_the_same_twice_is_one(store: Store) -> None:
    """`run` again adds nothing; another text or other tasks make a newer expansion, which tells both as given."""
    assert (store.manifest("mini"), store.sweeps(), list(store.manifests())) == (None, [], [])
    planned = [PlannedTask("s0", task) for task in tasks(ORACLE, 3, 2)]
    first = store.write_manifest("mini", "ratio: 0.2\n", planned)
    before = contents(store)
    assert Store(store.location).write_manifest("mini", "ratio: 0.2\n", iter(planned)) == first
    assert contents(store) == before

    respelt = store.write_manifest("mini", "ratio:  0.2\n", planned)
    grown = store.write_manifest("mini", "ratio:  0.2\n", [*planned, PlannedTask("s1", Task(ORACLE, 3, 0))])
    back = store.write_manifest("mini", "ratio: 0.2\n", planned)
    assert first.stem < respelt.stem < grown.stem < back.stem
    assert store.manifest("mini") == store.newest("mini") == back
    assert (store.spec_text(grown), store.spec_text(back)) == ("ratio:  0.2\n", "ratio: 0.2\n")
    assert list(planned_tasks(store.plan_table(back))) == planned
    assert store.exists()


def test_an_expansion_cut_off_is_none(store: Store) -> None:
    """Killed at any step of its writing, a newer expansion is the sweep whole, or the older one still is."""
    for here, _ in at_every_step(store, lambda here: plan(here, "mini", tasks(ORACLE, 2)), _replan, killed):
        manifest = here.newest("mini")
        assert here.spec_text(manifest) == "name: mini\n"
        assert here.plan_table(manifest)["task_id"].to_pylist() == [task.task_id for task in tasks(ORACLE, 2)]
        _replan(here)
        assert here.spec_text(here.newest("mini")) == "newer\n"


def _replan(store: Store) -> None:
    store.write_manifest("mini", "newer\n", [PlannedTask("s0", task) for task in tasks(L1, 3)])


def test_a_removed_sweep_is_gone_and_its_rows_stay(store: Store) -> None:
    """Removing one sweep touches no row and no other sweep, of a similar name say; twice is once."""
    plan(store, "mini", tasks(ORACLE, 2))
    plan(store, "mini", tasks(ORACLE, 3))
    plan(store, "mini-2", tasks(L1, 1))
    store.commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    other = store.newest("mini-2")
    assert store.sweeps() == ["mini", "mini-2"]
    for _ in range(2):
        store.remove_sweep("mini")
        assert (store.sweeps(), store.manifest("mini"), store.names("sweeps/mini")) == (["mini-2"], None, [])
        assert list(store.manifests()) == [other]
        assert len(store.plan_table(other)) == 1
    assert store.statuses() == {Task(ORACLE, 0, 0).task_id: "done"}
    with pytest.raises(QueryError, match=r"no sweep mini in .*: mini-2$"):
        store.newest("mini")


def test_a_removal_cut_off_never_brings_an_older_expansion_back(store: Store) -> None:
    """Killed at any step, the sweep is what it was or is gone, and removing it again finishes."""

    def fill(here: Store) -> None:
        plan(here, "mini", tasks(ORACLE, 2))
        here.write_manifest("mini", "newer\n", [PlannedTask("s0", task) for task in tasks(L1, 3)])

    for here, _ in at_every_step(store, fill, lambda here: here.remove_sweep("mini"), killed):
        if manifest := here.manifest("mini"):
            assert here.spec_text(manifest) == "newer\n"
            assert len(here.plan_table(manifest)) == 3
        here.remove_sweep("mini")
        assert (here.sweeps(), here.names("sweeps/mini")) == ([], [])


# -- dense weights ------------------------------------------------------------------------------------


def _in_order_of_name() -> list[bytes]:
    """Three dense weights whose names in the store are in this order."""
    return sorted((FIRST, SECOND, b"third"), key=lambda content: hashlib.sha256(content).hexdigest())


def _next_tick(store: Store) -> None:
    """Wait until a file has a later time than those there are: an object's has no fractions of seconds."""
    time.sleep(0.02 if store.is_local else 1.02 - time.time() % 1)


def test_the_dense_weights_committed_first_win_and_damaged_ones_do_not_count(store: Store) -> None:
    """Everyone prunes the whole weights committed first, whatever their name, and damaged ones can be set aside."""
    late, early, torn = _in_order_of_name()
    assert (store.dense("d0"), store.dense_ids()) == (None, set())
    damaged_name = f"dense/d0-{hashlib.sha256(torn).hexdigest()[:8]}.safetensors"
    plant(store, damaged_name, torn[:-1])
    assert store.dense("d0") is None
    _next_tick(store)
    name = store.commit_dense("d0", early)
    _next_tick(store)
    assert store.commit_dense("d0", late) != name
    store.commit_dense("d00", late)
    sha256 = hashlib.sha256(early).hexdigest()
    for _ in range(2):
        found = store.dense("d0")
        assert found is not None
        assert (found.name, found.sha256, found.content) == (name, sha256, early)
        assert name == f"dense/d0-{sha256[:8]}.safetensors"
        store.commit_dense("d0", early)
    assert store.dense_ids() == {"d0", "d00"}

    assert [problem.file for problem in store.set_damaged_dense_aside("d0")] == [damaged_name]
    assert [store.read(f"aside/{kept}") for kept in store.names("aside")] == [torn[:-1]]
    assert len(store.names("dense")) == 3
    assert store.set_damaged_dense_aside("d0") == []
    store.commit_dense("d0", torn)
    found = store.dense("d0")
    assert found is not None
    assert found.content == early


def test_a_kept_network_is_named_by_its_content(store: Store) -> None:
    """A kept network is found by its task, and the one of another attempt stands beside it."""
    one, other, again = (store.commit_network("t0", content) for content in (FIRST, SECOND, FIRST))
    assert one == again != other
    assert [store.read(name) for name in (one, other)] == [FIRST, SECOND]
    assert {name.rpartition("-")[0] for name in (one, other)} == {"networks/t0"}


# -- scratch ------------------------------------------------------------------------------------------


def test_a_note_stays_until_it_is_renewed_or_forgotten(store: Store) -> None:
    """Who notes later is told what is there; renewing replaces it, forgetting removes it, once or twice."""
    scratch, other = store.scratch, Store(store.location).scratch
    assert (scratch.noted("execution/x"), scratch.notes("execution")) == (None, {})
    assert scratch.note("execution/x", {"threads": 1}) == {"threads": 1}
    assert other.note("execution/x", {"threads": 2}) == {"threads": 1}
    other.renew("execution/x", {"threads": 3, "more": "é"})
    assert scratch.noted("execution/x") == {"threads": 3, "more": "é"}
    scratch.renew("execution/y", {})
    scratch.note("execution-2/x", {"threads": 4})
    assert scratch.notes("execution") == {"execution/x": {"threads": 3, "more": "é"}, "execution/y": {}}
    for _ in range(2):
        other.forget("execution/x")
        assert scratch.noted("execution/x") is None
    assert scratch.notes("execution") == {"execution/y": {}}


def test_a_damaged_note_is_none(store: Store) -> None:
    """Half a note is no note, and does not hide the others."""
    plant(store, "scratch/x/torn.json", b'{"thr')
    store.scratch.note("x/whole", {"n": 1})
    assert (store.scratch.noted("x/torn"), store.scratch.notes("x")) == (None, {"x/whole": {"n": 1}})


def test_a_checkpoint_is_the_last_one_saved_or_an_error(store: Store) -> None:
    """A task gets its newest checkpoint whole, or None, or ValueError where anything of it is missing or changed."""
    scratch = store.scratch
    assert (scratch.checkpoint("t0"), scratch.checkpoints()) == (None, [])
    for content in (FIRST, b"", SECOND):
        scratch.save_checkpoint("t0", content)
        assert Store(store.location).scratch.checkpoint("t0") == content
    scratch.save_checkpoint("t1", FIRST)
    assert sorted(scratch.checkpoints()) == ["t0", "t1"]

    (name,) = (name for name in store.names("scratch/checkpoints") if name.startswith("t0"))
    whole = store.read(f"scratch/checkpoints/{name}")
    for bad in (b"", whole[:10], whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:]):
        plant(store, f"scratch/checkpoints/{name}", bad)
        with pytest.raises(ValueError, match="t0"):
            scratch.checkpoint("t0")
    assert scratch.checkpoint("t1") == FIRST
    for _ in range(2):
        scratch.drop_checkpoint("t0")
        assert (scratch.checkpoint("t0"), scratch.checkpoints()) == (None, ["t1"])


# -- signs of life ------------------------------------------------------------------------------------


def _ago(seconds: float) -> str:
    return (utc_now() - dt.timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def _note(beat: float = 0, **of: Any) -> dict[str, Any]:
    """The note of this process, with its last beat so long ago; `of` another one."""
    pid = os.getpid()
    mine = {"machine": machine(), "pid": pid, "process_started": process_started(pid), "host": "here"}
    mine |= {"started_at": _ago(3600), "beat_at": _ago(beat)}
    return mine | of


def _noted(store: Store, name: str) -> dict[str, Any]:
    note = store.scratch.noted(name)
    assert note is not None
    return note


def test_a_sign_of_life_lasts_as_long_as_its_process_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there from the start, renewed with what there is to say, and gone at the end."""
    monkeypatch.setattr(signs, "BEAT_SECONDS", 0.05)
    said, ticked = itertools.count(), threading.Event()
    with Sign(store, "drivers", lambda: {"said": next(said)}, ticked.set, seconds=0.02) as sign:
        name = f"drivers/{sign.id}"
        assert list(signs.living(Store(store.location), "drivers")) == [name]
        end, note = time.monotonic() + 10, _noted(store, name)
        while note["said"] < 2 and time.monotonic() < end:
            time.sleep(0.01)
            note = _noted(store, name)
        assert note["said"] >= 2
        assert note["pid"] == os.getpid()
        assert 0 <= signs.age(note) < 30
        assert ticked.is_set()
        assert (signs.living(store, "workers"), signs.dead(store, "drivers")) == ({}, [])
    assert (store.scratch.noted(name), signs.living(store, "drivers")) == (None, {})


def test_a_sign_counts_while_its_process_lives_and_beats(store: Store) -> None:
    """It counts no more without a beat for a minute, or, on this machine, when the process is another or gone."""
    started = process_started(os.getpid())
    notes = {
        "drivers/mine": _note(),
        "drivers/far": _note(machine="elsewhere", pid=1, process_started=0.0),
        "drivers/slow": _note(beat=signs.STALE_SECONDS / 2),
        "drivers/stale": _note(beat=signs.STALE_SECONDS + 5),
        "drivers/far-and-stale": _note(beat=signs.STALE_SECONDS + 5, machine="elsewhere"),
        "drivers/same-number": _note(process_started=started - 100),
        "drivers/gone": _note(pid=2**22 + 1),
        "drivers/no-sign": {"stop": True},
    }
    for name, note in notes.items():
        store.scratch.renew(name, note)
    living = ["drivers/far", "drivers/mine", "drivers/slow"]
    assert sorted(signs.living(store, "drivers")) == living
    assert signs.living(store, "drivers")["drivers/mine"] == notes["drivers/mine"]
    assert sorted(signs.dead(store, "drivers")) == sorted(set(notes) - set(living))


# -- upkeep -------------------------------------------------------------------------------------------


def test_tidy_removes_what_processes_that_are_gone_left(store: Store) -> None:
    """Their signs, their wishes to stop and checkpoints nobody needs go; all else in the store stays."""
    plan(store, "mini", tasks(ORACLE, 1))
    store.commit_rows("s0", [done(Task(ORACLE, 0, 0))])
    store.commit_dense("trained", FIRST)
    store.commit_network("t0", FIRST)
    store.scratch.note("execution/x", {"threads": 1})
    for folder in ("drivers", "workers"):
        store.scratch.renew(f"{folder}/alive", _note())
    store.scratch.renew("stops/alive", {})
    for key in ("task-open", "training"):
        store.scratch.save_checkpoint(key, FIRST)
    kept = contents(store)

    for folder in ("drivers", "workers"):
        store.scratch.renew(f"{folder}/gone", _note(pid=2**22 + 1))
    store.scratch.renew("stops/gone", {})
    for key in ("task-done", "trained"):
        store.scratch.save_checkpoint(key, FIRST)
    theirs, ours = (f"rows/.s0-1.parquet.{machine()}-{pid}-{0:012x}.tmp" for pid in (2**22 + 1, os.getpid()))
    for name in (theirs, ours):
        plant(store, name, b"PAR1")
    assert len(contents(store)) == len(kept) + 7
    tidy(store, lambda key: key == "task-done")
    left = contents(store)
    assert {name: content for name, content in left.items() if not name.endswith(".tmp")} == kept
    assert ours in left
    assert (theirs in left) == (not store.is_local)  # an object store has no temporary files of ours


def test_unused_is_what_no_sweep_needs(store: Store) -> None:
    """Weights and checkpoints of no planned task are named with their size; nothing is removed."""
    plan(store, "mini", tasks(ORACLE, 1))
    needed, task_id = ORACLE.dense.dense_id, Task(ORACLE, 0, 0).task_id
    store.commit_dense(needed, FIRST)
    unneeded = [store.commit_dense("0" * 16, content) for content in (FIRST, SECOND)]
    for key in (needed, task_id, "gone"):
        store.scratch.save_checkpoint(key, SECOND)
    before = contents(store)
    found = unused(store, list(store.manifests()))
    assert found.names == tuple(sorted([*unneeded, "scratch/checkpoints/gone.checkpoint"]))
    assert found.size == sum(len(before[name]) for name in found.names)
    assert contents(store) == before
    assert len(unused(store, []).names) == 6


# -- SQL ----------------------------------------------------------------------------------------------


def test_sql_sees_plans_and_rows(store: Store) -> None:
    """The views tell what was planned, what is done, failed and pending, before and after compaction."""
    a, b, c = tasks(ORACLE, 3)
    with pytest.raises(StoreError, match="no store at"):
        store.sql("select count(*) from attempts")
    plan(store, "mini", [a, b, c])
    assert store.sql("select count(*) from attempts").fetchall() == [(0,)]
    store.commit_rows("s0", [failed(a), failed(b)])
    store.commit_rows("s0", [done(a, pruned_train_loss=0.5)])
    for _ in range(2):
        query = "select task_id, status, pruned_train_loss from tasks order by position"
        assert store.sql(query).fetchall() == [
            (a.task_id, "done", 0.5),
            (b.task_id, "failed", None),
            (c.task_id, "pending", None),
        ]
        counts = store.sql("select sweep, tasks, done, failed, pending from sweeps").fetchall()
        assert counts == [("mini", 3, 1, 1, 1)]
        assert store.sql("select sweep, error_class, shard, tasks from failures").fetchall() == [
            ("mini", "RuntimeError", "s0", 1)
        ]
        store.compact()
    with pytest.raises(QueryError):
        store.sql("drop table row_files")
