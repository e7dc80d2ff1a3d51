"""submit, logs, stop: a sweep on a Ray cluster, through its job server."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cluster import check_job_server
from orchestrator.errors import ClusterError, UserError
from orchestrator.options import (
    absolute,
    absolute_store,
    data_root_option,
    existing_store,
    read_spec,
    replace_option,
    set_option,
    share_options,
    share_words,
    store_option,
)
from orchestrator.phases import phases
from orchestrator.render import SECRET, Rendering, render_options, write_manifest
from orchestrator.tracking import track_option
from storage.errors import StoreError
from usercode import is_code

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from orchestrator.documents import Document
    from orchestrator.jobs import Job
    from orchestrator.spec import SweepSpec

FOLLOW_SECONDS = 1.0
LOST_SECONDS = 60.0
"""So long `logs -f` tries to reach a job server that it has lost."""

AGAIN_SECONDS = 0.3
"""A second signal before the first was taken would be one."""

address_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    help="Ray's job server, as http://HOST:8265.",
)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a submitted job is given: its folder, prunesweep, its environment, its id."""
    options = (
        click.option(
            "--working-dir",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Upload this folder (without what its .gitignore names) and start there: for code of your own.",
        ),
        click.option(
            "--image-has-prunesweep", is_flag=True, help="Run the prunesweep that the cluster has; send none along."
        ),
        click.option(
            "--env",
            "env",
            multiple=True,
            metavar="KEY[=VALUE]",
            help="Variable for the job and its workers; without =VALUE, with its value here. Ray shows it to whoever "
            "may use the job server: secrets are refused. With --render a secret is given as KEY alone.",
        ),
        click.option("--no-wait", is_flag=True, help="Return once the job is submitted."),
        click.option("--submission-id", help="The job's id; one is made from the sweep's name otherwise."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("spec")
@set_option
@replace_option
@store_option
@data_root_option
@address_option
@job_options
@share_options
@track_option
@render_options
@click.pass_context
def submit(
    ctx: click.Context,
    spec: str,
    overrides: tuple[str, ...],
    replace: bool,
    store: str,
    data_root: str,
    address: str | None,
    track: str | None,
    rendering: Rendering | None,
    **given: Any,
) -> None:
    """Run SPEC as a job on the Ray cluster at ADDRESS; this machine may go.

    Every node must see the store and the data root under the names given. This prunesweep is sent along (not what it
    is built on: torch, ray, duckdb and the others are the cluster's), unless --image-has-prunesweep. Code of your
    own that the spec names, as package.module:build, travels with --working-dir. Without --no-wait the job's output
    is followed to its end.

    \b
    prunesweep submit sweep.yaml --address http://head:8265 --store /shared/results --no-wait
    prunesweep submit sweep.yaml --render rayjob --image REGISTRY/prunesweep:cuda --store s3://bucket/results
    prunesweep submit sweep.yaml --render slurm --store /shared/results -o sweep.sh
    prunesweep submit sweep.yaml --address http://head:8265 --working-dir . --env AWS_PROFILE=lab
    """
    from orchestrator.expand import cells
    from orchestrator.plan import check
    from orchestrator.preflight import check_models

    document, report = read_spec(spec, overrides), phases()
    data_root, location = absolute(data_root), absolute_store(store)
    with _started_in(given["working_dir"]):
        checked = check(document, data_root, report)
        more = share_words(given["max_workers"], given["priority"]) + (("--track", track) if track else ())
        dropping = ("--replace",) if replace else ()
        if rendering:
            env, references = _of_manifest(given["env"], rendering)
            folder = Path.cwd() if given["working_dir"] else None
            write_manifest(rendering, document, checked, more + dropping, env, folder, references)
            return
        server = _needed(address)
        _say_of_own_code(checked, given)
        if not replace:
            _check_kept(location, checked, document, data_root)
        check_models(cells(checked, document, data_root, report), data_root, report)
    words = ("run", "-", "--store", location, "--data-root", data_root, *more, *dropping)
    typed = () if spec == "-" else (spec, *(word for one in overrides for word in ("--set", one)))
    send(ctx, server, checked.name, location, data_root, words, document.text(), given, typed, more)


def _check_kept(location: str, spec: SweepSpec, document: Document, data_root: str) -> None:
    """Raise UserError where the job would refuse the spec because it drops planned tasks. The job decides where the
    store is not a folder of this machine, or the data are not here, without which the plan may differ."""
    from orchestrator.plan import check_data, planned
    from orchestrator.run import check_kept
    from storage.manifest import plan_content
    from storage.store import Store

    if "://" in location or not (store := Store(location)).exists():
        return
    try:
        check_data(spec.grid.dataset, data_root)
    except UserError:
        return
    if store.manifest(spec.name) is not None:
        check_kept(store, spec, plan_content(planned(spec, document, data_root, phases())))


def _say_of_own_code(spec: SweepSpec, given: dict[str, Any]) -> None:
    """Remind of --working-dir where the spec names code that the cluster may not have."""
    own = [name for name in (*spec.grid.model, *spec.grid.dataset, *spec.grid.pruner) if is_code(name)]
    if own and not given["working_dir"] and not given["image_has_prunesweep"]:
        click.echo(f"{own[0]} is code of your own: unless every node has it, give --working-dir . as well", err=True)


@contextlib.contextmanager
def _started_in(folder: Path | None) -> Iterator[None]:
    """As the job will be: in the folder that it is given, where it finds a person's own code."""
    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        yield


def send(
    ctx: click.Context,
    server: str,
    sweep: str,
    location: str,
    data_root: str,
    words: tuple[str, ...],
    stdin: str | None,
    given: dict[str, Any],
    spec: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> None:
    """Submit `prunesweep WORDS` as a job of a sweep; say what follows, and follow it unless --no-wait. `spec` (SPEC and
    its --set) and `more` options are what the job advises to give again.

    No --address among the words: Ray tells a job its cluster in RAY_ADDRESS, where `auto` might find another one.
    """
    from orchestrator.jobs import Job, job_server, submit_job

    job = Job(
        sweep,
        location,
        words,
        stdin,
        absolute(data_root),
        given["working_dir"],
        given["image_has_prunesweep"],
        tuple(_variable(one) for one in given["env"]),
        given["submission_id"],
        local=(location, absolute(data_root)),
        again=_given_again(server, location, absolute(data_root), spec, more, given),
    )
    name = submit_job(server, job, phases())
    phases().rest()
    click.echo(name)
    _say_next(name, server, job)
    if not given["no_wait"]:
        with job_server(server) as client:
            code = _follow(client, name, server)
        ctx.exit(code)


def _given_again(
    server: str, location: str, data_root: str, spec: tuple[str, ...], more: tuple[str, ...], given: dict[str, Any]
) -> tuple[tuple[str, str], ...]:
    """Return how a job was submitted, as its metadata. Values of --env are left out, since a job prints its advice."""
    from orchestrator.advice import OPTIONS, SPEC

    words = ["--address", server, "--store", location, "--data-root", data_root, *more]
    words += ["--working-dir", str(given["working_dir"])] if given["working_dir"] else []
    words += ["--image-has-prunesweep"] if given["image_has_prunesweep"] else []
    words += [word for one in given["env"] for word in ("--env", one.partition("=")[0])]
    return ((SPEC, shlex.join(spec)), (OPTIONS, shlex.join(words)))


def _variable(text: str) -> tuple[str, str]:
    """KEY=VALUE; KEY alone has the value it has here. The value is never part of a message.

    Raises UserError for a secret: of a job's variables Ray makes no secret.
    """
    from orchestrator.credentials import is_secret

    key, equals, value = _parted(text)
    value = value if equals else os.environ.get(key, "")
    if is_secret(key, value):
        raise UserError(
            f"--env {key} looks like a secret, and Ray shows a job's variables in its job server, in logs and in the "
            "command lines of workers. Set it in the environment in which the nodes start Ray (`ray start`, a "
            "Kubernetes Secret), use a role of the machines, or pass the name of a file that the nodes have "
            f"(--env {key}_FILE=PATH)"
        )
    if not equals and key not in os.environ:
        raise UserError(f"--env {key}: it is not set here; set it, or write {key}=VALUE")
    return key, value


def _parted(text: str) -> tuple[str, str, str]:
    key, equals, value = text.partition("=")
    if not key.isidentifier():
        raise UserError("--env: write it as KEY=VALUE, or as KEY for the value it has here")
    return key, equals, value


def _of_manifest(given: tuple[str, ...], rendering: Rendering) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Variables with values, and the names of secrets, of which a manifest has no value. Raises UserError."""
    from orchestrator.credentials import is_secret

    values, references = list[tuple[str, str]](), list[str]()
    for text in given:
        key, equals, value = _parted(text)
        if not is_secret(key, value if equals else os.environ.get(key, "")):
            values.append(_variable(text))
        elif not equals:
            references.append(key)
        else:
            where = "sbatch passes on your environment" if rendering.kind == "slurm" else f"a Secret {SECRET} holds it"
            raise UserError(
                f"--env {key}=.. looks like a secret, which does not go into a file: write --env {key}; {where}"
            )
    return tuple(values), tuple(references)


def _say_next(name: str, server: str, job: Job) -> None:
    where = shlex.quote(job.store)
    click.echo(
        f"submitted {job.sweep} as {name}. Next:\n"
        f"  prunesweep logs {name} -f --address {server}\n"
        f"  prunesweep stop {name} --address {server}\n"
        f"  prunesweep status {job.sweep} --store {where} --address {server}\n"
        f"  prunesweep corr {job.sweep} --store {where}",
        err=True,
    )


def _needed(address: str | None) -> str:
    if not address:
        raise UserError("which cluster? Give --address http://HOST:8265 (or set RAY_API_SERVER_ADDRESS)")
    check_job_server(address)
    return address


def _follow(client: JobSubmissionClient, job: str, server: str) -> int:
    """Print a job's output as it comes, and return its exit code."""
    phases().rest()
    shown = 0
    try:
        while True:
            status = _patiently(server, lambda: client.get_job_status(job))
            text = _patiently(server, lambda: client.get_job_logs(job))
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if status.is_terminal():
                break
            time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        click.echo(f"\n{job} goes on; `prunesweep stop {job} --address {server}` stops it", err=True)
        raise
    return _ended(client, job, server)


def _patiently(server: str, ask: Callable[[], Any]) -> Any:
    """An answer of the job server at an address, which may be out of reach for a while."""
    import requests

    give_up = time.monotonic() + LOST_SECONDS
    while True:
        try:
            return ask()
        except requests.exceptions.RequestException as error:
            if time.monotonic() > give_up:
                raise ClusterError(f"the job server at {server} has not answered for {LOST_SECONDS:.0f} s") from error
            time.sleep(FOLLOW_SECONDS)


def _ended(client: JobSubmissionClient, job: str, server: str) -> int:
    """Say how a job ended; return its exit code. One that was stopped counts as interrupted."""
    from orchestrator.cli import EXIT_CODES, INTERNAL, INTERRUPTED
    from orchestrator.jobs import resume_command

    info = client.get_job_info(job)
    status, code = info.status.value, info.driver_exit_code or 0
    if status == "SUCCEEDED":
        click.echo(f"{job}: succeeded", err=True)
        return 0
    if status == "STOPPED":
        click.echo(f"{job}: stopped; what was committed stays. Go on with\n  {resume_command(info, server)}", err=True)
        return INTERRUPTED
    why = f"exit code {code}" if code > 0 else info.message or "Ray does not say why"
    click.echo(f"{job}: failed: {why}", err=True)
    if info.driver_exit_code is None:  # Ray could not run it, or lost it
        return EXIT_CODES[ClusterError]
    return code if code > 0 else INTERNAL


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
    from orchestrator.jobs import find_jobs, job_server

    with job_server(_needed(address)) as client:
        job = str(find_jobs(client, sweep)[0].submission_id)
        code = _follow(client, job, str(address)) if follow else _show(client, job)
    ctx.exit(code)


def _show(client: JobSubmissionClient, job: str) -> int:
    click.echo(client.get_job_logs(job), nl=False)
    return 0


@click.command()
@click.argument("sweep")
@click.option(
    "--drain/--now",
    default=True,
    help="--drain (the default): tasks at work are checkpointed, within 30 s. --now: they are lost.",
)
@store_option
@address_option
def stop(sweep: str, drain: bool, store: str, address: str | None) -> None:
    """Stop SWEEP: with --address its jobs on that cluster (or one, by its id), without the run on this machine.

    What is committed stays either way; `resume` goes on from there.

    \b
    prunesweep stop digits
    prunesweep stop digits --address http://head:8265
    prunesweep stop digits --address http://head:8265 --now
    """
    from orchestrator.drivers import drivers
    from storage.signs import is_here

    if address:
        _stop_jobs(sweep, address, drain)
        return
    found = drivers(existing_store(store), sweep)
    alive = [driver for driver in found if is_here(driver)]
    if not alive:
        elsewhere = ", ".join(sorted({driver["host"] for driver in found}))
        hint = f" (one is noted on {elsewhere}: stop it there)" if elsewhere else ""
        raise UserError(f"no run of {sweep} is at work on this machine{hint}; a submitted one needs --address")
    jobs = [driver["job"] for driver in alive if driver.get("job")]
    for driver in alive:
        if not driver.get("job"):
            _signal(driver["pid"], drain)
            click.echo(f"asked process {driver['pid']} to stop; `prunesweep resume {sweep}` goes on", err=True)
    if jobs:  # Ray would take it for one that has failed
        raise UserError(f"{jobs[0]} is a Ray job: `prunesweep stop {jobs[0]} --address http://HOST:8265` stops it")


def _signal(pid: int, drain: bool) -> None:
    """Ask a process to stop: once, and its tasks are checkpointed; twice, and it ends at once."""
    try:
        os.kill(pid, signal.SIGTERM)
        if not drain:
            time.sleep(AGAIN_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        raise UserError(f"cannot stop process {pid}: {error.strerror}") from error


def _stop_jobs(sweep: str, address: str, drain: bool) -> None:
    from orchestrator.jobs import STORE, find_jobs, job_server

    with job_server(address) as client:
        found = find_jobs(client, sweep)
        running = [job for job in found if not job.status.is_terminal()]
        if not running:
            raise UserError(f"{found[0].submission_id} is not running: {found[0].status.value.lower()}")
        for job in running:
            client.stop_job(str(job.submission_id))
        if not drain:
            for job in running:
                if client.get_job_status(str(job.submission_id)).is_terminal():
                    continue
                _hurry(str(job.submission_id), str((job.metadata or {}).get(STORE)))
        for job in running:
            _await_end(client, job, address)


def _await_end(client: JobSubmissionClient, job: JobDetails, server: str) -> None:
    """Until a job that was asked to stop has ended; say how."""
    from orchestrator.jobs import resume_command

    name = str(job.submission_id)
    while not (status := client.get_job_status(name)).is_terminal():
        time.sleep(0.2)
    again = resume_command(job, server)
    click.echo(f"{name}: {status.value.lower()}; what is committed stays. Go on with\n  {again}", err=True)


def _hurry(job: str, location: str) -> None:
    """Note in the store that a job's driver is not to wait for its workers, or say that it is not seen there.

    After it was asked to stop: workers take the note for that wish, and their driver is to know of it first.
    """
    from orchestrator.drivers import hurry

    try:
        seen = hurry(existing_store(location), job)
    except StoreError:
        seen = False
    if not seen:
        click.echo(f"the driver of {job} is not seen in its store from here: it ends as with --drain", err=True)
