"""DuckDB over a store: the views, the statistics as SQL functions, and a read-only way in.

The connection is fed with Arrow tables and then shut: external access off, configuration locked.
That alone does not stop COPY, ATTACH or DROP, so DuckDB's own parser must call a query one SELECT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling
from duckdb.sqltypes import DOUBLE

from storage import statistics
from storage.errors import QueryError
from storage.manifest import PLAN_SCHEMA
from storage.schema import COLUMNS

if TYPE_CHECKING:
    from storage.store import Problem, Store

PLAN_TABLE_SCHEMA = PLAN_SCHEMA.append(pa.field("sweep", pa.string())).append(pa.field("expanded_at", pa.string()))
VIEWS = ("attempts", "rows", "tasks", "candidates", "cells", "sweeps", "failures")

# No quote and no comment among the options: what follows here is what DuckDB explains.
_EXPLAIN = re.compile(r"\s*explain\s*(?:analyze\b|\((?:\s|,|analyze|format\s+\w+)*\))?", re.IGNORECASE)


def plan_table(store: Store, sweep: str | None = None) -> pa.Table:
    """Every sweep's newest expansion (or one sweep's), one line per planned task."""
    tables = [PLAN_TABLE_SCHEMA.empty_table()]
    for manifest in store.manifests():
        if sweep in (None, manifest.sweep):
            table = store.plan_table(manifest)
            for name in ("sweep", "expanded_at"):
                value = pa.array([getattr(manifest, name)] * len(table), pa.string())
                table = table.append_column(name, value)
            tables.append(table)
    return pa.concat_tables(tables)


@contextmanager
def connection(store: Store, report: Callable[[Problem], None] | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the store's views, closed at the end: one with Python functions in it must be.

    `report` is told of every file in rows/ that is none of ours or cannot be read.
    """
    row_files, problems = store.row_files()
    for problem in problems:
        if report:
            report(problem)
    con = duckdb.connect()
    try:
        con.register("row_files", row_files)
        con.register("plan", plan_table(store))
        con.execute(files("storage").joinpath("views.sql").read_text())
        _add_functions(con)
        for setting in (
            "enable_external_access = false",
            "python_enable_replacements = false",
            "lock_configuration = true",
        ):
            con.execute(f"set {setting}")
        yield con
    finally:
        con.close()


def _add_functions(con: duckdb.DuckDBPyConnection) -> None:
    doubles = duckdb.list_type(DOUBLE)
    special = FunctionNullHandling.SPECIAL
    for name in ("kendall", "spearman", "pearson"):
        for suffix, which in (("", 0), ("_p", 1)):
            function = _nullable(getattr(statistics, name), which)
            con.create_function(f"{name}{suffix}", function, [doubles, doubles], DOUBLE, null_handling=special)


def _nullable(test: Callable[[Any, Any], tuple[float, float]], which: int) -> Callable[[Any, Any], float | None]:
    """`test` for SQL: null in, null out, and null where it is not defined."""

    def function(x: list[float] | None, y: list[float] | None) -> float | None:
        if x is None or y is None:
            return None
        value = test(x, y)[which]
        return None if value != value else value

    return function


def check_select(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raise QueryError unless DuckDB's parser calls `query` one SELECT, or an EXPLAIN of one."""
    try:
        statements = con.extract_statements(query)
    except duckdb.Error as error:
        raise QueryError(str(error)) from error
    kinds = [statement.type.name for statement in statements]
    if kinds == ["EXPLAIN"]:
        explained = _EXPLAIN.sub("", statements[0].query, count=1)
        try:
            kinds = [statement.type.name for statement in con.extract_statements(explained)]
        except duckdb.Error as error:
            raise QueryError("explain takes a plain SELECT here") from error
    if kinds != ["SELECT"]:
        found = ", ".join(kinds) or "nothing"
        raise QueryError(f"a query is exactly one SELECT (or EXPLAIN of one); this is {found}")


def run_query(store: Store, query: str, report: Callable[[Problem], None] | None = None) -> pa.Table:
    """One SELECT over the store's views, fetched whole. Raises QueryError."""
    with connection(store, report) as con:
        check_select(con, query)
        try:
            table = con.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(str(error)) from error
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise QueryError(f"two columns are named {twice[0]}: give one another name with `as`")
    return table


def quoted(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def column_names() -> list[str]:
    """The columns of a row, for messages."""
    return [name for group in COLUMNS.values() for name in group]
