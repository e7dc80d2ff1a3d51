"""A run: plan, record, run what is unfinished, say how it ended."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from orchestrator.account import Account
from orchestrator.cluster import check_reachable, connected
from orchestrator.documents import Document
from orchestrator.drivers import Driver, heeding_signals
from orchestrator.dropped import change_of, check_nothing_dropped
from orchestrator.errors import UserError
from orchestrator.expand import cells, keeps, sets_of
from orchestrator.plan import (
    PLAN_COLUMNS,
    STATUSES,
    Plan,
    check,
    check_data,
    check_room,
    is_in,
    plan_of_sweep,
    planned,
    statuses_of,
)
from orchestrator.preflight import check_models
from orchestrator.progress import progress, say, some
from orchestrator.queue import Queue
from storage.errors import StoreError
from storage.manifest import plan_content, read_plan
from storage.phases import silent
from storage.sql import quoted
from storage.upkeep import tidy
from workers.pulse import Limits

if TYPE_CHECKING:
    from orchestrator.phases import Phases
    from orchestrator.spec import Resources, SweepSpec
    from storage.manifest import Manifest
    from storage.store import Store


@dataclass(frozen=True)
class Options:
    """How to run: where, with what, and how loudly. The resources are per shard."""

    data_root: str = "data"
    address: str | None = None
    inline: bool = False
    debug: bool = False
    workers: int | str = "auto"
    cpus: float = 1
    gpus: float | str = "auto"
    processes: int = 1
    limits: Limits = field(default_factory=Limits)
    track: str | None = None
    max_workers: int | None = None
    priority: float = 1.0
    again: str = ""
    """The command that resumes this run, for messages."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the tasks that were asked for by status, and what went wrong besides."""

    sweep: str
    done: int
    failed: int
    pending: int
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.failed or self.pending or self.problems)


def run_spec(
    store: Store, document: Document, options: Options, phases: Phases | None = None, *, replace: bool = False
) -> Outcome:
    """Check, expand, record and run a spec. Nothing is written before spec, data, networks, store and cluster
    are checked. Raises UserError where the spec drops planned tasks of its sweep, unless `replace`."""
    report = phases or silent
    spec = check(document, options.data_root, report)
    check_data(spec.grid.dataset, options.data_root)
    expansion = plan_content(planned(spec, document, options.data_root, report))
    note = None if replace else check_kept(store, spec, expansion)
    planned_cells = list(cells(spec, document, options.data_root, report))
    check_models(planned_cells, options.data_root, report)
    for line in dict.fromkeys(line for cell in planned_cells for line in sets_of(cell)):
        say(line)
    report("checking the store and the cluster")
    store.check_writable()
    check_reachable(options.address)
    if note:
        say(note)
    manifest = store.commit_manifest(spec.name, document.text(), expansion)
    return run_sweep(store, manifest, options, phases=phases)


def check_kept(store: Store, spec: SweepSpec, expansion: bytes) -> str | None:
    """Return a line on the tasks that are planned anew because the user's code or files changed, or None. Raises
    UserError where a new expansion (`plan_content`) drops planned tasks of its sweep."""
    if store.manifest(spec.name) is None:
        return None
    change = change_of(store, spec, read_plan(expansion, PLAN_COLUMNS))
    check_nothing_dropped(change)
    return change.note() if change else None


def run_sweep(
    store: Store,
    manifest: Manifest,
    options: Options,
    only: frozenset[str] | None = None,
    phases: Phases | None = None,
) -> Outcome:
    """Run exactly what a recorded sweep has unfinished (of `only`, where given).

    Raises KeyboardInterrupt once it was asked to stop and has; StoreError where the store gave out.
    """
    report = phases or silent
    report("looking for finished tasks")
    check_reachable(options.address)
    plan = plan_of_sweep(store, manifest, only)
    check_dense_models(plan, manifest.sweep)
    if plan.shards:
        check_data({shard.needs.dataset for shard in plan.shards}, options.data_root)
        check_room(store, plan)
    say(opening(manifest.sweep, plan, store))
    problems: list[str] = []
    if plan.shards:
        problems = drive(store, plan, with_resources(options, plan.spec.resources), manifest.sweep, phases)
    report("merging row files")
    finish(store)
    report("reading the results")
    say_what_is_not_kept(store, plan, manifest.sweep)
    return outcome(store, manifest, problems, only)


def check_dense_models(plan: Plan, sweep: str) -> None:
    """Raise UserError where a task is to be pruned from a dense model that is known from imported logs alone."""
    n = sum(len(shard.tasks) for shard in plan.shards if shard.needs.is_imported)
    if n:
        raise UserError(
            f"{sweep} was imported from logs: {some(n, 'task')} without a row cannot be run, since the dense weights "
            "they start from are not here. Import longer logs, or run the same spec under another name"
        )


def with_resources(options: Options, wanted: Resources) -> Options:
    """The options of a run with what its spec asks for."""
    limits = Limits(
        task_seconds=None if wanted.task_minutes is None else wanted.task_minutes * 60,
        memory_bytes=None if wanted.memory_gb is None else int(wanted.memory_gb * 10**9),
        checkpoint_seconds=wanted.checkpoint_minutes * 60,
    )
    asked = {name: getattr(wanted, name) for name in ("workers", "cpus", "gpus", "processes")}
    return replace(options, **asked, limits=limits)


def finish(store: Store) -> None:
    """What every run does at its end: remove what is left over, merge the row files."""
    try:
        statuses = cache(store.statuses)  # asked for only where a checkpoint was left
        tidy(store, lambda task_id: statuses().get(task_id) == "done")
        for problem in store.compact().aside:
            say(f"set aside {problem.file}: {problem.reason}")
    except StoreError as error:  # every row is committed: no reason to call the run a failure
        say(f"the store could not be tidied, the next run tries again: {error}")


def opening(sweep: str, plan: Plan, store: Store) -> str:
    """What a run is about to do, in a line."""
    done = plan.statuses["done"]
    if not plan.unfinished and done == plan.total:
        return f"{sweep}: all {plan.total} tasks are done; nothing to run"
    if not plan.unfinished:
        return f"{sweep}: {done} of {plan.total} tasks are done; none of the others was asked for; nothing to run"
    dense = f", {some(len(plan.denses), 'dense model')} to train first" if plan.denses else ""
    return (
        f"{sweep}: {some(plan.total, 'task')} in {some(len(plan.cells), 'cell')}, {done} done, "
        f"{plan.unfinished} to run in {some(len(plan.shards), 'shard')}{dense}; store {store.location}"
    )


def say_what_is_not_kept(store: Store, plan: Plan, sweep: str) -> None:
    """`retrain.keep` does not run a task again: tell which networks it comes too late for."""
    keeping = [recipe for recipe, keep in keeps(plan.spec.retrain).items() if keep != "none"]
    if not keeping:
        return
    lost = store.sql(
        f"select count(*) from tasks where sweep = {quoted(sweep)} and status = 'done' and kept_network is null"
        f" and not diverged and list_contains({keeping}, recipe_id)"
    ).fetchall()[0][0]
    if lost:
        say(f"{sweep}: {lost} tasks were done before `retrain.keep` was set: their networks are not kept")


def outcome(store: Store, manifest: Manifest, problems: list[str], only: frozenset[str] | None) -> Outcome:
    """The sweep as the store has it now, or those of its tasks that were asked for."""
    task_ids = store.plan_table(manifest, ["task_id"])["task_id"]
    status = statuses_of(store, task_ids)
    if only is not None:
        status = status[is_in(task_ids, only)]
    counts = {name: int((status == place).sum()) for place, name in enumerate(STATUSES)}
    return Outcome(manifest.sweep, **counts, problems=tuple(problems))


def asked_of(options: Options) -> dict[str, float | None]:
    """What was asked of a driver, as its note shows it."""
    return {"priority": options.priority, "max_workers": options.max_workers}


def drive(store: Store, plan: Plan, options: Options, sweep: str, phases: Phases | None = None) -> list[str]:
    """Run a plan's shards on Ray, or in this process; return what went wrong besides failed tasks."""
    report = phases or silent
    report("starting")
    queue = Queue.of(plan.shards, plan.denses, random.SystemRandom())
    with (
        progress(plan.unfinished, phases) as shown,
        Driver(store, sweep, options.address, shown.counts, asked_of(options)) as driver,
        heeding_signals(driver.stop),
    ):
        account = Account(store, queue, shown)
        driver.report, driver.see_phases = account.say, shown.see_phases
        if options.inline:
            if options.processes > 1:
                raise UserError("--inline is one process: leave it out, or set resources.processes to 1")
            from orchestrator.inline import run_inline

            report("starting the worker")
            run_inline(account, store, options, driver)
        else:
            from orchestrator.nodes import check_nodes
            from orchestrator.ray_runner import run_on_ray

            report(f"connecting to the Ray cluster at {options.address}" if options.address else "starting Ray")
            # Again, inside: ray.init takes SIGTERM for itself.
            with connected(options, driver), heeding_signals(driver.stop):
                report("checking the nodes")
                check_nodes(store, options.data_root, {shard.needs.dataset for shard in plan.shards})
                report("waiting for a worker to start")
                run_on_ray(account, store, options, driver)
                report("stopping Ray")
        if driver.stop.is_set():
            raise KeyboardInterrupt
    if queue.store_problem:
        raise StoreError(f"{queue.store_problem}; what was committed stays, and `prunesweep resume {sweep}` goes on")
    return queue.problems
