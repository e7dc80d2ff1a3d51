"""The row's columns are pinned, and rows survive Parquet."""

import io
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from storage.records import Removed, Row, Task
from storage.schema import COLUMNS, PROVENANCE, REQUIRED, SCHEMA, conform, rows_to_table, table_to_rows
from tests.rows import NOON, ORACLE, any_rows, done, failed

# Columns are only ever added, at the end of their group, and are nullable.
GOLDEN = [
    ("task_id", "string"),
    ("cell_id", "string"),
    ("candidate_id", "string"),
    ("schema_version", "int32"),
    ("model", "string"),
    ("dataset", "string"),
    ("dense_id", "string"),
    ("dense_sha256", "string"),
    ("granularity", "string"),
    ("layers", "list<item: string>"),
    ("ratios", "list<item: double>"),
    ("pruning_ratio", "double"),
    ("pruner", "string"),
    ("propagation", "string"),
    ("schedule", "string"),
    ("precision", "string"),
    ("recipe_id", "string"),
    ("recipe", "string"),
    ("candidate", "int64"),
    ("removed", "list<item: struct<layer: string, units: list<item: int32>>>"),
    ("seed", "int64"),
    ("scope", "string"),
    ("params", "int64"),
    ("macs", "int64"),
    ("dense_params", "int64"),
    ("dense_macs", "int64"),
    ("achieved_ratio", "double"),
    ("mask_sha256", "string"),
    ("dense_train_loss", "double"),
    ("dense_test_loss", "double"),
    ("dense_test_accuracy", "double"),
    ("pruned_train_loss", "double"),
    ("pruned_train_loss_se", "double"),
    ("pruned_train_loss_n", "int64"),
    ("pruned_test_loss", "double"),
    ("pruned_test_accuracy", "double"),
    ("equivalence_error", "double"),
    ("equivalence_reason", "string"),
    ("best_epoch", "int32"),
    ("best_test_accuracy", "double"),
    ("best_test_loss", "double"),
    ("last_train_loss", "double"),
    ("last_test_loss", "double"),
    ("last_test_accuracy", "double"),
    ("last5_test_loss_mean", "double"),
    ("last5_test_loss_std", "double"),
    ("last5_test_accuracy_mean", "double"),
    ("last5_test_accuracy_std", "double"),
    ("val_best_epoch", "int32"),
    ("val_best_val_accuracy", "double"),
    ("val_best_test_accuracy", "double"),
    ("val_best_test_loss", "double"),
    ("epoch_train_loss", "list<item: float>"),
    ("epoch_test_loss", "list<item: float>"),
    ("epoch_test_accuracy", "list<item: float>"),
    ("epoch_val_accuracy", "list<item: float>"),
    ("score_l1", "double"),
    ("score_l2", "double"),
    ("score_taylor", "double"),
    ("score_hessian", "double"),
    ("score_fpgm", "double"),
    ("score_lamp", "double"),
    ("score_bn_scale", "double"),
    ("score_activation", "double"),
    ("score_extra", "map<string, double>"),
    ("status", "string"),
    ("error_class", "string"),
    ("error", "string"),
    ("attempt", "int32"),
    ("diverged", "bool"),
    ("execution", "string"),
    ("device", "string"),
    ("host", "string"),
    ("seconds_prune", "double"),
    ("seconds_retrain", "double"),
    ("peak_memory_bytes", "int64"),
    ("versions", "string"),
    ("kept_network", "string"),
    ("skipped_samples", "int64"),
    ("started_at", "timestamp[us]"),
    ("finished_at", "timestamp[us]"),
]


def _through_parquet(rows: list[Row]) -> list[Row]:
    buffer = io.BytesIO()
    pq.write_table(rows_to_table(rows), buffer, compression="zstd")
    return table_to_rows(conform(pq.read_table(io.BytesIO(buffer.getvalue()))))


def test_golden_schema() -> None:
    """A column is never renamed, retyped, reordered or dropped, and is nullable."""
    assert [(field.name, str(field.type)) for field in SCHEMA] == GOLDEN
    assert all(field.nullable for field in SCHEMA)


def test_a_row_has_exactly_the_columns() -> None:
    """Row and SCHEMA cannot drift apart."""
    assert {field.name for field in fields(Row)} == set(SCHEMA.names)
    assert len(set(SCHEMA.names)) == len(SCHEMA.names)


def test_every_column_says_what_it_is() -> None:
    """Every column carries its meaning, and none is called final."""
    meanings = {name: meaning for group in COLUMNS.values() for name, (_, meaning) in group.items()}
    assert all(meanings.values())
    assert not [name for name in meanings if "final" in name]
    assert {"status", "host", "seconds_retrain", "finished_at"} <= PROVENANCE
    assert not PROVENANCE & {"best_test_accuracy", "pruned_train_loss", "removed", *REQUIRED[:-1]}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_rows())
def test_rows_survive_parquet(row: Row) -> None:
    """What a worker commits is what a reader gets, bit for bit (compared by repr, where NaN is NaN)."""
    assert repr(_through_parquet([row])) == repr([row])


def test_rows_of_every_shape_survive_together() -> None:
    """Nulls, empty and full lists of one column live in one file, and none turns into another."""
    task = Task(ORACLE, 0, 0)
    removed = (Removed("conv1", (0, 3)), Removed("conv3", ()))
    rows = [
        failed(task),
        done(task, removed=(), epoch_test_loss=(), score_extra=()),
        done(task, removed=removed, epoch_test_loss=(0.5, None), score_extra=(("fpgm", 1.5),), finished_at=NOON),
    ]
    again = _through_parquet(rows)
    assert again == rows
    assert [row.removed for row in again] == [None, (), removed]


def test_curves_are_float32() -> None:
    """A curve keeps float32 precision and the columns beside it keep float64."""
    (row,) = _through_parquet([done(Task(ORACLE, 0, 0), epoch_test_loss=(0.1,), best_test_loss=0.1)])
    assert row.best_test_loss == 0.1
    assert row.epoch_test_loss == (pytest.approx(0.1, rel=1e-7),)
    assert row.epoch_test_loss != (0.1,)


def test_conform_fills_missing_columns_with_null() -> None:
    """A file of an older schema is read: what it lacks is null."""
    table = rows_to_table([done(Task(ORACLE, 0, 0), score_l2=1.0)]).drop_columns(["score_l2", "removed", "score_extra"])
    found = conform(table)
    assert found.schema == SCHEMA
    assert [found[name].to_pylist() for name in ("score_l2", "removed", "score_extra")] == [[None]] * 3
    assert found["task_id"].to_pylist() == [Task(ORACLE, 0, 0).task_id]


def test_conform_drops_columns_beyond_the_schema() -> None:
    """A file of a newer schema is read: what is not known here is left out, in any order of columns."""
    table = rows_to_table([done(Task(ORACLE, 0, 0))])
    newer = table.add_column(0, "rewind", pa.array([7])).select(["rewind", *reversed(SCHEMA.names)])
    assert conform(newer).equals(table)


@pytest.mark.parametrize("name", REQUIRED)
def test_conform_refuses_a_table_without_a_required_column(name: str) -> None:
    """A foreign file is told from an old one by what every row must have."""
    table = rows_to_table([done(Task(ORACLE, 0, 0))])
    with pytest.raises(ValueError, match=f"no column {name}$"):
        conform(table.drop_columns([name]))


def test_conform_refuses_columns_of_another_type() -> None:
    """A file whose columns only share our names is foreign."""
    table = rows_to_table([done(Task(ORACLE, 0, 0))])
    at = SCHEMA.names.index("seed")
    for wrong in (pa.array(["zero"]), pa.array([[1]])):
        with pytest.raises(ValueError, match="seed"):
            conform(table.set_column(at, "seed", wrong))


def test_conform_refuses_a_column_that_is_there_twice() -> None:
    """A table with two columns of one name is foreign, not a crash."""
    table = rows_to_table([done(Task(ORACLE, 0, 0))])
    with pytest.raises(ValueError, match="seed"):
        conform(table.append_column("seed", table["seed"]))


def test_any_traceback_can_be_stored() -> None:
    """A failed row is always writable, whatever bytes its error message came from."""
    (row,) = _through_parquet([failed(Task(ORACLE, 0, 0), error="no file 'caf\udce9\x00'")])
    assert row.error == "no file 'caf\\udce9\x00'"
