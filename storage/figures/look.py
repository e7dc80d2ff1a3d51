"""How figures look: colours, sizes of type, sheets of panels. matplotlib without pyplot, so without global figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from storage.figures import words

WIDTHS = {"one": 3.5, "two": 7.16}
"""Inches: one and two columns of a conference paper (IEEE's)."""

PAGE = 9.2
"""Inches that a page of a paper has in height."""

BETTER, OTHERS, PICKED = "#d1352b", "#2a9d55", "#2f6fdf"
"""The paper's colours. Red and green differ in lightness too, and in shape, for those who do not tell them apart."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Okabe and Ito's, without yellow and black, which do not show on white or on black."""

INK = "#010203"
"""The colour of text and axes; an inline SVG has `currentColor` instead."""

FAINT = "#808080"

STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7,
    "figure.titlesize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # names are text, also with a $ in them
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "prunesweep",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color"), INK
    ),
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), "white"),
}
CHARACTER = 0.58
"""Mean width of a character of the type, in its size."""


@contextmanager
def style() -> Iterator[None]:
    """Figures are made and written within this."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def characters(inches: float, size: float) -> int:
    """How many characters of a size of type (points) go into a width."""
    return max(8, int(inches * 72 / (size * CHARACTER)))


def figure(width: float, height: float) -> Any:
    """An empty figure, width x height inches, whose layout keeps texts apart."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))


def columns(panels: int, width: float, least: float) -> int:
    """How many panels go side by side, each `least` inches wide at least; no more than fill the lowest row best."""
    most = max(1, min(panels, int((width + 0.1) / least)))
    return ceil(panels / ceil(panels / most))


def sheet(panels: int, width: float, least: float, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes, each `height` inches high with its title, and those axes."""
    across = columns(panels, width, least)
    down = ceil(panels / across)
    made = figure(width, down * height + 0.55)
    grid = list(made.subplots(down, across, squeeze=False, **shared).flat)
    for unused in grid[panels:]:
        unused.set_axis_off()
    for lowest in grid[max(panels - across, 0) : panels]:
        lowest.tick_params(labelbottom=True)
    return made, grid[:panels]


def title(figure: Any, text: str) -> None:
    """Lines over all panels, as wide as the figure at most."""
    if text:
        room = characters(figure.get_figwidth() - 0.1, 7.5)
        figure.suptitle("\n".join(words.wrapped(line, room) for line in text.splitlines()), fontsize=7.5)


def panel_title(panel: Any, name: str, facts: Iterable[str], inches: float, pad: float = 4) -> None:
    """The panel's name and, below, what is known of it, in lines no wider than the panel."""
    room = characters(inches, 6.5)
    below = words.filled(facts, room)
    panel.set_title(words.wrapped(name, room) + (f"\n{below}" if below else ""), loc="left", fontsize=6.5, pad=pad)


def labels(figure: Any, x: str, y: str, handles: Sequence[Any] = ()) -> None:
    """One label for each side of a sheet, and below them one legend for all panels."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    # The layout keeps room for label or legend, whichever is higher, and puts both below: empty lines part them.
    lines = _legend(figure, handles, width) if handles else 0
    below = words.wrapped(x, characters(width, 7.5))
    if len(figure.axes) == 1 and y:
        figure.axes[0].set_xlabel(below)
        figure.axes[0].set_ylabel(words.wrapped(y, characters(max(height - 1.2 - 0.125 * lines, 1.2), 7.5)))
        return
    figure.supxlabel(below + "\n" * lines, fontsize=7.5)
    if y:
        figure.supylabel(words.wrapped(y, characters(height - 0.6, 7.5)), fontsize=7.5)


def _legend(figure: Any, handles: Sequence[Any], inches: float) -> int:
    """The legend below all panels; its height in lines of a label."""
    room = characters(inches - 0.1, 6.5)
    for handle in handles:
        handle.set_label(words.wrapped(str(handle.get_label()), room - 7))
    texts = [max(map(len, handle.get_label().split("\n"))) + 7 for handle in handles]
    across = next(n for n in range(len(texts), 0, -1) if n == 1 or _columns_width(texts, n) <= room)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=across, handlelength=1.6, columnspacing=1.2)
    lines = [handle.get_label().count("\n") + 1 for handle in handles]
    return ceil((ceil(len(lines) / across) * max(lines) * 0.135 + 0.07) / 0.125)


def _columns_width(widths: Sequence[int], across: int) -> int:
    """Of texts that fill columns one after the other, the first ones with one more where they do not come out even."""
    each, more = divmod(len(widths), across)
    ends = [each * i + min(i, more) for i in range(across + 1)]
    return sum(max(widths[start:end]) for start, end in pairwise(ends))


def needs_log(values: np.ndarray) -> bool:
    """Whether losses span so much that a linear axis would show little of them: all above 0, and 30 times or more
    from the lowest to the highest."""
    there = values[np.isfinite(values)]
    return bool(len(there) and there.min() > 0 and there.max() >= 30 * there.min())


def log_axis(panel: Any, side: str = "x") -> None:
    """A logarithmic axis with plain numbers, and 2 and 5 between where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = panel.xaxis if side == "x" else panel.yaxis
    (panel.set_xscale if side == "x" else panel.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def percent_axis(panel: Any, column: str, side: str = "y") -> None:
    """Percent where the column is a share."""
    if words.is_share(column):
        (panel.xaxis if side == "x" else panel.yaxis).set_major_formatter(lambda at, _: f"{round(100 * at, 6):g} %")


def common_limits(spans: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The limits that panels share, [low, high] with a margin; None where sharing would squeeze most of them: where
    all together span more than three times as much as the middle one."""
    low, high = min(low for low, _ in spans), max(high for _, high in spans)
    middle = float(np.median([b - a for a, b in spans]))
    if high - low > 3 * middle or high == low:
        return None
    margin = 0.05 * (high - low)
    return low - margin, high + margin
