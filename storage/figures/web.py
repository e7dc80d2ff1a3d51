"""Figures to look at closely: one HTML file with plotly inside, which opens without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from math import ceil, isfinite
from typing import Any

import numpy as np

from storage.figures import look, parallel, scatter, taus, words
from storage.figures.arranged import heatmap_axes, lines, tables
from storage.figures.data import FigureData
from storage.printable import printable, printable_lines, printable_page
from storage.statistics.records import Claim, Interval

Clouds = list[tuple[Claim, scatter.Cloud]]

WEBGL = 10_000
"""Points of a figure above which the graphics card draws them."""

PANELS = 12
"""Panels of so many points above which one is shown at a time."""

_BELOW = {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"}
_NOTE = {
    "xref": "paper",
    "yref": "paper",
    "x": 0,
    "y": 1.01,
    "xanchor": "left",
    "yanchor": "bottom",
    "showarrow": False,
}

_PANEL = 380
"""Pixels that a panel has in height."""


def page(kind: str, data: FigureData) -> str:
    """A whole HTML document that refers to nothing outside itself."""
    figure = _KINDS[kind](data)
    figure.update_layout(template="plotly_white", font={"size": 12}, hoverlabel={"align": "left"})
    body = type(figure)(_escaped(figure.to_dict())).to_html(
        include_plotlyjs=True, include_mathjax=False, full_html=False, config={"displaylogo": False, "responsive": True}
    )
    name = html.escape(printable(f"{data.sweep}: {kind}"))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    return printable_page(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def _escaped(part: Any) -> Any:
    """A part of a figure whose texts have their control and bidirectional characters escaped."""
    if isinstance(part, str):
        return printable_lines(part)
    if isinstance(part, dict):
        return {key: _escaped(value) for key, value in part.items()}
    if isinstance(part, np.ndarray) and part.dtype.kind in "OU":
        part = part.tolist()
    return [_escaped(value) for value in part] if isinstance(part, list | tuple) else part


def _sheet(titles: Sequence[str], widest: int = 3, height: int = _PANEL, **shared: Any) -> Any:
    """Panels under their titles, `widest` side by side at most."""
    from plotly.subplots import make_subplots

    across = min(len(titles), widest)
    down = ceil(len(titles) / across)
    gap = 75 + 15 * max(title.count("<br>") + 1 for title in titles)
    total = down * (height + gap) + 90
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[*titles, *[""] * (down * across - len(titles))],
        vertical_spacing=min(gap / total, 0.9 / down) if down > 1 else None,
        horizontal_spacing=0.08 if across > 1 else None,
        **shared,
    )
    figure.update_annotations(font_size=11)
    figure.update_layout(height=total, margin={"t": gap, "l": 70, "r": 20})
    return figure


def _place(at: int, widest: int, panels: int) -> dict[str, int]:
    across = min(panels, widest)
    return {"row": at // across + 1, "col": at % across + 1}


def _titled(name: str, facts: Sequence[str] = (), room: int = 52) -> str:
    below = words.filled(facts, room)
    return html.escape(words.wrapped(name, room) + (f"\n{below}" if below else "")).replace("\n", "<br>")


def _head(figure: Any, data: FigureData) -> None:
    about = f"{data.sweep}: {data.common}" if data.common else data.sweep
    figure.update_layout(title={"text": html.escape(about), "font": {"size": 13}, "y": 0.995, "yanchor": "top"})


# -- candidates -------------------------------------------------------------------------------------------


def _scatter(data: FigureData) -> Any:
    found = scatter.clouds(data)
    count = sum(len(cloud.x) for _, cloud in found)
    # Canvases of the graphics card have a greatest height, so many panels of many points do not fit below each other.
    figure = (_chosen if count > WEBGL and len(found) > PANELS else _together)(data, found, count > WEBGL)
    log = look.needs_log(np.concatenate([cloud.x for _, cloud in found]))
    figure.update_xaxes(title=words.short(data.x) + (" (log scale)" if log else ""), type="log" if log else "linear")
    if log:
        figure.update_xaxes(dtick="D2", minor={"showgrid": False})
    figure.update_yaxes(title=words.short(data.y))
    figure.update_xaxes(ticksuffix=_suffix(data.x)).update_yaxes(ticksuffix=_suffix(data.y))
    figure.update_layout(hovermode="closest", legend=_BELOW)
    _head(figure, data)
    return figure


def _together(data: FigureData, found: Clouds, gl: bool) -> Any:
    """A panel per cell."""
    figure = _sheet([_titled(data.name(claim.cell_id), words.facts(claim)) for claim, _ in found])
    traces, named, shapes = [], set(), []
    for at, (claim, cloud) in enumerate(found):
        end = str(at + 1) if at else ""
        for trace in _points(data, claim.cell_id, cloud, gl):
            traces.append(trace.update(xaxis=f"x{end}", yaxis=f"y{end}", showlegend=trace.name not in named))
            named.add(trace.name)
        shapes += _cross(data, cloud, end)
    figure.add_traces(traces)
    figure.update_layout(shapes=shapes)
    return figure


def _chosen(data: FigureData, found: Clouds, gl: bool) -> Any:
    """One cell at a time, chosen from a list."""
    from plotly import graph_objects as go

    figure, owner = go.Figure(), []
    for at, (claim, cloud) in enumerate(found):
        for trace in _points(data, claim.cell_id, cloud, gl):
            figure.add_trace(trace.update(visible=at == 0))
            owner.append(at)
    facts = [html.escape(", ".join(words.facts(claim))) for claim, _ in found]
    changes = [
        {"shapes": _cross(data, cloud, ""), "annotations": [_NOTE | {"text": text}]}
        for text, (_, cloud) in zip(facts, found, strict=True)
    ]
    _menu(figure, [data.name(claim.cell_id) for claim, _ in found], owner, changes)
    figure.update_layout(height=720, margin={"t": 130}, **changes[0])
    return figure


def _menu(figure: Any, names: Sequence[str], owner: Sequence[int], changes: Sequence[dict[str, Any]]) -> None:
    """A list to choose one of: trace j belongs to the one numbered owner[j]; `changes` are the layout's."""
    buttons = [
        {"label": html.escape(name), "method": "update", "args": [{"visible": [one == i for one in owner]}, change]}
        for i, (name, change) in enumerate(zip(names, changes, strict=True))
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"b": 40}}
    figure.update_layout(updatemenus=[{"buttons": buttons, **place}])


def _points(data: FigureData, cell_id: str, cloud: scatter.Cloud, gl: bool) -> list[Any]:
    """The traces of a cell: the others, the better ones, the pick; without those that have no points, which would
    have no place in the legend."""
    from plotly import graph_objects as go

    kind: Any = go.Scattergl if gl else go.Scatter
    told = np.array(_hover(data, cell_id, cloud), object)
    picked = np.arange(len(cloud.x)) == cloud.picked
    pick, better, others = scatter.labels(data.x)
    size, opacity = (3, 0.3) if len(cloud.x) > scatter.MANY else (5, 0.7)
    parts = (
        (~cloud.better & ~picked, others, {"color": look.OTHERS, "size": size, "opacity": opacity}),
        (cloud.better, better, {"color": look.BETTER, "size": size + 1, "symbol": "triangle-up", "opacity": opacity}),
        (picked, pick, {"color": look.PICKED, "size": 15, "symbol": "star"}),
    )
    return [
        kind(
            x=_scaled(data.x, cloud.x[chosen]),
            y=_scaled(data.y, cloud.y[chosen]),
            mode="markers",
            marker=mark,
            name=name,
            legendgroup=name,
            text=told[chosen],
            hovertemplate="%{text}<extra></extra>",
        )
        for chosen, name, mark in parts
        if chosen.any()
    ]


def _scaled(column: str, values: np.ndarray) -> np.ndarray:
    """What stands along an axis: shares in percent."""
    return 100 * values if words.is_share(column) else values


def _suffix(column: str) -> str:
    return " %" if words.is_share(column) else ""


def _cross(data: FigureData, cloud: scatter.Cloud, end: str) -> list[dict[str, Any]]:
    """Dashed lines through the pick, over the whole panel whose axes end in `end`."""
    line = {"type": "line", "line": {"color": look.PICKED, "dash": "dash", "width": 1}, "layer": "below"}
    x, y = float(_scaled(data.x, cloud.x)[cloud.picked]), float(_scaled(data.y, cloud.y)[cloud.picked])
    return [
        line | {"x0": x, "x1": x, "y0": 0, "y1": 1, "xref": f"x{end}", "yref": f"y{end} domain"},
        line | {"x0": 0, "x1": 1, "y0": y, "y1": y, "xref": f"x{end} domain", "yref": f"y{end}"},
    ]


def _hover(data: FigureData, cell_id: str, cloud: scatter.Cloud) -> list[str]:
    """Candidate number, x and y, the values of each seed, the removed filters."""
    removed = data.removed.get(cell_id, {})
    write = (lambda v: words.percent(v, 2)) if words.is_share(data.y) else (lambda v: f"{v:.4g}")
    made = []
    for i, candidate in enumerate(cloud.candidate.tolist()):
        x = words.percent(cloud.x[i], 2) if words.is_share(data.x) else f"{cloud.x[i]:.5g}"
        lines = [f"candidate {candidate}", f"{words.short(data.x)} {x}"]
        lines.append(f"{words.short(data.y)} {write(cloud.y[i])}")
        if cloud.seeds is not None and cloud.seeds.shape[1] > 1:
            lines.append("by seed: " + ", ".join(map(write, cloud.seeds[i].tolist())))
        if candidate in removed:
            lines.append("removed " + html.escape(removed[candidate]))
        made.append("<br>".join(lines))
    return made


def _parcoords(data: FigureData) -> Any:
    """One cell at a time, chosen from a list: each takes the whole width, and a browser draws few such at once."""
    from plotly import graph_objects as go

    found = parallel.shown(data)
    figure, names = go.Figure(), []
    for at, (cell, columns) in enumerate(found):
        values = parallel.complete(cell, columns)
        dimensions = [
            {
                "label": words.short(name) + (", %" if words.is_share(name) else ""),
                "values": _scaled(name, values[:, i]),
            }
            | {"tickformat": ".3g"}
            for i, name in enumerate(columns)
        ]
        line = {"color": values[:, -1], "colorscale": "Cividis", "showscale": False}
        figure.add_trace(go.Parcoords(dimensions=dimensions, line=line, visible=at == 0))
        names.append(f"{data.name(cell.cell_id)} (n = {len(values)})")
    _menu(figure, names, range(len(names)), [{}] * len(names))
    figure.update_layout(height=560, margin={"t": 150, "l": 90, "r": 90, "b": 40})
    _head(figure, data)
    return figure


# -- tau --------------------------------------------------------------------------------------------------


def _bars(values: Sequence[float], around: Sequence[Interval]) -> dict[str, Any]:
    ends = [taus.whiskers(at, one) for at, one in zip(values, around, strict=True)]
    return {"type": "data", "symmetric": False, "array": [b for _, b in ends], "arrayminus": [a for a, _ in ends]}


def _about(data: FigureData, claim: Claim) -> str:
    return "<br>".join(html.escape(text) for text in (data.name(claim.cell_id), *words.facts(claim)))


def _heatmap(data: FigureData) -> Any:
    from plotly import graph_objects as go

    found = tables(data)
    down, across = heatmap_axes(data)
    figure = _sheet([_titled(table.name) for table in found], 2, 120 + 40 * len(found[0].rows))
    most = taus.most(data)
    for at, table in enumerate(found):
        claims = [[table.fields.get((row, column)) for column in table.columns] for row in table.rows]
        shown = [[claim.tau if claim and isfinite(claim.tau) else None for claim in line] for line in claims]
        mark = [[taus.marked(claim) if claim else "" for claim in line] for line in claims]
        told = [[_about(data, claim) if claim else "" for claim in line] for line in claims]
        figure.add_trace(
            go.Heatmap(
                x=[str(column) for column in table.columns],
                y=[_titled(str(row), room=30) for row in table.rows],
                z=shown,
                text=mark,
                texttemplate="%{text}",
                customdata=told,
                hovertemplate="%{customdata}<extra></extra>",
                coloraxis="coloraxis",
            ),
            **_place(at, 2, len(found)),
        )
    figure.update_yaxes(autorange="reversed", title=down, type="category")
    figure.update_xaxes(title=f"{across} ({taus.SIGNIFICANT})", type="category")
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -most, "cmax": most, "colorbar": {"title": "τ"}})
    _head(figure, data)
    return figure


def _ratio_curve(data: FigureData) -> Any:
    from plotly import graph_objects as go

    found = lines(data)
    panels = list(dict.fromkeys(line.panel for line in found))
    names = list(dict.fromkeys(line.name for line in found))
    figure = _sheet([_titled(panel) for panel in panels])
    for line in found:
        where = _place(panels.index(line.panel), 3, len(panels))
        colour = look.COLOURS[names.index(line.name) % len(look.COLOURS)]
        values = [claim.tau for claim in line.claims]
        common = {"x": line.ratios, "legendgroup": line.name, "line": {"color": colour}}
        first = line.panel == panels[0]
        told = [_about(data, claim) for claim in line.claims]
        figure.add_trace(
            go.Scatter(
                y=values,
                error_y=_bars(values, [claim.tau_interval for claim in line.claims]),
                text=told,
                hovertemplate="%{text}<extra></extra>",
                name=line.name or "τ, 95 %",
                showlegend=first,
                **common,
            ),
            **where,
        )
        ceilings = [taus.ceiling_of(claim) for claim in line.claims]
        if any(map(isfinite, ceilings)):
            dashed = common | {"line": {"color": colour, "dash": "dash"}}
            named = f"noise ceiling {line.name}"
            figure.add_trace(go.Scatter(y=ceilings, mode="lines", name=named, showlegend=first, **dashed), **where)
    figure.add_hline(y=taus.limit(data), line={"dash": "dot", "color": look.FAINT, "width": 1})
    figure.update_xaxes(title="pruning ratio")
    figure.update_yaxes(title=words.wrapped(taus.tau_label(data), 40).replace("\n", "<br>"))
    height = figure.layout.height + 20 * len(names)
    figure.update_layout(legend=_BELOW, height=height, margin={"b": 90 + 20 * len(names)})
    _head(figure, data)
    return figure


def _forest(data: FigureData) -> Any:
    from plotly import graph_objects as go

    found = data.every
    figure = go.Figure()
    names = [_titled(data.name(claim.cell_id), room=60) for claim in found]
    for verdict, colour in (("valid", look.COLOURS[0]), ("not valid", look.COLOURS[1])):
        some = [i for i, claim in enumerate(found) if claim.verdict == verdict]
        figure.add_trace(
            go.Scatter(
                x=[found[i].tau for i in some],
                y=some,
                error_x=_bars([found[i].tau for i in some], [found[i].tau_interval for i in some]),
                mode="markers",
                marker={"color": colour, "size": 8},
                name=verdict,
                text=[_about(data, found[i]) for i in some],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    ceilings = [taus.ceiling_of(claim) for claim in found]
    if any(map(isfinite, ceilings)):
        mark = {"symbol": "line-ns-open", "size": 14, "color": "black"}
        figure.add_trace(
            go.Scatter(x=ceilings, y=[*range(len(found))], mode="markers", marker=mark, name="noise ceiling")
        )
    figure.add_vline(x=taus.limit(data), line={"dash": "dot", "color": look.FAINT})
    figure.add_vline(x=0, line={"color": look.FAINT, "width": 1})
    ticks = [f"{name} (n = {claim.n})" for name, claim in zip(names, found, strict=True)]
    figure.update_yaxes(tickvals=[*range(len(found))], ticktext=ticks, range=[len(found) - 0.5, -0.5], automargin=True)
    figure.update_xaxes(title=taus.tau_label(data))
    line = 16 * max(name.count("<br>") + 1 for name in ticks) + 10
    figure.update_layout(height=200 + line * len(found))
    _head(figure, data)
    return figure


def _criteria(data: FigureData) -> Any:
    from plotly import graph_objects as go

    groups = taus.by_cell(data)
    order = taus.predictor_order(groups)
    titles = [_titled(taus.bench_name(data, cell_id), room=40) for cell_id in groups]
    figure = _sheet(titles, 4, 80 + 24 * len(order), shared_yaxes=True)
    for at, found in enumerate(groups.values()):
        values = [predictor.tau for predictor in found]
        told = [
            f"{one.name}<br>τ = {words.with_interval(one.tau, one.tau_interval)}, {words.p_value(one.p)}, n = {one.n}"
            f"<br>rank {one.rank}; better than {', '.join(map(words.short, one.beats)) or 'none by more than chance'}"
            for one in found
        ]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=[words.short(one.name) for one in found],
                error_x=_bars(values, [one.tau_interval for one in found]),
                mode="markers",
                marker={"color": [look.COLOURS[one.name == "pruned_train_loss"] for one in found], "size": 8},
                text=told,
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
            ),
            **_place(at, 4, len(groups)),
        )
    figure.update_yaxes(categoryorder="array", categoryarray=[words.short(name) for name in reversed(order)])
    figure.update_xaxes(title="Kendall τ")
    _head(figure, data)
    return figure


def _early(data: FigureData) -> Any:
    from plotly import graph_objects as go

    groups = taus.epochs_by_cell(data)
    figure = _sheet([_titled(data.name(cell_id)) for cell_id in groups])
    first, second = taus.early_names(data)
    for at, found in enumerate(groups.values()):
        where = _place(at, 3, len(groups))
        epochs, values = [one.epoch for one in found], [one.tau for one in found]
        bars = _bars(values, [one.tau_interval for one in found]) | {"thickness": 1}
        for y, name, colour, more in (
            (values, first, look.COLOURS[0], {"error_y": bars}),
            ([one.tau_x for one in found], second, look.COLOURS[1], {"line_dash": "dash"}),
        ):
            trace = go.Scatter(
                x=epochs, y=y, name=name, legendgroup=name, showlegend=at == 0, line_color=colour, **more
            )
            figure.add_trace(trace, **where)
    figure.update_xaxes(title="epochs of retraining done (k)")
    figure.update_yaxes(title="Kendall τ")
    figure.update_layout(legend=_BELOW)
    _head(figure, data)
    return figure


_KINDS = {
    "scatter": _scatter,
    "heatmap": _heatmap,
    "ratio-curve": _ratio_curve,
    "forest": _forest,
    "criteria": _criteria,
    "early": _early,
    "parcoords": _parcoords,
}
