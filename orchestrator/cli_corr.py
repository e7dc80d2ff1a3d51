"""corr: what the cells of a sweep say. Neither torch nor ray is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.options import FOR_PEOPLE, emit, existing_store, output_options, store_option, warn, where_option
from orchestrator.phases import phases

if TYPE_CHECKING:
    import pyarrow as pa

    from storage.statistics.records import Claim
    from storage.store import Store

DEFAULT_X, DEFAULT_Y = "pruned_train_loss", "best_test_accuracy"
BEST_NOTE = "best picks the epoch on the test set, as the paper does; tau_last5 uses the mean of the last five epochs"
OF_CLAIMS = ("cells", "tests", "noise", "picks", "power", "all")
TABLES = (*OF_CLAIMS, "criteria", "pairs", "early")

NOTES = {
    "cells": (
        "tau has its 95 % BCa interval over candidates; p_holm is adjusted over the cells shown; ceiling is the |tau| "
        "that a perfect predictor would reach; settled: all of the interval is on the verdict's side of the paper's 0.2"
    ),
    "noise": (
        "reliability is ICC(C,k) of the mean over seeds; ceiling the |tau| that a perfect predictor would reach; "
        "corrected is tau freed from the noise of y"
    ),
    "picks": (
        "regret is by how much the best candidate is better than the picked one, which x calls the best; held out: the "
        "best chosen on other seeds; counterexamples: pairs ordered wrongly by more than noise, which alone makes 2.5 %"
    ),
    "power": (
        "detectable is the smallest |tau| found with a power of 80 %; so many more candidates, or seeds, would settle "
        "the sign were this tau true: 0 where p is at most 0.05, - where none would or can, or the noise is unknown"
    ),
    "criteria": "strength is tau turned so that more is better; beats: by more than chance, by Holm over the pairs",
}
"""What a person needs to read a table."""

x_option = click.option("--x", default=DEFAULT_X, show_default=True, help="What is to predict.")
y_option = click.option("--y", default=DEFAULT_Y, show_default=True, help="What is to be predicted.")


@click.command()
@click.argument("sweep")
@x_option
@y_option
@where_option
@click.option(
    "--show",
    type=click.Choice(TABLES),
    default="cells",
    show_default=True,
    help="Which table: of the cells, of the tests in full, of retraining noise, of what picking by x costs, of "
    "power; of criteria, of the pairs of them; of early epochs.",
)
@click.option(
    "--intervals",
    type=click.Choice(["none", "tau", "all"]),
    default="tau",
    show_default=True,
    help="Bootstrap intervals of tau and what follows from it, of Spearman and Pearson too, or of nothing.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=100),
    default=2000,
    show_default=True,
    help="Bootstrap resamples of candidates.",
)
@store_option
@output_options
def corr(
    sweep: str,
    x: str,
    y: str,
    where: str | None,
    show: str,
    intervals: str,
    resamples: int,
    store: str,
    form: str,
    output: Path | None,
) -> None:
    """Per cell of SWEEP: does X predict Y? Kendall's tau-b with its interval, p, the noise ceiling, the verdict.

    Over candidates averaged across seeds, those with every planned seed done. X is measured right
    after pruning, Y after retraining. A second look at the same rows is answered at once.

    \b
    prunesweep corr digits
    prunesweep corr digits --y best_test_loss
    prunesweep corr digits --x score_l1 -f latex
    prunesweep corr digits --show noise       is the accuracy reliable enough to be predicted?
    prunesweep corr digits --show criteria    which criterion predicts best, and is the lead real?
    prunesweep corr digits --show early       from which epoch on is the order known?
    """
    opened, times = existing_store(store), 0 if intervals == "none" else resamples
    if show in ("criteria", "pairs"):
        table = bench_table(opened, sweep, y, where, show, times)
    elif show == "early":
        table = early_table(opened, sweep, x, y, where, times)
        if not len(table):
            click.echo("no curves: no finished candidate has its accuracy after each epoch", err=True)
    else:
        table, claims = correlations(opened, sweep, x, y, where, show=show, resamples=times, every=intervals == "all")
        say_left_out(claims)
    emit_correlations(table, form, output)
    say_fallbacks(opened, sweep)
    say_notes(form, show, y)


def emit_correlations(table: pa.Table, form: str, output: Path | None) -> None:
    """Print a table of `corr`; for people without the cells' ids, which make it too wide."""
    emit(table.drop_columns("cell_id") if form in FOR_PEOPLE else table, form, output)


def say_notes(form: str, show: str = "cells", y: str = DEFAULT_Y) -> None:
    """What a person needs to read the table."""
    if form in FOR_PEOPLE and show in NOTES:
        click.echo(NOTES[show], err=True)
    if y.startswith("best_") and show in ("cells", "all"):
        click.echo(BEST_NOTE, err=True)


def say_fallbacks(store: Store, sweep: str) -> None:
    """Report the tasks that a fault sent to a slower back-end: their numbers after retraining are of another
    execution."""
    from orchestrator.progress import slower
    from storage.fallbacks import fallbacks

    phases()("looking for tasks on slower back-ends")
    for fallback in fallbacks(store, sweep):
        click.echo(slower(fallback), err=True)


def correlations(
    store: Store,
    sweep: str,
    x: str = DEFAULT_X,
    y: str = DEFAULT_Y,
    where: str | None = None,
    *,
    show: str = "cells",
    resamples: int = 2000,
    every: bool = False,
) -> tuple[pa.Table, list[Claim]]:
    """The table of `corr`, and the claims it is of."""
    from storage.claims import claims
    from storage.correlate import BESIDE, cell_data
    from storage.statistics import kendalls
    from storage.tables import corr_table, with_beside

    beside = BESIDE if y == DEFAULT_Y else None
    cells = cell_data(store, sweep, (x, y, beside) if beside else (x, y), where, warn)
    found = claims(cells, x, y, resamples=resamples, every_interval=every, phase=phases())
    table = corr_table(found, show)
    if beside and show in ("cells", "all"):
        table = with_beside(table, kendalls([(cell.columns[x], cell.columns[beside]) for cell in cells]), beside)
    return table, found


def say_left_out(claims: list[Claim]) -> None:
    """Which candidates could not count."""
    dropped = sum(claim.dropped for claim in claims)
    if dropped:
        click.echo(f"left out: {dropped} candidates without a finite x and y, as those that diverged", err=True)


def bench_table(store: Store, sweep: str, y: str, where: str | None, show: str, resamples: int) -> pa.Table:
    """The criterion bench, or which of its predictors differ."""
    from storage.correlate import cell_data
    from storage.criteria import bench, predictors
    from storage.tables import criteria_table, differences_table

    names = predictors(store, sweep)
    cells = cell_data(store, sweep, (*names, y), where, warn)
    lines, pairs = bench(cells, y, names, resamples=resamples, phase=phases())
    return criteria_table(lines) if show == "criteria" else differences_table(pairs)


def early_table(store: Store, sweep: str, x: str, y: str, where: str | None, resamples: int) -> pa.Table:
    """Accuracies after each epoch against y."""
    from storage import early, tables

    return tables.early_table(early.early(store, sweep, x, y, where, warn, resamples=resamples, phase=phases()))
