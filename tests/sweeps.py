"""What tests of whole sweeps share: their rows, what was committed, and what must be true after a fault."""

from __future__ import annotations

from pathlib import Path

from orchestrator.plan import plan_of_sweep
from storage.records import Row
from storage.schema import PROVENANCE, SCHEMA, table_to_rows
from storage.store import Store

COLUMNS = [name for name in SCHEMA.names if name not in PROVENANCE] + ["execution"]
"""What two rows of a task with equal execution must have in common, bit for bit."""


def rows(store: Store, status: str = "done") -> dict[str, Row]:
    """task id -> its row of this status."""
    table = store.sql(f"select * from rows where status = '{status}'").to_arrow_table().cast(SCHEMA)
    return {row.task_id: row for row in table_to_rows(table)}


def assert_same(found: dict[str, Row], reference: dict[str, Row]) -> None:
    """The same tasks; equal in every column but provenance, bit for bit, and by the same execution."""
    assert found.keys() == reference.keys()
    for task_id, row in found.items():
        assert {c: getattr(row, c) for c in COLUMNS} == {c: getattr(reference[task_id], c) for c in COLUMNS}


def committed(store: Store) -> set[tuple[str, str]]:
    """Every done row as (task id, the file it was committed in): what no fault may lose."""
    if not store.exists():
        return set()
    table, _ = store.row_files()
    lines = zip(*(table[name].to_pylist() for name in ("task_id", "file", "status")), strict=True)
    return {(task_id, file) for task_id, file, status in lines if status == "done"}


def lose(store: Store, which: slice) -> set[str]:
    """Lose some of the rows, as a disk might; the others are as before, each in a file of its own."""
    table, _ = store.row_files()
    lines = sorted(table_to_rows(table), key=lambda row: row.task_id)
    lost = lines[which]
    for name in store.row_file_names():
        store.delete(name)
    for row in lines:
        if row not in lost:
            store.commit_rows("kept", [row])
    return {row.task_id for row in lost}


def assert_invariants(store: Store, sweep: str, before: set[tuple[str, str]], reference: dict[str, Row]) -> None:
    """After a fault and one resume: every task has one row, which is the undisturbed run's; what was committed
    `before` the resume is there, and was not run again; and nothing is left over."""
    assert_same(rows(store), reference)
    after = committed(store)
    assert before <= after
    already = {task_id for task_id, _ in before}
    assert not {task_id for task_id, _ in after - before} & already
    plan = plan_of_sweep(store, store.newest(sweep))
    assert (plan.statuses["done"], plan.unfinished) == (len(reference), 0)
    assert left_over(store) == []
    assert store.row_files()[1] == []


def left_over(store: Store) -> list[str]:
    """Temporary files, signs of life, wishes to stop and checkpoints: after a run there are none."""
    root = Path(store.root)
    folders = [root / "scratch" / name for name in ("drivers", "workers", "stops", "checkpoints")]
    found = [*root.rglob(".*"), *(path for folder in folders for path in folder.glob("*"))]
    return sorted(str(path.relative_to(root)) for path in found)
