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
from storage.sql import check_select, connection

if TYPE_CHECKING:
    from storage.store import Problem, Store

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
    store.newest(sweep)
    with connection(store, report) as con:
        _check_columns(con, columns)
        query = f"select * from candidates where ({where or 'true'})"
        check_select(con, query)
        try:
            found = con.sql(_CELLS.format(query=query), params={"sweep": sweep})
            lines = found.to_arrow_table().to_pylist()
        except duckdb.Error as error:
            raise QueryError(f"--where: {error}" if where else str(error)) from error
    for line in lines:
        _refuse_mixed(line)
    named = titles(Cell.from_json(line["recipe"]) for line in lines)
    return [_cell(line, named[line["cell_id"]], columns) for line in lines]


_CELLS = """
with chosen as (select * from ({query}) where sweep = $sweep)
select c.cell_id, any_value(c.recipe) as recipe, any_value(c.candidates) as planned,
       any_value(c.seeds) as seeds,
       list(k order by k.candidate) filter (where k.candidate is not null) as found
from cells c left join chosen k on k.cell_id = c.cell_id
where c.sweep = $sweep
group by c.cell_id, c.position order by c.position
"""


def _check_columns(con: duckdb.DuckDBPyConnection, columns: tuple[str, ...]) -> None:
    numeric = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "HUGEINT")
    known = [name for name, kind, *_ in con.sql("describe candidates").fetchall() if kind in numeric]
    for column in columns:
        if column not in known:
            raise QueryError(f"{column} is no number of a candidate; allowed: {', '.join(known)}")


def _refuse_mixed(line: dict[str, Any]) -> None:
    found = line["found"] or []
    whole = Counter(one["dense_sha256"][:8] for one in found if one["n_dense"] == 1)
    if len(whole) < 2 and all(one["n_dense"] < 2 for one in found):
        return
    advice = "Run the sweep again in a new store"
    if whole:
        (most, _), *_ = whole.most_common(1)
        counts = ", ".join(f"{n} from {sha}" for sha, n in whole.most_common())
        advice += (
            f", or look at one network's candidates ({counts}) with "
            f"--where \"n_dense = 1 and dense_sha256 like '{most}%'\""
        )
    message = f"cell {line['cell_id']} mixes rows pruned from different dense networks: they are not comparable"
    raise QueryError(f"{message}. {advice}")


def _cell(line: dict[str, Any], title: str, columns: tuple[str, ...]) -> CellData:
    found = line["found"] or []
    return CellData(
        cell_id=line["cell_id"],
        title=title,
        candidate=[one["candidate"] for one in found],
        columns={name: [one[name] for one in found] for name in columns},
        planned=line["planned"],
        seeds=line["seeds"],
    )


def corr_table(cells: list[CellData], x: str, y: str, beside: str | None = BESIDE) -> pa.Table:
    """The table of `corr`: one line per cell. tau is tau-b; `tau_<beside>` shows y's neighbour."""
    return pa.Table.from_pylist([_line(cell, x, y, beside) for cell in cells], schema=_schema(beside))


def _schema(beside: str | None) -> pa.Schema:
    text, number = pa.string(), pa.float64()
    fields = [("cell", text), ("n", pa.int64()), ("planned", pa.int64()), ("seeds", pa.int64())]
    tests = ("tau", "p", "spearman", "spearman_p", "pearson", "pearson_p", "anomaly_ratio")
    fields += [(name, number) for name in tests]
    fields += [(_beside_name(beside), number)] if beside else []
    return pa.schema([*fields, ("cell_id", text)])


def _beside_name(column: str) -> str:
    return "tau_last5" if column == BESIDE else f"tau_{column}"


def _line(cell: CellData, x: str, y: str, beside: str | None) -> dict[str, Any]:
    found = statistics.correlation(cell.columns[x], cell.columns[y])
    higher = statistics.higher_is_better(y)
    line = {
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
    if beside:
        line[_beside_name(beside)] = statistics.kendall(cell.columns[x], cell.columns[beside])[0]
    return line
