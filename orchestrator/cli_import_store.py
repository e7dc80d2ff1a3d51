"""import: the sweeps and rows of another store, merged into this one."""

from __future__ import annotations

import click

from orchestrator.errors import UserError
from orchestrator.options import existing_store, store_option, warn


@click.command("import")
@click.argument("source", metavar="STORE")
@store_option
def import_store(source: str, store: str) -> None:
    """Merge the sweeps and rows of STORE (a folder or a URI) into --store, with the weights and networks they need.

    A second import adds only what is new. STORE may be in use. A sweep that both stores have with other content is
    never overwritten: then nothing is written, and the command exits with 2.

    \b
    prunesweep import /backup/results
    prunesweep import s3://bucket/results --store results
    """
    from orchestrator.progress import some
    from storage.merging import find_merge, write_merge
    from storage.store import Store

    other, opened = existing_store(source), Store(store)
    if other.absolute == opened.absolute:
        raise UserError(f"{source} is the store to import into: name another one with --store")
    opened.check_writable()
    found = find_merge(other, opened)
    if found.conflicts:
        name = found.conflicts[0]
        spec = f"{other.location}/{other.newest(name).files[0]}"
        raise UserError(
            f"{', '.join(found.conflicts)}: both stores have a sweep of this name with other content. Nothing was "
            f"imported. Give the sweep in {source} another name: its finished tasks are not run again\n"
            f"  prunesweep run {spec} --set name={name}-2 --store {other.location}\n"
            f"  prunesweep rm {name} --store {other.location}"
        )
    done = write_merge(other, opened, found)
    for problem in done.problems:
        warn(problem)
    for sweep, _ in found.sweeps:
        click.echo(sweep)
    sweeps, rows = found.known
    click.echo(
        f"imported {some(done.sweeps, 'sweep')}, {some(done.rows, 'row')}, {some(done.dense, 'dense model')} and "
        f"{some(done.networks, 'kept network')}, {done.size:,} bytes; {some(sweeps, 'sweep')} and {some(rows, 'row')} "
        "there already",
        err=True,
    )
