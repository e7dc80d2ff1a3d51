"""The numbers of each cell of a sweep, from the views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from storage.errors import QueryError
from storage.records import Cell, titles
from storage.schema import SCHEMA
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

    `columns` holds x, y and what is asked for beside, each [n]; `by_seed` those of them that tasks have, before they
    were averaged, each [n, seeds] with NaN for null. `planned` candidates were planned, and more can be if it `grows`.
    """

    cell_id: str
    title: str
    candidate: list[int]
    columns: dict[str, list[float | None]]
    planned: int
    seeds: int
    by_seed: dict[str, np.ndarray] = field(default_factory=dict)
    grows: bool = False


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
    query = f"select * from candidates where ({where or 'true'}\n)"  # where may end in a comment
    wanted = ["cell_id", "candidate", "n_dense", "dense_sha256", *columns]
    names = ", ".join(_quoted_name(name) for name in dict.fromkeys(wanted))
    with views(store, report) as found:
        try:
            check_select(found.con, query)
            expected = {*_SCANNED, *columns}
            lines = found.ask(_CHOSEN.format(names=names, query=query, sweep=quoted(sweep)), expected)
            measured = [name for name in dict.fromkeys(columns) if name in SCHEMA.names and name != "candidate"]
            each = ", ".join(["cell_id", "candidate", *measured])
            seeds = found.ask(_SEEDS.format(names=each, sweep=quoted(sweep)), expected)
        except QueryError as error:
            raise QueryError(f"--where: {error}") from error
        except duckdb.Error as error:
            _check_columns(found.con, columns)
            raise QueryError(f"--where: {error}" if where else str(error)) from error
        if not all(_is_number(lines[name].type) for name in columns):
            _check_columns(found.con, columns)
    groups, replicates = _by_cell(lines), _by_cell(seeds)
    named = titles(Cell.from_json(line["recipe"]) for line in grid)
    for cell_id, group in groups.items():
        _refuse_mixed(cell_id, group)
    return [
        _cell(line, named[cell_id], columns, groups.get(cell_id, lines[:0]), replicates.get(cell_id, seeds[:0]))
        for line in grid
        for cell_id in [line["cell_id"]]
    ]


_SCANNED = ("task_id", "cell_id", "candidate", "seed", "status", "dense_sha256", "sweep", "chosen")
"""What every candidate is made of."""

_CHOSEN = "select {names} from ({query}) where sweep = {sweep} order by cell_id, candidate"
_SEEDS = """select {names} from tasks where sweep = {sweep} and status = 'done' order by cell_id, candidate, seed"""


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


def _cell(line: dict[str, Any], title: str, columns: tuple[str, ...], group: pa.Table, seeds: pa.Table) -> CellData:
    candidates = group["candidate"].to_numpy()
    lines = seeds.filter(pa.array(np.isin(seeds["candidate"].to_numpy(), candidates)))
    each = {name: lines[name] for name in lines.column_names if name not in ("cell_id", "candidate")}
    crossed = len(set(np.unique(lines["candidate"].to_numpy(), return_counts=True)[1].tolist())) == 1
    return CellData(
        cell_id=line["cell_id"],
        title=title,
        candidate=candidates.tolist(),
        columns={name: group[name].to_pylist() for name in columns},
        planned=line["candidate_count_distinct"],
        seeds=line["seed_count_distinct"],
        by_seed={name: _numbers(values).reshape(len(group), -1) for name, values in each.items()} if crossed else {},
        grows=Cell.from_json(line["recipe"]).candidate_mode == "sample",
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64, with NaN for null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
