"""DuckDB over a store: the views, the statistics as SQL functions, and a read-only way in.

The database is shut before it is fed with Arrow tables: external access off, configuration locked.
That alone does not stop COPY, ATTACH or DROP, so DuckDB's own parser must call a query one SELECT.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling
from duckdb.sqltypes import DOUBLE

from storage import statistics
from storage.encoding import repeated
from storage.errors import QueryError
from storage.manifest import PLAN_SCHEMA
from storage.rowfiles import ROW_FILES_SCHEMA, Problem, chosen
from storage.schema import COLUMNS, SCHEMA

if TYPE_CHECKING:
    from storage.store import Store

PLAN_TABLE_SCHEMA = PLAN_SCHEMA.append(pa.field("sweep", pa.string())).append(pa.field("expanded_at", pa.string()))
TABLES = {"row_files": ROW_FILES_SCHEMA.append(pa.field("chosen", pa.bool_())), "plan": PLAN_TABLE_SCHEMA}
EVERY_COLUMN = frozenset(name for schema in TABLES.values() for name in schema.names)
VIEWS = ("attempts", "rows", "tasks", "candidates", "cells", "sweeps", "failures")

# No quote and no comment among the options: what follows here is what DuckDB explains.
_EXPLAIN = re.compile(r"\s*explain\s*(?:analyze\b|\((?:\s|,|analyze|format\s+\w+)*\))?", re.IGNORECASE)


def plan_table(store: Store, columns: Container[str] = EVERY_COLUMN) -> pa.Table:
    """Every sweep's newest expansion, one line per planned task, all columns or some."""
    names = [name for name in PLAN_TABLE_SCHEMA.names if name in columns]
    tables = []
    for manifest in store.manifests():
        table = store.plan_table(manifest, [name for name in names if name in PLAN_SCHEMA.names] or ["task_id"])
        for name in ("sweep", "expanded_at"):
            table = table.append_column(name, repeated(getattr(manifest, name), len(table)))
        tables.append(table.select(names))
    return pa.concat_tables(tables).combine_chunks() if tables else pa.Table.from_batches([], PLAN_TABLE_SCHEMA)


class Views:
    """A connection with the store's views, whose tables are read as far as queries need their columns.

    A column that was not read is null. `report` is told once of every file in rows/ that is none of ours.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, store: Store, report: Callable[[Problem], None] | None) -> None:
        self.con, self._store, self._report = con, store, report
        self._columns: set[str] = set()
        self._reported: set[Problem] = set()
        for name, schema in TABLES.items():
            con.register(name, pa.Table.from_batches([], schema))

    def ask(self, query: str, expected: Iterable[str] = ()) -> pa.Table:
        """The answer to one SELECT. Raises duckdb.Error.

        Read is what DuckDB's plan of it scans, or what is `expected` to be scanned, and more until the plan over what
        was read scans nothing else.
        """
        if not (expected and self._columns.issuperset(expected)):
            self.read(expected or self._scanned(query))
        while not (scanned := self._scanned(query)) <= self._columns:
            self.read(scanned)
        return self.con.sql(query).to_arrow_table()

    def read(self, columns: Iterable[str] = EVERY_COLUMN) -> None:
        """Read these columns too, wherever they are."""
        self._columns |= set(columns)
        wanted = self._columns | {"task_id", "status", "finished_at"}
        row_files, problems = self._store.row_files([name for name in SCHEMA.names if name in wanted])
        row_files = row_files.append_column("chosen", chosen(row_files))
        plan = plan_table(self._store, self._columns)
        for name, table in (("row_files", row_files), ("plan", plan)):
            self.con.register(name, _with_nulls(table, TABLES[name]))
        for problem in problems:
            if self._report and problem not in self._reported:
                self._report(problem)
        self._reported.update(problems)

    def _scanned(self, query: str) -> set[str]:
        """The columns of row_files and plan that a query scans; every one for an EXPLAIN, which is not explained."""
        try:
            (_, plan), *_ = self.con.execute(f"explain (format json) {query}").fetchall()
        except duckdb.ParserException:
            return set(EVERY_COLUMN)
        scanned: set[str] = set()
        nodes = json.loads(plan)
        while nodes:
            node = nodes.pop()
            nodes += node["children"]
            if node["name"].strip() == "PYTHON_ARROW_SCAN":
                found = node["extra_info"].get("Projections", EVERY_COLUMN)
                scanned |= {found} if isinstance(found, str) else set(found)
        return scanned


def _with_nulls(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema` that it lacks; those of one type share their memory."""
    given = dict(zip(table.column_names, table.columns, strict=True))
    nulls = {kind: pa.nulls(len(table), kind) for kind in {f.type for f in schema if f.name not in given}}
    columns = [given.get(f.name, nulls.get(f.type)) for f in schema]
    return pa.Table.from_arrays(columns, names=schema.names)


@contextmanager
def views(store: Store, report: Callable[[Problem], None] | None = None) -> Iterator[Views]:
    """The store's views, closed at the end."""
    con = _database(os.getpid()).cursor()
    try:
        yield Views(con, store, report)
    finally:
        con.close()


@contextmanager
def connection(store: Store, report: Callable[[Problem], None] | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the store's views over all that is there, closed at the end.

    `report` is told of every file in rows/ that is none of ours.
    """
    with views(store, report) as found:
        found.read()
        yield found.con


@cache
def _database(_: int) -> duckdb.DuckDBPyConnection:
    """The views and functions without data, locked; one per process, by its id, since to make it takes 30 ms.

    What a cursor of it registers is seen by that cursor alone.
    """
    con = duckdb.connect()
    for name, schema in TABLES.items():
        con.register(name, pa.Table.from_batches([], schema))
    con.execute(Path(__file__).with_name("views.sql").read_text(encoding="utf-8"))
    doubles = duckdb.list_type(DOUBLE)
    special = FunctionNullHandling.SPECIAL
    for name in ("kendall", "spearman", "pearson"):
        for suffix, which in (("", 0), ("_p", 1)):
            function = _nullable(getattr(statistics, name), which)
            con.create_function(f"{name}{suffix}", function, [doubles, doubles], DOUBLE, null_handling=special)
    for setting in ("enable_external_access", "python_enable_replacements"):
        con.execute(f"set {setting} = false")
    con.execute("set lock_configuration = true")
    atexit.register(con.close)  # one with Python functions in it must be
    return con


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
    with views(store, report) as found:
        check_select(found.con, query)
        try:
            table = found.ask(query)
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
