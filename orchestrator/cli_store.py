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
    warn,
    write_file,
)
from orchestrator.phases import phases
from storage.errors import DamagedError

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
@click.option("--unused", is_flag=True, help="Remove dense weights and scratch files that no sweep needs.")
@click.option("--rows", is_flag=True, help="Remove rows whose task no sweep plans.")
@click.option("--networks", is_flag=True, help="Remove kept networks whose task no sweep plans, or which no row names.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed. Removes nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def rm(sweep: str | None, unused: bool, rows: bool, networks: bool, dry_run: bool, yes: bool, store: str) -> None:
    """Remove SWEEP, every expansion of it; or what no sweep needs: --unused, --rows, --networks, or several of these.

    Rows and kept networks of SWEEP stay. A sweep planned later finds them, and --rows and --networks remove them once
    no sweep plans their tasks. What is planned is the newest expansion of each sweep.

    \b
    prunesweep rm digits
    prunesweep rm --rows --networks --unused --dry-run
    prunesweep rm --unused --yes
    """
    if (sweep is None) != (unused or rows or networks):
        raise click.UsageError("give a SWEEP, or --unused, --rows and --networks")
    opened = existing_store(store)
    if sweep is not None:
        _remove_sweep(opened, sweep, dry_run, yes)
    if rows:
        _remove_rows(opened, dry_run, yes)
    if networks:
        _remove_networks(opened, dry_run, yes)
    if unused:
        _remove_unused(opened, dry_run, yes)


def _remove_sweep(store: Store, sweep: str, dry_run: bool, yes: bool) -> None:
    from orchestrator.drivers import drivers
    from orchestrator.progress import some

    sizes = store.sizes(f"sweeps/{sweep}") if sweep in store.sweeps() else {}
    try:
        tasks = some(len(store.plan_table(store.newest(sweep))), "task")
    except DamagedError as error:  # a sweep that cannot be read can be removed
        click.echo(f"warning: {error}", err=True)
        tasks = "an unknown number of tasks"
    if drivers(store, sweep) and not dry_run:
        raise UserError(f"a driver is at work on {sweep}: `prunesweep stop {sweep}` first")
    files = f"{some(len(sizes), 'file')}, {_bytes(sum(sizes.values()))}"
    if dry_run:
        for name in sorted(sizes):
            click.echo(f"sweeps/{sweep}/{name}")
        click.echo(f"would remove the sweep {sweep} of {tasks} ({files}); its rows would stay", err=True)
        return
    _confirm(f"remove the sweep {sweep} of {tasks} from {store.location}? Its rows stay", yes)
    store.remove_sweep(sweep)
    click.echo(
        f"removed the sweep {sweep}; its rows stay ({files}). `prunesweep rm --unused --rows --networks` removes what "
        "only it needed",
        err=True,
    )


def _check_idle(store: Store) -> None:
    """Raise UserError where a driver or worker is at work in the store, on whatever sweep."""
    from storage.removal import at_work

    if busy := at_work(store):
        raise UserError(f"nothing was removed: {busy}. Stop it first (`prunesweep stop SWEEP`), or wait for its end")


def _remove_rows(store: Store, dry_run: bool, yes: bool) -> None:
    from orchestrator.progress import some
    from storage.removal import remove_rows, unplanned_rows

    if not dry_run:
        _check_idle(store)
    found = unplanned_rows(store)
    for problem in found.problems:
        warn(problem)
    if found.left:
        click.echo(f"{some(found.left, 'row')} of a newer prunesweep left as they are", err=True)
    what = f"{some(found.rows, 'row')} that no sweep plans, {_bytes(found.size)}"
    if dry_run:
        click.echo(f"would remove {what}", err=True)
        return
    if found.names:
        _confirm(f"remove {what}, from {store.location}?", yes)
        what = f"{some(found.rows, 'row')} that no sweep plans, {_bytes(remove_rows(store, found))}"
    click.echo(f"removed {what}", err=True)


def _remove_networks(store: Store, dry_run: bool, yes: bool) -> None:
    from storage.removal import unneeded_networks

    if not dry_run:
        _check_idle(store)
    found = unneeded_networks(store)
    _remove_files(store, found.names, found.size, dry_run, yes)


def _remove_unused(store: Store, dry_run: bool, yes: bool) -> None:
    from storage.upkeep import left_over, tidy, unused

    statuses = store.statuses() if store.row_file_names() else {}

    def is_done(task_id: str) -> bool:
        return statuses.get(task_id) == "done"

    found = unused(store, list(store.manifests()), left_over(store, is_done))
    _remove_files(store, found.names, found.size, dry_run, yes)
    if not dry_run:
        tidy(store, is_done)


def _remove_files(store: Store, names: tuple[str, ...], size: int, dry_run: bool, yes: bool) -> None:
    """List files, and remove them once that is confirmed, or not at all with `dry_run`; report their bytes."""
    from orchestrator.progress import some

    what = f"{some(len(names), 'file')}, {_bytes(size)}"
    for name in names:
        click.echo(name)
    if dry_run:
        click.echo(f"would remove {what}", err=True)
        return
    if names:
        _confirm(f"remove {what}, from {store.location}?", yes)
    for name in names:
        store.delete(name)
    click.echo(f"removed {what}", err=True)


def _bytes(n: int) -> str:
    """`44 bytes`, `12.3 MB (12,345,678 bytes)`."""
    return f"{n:,} bytes" if abs(n) < 1e5 else f"{n / 1e6:,.1f} MB ({n:,} bytes)"


def _confirm(question: str, yes: bool) -> None:
    phases().rest()
    try:
        sure = yes or click.confirm(question, err=True)
    except click.Abort:
        raise UserError("nothing was removed: give --yes where nobody can answer") from None
    if not sure:
        raise UserError("nothing was removed")
