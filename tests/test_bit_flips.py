"""One flipped bit anywhere in a file of a store: no answer changes without a warning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from storage.encoding import FEW_ROWS
from storage.errors import DamagedError, SkippedFile
from storage.manifest import PLAN_SCHEMA
from storage.rowfiles import Problem
from storage.sql import plan_table, run_query
from storage.store import Store
from tests.rows import DENSE, ORACLE, SAMPLED, done, plan, tasks
from workers.networks import load_network

MANY = [pytest.param(1, id="few"), pytest.param(0, id="many", marks=pytest.mark.slow)]
FEW_FLIPS = 150


@dataclass(frozen=True)
class Flips:
    """Random single bits of one file, each flipped on the disk and then restored."""

    path: Path
    count: int

    def __iter__(self) -> Iterator[int]:
        whole = self.path.read_bytes()
        draws = random.Random(self.path.suffix)
        for _ in range(self.count):
            bit = draws.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            self.path.write_bytes(flipped)
            yield bit
        self.path.write_bytes(whole)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """A file that is as it was at the end."""
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before


def _count(few: int, many: int) -> int:
    return FEW_FLIPS if few else many


def _rows(store: Store, kind: str) -> Path:
    """The one row file of a store: of few rows, of many, or of compaction."""
    for part in range(2 if kind == "compacted" else 1):
        chosen = tasks(ORACLE, FEW_ROWS + 1 if kind == "many rows" else 3, 2)[part:]
        store.commit_rows("s0", [done(task, score_l1=0.5, score_l2=0.25, host="here") for task in chosen])
    if kind == "compacted":
        store.compact()
    (name,) = store.row_file_names()
    return Path(store.root, name)


@pytest.mark.parametrize("few", MANY)
@pytest.mark.parametrize(
    ("kind", "columns"),
    [("few rows", None), ("many rows", None), ("many rows", ["task_id", "score_l1"]), ("compacted", ["score_l2"])],
)
def test_row_files(kind: str, columns: list[str] | None, few: int, tmp_path: Path) -> None:
    """Of a row file with one other bit no row counts, whatever columns are read, and the file is named."""
    store = Store(tmp_path)
    path = _rows(store, kind)
    with unchanged(path):
        whole, problems = store.row_files(columns)
        assert len(whole) and not problems
        for bit in Flips(path, _count(few, 5_000)):
            found, problems = store.row_files(columns)
            assert (len(found), [p.file for p in problems]) == (0, [f"rows/{path.name}"]), bit


def test_a_flip_is_a_warning_in_sql_and_in_counts(tmp_path: Path) -> None:
    """In Python too: `Store.sql`, and the counts that a plan is made from."""
    store = Store(tmp_path)
    path = _rows(store, "few rows")
    for _ in Flips(path, 3):
        for ask in (lambda: store.sql("select count(*) from rows").fetchall(), store.statuses):
            with pytest.warns(SkippedFile, match=f"skipped rows/{path.name}: its content does not match the digest"):
                assert ask() in ([(0,)], {})


@pytest.mark.parametrize("few", MANY)
@pytest.mark.parametrize("suffix", ["yaml", "parquet"])
def test_expansions(suffix: str, few: int, tmp_path: Path) -> None:
    """An expansion with one other bit is refused by name; queries over all sweeps leave it out and warn."""
    store = Store(tmp_path)
    plan(store, "mini", tasks(ORACLE, 40, 3))
    plan(store, "other", tasks(SAMPLED, 2))
    manifest = store.newest("mini")
    (path,) = tmp_path.glob(f"sweeps/mini/*.{suffix}")
    for bit in Flips(path, _count(few, 2_500)):
        reported: list[Problem] = []
        assert set(plan_table(store, [*PLAN_SCHEMA.names, "sweep"], reported.append)["sweep"].to_pylist()) == {"other"}
        assert [path.name in problem.file for problem in reported] == [True], bit
        for ask in (store.plan_table, store.spec_text):
            with pytest.raises(DamagedError, match=path.name):
                ask(manifest)


def _dense(store: Store) -> tuple[Path, Callable[[], object]]:
    name = store.commit_dense(DENSE.dense_id, random.Random(0).randbytes(5000))
    return Path(store.root, name), lambda: store.dense(DENSE.dense_id)


def _checkpoint(store: Store) -> tuple[Path, Callable[[], object]]:
    store.scratch.save_checkpoint("task", random.Random(1).randbytes(5000))

    def found() -> object:
        try:
            return store.scratch.checkpoint("task")
        except ValueError:
            return None

    return Path(store.root, "scratch/checkpoints/task.checkpoint"), found


def _network(store: Store) -> tuple[Path, Callable[[], object]]:
    name = store.commit_network("0123456789abcdef", random.Random(2).randbytes(5000))

    def found() -> object:
        try:
            return load_network(Path(store.root, name))
        except ValueError as error:
            return None if "damaged" in str(error) else error

    return Path(store.root, name), found


@pytest.mark.parametrize("few", MANY)
@pytest.mark.parametrize("made", [_dense, _checkpoint, _network])
def test_weights(made: Callable[[Store], tuple[Path, Callable[[], object]]], few: int, tmp_path: Path) -> None:
    """Dense weights, checkpoints and kept networks with one other bit do not count."""
    path, found = made(Store(tmp_path))
    assert found() is not None
    for bit in Flips(path, _count(few, 1_000)):
        assert found() is None, bit
    assert found() is not None


def test_a_renamed_column_of_an_older_file(tmp_path: Path) -> None:
    """A file without a digest whose column has another name is not read with nulls, nor compacted without it."""
    store = Store(tmp_path)
    path = _rows(store, "few rows")
    older = path.with_name(f"s0-{'0' * 32}.parquet")
    older.write_bytes(path.read_bytes().replace(b"score_l2", b"score_l3"))
    path.unlink()
    found, (problem,) = store.row_files()
    assert len(found) == 0 and problem.file == f"rows/{older.name}" and "score_l3" in problem.reason
    before = older.read_bytes()
    assert [p.file for p in store.compact().aside] == [problem.file]
    assert [p.read_bytes() for p in tmp_path.glob("aside/*")] == [before]


@pytest.mark.parametrize("query", ["select * from tasks", "select * from sweeps", "select * from cells"])
def test_one_damaged_sweep_does_not_stop_the_others(query: str, tmp_path: Path) -> None:
    """Queries over all sweeps answer for those that are whole."""
    store = Store(tmp_path)
    plan(store, "mini", tasks(ORACLE, 3))
    plan(store, "other", tasks(SAMPLED, 2))
    expected = run_query(store, f"from ({query}) where sweep = 'other'")
    (path,) = tmp_path.glob("sweeps/mini/*.yaml")
    path.unlink()
    reported: list[Problem] = []
    assert run_query(store, query, reported.append).equals(expected)
    assert [problem.reason for problem in reported] == ["the file is missing"]
    assert isinstance(expected, pa.Table) and len(expected)
