"""What a figure is drawn from, out of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage import phases
from storage.claims import claims
from storage.correlate import cell_data
from storage.criteria import bench, predictors
from storage.early import early
from storage.errors import QueryError
from storage.figures.data import FigureData, points, possible, why_not
from storage.records import Cell
from storage.sql import quoted, views
from storage.statistics.resampling import RESAMPLES

if TYPE_CHECKING:
    from storage.rowfiles import Problem
    from storage.store import Store

Report = Callable[["Problem"], None]

_UNITS = 12
"""Removed units of a layer that are named; of more the first, and how many there are."""


def load(
    store: Store,
    sweep: str,
    kind: str,
    x: str,
    y: str,
    where: str | None = None,
    report: Report | None = None,
    *,
    removed: bool = False,
    phase: phases.Report = phases.silent,
) -> FigureData:
    """What `kind` needs of a sweep; with `removed` also which filters each candidate lacks.

    `where` is SQL over candidates; cells that it leaves nothing of are not drawn. `phase` gets the phases. Raises
    QueryError for an unknown sweep or column, for bad SQL, and for a kind that the sweep cannot give, naming those it
    can.
    """
    data = _LOADS[kind](_empty(store, sweep, x, y), store, where, report, RESAMPLES, phase)
    reason = why_not(kind, data)
    if reason:
        kinds = possible(everything(store, sweep, x, y, where, resamples=200))
        can = f"It can give: {', '.join(kinds)}" if kinds else "No kind can be drawn of it yet"
        raise QueryError(f"no {kind} of sweep {sweep}: {reason}. {can}")
    return replace(data, removed=removed_of(store, data)) if removed else data


def everything(
    store: Store, sweep: str, x: str, y: str, where: str | None = None, *, resamples: int = RESAMPLES
) -> FigureData:
    """What every kind needs of a sweep."""
    data = _empty(store, sweep, x, y)
    for read in (_criteria, _early, _claims, _columns):  # cells of the last
        data = read(data, store, where, None, resamples, phases.silent)
    return data


def grid(store: Store, sweep: str) -> dict[str, Cell]:
    """cell id -> Cell, in the order of the sweep's grid. Raises QueryError for an unknown sweep."""
    plan = store.plan_table(store.newest(sweep), ["position", "cell_id", "recipe"])
    cells = plan.group_by("cell_id").aggregate([("position", "min")]).sort_by("position_min")
    recipes = plan["recipe"].take(cells["position_min"]).to_pylist()
    return dict(zip(cells["cell_id"].to_pylist(), map(Cell.from_json, recipes), strict=True))


def _empty(store: Store, sweep: str, x: str, y: str) -> FigureData:
    return FigureData(sweep, x, y, grid(store, sweep))


def _cells(data: FigureData, store: Store, names: Sequence[str], where: str | None, report: Report | None) -> Any:
    found = cell_data(store, data.sweep, tuple(dict.fromkeys(names)), where, report)
    return [cell for cell in found if cell.candidate or not where]


def _claims(
    data: FigureData, store: Store, where: str | None, report: Report | None, resamples: int, phase: phases.Report
) -> FigureData:
    cells = _cells(data, store, (data.x, data.y), where, report)
    return replace(data, cells=cells, claims=claims(cells, data.x, data.y, resamples=resamples, phase=phase))


def _criteria(
    data: FigureData, store: Store, where: str | None, report: Report | None, resamples: int, phase: phases.Report
) -> FigureData:
    names = predictors(store, data.sweep)
    cells = _cells(data, store, (*names, data.y), where, report)
    return replace(data, predictors=bench(cells, data.y, names, resamples=resamples, phase=phase)[0] if names else ())


def _early(
    data: FigureData, store: Store, where: str | None, report: Report | None, resamples: int, phase: phases.Report
) -> FigureData:
    return replace(
        data, early=early(store, data.sweep, data.x, data.y, where, report, resamples=resamples, phase=phase)
    )


def _columns(
    data: FigureData, store: Store, where: str | None, report: Report | None, resamples: int, phase: phases.Report
) -> FigureData:
    del resamples, phase
    return replace(data, cells=_cells(data, store, (data.x, *predictors(store, data.sweep), data.y), where, report))


_LOADS = {
    "scatter": _claims,
    "heatmap": _claims,
    "ratio-curve": _claims,
    "forest": _claims,
    "criteria": _criteria,
    "early": _early,
    "parcoords": _columns,
}


def removed_of(store: Store, data: FigureData) -> dict[str, dict[int, str]]:
    """cell id -> candidate -> the filters removed, in words, of the candidates that are drawn."""
    drawn = {c.cell_id: {c.candidate[i] for i in points(c, data.x, data.y)[2]} for c in data.cells}
    with views(store) as found:
        lines = found.ask(f"select cell_id, candidate, removed from candidates where sweep = {quoted(data.sweep)}")
    told: dict[str, dict[int, str]] = {cell_id: {} for cell_id in drawn}
    for cell_id, candidate, layers in zip(*(lines[name].to_pylist() for name in lines.column_names), strict=True):
        if candidate in drawn.get(cell_id, ()):
            told[cell_id][candidate] = removed_words(layers or [])
    return told


def removed_words(layers: Sequence[dict[str, Any]]) -> str:
    """`conv1: 0, 3; conv2: 1`."""
    parts = []
    for layer in layers[:4]:
        units = layer["units"]
        rest = f" ... ({len(units)})" if len(units) > _UNITS else ""
        parts.append(f"{layer['layer']}: {', '.join(map(str, units[:_UNITS]))}{rest}")
    more = f"; ... ({len(layers)} layers)" if len(layers) > 4 else ""
    return "; ".join(parts) + more
