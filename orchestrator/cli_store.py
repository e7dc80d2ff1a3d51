"""compact, rerun, rm: the store's upkeep, and one task again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.errors import UserError
from orchestrator.options import (
    FOR_PEOPLE,
    absolute,
    data_root_option,
    emit,
    existing_store,
    output_options,
    store_option,
    write_file,
)
from orchestrator.phases import phases

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.rerun import Rerun
    from storage.store import Store


@click.command()
@store_option
def compact(store: str) -> None:
    """Merge the row files of the store into few, and set aside files that are none.

    Every run does so at its end. Safe beside runs and queries, and to be killed.

    \b
    prunesweep compact --store results
    """
    from orchestrator.progress import some

    done = existing_store(store).compact()
    for problem in done.aside:
        click.echo(f"set aside {problem.file}: {problem.reason}", err=True)
    rows = some(done.rows, "row")
    said = f"merged {some(done.merged, 'file')} into {done.written}, {rows}" if done.merged else "nothing to merge"
    click.echo(said, err=True)


@click.command()
@click.argument("task_id")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Leave the retrained network in a file.")
@click.option("--keep", type=click.Choice(["last", "best"]), default="last", show_default=True, help="Of which epoch.")
@store_option
@data_root_option
@output_options
@click.pass_context
def rerun(
    ctx: click.Context,
    task_id: str,
    save: Path | None,
    keep: str,
    store: str,
    data_root: str,
    form: str,
    output: Path | None,
) -> None:
    """Run one task again with the execution its row recorded, and say whether it gives the same row.

    TASK_ID may be the beginning of one. Prints the columns that differ; exits with 0 if the rows are the
    same, 3 if not. Writes no row. `load_network(FILE)` of the package `workers` loads what --save leaves.

    \b
    prunesweep rerun 3f2a
    prunesweep rerun 3f2a --save network.safetensors
    """
    from orchestrator.cli import FAILED_TASKS
    from orchestrator.rerun import find_row, rerun

    if save is not None and not save.parent.is_dir():
        raise click.UsageError(f"cannot write {save}: there is no folder {save.parent}")
    opened = existing_store(store)
    row = find_row(opened, task_id, absolute(data_root))
    found = rerun(opened, row, absolute(data_root), keep if save else "none", phases())
    if found.differing or output or form not in FOR_PEOPLE:
        emit(_differences(found), form, output)
    click.echo(_verdict(found), err=True)
    if save:
        network = found.network
        if network is None:
            raise UserError(f"task {row.task_id} diverged in its first epoch: there is no network to save")
        write_file(save, lambda: save.write_bytes(network))
        click.echo(f"wrote {save}", err=True)
    ctx.exit(0 if found.same else FAILED_TASKS)


def _differences(found: Rerun) -> pa.Table:
    import pyarrow as pa

    def shown(row: Any, column: str) -> str:
        return str(getattr(row, column))

    lines = [{"column": c, "row": shown(found.then, c), "rerun": shown(found.now, c)} for c in found.differing]
    return pa.Table.from_pylist(lines, pa.schema([(name, pa.string()) for name in ("column", "row", "rerun")]))


def _verdict(found: Rerun) -> str:
    task = f"task {found.then.task_id}"
    changed = "; ".join(f"{key} {then} -> {now}" for key, (then, now) in found.execution.items())
    if not found.differing:
        return f"{task}: the same row, bit for bit" + (f", though the execution differs ({changed})" if changed else "")
    if not changed:
        return f"{task}: the same execution gives another row: {len(found.differing)} columns differ"
    kind = "agrees before retraining, to rounding" if found.same else "differs before retraining"
    return f"{task}: {kind}; the execution is another one ({changed})"


@click.command()
@click.argument("sweep", required=False)
@click.option("--unused", is_flag=True, help="Remove dense weights and scratch that no sweep needs.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def rm(sweep: str | None, unused: bool, yes: bool, store: str) -> None:
    """Remove SWEEP, every expansion of it; or with --unused what no sweep needs.

    Rows stay: they belong to all sweeps of the store, and planning their tasks again finds them.

    \b
    prunesweep rm digits
    prunesweep rm --unused --yes
    """
    if (sweep is None) != unused:
        raise click.UsageError("give a SWEEP, or --unused")
    opened = existing_store(store)
    if sweep is None:
        _remove_unused(opened, yes)
    else:
        _remove_sweep(opened, sweep, yes)


def _remove_sweep(store: Store, sweep: str, yes: bool) -> None:
    from orchestrator.drivers import drivers
    from orchestrator.progress import some

    tasks = some(len(store.plan_table(store.newest(sweep))), "task")
    if drivers(store, sweep):
        raise UserError(f"a driver is at work on {sweep}: `prunesweep stop {sweep}` first")
    _confirm(f"remove the sweep {sweep} of {tasks} from {store.location}? Its rows stay", yes)
    store.remove_sweep(sweep)
    click.echo(
        f"removed the sweep {sweep}; its rows stay. `prunesweep rm --unused` removes what only it needed", err=True
    )


def _remove_unused(store: Store, yes: bool) -> None:
    from orchestrator.progress import some
    from storage.upkeep import tidy, unused

    found = unused(store, list(store.manifests()))
    if found.names:
        for name in found.names:
            click.echo(name)
        files = some(len(found.names), "file")
        _confirm(f"remove {files}, {found.size / 1e6:.1f} MB, from {store.location}?", yes)
    for name in found.names:
        store.delete(name)
    statuses = store.statuses()
    tidy(store, lambda task_id: statuses.get(task_id) == "done")
    click.echo(f"removed {some(len(found.names), 'file')}, {found.size / 1e6:.1f} MB", err=True)


def _confirm(question: str, yes: bool) -> None:
    phases().rest()
    try:
        sure = yes or click.confirm(question, err=True)
    except click.Abort:
        raise UserError("nothing was removed: give --yes where nobody can answer") from None
    if not sure:
        raise UserError("nothing was removed")
