"""A store on an S3 server that fails: what was promised holds, or a StoreError says that it does not."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from storage import commit
from storage.errors import StoreError
from storage.records import Row, Task
from storage.schema import table_to_rows
from storage.signs import Sign
from storage.store import Store
from tests.faults.proxy import ALWAYS, Proxy, proxy_before
from tests.rows import ORACLE, done, plan, tasks
from tests.s3 import BUCKET, s3_server

ROW = done(Task(ORACLE, 0, 0), pruned_train_loss=1 / 7)
OTHER = done(Task(ORACLE, 1, 0))
FIRST = b"first"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server."""
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy before it."""
    with proxy_before(server) as proxy:
        yield proxy


@pytest.fixture
def behind(server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store on the server, asked directly."""
    monkeypatch.setattr(commit, "RETRY_SECONDS", 0.02)
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}/store")


@pytest.fixture
def store(behind: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same store through the proxy."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.address)
        store = Store(behind.location)
        assert (store.names("rows"), proxy.seen["LIST"]) == ([], 1)  # made: it has read the environment
    return store


def rows_of(store: Store) -> Counter[str]:
    """Every row that counts; no file is damaged."""
    table, problems = store.row_files()
    assert problems == []
    return Counter(map(repr, table_to_rows(table)))


ONE, BOTH = Counter([repr(ROW)]), Counter([repr(ROW), repr(OTHER)])


def files(store: Store) -> list[str]:
    """Everything that is there, of any size."""
    folders = (
        "rows",
        "dense",
        "aside",
        "scratch",
        "scratch/x",
        "scratch/drivers",
        "scratch/checkpoints",
        "sweeps/mini",
    )
    return [f"{folder}/{name}" for folder in folders for name in store.names(folder)]


def _soon(work: Callable[[], object]) -> None:
    """`work` is a StoreError, within seconds, of one line that names the store."""
    began = time.monotonic()
    with pytest.raises(StoreError, match=BUCKET) as caught:
        work()
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)


# -- a server that is busy ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 403, None], ids=["500", "503", "403", "no-answer"])
def test_a_few_failures_are_borne(status: int | None, store: Store, behind: Store, proxy: Proxy) -> None:
    """Commits, readers and a compaction get over two refused requests of any kind, and every row is there once."""
    rows: list[Row] = []
    for verb, task in zip(("HEAD", "LIST", "PUT", "GET"), tasks(ORACLE, 4), strict=True):
        fault = proxy.fail(verb, 2, status)
        rows.append(done(task))
        store.commit_rows("s0", rows[-1:])
        assert rows_of(store) == rows_of(behind) == Counter(map(repr, rows))
        assert fault.times == 0
    fault = proxy.fail("DELETE", 2, status)
    assert store.compact().merged == 4
    assert rows_of(store) == rows_of(behind) == Counter(map(repr, rows))
    assert (fault.times, len(behind.row_file_names())) == (0, 1)


@pytest.mark.parametrize("status", [None, 400], ids=["no-answer", "400"])
def test_an_answer_that_is_lost_after_the_write_leaves_one_row(
    status: int | None, store: Store, behind: Store, proxy: Proxy
) -> None:
    """A write that was done but not answered is done again under its name: one file, one row, no duplicate."""
    fault = proxy.fail("PUT", 2, status, served=True)
    name = store.commit_rows("s0", [ROW])
    assert (fault.times, proxy.seen["PUT"]) == (0, 3)
    assert files(behind) == [name]
    assert rows_of(store) == rows_of(behind) == ONE
    assert store.sql("select count(*) from attempts").fetchall() == [(1,)]


@pytest.mark.parametrize("verb", ["PUT", "COPY", "DELETE"])
@pytest.mark.parametrize("status", [None, 400], ids=["no-answer", "400"])
def test_answers_lost_during_a_compaction_lose_no_row(
    verb: str, status: int | None, store: Store, behind: Store, proxy: Proxy
) -> None:
    """A union, a removal or a move that was done but not answered is done, and the compaction goes on."""
    for row in (ROW, OTHER):
        store.commit_rows("s0", [row])
    with behind.fs.open_output_stream(f"{behind.root}/rows/s0-torn.parquet") as file:
        file.write(b"PAR1")
    fault = proxy.fail(verb, 2, status, served=True)
    store.compact()
    assert fault.times == 0
    assert rows_of(store) == rows_of(behind) == BOTH
    assert len(behind.row_file_names()) == 1
    assert {behind.read(f"aside/{name}") for name in behind.names("aside")} == {b"PAR1"}


def test_notes_and_checkpoints_survive_lost_answers(store: Store, behind: Store, proxy: Proxy) -> None:
    """What was noted is noted, and a note that is there is told, not replaced, whatever answer was lost."""
    proxy.fail("PUT", 1, 400, served=True)
    assert store.scratch.note("x/y", {"n": 1}) == {"n": 1}
    proxy.fail("PUT", 1, 400, served=True)
    assert store.scratch.note("x/y", {"n": 2}) == behind.scratch.noted("x/y") == {"n": 1}
    store.scratch.renew("x/y", {"n": 3})
    proxy.fail("PUT", 1, 400, served=True)
    store.scratch.save_checkpoint("t0", FIRST)
    assert (behind.scratch.noted("x/y"), behind.scratch.checkpoint("t0")) == ({"n": 3}, FIRST)
    proxy.fail("DELETE", 1, 400, served=True)
    store.scratch.drop_checkpoint("t0")
    assert behind.scratch.checkpoint("t0") is None


@pytest.mark.parametrize("served", [False, True], ids=["refused", "no-answer"])
@pytest.mark.parametrize("verb", ["POST", "PUT", "COMPLETE"])
def test_a_large_file_is_there_whole_or_not_at_all(
    verb: str, served: bool, store: Store, behind: Store, proxy: Proxy
) -> None:
    """Weights that are uploaded in parts are no file until the last step, and the same commit again succeeds."""
    content = hashlib.shake_256(b"weights").digest(12 * 2**20)
    fault = proxy.fail(verb, 1 if served else ALWAYS, 400, served=served)
    if not served:
        _soon(lambda: store.commit_dense("d0", content))
        assert files(behind) == []
        assert behind.dense("d0") is None
        proxy.heal()
    name = store.commit_dense("d0", content)
    assert fault.times == (0 if served else ALWAYS)
    assert proxy.seen["COMPLETE"] > 0
    assert files(behind) == [name]
    assert behind.read(name) == content


def test_a_large_checkpoint_that_is_refused_leaves_the_last_one(store: Store, behind: Store, proxy: Proxy) -> None:
    """Old or new, never a mixture: what was kept before an upload that fails is kept after it."""
    store.scratch.save_checkpoint("t0", FIRST)
    for verb in ("POST", "PUT", "COMPLETE"):
        proxy.fail(verb, ALWAYS, 403)
        _soon(lambda: store.scratch.save_checkpoint("t0", bytes(12 * 2**20)))
        assert behind.scratch.checkpoint("t0") == FIRST
        proxy.heal()
    store.scratch.save_checkpoint("t0", bytes(12 * 2**20))
    assert behind.scratch.checkpoint("t0") == bytes(12 * 2**20)


# -- a server that refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["ANY", "HEAD", "PUT"])
def test_a_commit_without_credentials_is_a_store_error_and_can_be_repeated(
    verb: str, store: Store, behind: Store, proxy: Proxy
) -> None:
    """Nothing of a refused commit is there, nothing counts as done, and with credentials the same commit succeeds."""
    proxy.fail(verb, ALWAYS, 403)
    for work in (
        lambda: store.commit_rows("s0", [ROW]),
        lambda: store.commit_dense("d0", FIRST),
        lambda: store.scratch.note("x/y", {"n": 1}),
        lambda: plan(store, "mini", tasks(ORACLE, 1)),
        store.check_writable,
    ):
        _soon(work)
    assert files(behind) == []
    assert (behind.sweeps(), behind.exists()) == ([], False)

    proxy.heal()
    store.check_writable()
    store.commit_rows("s0", [ROW])
    plan(store, "mini", tasks(ORACLE, 1))
    assert rows_of(store) == rows_of(behind) == ONE
    assert store.statuses() == {ROW.task_id: "done"}


def test_without_credentials_nothing_looks_as_if_it_were_not_there(store: Store, behind: Store, proxy: Proxy) -> None:
    """What cannot be read is a StoreError, not undone, untrained or unplanned; what cannot be changed stays."""
    plan(behind, "mini", tasks(ORACLE, 1))
    behind.commit_rows("s0", [ROW])
    behind.commit_dense("d0", FIRST)
    behind.scratch.note("x/y", {"n": 1})
    behind.scratch.save_checkpoint("t0", FIRST)
    before = files(behind)
    proxy.fail("ANY", ALWAYS, 403)
    for work in (
        store.statuses,
        store.exists,
        store.sweeps,
        lambda: store.sql("from rows"),
        lambda: store.manifest("mini"),
        lambda: store.dense("d0"),
        lambda: store.scratch.noted("x/y"),
        lambda: store.scratch.notes("x"),
        lambda: store.scratch.checkpoint("t0"),
        lambda: store.scratch.renew("x/y", {"n": 2}),
        lambda: store.scratch.save_checkpoint("t0", b"second"),
        lambda: store.scratch.forget("x/y"),
        lambda: store.move("scratch/x/y.json", "aside/y.json"),
        lambda: store.remove_sweep("mini"),
        store.compact,
    ):
        _soon(work)
    assert files(behind) == before
    assert (behind.scratch.noted("x/y"), behind.scratch.checkpoint("t0")) == ({"n": 1}, FIRST)


@pytest.mark.parametrize("verb", ["HEAD", "GET", "LIST", "PUT", "COPY", "DELETE"])
def test_a_compaction_that_loses_its_credentials_loses_no_row(
    verb: str, store: Store, behind: Store, proxy: Proxy
) -> None:
    """Refused at any kind of request it is a StoreError, every row stays there once, and the next one finishes."""
    for row in (ROW, OTHER):
        behind.commit_rows("s0", [row])
    with behind.fs.open_output_stream(f"{behind.root}/rows/s0-torn.parquet") as file:
        file.write(b"PAR1")
    proxy.fail(verb, ALWAYS, 403)
    _soon(store.compact)
    table, _ = behind.row_files()
    assert Counter(map(repr, table_to_rows(table))) == BOTH

    proxy.heal()
    store.compact()
    assert rows_of(store) == rows_of(behind) == BOTH
    assert len(behind.row_file_names()) == 1


@pytest.mark.parametrize("verb", ["HEAD", "PUT", "DELETE"])
def test_check_writable_tells_what_is_not_allowed(verb: str, store: Store, proxy: Proxy) -> None:
    """A store whose credentials allow no look, no write or no removal is told before a sweep starts."""
    proxy.fail(verb, ALWAYS, 403)
    _soon(store.check_writable)
    proxy.heal()
    store.check_writable()


def test_a_sign_of_life_that_cannot_be_written_stops_nobody(store: Store, behind: Store, proxy: Proxy) -> None:
    """Work goes on while scratch is refused, and the sign is there again with the next beat."""
    proxy.fail("ANY", ALWAYS, 403)
    with Sign(store, "drivers", dict) as sign:
        assert behind.scratch.notes("drivers") == {}
        proxy.heal()
        sign.beat()
        assert list(behind.scratch.notes("drivers")) == [f"drivers/{sign.id}"]
        proxy.fail("ANY", ALWAYS, 403)
    assert list(behind.scratch.notes("drivers")) == [f"drivers/{sign.id}"]
