"""What a figure is drawn from, and which kinds that can give. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

import numpy as np

from storage.correlate import CellData
from storage.figures import words
from storage.figures.words import Value
from storage.records import Cell
from storage.statistics.records import Claim, EarlyEpoch, Predictor

KINDS = ("scatter", "heatmap", "ratio-curve", "forest", "criteria", "early", "parcoords")


@dataclass(frozen=True)
class FigureData:
    """What there is to draw of a sweep; a kind takes what it needs (`NEEDS`) and the rest may be empty.

    `grid` is cell id -> Cell, in the order of the grid; without it cells go by their titles, and neither heatmap nor
    ratio-curve can be drawn. `cells` have the columns x and y (for parcoords every column that is to be an axis).
    `removed` is cell id -> candidate -> its removed filters in words, for what is shown on hovering.
    """

    sweep: str
    x: str
    y: str
    grid: Mapping[str, Cell] = field(default_factory=dict)
    cells: Sequence[CellData] = ()
    claims: Sequence[Claim] = ()
    predictors: Sequence[Predictor] = ()
    early: Sequence[EarlyEpoch] = ()
    removed: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @cached_property
    def titles(self) -> dict[str, str]:
        """cell id -> the whole of what a cell is called."""
        lines = [*self.cells, *self.claims]
        rest = {p.cell_id: p.cell for p in (*self.predictors, *self.early) if p.cell_id}
        return rest | {line.cell_id: line.title for line in lines}

    @cached_property
    def values(self) -> dict[str, dict[str, Value]]:
        """cell id -> axis -> value, of the cells that are drawn, in the order of the grid."""
        if not all(cell_id in self.grid for cell_id in self.titles):
            return {cell_id: {"cell": title} for cell_id, title in self.titles.items()}
        return words.axis_values({cell_id: cell for cell_id, cell in self.grid.items() if cell_id in self.titles})

    @cached_property
    def varying(self) -> list[str]:
        """The axes of the grid that span the cells drawn."""
        return words.varying(self.values)

    def name(self, cell_id: str) -> str:
        """What tells this cell from the others drawn; its whole title where they do not vary along a known axis."""
        return self._names[cell_id]

    @cached_property
    def _names(self) -> dict[str, str]:
        axes = words.telling(self.values)
        named = {cell_id: words.words(line, axes) for cell_id, line in self.values.items()}
        apart = len(set(named.values())) == len(named)
        return named if axes and apart else self.titles

    @cached_property
    def common(self) -> str:
        """What all cells drawn have in common: model, data set and the like; empty where titles say it."""
        return words.common(self.values) if self.varying else ""

    @cached_property
    def every(self) -> list[Claim]:
        """The claims in the order of the grid."""
        place = {cell_id: i for i, cell_id in enumerate(self.values)}
        return sorted(self.claims, key=lambda claim: place[claim.cell_id])

    @cached_property
    def ordered(self) -> list[Claim]:
        """Those that say something, over two candidates or more."""
        return [claim for claim in self.every if claim.n > 1]


def points(cell: CellData, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of the candidates that have both, and their places among the cell's, each [n]."""
    a, b = np.asarray(cell.columns[x], float), np.asarray(cell.columns[y], float)
    place = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    return a[place], b[place], place


# -- what can be drawn ------------------------------------------------------------------------------------


def why_not(kind: str, data: FigureData) -> str:
    """Why this kind cannot be drawn of what there is; empty where it can."""
    return _WHY_NOT[kind](data)


def possible(data: FigureData) -> list[str]:
    """The kinds that can be drawn of what there is, in the order of KINDS."""
    return [kind for kind in KINDS if not why_not(kind, data)]


def _no_pairs(data: FigureData) -> str:
    some = any(claim.n > 1 for claim in data.claims)
    return "" if some else f"no cell with two finished candidates that have {data.x} and {data.y}"


def _no_scatter(data: FigureData) -> str:
    return _no_pairs(data) or ("" if data.cells else "no candidates")


def _no_heatmap(data: FigureData) -> str:
    vary = [axis for axis in data.varying if axis != "cell"]
    which = f"only {vary[0]} does" if vary else "none does"
    return _no_pairs(data) or ("" if len(vary) > 1 else f"it needs two axes of the grid that vary, and {which}")


def ratios(data: FigureData) -> list[float]:
    """The pruning ratios of the cells that have a tau, ascending; none where layers differ in theirs."""
    found = [data.values[claim.cell_id].get("ratio") for claim in data.ordered]
    return sorted({value for value in found if isinstance(value, float)})


def _no_curve(data: FigureData) -> str:
    found = ratios(data)
    only = f"there is only {found[0]:g}" if found else "no cell has one ratio for all its layers"
    return _no_pairs(data) or ("" if len(found) > 1 else f"it needs two pruning ratios, and {only}")


def _no_criteria(data: FigureData) -> str:
    some = any(isfinite(predictor.tau) for predictor in data.predictors)
    return "" if some else f"no cell in which a criterion's score and {data.y} vary over candidates"


def _no_early(data: FigureData) -> str:
    some = any(isfinite(epoch.tau) or isfinite(epoch.tau_x) for epoch in data.early)
    return "" if some else "no cell has accuracies after each epoch that vary over candidates"


def columns_that_vary(cell: CellData, last: str) -> list[str]:
    """The columns with two different finite values, `last` at the end."""
    found = [c for c, values in cell.columns.items() if _varies(values)]
    return [*(c for c in found if c != last), *(c for c in found if c == last)]


def _varies(values: Sequence[float | None]) -> bool:
    there = np.asarray(values, float)
    there = there[np.isfinite(there)]
    return bool(len(there) and np.ptp(there) > 0)


def _no_parcoords(data: FigureData) -> str:
    some = any(len(columns_that_vary(cell, data.y)) > 1 and _varies(cell.columns[data.y]) for cell in data.cells)
    return "" if some else f"no cell in which {data.y} and another column vary over candidates"


_WHY_NOT = {
    "scatter": _no_scatter,
    "heatmap": _no_heatmap,
    "ratio-curve": _no_curve,
    "forest": _no_pairs,
    "criteria": _no_criteria,
    "early": _no_early,
    "parcoords": _no_parcoords,
}
