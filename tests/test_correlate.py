"""One correlation per cell: the table of `corr`."""

import math
from pathlib import Path

import numpy as np
import pytest

from storage import statistics
from storage.claims import claims
from storage.correlate import BESIDE, CellData, X, Y, cell_data
from storage.errors import QueryError
from storage.records import Cell
from storage.store import Problem, Store
from storage.tables import SHOWN, corr_table, with_beside
from tests.rows import L1, ORACLE, SAMPLED, SHA_A, SHA_B, done, failed, plan, tasks

COLUMNS = (X, Y, BESIDE, "best_test_loss")
# per cell: candidates, and per column its value for every candidate and seed
SIZES = {ORACLE: 6, SAMPLED: 4, L1: 1}
_draw = np.random.Generator(np.random.Philox(3)).uniform
VALUES = {cell: {name: _draw(0.1, 0.9, (n, 2)) for name in COLUMNS} for cell, n in SIZES.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The sweep `mini` of three cells with two seeds, complete but for two candidates of ORACLE; `half` has no row,
    `also` has three candidates of mini's with one seed."""
    found = Store(tmp_path_factory.mktemp("store"))
    planned = [task for cell in SIZES for task in tasks(cell, SIZES[cell] + 2 * (cell == ORACLE), 2)]
    plan(found, "mini", planned)
    plan(found, "half", tasks(Cell(L1.dense, L1.layers, "l2", L1.retrain), 2))
    plan(found, "also", tasks(ORACLE, 3))
    rows = [
        done(task, **{name: float(VALUES[cell][name][task.candidate, task.seed]) for name in COLUMNS})
        for cell in SIZES
        for task in tasks(cell, SIZES[cell], 2)
    ]
    extra = [task for task in tasks(ORACLE, 8, 2) if task.candidate >= 6]
    found.commit_rows("s0", [*rows, done(extra[0], **dict.fromkeys(COLUMNS, 0.0)), failed(extra[1]), failed(extra[2])])
    return found


def _means(cell: Cell, name: str) -> list[float]:
    return VALUES[cell][name].mean(1).tolist()


def test_cells_come_in_the_order_of_the_grid_with_their_candidates(store: Store) -> None:
    """Every cell of the sweep is there, with seed averages of the candidates that have every seed done."""
    found = cell_data(store, "mini", COLUMNS)
    assert [cell.cell_id for cell in found] == [cell.cell_id for cell in SIZES]
    assert [cell.title for cell in found] == [str(cell) for cell in SIZES]
    assert [(cell.planned, cell.seeds) for cell in found] == [(8, 2), (4, 2), (1, 2)]
    for data, cell in zip(found, SIZES, strict=True):
        assert data.candidate == list(range(SIZES[cell]))
        for name in COLUMNS:
            assert data.columns[name] == pytest.approx(_means(cell, name), rel=1e-14)


def test_a_cell_of_two_sweeps_is_seen_as_each_planned_it(store: Store) -> None:
    """Rows are shared, candidates and seeds are the sweep's own."""
    (found,) = cell_data(store, "also", (X, Y))
    assert (found.candidate, found.planned, found.seeds) == ([0, 1, 2], 3, 1)
    assert found.columns[X] == VALUES[ORACLE][X][:3, 0].tolist()


@pytest.mark.parametrize(("y", "higher"), [(Y, True), ("best_test_loss", False)])
def test_the_table_is_the_statistics_of_the_cells(y: str, higher: bool, store: Store) -> None:
    """Every number of `corr` is the one of storage.statistics, over known candidates."""
    cells = cell_data(store, "mini", COLUMNS)
    table = corr_table(claims(cells, X, y), "all")
    assert table.column_names[:4] == ["cell", "n", "planned", "seeds"]
    for line, cell in zip(table.to_pylist()[:2], (ORACLE, SAMPLED), strict=True):
        a, b = (_means(cell, name) for name in (X, y))
        expected = statistics.correlation(a, b)
        assert (line["cell"], line["n"]) == (str(cell), SIZES[cell])
        assert (line["tau"], line["p"]) == pytest.approx((expected.kendall, expected.kendall_p))
        assert (line["spearman"], line["pearson"]) == pytest.approx((expected.spearman, expected.pearson))
        assert line["anomaly_ratio"] == statistics.anomaly_ratio(a, b, higher=higher)


def test_values_by_seed_are_in_the_order_of_the_candidates(store: Store) -> None:
    """What the means are of stands beside them, for the columns that tasks have."""
    for data, cell in zip(cell_data(store, "mini", (*COLUMNS, "best_test_loss_std")), SIZES, strict=True):
        assert set(data.by_seed) == set(COLUMNS)
        for name in COLUMNS:
            assert data.by_seed[name].tolist() == VALUES[cell][name].tolist()
        assert data.grows is (cell == SAMPLED)


def test_the_column_beside_is_named_after_what_it_is(store: Store) -> None:
    """`tau_last5` stands beside the optimistic best; another neighbour brings its own name."""
    found = corr_table(claims(cell_data(store, "mini", COLUMNS), X, Y))
    assert with_beside(found, [0.0] * 3, BESIDE).column_names[-2:] == ["tau_last5", "cell_id"]
    assert with_beside(found, [0.0] * 3, "best_test_loss").column_names[-2:] == ["tau_best_test_loss", "cell_id"]


@pytest.mark.parametrize("show", [*SHOWN, "all"])
def test_a_cell_of_one_candidate_or_none_is_nan(show: str, store: Store) -> None:
    """What has too few candidates yet is a line of NaN in every table, not a crash and not left out."""
    found = [claims(cell_data(store, sweep, COLUMNS), X, Y) for sweep in ("mini", "half")]
    for line in corr_table([found[0][2], *found[1]], show).to_pylist():
        assert line["n"] == (1 if line["cell"] == str(L1) else 0)
        assert all(math.isnan(value) for value in line.values() if isinstance(value, float))
        assert not line.get("settled") and not line.get("verdict")


def test_where_chooses_candidates(store: Store) -> None:
    """`where` is SQL over `candidates`; cells without a match stay, with n = 0."""
    found = cell_data(store, "mini", COLUMNS, where="candidate in (1, 3, 5) and list_contains(layers, 'conv1')")
    assert [cell.candidate for cell in found] == [[1, 3, 5], [1, 3], []]
    assert found[0].columns[X] == pytest.approx([_means(ORACLE, X)[i] for i in (1, 3, 5)])
    assert [claim.n for claim in claims(found, X, Y)] == [3, 2, 0]
    assert found[0].by_seed[Y].tolist() == VALUES[ORACLE][Y][[1, 3, 5]].tolist()


@pytest.mark.parametrize("where", ["nosuch = 1", "candidate = ", "true; drop view rows", "true) --", "'{}' = 1 and %"])
def test_a_mistake_in_where_is_a_query_error(where: str, store: Store) -> None:
    """`where` is a condition and nothing else."""
    with pytest.raises(QueryError):
        cell_data(store, "mini", COLUMNS, where=where)


def test_an_unknown_sweep_names_those_there_are(store: Store, tmp_path: Path) -> None:
    """A mistyped sweep is answered with the sweeps of the store."""
    with pytest.raises(QueryError, match=r"no sweep mino .*: also, half, mini$"):
        cell_data(store, "mino", COLUMNS)
    other = Store(tmp_path)
    other.commit_rows("s0", [])
    with pytest.raises(QueryError, match="there are: none"):
        cell_data(other, "mini", COLUMNS)


@pytest.mark.parametrize("column", ["best_accuracy", "model", "layers", "", "tau; drop view rows"])
def test_an_unknown_column_names_those_allowed(column: str, store: Store) -> None:
    """A column that is no number of a candidate is answered with those that are."""
    with pytest.raises(QueryError, match=f"^{column} is no number .*allowed: .*pruned_train_loss.*best_test_accuracy"):
        cell_data(store, "mini", (X, column))


def test_every_number_of_a_candidate_is_allowed(store: Store) -> None:
    """What `describe candidates` calls a number can be an axis."""
    kinds = store.sql("describe candidates").fetchall()
    names = tuple(name for name, kind, *_ in kinds if kind in ("BIGINT", "DOUBLE"))
    assert {X, Y, BESIDE, "params", "score_l1", "val_best_test_accuracy", "n_diverged"} <= set(names)
    assert {type(one) for one in cell_data(store, "mini", names)} == {CellData}


def test_a_torn_file_is_reported(tmp_path: Path) -> None:
    """`corr` says which rows it could not read."""
    store, reported = Store(tmp_path), list[Problem]()
    plan(store, "mini", tasks(ORACLE, 1))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "s0-torn.parquet").write_bytes(b"PAR1")
    cell_data(store, "mini", (X, Y), report=reported.append)
    assert [problem.file for problem in reported] == ["rows/s0-torn.parquet"]


def _mixed(folder: Path, hashes: str) -> Store:
    """A sweep of one cell with two seeds: `AB BB` is its first candidate pruned from both networks."""
    store, candidates = Store(folder), hashes.split()
    plan(store, "mini", tasks(ORACLE, len(candidates), 2))
    networks = {(c, seed): sha for c, pair in enumerate(candidates) for seed, sha in enumerate(pair)}
    rows = [
        done(task, dense_sha256={"A": SHA_A, "B": SHA_B}[networks[task.candidate, task.seed]])
        for task in tasks(ORACLE, len(candidates), 2)
        if (task.candidate, task.seed) in networks
    ]
    store.commit_rows("s0", rows)
    return store


def _where_of(message: str) -> str:
    """The condition that a refusal proposes for --where."""
    return message.split('--where "')[1].partition('"')[0]


@pytest.mark.parametrize(
    ("hashes", "left", "counts"),
    [
        ("AA BB BB", [1, 2], "2 from bbbbbbbb, 1 from aaaaaaaa"),
        ("AB AA AA", [1, 2], "2 from aaaaaaaa"),
        ("BA BB BB", [1, 2], "2 from bbbbbbbb"),
    ],
)
def test_a_cell_that_mixes_dense_networks_is_refused(hashes: str, left: list[int], counts: str, tmp_path: Path) -> None:
    """Losses of different networks are never correlated, and what the message proposes works."""
    store = _mixed(tmp_path, hashes)
    with pytest.raises(QueryError, match=rf"cell {ORACLE.cell_id} mixes .*new store, .*\({counts}\)") as refusal:
        cell_data(store, "mini", (X, Y))
    (found,) = cell_data(store, "mini", (X, Y), where=_where_of(str(refusal.value)))
    assert found.candidate == left


def test_a_cell_with_nothing_but_mixed_candidates_is_refused(tmp_path: Path) -> None:
    """Where no candidate is whole, only a new store helps, and the message says no more."""
    with pytest.raises(QueryError, match=r"not comparable\. Run the sweep again in a new store$"):
        cell_data(_mixed(tmp_path, "AB BA"), "mini", (X, Y))


def test_a_cell_of_one_dense_network_is_not_refused(tmp_path: Path) -> None:
    """Rows of another network beyond the chosen ones, here of a candidate with a seed missing, do not count."""
    assert cell_data(_mixed(tmp_path, "AA AA B"), "mini", (X, Y))[0].candidate == [0, 1]
