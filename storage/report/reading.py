"""From the store to the facts of a report. What cannot be had is left out, with the reason in its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from storage.correlate import BESIDE, CellData, cell_data
from storage.phases import Report, silent
from storage.records import Cell, utc_now
from storage.report.records import FEW, Bench, Cost, Facts, Failure, Part, Plan, PlannedCell, Ran
from storage.report.words import labels
from storage.sql import quoted, views
from storage.statistics import kendalls
from storage.statistics.resampling import RESAMPLES

if TYPE_CHECKING:
    from storage.rowfiles import Problem
    from storage.sql import Views
    from storage.statistics.records import Claim, EarlyEpoch
    from storage.store import Store

T = TypeVar("T")

_CELLS = """select recipe, candidates, seeds, tasks, done, failed, pending from cells
    where sweep = {sweep} order by position"""
_SEEDS = "select distinct seed from tasks where sweep = {sweep} order by seed"
_RAN = """select execution, versions, list(distinct device) as devices, count(distinct host) as hosts,
    count(*) as tasks, min(started_at) as first, max(finished_at) as last
    from tasks where sweep = {sweep} and status = 'done' group by execution, versions order by tasks desc, first"""
_FAILED = """select error_class, count(*) as tasks, count(distinct shard) as shards, min(task_id) as example_task,
    arg_min(error, task_id) as example_error
    from tasks where sweep = {sweep} and status = 'failed' group by error_class order by tasks desc, error_class"""
_COST = """select cell_id, attempts, failed_attempts, wasted_attempts, cpu_seconds, gpu_seconds, wasted_cpu_seconds,
    wasted_gpu_seconds from cost where sweep = {sweep} order by position"""
_DIVERGED = "select count(*) filter (where diverged) as n from tasks where sweep = {sweep} and status = 'done'"
_MIXED = """select cell_id, list(distinct dense_sha256[:8]) as networks from tasks
    where sweep = {sweep} and dense_sha256 is not null group by cell_id having count(distinct dense_sha256) > 1"""


def gather(store: Store, sweep: str, x: str, y: str, made_with: str, phase: Report = silent) -> Facts:
    """All that a report of a sweep says. `made_with` is the version of prunesweep; `phase` gets the phases.

    Raises QueryError for a sweep that is not there, and StoreError where the store cannot be read; everything else
    that cannot be had is a Part with its reason.
    """
    store.newest(sweep)
    skipped: dict[str, None] = {}

    def report(problem: Problem) -> None:
        skipped[f"{problem.file}: {problem.reason}"] = None

    with views(store, report) as found:
        plan = _plan(store, sweep, found)
        ran = attempt(lambda: [_ran(line) for line in _asked(found, _RAN, sweep)])
        failures = attempt(lambda: [_failure(line) for line in _asked(found, _FAILED, sweep)])
        cost = attempt(lambda: [Cost(**line) for line in _asked(found, _COST, sweep)])
        diverged = attempt(lambda: int(_asked(found, _DIVERGED, sweep)[0]["n"]))
        mixed = {line["cell_id"]: ", ".join(sorted(line["networks"])) for line in _asked(found, _MIXED, sweep)}
    where = f"cell_id not in ({', '.join(map(quoted, mixed))})" if mixed else None
    beside = BESIDE if y == "best_test_accuracy" else ""
    cells = attempt(lambda: _cells(store, sweep, tuple(filter(None, (x, y, beside))), where, mixed))
    return Facts(
        store=store.location,
        made_at=utc_now(),
        made_with=made_with,
        x=x,
        y=y,
        plan=plan,
        ran=ran,
        mixed=mixed,
        cells=cells,
        claims=then(cells, lambda found: _claims(found, x, y, phase)),
        beside_name=beside,
        beside=_taus_beside(cells.value or [], x, beside),
        criteria=attempt(lambda: _criteria(store, sweep, y, where, mixed, phase)),
        early=attempt(
            lambda: _early(store, sweep, x, y, where, mixed, RESAMPLES if len(plan.cells) <= FEW else 0, phase)
        ),
        failures=failures,
        cost=cost,
        diverged=diverged,
        skipped=tuple(skipped),
    )


def attempt(work: Callable[[], T]) -> Part[T]:
    """What `work` gives, or why it does not: one section that fails must not take the others with it."""
    try:
        return Part(work())
    except Exception as error:
        return Part(None, str(error) or type(error).__name__)


def then(part: Part[T], work: Callable[[T], Any]) -> Part[Any]:
    """`work` on what is there; the same reason where it is not."""
    value = part.value
    return Part(None, part.why_not) if value is None else attempt(lambda: work(value))


def _asked(found: Views, query: str, sweep: str) -> list[dict[str, Any]]:
    return found.ask(query.format(sweep=quoted(sweep))).to_pylist()


def _plan(store: Store, sweep: str, found: Views) -> Plan:
    manifest = store.newest(sweep)
    lines = _asked(found, _CELLS, sweep)
    cells = [Cell.from_json(line.pop("recipe")) for line in lines]
    label, common = labels(cells)
    return Plan(
        sweep=sweep,
        expanded_at=manifest.expanded_at,
        spec=store.spec_text(manifest),
        cells=tuple(PlannedCell(cell, label[cell.cell_id], **line) for cell, line in zip(cells, lines, strict=True)),
        common=common,
        seeds=tuple(line["seed"] for line in _asked(found, _SEEDS, sweep)),
    )


def _ran(line: dict[str, Any]) -> Ran:
    return Ran(
        execution=json.loads(line["execution"] or "{}"),
        versions=json.loads(line["versions"] or "{}"),
        devices=tuple(sorted(filter(None, line["devices"]))),
        hosts=line["hosts"],
        tasks=line["tasks"],
        first=line["first"],
        last=line["last"],
    )


def _failure(line: dict[str, Any]) -> Failure:
    known: dict[str, Any] = {
        "error_class": line["error_class"] or "unknown",
        "example_error": line["example_error"] or "",
    }
    return Failure(**{**line, **known})


def _cells(
    store: Store, sweep: str, columns: tuple[str, ...], where: str | None, mixed: dict[str, str]
) -> list[CellData]:
    found = cell_data(store, sweep, tuple(dict.fromkeys(columns)), where)
    return [cell for cell in found if cell.cell_id not in mixed]


def _claims(cells: Sequence[CellData], x: str, y: str, phase: Report) -> list[Claim]:
    from storage.claims import claims

    return claims(list(cells), x, y, phase=phase)


def _taus_beside(cells: Sequence[CellData], x: str, beside: str) -> dict[str, float]:
    """cell id -> tau of x with y's neighbour."""
    if not beside:
        return {}
    taus = kendalls([(cell.columns[x], cell.columns[beside]) for cell in cells])
    return {cell.cell_id: tau for cell, tau in zip(cells, taus, strict=True)}


def _criteria(store: Store, sweep: str, y: str, where: str | None, mixed: dict[str, str], phase: Report) -> Bench:
    from storage.criteria import bench, predictors

    names = predictors(store, sweep)
    if not names:
        return Bench([], [])
    return Bench(*bench(_cells(store, sweep, (*names, y), where, mixed), y, phase=phase))


def _early(
    store: Store,
    sweep: str,
    x: str,
    y: str,
    where: str | None,
    mixed: dict[str, str],
    resamples: int,
    phase: Report,
) -> list[EarlyEpoch]:
    from storage.early import early

    found = early(store, sweep, x, y, where, resamples=resamples, phase=phase)
    return [one for one in found if one.cell_id not in mixed]
