"""Which axis of a grid goes where: the decisions behind heatmap and ratio-curve. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage.figures import words
from storage.figures.data import FigureData
from storage.figures.words import Value
from storage.statistics.records import Claim


@dataclass(frozen=True)
class Table:
    """One heatmap: `fields` is (row, column) -> claim. A pair that the grid does not have is not in `planned`."""

    name: str
    rows: list[Value]
    columns: list[Value]
    fields: Mapping[tuple[Value, Value], Claim]
    planned: frozenset[tuple[Value, Value]]


@dataclass(frozen=True)
class Line:
    """One line of a ratio-curve, in one panel: the claims by ascending ratio."""

    panel: str
    name: str
    claims: list[Claim]
    ratios: list[float]


def values_of(data: FigureData, axis: str) -> list[Value]:
    """The values of an axis: numbers ascending, others in the order of the grid."""
    found = list(dict.fromkeys(line[axis] for line in data.values.values()))
    numbers = sorted(value for value in found if words.is_number(value))
    return [*numbers] if len(numbers) == len(found) else found


def heatmap_axes(data: FigureData) -> tuple[str, str]:
    """The axes of rows and columns: the two with most values; the ratio, where it is one of them, goes across, else
    the one with fewer values (names of layers are long)."""
    most = sorted(data.varying, key=lambda axis: -len(values_of(data, axis)))[:2]
    return (most[0], most[1]) if most[0] != "ratio" else (most[1], most[0])


def tables(data: FigureData) -> list[Table]:
    """A table for every combination of the axes that are neither rows nor columns."""
    down, across = heatmap_axes(data)
    rest = [axis for axis in data.varying if axis not in (down, across)]
    claims = {claim.cell_id: claim for claim in data.claims}
    groups: dict[str, list[str]] = {}
    for cell_id, line in data.values.items():
        groups.setdefault(words.words(line, rest), []).append(cell_id)
    rows, columns = values_of(data, down), values_of(data, across)
    place = {i: (line[down], line[across]) for i, line in data.values.items()}
    return [
        Table(name, rows, columns, {place[i]: claims[i] for i in ids if i in claims}, frozenset(place[i] for i in ids))
        for name, ids in groups.items()
    ]


def lines(data: FigureData) -> list[Line]:
    """The lines of a ratio-curve: one for each value of the axis with fewest values (six at most), in a panel for
    each combination of the others."""
    rest = [axis for axis in data.varying if axis != "ratio"]
    by = min((a for a in rest if len(values_of(data, a)) <= 6), key=lambda a: len(values_of(data, a)), default=None)
    groups: dict[tuple[str, str], list[Claim]] = {}
    for claim in data.ordered:
        line = data.values[claim.cell_id]
        if words.is_number(line["ratio"]):
            panel = words.words(line, [axis for axis in rest if axis != by])
            groups.setdefault((panel, words.words(line, [by] if by else [])), []).append(claim)
    return [_line(data, panel, name, claims) for (panel, name), claims in groups.items()]


def _line(data: FigureData, panel: str, name: str, claims: list[Claim]) -> Line:
    placed = sorted(((float(data.values[c.cell_id]["ratio"]), c) for c in claims), key=lambda pair: pair[0])
    return Line(panel, name, [claim for _, claim in placed], [ratio for ratio, _ in placed])
