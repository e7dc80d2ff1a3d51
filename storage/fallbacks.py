"""Tasks that a fault sent to a slower back-end, from the rows of a sweep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.records import Cell, Execution, titles
from storage.sql import quoted, views

if TYPE_CHECKING:
    from storage.store import Store

_MARK = '"fallback":'
_ROWS = """select execution, cell_id, count(*) as tasks from tasks
    where sweep = {sweep} and status = 'done' and contains(execution, {mark})
    group by execution, cell_id order by min(position)"""
_CELLS = "select any_value(recipe) as recipe from plan where sweep = {sweep} group by cell_id order by min(position)"
_SCANNED = ("sweep", "position", "task_id", "cell_id", "status", "chosen", "execution")


@dataclass(frozen=True)
class Fallback:
    """Tasks whose execution has one `fallback`: the reason, the back-end that ran them, their number and the titles of
    their cells in the order of the grid."""

    reason: str
    backend: str
    tasks: int
    cells: tuple[str, ...]


def fallbacks(store: Store, sweep: str) -> list[Fallback]:
    """Return the fallbacks of a sweep's done tasks, by reason and back-end. Files that cannot be read are left out."""
    rows, _ = store.row_files(["execution"])
    # A sweep has few executions: to look for one among those is several times faster than the query.
    if not any(_MARK in execution for execution in rows["execution"].unique().to_pylist() if execution):
        return []
    with views(store) as found:
        lines = found.ask(_ROWS.format(sweep=quoted(sweep), mark=quoted(_MARK)), _SCANNED).to_pylist()
        recipes = found.ask(_CELLS.format(sweep=quoted(sweep)))["recipe"].to_pylist()
    named = titles(map(Cell.from_json, recipes))
    tasks: Counter[tuple[str, str]] = Counter()
    cells: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        execution = Execution.from_json(line["execution"])
        key = (str(execution.fallback), execution.backend)
        tasks[key] += line["tasks"]
        cells.setdefault(key, []).append(named[line["cell_id"]])
    return [Fallback(*key, n, tuple(dict.fromkeys(cells[key]))) for key, n in tasks.items()]
