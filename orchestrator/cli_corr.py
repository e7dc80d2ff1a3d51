"""corr: what the cells of a sweep say. Neither torch nor ray is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.options import FOR_PEOPLE, emit, existing_store, output_options, store_option, warn, where_option

if TYPE_CHECKING:
    import pyarrow as pa

    from storage.store import Store

DEFAULT_X, DEFAULT_Y = "pruned_train_loss", "best_test_accuracy"
BEST_NOTE = "best picks the epoch on the test set, as the paper does; tau_last5 uses the mean of the last five epochs"

x_option = click.option("--x", default=DEFAULT_X, show_default=True, help="What is to predict.")
y_option = click.option("--y", default=DEFAULT_Y, show_default=True, help="What is to be predicted.")


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
