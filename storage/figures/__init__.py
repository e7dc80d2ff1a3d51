"""Figures for papers (matplotlib: png, pdf, svg) and for looking closely (plotly: html), from records.

data = FigureData("digits", "pruned_train_loss", "best_test_accuracy", grid, cells=cells, claims=claims)
possible(data)                          # which of KINDS that can give
save("forest", data, Path("forest.pdf"), width=WIDTHS["one"])
svg("scatter", data)                    # to stand within an HTML page
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from storage.errors import QueryError
from storage.figures import files, look, parallel, scatter, taus
from storage.figures.data import KINDS, FigureData, possible, why_not
from storage.figures.look import WIDTHS

__all__ = ["FILES", "KINDS", "WIDTHS", "FigureData", "draw", "html", "possible", "save", "svg", "why_not"]

FILES = (".png", ".pdf", ".svg", ".html")

_PAGES: dict[str, Callable[[FigureData, float, float], list[Any]]] = {
    "scatter": scatter.pages,
    "heatmap": taus.heatmap,
    "ratio-curve": taus.ratio_curve,
    "forest": taus.forest,
    "criteria": taus.criteria,
    "early": taus.early,
    "parcoords": parallel.parcoords,
}


def draw(kind: str, data: FigureData, *, width: float = WIDTHS["two"], height: float = inf) -> list[Any]:
    """A kind (one of KINDS) as matplotlib figures, `width` inches wide; more than one where it is higher than
    `height` inches. Raises QueryError for a kind that the data cannot give, naming those it can."""
    _check(kind, data)
    with look.style():
        return _PAGES[kind](data, width, height)


def _check(kind: str, data: FigureData) -> None:
    reason = why_not(kind, data)
    if reason:
        kinds = possible(data)
        can = f"It can give: {', '.join(kinds)}" if kinds else "No kind can be drawn of it yet"
        raise QueryError(f"no {kind} of sweep {data.sweep}: {reason}. {can}")


def html(kind: str, data: FigureData) -> str:
    """A kind as an HTML document, to look at closely; plotly is within it, and it needs no network. Hovering tells
    candidate, removed filters (`data.removed`) and the values of each seed. Raises QueryError as `draw`."""
    from storage.figures import web

    _check(kind, data)
    return web.page(kind, data)


def save(kind: str, data: FigureData, path: Path, *, width: float = WIDTHS["two"]) -> None:
    """Write a kind to a file; its ending is one of FILES. A .pdf has as many pages as it takes, the others are as
    high as it takes. Raises QueryError as `draw`, and OSError."""
    if path.suffix == ".html":
        path.write_text(html(kind, data), encoding="utf-8")
        return
    figures = draw(kind, data, width=width, height=look.PAGE if path.suffix == ".pdf" else inf)
    with look.style():
        files.save(figures, path)


def svg(kind: str, data: FigureData, *, width: float = WIDTHS["two"], prefix: str = "") -> str:
    """A kind as one inline `<svg>...</svg>`, for an HTML page.

    Transparent; text and axes are `currentColor`, so that it reads on light and on dark; no reference to anything
    outside itself; ids begin with `prefix` (the kind, where left out), so that several figures can stand in one page:
    give each its own. It fills the width that it gets up to `width` inches x 108 px. Raises QueryError for a kind
    that the data cannot give: ask `possible(data)` before.
    """
    (figure,) = draw(kind, data, width=width)
    with look.style():
        return files.inline(figure, prefix or kind)
