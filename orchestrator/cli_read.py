"""status, ls: how sweeps stand. Neither torch nor ray is imported here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.options import emit, existing_store, output_options, store_option, warn

if TYPE_CHECKING:
    from orchestrator.status import Standing


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
