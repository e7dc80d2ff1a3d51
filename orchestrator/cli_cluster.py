"""submit, logs, stop: a sweep on a Ray cluster, through its job server."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import click

from orchestrator.errors import UserError
from orchestrator.options import absolute, data_root_option, existing_store, read_spec, set_option, store_option
from orchestrator.render import Rendering, render_options, write_manifest

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

address_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    help="Ray's job server, as http://HOST:8265.",
)


@click.command()
@click.argument("spec")
@set_option
@store_option
@data_root_option
@address_option
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@render_options
@click.pass_context
def submit(
    ctx: click.Context,
    spec: str,
    overrides: tuple[str, ...],
    store: str,
    data_root: str,
    address: str | None,
    no_wait: bool,
    rendering: Rendering | None,
) -> None:
    """Run SPEC as a job on the Ray cluster at ADDRESS; this machine may go.

    Every node must see the store and the data root under the names given, and have prunesweep
    installed. Without --no-wait the job's output is followed to its end.

    \b
    prunesweep submit sweep.yaml --address http://head:8265 --store /shared/results --no-wait
    prunesweep submit sweep.yaml --render rayjob --image REGISTRY/prunesweep:cuda --store s3://bucket/results
    prunesweep submit sweep.yaml --render slurm --store /shared/results -o sweep.sh
    """
    from orchestrator.expand import cells
    from orchestrator.jobs import job_server, submit_job
    from orchestrator.plan import check
    from orchestrator.preflight import check_models
    from storage.store import Store

    document = read_spec(spec, overrides)
    checked = check(document, absolute(data_root))
    if rendering:
        write_manifest(rendering, document, checked, store, data_root)
        return
    opened = Store(store)
    location = opened.absolute
    server = _needed(address)
    check_models(cells(checked, document, absolute(data_root)), absolute(data_root))
    job = submit_job(server, checked.name, document.text(), location, absolute(data_root))
    click.echo(job)
    click.echo(
        f"submitted {checked.name} as {job}. Next:\n"
        f"  prunesweep logs {job} -f --address {server}\n"
        f"  prunesweep stop {job} --address {server}\n"
        f"  prunesweep status {checked.name} --store {location}\n"
        f"  prunesweep corr {checked.name} --store {location}",
        err=True,
    )
    if not no_wait:
        with job_server(server) as client:
            code = _follow(client, job)
        ctx.exit(code)


def _needed(address: str | None) -> str:
    if not address:
        raise UserError("which cluster? Give --address http://HOST:8265 (or set RAY_API_SERVER_ADDRESS)")
    return address


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's output as it comes, and return its exit code."""
    shown = 0
    while True:
        status = client.get_job_status(job)
        text = client.get_job_logs(job)
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if status.is_terminal():
            break
        time.sleep(0.5)
    info = client.get_job_info(job)
    click.echo(f"{job}: {status.value.lower()}{_why(info.message, status.value)}", err=True)
    if status.value == "SUCCEEDED":
        return 0
    return info.driver_exit_code if info.driver_exit_code and info.driver_exit_code > 0 else 1


def _why(message: str | None, status: str) -> str:
    return f": {message}" if message and status == "FAILED" else ""


@click.command()
@click.argument("sweep")
@click.option("-f", "--follow", is_flag=True, help="Follow the output to the job's end; exit with its code.")
@address_option
@click.pass_context
def logs(ctx: click.Context, sweep: str, follow: bool, address: str | None) -> None:
    """Show the output of a submitted SWEEP (its name, or a submission id).

    \b
    prunesweep logs digits -f --address http://head:8265
    """
    from orchestrator.jobs import find_job, job_server

    with job_server(_needed(address)) as client:
        job = str(find_job(client, sweep).submission_id)
        code = _follow(client, job) if follow else _show(client, job)
    ctx.exit(code)


def _show(client: JobSubmissionClient, job: str) -> int:
    click.echo(client.get_job_logs(job), nl=False)
    return 0


@click.command()
@click.argument("sweep")
@store_option
@address_option
def stop(sweep: str, store: str, address: str | None) -> None:
    """Stop SWEEP: with --address the job on that cluster, without the run on this machine.

    What is committed stays; `resume` goes on from there.

    \b
    prunesweep stop digits
    prunesweep stop digits --address http://head:8265
    """
    from orchestrator.drivers import drivers
    from storage.signs import is_here

    if address:
        _stop_job(sweep, address)
        return
    found = drivers(existing_store(store), sweep)
    alive = [driver for driver in found if is_here(driver)]
    if not alive:
        elsewhere = ", ".join(sorted({driver["host"] for driver in found}))
        hint = f" (one is noted on {elsewhere}: stop it there)" if elsewhere else ""
        raise UserError(f"no run of {sweep} is at work on this machine{hint}; a submitted one needs --address")
    for driver in alive:
        try:
            os.kill(driver["pid"], signal.SIGTERM)
        except (ProcessLookupError, PermissionError) as error:
            raise UserError(f"cannot stop process {driver['pid']}: {error.strerror}") from error
        click.echo(f"asked process {driver['pid']} to stop; `prunesweep resume {sweep}` goes on", err=True)


def _stop_job(sweep: str, address: str) -> None:
    from orchestrator.jobs import find_job, job_server

    with job_server(address) as client:
        job = find_job(client, sweep)
        name = str(job.submission_id)
        if job.status.is_terminal():
            raise UserError(f"{name} is not running: {job.status.value.lower()}")
        client.stop_job(name)
        while not (status := client.get_job_status(name)).is_terminal():
            time.sleep(0.2)
        click.echo(f"{name}: {status.value.lower()}; what is committed stays", err=True)
