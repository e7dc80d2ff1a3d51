"""Two sweeps side by side, or one with itself over an axis: rows that moved, verdicts that changed.

Main path: `paired` finds the cells that are the same but for what may differ, `moved` joins their rows,
`summary` counts them, `verdicts` puts their claims beside each other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from storage.correlate import cell_data
from storage.errors import QueryError
from storage.records import Cell, Recipe
from storage.schema import SCHEMA
from storage.sql import quoted, run_query

if TYPE_CHECKING:
    from storage.correlate import CellData
    from storage.rowfiles import Problem
    from storage.statistics.records import Claim, Interval
    from storage.store import Store

PROVENANCE = ("versions", "execution", "device", "host", "dense_sha256")
"""Of a row, not of a cell: rows that differ in them are still rows of one task."""

GROUPS = {"ratio": "ratios", "pruning_ratio": "ratios", "recipe": "retrain", "recipe_id": "retrain"}
"""Other names of fields."""

_OTHER_UNITS = {"model", "layers", "ratios", "granularity"}
"""Where these differ, no candidate of one cell is one of the other's."""

_OTHER_NUMBERS = {"pruner", "pruner_seed", "candidate_mode", "sampling_seed", "calibration", "scope", "content"}
"""Where these differ, a candidate's number stands for other units: rows are joined by the units themselves."""


_NUMBERS = [f.name for f in SCHEMA if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]


@dataclass(frozen=True)
class Side:
    """A sweep in a store."""

    store: Store
    sweep: str

    def __str__(self) -> str:
        return f"{self.sweep} in {self.store.location}"


@dataclass(frozen=True)
class Pair:
    """Two cells that are the same but for `differing`; `a` and `b` say how each differs."""

    cell_a: str
    cell_b: str
    title: str
    a: str
    b: str
    differing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pairs:
    """What is compared: the pairs of cells, and in which columns of their provenance rows must differ."""

    a: Side
    b: Side
    cells: Sequence[Pair]
    provenance: tuple[str, ...] = ()

    @property
    def differing(self) -> frozenset[str]:
        return frozenset().union(*(pair.differing for pair in self.cells))

    @property
    def joinable(self) -> bool:
        """Whether a candidate of one cell can be one of the other's."""
        return not self.differing & _OTHER_UNITS


# -- which cells ----------------------------------------------------------------------------------------


def cell_fields(cell: Cell) -> dict[str, Any]:
    """What a cell is, flat: `layers`, `ratios`, `dense.epochs`, `retrain.lr`, ..., each hashable."""
    plain = {f.name: getattr(cell, f.name) for f in fields(cell) if f.name not in ("dense", "retrain", "layers")}
    for name, recipe in (("dense", cell.dense.recipe), ("retrain", cell.retrain)):
        plain |= {f"{name}.{f.name}": getattr(recipe, f.name) for f in fields(Recipe)}
    layers = {"layers": tuple(name for name, _ in cell.layers), "ratios": tuple(ratio for _, ratio in cell.layers)}
    dense = {"dense.validation": cell.dense.validation, "dense.content": cell.dense.content}
    return {"model": cell.dense.model, "dataset": cell.dense.dataset, **layers, **plain, **dense}


def paired(a: Side, b: Side, over: Sequence[str] = ()) -> Pairs:
    """The cells of `a` and `b` that are the same but for `over`, or, without it, for what no cell of one has as any of
    the other has it. Within one sweep each two cells are compared once, the earlier in the grid as a.

    Raises QueryError for unknown sweeps and fields, and where nothing is there to compare.
    """
    same = a.sweep == b.sweep and a.store.absolute == b.store.absolute
    if same and not over:
        raise QueryError(f"{a.sweep} with itself: --over says what may differ, as --over propagation")
    cells_a = _cells(a)
    cells_b = cells_a if same else _cells(b)
    free = _resolved(over, cells_a) if over else _apart(cells_a, cells_b)
    provenance = tuple(name for name in PROVENANCE if name in over)
    if same and provenance:
        raise QueryError(f"rows of one sweep in one store differ in no {provenance[0]}: name another with --store-b")
    found = [
        _pair(one, other, cells_a[one], cells_b[other], (a, b))
        for one, other in _alike(cells_a, cells_b, free, same=same)
        if not free or not over or _differ(cells_a[one], cells_b[other], free)
    ]
    if not found:
        raise QueryError(_nothing(a, b, cells_a, cells_b, free))
    return Pairs(a, b, found, provenance)


_Fields = Mapping[str, dict[str, Any]]
"""cell id -> its fields, in the order of the grid."""


def _cells(side: Side) -> _Fields:
    plan = side.store.plan_table(side.store.newest(side.sweep), ["position", "cell_id", "recipe"])
    firsts = plan.group_by("cell_id").aggregate([("position", "min")]).sort_by("position_min")
    recipes = plan["recipe"].take(firsts["position_min"]).to_pylist()
    ids = firsts["cell_id"].to_pylist()
    return {cell_id: cell_fields(Cell.from_json(recipe)) for cell_id, recipe in zip(ids, recipes, strict=True)}


def _resolved(over: Iterable[str], cells: _Fields) -> frozenset[str]:
    """The fields of a cell that `over` names, by themselves or as a group."""
    known = list(next(iter(cells.values()), {}))
    found: set[str] = set()
    for name in over:
        wanted = GROUPS.get(name, name)
        names = {field for field in known if field == wanted or field.startswith(f"{wanted}.")}
        if not names and name not in PROVENANCE:
            allowed = [*known, "dense", "retrain", *PROVENANCE]
            near = get_close_matches(name, [*allowed, *GROUPS], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise QueryError(f"--over {name}: no field of a cell; {hint}allowed: {', '.join(allowed)}")
        found |= names
    return frozenset(found)


def _apart(cells_a: _Fields, cells_b: _Fields) -> frozenset[str]:
    """The fields in which no cell of one side is as any of the other."""
    known = next(iter(cells_a.values()), {})
    values = [{name: {one[name] for one in side.values()} for name in known} for side in (cells_a, cells_b)]
    return frozenset(name for name in known if not values[0][name] & values[1][name])


def _alike(cells_a: _Fields, cells_b: _Fields, free: frozenset[str], *, same: bool) -> list[tuple[str, str]]:
    """The cells that agree in all but `free`."""
    groups: dict[tuple[Any, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for at, cells in enumerate((cells_a, cells_b)):
        for cell_id, values in cells.items():
            groups[tuple(value for name, value in values.items() if name not in free)][at].append(cell_id)
    return [pair for a, b in groups.values() for pair in (combinations(a, 2) if same else product(a, b))]


def _differ(a: dict[str, Any], b: dict[str, Any], names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if a[name] != b[name])


def _pair(one: str, other: str, a: dict[str, Any], b: dict[str, Any], sides: tuple[Side, Side]) -> Pair:
    differing = _differ(a, b, a)
    names = [name for name in a if name in differing]
    kept = ("model", "dataset", "layers", "ratios", "pruner", "propagation", "precision")
    title = " ".join(_text(name, a[name]) for name in kept if name not in differing)
    first, second = _told_apart(names, a), _told_apart(names, b)
    if not names:
        of_store = sides[0].sweep == sides[1].sweep
        first, second = (side.store.location if of_store else side.sweep for side in sides)
    return Pair(one, other, title, first, second, differing)


def _told_apart(names: Sequence[str], values: dict[str, Any]) -> str:
    """`released`; of several fields `propagation=released, precision=fp32`."""
    if len(names) == 1:
        return _text(names[0], values[names[0]])
    return ", ".join(f"{name}={_text(name, values[name])}" for name in names)


def _text(name: str, value: Any) -> str:
    """A value in a few words."""
    if name == "ratios" and len(set(value)) == 1:
        return str(value[0])
    if name in ("layers", "ratios"):
        return "+".join(map(str, value))
    return "none" if value is None else str(value)


def _nothing(a: Side, b: Side, cells_a: _Fields, cells_b: _Fields, free: frozenset[str]) -> str:
    """Why nothing can be compared."""
    if cells_a is cells_b:
        return f"no two cells of {a.sweep} differ in {', '.join(sorted(free))} alone"
    apart = sorted(_apart(cells_a, cells_b) - free)
    why = f"they differ in {', '.join(apart)}: name all that may with --over" if apart else "none is in both"
    return f"no cell of {a} has its like among those of {b}: {why}"


# -- rows -----------------------------------------------------------------------------------------------


def moved(pairs: Pairs, x: str, y: str, report: Callable[[Problem], None] | None = None) -> pa.Table:
    """The rows of both sides, one line per task and its like, those that moved farthest in y, then in x, first;
    rows that did not move are left out. A difference is b less a. Raises QueryError."""
    where = "x_a is distinct from x_b or y_a is distinct from y_b"
    order = "abs(y_b - y_a) desc nulls first, abs(x_b - x_a) desc nulls first, pair, candidate_a, candidate_b, seed"
    seen = ", ".join(f"{name}_{side}" for name in pairs.provenance for side in "ab")
    columns = f"""cell, a, b, candidate_a, candidate_b, seed, y_a as {y}_a, y_b as {y}_b, y_b - y_a as {y}_difference,
        x_a as {x}_a, x_b as {x}_b, x_b - x_a as {x}_difference, {seen + "," if seen else ""} task_a, task_b"""
    table = _joined(pairs, x, y, f"select {columns} from joined where {where} order by {order}", report)
    for name in pairs.provenance:
        if name in ("versions", "execution"):
            table = _only_what_differs(table, name)
    return table


def summary(pairs: Pairs, x: str, y: str, report: Callable[[Problem], None] | None = None) -> pa.Table:
    """Per pair of cells and column: how many rows both have and one only, how many moved, how far (b less a: the mean,
    the mean and the largest without its sign), and the range of each side."""

    def column(name: str, short: str) -> str:
        a, b = f"{short}_a", f"{short}_b"
        return f"""select p.pair, any_value(p.cell) as cell, any_value(p.a) as a, any_value(p.b) as b,
            '{name}' as "column", count(task_a) as rows,
            any_value(coalesce(of_a.n, 0)) - count(distinct task_a) as only_a,
            any_value(coalesce(of_b.n, 0)) - count(distinct task_b) as only_b,
            count(*) filter (where {a} is distinct from {b}) as moved,
            avg({b} - {a}) as mean_difference, avg(abs({b} - {a})) as mean_distance,
            max(abs({b} - {a})) as max_distance,
            min({a}) as low_a, max({a}) as high_a, min({b}) as low_b, max({b}) as high_b
            from pairs p left join joined j on j.pair = p.pair
            left join (select cell_id, count(*) as n from side_a group by 1) of_a on of_a.cell_id = p.cell_a
            left join (select cell_id, count(*) as n from side_b group by 1) of_b on of_b.cell_id = p.cell_b
            group by p.pair"""

    union = " union all ".join(f"({column(name, short)})" for name, short in ((y, "y"), (x, "x")))
    return _joined(pairs, x, y, f"select * exclude (pair) from ({union}) order by pair, \"column\" <> '{y}'", report)


def _joined(pairs: Pairs, x: str, y: str, query: str, report: Callable[[Problem], None] | None) -> pa.Table:
    """What `query` says of `joined`: both sides' finished rows, by seed and candidate."""
    if not pairs.joinable:
        names = ", ".join(sorted(pairs.differing & _OTHER_UNITS))
        raise QueryError(f"cells that differ in {names} have no candidate in common: compare them with --what cells")
    for column in (x, y):
        if column not in _NUMBERS:
            raise QueryError(f"{column} is no number of a row; allowed: {', '.join(_NUMBERS)}")
    by_units = bool(pairs.differing & _OTHER_NUMBERS)
    with duckdb.connect() as con:
        for name, side in (("side_a", pairs.a), ("side_b", pairs.b)):
            con.register(name, _rows(side, x, y, pairs.provenance, report, by_units=by_units))
        con.register("pairs", pa.Table.from_pylist([_line(i, pair) for i, pair in enumerate(pairs.cells)]))
        seen = "".join(f", l.{name} as {name}_a, r.{name} as {name}_b" for name in pairs.provenance)
        differ = " or ".join(f"l.{name} is distinct from r.{name}" for name in pairs.provenance) or "true"
        con.execute(f"""create view joined as
            select p.*, l.candidate as candidate_a, r.candidate as candidate_b, l.seed, l.task_id as task_a,
                   r.task_id as task_b, l.x as x_a, r.x as x_b, l.y as y_a, r.y as y_b{seen}
            from pairs p join side_a l on l.cell_id = p.cell_a join side_b r on r.cell_id = p.cell_b
                and r.seed = l.seed and r.unit = l.unit and ({differ})""")
        return con.sql(query).to_arrow_table()


def _line(i: int, pair: Pair) -> dict[str, Any]:
    named = {"cell": pair.title, "a": pair.a, "b": pair.b}
    return {"pair": i, "cell_a": pair.cell_a, "cell_b": pair.cell_b, **named}


def _rows(
    side: Side,
    x: str,
    y: str,
    more: Sequence[str],
    report: Callable[[Problem], None] | None,
    *,
    by_units: bool,
) -> pa.Table:
    """The finished rows of a sweep: what is compared, and the candidate's number or units."""
    unit = "coalesce(mask_sha256, removed::varchar)" if by_units else "candidate"
    columns = "".join(f", {name}" for name in more)
    return run_query(
        side.store,
        f"""select cell_id, candidate, seed, task_id, {unit} as unit, "{x}"::double as x, "{y}"::double as y{columns}
            from tasks where status = 'done' and sweep = {quoted(side.sweep)}""",
        report,
    )


def _only_what_differs(table: pa.Table, name: str) -> pa.Table:
    """The JSON of both sides, without what they have in common."""
    names = (f"{name}_a", f"{name}_b")
    shown: dict[tuple[str | None, str | None], tuple[str, str]] = {}
    sides = list(zip(*(table[one].to_pylist() for one in names), strict=True))
    for pair in set(sides):
        a, b = (json.loads(one or "{}") for one in pair)
        keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        first, second = (", ".join(f"{key} {side.get(key, 'none')}" for key in keys) for side in (a, b))
        shown[pair] = first, second
    for at, one in enumerate(names):
        texts = pa.array([shown[pair][at] for pair in sides], pa.string())
        table = table.set_column(table.column_names.index(one), one, texts)
    return table


# -- verdicts -------------------------------------------------------------------------------------------


def verdicts(pairs: Pairs, x: str, y: str, report: Callable[[Problem], None] | None = None) -> pa.Table:
    """Per pair of cells tau with its interval, p and the verdict of each side; the difference of tau with its own, over
    the candidates of both; and whether the verdict changed: those that did first.

    A side without a verdict has changed nothing. Raises QueryError.
    """
    a = _claims(pairs.a, x, y, report)
    b = a if pairs.a == pairs.b else _claims(pairs.b, x, y, report)
    lines = [_both(pair, a[pair.cell_a], b[pair.cell_b], x, y) for pair in pairs.cells]
    return pa.Table.from_pylist(sorted(lines, key=lambda line: not line["changed"]), schema=_VERDICTS)


_Claimed = tuple["CellData", "Claim"]


def _claims(side: Side, x: str, y: str, report: Callable[[Problem], None] | None) -> dict[str, _Claimed]:
    from storage.claims import claims

    cells = cell_data(side.store, side.sweep, (x, y), None, report)
    return {cell.cell_id: (cell, claim) for cell, claim in zip(cells, claims(cells, x, y), strict=True)}


def _tau_difference(pair: Pair, a: CellData, b: CellData, x: str, y: str) -> Interval:
    """The interval of the difference of tau, over the candidates that both cells have; none where a number stands for
    other units on the other side."""
    from storage.statistics.resampling import tau_difference

    both = set(a.candidate) & set(b.candidate) if not set(pair.differing) & (_OTHER_UNITS | _OTHER_NUMBERS) else set()
    sides = []
    for cell in (a, b):
        at = [place for place, candidate in enumerate(cell.candidate) if candidate in both]
        sides += [np.asarray(cell.columns[name], dtype=np.float64)[at] for name in (x, y)]
    there = np.isfinite(sides).all(axis=0)
    x_a, y_a, x_b, y_b = (side[there] for side in sides)
    return tau_difference((x_a, y_a), (x_b, y_b))


def _on(name: str, side: str) -> str:
    """`tau_a`, `tau_a_low`."""
    word, _, end = name.partition("_")
    return f"{word}_{side}_{end}" if end else f"{word}_{side}"


_SIDE: dict[str, tuple[pa.DataType, Callable[[Claim], Any]]] = {
    "n": (pa.int64(), lambda claim: claim.n),
    "tau": (pa.float64(), lambda claim: claim.tau),
    "tau_low": (pa.float64(), lambda claim: claim.tau_interval.low),
    "tau_high": (pa.float64(), lambda claim: claim.tau_interval.high),
    "p": (pa.float64(), lambda claim: claim.p),
    "verdict": (pa.string(), lambda claim: claim.verdict),
}
_VERDICTS = pa.schema(
    [("cell", pa.string()), ("a", pa.string()), ("b", pa.string()), ("changed", pa.bool_())]
    + [(_on(name, side), kind) for side in "ab" for name, (kind, _) in _SIDE.items()]
    + [(f"tau_difference{end}", pa.float64()) for end in ("", "_low", "_high")]
    + [("cell_a", pa.string()), ("cell_b", pa.string())]
)


def _both(pair: Pair, one: _Claimed, other: _Claimed, x: str, y: str) -> dict[str, Any]:
    (cell_a, a), (cell_b, b) = one, other
    sides = {
        _on(name, side): value(claim) for side, claim in (("a", a), ("b", b)) for name, (_, value) in _SIDE.items()
    }
    changed = bool(a.verdict and b.verdict and a.verdict != b.verdict)
    about = {"cell": pair.title, "a": pair.a, "b": pair.b, "changed": changed, "tau_difference": b.tau - a.tau}
    found = _tau_difference(pair, cell_a, cell_b, x, y)
    about |= {"tau_difference_low": found.low, "tau_difference_high": found.high}
    return about | sides | {"cell_a": pair.cell_a, "cell_b": pair.cell_b}
