"""A run: plan, record, run what is unfinished, say how it ended."""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.cluster import check_reachable, connected
from orchestrator.documents import Document
from orchestrator.drivers import sign_of_life
from orchestrator.expand import keeps
from orchestrator.plan import Plan, check, check_data, plan_of_sweep, planned
from orchestrator.progress import Progress, progress, say, some
from orchestrator.queue import Queue
from storage.records import row_for, utc_now
from storage.sql import quoted

if TYPE_CHECKING:
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


def run_spec(store: Store, document: Document, options: Options) -> Outcome:
    """Check, expand, record and run a spec. Nothing is written before everything is checked."""
    spec = check(document)
    check_data(spec.grid.dataset, options.data_root)
    store.check_writable()
    check_reachable(options.address)
    manifest = store.write_manifest(spec.name, document.text(), planned(spec, document))
    return run_sweep(store, manifest, options)


def run_sweep(store: Store, manifest: Manifest, options: Options, only: frozenset[str] | None = None) -> Outcome:
    """Run exactly what a recorded sweep has unfinished (of `only`, where given)."""
    check_reachable(options.address)
    plan = plan_of_sweep(store, manifest, only)
    if plan.shards:
        check_data({shard.needs.dataset for shard in plan.shards}, options.data_root)
    say(opening(manifest.sweep, plan, store))
    problems: list[str] = []
    if plan.shards:
        wanted = plan.spec.resources
        with_resources = replace(options, workers=wanted.workers, cpus=wanted.cpus, gpus=wanted.gpus)
        problems = drive(store, plan, with_resources, manifest.sweep)
    say_what_is_not_kept(store, plan, manifest.sweep)
    return outcome(store, manifest, problems, only)


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
    statuses = store.statuses()
    counts = {"done": 0, "failed": 0, "pending": 0}
    for task_id in store.plan_table(manifest)["task_id"].to_pylist():
        if only is None or task_id in only:
            counts[statuses.get(task_id, "pending")] += 1
    return Outcome(manifest.sweep, counts["done"], counts["failed"], counts["pending"], tuple(problems))


def drive(store: Store, plan: Plan, options: Options, sweep: str) -> list[str]:
    """Run a plan's shards on Ray, or in this process; return what went wrong besides failed tasks."""
    queue = Queue.of(plan.shards, plan.denses, random.SystemRandom())
    with sign_of_life(store, sweep, options.address), progress(plan.unfinished) as shown:
        if options.inline:
            from orchestrator.inline import run_inline

            with _signals_as_interrupt():
                run_inline(queue, store, options, shown)
        else:
            from orchestrator.ray_runner import run_on_ray

            # Inside: ray.init takes SIGTERM for itself.
            with connected(options), _signals_as_interrupt():
                run_on_ray(queue, store, options, shown)
        bury(queue, store, shown)
    return queue.problems


def bury(queue: Queue, store: Store, shown: Progress) -> None:
    """A failed row for every task that took its process down when it ran alone."""
    for shard in queue.suspects:
        store.commit_rows(shard.filed_under, [row_for(shard.tasks[0], "failed", _died_alone())])
        shown.advance(0, 1)


def _died_alone() -> dict[str, Any]:
    """The columns of a row whose task's process died."""
    now = utc_now()
    return {
        "error_class": "ProcessDied",
        "error": "the worker's process died while it ran this task alone",
        "host": socket.gethostname(),
        "started_at": now,
        "finished_at": now,
    }


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, and so does SIGINT where a shell's `&` had it ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        before = [signal.signal(number, interrupt) for number in numbers]
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
