"""doctor: this machine, a cluster, the store, the data; and which networks can be pruned."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.errors import ClusterError, UserError
from orchestrator.options import (
    absolute,
    absolute_store,
    data_root_option,
    emit,
    output_options,
    store_option,
    write_file,
)
from orchestrator.phases import phases

if TYPE_CHECKING:
    from orchestrator.checks import Check


@click.command()
@click.option("--models", multiple=True, metavar="NAME", help="Instead, try whether these networks can be pruned.")
@click.option("--address", help="Also look at a Ray cluster: auto, HOST:PORT, or its job server as http://HOST:8265.")
@store_option
@data_root_option
@output_options
@click.pass_context
def doctor(
    ctx: click.Context,
    models: tuple[str, ...],
    address: str | None,
    store: str,
    data_root: str,
    form: str,
    output: Path | None,
) -> None:
    """Check this machine, the store and the data; each line says what to do. Exits 5 if the store is bad, 4 if a
    cluster is out of reach, 1 if anything else is bad.

    With --address also that cluster, node by node: versions, GPUs, prunesweep, the store and the data as a worker
    sees them. Through a job server a job of its own looks.

    With --models, prune the networks named on the CPU, a quarter of every layer, and say what came of it: `all` are
    those of docs/support.md. Exits 2 if one cannot be pruned at all.

    \b
    prunesweep doctor --store /shared/results --data-root /shared/data
    prunesweep doctor --address http://head:8265 --store /shared/results --data-root /shared/data
    prunesweep doctor --models torchvision/resnet18,timm/vit_tiny_patch16_224
    prunesweep doctor --models all -f markdown -o docs/support.md
    """
    import pyarrow as pa

    from orchestrator.checks import BAD, data, libraries, machine
    from orchestrator.checks import store as of_store

    if models:
        return _support(ctx, models, form, output)
    lines, report = [*machine()], phases()
    report("importing the libraries, and building the compiled code")
    lines += libraries()
    report("checking the store and the data")
    lines += [*of_store(store), *data(absolute(data_root))]
    lines += _cluster(address, store, absolute(data_root)) if address else []
    columns = ("check", "result", "what")
    emit(pa.Table.from_pylist([dict(zip(columns, line, strict=True)) for line in lines]), form, output)
    bad = [check for check, result, _ in lines if result == BAD]
    if bad:
        sys.stdout.flush()
        ctx.exit(_code(bad))
    return None


def _code(bad: Iterable[str]) -> int:
    """The exit code of what is bad."""
    if "cluster" in bad:
        return 4
    return 5 if all(check.split()[-1] == "store" for check in bad) else 1


def _cluster(address: str, store: str, data_root: str) -> list[Check]:
    """What there is to say of a cluster, by a job of its own or from here."""
    from orchestrator.checks import BAD
    from orchestrator.cluster import is_job_server

    try:
        if is_job_server(address):
            return _by_a_job(address, store, data_root)
        return _from_here(address, store, data_root)
    except ClusterError as error:
        return [("cluster", BAD, str(error))]


def _from_here(address: str, store: str, data_root: str) -> list[Check]:
    import ray

    from orchestrator import checks
    from orchestrator.cluster import check_reachable, connected
    from orchestrator.probe import versions
    from orchestrator.run import Options

    if address == "auto":  # as Ray itself has it: a job is told its cluster there
        address = os.environ.get("RAY_ADDRESS", address)
    phases()(f"connecting to the Ray cluster at {address}")
    check_reachable(address)
    with connected(Options(address=address), claiming=False):
        phases()("waiting for the nodes to answer")
        nodes = ray.nodes()
        found = list(checks.cluster(nodes, address))
        here, ours = versions(), checks.code()
        for report in checks.reports(nodes, store, data_root):
            found += checks.node(report, here, ours, store)
    return found


def _by_a_job(address: str, store: str, data_root: str) -> list[Check]:
    """The lines of a job that looks from the cluster's head."""
    from orchestrator.jobs import Job, finished, submission_id, submit_job

    location = absolute_store(store)
    words = ("doctor", "--address", "auto", "--store", location, "--data-root", data_root, "-f", "jsonl")
    job = Job("doctor", location, words, submission_id=submission_id("doctor"), of_a_sweep=False)
    name = submit_job(address, job, phases())
    click.echo(f"looking from the cluster, as job {name}", err=True)
    phases()(f"waiting for job {name}")
    text = finished(address, name)
    found = [(f"there: {check}", result, what) for check, result, what in _lines(text)]
    if not found:
        last = "\n".join(text.strip().splitlines()[-5:])
        raise ClusterError(f"the job {name} could not look: {last}")
    return [("cluster", "ok", f"{address}: its job server answers and runs jobs"), *found]


def _lines(text: str) -> Iterable[Check]:
    for line in text.splitlines():
        try:
            said = json.loads(line)
            yield said["check"], said["result"], said["what"]
        except (ValueError, TypeError, KeyError):  # what else a job's output has
            continue


def _support(ctx: click.Context, asked: tuple[str, ...], form: str, output: Path | None) -> None:
    """The table of which networks can be pruned; in markdown with what it says of itself."""
    import pyarrow as pa

    from models.registry import check_model
    from orchestrator.support import FAILS, columns, findings, names_of, page

    names = names_of(asked)
    for name in names:
        try:
            check_model(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    found = []
    phases()("trying network", 1, len(names))
    for i, finding in enumerate(findings(names), 1):
        click.echo(f"{i}/{len(names)} {finding.network}: {finding.result}", err=True)
        found.append(finding)
        phases()("trying network", min(i + 1, len(names)), len(names))
    if form == "markdown" and output is not None:
        write_file(output, lambda: output.write_text(page(found)))
    else:
        emit(pa.Table.from_pylist([columns(one) for one in found]), form, output)
    if len(asked) and "all" not in asked and any(one.result == FAILS for one in found):
        ctx.exit(2)
