"""query, export, diff: a store in SQL, in one file, and beside another. Neither torch nor ray is imported here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli_corr import x_option, y_option
from orchestrator.options import (
    FOR_PEOPLE,
    emit,
    existing_store,
    output_options,
    put,
    skipped,
    store_option,
    warn,
    width,
    write_file,
)
from orchestrator.phases import phases
from storage.errors import QueryError
from storage.userfiles import read_standard_input, read_stream

if TYPE_CHECKING:
    import pyarrow as pa

    from storage.confined import Limits

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
LEAST_MEMORY = 2**24


def _parameters(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """name=value pairs: numbers, true, false and null as such, "..." and everything else as text."""
    found: dict[str, Any] = {}
    for assignment in given:
        name, equals, value = assignment.partition("=")
        name = name.removeprefix("$")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{assignment!r}: write it as name=value")
        if name in found:
            raise click.BadParameter(f"{name} is given twice")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    def no_number(constant: str) -> Any:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | bool | None) else text


def _memory(_: click.Context, __: click.Parameter, given: str | None) -> int:
    """Bytes of 512MB, 2 GiB, 2G; kilo is 1024."""
    from storage.confined import half_of_memory

    if given is None:
        return half_of_memory()
    found = _SIZE.fullmatch(given.strip())
    size = int(float(found[1]) * 1024 ** _POWERS[found[2].lower()]) if found else 0
    if size < LEAST_MEMORY:
        raise click.BadParameter(f"{given!r}: write it as 512MB or 4GB, of at least 16MB")
    return size


@click.command()
@click.argument("sql", required=False)
@click.option(
    "--file", "-i", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the query from a file."
)
@click.option(
    "--param",
    "-p",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parameters,
    help="The value of $NAME in the query: a number, true, false, null, or text.",
)
@click.option("--interactive", is_flag=True, help="Ask at a prompt; so does no SQL at all on a terminal.")
@click.option(
    "--memory", metavar="SIZE", callback=_memory, help="Stop above this much memory. [default: half of the machine's]"
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, 1e7, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop after so long.",
)
@store_option
@output_options
def query(
    sql: str | None,
    file: Path | None,
    parameters: dict[str, Any],
    interactive: bool,
    memory: int,
    timeout: float,
    store: str,
    form: str,
    output: Path | None,
) -> None:
    """Ask the store in SQL: one SELECT over its views. SQL may be - for standard input.

    Views: attempts, rows, tasks, candidates, cells, sweeps, failures, criteria, curves, cost (`describe rows`
    shows columns). Functions over two lists: kendall, spearman, pearson, with _p their p; kendall_ci, and
    anomaly_ratio, anomaly_ratio_loss for a y of which less is better. docs/sql.md has more.

    A query reads the store and nothing else, writes nothing, and is stopped at its limits.

    \b
    prunesweep query "select cell_id, kendall(list(pruned_train_loss),
        list(best_test_accuracy)) as tau from candidates group by cell_id"
    prunesweep query "describe rows"
    prunesweep query "from failures" -f json
    prunesweep query 'from rows where seed = $seed' --param seed=0
    prunesweep query                          a prompt, on a terminal
    """
    from storage.confined import Limits

    limits = Limits(memory, timeout)
    if interactive or (sql is None and file is None and _at_a_terminal()):
        _at_a_prompt(sql or file or parameters or output, store, form, limits)
        return
    if (sql is None) == (file is None):
        raise click.UsageError("give the SQL, or --file FILE (or - for standard input)")
    text = _text_of(file if sql is None else None) if sql in (None, "-") else str(sql)
    put(answer(store, text, form, limits, parameters, width(output)), output)


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _at_a_prompt(given: object, store: str, form: str, limits: Limits) -> None:
    import storage.sql  # noqa: F401  # each question is asked by a copy of this process: once here, not once in each
    from orchestrator.prompt import SHOWN, converse, session

    if given:
        raise click.UsageError("at a prompt there is no SQL, --file, --param or -o beforehand")
    if form not in SHOWN:
        raise click.UsageError(f"a prompt shows {', '.join(SHOWN)}")

    def ask(text: str, form: str) -> bytes:
        return answer(store, text, form, limits, columns=width(None))

    ask("select 1", form)  # is there a store?
    converse(session(ask), ask, form)


MAX_QUERY_BYTES = 10**6
"""Maximum size of a query from a file or standard input, in bytes."""


def _text_of(file: Path | None) -> str:
    """The text of a file, or of standard input. Raises UsageError."""
    name = "standard input" if file is None or str(file) == "-" else str(file)
    try:
        read = (
            read_standard_input(MAX_QUERY_BYTES)
            if name == "standard input"
            else read_stream(Path(name), MAX_QUERY_BYTES)
        )
        text = read.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read {name}: {error}") from error
    if len(read) > MAX_QUERY_BYTES:
        raise click.UsageError(f"cannot read {name}: a query has at most {MAX_QUERY_BYTES} bytes")
    return text


def answer(
    location: str,
    sql: str,
    form: str,
    limits: Limits,
    parameters: dict[str, Any] | None = None,
    columns: int | None = None,
) -> bytes:
    """The answer to a query, rendered, of the store as it is now; a table for people is so many `columns` wide.

    Raises QueryError, StoreError.
    """
    from storage.confined import Done, confined

    def work() -> Done:
        from storage.sql import run_query

        said: list[str] = []
        store = existing_store(location)
        table = run_query(store, sql, lambda problem: said.append(skipped(problem)), parameters, limits.memory)
        return Done(_rendered(table, form, columns), tuple(said))

    try:
        done = confined(work, limits, lambda: phases()("asking the store"))
    finally:
        phases().rest()  # a prompt may follow, and a fork
    for line in done.said:
        click.echo(line, err=True)
    return done.answer


def _rendered(table: pa.Table, form: str, columns: int | None) -> bytes:
    from storage.formats import render

    try:
        return render(table, form, columns)
    except (OverflowError, NotImplementedError) as error:  # dates that Python has not, types that Parquet has not
        raise QueryError(f"a value of the answer cannot be written as {form}: {error}") from error


@click.command()
@click.argument("sweep", required=False)
@click.option("--all", "everything", is_flag=True, help="Every task and sweep of the store.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The file; its ending says what it is: .duckdb, .parquet, .csv.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@store_option
def export(sweep: str | None, everything: bool, output: Path, force: bool, store: str) -> None:
    """Write SWEEP, or with --all the whole store, to one file.

    .duckdb has the tables and the views: plain `duckdb FILE` opens it. kendall and the other functions of prunesweep
    are not in it. .parquet and .csv have the row of each task; lists are JSON in CSV.

    \b
    prunesweep export digits -o digits.duckdb
    prunesweep export digits -o digits.csv
    prunesweep export --all -o store.parquet --force
    """
    from storage.export import export as write

    if (sweep is None) != everything:
        raise click.UsageError("give a SWEEP, or --all")
    if not output.parent.is_dir():
        raise click.UsageError(f"cannot write {output}: there is no folder {output.parent}")
    written: list[int] = []
    found = existing_store(store)
    write_file(output, lambda: written.append(write(found, sweep, output, force=force, report=warn, phase=phases())))
    click.echo(f"wrote {output}: {_count(written[0], 'row')}", err=True)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--over", multiple=True, metavar="FIELD", help="What may differ: propagation, retrain.epochs, versions.")
@click.option("--store-b", help="The store that B is in.  [default: the same]")
@click.option(
    "--what",
    type=click.Choice(("summary", "rows", "cells")),
    default="summary",
    show_default=True,
    help="How far each cell's rows moved; the rows that did; tau and verdict of each side.",
)
@x_option
@y_option
@store_option
@output_options
def diff(
    a: str,
    b: str,
    over: tuple[str, ...],
    store_b: str | None,
    what: str,
    x: str,
    y: str,
    store: str,
    form: str,
    output: Path | None,
) -> None:
    """What differs between sweeps A and B, or within one (A twice) over an axis of its grid.

    Cells are matched that are the same but for --over; without it, but for what no cell of A has as any of B has it.
    Their rows are matched by seed and candidate. A difference is b less a.

    \b
    prunesweep diff study study --over propagation
    prunesweep diff study study --over propagation --what cells
    prunesweep diff study study --store-b elsewhere --over versions --what rows
    prunesweep diff monday tuesday -f csv
    """
    from storage.diff import Side, moved, paired, summary, verdicts

    here = existing_store(store)
    found = paired(Side(here, a), Side(existing_store(store_b) if store_b else here, b), over)
    table = {"summary": summary, "rows": moved, "cells": verdicts}[what](found, x, y, warn)
    if form in FOR_PEOPLE:
        table = table.drop_columns([name for name in _IDS if name in table.column_names])
    emit(table, form, output)
    click.echo(_said(what, len(found.cells), table), err=True)


_IDS = ("cell_a", "cell_b", "task_a", "task_b")


def _said(what: str, cells: int, table: pa.Table) -> str:
    pairs = _count(cells, "pair") + " of cells"
    if what == "cells":
        return f"{pairs}: {_count(sum(table['changed'].to_pylist()), 'verdict')} changed"
    if what == "rows":
        return f"{pairs}: {_count(len(table), 'row')} moved"
    return f"{pairs}; --what rows shows the rows that moved, --what cells the verdicts"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
