"""status, ls: how sweeps stand. Torch is not imported here, and ray only where --address asks for a cluster's jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.options import emit, existing_store, output_options, store_option, warn
from orchestrator.phases import phases
from storage.printable import unescaped

if TYPE_CHECKING:
    from orchestrator.jobs import SweepJob
    from orchestrator.status import Standing

jobs_option = click.option(
    "--address", help="Also say which jobs of a cluster run the sweep: its job server, as http://HOST:8265."
)


@click.command()
@store_option
@jobs_option
@output_options
def ls(store: str, address: str | None, form: str, output: Path | None) -> None:
    """List the sweeps of a store; with --address also the newest job of each on that cluster.

    \b
    prunesweep ls
    prunesweep ls --store s3://bucket/results -f json
    prunesweep ls --store /shared/results --address http://head:8265
    """
    from storage.sql import run_query

    jobs = _jobs(address)
    _say_jobs([job for job in jobs if job.store != _absolute(store)])
    found = run_query(existing_store(store), "select * from sweeps order by sweep", warn)
    if address:
        newest = {job.sweep: job for job in reversed(jobs) if job.store == _absolute(store)}
        of = [newest.get(sweep) for sweep in found["sweep"].to_pylist()]
        for name in ("job", "state", "submitted_at"):
            column = [None if job is None else getattr(job, name) for job in of]
            found = found.append_column(_COLUMN.get(name, name), [column])
    emit(found, form, output)


_COLUMN = {"state": "job_state"}


def _absolute(store: str) -> str:
    from storage.store import Store

    return Store(store).absolute


def _jobs(address: str | None) -> list[SweepJob]:
    """The sweeps' jobs of a cluster, the newest first; none without an address."""
    if not address:
        return []
    from orchestrator.jobs import job_server, jobs_of_sweeps

    with job_server(address) as client:
        return jobs_of_sweeps(client)


def _say_jobs(jobs: list[SweepJob]) -> None:
    for job in jobs:
        click.echo(
            f"job {job.job} runs {job.sweep}: {job.state}, since {job.submitted_at} UTC; store {job.store}", err=True
        )


WATCH_SECONDS = 5.0


@click.command()
@click.argument("sweep")
@click.option(
    "--by", type=click.Choice(["cell", "shard", "sweep", "driver", "failure"]), default="cell", show_default=True
)
@click.option("--failed", is_flag=True, help="What failed, by error class: the same as --by failure.")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until nothing is left to run.")
@store_option
@jobs_option
@output_options
def status(
    sweep: str, by: str, failed: bool, watch: bool, store: str, address: str | None, form: str, output: Path | None
) -> None:
    """How SWEEP stands: tasks done, failed, running and pending, pace, and who is at work on it.

    A task counts as running while its worker gives signs of life; 60 s without one, and it does not. A worker that
    trains a dense model or prepares a shard counts as running the first task that waits for it.

    \b
    prunesweep status digits
    prunesweep status digits --by shard -f json
    prunesweep status digits --failed
    prunesweep status digits --watch
    prunesweep status digits --store /shared/results --address http://head:8265
    """
    import time

    from orchestrator.status import standing

    _say_jobs([job for job in _jobs(address) if job.sweep == sweep])
    opened = existing_store(store)
    while True:
        phases()("reading the store")
        found = standing(opened, sweep, "failure" if failed else by, warn)
        phases().rest()
        if watch and sys.stdout.isatty():
            unescaped(sys.stdout).write(_CLEAR)
        emit(found.table, form, output)
        _say_standing(sweep, found)
        if not watch or not (found.drivers or found.whole["running"] or found.whole["pending"]):
            return
        time.sleep(WATCH_SECONDS)


_CLEAR = "\033[2J\033[1;1H"
"""The control sequence that clears a terminal."""


def _say_standing(sweep: str, found: Standing) -> None:
    """What is true of the whole sweep, in lines for a person."""
    from orchestrator.progress import duration, slower, some

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
    for fallback in found.fallbacks:
        click.echo(slower(fallback), err=True)
    for phase in found.phases:
        click.echo(phase, err=True)
    for driver in found.drivers:
        sign = f"last sign of life {driver['seconds_since_sign']:.0f} s ago"
        where = f"on {driver['host']}, process {driver['pid']}, since {driver['started_at']} UTC"
        phase = f": {driver['phase']}" if driver["phase"] and not found.phases else ""
        click.echo(f"a driver is at work {where}, {sign}{phase}", err=True)
