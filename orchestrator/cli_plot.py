"""plot: figures of a sweep. Neither torch nor ray is imported here."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from orchestrator.cli_corr import x_option, y_option
from orchestrator.options import existing_store, store_option, warn, where_option, write_file


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
    from storage.figures.plain import FILES, scatter
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
