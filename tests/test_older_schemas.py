"""A store that an older prunesweep wrote opens, counts and goes on as it did.

`fixtures/store-v1` was written by schema 1 and is never written again; a later schema gets a fixture of its
own beside it. It is TINY as the sweep `old`, once with three candidates and then with four: six tasks done,
one of them at the second attempt, in a compacted file; one failed, in a file of its own; one not yet run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.documents import Document
from orchestrator.plan import check, plan_of_sweep, planned
from storage.manifest import PlannedTask, planned_tasks
from storage.records import Row
from storage.schema import REQUIRED, SCHEMA, table_to_rows
from storage.store import Store
from tests.rows import tree
from tests.test_interrupt import in_process

LATER = ("scope", "mask_sha256", "skipped_samples")
LATER += tuple(f"score_{name}" for name in ("taylor", "hessian", "fpgm", "lamp", "bn_scale", "activation"))
"""Columns that schema 1 did not have."""
FIXTURES = Path(__file__).with_name("fixtures")
CELL = "679eec8dc73407de"
FAILED, PENDING = "12ba12796062e0cc", "49ed1e264dfa24d7"
DONE = {
    (0, 0): "77a258403c646994",
    (0, 1): "d44b419d714386fa",
    (1, 0): "b07c7c51c81868f5",
    (1, 1): "998a9d97944119a2",
    (2, 0): "c8d0ef1ef8efe7c8",
    (2, 1): "78fc7d1bfdcd02d9",
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the store in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "store-v1", tmp_path / "results")
    return Store("results")


def rows(store: Store) -> list[Row]:
    """Every row, in one order, whichever file it is in."""
    table = store.row_files()[0].sort_by([(name, "ascending") for name in ("candidate", "seed", "status")])
    return table_to_rows(table)


def test_every_row_is_read(store: Store) -> None:
    """No file is reported, every attempt is there once, and a row alone suffices to rebuild its task and its ids."""
    table, problems = store.row_files()
    assert problems == [] and len(table) == 8
    assert store.statuses() == dict.fromkeys(DONE.values(), "done") | {FAILED: "failed"}
    for row in rows(store):
        task = row.task()
        assert (task.task_id, task.candidate_id) == (row.task_id, row.candidate_id)
        assert (task.cell.cell_id, task.cell.dense.dense_id) == (row.cell_id, row.dense_id)
        assert (task.cell.cell_id, task.cell.retrain.recipe_id, row.schema_version) == (CELL, row.recipe_id, 1)
    found = {(row.candidate, row.seed): row.task_id for row in rows(store) if row.status == "done"}
    assert found == DONE
    twice = [(row.status, row.attempt) for row in rows(store) if row.task_id == DONE[1, 0]]
    assert twice == [("done", 2), ("failed", 1)]


def test_its_numbers(store: Store) -> None:
    """Measurements, curves and lists come back as they were written."""
    row = next(row for row in rows(store) if row.task_id == DONE[0, 0])
    assert row.removed is not None and row.epoch_test_accuracy is not None and row.epoch_test_loss is not None
    assert [(one.layer, one.units) for one in row.removed] == [("conv1", (1, 4))]
    assert (row.params, row.dense_params, row.layers, row.ratios) == (4948, 5500, ("conv1",), (0.2,))
    assert (row.best_epoch, row.best_test_accuracy) == (2, 0.734375)
    assert row.epoch_test_accuracy == (0.671875, 0.734375) and len(row.epoch_test_loss) == 2
    assert row.last_test_loss == pytest.approx(row.epoch_test_loss[1], rel=1e-6)
    assert json.loads(str(row.execution))["device_model"] == "cpu of the fixture" and row.host == "host"


def test_its_views(store: Store) -> None:
    """Sweeps, cells, candidates and failures count and average as they did."""
    sweeps = store.sql("select sweep, expanded_at, cells, tasks, done, failed, pending from sweeps").fetchall()
    assert sweeps == [("old", "20250131T120200000000Z", 1, 8, 6, 1, 1)]
    cells = store.sql("select cell_id, candidates, seeds, tasks, done, failed, pending from cells").fetchall()
    assert cells == [(CELL, 4, 2, 8, 6, 1, 1)]
    query = "select candidate, n_seeds, pruned_train_loss, best_test_accuracy from candidates order by candidate"
    assert store.sql(query).fetchall() == [
        (0, 2, 1.0575875632528096, 0.75),
        (1, 2, 0.9027167141030077, 0.765625),
        (2, 2, 1.0662727866347268, 0.7265625),
    ]
    failures = store.sql("select error_class, tasks, example_task from failures").fetchall()
    assert failures == [("RuntimeError", 1, FAILED)]


def test_its_correlation(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """`corr` gives the table it gave."""
    code, out, _ = in_process(capsys, "corr", "old", "--show", "all", "-f", "json")
    (line,) = json.loads(out)
    assert code == 0
    assert {k: line[k] for k in ("cell", "cell_id", "n", "planned", "seeds", "tau", "anomaly_ratio", "tau_last5")} == {
        "cell": "lenet5_mini synthetic conv1 0.2 oracle",
        "cell_id": CELL,
        "n": 3,
        "planned": 4,
        "seeds": 2,
        "tau": -1.0,
        "anomaly_ratio": 0.0,
        "tau_last5": -1.0,
    }
    assert line["p"] == pytest.approx(1 / 3)
    assert line["pearson"] == pytest.approx(-0.8301874928834634, rel=1e-9)


def test_its_status(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` counts as it did; the note of a worker that died long ago counts for nothing."""
    code, out, err = in_process(capsys, "status", "old", "-f", "json")
    (line,) = json.loads(out)
    assert code == 0 and [line[k] for k in ("tasks", "done", "failed", "running", "pending")] == [8, 6, 1, 0, 1]
    assert "old: 8 tasks: 6 done, 1 failed, 0 running, 1 pending" in err and "at work" not in err


def test_what_is_left_of_it(store: Store) -> None:
    """`resume` would run exactly what is unfinished, in the shards of then, from the dense weights that are there."""
    manifest = store.newest("old")
    plan = plan_of_sweep(store, manifest)
    assert plan.statuses == {"done": 6, "failed": 1, "pending": 1} and plan.denses == ()
    (shard,) = plan.shards
    assert [task.task_id for task in shard.tasks] == [FAILED, PENDING]
    assert [(task.candidate, task.seed) for task in shard.tasks] == [(3, 0), (3, 1)]
    recorded = {one.task.task_id: one.shard for one in planned_tasks(store.plan_table(manifest))}
    assert shard.shard_id == recorded[FAILED] == "7354e758d5aeee60"
    assert plan_of_sweep(store, manifest, frozenset({FAILED})).unfinished == 1


def test_its_spec_still_means_the_same(store: Store) -> None:
    """Expanding it again gives the tasks and shards that were recorded: nothing that is done is run again."""
    manifest = store.newest("old")
    document = Document("old.yaml", store.spec_text(manifest))
    again = [PlannedTask(s.shard_id, task) for s in planned(check(document), document) for task in s.tasks]
    assert again == list(planned_tasks(store.plan_table(manifest)))


def test_it_is_compacted_like_any_other(store: Store) -> None:
    """Its files can be merged with each other, without losing or changing a row."""
    before = rows(store)
    assert (store.compact().merged, store.compact().merged) == (2, 0)
    assert rows(store) == before


def test_its_dense_model_still_computes_the_same(store: Store) -> None:
    """A task of it that runs again agrees with its row in all that comes before retraining, to rounding."""
    from orchestrator.rerun import BEFORE_RETRAINING, find_row, rerun

    row = find_row(store, DONE[2, 1])
    before = tree(Path(store.root))
    now = rerun(store, row, "data", "none").now
    assert tree(Path(store.root)) == before
    assert now.diverged is False and now.best_test_accuracy == pytest.approx(row.best_test_accuracy, abs=0.05)
    for name in BEFORE_RETRAINING - {*LATER, "schema_version"}:
        then = getattr(row, name)
        expected = pytest.approx(then, rel=1e-4, abs=1e-9) if isinstance(then, float) else then
        assert getattr(now, name) == expected, name


# -- columns that were not there yet ------------------------------------------------------------------


def without(store: Store, columns: list[str]) -> None:
    """Rewrite every row file as one that lacks these columns."""
    for name in store.row_file_names():
        path = Path(store.root, name)
        pq.write_table(pq.read_table(path).drop_columns(columns), path)


@pytest.mark.parametrize("column", [name for name in SCHEMA.names if name not in REQUIRED and name not in LATER])
def test_a_file_without_a_column_has_nulls_there(store: Store, column: str) -> None:
    """Columns are only ever added, so any but the required ones may be missing: it is null, the others as ever."""
    table, _ = store.row_files()
    without(store, [column])
    found, problems = store.row_files()
    assert problems == [] and found.schema == table.schema
    assert found[column].null_count == len(found)
    order = [(name, "ascending") for name in ("task_id", "file")]
    assert found.sort_by(order).drop_columns([column]).equals(table.sort_by(order).drop_columns([column]))


def test_the_least_a_file_has(store: Store) -> None:
    """With the required columns alone a store still counts, and resumes what is left; without one of them a file
    is none of ours."""
    nullable = [name for name in SCHEMA.names if name not in REQUIRED and name not in LATER]
    without(store, nullable)
    assert store.row_files()[1] == [] and len(store.row_files()[0]) == 8
    assert store.statuses() == dict.fromkeys(DONE.values(), "done") | {FAILED: "failed"}
    assert plan_of_sweep(store, store.newest("old")).unfinished == 2
    assert store.sql("select count(*), count(pruned_train_loss) from candidates").fetchall() == [(3, 0)]
    without(store, ["status"])
    table, problems = store.row_files()
    assert len(table) == 0 and {problem.reason for problem in problems} == {"no column status"}


def test_a_column_of_a_later_schema_is_left_out(store: Store) -> None:
    """A newer prunesweep may have written to the store as well: what it added is not read, what we know is."""
    before = rows(store)
    for name in store.row_file_names():
        path = Path(store.root, name)
        table = pq.read_table(path)
        pq.write_table(table.append_column("rewind", pa.nulls(len(table), pa.float64())), path)
    assert rows(store) == before and store.row_files()[1] == []
