"""plot: figures of a sweep. Neither torch nor ray is imported here."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from orchestrator.cli_corr import x_option, y_option
from orchestrator.options import existing_store, store_option, warn, where_option, write_file
from orchestrator.phases import phases

KINDS = ("scatter", "heatmap", "ratio-curve", "forest", "criteria", "early", "parcoords")
"""storage.figures.KINDS, without importing what draws them."""


def _inches(_: click.Context, __: click.Parameter, given: str) -> float:
    """The width in inches of `one`, `two` or a number."""
    from storage.figures import WIDTHS

    try:
        inches = WIDTHS[given] if given in WIDTHS else float(given)
    except ValueError:
        inches = 0.0
    if not 2 <= inches <= 40:
        raise click.BadParameter(
            f"{given!r}: allowed are one ({WIDTHS['one']} in), two ({WIDTHS['two']} in) and inches, 2 to 40"
        )
    return inches


@click.command()
@click.argument("sweep")
@click.option("--kind", type=click.Choice(KINDS), default="scatter", show_default=True, help="What to draw.")
@x_option
@y_option
@where_option
@store_option
@click.option(
    "--width",
    default="two",
    show_default=True,
    callback=_inches,
    help="For one or two columns of a paper, or inches; not for .html.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .png, .pdf, .svg or .html file; SWEEP-KIND.png if left out, SWEEP.png for a scatter.",
)
def plot(
    sweep: str, kind: str, x: str, y: str, where: str | None, store: str, width: float, output: Path | None
) -> None:
    """Draw a figure of SWEEP: for a paper, or as .html to look at closely.

    scatter, a panel per cell in the paper's form: the lowest-loss candidate is a blue star, better ones are red, the
    others green. heatmap and ratio-curve: tau over the axes of the grid. forest: tau with its interval cell by cell.
    criteria: every predictor's tau. early: tau after each epoch. parcoords: each candidate a line over the predictors.

    \b
    prunesweep plot digits
    prunesweep plot digits --y last5_test_accuracy_mean --width one -o digits.pdf
    prunesweep plot digits --kind criteria -o criteria.svg
    prunesweep plot digits -o digits.html
    """
    from storage.figures import FILES, save
    from storage.figures.load import load

    path = output or Path(f"{sweep}.png" if kind == "scatter" else f"{sweep}-{kind}.png")
    if path.suffix not in FILES:
        raise click.UsageError(f"{path}: allowed are {', '.join(FILES)}")
    if not path.parent.is_dir():
        raise click.UsageError(f"cannot write {path}: there is no folder {path.parent}")
    hover = path.suffix == ".html" and kind == "scatter"
    data = load(existing_store(store), sweep, kind, x, y, where, warn, removed=hover, phase=phases())
    phases()(f"drawing {path}")
    write_file(path, lambda: save(kind, data, path, width=width))
    click.echo(str(path))
    where_store = "" if store == "results" else f" --store {shlex.quote(store)}"
    click.echo(
        f"drew {kind}. Try next:\n"
        f"  prunesweep corr {sweep} --y last5_test_accuracy_mean{where_store}\n"
        f"  prunesweep plot {sweep} --kind {'scatter' if kind == 'forest' else 'forest'}{where_store}",
        err=True,
    )
