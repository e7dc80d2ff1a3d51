"""Parallel coordinates over candidates: pruned train loss, criteria's scores, accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.correlate import CellData
from storage.figures import look, words
from storage.figures.data import FigureData, columns_that_vary

MANY = 3_000
"""Lines above which only so many are drawn, evenly by the rank of y: more would be one stain."""

MAP = "cividis"
"""Colours that everyone tells apart and that stay apart in print."""


def shown(data: FigureData) -> list[tuple[CellData, list[str]]]:
    """The cells that can be drawn with their columns, y last."""
    found = [(cell, columns_that_vary(cell, data.y)) for cell in data.cells]
    return [(cell, columns) for cell, columns in found if len(columns) > 1 and columns[-1] == data.y]


def complete(cell: CellData, columns: list[str]) -> np.ndarray:
    """The candidates that have every column, [n, columns], by ascending last column."""
    lines = np.array([cell.columns[name] for name in columns], float).T
    lines = lines[np.isfinite(lines).all(axis=1)]
    return lines[np.argsort(lines[:, -1], kind="stable")]


def parcoords(data: FigureData, width: float, height: float) -> list[Any]:
    """A panel per cell, a line per candidate, coloured by y. Each axis goes from its lowest to its highest value."""
    found = shown(data)
    full = max(1, int((height - 0.9) / 2.2)) if np.isfinite(height) else len(found)
    return [_page(data, found[i : i + full], width) for i in range(0, len(found), full)]


def _page(data: FigureData, found: list[tuple[CellData, list[str]]], width: float) -> Any:
    figure, panels = look.sheet(len(found), width, width, 2.2 if width >= 5 else 2.7)
    for panel, (cell, columns) in zip(panels, found, strict=True):
        lines = complete(cell, columns)
        drawn = lines if len(lines) <= MANY else lines[np.linspace(0, len(lines) - 1, MANY).round().astype(int)]
        part = "" if len(drawn) == len(lines) else f", {len(drawn)} of them drawn, evenly by the rank of y"
        image = _lines(panel, drawn, columns, lines)
        look.panel_title(
            panel, data.name(cell.cell_id), [f"n = {len(lines)}{part}"], width - 0.8, pad=24 if width < 5 else 14
        )
        _ends(panel, lines, columns, width)
        bar = figure.colorbar(image, ax=panel, fraction=0.03, pad=0.02, aspect=14)
        bar.outline.set_visible(False)
        look.percent_axis(bar.ax, data.y)
        bar.set_label(words.short(data.y))
    look.title(figure, data.common)
    return figure


def scaled(lines: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Each column from 0 at its lowest to 1 at its highest value `within`."""
    low, high = within.min(axis=0), within.max(axis=0)
    return (lines - low) / np.where(high > low, high - low, 1)


def _lines(panel: Any, drawn: np.ndarray, columns: list[str], within: np.ndarray) -> Any:
    from matplotlib.collections import LineCollection

    heights = scaled(drawn, within)
    at = np.broadcast_to(np.arange(len(columns)), heights.shape)
    alpha = float(np.clip(60 / max(len(drawn), 1), 0.15, 0.8))
    made = LineCollection(
        list(np.stack([at, heights], axis=-1)), cmap=MAP, linewidths=0.6, alpha=alpha, rasterized=len(drawn) > 500
    )
    made.set_array(drawn[:, -1])
    panel.add_collection(made)
    for place in range(len(columns)):
        panel.axvline(place, color=look.FAINT, linewidth=0.6)
    panel.set_xlim(-0.3, len(columns) - 0.7)
    panel.set_ylim(-0.02, 1.02)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(made.norm, made.cmap)


def _ends(panel: Any, lines: np.ndarray, columns: list[str], width: float) -> None:
    """Each axis' name, and the values at its ends."""
    room = look.characters((width - 1.0) / len(columns), 6.5)
    low, high = lines.min(axis=0), lines.max(axis=0)
    narrow = room < 9
    turn: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if narrow else {}
    names = [words.short(name) if narrow else words.wrapped(words.short(name), room) for name in columns]
    between = ": " if narrow else "\n"
    bottom = [
        between.join((name, _end(column, at)) if narrow else (_end(column, at), name))
        for name, column, at in zip(names, columns, low, strict=True)
    ]
    panel.set_xticks(range(len(columns)), bottom, **turn)
    panel.tick_params(axis="x", length=0)
    over: Any = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if narrow else {"ha": "center"}
    for place, (column, at) in enumerate(zip(columns, high, strict=True)):
        text = _end(column, at)
        panel.annotate(text, (place, 1), xytext=(0, 3), textcoords="offset points", va="bottom", size=6.5, **over)


def _end(column: str, value: float) -> str:
    return words.percent(value) if words.is_share(column) else f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
