"""DuckDB over a store: the views, the statistics as SQL functions, and a read-only way in.

The database is shut before it is fed with Arrow tables: external access off, configuration locked.
That alone does not stop COPY, ATTACH or DROP, so DuckDB's own parser must call a query one SELECT.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling
from duckdb.sqltypes import DOUBLE

from storage import statistics
from storage.encoding import repeated
from storage.errors import DamagedError, QueryError
from storage.manifest import PLAN_SCHEMA
from storage.printable import is_utf8, printable
from storage.rowfiles import ROW_FILES_SCHEMA, Problem, chosen, warn_skipped
from storage.schema import COLUMNS, SCHEMA
from storage.statistics.p_values import p_of

if TYPE_CHECKING:
    from storage.store import Store

PLAN_TABLE_SCHEMA = PLAN_SCHEMA.append(pa.field("sweep", pa.string())).append(pa.field("expanded_at", pa.string()))
TABLES = {"row_files": ROW_FILES_SCHEMA.append(pa.field("chosen", pa.bool_())), "plan": PLAN_TABLE_SCHEMA}
EVERY_COLUMN = frozenset(name for schema in TABLES.values() for name in schema.names)
VIEWS = ("attempts", "rows", "tasks", "candidates", "cells", "sweeps", "failures", "criteria", "curves", "cost")
FUNCTIONS = (
    *(f"{name}{suffix}" for name in ("kendall", "spearman", "pearson") for suffix in ("", "_p")),
    "kendall_ci",
    "anomaly_ratio",
    "anomaly_ratio_loss",
)
"""Of two lists, x and y, in SQL."""

VIEWS_FILE = Path(__file__).with_name("views.sql")

# No quote and no comment among the options: what follows here is what DuckDB explains.
_EXPLAIN = re.compile(r"\s*explain\s*(?:analyze\b|\((?:\s|,|analyze|format\s+\w+)*\))?", re.IGNORECASE)


def plan_table(
    store: Store, columns: Container[str] = EVERY_COLUMN, report: Callable[[Problem], None] = warn_skipped
) -> pa.Table:
    """Every sweep's newest expansion, one line per planned task, all columns or some. A damaged one is left out, and
    `report` is called with it."""
    names = [name for name in PLAN_TABLE_SCHEMA.names if name in columns]
    tables = []
    for sweep in store.sweeps():
        try:
            manifest = store.current(sweep)
            if manifest is None:  # it was removed meanwhile
                continue
            table = store.plan_table(manifest, [name for name in names if name in PLAN_SCHEMA.names] or ["task_id"])
        except DamagedError as error:
            report(Problem(error.file, error.reason))
            continue
        for name in ("sweep", "expanded_at"):
            table = table.append_column(name, repeated(getattr(manifest, name), len(table)))
        tables.append(table.select(names))
    return pa.concat_tables(tables).combine_chunks() if tables else pa.Table.from_batches([], PLAN_TABLE_SCHEMA)


class Views:
    """A connection with the store's views, whose tables are read as far as queries need their columns.

    A column that was not read is null. `report` is called once with every file that is left out; without it that is
    a warning, SkippedFile.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, store: Store, report: Callable[[Problem], None] | None) -> None:
        self.con, self._store, self._report = con, store, report or warn_skipped
        self._columns: set[str] = set()
        self._reported: set[Problem] = set()
        for name, schema in TABLES.items():
            con.register(name, pa.Table.from_batches([], schema))

    def ask(self, query: str, expected: Iterable[str] = (), parameters: Mapping[str, Any] | None = None) -> pa.Table:
        """The answer to one SELECT, with the values of its `$name`s. Raises duckdb.Error.

        Read is what DuckDB's plan of it scans, or what is `expected` to be scanned, and more until the plan over what
        was read scans nothing else.
        """
        if not is_utf8(query):
            raise QueryError("the query, or a name in it, is not text in UTF-8")
        try:
            if not (expected and self._columns.issuperset(expected)):
                self.read(expected or self._scanned(query, parameters))
            while not (scanned := self._scanned(query, parameters)) <= self._columns:
                self.read(scanned)
        except duckdb.Error:
            self.con.execute(query, parameters)  # which says the same of the query as it was given
            raise
        return self.con.sql(query, params=dict(parameters or {})).to_arrow_table()

    def read(self, columns: Iterable[str] = EVERY_COLUMN) -> None:
        """Read these columns too, wherever they are."""
        self._columns |= set(columns)
        wanted = self._columns | {"task_id", "status", "finished_at"}
        row_files, problems = self._store.row_files([name for name in SCHEMA.names if name in wanted])
        row_files = row_files.append_column("chosen", chosen(row_files))
        plan = plan_table(self._store, self._columns, problems.append)
        for name, table in (("row_files", row_files), ("plan", plan)):
            self.con.register(name, _with_nulls(table, TABLES[name]))
        for problem in problems:
            if problem not in self._reported:
                self._report(problem)
        self._reported.update(problems)

    def _scanned(self, query: str, parameters: Mapping[str, Any] | None = None) -> set[str]:
        """The columns of row_files and plan that a query scans; every one for an EXPLAIN, which is not explained."""
        try:
            (_, plan), *_ = self.con.execute(f"explain (format json) {query}", parameters).fetchall()
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
def views(store: Store, report: Callable[[Problem], None] | None = None, memory: int | None = None) -> Iterator[Views]:
    """The store's views, closed at the end. DuckDB takes at most `memory` bytes, or four fifths of the machine's."""
    con = _database(os.getpid(), memory).cursor()
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
def _database(_: int, memory: int | None) -> duckdb.DuckDBPyConnection:
    """The views and functions without data, locked; one per process (by its id) and limit: to make it takes 30 ms.

    What a cursor of it registers is seen by that cursor alone.
    """
    con = duckdb.connect()
    for name, schema in TABLES.items():
        con.register(name, pa.Table.from_batches([], schema))
    con.execute(VIEWS_FILE.read_text(encoding="utf-8"))
    _add_functions(con)
    con.execute("set temp_directory = ''")  # a query writes nothing: not even what memory has no room for
    if memory is not None:
        con.execute(f"set memory_limit = '{memory}B'")
    _lock(con)
    atexit.register(con.close)  # one with Python functions in it must be
    return con


def _lock(con: duckdb.DuckDBPyConnection) -> None:
    """Shut a database off from files, the network and Python's variables, for good."""
    for setting in ("enable_external_access", "python_enable_replacements"):
        con.execute(f"set {setting} = false")
    con.execute("set lock_configuration = true")


def locked_relation(table: pa.Table) -> duckdb.DuckDBPyRelation:
    """A table as a relation, which keeps its locked connection and can be queried further."""
    con = duckdb.connect()
    con.execute("set temp_directory = ''")
    _lock(con)
    return con.from_arrow(table)


def _add_functions(con: duckdb.DuckDBPyConnection) -> None:
    """The statistics of two lists: null where a list is null, and where they are not defined."""
    doubles: list[Any] = [duckdb.list_type(DOUBLE)] * 2
    interval = duckdb.struct_type({"low": DOUBLE, "high": DOUBLE})
    functions: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
        "anomaly_ratio": (statistics.anomaly_ratio, DOUBLE),
        "anomaly_ratio_loss": (partial(statistics.anomaly_ratio, higher=False), DOUBLE),
        "kendall_ci": (_kendall_ci, interval),
    }
    for name in ("kendall", "spearman", "pearson"):
        functions[name] = (_statistic(getattr(statistics, name)), DOUBLE)
        functions[f"{name}_p"] = (partial(p_of, name), DOUBLE)
    for name, (function, kind) in functions.items():
        special = FunctionNullHandling.SPECIAL
        con.create_function(name, _nullable(function), doubles, kind, null_handling=special)


def _statistic(test: Callable[[Any, Any], tuple[float, float]]) -> Callable[[Any, Any], float]:
    return lambda x, y: test(x, y)[0]


def _kendall_ci(x: list[float], y: list[float]) -> dict[str, float] | None:
    low, high = statistics.kendall_ci(x, y)
    return None if low != low or high != high else {"low": low, "high": high}


def _nullable(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function` for SQL: null in, null out, and null where it is NaN."""

    def nullable(x: list[float] | None, y: list[float] | None) -> Any:
        if x is None or y is None:
            return None
        value = function(x, y)
        return None if value != value else value

    return nullable


def check_select(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raise QueryError unless DuckDB's parser calls `query` one SELECT, or an EXPLAIN of one."""
    _the_select(con, query)


def _the_select(con: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """The one SELECT, or EXPLAIN of one, that `query` is. Raises QueryError."""
    if not is_utf8(query):
        raise QueryError("the query is not text in UTF-8")
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
    return statements[0]


def check_parameters(wanted: Iterable[str], given: Iterable[str]) -> None:
    """Raise QueryError unless `given` names every parameter that a query has, and no other."""
    wanted, given = sorted(wanted), sorted(given)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise QueryError(f"the query wants a value for ${missing[0]}: give --param {missing[0]}=VALUE")
    unknown = [name for name in given if name not in wanted]
    if unknown:
        has = ", ".join(f"${name}" for name in wanted) or "none"
        raise QueryError(f"the query has no parameter ${unknown[0]}; it has: {has}")


def run_query(
    store: Store,
    query: str,
    report: Callable[[Problem], None] | None = None,
    parameters: Mapping[str, Any] | None = None,
    memory: int | None = None,
) -> pa.Table:
    """One SELECT over the store's views, fetched whole. `parameters` are the values of its `$name`s; DuckDB takes at
    most `memory` bytes. Raises QueryError."""
    if wrong := [name for name, value in (parameters or {}).items() if isinstance(value, str) and not is_utf8(value)]:
        raise QueryError(f"the value of ${wrong[0]} is not text in UTF-8")
    with views(store, report, memory) as found:
        check_parameters(_the_select(found.con, query).named_parameters, parameters or ())
        try:
            table = found.ask(query, parameters=parameters)
        except duckdb.OutOfMemoryException as error:
            raise MemoryError(str(error)) from error
        except duckdb.Error as error:
            raise QueryError(str(error)) from error
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise QueryError(f"two columns are named {twice[0]}: give one another name with `as`")
    return table


def quoted(text: str) -> str:
    """`text` as an SQL string. Raises QueryError where it is not text in UTF-8."""
    if not is_utf8(text):
        raise QueryError(f"{printable(text)} is not text in UTF-8")
    return "'" + text.replace("'", "''") + "'"


def column_names() -> list[str]:
    """The columns of a row, for messages."""
    return [name for group in COLUMNS.values() for name in group]
