"""query: asking a store in SQL. Neither torch nor ray is imported here."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from orchestrator.options import emit, existing_store, output_options, store_option, warn


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
