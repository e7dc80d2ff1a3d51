"""run, plan, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli_cluster import job_options
from orchestrator.cluster import is_job_server
from orchestrator.errors import UserError
from orchestrator.options import (
    absolute,
    absolute_store,
    data_root_option,
    emit,
    existing_store,
    inline_option,
    output_options,
    read_spec,
    replace_option,
    run_address_option,
    set_option,
    share_options,
    share_words,
    store_option,
)
from orchestrator.phases import phases
from orchestrator.tracking import track_option
from storage.errors import StoreError

if TYPE_CHECKING:
    from orchestrator.advice import Given
    from orchestrator.plan import Plan
    from orchestrator.run import Options, Outcome
    from storage.store import Store


resume_address_option = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="A running Ray cluster (auto, or HOST:PORT); or a job server (http://HOST:8265), to resume as a job there.",
)


def _options(
    ctx: click.Context,
    data_root: str,
    address: str | None,
    inline: bool,
    track: str | None,
    max_workers: int | None,
    priority: float,
) -> Options:
    from orchestrator.run import Options
    from orchestrator.tracking import check_tracker

    check_tracker(track, inline)
    return Options(
        absolute(data_root),
        None if inline else address,
        inline,
        ctx.obj["debug"],
        track=track,
        max_workers=max_workers,
        priority=priority,
    )


@click.command()
@click.argument("spec")
@set_option
@replace_option
@store_option
@data_root_option
@run_address_option
@inline_option
@share_options
@track_option
@output_options
@click.pass_context
def run(
    ctx: click.Context,
    spec: str,
    overrides: tuple[str, ...],
    replace: bool,
    store: str,
    data_root: str,
    address: str | None,
    inline: bool,
    track: str | None,
    max_workers: int | None,
    priority: float,
    form: str,
    output: Any,
) -> None:
    """Expand SPEC (a file, a study's name, or - for standard input), run it, and print the correlation table.

    Tasks that already have a result are skipped, so running an existing sweep again resumes it. A wider grid adds tasks
    to the sweep. A grid that drops planned tasks is refused without --replace.

    \b
    prunesweep run digits
    prunesweep run sweep.yaml --set grid.ratio=[0.2,0.4] --set retrain.epochs=3
    prunesweep run sweep.yaml --store /shared/results --address auto
    """
    from orchestrator.run import run_spec
    from storage.store import Store

    document = read_spec(spec, overrides)
    opened = Store(store)
    name = str(document.data.get("name", spec))
    options = _options(ctx, data_root, address, inline, track, max_workers, priority)
    words = () if spec == "-" else (spec, *(word for one in overrides for word in ("--set", one)))
    started = _given(words, store, data_root, address, inline, track, *share_words(max_workers, priority))
    options = dataclasses.replace(options, again=started.resume(name))
    outcome = _or_say_how_to_resume(
        started.resume(name), lambda: run_spec(opened, document, options, phases(), replace=replace)
    )
    _close(ctx, opened, outcome, started, form, output)


@click.command()
@click.argument("sweep")
@click.option("--failed", is_flag=True, help="Only tasks that have a failed row.")
@click.option("--where", metavar="SQL", help="Only tasks for which this holds, over the view `tasks`.")
@click.option("--shard", metavar="ID", help="Only the tasks of one shard.")
@store_option
@data_root_option
@resume_address_option
@inline_option
@share_options
@track_option
@job_options
@output_options
@click.pass_context
def resume(
    ctx: click.Context,
    sweep: str,
    failed: bool,
    where: str | None,
    shard: str | None,
    store: str,
    data_root: str,
    address: str | None,
    inline: bool,
    track: str | None,
    max_workers: int | None,
    priority: float,
    form: str,
    output: Any,
    **given: Any,
) -> None:
    """Run exactly what SWEEP has unfinished: its tasks without a row `done`.

    With --address http://HOST:8265 that is a job of its own on that cluster, as `submit` makes one, and the options
    of jobs apply; with HOST:PORT or auto this process runs it on that cluster, as `run` does.

    \b
    prunesweep resume digits
    prunesweep resume digits --failed
    prunesweep resume digits --where "candidate < 10"
    prunesweep resume digits --address http://head:8265 --store /shared/results --no-wait
    """
    from orchestrator.run import run_sweep

    if address and is_job_server(address) and not inline:
        more = share_words(max_workers, priority) + (("--track", track) if track else ())
        _resume_there(ctx, sweep, _narrowed(failed, where, shard), more, store, data_root, address, given)
        return
    if meant := [f"--{name.replace('_', '-')}" for name, value in given.items() if value]:
        raise UserError(f"{meant[0]} is about a job: it needs --address http://HOST:8265")

    opened = existing_store(store)
    manifest = opened.newest(sweep)
    only = _chosen(opened, sweep, failed, where, shard)
    options = _options(ctx, data_root, address, inline, track, max_workers, priority)
    started = _given((), store, data_root, address, inline, track, *share_words(max_workers, priority))
    options = dataclasses.replace(options, again=started.resume(sweep))
    outcome = _or_say_how_to_resume(started.resume(sweep), lambda: run_sweep(opened, manifest, options, only, phases()))
    _close(ctx, opened, outcome, started, form, output)


def _narrowed(failed: bool, where: str | None, shard: str | None) -> tuple[str, ...]:
    """The options that narrow a resume, as they were given."""
    words = ("--failed",) if failed else ()
    words += ("--where", where) if where else ()
    return words + (("--shard", shard) if shard else ())


def _resume_there(
    ctx: click.Context,
    sweep: str,
    narrowed: tuple[str, ...],
    more: tuple[str, ...],
    store: str,
    data_root: str,
    server: str,
    given: dict[str, Any],
) -> None:
    """Submit a job that resumes a sweep. The store may be one that only the cluster sees."""
    from orchestrator.cli_cluster import send

    location = absolute_store(store)
    with contextlib.suppress(StoreError):
        existing_store(store).newest(sweep)
    words = ("resume", sweep, *narrowed, *more, "--store", location, "--data-root", absolute(data_root))
    send(ctx, server, sweep, location, data_root, words, None, given, more=more)


def _chosen(store: Store, sweep: str, failed: bool, where: str | None, shard: str | None) -> frozenset[str] | None:
    """The task ids that --failed, --where and --shard leave; None when all are wanted."""
    from storage.sql import quoted

    conditions = [f"({where})"] if where else []
    conditions += ["status = 'failed'"] if failed else []
    conditions += [f"shard = {quoted(shard)}"] if shard else []
    if not conditions:
        return None
    query = f"select task_id from tasks where sweep = {quoted(sweep)} and {' and '.join(conditions)}"
    found = frozenset(row[0] for row in store.sql(query).fetchall())
    if shard and not found:
        raise UserError(f"sweep {sweep} has no such task in a shard {shard}; `prunesweep status {sweep} --by shard`")
    return found


def _or_say_how_to_resume(command: str, work: Callable[[], Outcome]) -> Outcome:
    """`work`; when it is interrupted, what to type to go on."""
    try:
        return work()
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted: what was committed stays. Go on with\n  {command}", err=True)
        raise


def _given(
    spec: tuple[str, ...],
    store: str,
    data_root: str,
    address: str | None,
    inline: bool,
    track: str | None,
    *more: str,
) -> Given:
    """Return how a person started this run: SPEC with its --set, and the options."""
    from orchestrator.advice import given

    where = ("--inline",) if inline else ("--address", address) if address else ()
    words = ("--store", store, "--data-root", data_root, *more, *(("--track", track) if track else ()))
    return given(spec, words, where)


def _close(ctx: click.Context, store: Store, outcome: Outcome, started: Given, form: str, output: Any) -> None:
    """Print the table, then what went wrong; exit 3 if anything did."""
    from orchestrator.advice import next_steps
    from orchestrator.cli import FAILED_TASKS
    from orchestrator.cli_corr import correlations, emit_correlations, say_fallbacks, say_notes
    from orchestrator.progress import some

    if outcome.done:
        phases()("computing the statistics")
        emit_correlations(correlations(store, outcome.sweep)[0], form, output)
        say_fallbacks(store, outcome.sweep)
        say_notes(form)
    for problem in outcome.problems:
        click.echo(f"problem: {problem}", err=True)
    if outcome.complete:
        click.echo(f"{outcome.sweep}: {some(outcome.done, 'task')} done, none left", err=True)
        return
    click.echo(
        f"{outcome.sweep}: {outcome.done} tasks done, {outcome.failed} failed, {outcome.pending} pending", err=True
    )
    if outcome.failed:
        where = shlex.quote(store.location)
        click.echo(f'see    prunesweep query "select * from failures" --store {where}', err=True)
    click.echo(next_steps(store, outcome.sweep, started), err=True)
    sys.stdout.flush()
    ctx.exit(FAILED_TASKS)


@click.command()
@click.argument("spec")
@set_option
@click.option("--preflight", is_flag=True, help="Also build, trace, prune and run each network once, as `run` will.")
@store_option
@data_root_option
@output_options
def plan(
    spec: str, overrides: tuple[str, ...], preflight: bool, store: str, data_root: str, form: str, output: Any
) -> None:
    """Say what `run SPEC` would do: one line per cell. Runs nothing, writes nothing.

    \b
    prunesweep plan lenet5-mini-conv1
    prunesweep plan sweep.yaml --set grid.seed=[0,1,2] -f json
    prunesweep plan sweep.yaml --preflight
    """
    import pyarrow as pa

    from orchestrator.dropped import change_of
    from orchestrator.expand import cells, sets_of
    from orchestrator.plan import check, check_data, estimate, make_plan, planned_table
    from orchestrator.preflight import check_models
    from orchestrator.progress import duration, some
    from storage.store import Store

    document, report = read_spec(spec, overrides), phases()
    checked = check(document, absolute(data_root), report)
    opened = Store(store)
    try:
        check_data(checked.grid.dataset, absolute(data_root))
    except UserError as error:
        if preflight:  # it needs the shape of the samples
            raise
        click.echo(f"warning: {error}", err=True)  # the cluster that runs it may have them
    if preflight:
        check_models(cells(checked, document, absolute(data_root), report), absolute(data_root), report)
    table = planned_table(checked, document, absolute(data_root), report)
    report("looking for finished tasks")
    change, found = change_of(opened, checked, table), make_plan(opened, checked, table)
    report("estimating the cost")
    cost = estimate(opened, found)
    emit(pa.Table.from_pylist(_cell_lines(found)), form, output)
    for line in dict.fromkeys(line for one in found.cells for line in sets_of(one.cell)):
        click.echo(line, err=True)
    known = f"about {duration(cost.worker_seconds)} of one worker"
    if cost.unknown:
        known = (
            "unknown until a first task of its recipe is done"
            if not cost.worker_seconds
            else (f"{known}, and {cost.unknown} tasks of unknown cost")
        )
    click.echo(
        f"{checked.name}: {some(found.total, 'task')} in {some(len(found.cells), 'cell')}: "
        f"{found.statuses['done']} done, {found.statuses['failed']} failed, {found.statuses['pending']} new; "
        f"{some(len(found.shards), 'shard')} and {some(len(found.denses), 'dense model')} to run; cost: "
        f"{known if found.unfinished else 'nothing'}",
        err=True,
    )
    if change and (note := change.note()):
        click.echo(note, err=True)
    if change and change.dropped:
        click.echo(f"warning: {change.warning()}\n`run` refuses this spec without --replace", err=True)


def _cell_lines(plan: Plan) -> list[dict[str, object]]:
    """One line per cell: what it has and how much of it is done."""
    from storage.records import titles

    named = titles(one.cell for one in plan.cells)
    seeds = len(plan.spec.grid.seed)
    return [
        {
            "cell": named[one.cell.cell_id],
            "candidates": one.statuses.total() // seeds,
            "seeds": seeds,
            "tasks": one.statuses.total(),
            "done": one.statuses["done"],
            "failed": one.statuses["failed"],
            "new": one.statuses["pending"],
        }
        for one in plan.cells
    ]
