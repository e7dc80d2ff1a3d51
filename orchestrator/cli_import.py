"""import-logs: what the reference implementation measured, as rows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from orchestrator.options import absolute, data_root_option, read_spec, replace_option, set_option, store_option
from orchestrator.phases import phases


@click.command("import-logs")
@click.argument("logs", metavar="DIR...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--like", required=True, metavar="SPEC|STUDY", help="What the logs are of: network, data, layers, recipes."
)
@click.option("--name", metavar="SWEEP", help="The sweep to make; STUDY-logs if left out.")
@set_option
@click.option("--layers", metavar="NAMES", help="Of the spec's cells only those of these layers, as conv1+conv3.")
@click.option("--ratio", type=float, help="Of the spec's cells only those of this pruning ratio.")
@click.option("--seed", type=click.IntRange(0), help="The seed of all logs; else repeat t1 of a file's name is seed 0.")
@click.option("--dense", metavar="NAME", help="The dense weights of all logs; else the checkpoint that a log names.")
@click.option(
    "--propagation", type=click.Choice(["released", "exact"]), default="released", show_default=True,
    help="How removals reached other layers: `released` for the reference's own code.",
)  # fmt: skip
@replace_option
@store_option
@data_root_option
def import_logs(
    logs: tuple[Path, ...],
    like: str,
    name: str | None,
    overrides: tuple[str, ...],
    layers: str | None,
    ratio: float | None,
    seed: int | None,
    dense: str | None,
    propagation: str,
    replace: bool,
    store: str,
    data_root: str,
) -> None:
    """Make rows and a sweep of the text logs in DIR, those of the reference implementation of arXiv 2412.00143.

    Logs say neither network nor recipes: --like names a spec that does. Logs that were cut off give the
    candidates that are whole. Once more with the same or longer logs, and only what is new is added.

    \b
    prunesweep import-logs record --like lenet5-mini-conv1
    prunesweep import-logs record --like lenet5-mini-conv1 --set retrain.epochs=3 --name three-epochs
    prunesweep import-logs conv2.log --like lenet5-mini-conv2 --ratio 0.5 --seed 1
    """
    from orchestrator.imported import Choice, import_logs
    from orchestrator.progress import some
    from orchestrator.spec import load_spec
    from storage.store import Store

    document = read_spec(like, overrides)
    document.override(f"name={json.dumps(name or load_spec(document).name + '-logs')}")
    document.override(f"grid.propagation={propagation}")
    opened = Store(store)
    choice = Choice(layers, ratio, seed, dense)
    found = import_logs(opened, logs, document, choice, absolute(data_root), replace=replace, report=phases())
    phases().rest()
    click.echo(found.sweep)
    known = f", {some(found.known, 'row')} there already" if found.known else ""
    where_store = "" if store == "results" else f" --store {shlex.quote(store)}"
    click.echo(f"{found.sweep}: {some(found.written, 'row')} in {some(found.cells, 'cell')} imported{known}", err=True)
    if found.incomplete:
        some_cut = some(len(found.incomplete), "candidate")
        click.echo(f"{some_cut} cut off, without a row; the first is {found.incomplete[0]}", err=True)
    if found.stray:
        click.echo(f"{some(found.stray, 'line')} of candidates whose units no line names: left out", err=True)
    if found.without:
        click.echo(f"{some(len(found.without), 'file')} without a candidate: left out, as {found.without[0]}", err=True)
    click.echo(f"Try next:\n  prunesweep corr {found.sweep}{where_store}", err=True)
