"""The page of a report: facts and drawings into one HTML text. Nothing is read from the store here."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import html
from dataclasses import dataclass, replace
from typing import Any

from storage.figures import WIDTHS, FigureData, svg
from storage.figures import why_not as no_figure
from storage.phases import Report, silent
from storage.printable import printable_page
from storage.report import answer, tables, words
from storage.report.numbers import fixed, interval, listed, moment, seconds, share, some
from storage.report.reading import attempt
from storage.report.records import FEW, Facts, Figure, Figures, Part, PlannedCell
from storage.statistics.records import Claim

SECTIONS = (
    ("answer", "The answer"),
    ("tables", "Correlations, noise, picks, power"),
    ("cells", "Cell by cell"),
    ("criteria", "Criteria compared"),
    ("early", "How soon retraining tells"),
    ("ran", "What ran"),
    ("failures", "Failures"),
    ("cost", "Cost"),
    ("methods", "Methods"),
    ("again", "To run it again"),
)


@dataclass(frozen=True)
class Commands:
    """What to type: to make the sweep again, to go on with it, and what made this page."""

    again: str
    resume: str
    report: str


@dataclass(frozen=True)
class CellShown:
    """A cell's own section."""

    planned: PlannedCell
    claim: Claim | None
    sentences: list[answer.Sentence]
    scatter: Part[Figure]


# -- drawings ---------------------------------------------------------------------------------------------


def draw(facts: Facts, phase: Report = silent) -> Figures:
    """Every figure that the facts can give; a kind that has nothing to show says nothing. `phase` gets the phases."""
    data = figure_data(facts)
    all_cells = "τ of every cell with its 95 % interval, and the ceiling where it can be estimated."
    scatters: dict[str, Part[Figure]] = {}
    cells = facts.cells.value or []
    for i, cell in enumerate(cells):
        phase("drawing the scatter of cell", i + 1, len(cells))
        scatters[cell.cell_id] = _scatter(facts, i)
    phase("drawing the figures of all cells")
    alone, many = len(scatters) == 1, len(scatters) > FEW
    bench = replace(data, predictors=answer.overall(list(data.predictors))) if many else data
    return Figures(
        first=next(iter(scatters.values())) if alone else _drawn("forest", data, all_cells),
        more=(
            _drawn("heatmap", data, "τ over the axes of the grid."),
            _drawn("ratio-curve", data, "τ against the pruning ratio."),
        ),
        criteria=_drawn("criteria", bench, "How well each predictor orders the candidates, with 95 % intervals."),
        early=_early(facts, data),
        scatters={} if alone else scatters,
    )


def _early(facts: Facts, data: FigureData) -> Part[Figure]:
    if len(data.cells) > FEW:
        command = f"prunesweep plot {facts.plan.sweep} --kind early -o early.pdf"
        return Part(None, f"a figure with a panel for each of so many cells; `{command}` draws it")
    return _drawn("early", data, "τ between the accuracy after each epoch of retraining and the outcome.")


def figure_data(facts: Facts) -> FigureData:
    """What storage.figures draws from."""
    return FigureData(
        sweep=facts.plan.sweep,
        x=facts.x,
        y=facts.y,
        grid={one.cell.cell_id: one.cell for one in facts.plan.cells},
        cells=facts.cells.value or (),
        claims=facts.claims.value or (),
        predictors=facts.criteria.value.predictors if facts.criteria.value else (),
        early=facts.early.value or (),
    )


def _scatter(facts: Facts, at: int) -> Part[Figure]:
    """One cell's scatter."""
    if facts.claims.value is None:
        return Part(None)
    cell, claim = (facts.cells.value or [])[at], facts.claims.value[at]
    grid = {one.cell.cell_id: one.cell for one in facts.plan.cells if one.cell.cell_id == cell.cell_id}
    data = FigureData(facts.plan.sweep, facts.x, facts.y, grid=grid, cells=[cell], claims=[claim])
    caption = f"Candidates by {words.named(facts.x)} and {words.named(facts.y)}."
    return _drawn("scatter", data, caption, width=WIDTHS["one"], prefix=f"s{at}", alt=_scatter_alt(claim))


def _scatter_alt(claim: Claim) -> str:
    anomaly = share(claim.picks.anomaly_ratio)
    return f"Scatter of {claim.n} candidates: Kendall tau {fixed(claim.tau)}, anomaly ratio {anomaly}."


def _drawn(
    kind: str, data: FigureData, caption: str, *, width: float = WIDTHS["two"], prefix: str = "", alt: str = ""
) -> Part[Figure]:
    if no_figure(kind, data):
        return Part(None)

    def figure() -> Figure:
        label = html.escape(alt or f"{caption} The numbers are in the tables.", quote=True)
        drawing = svg(kind, data, width=width, prefix=prefix or kind)
        return Figure(
            drawing.replace('role="img"', f'role="img" aria-label="{label}"', 1),
            alt or caption,
            caption,
            wide=width > WIDTHS["one"],
        )

    return attempt(figure)


# -- the page ---------------------------------------------------------------------------------------------


def page(facts: Facts, figures: Figures, commands: Commands) -> str:
    """The report as HTML. Every text of the store is escaped, control characters too; figures are ours."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("storage.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "interval": interval, "moment": moment, "some": some}
    script = environment.get_template("page.js.j2").render()
    text = environment.get_template("page.html.j2").render(
        **_shown(facts, figures, commands),
        css=environment.get_template("page.css.j2").render(),
        js=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return printable_page(text)


def _shown(facts: Facts, figures: Figures, commands: Commands) -> dict[str, Any]:
    """All that the template asks for."""
    plan, claims = facts.plan, facts.claims.value or []
    return {
        "facts": facts,
        "figures": figures,
        "sections": SECTIONS,
        "few": len(plan.cells) <= FEW,
        "names": {"x": words.named(facts.x), "y": words.named(facts.y)},
        "labels": tables.labels_of(facts),
        "grid": words.grid_in_words(plan),
        "unfinished": answer.missing_part(plan),
        "resume": commands.resume,
        "headline": answer.headline(facts),
        "limits": answer.limits(facts),
        "tables": [make(facts, claims) for make in (tables.cells, tables.noise, tables.picks, tables.power)],
        "cells": _cells(facts, figures),
        "criteria": _criteria(facts),
        "early": tables.early(facts, facts.early.value or []),
        "ran_facts": _ran_facts(facts),
        "planned": tables.planned(plan),
        "executions": tables.executions(facts.ran.value) if facts.ran.value else None,
        "recovered": _recovered(facts),
        "costs": tables.costs(facts, facts.cost.value) if facts.cost.value else None,
        "spent": _spent(facts),
        "methods": words.methods(facts),
        "python": _python(facts),
        "commands": commands.again,
        "seeds": _seeds(facts),
        "made_by": commands.report,
    }


def _cells(facts: Facts, figures: Figures) -> list[CellShown]:
    claims = {claim.cell_id: claim for claim in facts.claims.value or []}
    found = []
    for one in facts.plan.cells:
        claim = claims.get(one.cell.cell_id)
        said = answer.of_cell(claim) if claim else []
        found.append(CellShown(one, claim, said, figures.scatters.get(one.cell.cell_id, Part(None))))
    return found


def _criteria(facts: Facts) -> dict[str, tables.Table]:
    """The bench over all cells (or of the only one), and, to be folded, cell by cell and in pairs."""
    bench = facts.criteria.value
    if not bench:
        return {}
    first = answer.overall(bench.predictors)
    rest = [line for line in bench.predictors if line not in first]
    name = f"How well each number known before retraining predicts {words.named(facts.y)}"
    found = {
        "overall": tables.criteria(facts, first, "criteria", name),
        "by cell": tables.criteria(facts, rest, "criteria-cells", f"{name}, cell by cell"),
        "in pairs": tables.differences(facts, bench.differences),
    }
    return {name: table for name, table in found.items() if table.lines}


def _ran_facts(facts: Facts) -> list[tuple[str, str]]:
    """Names and what stands beside them."""
    plan, ran = facts.plan, facts.ran.value or []
    firsts, lasts = [one.first for one in ran if one.first], [one.last for one in ran if one.last]
    span = f"{moment(min(firsts))} to {moment(max(lasts))}" if firsts and lasts else ""
    recipes = list(dict.fromkeys(one.cell.retrain for one in plan.cells))
    dense = list(dict.fromkeys(one.cell.dense.recipe for one in plan.cells))
    content = sorted(
        {f"{name} {sha}" for one in plan.cells for name, sha in (*one.cell.content, *one.cell.dense.content)}
    )
    found = [
        ("Expanded", _expanded(plan.expanded_at)),
        ("Rows made", span),
        ("Dense training", "; or ".join(map(words.recipe_in_words, dense[:3]))),
        ("Retraining", "; or ".join(map(words.recipe_in_words, recipes[:3]))),
        ("Retraining seeds", listed([str(seed) for seed in plan.seeds])),
        ("Versions", "; or ".join(dict.fromkeys(_versions(one.versions) for one in ran[:6]))),
        ("Files and code by content", ", ".join(content)),
        ("Store", facts.store),
    ]
    return [(name, text) for name, text in found if text]


def _expanded(stem: str) -> str:
    """When a manifest was written, of the time in its name."""
    try:
        return moment(dt.datetime.strptime(stem[:15], "%Y%m%dT%H%M%S"))
    except ValueError:
        return stem


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _recovered(facts: Facts) -> int:
    """Failed attempts of tasks that are done."""
    return sum(one.failed_attempts for one in facts.cost.value or []) if not facts.plan.failed else 0


def _spent(facts: Facts) -> str:
    """The cost of the whole in a sentence."""
    found = facts.cost.value or []
    attempts, wasted = sum(one.attempts for one in found), sum(one.wasted_attempts for one in found)
    if not attempts:
        return "Nothing was spent on it yet."
    times = [
        _time("CPU", sum(one.cpu_seconds for one in found), sum(one.wasted_cpu_seconds for one in found)),
        _time("GPU", sum(one.gpu_seconds for one in found), sum(one.wasted_gpu_seconds for one in found)),
    ]
    spent = listed([text for text in times if text]) or "no time was recorded"
    lost = sum(one.wasted_cpu_seconds + one.wasted_gpu_seconds for one in found)
    silent = "; the wasted ones left no time" if wasted and not lost else ""
    return f"{some(attempts, 'attempt')}, {wasted:,} of them wasted: {spent}{silent}."


def _time(kind: str, total: float, wasted: float) -> str:
    lost = f", of which {seconds(wasted)}, {share(wasted / total)}, were wasted" if wasted else ""
    return f"{seconds(total)} of {kind} time{lost}" if total else ""


def _python(facts: Facts) -> str:
    found = sorted({one.versions["python"] for one in facts.ran.value or [] if "python" in one.versions})
    return f"Python {listed(found)}" if found else "a Python that prunesweep supports"


def _seeds(facts: Facts) -> str:
    """Every seed there is."""
    cells = [one.cell for one in facts.plan.cells]
    kinds: dict[str, set[int | None]] = {
        "retraining": set(facts.plan.seeds),
        "dense training": {cell.dense.recipe.seed for cell in cells},
        "sampling of candidates": {cell.sampling_seed for cell in cells},
        "pruner": {cell.pruner_seed for cell in cells},
    }
    known = {name: sorted(seed for seed in found if seed is not None) for name, found in kinds.items()}
    return "; ".join(f"{name} {listed([str(seed) for seed in seeds])}" for name, seeds in known.items() if seeds)
