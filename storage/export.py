"""One file to give away: a DuckDB database with the tables and the views, Parquet, or CSV."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import QueryError
from storage.formats import render
from storage.phases import Report, silent
from storage.sql import TABLES, VIEWS_FILE, Views, quoted, views

if TYPE_CHECKING:
    from storage.rowfiles import Problem
    from storage.store import Store

ENDINGS = (".duckdb", ".parquet", ".csv")
CSV_LINES = 5000
"""Lines made into text at a time."""


def export(
    store: Store,
    sweep: str | None,
    path: Path,
    *,
    force: bool = False,
    report: Callable[[Problem], None] | None = None,
    phase: Report = silent,
) -> int:
    """Write what a sweep (or, with None, every task of the store) has to a file, by its ending; how many rows.

    `.duckdb` has the tables and views of storage/views.sql, every attempt among them. `.parquet` and `.csv` have the
    chosen row of each task, in the columns of a row; lists are JSON in CSV. The file is whole or not there.
    Raises QueryError for an unknown sweep or ending, and for a file that is there unless `force`; OSError.
    """
    if path.suffix not in ENDINGS:
        raise QueryError(f"{path.name}: allowed endings are {', '.join(ENDINGS)}")
    if path.exists() and not force:
        raise QueryError(f"{path} is there already: --force replaces it")
    if sweep is not None:
        store.newest(sweep)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with views(store, report) as found:
            found.read()
            phase(f"writing {path}")
            n = _WRITERS[path.suffix](found, sweep, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        for left in (temporary, temporary.with_name(f"{temporary.name}.wal")):
            left.unlink(missing_ok=True)
    return n


_OF_A_SWEEP = "task_id in (select task_id from plan where sweep = {sweep})"


def _rows(found: Views, sweep: str | None) -> pa.Table:
    """The chosen rows, ordered so that equal stores give equal files."""
    where = f"where {_OF_A_SWEEP.format(sweep=quoted(sweep))}" if sweep else ""
    return found.con.sql(f"from rows {where} order by cell_id, candidate, seed").to_arrow_table()


def _duckdb(found: Views, sweep: str | None, path: Path) -> int:
    where = {"row_files": _OF_A_SWEEP, "plan": "sweep = {sweep}"}
    with duckdb.connect(path) as con:
        for name, schema in TABLES.items():
            only = f"where {where[name].format(sweep=quoted(sweep))}" if sweep else ""
            table = found.con.sql(f"from {name} {only}").to_arrow_table().cast(_plain(schema))
            con.register("given", table)
            con.execute(f"create table {name} as from given")
            con.unregister("given")
        con.execute(VIEWS_FILE.read_text(encoding="utf-8"))
        (n,) = con.sql("select count(*) from rows").fetchall()[0]
    return n


def _plain(schema: pa.Schema) -> pa.Schema:
    """`schema` with text where it has dictionaries, which DuckDB would make ENUMs of."""
    dictionary = pa.types.is_dictionary
    return pa.schema([f.with_type(f.type.value_type) if dictionary(f.type) else f for f in schema])


def _parquet(found: Views, sweep: str | None, path: Path) -> int:
    table = _rows(found, sweep)
    pq.write_table(table, path, compression="zstd")
    return len(table)


def _csv(found: Views, sweep: str | None, path: Path) -> int:
    table = _rows(found, sweep)
    with path.open("wb") as file:
        for start in range(0, max(len(table), 1), CSV_LINES):
            lines = render(table[start : start + CSV_LINES], "csv")
            file.write(lines if start == 0 else lines.partition(b"\n")[2])
    return len(table)


_WRITERS: dict[str, Callable[[Views, str | None, Path], int]] = {
    ".duckdb": _duckdb,
    ".parquet": _parquet,
    ".csv": _csv,
}
