"""How a sweep stands: what its rows say, and what drivers and workers that live show of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from storage.fallbacks import Fallback, fallbacks
from storage.phases import TRAINING_DENSE, Phase
from storage.records import utc_now
from storage.signs import age, living
from storage.sql import Views, quoted, views

if TYPE_CHECKING:
    from storage.store import Problem, Store

WINDOW_SECONDS = 600.0
"""Throughput is of the last ten minutes, or since the oldest driver at work began."""

# A task that is done stays so whoever runs it again; one that failed and runs again is running.
_NOW = """with found as (
    select t.*, case when t.status = 'done' then 'done' when r.task_id is not null then 'running'
                     else t.status end as state
    from tasks t left join running r on r.task_id = t.task_id where t.sweep = {sweep})
"""
_COUNTS = """count(*) as tasks, count(*) filter (where state = 'done') as done,
    count(*) filter (where state = 'failed') as failed, count(*) filter (where state = 'running') as running,
    count(*) filter (where state = 'pending') as pending"""
_BY = {
    "cell": f"""select any_value(model) as model, any_value(dataset) as dataset, any_value(layers) as layers,
        coalesce(cast(any_value(pruning_ratio) as varchar), array_to_string(any_value(ratios), '+')) as ratio,
        any_value(pruner) as pruner, any_value(propagation) as propagation, any_value(precision) as precision,
        {_COUNTS}, cell_id from found group by cell_id order by min(position)""",
    "shard": f"select shard, {_COUNTS} from found group by shard order by min(position)",
    "sweep": f"select any_value(sweep) as sweep, {_COUNTS} from found",
    "failure": """select error_class, count(*) as tasks, count(distinct shard) as shards,
        min(task_id) as example_task, arg_min(error, task_id) as example_error, max(finished_at) as last_at
        from found where state = 'failed' group by error_class order by tasks desc, error_class""",
}
BY = (*_BY, "driver")

_SCANNED = (
    "sweep",
    "position",
    "shard",
    "task_id",
    "cell_id",
    "dense_id",
    "model",
    "dataset",
    "layers",
    "ratios",
    "pruning_ratio",
)
_SCANNED += ("pruner", "propagation", "precision", "status", "chosen", "error_class", "error", "finished_at")


@dataclass(frozen=True)
class Standing:
    """A sweep as it stands: the table asked for, and what is true of the whole."""

    table: pa.Table
    whole: dict[str, Any]
    failures: list[dict[str, Any]]
    drivers: list[dict[str, Any]]
    fallbacks: list[Fallback]
    phases: list[str] = field(default_factory=list)
    """The phases of workers that are at no single task, as a dense model's training, in words."""


def standing(store: Store, sweep: str, by: str, report: Callable[[Problem], None] | None = None) -> Standing:
    """How a sweep stands, by one of BY. Raises QueryError for a sweep that is not there."""
    store.newest(sweep)
    found_drivers = {name: note for name, note in living(store, "drivers").items() if note.get("sweep") == sweep}
    at_work = [_driver(note) for note in found_drivers.values()]
    notes = living(store, "workers").values()
    with views(store, report) as found:
        running = _running(found, sweep, list(notes))
        found.con.execute("create temp table running as select unnest($1::varchar[]) as task_id", [running])
        now = _NOW.format(sweep=quoted(sweep))

        def ask(query: str) -> pa.Table:
            return found.ask(now + query, _SCANNED)

        whole = ask(_BY["sweep"]).to_pylist()[0]
        whole |= _pace(whole, at_work, lambda since: _finished(ask, since))
        failures = ask(_BY["failure"]).to_pylist()
        if by == "sweep":
            table = pa.Table.from_pylist([whole])
        else:
            table = pa.Table.from_pylist(at_work, DRIVER_SCHEMA) if by == "driver" else ask(_BY[by])
    mine = {name.removeprefix("drivers/") for name in found_drivers}
    own = [note for note in notes if note.get("driver") in mine]
    return Standing(table, whole, failures, at_work, fallbacks(store, sweep), _phases(own))


_FIRST_LEFT = """select first(task_id order by status <> 'pending', position) as first from tasks
    where sweep = {sweep} and status <> 'done' and list_contains($at, {by}) group by {by}"""


def _running(found: Views, sweep: str, notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the ids of the tasks that workers' notes are at. A worker that trains a dense model, or prepares a shard,
    is at the first task of the sweep that is left to run of them."""
    running, shards = set[str](), set[str]()
    for note in notes:
        named = {str(task) for task in [note.get("task"), *note.get("fleet", [])] if task}
        running |= named
        if note.get("shard") and not named:
            shard, _, alone = str(note["shard"]).partition(".")
            running, shards = running | {alone} - {""}, shards | (set() if alone else {shard})
    for by, at in (("shard", shards), ("dense_id", running)):
        query = _FIRST_LEFT.format(by=by, sweep=quoted(sweep))
        running = running | set(found.ask(query, _SCANNED, {"at": sorted(at)})["first"].to_pylist()) if at else running
    return sorted(running)


def _phases(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the phases of workers at a dense model or a shard, and the number of workers in the same phase."""
    found = Counter(
        str(phase)
        for note in notes
        if (phase := Phase.from_note(note)) and (phase.name.startswith(TRAINING_DENSE) or not note.get("task"))
    )
    return [text if n == 1 else f"{n} workers: {text}" for text, n in found.most_common()]


DRIVER_SCHEMA = pa.schema(
    [
        ("host", pa.string()),
        ("pid", pa.int64()),
        ("address", pa.string()),
        ("priority", pa.float64()),
        ("max_workers", pa.int64()),
        ("started_at", pa.string()),
        ("seconds_since_sign", pa.float64()),
        ("to_run", pa.int64()),
        ("done", pa.int64()),
        ("failed", pa.int64()),
        ("phase", pa.string()),
    ]
)


def _driver(note: dict[str, Any]) -> dict[str, Any]:
    return {name: note.get(name) for name in DRIVER_SCHEMA.names} | {"seconds_since_sign": round(age(note), 1)}


def _finished(ask: Callable[[str], pa.Table], since: Any) -> int:
    """How many tasks have ended since then."""
    query = f"select count(*) as n from found where finished_at >= timestamp {quoted(str(since))}"
    return ask(query)["n"][0].as_py()


def _pace(whole: dict[str, Any], at_work: list[dict[str, Any]], finished: Callable[[Any], int]) -> dict[str, Any]:
    """Tasks an hour while drivers are at work, and the seconds that are left at that pace; null when unknown."""
    unknown = {"drivers": len(at_work), "tasks_per_hour": None, "seconds_left": None}
    if not at_work:
        return unknown
    now = utc_now()
    began = min(type(now).fromisoformat(driver["started_at"]) for driver in at_work)
    since = max(began, now - timedelta(seconds=WINDOW_SECONDS))
    n, seconds = finished(since), max(1.0, (now - since).total_seconds())
    if not n:
        return unknown
    return unknown | {
        "tasks_per_hour": round(n * 3600 / seconds, 1),
        "seconds_left": round((whole["running"] + whole["pending"]) * seconds / n, 1),
    }
