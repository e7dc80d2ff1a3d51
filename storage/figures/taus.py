"""Figures of Kendall's tau: heatmap, ratio-curve, forest, the criterion bench, early epochs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, nan
from typing import Any

import numpy as np

from storage.claims import VALID_TAU, expected_sign
from storage.figures import look, words
from storage.figures.arranged import Line, Table, heatmap_axes, lines, tables
from storage.figures.data import FigureData
from storage.statistics.records import Claim, EarlyEpoch, Interval, Predictor

ALPHA = 0.05
SIGNIFICANT = f"* Holm-adjusted p ≤ {ALPHA}"
ROW = 0.17
"""Inches that a line of a forest takes."""

FIGURE_SPACE = "\N{FIGURE SPACE}"

_LINE = {"linewidth": 0.8, "linestyle": "--", "color": look.FAINT, "zorder": 0}


def limit(data: FigureData) -> float:
    """The paper's limit of a valid cell: tau of -0.2, and 0.2 where x and y are expected to rise together."""
    return expected_sign(data.x, data.y) * VALID_TAU


def ceiling_of(claim: Claim) -> float:
    """The noise ceiling on the side where a valid tau lies; NaN where not estimable."""
    return expected_sign(claim.x, claim.y) * claim.noise.ceiling


def tau_label(data: FigureData) -> str:
    """What an axis of tau is called."""
    return f"Kendall τ of {words.short(data.x)} and {words.short(data.y)}"


def whiskers(at: float, around: Interval) -> tuple[float, float]:
    """How far the interval goes below and above its value; 0 where there is none."""
    return (max(at - around.low, 0), max(around.high - at, 0)) if isfinite(around.low) and isfinite(at) else (0, 0)


# -- heatmap ----------------------------------------------------------------------------------------------


def heatmap(data: FigureData, width: float, height: float) -> list[Any]:
    """tau over two axes of the grid, a panel for each combination of the others."""
    del height
    found = tables(data)
    darkest = most(data)
    side = max(len(str(value)) for value in found[0].rows) * 6.5 * look.CHARACTER / 72
    least = max(1.6, min(side, 1.6) + 0.5 + 0.42 * len(found[0].columns))
    across = look.columns(len(found), width, least)
    figure, panels = look.sheet(len(found), width, least, _table_height(found[0], bool(found[0].name)))
    inches = width / across - 0.3
    image = None
    for panel, table in zip(panels, found, strict=True):
        image = _table(panel, table, darkest, inches - min(side, 1.6))
        if table.name:
            look.panel_title(panel, table.name, (), inches - 0.6)
    down, over = heatmap_axes(data)
    look.title(figure, data.common)
    look.labels(figure, f"{over.replace('_', ' ')} ({SIGNIFICANT}; hatched: no τ)", down.replace("_", " "))
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=18)
    bar.set_label(words.wrapped(tau_label(data), look.characters(figure.get_figheight() - 0.9, 7.5)))
    bar.outline.set_visible(False)
    return [figure]


def _table_height(table: Table, named: bool) -> float:
    lines = max(name.count("\n") for name in _row_names(table)) + 1
    return max(max(0.26, 0.12 * lines + 0.06) * len(table.rows), 0.9) + 0.42 + (0.2 if named else 0)


def _row_names(table: Table) -> list[str]:
    return [words.wrapped(f"{value:g}" if words.is_number(value) else f"{value}", 30) for value in table.rows]


def most(data: FigureData) -> float:
    """The |tau| with the darkest colour: the greatest, in steps of 0.1, 0.3 at least."""
    return max([0.3, *(float(np.ceil(abs(c.tau) * 10) / 10) for c in data.ordered if isfinite(c.tau))])


def _table(panel: Any, table: Table, most: float, inches: float) -> Any:
    from matplotlib import colormaps

    shown = np.full((len(table.rows), len(table.columns)), nan)
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            claim = table.fields.get((row, column))
            if claim is not None and isfinite(claim.tau):
                shown[i, j] = claim.tau
                _value(panel, j, i, claim, colormaps["RdBu_r"]((claim.tau + most) / (2 * most)))
            elif (row, column) in table.planned:
                _hatched(panel, j, i)
    edges = [np.arange(n + 1) - 0.5 for n in reversed(shown.shape)]
    image = panel.pcolormesh(*edges, np.ma.masked_invalid(shown), cmap="RdBu_r", vmin=-most, vmax=most)
    panel.set_ylim(len(table.rows) - 0.5, -0.5)
    each = look.characters(inches / max(len(table.columns), 1), 6.5)
    labels = [f"{value:g}" if words.is_number(value) else str(value) for value in table.columns]
    long = any(len(label) > each for label in labels)
    panel.set_xticks(range(len(labels)), labels, rotation=45 if long else 0, ha="right" if long else "center")
    panel.set_yticks(range(len(table.rows)), _row_names(table))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image


def marked(claim: Claim) -> str:
    """tau, with a star where it is significant; empty where there is none."""
    return words.number(claim.tau) + ("*" if claim.p_holm <= ALPHA else "") if isfinite(claim.tau) else ""


def _value(panel: Any, x: int, y: int, claim: Claim, field: tuple[float, ...]) -> None:
    """Black or white, whichever reads on the field's colour."""
    light = 0.299 * field[0] + 0.587 * field[1] + 0.114 * field[2]
    ink = "black" if light > 0.5 else "white"
    panel.text(x, y, marked(claim), ha="center", va="center", color=ink, fontsize=6.5)


def _hatched(panel: Any, x: int, y: int) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", linewidth=0, edgecolor=look.FAINT))


# -- ratio-curve ------------------------------------------------------------------------------------------


def ratio_curve(data: FigureData, width: float, height: float) -> list[Any]:
    """tau with its interval, and the ceiling, against the pruning ratio."""
    del height
    found = lines(data)
    panels_of = list(dict.fromkeys(line.panel for line in found))
    names = list(dict.fromkeys(line.name for line in found))
    tall = min(0.75 * width / look.columns(len(panels_of), width, 2.2), 2.8) + 0.25
    figure, panels = look.sheet(len(panels_of), width, 2.2, tall, sharex=True, sharey=True)
    inches = width / look.columns(len(panels_of), width, 2.2) - 0.5
    for panel, name in zip(panels, panels_of, strict=True):
        _limits(panel, data)
        for line in found:
            if line.panel == name:
                _curve(panel, line, look.COLOURS[names.index(line.name) % len(look.COLOURS)])
        if name:
            look.panel_title(panel, name, (), inches)
    look.title(figure, data.common)
    some = any(isfinite(claim.noise.ceiling) for line in found for claim in line.claims)
    look.labels(figure, "pruning ratio", tau_label(data), _curve_handles(names, some, data))
    return [figure]


def _limits(panel: Any, data: FigureData) -> None:
    panel.axhline(0, color=look.FAINT, linewidth=0.6, zorder=0)
    panel.axhline(limit(data), **{**_LINE, "linestyle": ":"})


def _curve(panel: Any, line: Line, colour: str) -> None:
    low = [claim.tau_interval.low for claim in line.claims]
    high = [claim.tau_interval.high for claim in line.claims]
    panel.fill_between(line.ratios, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.plot(line.ratios, [claim.tau for claim in line.claims], marker="o", ms=3, lw=1.1, color=colour)
    panel.plot(line.ratios, [ceiling_of(claim) for claim in line.claims], "--", lw=0.8, color=colour)
    if len(line.ratios) <= 7:
        panel.set_xticks(line.ratios, [f"{ratio:g}" for ratio in line.ratios])


def _curve_handles(names: list[str], ceiling: bool, data: FigureData) -> list[Any]:
    from matplotlib.lines import Line2D

    made = [
        Line2D([], [], marker="o", ms=3, lw=1.1, color=look.COLOURS[i % len(look.COLOURS)], label=name or "τ, 95 %")
        for i, name in enumerate(names)
    ]
    if ceiling:
        made.append(Line2D([], [], lw=0.8, linestyle="--", color=look.FAINT, label="noise ceiling"))
    return [*made, _paper_handle(data)]


def _paper_handle(data: FigureData) -> Any:
    from matplotlib.lines import Line2D

    text = f"τ = {words.number(limit(data), 1)}, the paper's limit"
    return Line2D([], [], lw=0.8, linestyle=":", color=look.FAINT, label=text)


# -- forest -----------------------------------------------------------------------------------------------


def forest(data: FigureData, width: float, height: float) -> list[Any]:
    """tau with its interval, cell by cell in the order of the grid, with n and p."""
    found = data.every
    full = max(1, int((height - 1.2) / ROW)) if isfinite(height) else len(found)
    span = _tau_span(found, data)
    return [_forest(data, found[i : i + full], width, span) for i in range(0, len(found), full)]


def _tau_span(found: Sequence[Claim], data: FigureData) -> tuple[float, float]:
    ends = [v for c in found for v in (c.tau, c.tau_interval.low, c.tau_interval.high, ceiling_of(c)) if isfinite(v)]
    low, high = min([0.0, limit(data), *ends]), max([0.0, limit(data), *ends])
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _forest(data: FigureData, found: Sequence[Claim], width: float, span: tuple[float, float]) -> Any:
    room = look.characters(0.36 * width, 6.5)
    names = [words.wrapped(data.name(claim.cell_id), room) for claim in found]
    heights = [1 + 0.75 * name.count("\n") for name in names]
    places = np.cumsum([0.0, *[(a + b) / 2 for a, b in pairwise(heights)]])
    figure = look.figure(width, ROW * (sum(heights) + 1) + 1.1)
    panel = figure.subplots()
    for place, claim in zip(places, found, strict=True):
        _bar(panel, claim, float(place))
    panel.axvline(0, color=look.FAINT, linewidth=0.6, zorder=0)
    panel.axvline(limit(data), **{**_LINE, "linestyle": ":"})
    panel.set_xlim(*span)
    panel.set_ylim(places[-1] + heights[-1] / 2 + 0.1, -heights[0] / 2 - 1)
    panel.set_yticks(places, names)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    _aside(panel, places, heights, found)
    look.title(figure, data.common)
    look.labels(figure, tau_label(data), "", _forest_handles(found, data))
    return figure


def _bar(panel: Any, claim: Claim, place: float) -> None:
    colour = look.COLOURS[0] if claim.verdict == "valid" else look.COLOURS[1]
    if isfinite(claim.tau):
        around = np.array(whiskers(claim.tau, claim.tau_interval))[:, None]
        panel.errorbar([claim.tau], [place], xerr=around, fmt="o", ms=3.5, lw=1, capsize=0, color=colour)
    if isfinite(claim.noise.ceiling):
        panel.plot([ceiling_of(claim)], [place], "|", ms=7, mew=1.2, color=look.INK)


def _aside(panel: Any, places: Any, heights: Sequence[float], found: Sequence[Claim]) -> None:
    """n and p at the side, as a second set of labels under a head."""
    side = panel.secondary_yaxis("right")
    p = [words.p_value(claim.p).removeprefix("p ").removeprefix("= ") for claim in found]
    room = max(len(str(claim.n)) for claim in found)
    numbers = [str(claim.n).rjust(room, FIGURE_SPACE) for claim in found]
    head = "n".rjust(room, FIGURE_SPACE)
    texts = [f"{n}{FIGURE_SPACE * 3}{text}" for n, text in zip([head, *numbers], ["p", *p], strict=True)]
    side.set_yticks([-heights[0] / 2 - 0.6, *places], texts)
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)


def _forest_handles(found: Sequence[Claim], data: FigureData) -> list[Any]:
    from matplotlib.lines import Line2D

    shown = {claim.verdict for claim in found}
    made: list[Any] = [
        Line2D([], [], marker="o", ms=3.5, lw=1, color=look.COLOURS[i], label=f"{text}, 95 % interval")
        for i, (text, verdicts) in enumerate((("valid", {"valid"}), ("not valid", {"not valid"})))
        if shown & verdicts
    ]
    if any(isfinite(claim.noise.ceiling) for claim in found):
        made.append(Line2D([], [], marker="|", ms=7, mew=1.2, lw=0, color=look.INK, label="noise ceiling"))
    return [*made, _paper_handle(data)]


# -- the criterion bench ----------------------------------------------------------------------------------


def by_cell(data: FigureData) -> dict[str, list[Predictor]]:
    """The bench by cell: that over cells (where there is one) first, then in the order of the grid."""
    groups: dict[str, list[Predictor]] = {i: [] for i in ("", *data.values)}
    for predictor in data.predictors:
        groups[predictor.cell_id].append(predictor)
    return {cell_id: found for cell_id, found in groups.items() if any(isfinite(p.tau) for p in found)}


def predictor_order(groups: dict[str, list[Predictor]]) -> list[str]:
    """The predictors from best to worst: by rank over all cells, else by their mean rank."""
    ranks: dict[str, list[int]] = {}
    for found in [groups[""]] if "" in groups else groups.values():
        for predictor in found:
            ranks.setdefault(predictor.name, []).append(predictor.rank)
    rest = {p.name: None for found in groups.values() for p in found if p.name not in ranks}
    return [*sorted(ranks, key=lambda name: float(np.mean(ranks[name]))), *rest]


def criteria(data: FigureData, width: float, height: float) -> list[Any]:
    """tau of every predictor with its interval: a panel over all cells, and one per cell."""
    del height
    groups = by_cell(data)
    order = predictor_order(groups)
    across = look.columns(len(groups), width - 0.9, 1.5)
    figure, panels = look.sheet(
        len(groups), width, width / across, ROW * max(len(order), 4) + 0.5, sharex=True, sharey=True
    )
    inches = (width - 0.9) / across - 0.1
    for panel, (cell_id, found) in zip(panels, groups.items(), strict=True):
        _bench(panel, found, order)
        look.panel_title(panel, bench_name(data, cell_id), [], inches)
    panels[0].set_ylim(len(order) - 0.5, -0.5)
    panels[0].set_yticks(range(len(order)), [words.short(name) for name in order])
    look.title(figure, data.common)
    better = "further left predicts better" if expected_sign(order[0], data.y) < 0 else "further right predicts better"
    below = f"Kendall τ of each predictor and {words.short(data.y)} ({better})"
    look.labels(figure, below, "", _bench_handles(data))
    return [figure]


def bench_name(data: FigureData, cell_id: str) -> str:
    """What a panel of the bench is called."""
    return data.name(cell_id) if cell_id else next(p.cell for p in data.predictors if not p.cell_id)


def _bench(panel: Any, found: Sequence[Predictor], order: list[str]) -> None:
    panel.axvline(0, color=look.FAINT, linewidth=0.6, zorder=0)
    for predictor in found:
        if not isfinite(predictor.tau):
            continue
        place = order.index(predictor.name)
        colour = look.COLOURS[1] if predictor.name == "pruned_train_loss" else look.COLOURS[0]
        around = np.array(whiskers(predictor.tau, predictor.tau_interval))[:, None]
        first = predictor.rank == 1
        panel.errorbar(
            [predictor.tau], [place], xerr=around, fmt="D" if first else "o", ms=4.5 if first else 3, lw=1, color=colour
        )
    ceilings = {predictor.ceiling for predictor in found if isfinite(predictor.ceiling)}
    sign = -1 if sum(p.tau * p.strength for p in found if isfinite(p.tau)) < 0 else 1
    for at in ceilings:
        panel.axvline(sign * at, **_LINE)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)


def _bench_handles(data: FigureData) -> list[Any]:
    from matplotlib.lines import Line2D

    names = {p.name for p in data.predictors}
    made = [Line2D([], [], marker="D", ms=4.5, lw=0, color=look.COLOURS[0], label="best of its panel")]
    made.append(Line2D([], [], marker="o", ms=3, lw=1, color=look.COLOURS[0], label="criterion, 95 %"))
    if "pruned_train_loss" in names:
        made.append(Line2D([], [], marker="o", ms=3, lw=1, color=look.COLOURS[1], label="pruned train loss"))
    if any(isfinite(p.ceiling) for p in data.predictors):
        made.append(Line2D([], [], lw=0.8, linestyle="--", color=look.FAINT, label="noise ceiling"))
    return made


# -- early epochs -----------------------------------------------------------------------------------------


def epochs_by_cell(data: FigureData) -> dict[str, list[EarlyEpoch]]:
    """The epochs of each cell that has a tau at one, ascending, in the order of the grid."""
    groups: dict[str, list[EarlyEpoch]] = {i: [] for i in data.values}
    for epoch in sorted(data.early, key=lambda one: one.epoch):
        groups[epoch.cell_id].append(epoch)
    return {i: found for i, found in groups.items() if any(isfinite(e.tau) or isfinite(e.tau_x) for e in found)}


def early(data: FigureData, width: float, height: float) -> list[Any]:
    """tau of the accuracy after k epochs with y, and of x with the accuracy after k epochs, for every k."""
    del height
    groups = epochs_by_cell(data)
    across = look.columns(len(groups), width, 2.2)
    tall = min(0.7 * width / across, 2.6) + 0.35
    figure, panels = look.sheet(len(groups), width, 2.2, tall, sharey=True)
    for panel, (cell_id, found) in zip(panels, groups.items(), strict=True):
        _epochs(panel, found)
        look.panel_title(panel, data.name(cell_id), [f"n = {max(one.n for one in found)}"], width / across - 0.5)
    look.title(figure, data.common)
    look.labels(figure, "epochs of retraining done (k)", "Kendall τ", _early_handles(data))
    return [figure]


def early_names(data: FigureData) -> tuple[str, str]:
    """What the two lines are."""
    return (
        f"accuracy after k epochs with {words.short(data.y)}, 95 % band",
        f"{words.short(data.x)} with accuracy after k epochs",
    )


def _epochs(panel: Any, found: Sequence[EarlyEpoch]) -> None:
    from matplotlib.ticker import MaxNLocator

    at = [one.epoch for one in found]
    panel.axhline(0, color=look.FAINT, linewidth=0.6, zorder=0)
    low, high = [one.tau_interval.low for one in found], [one.tau_interval.high for one in found]
    panel.fill_between(at, low, high, color=look.COLOURS[0], alpha=0.18, linewidth=0)
    marks = {"marker": "o", "ms": 2.5} if len(at) < 25 else {}
    panel.plot(at, [one.tau for one in found], lw=1.1, color=look.COLOURS[0], **marks)
    panel.plot(at, [one.tau_x for one in found], lw=1.1, ls="--", color=look.COLOURS[1], **marks)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _early_handles(data: FigureData) -> list[Any]:
    from matplotlib.lines import Line2D

    first, second = early_names(data)
    return [
        Line2D([], [], lw=1.1, color=look.COLOURS[0], label=first),
        Line2D([], [], lw=1.1, ls="--", color=look.COLOURS[1], label=second),
    ]
