"""The pinned Arrow schema of a row, and rows <-> Arrow.

Columns are only ever added, and are nullable. Accuracies are fractions in [0, 1], losses are nats
(mean cross-entropy without label smoothing), times are seconds, `*_at` are UTC without a zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from storage.records import Removed, Row

_REMOVED = pa.list_(pa.struct([("layer", pa.string()), ("units", pa.list_(pa.int32()))]))
_CURVE = pa.list_(pa.float32())

# group -> column -> (type, meaning); pinned by a golden test.
COLUMNS: dict[str, dict[str, tuple[pa.DataType, str]]] = {
    "identity": {
        "task_id": (pa.string(), "cell x candidate x seed"),
        "cell_id": (pa.string(), "the grid point: what one correlation is computed over"),
        "candidate_id": (pa.string(), "cell x candidate"),
        "schema_version": (pa.int32(), "the schema number the row was written with"),
        "model": (pa.string(), "network, by name"),
        "dataset": (pa.string(), "data set, by name"),
        "dense_id": (pa.string(), "the dense model's recipe, hashed"),
        "dense_sha256": (pa.string(), "SHA-256 of the dense weights file"),
        "granularity": (pa.string(), "filter or weight"),
        "layers": (pa.list_(pa.string()), "names of the pruned layers, in network order"),
        "ratios": (pa.list_(pa.float64()), "pruning ratio of each of them"),
        "pruning_ratio": (pa.float64(), "their common ratio; null where they differ"),
        "pruner": (pa.string(), "oracle, or the criterion that chose the candidate"),
        "propagation": (pa.string(), "exact or released"),
        "schedule": (
            pa.string(),
            "one-shot, or iterative-N: N steps of pruning and retraining; what is measured is the last step's",
        ),
        "precision": (pa.string(), "fp32, bf16 or fp16"),
        "recipe_id": (pa.string(), "the retraining recipe, hashed"),
        "recipe": (pa.string(), "the whole cell as JSON: enough to rebuild the task"),
        "candidate": (pa.int64(), "the candidate's number"),
        "removed": (_REMOVED, "the units it removes, by layer, in the dense model's numbers; null with masks"),
        "seed": (pa.int64(), "the retraining replicate: data order and augmentation"),
        "scope": (pa.string(), "local: each layer loses its ratio; global: all layers together do"),
    },
    "size": {
        "params": (pa.int64(), "parameters of the pruned network; with masks, those that are left"),
        "macs": (pa.int64(), "multiply-adds of one forward pass of one sample; with masks, the dense model's"),
        "dense_params": (pa.int64(), "parameters of the dense model"),
        "dense_macs": (pa.int64(), "multiply-adds of the dense model"),
        "achieved_ratio": (pa.float64(), "share of units removed in the pruned layers; of weights, after retraining"),
        "mask_sha256": (
            pa.string(),
            "granularity weight: SHA-256 of the removed weights' places, in place of `removed`",
        ),
    },
    "before retraining": {
        "dense_train_loss": (pa.float64(), "dense model, train set (or the loss subset)"),
        "dense_test_loss": (pa.float64(), "dense model, test set"),
        "dense_test_accuracy": (pa.float64(), "dense model, test set"),
        "pruned_train_loss": (pa.float64(), "pruned network before retraining, eval mode"),
        "pruned_train_loss_se": (pa.float64(), "its standard error; null on the whole train set"),
        "pruned_train_loss_n": (pa.int64(), "samples it was measured on"),
        "pruned_test_loss": (pa.float64(), "pruned network, test set"),
        "pruned_test_accuracy": (pa.float64(), "pruned network, test set"),
        "equivalence_error": (
            pa.float64(),
            "relative difference to the masked dense network; of a later step, to the one before it",
        ),
        "equivalence_reason": (pa.string(), "why there is none"),
    },
    "after retraining": {
        "best_epoch": (pa.int32(), "epoch of the best test accuracy (picked on the test set)"),
        "best_test_accuracy": (pa.float64(), "test accuracy there: the paper's choice, optimistic"),
        "best_test_loss": (pa.float64(), "test loss there"),
        "last_train_loss": (pa.float64(), "last epoch, train set (or the loss subset), eval mode"),
        "last_test_loss": (pa.float64(), "last epoch, test set"),
        "last_test_accuracy": (pa.float64(), "last epoch, test set"),
        "last5_test_loss_mean": (pa.float64(), "mean over the last five epochs"),
        "last5_test_loss_std": (pa.float64(), "population standard deviation over them"),
        "last5_test_accuracy_mean": (pa.float64(), "mean over the last five epochs"),
        "last5_test_accuracy_std": (pa.float64(), "population standard deviation over them"),
        "val_best_epoch": (pa.int32(), "epoch of the best validation accuracy"),
        "val_best_val_accuracy": (pa.float64(), "validation accuracy there"),
        "val_best_test_accuracy": (pa.float64(), "test accuracy there: no selection on the test set"),
        "val_best_test_loss": (pa.float64(), "test loss there"),
        "epoch_train_loss": (_CURVE, "mean minibatch loss of each epoch"),
        "epoch_test_loss": (_CURVE, "test loss after each epoch"),
        "epoch_test_accuracy": (_CURVE, "test accuracy after each epoch"),
        "epoch_val_accuracy": (_CURVE, "validation accuracy after each epoch"),
    },
    "criterion scores": {
        "score_l1": (pa.float64(), "sum of the removed filters' L1 norms, dense network"),
        "score_l2": (pa.float64(), "sum of the removed filters' L2 norms, dense network"),
        "score_taylor": (pa.float64(), "the same of torch-pruning's first-order Taylor importance"),
        "score_hessian": (pa.float64(), "of its second-order importance (OBD)"),
        "score_fpgm": (pa.float64(), "of its distance to the geometric median (FPGM)"),
        "score_lamp": (pa.float64(), "of its layer-adaptive magnitude (LAMP)"),
        "score_bn_scale": (pa.float64(), "of its batch norm scales; null without batch norm"),
        "score_activation": (pa.float64(), "of its mean activations"),
        "score_extra": (pa.map_(pa.string(), pa.float64()), "further criteria by name"),
    },
    "provenance": {
        "status": (pa.string(), "done or failed"),
        "error_class": (pa.string(), "class of the exception"),
        "error": (pa.string(), "its traceback"),
        "attempt": (pa.int32(), "1 for the first try"),
        "diverged": (pa.bool_(), "the loss left the finite numbers: a result, not a failure"),
        "execution": (pa.string(), "back-end, threads, memory format, device, versions, why a slower back-end: JSON"),
        "device": (pa.string(), "where it ran"),
        "host": (pa.string(), "on which machine"),
        "seconds_prune": (pa.float64(), "pruning and measuring"),
        "seconds_retrain": (pa.float64(), "retraining and measuring"),
        "peak_memory_bytes": (pa.int64(), "of the device; on a CPU of the process, since it started"),
        "versions": (pa.string(), "of Python and the libraries: JSON"),
        "kept_network": (pa.string(), "the retrained network's file in the store, if kept"),
        "skipped_samples": (pa.int64(), "samples left out because their files were damaged"),
        "started_at": (pa.timestamp("us"), "UTC"),
        "finished_at": (pa.timestamp("us"), "UTC"),
    },
}

SCHEMA = pa.schema([(name, t) for group in COLUMNS.values() for name, (t, _) in group.items()])
PROVENANCE = frozenset(COLUMNS["provenance"])
"""Columns in which two rows of one task with equal execution may differ."""

STATUSES = ("done", "failed")

REQUIRED = ("task_id", "cell_id", "candidate", "seed", "status")
"""Without these a file is not one of ours."""


def _plain(value: Any) -> Any:
    """A field's value in the form Arrow takes."""
    if isinstance(value, tuple) and value and isinstance(value[0], Removed):
        return [{"layer": r.layer, "units": list(r.units)} for r in value]
    if isinstance(value, str):  # a traceback may quote a file name that is no UTF-8
        return value.encode(errors="backslashreplace").decode()
    return list(value) if isinstance(value, tuple) else value


def rows_to_table(rows: Iterable[Row]) -> pa.Table:
    """`rows` as an Arrow table of the pinned schema."""
    given = list(rows)
    columns = [pa.array([_plain(getattr(row, f.name)) for row in given], f.type) for f in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def table_to_rows(table: pa.Table) -> list[Row]:
    """The rows of a table of the pinned schema (columns beyond it are ignored)."""
    return [_row(record) for record in table.select(SCHEMA.names).to_pylist()]


def _row(record: dict[str, Any]) -> Row:
    removed = record.pop("removed")
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    if removed is not None:
        known["removed"] = tuple(Removed(r["layer"], tuple(r["units"])) for r in removed)
    return Row(**known)


def conform(table: pa.Table, names: Sequence[str] = SCHEMA.names) -> pa.Table:
    """`table` in the pinned schema, or some columns of it, the required ones among them: those it lacks are null,
    those beyond it are dropped.

    Raises ValueError for a table that is not of ours: a required column missing or with nulls, an unknown
    status, or one of our names twice or with values of another type.
    """
    given = dict(zip(table.column_names, table.columns, strict=True))
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}")
    twice = [name for name in names if table.column_names.count(name) > 1] if len(given) < table.num_columns else []
    if twice:
        raise ValueError(f"column {twice[0]} is there twice")
    schema = pa.schema([SCHEMA.field(name) for name in names])
    columns = [_column(given.get(field.name), field, len(table)) for field in schema]
    conformed = pa.Table.from_arrays(columns, schema=schema)
    empty = [name for name in REQUIRED if conformed[name].null_count]
    if empty:
        raise ValueError(f"column {empty[0]} has nulls")
    unknown = set(conformed["status"].unique().to_pylist()) - set(STATUSES)
    if unknown:
        raise ValueError(f"status {unknown.pop()!r} is neither {' nor '.join(STATUSES)}")
    return conformed


def _column(column: pa.ChunkedArray | None, field: pa.Field, n: int) -> pa.ChunkedArray | pa.Array:
    if column is None:
        return pa.nulls(n, field.type)
    try:
        return column if column.type == field.type else column.cast(field.type)
    except pa.ArrowException as error:
        raise ValueError(f"column {field.name}: {error}") from error
