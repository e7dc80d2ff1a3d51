"""A store in one file answers as the store does, is whole or not there, and replaces nothing unasked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from storage import export as exporting
from storage.errors import QueryError
from storage.export import export
from storage.records import Removed, Task
from storage.schema import SCHEMA
from storage.sql import FUNCTIONS, VIEWS
from storage.store import Store
from tests.rows import L1, NOON, ORACLE, done, failed, plan, tasks, tree
from tests.test_cli_errors import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two sweeps that share a task; one task with two rows, one failed, one pending; a row of no sweep."""
    found = Store(tmp_path_factory.mktemp("store") / "results")
    oracle, l1 = tasks(ORACLE, 3, 2), tasks(L1, 2)
    plan(found, "mini", oracle)
    plan(found, "also", [oracle[0], *l1])
    known = {
        "removed": (Removed("conv1", (1, 2)),),
        "epoch_test_accuracy": (0.5, 0.75),
        "score_extra": (("mine", 2.5),),
        "score_l1": 1.25,
        "pruned_train_loss": 0.1,
        "best_test_accuracy": 0.7,
        "seconds_prune": 1.0,
        "seconds_retrain": 2.0,
    }
    rows = [done(task, **known) for task in oracle[:4]]
    rows += [failed(oracle[0], finished_at=NOON), failed(oracle[4], error='a "quoted",\nerror'), done(l1[0], **known)]
    found.commit_rows("s0", [*rows, done(Task(ORACLE, 99, 0))])
    return found


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole store as one database, alone in its folder."""
    path = tmp_path_factory.mktemp("whole") / "all.duckdb"
    assert export(store, None, path) == 7
    assert list(tree(path.parent)) == [path.name]
    return path


@pytest.mark.parametrize("view", VIEWS)
def test_a_database_has_every_view_as_the_store_has_it(view: str, store: Store, whole: Path) -> None:
    """DuckDB alone opens it: every line of every view is the same."""
    with duckdb.connect(whole, read_only=True) as con:
        found = con.sql(f"from {view}")
        assert found.columns == store.sql(f"from {view}").columns
        assert sorted(map(repr, found.fetchall())) == sorted(map(repr, store.sql(f"from {view}").fetchall()))
        assert found.fetchall()


def test_a_database_of_one_sweep_has_nothing_else(store: Store, tmp_path: Path) -> None:
    """Its tasks with every attempt, and no other sweep's; functions of ours are not in it."""
    assert export(store, "also", tmp_path / "also.duckdb") == 2
    with duckdb.connect(tmp_path / "also.duckdb", read_only=True) as con:
        assert con.sql("select distinct sweep from tasks").fetchall() == [("also",)]
        assert con.sql("select count(*) from attempts").fetchall() == [(3,)]
        kinds = dict(con.sql("select column_name, column_type from (describe tasks)").fetchall())
        assert kinds["sweep"] == kinds["model"] == "VARCHAR"
        known = {name for (name,) in con.sql("select function_name from duckdb_functions()").fetchall()}
        assert known & set(FUNCTIONS) == set()


def test_parquet_has_the_chosen_rows_in_the_columns_of_a_row(store: Store, tmp_path: Path) -> None:
    """One row per task of the sweep that has any, in the pinned schema."""
    assert export(store, "mini", tmp_path / "mini.parquet") == 5
    table = pq.read_table(tmp_path / "mini.parquet")
    assert table.schema == SCHEMA
    query = "select task_id, status from tasks where sweep = 'mini' and status <> 'pending'"
    found = zip(table["task_id"].to_pylist(), table["status"].to_pylist(), strict=True)
    assert sorted(found) == sorted(store.sql(query).fetchall())
    assert export(store, None, tmp_path / "all.parquet") == 7


def test_csv_has_lists_as_json(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lines are made at a time, there is one head, and text with quotes and newlines survives."""
    monkeypatch.setattr(exporting, "CSV_LINES", 2)
    assert export(store, "mini", tmp_path / "mini.csv") == 5
    with (tmp_path / "mini.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == SCHEMA.names
    assert [json.loads(line["layers"]) for line in lines] == [["conv1"]] * 5
    by_status = {line["status"]: line for line in lines}
    assert by_status["failed"]["error"] == 'a "quoted",\nerror'
    assert json.loads(by_status["done"]["removed"]) == [{"layer": "conv1", "units": [1, 2]}]
    assert json.loads(by_status["done"]["score_extra"]) == {"mine": 2.5}
    assert by_status["failed"]["score_l1"] == ""


@pytest.mark.parametrize("ending", exporting.ENDINGS)
def test_an_empty_sweep_is_an_empty_file_of_its_kind(ending: str, tmp_path: Path) -> None:
    """Nothing was run yet: no row, and no error."""
    store = Store(tmp_path / "results")
    plan(store, "new", tasks(ORACLE, 1))
    path = tmp_path / f"new{ending}"
    assert export(store, "new", path) == 0
    with duckdb.connect(path if ending == ".duckdb" else ":memory:", read_only=ending == ".duckdb") as con:
        table = "rows" if ending == ".duckdb" else f"'{path}'"
        assert con.sql(f"from {table}").columns == SCHEMA.names
        assert con.sql(f"from {table}").fetchall() == []


@pytest.mark.parametrize("ending", exporting.ENDINGS)
def test_a_file_is_whole_or_as_it_was(
    ending: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails half way leaves the file that was there, and nothing beside it."""
    path = tmp_path / f"mini{ending}"
    path.write_bytes(b"before")
    with pytest.raises(QueryError, match=f"mini{ending} is there already: --force replaces it"):
        export(store, "mini", path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export(store, "mini", path, force=True)
    assert tree(tmp_path) == {path.name: b"before"}
    monkeypatch.undo()
    assert export(store, "mini", path, force=True) == 5
    assert list(tree(tmp_path)) == [path.name] and path.read_bytes() != b"before"


def test_the_command(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it wrote; mistakes are one message and leave no file."""
    at = ["--store", store.location]
    assert run("export", "mini", "-o", str(tmp_path / "mini.csv"), *at) == 0
    assert capsys.readouterr() == ("", f"wrote {tmp_path}/mini.csv: 5 rows\n")
    mistakes = {
        "give a SWEEP, or --all": ["-o", "x.csv"],
        "x.txt: allowed endings are .duckdb, .parquet, .csv": ["mini", "-o", f"{tmp_path}/x.txt"],
        "no sweep nosuch": ["nosuch", "-o", f"{tmp_path}/x.csv"],
        "there is no folder": ["mini", "-o", f"{tmp_path}/nowhere/x.csv"],
        "Missing option": ["mini"],
        "is there already": ["--all", "-o", f"{tmp_path}/mini.csv"],
    }
    for told, arguments in mistakes.items():
        assert run("export", *arguments, *at) == 2
        assert told in capsys.readouterr().err
    assert list(tree(tmp_path)) == ["mini.csv"]
