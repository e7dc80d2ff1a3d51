"""status, ls, query, corr, plot: reading a store. Neither torch nor ray is imported here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.options import (
    FOR_PEOPLE,
    emit,
    existing_store,
    output_options,
    store_option,
    warn,
    where_option,
    write_file,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.status import Standing
    from storage.store import Store

DEFAULT_X, DEFAULT_Y = "pruned_train_loss", "best_test_accuracy"
BEST_NOTE = "best picks the epoch on the test set, as the paper does; tau_last5 uses the mean of the last five epochs"

x_option = click.option("--x", default=DEFAULT_X, show_default=True, help="What is to predict.")
y_option = click.option("--y", default=DEFAULT_Y, show_default=True, help="What is to be predicted.")


@click.command()
@store_option
@output_options
def ls(store: str, form: str, output: Path | None) -> None:
    """List the sweeps of a store.

    \b
    prunesweep ls
    prunesweep ls --store s3://bucket/results -f json
    """
    from storage.sql import run_query

    found = run_query(existing_store(store), "select * from sweeps order by sweep", warn)
    emit(found, form, output)


WATCH_SECONDS = 5.0


@click.command()
@click.argument("sweep")
@click.option(
    "--by", type=click.Choice(["cell", "shard", "sweep", "driver", "failure"]), default="cell", show_default=True
)
@click.option("--failed", is_flag=True, help="What failed, by error class: the same as --by failure.")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until nothing is left to run.")
@store_option
@output_options
def status(sweep: str, by: str, failed: bool, watch: bool, store: str, form: str, output: Path | None) -> None:
    """How SWEEP stands: tasks done, failed, running and pending, pace, and who is at work on it.

    A task counts as running while its worker gives signs of life; 60 s without one, and it does not.

    \b
    prunesweep status digits
    prunesweep status digits --by shard -f json
    prunesweep status digits --failed
    prunesweep status digits --watch
    """
    import time

    from orchestrator.status import standing

    opened = existing_store(store)
    while True:
        found = standing(opened, sweep, "failure" if failed else by, warn)
        if watch and sys.stdout.isatty():
            click.clear()
        emit(found.table, form, output)
        _say_standing(sweep, found)
        if not watch or not (found.drivers or found.whole["running"] or found.whole["pending"]):
            return
        time.sleep(WATCH_SECONDS)


def _say_standing(sweep: str, found: Standing) -> None:
    """What is true of the whole sweep, in lines for a person."""
    from orchestrator.progress import duration, some

    whole = found.whole
    counts = ", ".join(f"{whole[state]} {state}" for state in ("done", "failed", "running", "pending"))
    pace = ""
    if whole["tasks_per_hour"]:
        pace = f"; {whole['tasks_per_hour']:g} tasks an hour, about {duration(whole['seconds_left'])} left"
    click.echo(f"{sweep}: {some(whole['tasks'], 'task')}: {counts}{pace}", err=True)
    for one in found.failures:
        last = (one["example_error"] or "").strip().splitlines()[-1:]
        example = f"{one['example_task']}: {''.join(last)}"
        click.echo(f"failed: {one['error_class']}, {some(one['tasks'], 'task')}, as {example}", err=True)
    for driver in found.drivers:
        sign = f"last sign of life {driver['seconds_since_sign']:.0f} s ago"
        where = f"on {driver['host']}, process {driver['pid']}, since {driver['started_at']} UTC"
        click.echo(f"a driver is at work {where}, {sign}", err=True)


@click.command()
@click.argument("sql", required=False)
@click.option(
    "--file", "-i", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the query from a file."
)
@store_option
@output_options
def query(sql: str | None, file: Path | None, store: str, form: str, output: Path | None) -> None:
    """Ask the store in SQL: one SELECT over its views. SQL may be - for standard input.

    Views: attempts, rows, tasks, candidates, cells, sweeps, failures (`describe rows` shows columns).
    Functions: kendall, spearman, pearson over two lists, and kendall_p, spearman_p, pearson_p.

    \b
    prunesweep query "select cell_id, kendall(list(pruned_train_loss),
        list(best_test_accuracy)) as tau from candidates group by cell_id"
    prunesweep query "describe rows"
    prunesweep query "from failures" -f json
    """
    from storage.sql import run_query

    if (sql is None) == (file is None):
        raise click.UsageError("give the SQL, or --file FILE")
    text = _sql_of(file) if file else str(sql)
    text = sys.stdin.read() if text == "-" else text
    emit(run_query(existing_store(store), text, warn), form, output)


def _sql_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read {file}: {error}") from error


@click.command()
@click.argument("sweep")
@x_option
@y_option
@where_option
@store_option
@output_options
def corr(sweep: str, x: str, y: str, where: str | None, store: str, form: str, output: Path | None) -> None:
    """Per cell of SWEEP: Kendall's tau-b with p and n, Spearman, Pearson, the anomaly ratio.

    Over candidates averaged across seeds, those with every planned seed done. X is measured right
    after pruning, Y after retraining.

    \b
    prunesweep corr digits
    prunesweep corr digits --y best_test_loss
    prunesweep corr digits --x score_l1 -f latex
    """
    emit_correlations(correlations(existing_store(store), sweep, x, y, where), form, output)
    if y.startswith("best_"):
        click.echo(BEST_NOTE, err=True)


def emit_correlations(table: pa.Table, form: str, output: Path | None) -> None:
    """Print the table of `corr`; for people without the cells' ids, which make it too wide."""
    emit(table.drop_columns("cell_id") if form in FOR_PEOPLE else table, form, output)


def correlations(
    store: Store, sweep: str, x: str = DEFAULT_X, y: str = DEFAULT_Y, where: str | None = None
) -> pa.Table:
    """The table of `corr`."""
    from storage.correlate import BESIDE, cell_data, corr_table

    beside = BESIDE if y == DEFAULT_Y else None
    columns = (x, y, beside) if beside else (x, y)
    return corr_table(cell_data(store, sweep, columns, where, warn), x, y, beside)


@click.command()
@click.argument("sweep")
@x_option
@y_option
@where_option
@store_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .png, .pdf or .svg file; SWEEP.png if left out.",
)
def plot(sweep: str, x: str, y: str, where: str | None, store: str, output: Path | None) -> None:
    """Draw the scatter of SWEEP, one panel per cell, in the paper's form.

    The lowest-loss candidate is a blue star; candidates better than it are red, the others green.

    \b
    prunesweep plot digits
    prunesweep plot digits --y last5_test_accuracy_mean -o digits.pdf
    """
    from orchestrator.progress import some
    from storage.correlate import cell_data
    from storage.errors import QueryError
    from storage.figures import FILES, scatter
    from storage.statistics import correlation

    path = output or Path(f"{sweep}.png")
    if path.suffix not in FILES:
        raise click.UsageError(f"{path}: allowed are {', '.join(FILES)}")
    found = cell_data(existing_store(store), sweep, (x, y), where, warn)
    cells = [c for c in found if correlation(c.columns[x], c.columns[y]).n > 1]
    if not cells:
        raise QueryError(f"sweep {sweep} has no cell with two finished candidates that have {x} and {y}")
    write_file(path, lambda: scatter(cells, x, y, path))
    click.echo(str(path))
    where_store = "" if store == "results" else f" --store {shlex.quote(store)}"
    click.echo(
        f"drew {some(len(cells), 'cell')}. Try next:\n"
        f"  prunesweep corr {sweep} --y last5_test_accuracy_mean{where_store}\n"
        f'  prunesweep query "from candidates order by best_test_accuracy desc limit 5"{where_store}',
        err=True,
    )
