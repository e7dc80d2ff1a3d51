"""Figures: what is drawn is what the records say, texts keep apart, files stand alone."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, permutations
from math import ceil, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.transforms import Bbox

from orchestrator import cli, cli_plot
from storage.correlate import CellData, X, Y
from storage.errors import QueryError
from storage.figures import (
    FILES,
    KINDS,
    WIDTHS,
    FigureData,
    draw,
    files,
    html,
    look,
    possible,
    save,
    svg,
    why_not,
    words,
)
from storage.figures.arranged import heatmap_axes, lines, tables
from storage.figures.load import grid, removed_words
from storage.figures.scatter import cloud
from storage.records import Cell, Removed
from storage.statistics import anomaly_ratio, correlation
from storage.statistics.records import Claim, EarlyEpoch, Interval, Noise, Picks, Predictor
from storage.store import Store
from tests import rows


def cells(layers: tuple[str, ...], ratios: tuple[float, ...], propagations: tuple[str, ...] = ("exact",)) -> list[Cell]:
    """A grid, in its order."""
    axes = [(layer, ratio, way) for layer in layers for ratio in ratios for way in propagations]
    return [replace(rows.ORACLE, layers=((layer, ratio),), propagation=way) for layer, ratio, way in axes]


def claim(cell: Cell, x: list[float], y: list[float], seeds: int = 2) -> Claim:
    """What the cell says, with made intervals and a made ceiling where there are seeds for one."""
    tau, p = (found := correlation(x, y)).kendall, found.kendall_p
    around, none = Interval(tau - 0.2, tau + 0.2), Interval()
    noise = Noise(seeds, ceiling=0.8, ceiling_interval=Interval(0.7, 0.9)) if seeds > 1 else Noise(1)
    picks = Picks(anomaly_ratio=anomaly_ratio(x, y), anomaly_interval=Interval(0.1, 0.4))
    rest = (found.spearman, none, found.spearman_p, found.pearson, none, found.pearson_p)
    verdict = "" if np.isnan(tau) else "valid" if tau <= -0.2 and p <= 0.05 else "not valid"
    counts = (found.n, found.dropped, len(x), seeds)
    adjusted = (p, "asymptotic", min(1, 2 * p), p)
    return Claim(cell.cell_id, str(cell), X, Y, *counts, tau, around, *adjusted, *rest, verdict, True, picks, noise)


def made(shape: list[Cell], n: int = 20, seeds: int = 2) -> FigureData:
    """All there can be of a grid, drawn from a generator."""
    rng = np.random.default_rng(0)
    found, claims, predictors, early = [], [], [], []
    for cell in shape:
        columns: dict[str, Any] = {X: rng.lognormal(0, 1, n).tolist(), "score_l1": rng.normal(5, 1, n).tolist()}
        columns[Y] = (0.9 - 0.01 * np.log(columns[X]) + rng.normal(0, 0.01, n)).tolist()
        by_seed = {Y: np.array(columns[Y])[:, None] + rng.normal(0, 0.01, (n, seeds))}
        found.append(CellData(cell.cell_id, str(cell), [*range(n)], columns, n, seeds, by_seed))
        claims.append(claim(cell, columns[X], columns[Y], seeds))
        named = (cell.cell_id, str(cell))
        for rank, name in enumerate((X, "score_l1"), 1):
            predictors.append(Predictor(*named, rank, name, n, -0.4, Interval(-0.6, -0.2), 0.4, 0.01, 0.8, ()))
        early += [EarlyEpoch(*named, k, n, k / 3, Interval(k / 3 - 0.2, k / 3 + 0.1), -0.3) for k in range(4)]
    return FigureData("made", X, Y, {c.cell_id: c for c in shape}, found, claims, predictors, early)


FULL = made(cells(("conv1", "conv2"), (0.2, 0.5, 0.8), ("exact", "released")), n=8)
MINUS = "\N{MINUS SIGN}"
SMALL = made(cells(("conv1", "conv2"), (0.2, 0.5)), n=8)
ONE = made(cells(("conv1",), (0.5,)), seeds=1)


def texts(figure: Any) -> list[str]:
    """All that is written in a figure."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


# -- what is drawn ----------------------------------------------------------------------------------------

_numbers = st.lists(st.tuples(st.floats(0, 9) | st.just(nan), st.floats(0, 1) | st.none()), min_size=2, max_size=30)


@given(_numbers)
def test_the_star_has_the_lowest_loss_and_red_ones_are_better(pairs: list[tuple[float, float | None]]) -> None:
    """Of the candidates that have drawn values; the share of the red is the anomaly ratio."""
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    complete = [(a, b, i) for i, (a, b) in enumerate(pairs) if b is not None and not np.isnan(a)]
    if len(complete) < 2 or len({a for a, _, _ in complete}) < 2 or len({b for _, b, _ in complete}) < 2:
        return
    found = cloud(CellData("id", "title", [10 * i for i in range(len(x))], {X: [*x], Y: [*y]}, len(x), 1), X, Y)
    assert found.x[found.picked] == min(a for a, _, _ in complete)
    assert found.candidate.tolist() == [10 * i for _, _, i in complete]
    assert (found.y[found.better] > found.y[found.picked]).all()
    assert not found.better[found.picked]
    assert found.better.mean() == pytest.approx(anomaly_ratio(x, y))


def test_the_scatter_has_every_candidate_once() -> None:
    """Green ones, red ones, and the star over the green one that it marks; dashed lines cross there."""
    (figure,) = draw("scatter", ONE)
    (panel,) = figure.axes
    green, red, star = (c.get_offsets() for c in panel.collections)
    found = cloud(ONE.cells[0], X, Y)
    assert (len(green), len(red)) == ((~found.better).sum(), found.better.sum()) and len(green) + len(red) == 20
    assert star.tolist() == [[min(found.x), found.y[np.argmin(found.x)]]]
    assert {tuple(line.get_xdata()) for line in panel.lines} == {(star[0][0], star[0][0]), (0, 1)}


def test_the_scatter_says_the_numbers() -> None:
    """tau with its interval, p, n, the anomaly ratio and the ceiling, or why there is none."""
    (found,) = ONE.claims
    (panel,) = draw("scatter", ONE)[0].axes
    said = panel.get_title(loc="left").replace("\n", ", ")
    for number in (found.tau, found.tau_interval.low, found.tau_interval.high):
        assert f"{number:.2f}".replace("-", MINUS) in said
    assert f"p = {found.p:.2g}" in said or "p < 0.0001" in said
    assert f"n = {found.n}" in said and f"anomaly ratio {100 * found.picks.anomaly_ratio:.1f} %" in said
    assert "ceiling: not estimable (one seed)" in said and "ceiling 0.80 [0.70, 0.90]" in words.facts(FULL.claims[0])
    shown = texts(draw("scatter", ONE, width=WIDTHS["one"])[0])
    assert any("picked on the" in text for text in shown) and any(
        text.startswith("Pruned train loss") for text in shown
    )
    assert {"better than the pick", "not better", "lowest loss: the oracle's pick"} <= set(shown)


def test_losses_over_decades_are_on_a_log_axis_that_says_so() -> None:
    """And others are not."""
    (cell,) = ONE.cells
    wide = replace(cell, columns=cell.columns | {X: np.logspace(-2, 2, 20).tolist()})
    (log,), (linear,) = draw("scatter", replace(ONE, cells=[wide])), draw("scatter", replace(ONE, cells=[cell]))
    assert log.axes[0].get_xscale() == "log" and log.axes[0].get_xlabel() == "Pruned train loss (log scale)"
    narrow = max(cell.columns[X]) < 30 * min(cell.columns[X])  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    assert linear.axes[0].get_xscale() == ("linear" if narrow else "log")


@given(st.sets(st.sampled_from(range(12)), min_size=2, max_size=12))
@settings(max_examples=40)
def test_heatmap_and_curve_show_every_claim_once(chosen: set[int]) -> None:
    """Whatever part of a grid there is, wherever the axes go."""
    data = replace(FULL, cells=[], predictors=[], early=[], claims=[FULL.claims[i] for i in chosen])
    ids = sorted(c.cell_id for c in data.claims)
    if not why_not("heatmap", data):
        found = tables(data)
        assert sorted(c.cell_id for table in found for c in table.fields.values()) == ids
        assert all(set(table.fields) <= table.planned for table in found)
        assert "ratio" not in data.varying or "ratio" not in heatmap_axes(data)[:1]
    if not why_not("ratio-curve", data):
        found = lines(data)
        assert sorted(c.cell_id for line in found for c in line.claims) == ids
        assert all(line.ratios == sorted(set(line.ratios)) for line in found)


def test_the_heatmap_writes_tau_with_a_star_and_hatches_what_is_missing() -> None:
    """A field that was planned and has no tau is hatched."""
    missing = replace(FULL.claims[3], tau=nan, n=0)
    (figure,) = draw("heatmap", replace(FULL, claims=[*FULL.claims[:3], missing, *FULL.claims[4:]]))
    shown = [c for c in FULL.claims if c.cell_id != missing.cell_id]
    wanted = sorted(words.number(c.tau) + ("*" if c.p_holm <= 0.05 else "") for c in shown)
    fields = sorted(text.get_text() for panel in figure.axes for text in panel.texts)
    assert fields == wanted
    assert sum(patch.get_hatch() is not None for panel in figure.axes for patch in panel.patches) == 1


def test_the_forest_has_a_line_for_each_cell_over_pages() -> None:
    """In the order of the grid, with n; a cell without a tau has its line too. Pages are no higher than asked."""
    shape = cells(tuple(f"conv{i}" for i in range(12)), (0.2, 0.5))
    data = made(shape, n=4)
    data = replace(data, claims=[replace(data.claims[0], tau=nan, n=0, verdict=""), *reversed(data.claims[1:])])
    pages = draw("forest", data, height=2.5)
    named = [label.get_text() for page in pages for label in page.axes[0].get_yticklabels()]
    assert named == [f"conv{i}, ratio {ratio}" for i in range(12) for ratio in (0.2, 0.5)]
    assert len(pages) > 2 and all(page.get_figheight() <= 2.7 for page in pages)
    assert len(draw("forest", data)) == 1


def pruners() -> list[Cell]:
    """A grid in which the pruner determines how candidates are taken."""
    sampled = [replace(cell, candidate_mode="sample", sampling_seed=0) for cell in cells(("conv1", "conv2"), (0.5,))]
    chosen = [replace(c, pruner="l1", candidate_mode="all", sampling_seed=None) for c in sampled]
    return [cell for pair in zip(sampled, chosen, strict=True) for cell in pair]


def test_an_axis_that_another_one_determines_is_none() -> None:
    """Neither in names, nor as panels of a heatmap; what all have in common is not said of it either."""
    data = made(pruners(), n=4)
    assert data.varying == ["layers", "pruner"]
    assert [data.name(i) for i in data.values] == [f"{a}, {b}" for a in ("conv1", "conv2") for b in ("oracle", "l1")]
    (table,) = tables(data)
    assert len(table.planned) == 4 == len(table.rows) * len(table.columns)
    ratio_by_layer = made([*cells(("conv1",), (0.2,)), *cells(("conv2",), (0.5,))], n=4)
    assert ratio_by_layer.varying == ["layers", "ratio"] and "ratio" not in ratio_by_layer.common


_axes = st.fixed_dictionaries(
    {axis: st.integers(0, 2).map(str) for axis in ("model", "layers", "pruner", "candidates")}
)


@given(st.lists(_axes, min_size=1, max_size=6))
@settings(max_examples=50)
def test_axes_that_are_left_out_tell_nothing(found: list[dict[str, str]]) -> None:
    """Two cells that differ at all differ along an axis that is kept, and no axis kept is a function of another one."""
    values = {str(i): line for i, line in enumerate(found)}
    for kept in (words.varying(values), words.telling(values)):
        assert len({tuple(line[a] for a in kept) for line in found}) == len({tuple(sorted(x.items())) for x in found})
    for one, other in permutations(words.varying(values), 2):
        assert len({(line[one], line[other]) for line in found}) > len({line[one] for line in found})


def test_shares_are_in_percent_in_one_style() -> None:
    """Along either axis, at the ends of parallel coordinates and in colour bars: `88 %`."""
    (cell,) = ONE.cells
    share = np.linspace(0.81, 0.93, 20).tolist()
    turned = replace(cell, columns={"pruned_test_accuracy": share, Y: cell.columns[Y]})
    data = replace(ONE, x="pruned_test_accuracy", cells=[turned])
    for kind in ("scatter", "parcoords"):
        (figure,) = draw(kind, data)
        figure.draw_without_rendering()
        said = [text for text in texts(figure) if "%" in text]
        assert any(text.startswith(("82 %", "81.0 %")) for text in said)
        assert not [text for text in said if re.search(r"\d%", text)]


def test_the_bench_and_early_epochs_show_all_records() -> None:
    """One mark per predictor and cell, one point per epoch and line; a cell without tau has no panel of epochs."""
    (bench,) = draw("criteria", SMALL)
    marks = [line for panel in bench.axes for line in panel.lines if line.get_marker() in ("o", "D")]
    assert len(marks) == len(SMALL.predictors)
    (early,) = draw("early", SMALL)
    curves = [line for panel in early.axes for line in panel.lines if len(line.get_xdata()) == 4]
    assert sum(panel.axison for panel in early.axes) == 4 and len(curves) == 2 * 4
    assert curves[0].get_ydata().tolist() == [one.tau for one in SMALL.early[:4]]
    bare = [replace(one, tau=nan, tau_x=nan) for one in SMALL.early[:4]]
    (fewer,) = draw("early", replace(SMALL, early=[*bare, *SMALL.early[4:]]))
    assert sum(panel.axison for panel in fewer.axes) == 3


def test_the_panel_over_cells_says_of_how_many_it_is() -> None:
    """It is named as its records are."""
    over = [replace(one, cell_id="", cell="3 of 4 cells") for one in SMALL.predictors[:2]]
    assert "3 of 4 cells" in texts(draw("criteria", replace(SMALL, predictors=[*over, *SMALL.predictors]))[0])


def test_parcoords_have_the_columns_that_vary() -> None:
    """y comes last; a constant column is left out, and so is a candidate that lacks one."""
    (cell,) = ONE.cells
    columns = cell.columns | {"score_l2": [1.0] * 20, "score_fpgm": [None, *map(float, range(19))]}
    (figure,) = draw("parcoords", replace(ONE, cells=[replace(cell, columns=columns)]))
    names = [label.get_text().split("\n", 1)[1].replace("\n", " ") for label in figure.axes[0].get_xticklabels()]
    assert names == ["pruned train loss", "l1", "fpgm", "best test accuracy"]
    assert len(figure.axes[0].collections[0].get_segments()) == 19


# -- what reads well --------------------------------------------------------------------------------------

LONG = made(cells(tuple(f"encoder.layers.{i}.self_attention.out_projection" for i in range(2)), (0.4375, 0.5)), n=6)


@pytest.mark.parametrize("width", [WIDTHS["one"], WIDTHS["two"]])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_neither_overlap_nor_leave_the_figure(kind: str, width: float) -> None:
    """Titles, labels of axes and ticks, legends and what is written in, with long names."""
    for figure in draw(kind, LONG, width=width):
        boxes = [(box, text) for box, text in shown_boxes(figure) if box.width > 0]
        over = [(a, b) for (one, a), (two, b) in combinations(boxes, 2) if overlap(one, two)]
        assert not over, over[:3]
        beyond = [text for box, text in boxes if box.x0 < -2 or box.x1 > figure.bbox.width + 2 or box.y0 < -2]
        assert not beyond, beyond[:3]


def shown_boxes(figure: Any) -> list[tuple[Any, str]]:
    """Where each text is that does not stand aslant, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    with look.style():
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        hidden = _outside(figure)
        upright = [text for text in shown if text.get_rotation() in (0, 90) and text not in hidden]
        return [(_box(text, renderer), text.get_text().strip()) for text in upright]


def _box(text: Any, renderer: Any) -> Any:
    """Where the lines of a text are, without the empty ones below them."""
    box, lines = text.get_window_extent(renderer), text.get_text().split("\n")
    empty = len(lines) - len(text.get_text().rstrip("\n").split("\n"))
    return Bbox([[box.x0, box.y0 + box.height * empty / len(lines)], [box.x1, box.y1]])


def _outside(figure: Any) -> set[Any]:
    """The labels of ticks beyond the limits of their axis, and of axes that are off: these are not drawn."""
    hidden = set()
    for panel in figure.axes:
        drawn = [
            axis for axes in (panel, *panel.child_axes) if hasattr(axes, "xaxis") for axis in (axes.xaxis, axes.yaxis)
        ]
        for axis in drawn:
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.majorTicks, *axis.minorTicks):
                if not panel.axison or not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    return hidden


def overlap(one: Any, two: Any) -> bool:
    """Whether two boxes share more than two pixels either way."""
    across = min(one.x1, two.x1) - max(one.x0, two.x0)
    return across > 2 and min(one.y1, two.y1) - max(one.y0, two.y0) > 2


@given(st.text("ab. +_/-0123", max_size=60), st.integers(8, 30))
def test_wrapping_loses_nothing(text: str, width: int) -> None:
    """But blanks, and no line is longer than asked; a number is not broken unless it is longer."""
    found = words.wrapped(text, width)
    assert found.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    assert all(len(line) <= width for line in found.split("\n"))


def test_numbers_are_written_as_papers_do() -> None:
    """A true minus, no negative zero, an interval only where there is one."""
    assert [words.number(v) for v in (-0.276, -0.001, nan)] == [f"{MINUS}0.28", "0.00", "n/a"]
    assert words.with_interval(-0.1, Interval()) == f"{MINUS}0.10"
    assert [words.p_value(p) for p in (0.01234, 1e-9, nan)] == ["p = 0.012", "p < 0.0001", "p n/a"]
    assert words.p_value(1 / 10_000) == "p ≤ 0.0001"
    assert removed_words([{"layer": "conv1", "units": [0, 3]}, {"layer": "c", "units": [*range(20)]}]) == (
        "conv1: 0, 3; c: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 ... (20)"
    )


# -- files ------------------------------------------------------------------------------------------------


def test_pdf_has_pages_with_embedded_fonts(tmp_path: Path) -> None:
    """TrueType, as publishers ask: none of Type 3, which they refuse. The same figure gives the same bytes."""
    three = replace(SMALL, claims=SMALL.claims[:3])
    save("scatter", three, tmp_path / "a.pdf", width=WIDTHS["one"])
    content = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in content and b"/Type3" not in content
    per_page = int((look.PAGE - 0.55) / (0.72 * 3.5 + 0.55))
    assert len(re.findall(rb"/Type /Page\b", content)) == ceil(3 / per_page) > 1
    for suffix in (".pdf", ".svg"):
        for name in "bc":
            save("forest", ONE, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"c{suffix}").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_inline_svg_stands_in_any_page(kind: str) -> None:
    """Ids are its own and refer to themselves, ink is the page's, nothing is fetched, no other element is styled."""
    drawn = svg(kind, SMALL if kind in ("heatmap", "ratio-curve") else ONE, prefix="one")
    root = ET.fromstring(f"<div>{drawn}</div>")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and all(str(i).startswith("one-") for i in ids)
    refers = [a or b for a, b in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', drawn)]
    assert set(refers) <= set(ids)
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith(("href", "src"))]
    assert all(link.startswith(("#", "data:image/png")) for link in links)
    assert "currentColor" in drawn and look.INK not in drawn
    assert not {element.tag.split("}")[-1] for element in root.iter()} & {"style", "script", "metadata"}


class Page(HTMLParser):
    """Tags with their attributes, and the characters of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_html_opens_without_a_network() -> None:
    """plotly is within it; hovering tells candidate, seeds and what was removed, and what a user named is no markup."""
    data = replace(
        made(cells(("conv1",), (0.5,))), sweep="<made>", removed={ONE.cells[0].cell_id: {7: "<b>conv1</b>: 3"}}
    )
    text = html("scatter", data)
    page = Page()
    page.feed(text)
    assert {"html", "title", "script"} <= {tag for tag, _ in page.found}
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.found)
    assert "plotly.js v" in text[:200_000] and "<title>&lt;made&gt;: scatter</title>" in text
    hover = text[text.rindex("Plotly.newPlot(") :]
    assert "candidate 7\\u003cbr\\u003e" in hover and "by seed: " in hover and "removed &lt;b&gt;conv1" in hover


@pytest.mark.parametrize("kind", KINDS)
def test_html_of_every_kind_tells_each_cell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, wherever that stands; plotly itself is left out here."""
    from plotly.basedatatypes import BaseFigure

    whole = BaseFigure.to_html
    monkeypatch.setattr(BaseFigure, "to_html", lambda *a, **k: whole(*a, **(k | {"include_plotlyjs": False})))
    text = html(kind, FULL)
    assert len(text) < 400_000
    for name in ("conv1", "conv2", "0.2", "0.5", "0.8", "exact", "released"):
        assert name in text


def test_fifty_thousand_points_are_quick_and_small(tmp_path: Path) -> None:
    """Shown by density, with every one of them counted; a vector file stays small."""
    data = made(cells(("conv1",), (0.5,)), n=50_000, seeds=1)
    start = time.perf_counter()
    (points,), (lines_,) = draw("scatter", data), draw("parcoords", data)
    with look.style():
        files.save([points], tmp_path / "many.svg")
        files.save([lines_], tmp_path / "lines.svg")
    assert time.perf_counter() - start < 20  # 1 s on an idle machine
    assert all(path.stat().st_size < 2_000_000 for path in tmp_path.iterdir())
    hexagons = [c for c in points.axes[0].collections if c.get_array() is not None]
    assert sum(int(c.get_array().sum()) for c in hexagons) == 50_000
    assert any("3000 of them drawn" in text for text in texts(lines_))


# -- what cannot be drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        ("scatter", replace(ONE, claims=[]), "no cell with two finished candidates that have pruned_train_loss and"),
        ("forest", replace(ONE, claims=[replace(ONE.claims[0], n=1)]), "no cell with two finished candidates"),
        ("heatmap", ONE, "it needs two axes of the grid that vary, and none does"),
        (
            "heatmap",
            made(cells(("conv1", "conv2"), (0.5,))),
            "it needs two axes of the grid that vary, and only layers",
        ),
        ("heatmap", replace(FULL, grid={}), "it needs two axes of the grid that vary, and none does"),
        ("ratio-curve", ONE, "it needs two pruning ratios, and there is only 0.5"),
        ("ratio-curve", replace(FULL, grid={}), "no cell has one ratio for all its layers"),
        ("criteria", replace(ONE, predictors=[]), "no cell in which a criterion's score and best_test_accuracy vary"),
        ("early", replace(ONE, early=[]), "no cell has accuracies after each epoch that vary over candidates"),
        ("parcoords", replace(ONE, cells=[]), "no cell in which best_test_accuracy and another column vary"),
    ],
)
def test_an_impossible_kind_says_why_and_what_is_possible(kind: str, data: FigureData, told: str) -> None:
    """One message."""
    with pytest.raises(QueryError) as refused:
        draw(kind, data)
    assert told in str(refused.value) and f"no {kind} of sweep made" in str(refused.value)
    assert f"It can give: {', '.join(possible(data))}" in str(refused.value)
    assert kind not in possible(data)


# -- from a store -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep `made` with two layers and two ratios, and `bare`, one cell without curves and scores."""
    folder = tmp_path_factory.mktemp("figures")
    kept, rng = Store(folder / "results"), np.random.default_rng(1)
    for name, shape in (("made", cells(("conv1", "conv2"), (0.2, 0.5))), ("bare", cells(("conv3",), (0.5,)))):
        planned = [task for cell in shape for task in rows.tasks(cell, 6, 2)]
        rows.plan(kept, name, planned)
        kept.commit_rows(name, [rows.done(task, **_measured(task.candidate, rng, name == "made")) for task in planned])
    return folder


def _measured(candidate: int, rng: np.random.Generator, more: bool) -> dict[str, Any]:
    accuracy = 0.9 - candidate / 100 + float(rng.normal(0, 0.01))
    usual = {"pruned_train_loss": 1 + candidate / 7, "best_test_accuracy": accuracy}
    rest = {
        "pruned_test_accuracy": accuracy / 2,
        "score_l1": float(candidate % 4),
        "removed": (Removed("conv1", (candidate, candidate + 1)),),
        "epoch_test_accuracy": (accuracy - 0.1, accuracy),
    }
    return usual | rest if more else usual


def plot(folder: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `plot` there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["plot", *arguments])
    return int(str(ended.value.code))


def test_plot_draws_every_kind(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path goes to stdout, what to do next to stderr."""
    assert cli_plot.KINDS == KINDS and list(grid(Store(store / "results"), "made"))
    for kind in KINDS:
        assert plot(store, "made", "--kind", kind, "-o", f"{kind}.svg", monkeypatch=monkeypatch) == 0
        out, err = capsys.readouterr()
        assert out == f"{kind}.svg\n" and "Try next" in err
        assert "<svg" in (store / f"{kind}.svg").read_text()
    assert plot(store, "bare", "--width", "one", monkeypatch=monkeypatch) == 0
    assert (store / "bare.png").read_bytes()[16:20] == (1050).to_bytes(4, "big")  # 3.5 inches at 300 dpi
    assert plot(store, "made", "-o", "made.html", monkeypatch=monkeypatch) == 0
    assert "removed conv1: 3, 4" in (store / "made.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("bare", "--kind", "ratio-curve"), "there is only 0.5. It can give: scatter, forest, criteria, parcoords"),
        (("bare", "--kind", "early"), "no early of sweep bare: no cell has accuracies after each epoch"),
        (("made", "--kind", "heatmap", "--where", "layers = ['conv1']"), "and only ratio does"),
        (("made", "--kind", "pie"), "'pie' is not one of 'scatter', 'heatmap'"),
        (("made", "--width", "0.5"), "allowed are one (3.5 in), two (7.16 in) and inches, 2 to 40"),
        (("made", "-o", "made.jpg"), f"made.jpg: allowed are {', '.join(FILES)}"),
        (("made", "-o", "nowhere/made.svg"), "there is no folder nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plot_refuses_with_one_message(
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    """Exit 2, and nothing on stdout."""
    assert plot(store, *arguments, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err.replace("\n", " ") and "Traceback" not in err


def test_drawing_leaves_no_trace_and_needs_no_pyplot(store: Path) -> None:
    """Neither torch nor ray nor pyplot, with its global figures, is imported; matplotlib's settings are as before."""
    code = (
        "import sys, matplotlib; from pathlib import Path; from storage.store import Store\n"
        "from storage.figures import save; from storage.figures.load import load\n"
        "before = dict(matplotlib.rcParams)\n"
        "xy = 'pruned_train_loss', 'best_test_accuracy'\n"
        "save('forest', load(Store('results'), 'made', 'forest', *xy), Path('t.svg'))\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot', 'plotly'} & set(sys.modules), 'imported'\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=store, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_page_on_figures_shows_each_kind_by_a_command() -> None:
    """Every figure of docs/figures.md is made by a command there that parses, and no kind is left out."""
    folder = Path(__file__).parent.parent / "docs"
    text = (folder / "figures.md").read_text()
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("prunesweep plot ")]
    parsed = [cli_plot.plot.make_context("plot", command).params for command in commands]
    assert [one["kind"] for one in parsed] == re.findall(r"^## ([a-z-]+)$", text, re.MULTILINE)
    assert {one["kind"] for one in parsed} == set(KINDS)
    files = {f"figures/{one['output']}" for one in parsed}
    assert files == set(re.findall(r"!\[[\w-]+\]\(([^)]+)\)", text))
    assert all((folder / file).stat().st_size < 200_000 for file in files)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dollar_in_a_name_is_text(kind: str, tmp_path: Path) -> None:
    """A folder may be called so: the figure is written, and shows the name as it is."""
    from dataclasses import replace as changed

    name = "imagefolder:cost$ in_{$"
    named = [changed(cell, dense=changed(cell.dense, dataset=name)) for cell in cells(("conv1", "conv2"), (0.2, 0.5))]
    for figure in draw(kind, made(named, n=6)):
        with look.style():
            figure.savefig(tmp_path / "figure.png")
