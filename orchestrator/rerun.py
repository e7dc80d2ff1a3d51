"""One task again, with the execution its row recorded, and how what it gives compares with the row."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from storage.phases import Report, silent
from storage.records import Execution, Row
from storage.schema import COLUMNS, PROVENANCE, SCHEMA, rows_to_table, table_to_rows

if TYPE_CHECKING:
    from storage.store import Store

BEFORE_RETRAINING = frozenset(
    name for group in ("identity", "size", "before retraining", "criterion scores") for name in COLUMNS[group]
)
LIMIT = 1e-9
NEAR = 1e-5
"""With another execution the columns before retraining agree to rounding: this, relatively, in float32;
LIMIT where the number is a rounding error itself."""


@dataclass(frozen=True)
class Rerun:
    """A task run again: its rows then and now, the columns that differ, what differs in the execution, and
    the content of the network's file."""

    then: Row
    now: Row
    differing: tuple[str, ...]
    execution: dict[str, tuple[Any, Any]]
    network: bytes | None

    @property
    def same(self) -> bool:
        """Equal bit for bit; or, with another execution or one that is not deterministic, what comes before
        retraining is, to rounding."""
        if not self.execution and Execution.from_json(str(self.then.execution)).deterministic:
            return not self.differing
        return all(_near(getattr(self.then, c), getattr(self.now, c)) for c in self.differing if c in BEFORE_RETRAINING)


def find_row(store: Store, task_id: str, data_root: str | None = None) -> Row:
    """The row, status done, of the one task whose id begins so. Raises UserError, with what to type instead."""
    from storage.sql import connection, quoted

    with connection(store) as con:
        query = f"select * from rows where starts_with(task_id, {quoted(task_id)}) limit 2"
        found = table_to_rows(con.sql(query).to_arrow_table().cast(SCHEMA))
    if not found:
        raise UserError(f"no task {task_id} has a row in {store.location}: see the view `rows` with `prunesweep query`")
    if len(found) > 1:
        raise UserError(f"several tasks begin with {task_id}: give more of the id, as {found[0].task_id}")
    (row,) = found
    if row.task().cell.dense.is_imported:
        raise UserError(f"task {row.task_id} was imported from a log ({row.versions}): it cannot be run here")
    if row.status != "done":
        raise UserError(
            f"task {row.task_id} failed ({row.error_class}): it has no measurements to compare with."
            f"{_instead(store, row, data_root)}"
        )
    return row


def _instead(store: Store, row: Row, data_root: str | None, *, edited: bool = False) -> str:
    """What to type to run a row's task as its sweep plans it now, or that no sweep does. After an edit of the user's
    code (`edited`) the sweep is planned again."""
    from orchestrator.advice import Given, next_command
    from orchestrator.plan import is_in

    given = Given((), ("--store", store.location, *(("--data-root", data_root) if data_root else ())))
    for manifest in store.manifests():
        if is_in(store.plan_table(manifest, ["task_id"])["task_id"], [row.task_id]).any():
            command = given.run(store, manifest) if edited else next_command(store, manifest, given)
            return f" To run what {manifest.sweep} has unfinished:\n  {command}"
    return " No sweep plans it any more: its sweep was planned again, or removed."


def rerun(store: Store, row: Row, data_root: str, keep: str, report: Report = silent) -> Rerun:
    """Run a row's task again in this process. Writes no row; `keep` (last, best or none) says which network to return;
    `report` gets the phases.

    Raises UserError where its dense weights are not those of the row, or this device lacks the precision,
    or data or code are not what they were.
    """
    from orchestrator.dropped import contents

    report("importing the libraries")
    from workers.datasets import Changed, DataMissing
    from workers.task import run_and_return
    from workers.worker import DenseMissing, PrecisionMissing, Worker

    task, recorded = row.task(), Execution.from_json(str(row.execution))
    worker = Worker(store, data_root, task.cell.precision, cpu=row.device == "cpu", fixed=recorded)
    worker.phase = report
    report("loading the dense model")
    try:
        if worker.dense(task.cell.dense).sha256 != row.dense_sha256:
            raise UserError(f"task {row.task_id} was pruned from other dense weights than the store has now")
        ((now, network),) = run_and_return([task], worker, keep=keep, attempts=[1])
    except (DenseMissing, PrecisionMissing, DataMissing, Changed) as error:
        why = str(error) or "its dense weights are gone"
        again = _instead(store, row, data_root, edited=True) if isinstance(error, Changed) else ""
        raise UserError(f"task {row.task_id} cannot be run here: {why}.{again}") from error
    except Exception as error:
        if not (own := contents([task.cell])):
            raise
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"task {row.task_id} failed here in code that uses {', '.join(own)}: {what}") from error
    (now,) = table_to_rows(rows_to_table([now]))  # curves are rounded to float32 on their way into a file
    columns = [name for name in SCHEMA.names if name not in PROVENANCE and name != "schema_version"]
    older = row.schema_version < now.schema_version  # then it lacks columns
    pairs = {name: (getattr(row, name), getattr(now, name)) for name in columns}
    differing = tuple(n for n, (then, today) in pairs.items() if not (_equal(then, today) or (older and then is None)))
    then, today = json.loads(recorded.json), json.loads(str(now.execution))
    keys = dict.fromkeys([*then, *today])  # some are left out where they are as usual
    changed = {key: (then.get(key), today.get(key)) for key in keys if then.get(key) != today.get(key)}
    return Rerun(row, now, differing, changed, network)


def _equal(a: Any, b: Any) -> bool:
    """Equality in which NaN equals itself."""
    return a == b or (a != a and b != b)


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return _equal(a, b) or math.isclose(a, b, rel_tol=NEAR, abs_tol=LIMIT)
    return _equal(a, b)
