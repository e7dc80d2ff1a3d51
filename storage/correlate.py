"""One correlation per cell of a sweep, from the `candidates` view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from storage import statistics
from storage.errors import QueryError
from storage.records import Cell, titles
from storage.sql import check_select, quoted, views

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.rowfiles import Problem
    from storage.store import Store

X = "pruned_train_loss"
Y = "best_test_accuracy"
BESIDE = "last5_test_accuracy_mean"


@dataclass(frozen=True)
class CellData:
    """The candidates of a cell that have every planned seed done, averaged over seeds.

    `columns` holds x, y and what is asked for beside, each [n]. `planned` candidates were planned.
    """

    cell_id: str
    title: str
    candidate: list[int]
    columns: dict[str, list[float | None]]
    planned: int
    seeds: int


def cell_data(
    store: Store,
    sweep: str,
    columns: tuple[str, ...],
    where: str | None = None,
    report: Callable[[Problem], None] | None = None,
) -> list[CellData]:
    """The cells of a sweep in the order of its grid. `where` is SQL over `candidates`.

    Raises QueryError for an unknown sweep or column, for bad SQL, and for a cell that mixes rows
    pruned from two different dense networks.
    """
    grid = _grid(store, store.newest(sweep))
    query = f"select * from candidates where ({where or 'true'})"
    wanted = ["cell_id", "candidate", "n_dense", "dense_sha256", *columns]
    names = ", ".join(_quoted_name(name) for name in dict.fromkeys(wanted))
    with views(store, report) as found:
        try:
            check_select(found.con, query)
            lines = found.ask(_CHOSEN.format(names=names, query=query, sweep=quoted(sweep)), {*_SCANNED, *columns})
        except duckdb.Error as error:
            _check_columns(found.con, columns)
            raise QueryError(f"--where: {error}" if where else str(error)) from error
        if not all(_is_number(lines[name].type) for name in columns):
            _check_columns(found.con, columns)
    groups = _by_cell(lines)
    named = titles(Cell.from_json(line["recipe"]) for line in grid)
    cells = [_cell(line, named[line["cell_id"]], columns, groups.get(line["cell_id"], lines[:0])) for line in grid]
    for cell_id, group in groups.items():
        _refuse_mixed(cell_id, group)
    return cells


_SCANNED = ("task_id", "cell_id", "candidate", "seed", "status", "dense_sha256", "sweep", "chosen")
"""What every candidate is made of."""

_CHOSEN = "select {names} from ({query}) where sweep = {sweep} order by cell_id, candidate"


def _grid(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """The cells of an expansion in the order of its grid, with how many candidates and seeds were planned."""
    plan = store.plan_table(manifest, ["position", "cell_id", "recipe", "candidate", "seed"])
    counted = [("position", "min"), ("candidate", "count_distinct"), ("seed", "count_distinct")]
    cells = plan.group_by("cell_id").aggregate(counted).sort_by("position_min")
    return cells.append_column("recipe", plan["recipe"].take(cells["position_min"])).to_pylist()


def _quoted_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _check_columns(con: duckdb.DuckDBPyConnection, columns: tuple[str, ...]) -> None:
    numeric = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "HUGEINT")
    known = [name for name, kind, *_ in con.sql("describe candidates").fetchall() if kind in numeric]
    for column in columns:
        if column not in known:
            raise QueryError(f"{column} is no number of a candidate; allowed: {', '.join(known)}")


def _by_cell(chosen: pa.Table) -> dict[str, pa.Table]:
    """The lines of each cell; they are ordered by cell."""
    counts = chosen["cell_id"].value_counts()
    groups, start = {}, 0
    for cell_id, n in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
        groups[cell_id] = chosen[start : start + n]
        start += n
    return groups


def _refuse_mixed(cell_id: str, group: pa.Table) -> None:
    counts, hashes = group["n_dense"], group["dense_sha256"]
    if counts.unique().to_pylist() == [1] and len(hashes.unique()) == 1:
        return
    whole = Counter(sha[:8] for n, sha in zip(counts.to_pylist(), hashes.to_pylist(), strict=True) if n == 1)
    if len(whole) < 2 and max(counts.to_pylist()) < 2:
        return
    advice = "Run the sweep again in a new store"
    if whole:
        (most, _), *_ = whole.most_common(1)
        counts = ", ".join(f"{n} from {sha}" for sha, n in whole.most_common())
        advice += (
            f", or look at one network's candidates ({counts}) with "
            f"--where \"n_dense = 1 and dense_sha256 like '{most}%'\""
        )
    message = f"cell {cell_id} mixes rows pruned from different dense networks: they are not comparable"
    raise QueryError(f"{message}. {advice}")


def _cell(line: dict[str, Any], title: str, columns: tuple[str, ...], group: pa.Table) -> CellData:
    return CellData(
        cell_id=line["cell_id"],
        title=title,
        candidate=group["candidate"].to_pylist(),
        columns={name: group[name].to_pylist() for name in columns},
        planned=line["candidate_count_distinct"],
        seeds=line["seed_count_distinct"],
    )


def corr_table(cells: list[CellData], x: str, y: str, beside: str | None = BESIDE) -> pa.Table:
    """The table of `corr`: one line per cell. tau is tau-b; `tau_<beside>` shows y's neighbour."""
    found = statistics.correlations([(cell.columns[x], cell.columns[y]) for cell in cells])
    lines = [_line(cell, x, y, one) for cell, one in zip(cells, found, strict=True)]
    if beside:
        taus = statistics.kendalls([(cell.columns[x], cell.columns[beside]) for cell in cells])
        for line, tau in zip(lines, taus, strict=True):
            line[_beside_name(beside)] = tau
    return pa.Table.from_pylist(lines, schema=_schema(beside))


def _schema(beside: str | None) -> pa.Schema:
    text, number = pa.string(), pa.float64()
    fields = [("cell", text), ("n", pa.int64()), ("planned", pa.int64()), ("seeds", pa.int64())]
    tests = ("tau", "p", "spearman", "spearman_p", "pearson", "pearson_p", "anomaly_ratio")
    fields += [(name, number) for name in tests]
    fields += [(_beside_name(beside), number)] if beside else []
    return pa.schema([*fields, ("cell_id", text)])


def _beside_name(column: str) -> str:
    return "tau_last5" if column == BESIDE else f"tau_{column}"


def _line(cell: CellData, x: str, y: str, found: statistics.Correlation) -> dict[str, Any]:
    higher = statistics.higher_is_better(y)
    return {
        "cell": cell.title,
        "cell_id": cell.cell_id,
        "n": found.n,
        "planned": cell.planned,
        "seeds": cell.seeds,
        "tau": found.kendall,
        "p": found.kendall_p,
        "spearman": found.spearman,
        "spearman_p": found.spearman_p,
        "pearson": found.pearson,
        "pearson_p": found.pearson_p,
        "anomaly_ratio": statistics.anomaly_ratio(cell.columns[x], cell.columns[y], higher=higher),
    }
