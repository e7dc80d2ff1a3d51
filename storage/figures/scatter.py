"""The scatter of arXiv 2412.00143: what a candidate loses by pruning against what it has after retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import statistics
from storage.claims import lower_is_better
from storage.correlate import CellData
from storage.figures import look, words
from storage.figures.data import FigureData, points
from storage.statistics.records import Claim

MANY = 5_000
"""Candidates of a cell above which they are shown by their density."""


FEW = 80
"""Candidates of a cell up to which each has a bar for the spread over its seeds."""


def labels(x: str) -> tuple[str, str, str]:
    """What the three marks mean."""
    pick = "lowest loss: the oracle's pick" if x == "pruned_train_loss" else f"the pick by {words.short(x)}"
    return pick, "better than the pick", "not better"


@dataclass(frozen=True)
class Cloud:
    """The points of a cell: x and y [n], the candidates' numbers, which are better than the picked one; y of each
    seed, [n, seeds], where that is known."""

    x: np.ndarray
    y: np.ndarray
    candidate: np.ndarray
    better: np.ndarray
    picked: int
    seeds: np.ndarray | None = None


def cloud(cell: CellData, x: str, y: str) -> Cloud:
    """The cell's points; the picked one is that of lowest loss or score, ties to the lowest number."""
    a, b, place = points(cell, x, y)
    turned = a if lower_is_better(x) else -a
    better = statistics.better_than_picked(turned, b, higher=statistics.higher_is_better(y))
    seeds = cell.by_seed[y][place] if y in cell.by_seed else None
    return Cloud(a, b, np.asarray(cell.candidate)[place], better, statistics.lowest(turned), seeds)


def clouds(data: FigureData) -> list[tuple[Claim, Cloud]]:
    """What is to be drawn, in the order of the grid."""
    by_id = {cell.cell_id: cell for cell in data.cells}
    return [(claim, cloud(by_id[claim.cell_id], data.x, data.y)) for claim in data.ordered if claim.cell_id in by_id]


def pages(data: FigureData, width: float, height: float) -> list[Any]:
    """Figures of at most `height` inches (one panel high at least) with a panel per cell."""
    found = clouds(data)
    least = 2.2
    across = look.columns(len(found), width, least)
    tall = _panel_height(width, across)
    full = across * max(1, int((height - 0.55) / tall)) if np.isfinite(height) else len(found)
    log = look.needs_log(np.concatenate([cloud.x for _, cloud in found]))
    sides = (_shared([c.x for _, c in found], log), _shared([c.y for _, c in found], False))
    parts = [found[i : i + full] for i in range(0, len(found), full)]
    return [_page(data, part, width, least, tall, log, sides) for part in parts]


def _panel_height(width: float, across: int) -> float:
    return min(0.72 * width / across, 3.4) + 0.55


def _shared(values: list[np.ndarray], log: bool) -> tuple[float, float] | None:
    if not log:
        return look.common_limits([(float(v.min()), float(v.max())) for v in values])
    found = look.common_limits([(float(np.log10(v.min())), float(np.log10(v.max()))) for v in values])
    return found and (10 ** found[0], 10 ** found[1])


def _page(
    data: FigureData,
    part: list[tuple[Claim, Cloud]],
    width: float,
    least: float,
    tall: float,
    log: bool,
    sides: tuple[tuple[float, float] | None, tuple[float, float] | None],
) -> Any:
    figure, panels = look.sheet(len(part), width, least, tall)
    inches = width / look.columns(len(part), width, least) - 0.5
    for panel, (claim, found) in zip(panels, part, strict=True):
        if log:
            panel.set_xscale("log")
        for limits, put in zip(sides, (panel.set_xlim, panel.set_ylim), strict=True):
            put(limits) if limits else None
        (_density if len(found.x) > MANY else _dots)(panel, found, inches, log)
        _spread(panel, found)
        _cross(panel, found)
        look.panel_title(panel, data.name(claim.cell_id), words.facts(claim), inches)
        if log:
            look.log_axis(panel)
        look.percent_axis(panel, data.x, "x")
        look.percent_axis(panel, data.y)
        panel.locator_params(axis="y", nbins=6)
    tall_sheet = figure.get_figheight() > look.PAGE
    look.title(figure, data.common + (f"\n{words.name(data.y)}\nagainst {words.short(data.x)}" if tall_sheet else ""))
    below = words.name(data.x) + (" (log scale)" if log else "")
    look.labels(figure, below, words.name(data.y), _handles(data.x, [found for _, found in part]))
    return figure


def _dots(panel: Any, found: Cloud, inches: float, log: bool) -> None:
    del inches, log
    size, alpha = (10, 0.75) if len(found.x) < 400 else (5, 0.5) if len(found.x) < 2000 else (2.5, 0.35)
    many = len(found.x) > 1000
    for chosen, colour, mark in ((~found.better, look.OTHERS, "o"), (found.better, look.BETTER, "^")):
        panel.scatter(
            found.x[chosen],
            found.y[chosen],
            s=size,
            color=colour,
            marker=mark,
            alpha=alpha,
            linewidths=0,
            rasterized=many,
        )


def _spread(panel: Any, found: Cloud) -> None:
    """One standard deviation over seeds to either side, where that does not hide the points."""
    if found.seeds is not None and found.seeds.shape[1] > 1 and len(found.x) <= FEW:
        around = np.nanstd(found.seeds, axis=1, ddof=1)
        panel.errorbar(
            found.x, found.y, yerr=around, fmt="none", ecolor=look.FAINT, elinewidth=0.5, alpha=0.4, zorder=0
        )


def _density(panel: Any, found: Cloud, inches: float, log: bool) -> None:
    """Hexagons, darker where more candidates are; red above the pick, green elsewhere, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    across = max(20, int(inches * 22))
    x = np.log10(found.x) if log else found.x
    extent = (*_span(x), *_span(found.y))
    norm = LogNorm(1, 10)
    for chosen, colour in ((~found.better, look.OTHERS), (found.better, look.BETTER)):
        if chosen.any():
            made = panel.hexbin(
                found.x[chosen],
                found.y[chosen],
                gridsize=(across, max(12, int(across * 0.45))),
                extent=extent,
                mincnt=1,
                norm=norm,
                cmap=_towards(colour),
                linewidths=0.1,
                xscale="log" if log else "linear",
                rasterized=True,
            )
            norm.vmax = max(norm.vmax or 0, float(made.get_array().max()))


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _towards(colour: str) -> Any:
    """From faint to full, so that it reads on white and on black."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    red, green, blue, _ = to_rgba(colour)
    return LinearSegmentedColormap.from_list("faint", [(red, green, blue, 0.25), (red, green, blue, 1.0)])


def _cross(panel: Any, found: Cloud) -> None:
    x, y = found.x[found.picked], found.y[found.picked]
    panel.axvline(x, color=look.PICKED, linestyle="--", linewidth=0.7)
    panel.axhline(y, color=look.PICKED, linestyle="--", linewidth=0.7)
    panel.scatter([x], [y], s=70, marker="*", color=look.PICKED, zorder=5, linewidths=0)


def _handles(x: str, found: list[Cloud]) -> list[Any]:
    from matplotlib.lines import Line2D

    density = any(len(one.x) > MANY for one in found)
    marks = (("*", look.PICKED, 8), ("^", look.BETTER, 4), ("o", look.OTHERS, 4))
    pick, *others = labels(x)
    names = [pick, *(f"{label} (darker: more)" if density else label for label in others)]
    made = [
        Line2D([], [], marker="h" if density and mark != "*" else mark, color=colour, linestyle="", ms=size, label=text)
        for (mark, colour, size), text in zip(marks, names, strict=True)
    ]
    spread = any(one.seeds is not None and one.seeds.shape[1] > 1 and len(one.x) <= FEW for one in found)
    bar = Line2D([], [], marker="|", ms=8, mew=0.5, color=look.FAINT, linestyle="", label="SD over seeds")
    return [*made, bar] if spread else made
