"""import: another store's sweeps and rows come in once, with what they need; nothing of this store is overwritten."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import StoreError
from storage.merging import find_merge, write_merge
from storage.removal import remove_rows, unplanned_rows
from storage.store import Store
from tests.rows import DENSE, L1, ORACLE, done, failed, plan, tasks
from tests.test_interrupt import in_process
from tests.test_upkeep import files, lines

A, B = tasks(ORACLE, 6), tasks(L1, 2)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Store]:
    """Another store with two sweeps, weights, a kept network and damaged files; and this one, with a sweep."""
    monkeypatch.chdir(tmp_path)
    other, ours = Store("other"), Store("results")
    plan(other, "mini", A[:2])
    plan(other, "mini", A[:3])
    plan(other, "two", B)
    kept = other.commit_network(A[0].task_id, b"a network")
    other.commit_network(A[1].task_id, b"no row names it")
    other.commit_rows("s0", [done(A[0], kept_network=kept), failed(A[1])])
    other.commit_rows("s0", [done(A[1])])
    other.commit_dense(DENSE.dense_id, b"weights")
    other.commit_dense("0" * 16, b"nobody needs them")
    Path("other/rows/torn.parquet").write_bytes(b"PAR1")
    plan(ours, "mine", A[1:2])
    ours.commit_rows("s9", [done(A[1])])
    return other, ours


def test_import_merges_once(stores: tuple[Store, Store], capsys: pytest.CaptureFixture[str]) -> None:
    """Sweeps, rows with their origins, needed weights and networks, warnings; the other store is as it was, and a
    second import changes nothing, before and after compactions of either."""
    other, ours = stores
    before, mine = files(other), lines(ours)
    code, out, err = in_process(capsys, "import", "other")
    assert code == 0 and out.split() == ["mini", "two"], err
    assert "warning: skipped rows/torn.parquet" in err
    assert "imported 2 sweeps, 3 rows, 1 dense model and 1 kept network, " in err and " bytes" in err
    assert files(other) == before and lines(ours) == mine + lines(other)
    assert ours.sweeps() == ["mine", "mini", "two"] and ours.dense_ids() == {DENSE.dense_id}
    assert [f"networks/{name}" for name in ours.names("networks")] == [
        name for (name,) in ours.sql("select kept_network from rows where kept_network is not null").fetchall()
    ]
    for name in ("mini", "two"):
        assert ours.plan_table(ours.newest(name)) == other.plan_table(other.newest(name))
    for store in (ours, other, ours):
        found = files(ours)
        code, out, err = in_process(capsys, "import", "other")
        assert (code, out) == (
            0,
            "",
        ) and "imported 0 sweeps, 0 rows, 0 dense models and 0 kept networks, 0 bytes" in err
        assert files(ours) == found
        store.compact()
    plan(other, "mini", A[:4])  # wider
    other.commit_rows("s0", [done(A[3])])
    code, out, err = in_process(capsys, "import", "other")
    assert code == 0 and out == "mini\n" and "1 row," in err
    assert len(ours.plan_table(ours.newest("mini"))) == 4 and lines(ours) == mine + lines(other)


def test_a_sweep_of_the_same_name_is_never_overwritten(
    stores: tuple[Store, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    """With other content, or with fewer tasks: exit 2 with what to do, and nothing is written at all."""
    other, ours = stores
    plan(ours, "two", A)
    before = files(ours)
    code, out, err = in_process(capsys, "import", "other")
    assert (code, out) == (2, "") and files(ours) == before
    assert "two: both stores have a sweep of this name with other content" in err and "--set name=two-2" in err
    ours.remove_sweep("two")
    assert in_process(capsys, "import", "other")[0] == 0
    plan(other, "mini", A[:1])
    before = files(ours)
    assert in_process(capsys, "import", "other")[0] == 2 and files(ours) == before
    plan(ours, "mini", A[:1])
    assert in_process(capsys, "import", "other")[0] == 0


def test_stores_that_cannot_be_imported(stores: tuple[Store, Store], capsys: pytest.CaptureFixture[str]) -> None:
    """None there, or the same one; a new store is made."""
    code, _, err = in_process(capsys, "import", "nowhere")
    assert code == 5 and "no store at nowhere" in err and not Path("nowhere").exists()
    assert in_process(capsys, "import", "results")[0] == 2
    assert in_process(capsys, "import", "other", "--store", "fresh")[0] == 0
    assert lines(Store("fresh")) == lines(stores[0])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4), st.sets(st.integers(0, 5)), st.data())
def test_imported_rows_count_once_whatever_is_there(
    tmp_path: Path, committed: list[set[int]], planned: set[int], data: st.DataObject
) -> None:
    """Rows that were removed here come in again, with others of their file here; those that are here do not."""
    other, ours = (Store(tmp_path / uuid.uuid4().hex) for _ in range(2))
    plan(other, "mini", A)
    for numbers in committed:
        other.commit_rows("s0", [done(A[i]) for i in sorted(numbers)])
        if data.draw(st.booleans()):
            other.compact()
    write_merge(other, ours, find_merge(other, ours))
    assert lines(ours) == lines(other)
    plan(ours, "mini", [A[i] for i in sorted(planned)] or B)
    remove_rows(ours, unplanned_rows(ours))
    ours.remove_sweep("mini")
    write_merge(other, ours, find_merge(other, ours))
    counts = [Counter(task for task, _ in lines(store).elements()) for store in (other, ours)]
    assert counts[0] == counts[1]
    assert len(find_merge(other, ours).rows) == 0


def test_a_store_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """In Python as on the command line; writing makes the store, and an empty sweep can be read."""
    store = Store(tmp_path / "nowhere")
    for read in (
        lambda: store.sql("select 1"),
        store.row_files,
        store.statuses,
        lambda: store.newest("mini"),
    ):
        with pytest.raises(StoreError, match=r"no store at .*nowhere"):
            read()
    assert not (tmp_path / "nowhere").exists()
    plan(store, "mini", A)
    assert store.statuses() == {} and store.sql("select count(*) from tasks").fetchall() == [(6,)]
