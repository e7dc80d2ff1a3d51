"""The views count right, the statistics are scipy's, and a query can only read the store."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from storage import statistics
from storage.errors import QueryError, StoreError
from storage.records import Task
from storage.schema import SCHEMA
from storage.sql import FUNCTIONS, VIEWS, check_select, column_names, connection, run_query
from storage.statistics import kendall
from storage.store import Store
from tests.rows import L1, NOON, ORACLE, SHA_A, SHA_B, done, failed, plan, tasks, tree

# of candidates 0, 1, 2 x seeds 0, 1, 2
LOSSES = np.array([[0.5, 0.52, 0.51], [0.9, 0.91, 0.95], [0.7, 0.71, 0.75]])
BEST = np.array([[0.81, 0.85, 0.83], [0.6, 0.61, 0.7], [0.7, 0.72, 0.71]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two sweeps: `mini` (ORACLE 5 x 3, L1 1 x 3) and `also` (one task of mini's).

    ORACLE: candidates 0-2 done, 3 has a failed seed, 4 a pending one. L1: failed, failed, pending.
    """
    found = Store(tmp_path_factory.mktemp("store"))
    oracle, l1 = tasks(ORACLE, 5, 3), tasks(L1, 1, 3)
    plan(found, "mini", [*oracle, *l1], "s0")
    plan(found, "also", oracle[:1], "s9")
    rows = []
    for task in oracle[:9]:
        at = (task.candidate, task.seed)
        rows.append(
            done(
                task,
                pruned_train_loss=float(LOSSES[at]),
                best_test_accuracy=float(BEST[at]),
                diverged=at == (2, 0),
                equivalence_error=task.seed * 1e-12,
                finished_at=NOON + dt.timedelta(minutes=task.seed),
            )
        )
    rows += [done(oracle[9]), failed(oracle[10]), done(oracle[11]), done(oracle[12]), done(oracle[13])]
    rows += [failed(l1[0], error="first"), failed(l1[1], error="second", error_class="OutOfMemory")]
    rows += [failed(oracle[0], finished_at=NOON - dt.timedelta(days=1))]  # beaten by the done one
    rows += [done(Task(ORACLE, 99, 0), finished_at=NOON + dt.timedelta(days=9))]  # in no plan
    found.commit_rows("s0", rows)
    return found


# -- views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_answers_on_an_empty_store(view: str, tmp_path: Path) -> None:
    """A store that was emptied has no rows; one that does not exist is an error, and asking makes nothing."""
    store = Store(tmp_path / "none")
    with pytest.raises(StoreError, match="no store at"):
        store.sql(f"select * from {view}")
    assert tree(tmp_path) == {}
    store.delete(store.commit_rows("s0", [done(tasks(ORACLE, 1)[0])]))
    assert store.sql(f"select * from {view}").fetchall() == []


def test_views_are_those_that_are_documented(store: Store) -> None:
    """VIEWS names every view there is."""
    names = {name for (name,) in store.sql("show tables").fetchall()}
    assert names - {"row_files", "plan"} == set(VIEWS)


def test_rows_and_attempts_have_the_columns_of_the_schema(store: Store) -> None:
    """`rows` is one line per task, `attempts` one per row that was ever written."""
    assert store.sql("select * from rows").columns == SCHEMA.names == column_names()
    assert store.sql("select * from attempts").columns == [*SCHEMA.names, "file"]
    counts = "select (select count(*) from rows), (select count(*) from attempts)"
    assert store.sql(counts).fetchall() == [(17, 18)]


def test_tasks_has_one_line_per_planned_task_and_its_status(store: Store) -> None:
    """Done, failed or pending, in the order of the plan; a row nobody planned is in no sweep."""
    found = store.sql("select status from tasks where sweep = 'mini' order by position").fetchall()
    oracle = ["done"] * 10 + ["failed"] + ["done"] * 3 + ["pending"]
    assert [status for (status,) in found] == [*oracle, "failed", "failed", "pending"]
    assert store.sql("select shard, status, position from tasks where sweep = 'also'").fetchall() == [("s9", "done", 0)]
    pending = store.sql("select layers, recipe, finished_at from tasks where status = 'pending' and model = 'resnet56'")
    assert pending.fetchall() == [(["layer1.0.conv1"], L1.json, None)]


def test_every_column_of_a_row_is_in_tasks(store: Store) -> None:
    """Nothing a task measured is lost by looking through its sweep."""
    assert set(SCHEMA.names) | {"sweep", "shard", "position"} == set(store.sql("select * from tasks").columns)


def test_candidates_has_only_those_with_every_planned_seed_done(store: Store) -> None:
    """An average over seeds never mixes two seeds of one candidate with three of another."""
    query = "select candidate, n_seeds from candidates where sweep = 'mini' order by all"
    assert store.sql(query).fetchall() == [(0, 3), (1, 3), (2, 3)]
    assert store.sql("select candidate, n_seeds from candidates where sweep = 'also'").fetchall() == [(0, 1)]


def test_candidates_are_means_and_sample_deviations_over_seeds(store: Store) -> None:
    """An average keeps the name of what it averages, with the sample deviation beside it."""
    columns = "pruned_train_loss, best_test_accuracy, best_test_accuracy_std, equivalence_error, n_diverged"
    query = f"select {columns} from candidates where sweep = 'mini' order by candidate"
    loss, best, std, error, diverged = np.array(store.sql(query).fetchall()).T
    assert loss == pytest.approx(LOSSES.mean(1), rel=1e-14)
    assert best == pytest.approx(BEST.mean(1), rel=1e-14)
    assert std == pytest.approx(BEST.std(1, ddof=1), rel=1e-12)
    assert error.tolist() == [2e-12] * 3
    assert diverged.tolist() == [0, 0, 1]


def test_candidates_say_when_they_mix_dense_networks(tmp_path: Path) -> None:
    """A candidate whose seeds were pruned from different weights is told by n_dense."""
    store, (a, b) = Store(tmp_path), tasks(ORACLE, 1, 2)
    plan(store, "mini", [a, b])
    store.commit_rows("s0", [done(a, dense_sha256=SHA_B), done(b, dense_sha256=SHA_A)])
    assert store.sql("select n_dense, dense_sha256 from candidates").fetchall() == [(2, SHA_A)]


def test_cells_count_what_was_planned_and_what_is_there(store: Store) -> None:
    """One line per cell of a sweep, in the order of its grid."""
    columns = "cell_id, layers, pruning_ratio, candidates, seeds, tasks, done, failed, pending"
    found = store.sql(f"select {columns} from cells where sweep = 'mini' order by position").fetchall()
    assert found == [
        (ORACLE.cell_id, ["conv1"], 0.2, 5, 3, 15, 13, 1, 1),
        (L1.cell_id, ["layer1.0.conv1"], 0.5, 1, 3, 3, 0, 2, 1),
    ]


def test_sweeps_count_their_own_tasks(store: Store) -> None:
    """Rows are shared: what one sweep finished counts in the other, and rows out of both in neither."""
    columns = "sweep, cells, tasks, done, failed, pending, last_row_at"
    assert store.sql(f"select {columns} from sweeps order by sweep").fetchall() == [
        ("also", 1, 1, 1, 0, 0, NOON),
        ("mini", 2, 18, 13, 3, 2, NOON + dt.timedelta(minutes=2)),
    ]


def test_a_task_of_an_older_expansion_leaves_the_counts_and_keeps_its_row(tmp_path: Path) -> None:
    """The newest expansion is the sweep."""
    store, (a, b) = Store(tmp_path), tasks(ORACLE, 2)
    plan(store, "mini", [a, b])
    store.commit_rows("s0", [done(a), done(b)])
    plan(store, "mini", [b])
    assert store.sql("select tasks, done, pending from sweeps").fetchall() == [(1, 1, 0)]
    assert store.sql("select count(*) from rows").fetchall() == [(2,)]


def test_failures_are_counted_by_class_and_shard(store: Store) -> None:
    """One line per kind of failure with an example; a failure that was made good is none."""
    query = "select error_class, shard, tasks, example_task, example_error from failures order by error_class"
    boom = {Task(ORACLE, 3, 1).task_id: "Traceback: boom", Task(L1, 0, 0).task_id: "first"}
    assert store.sql(query).fetchall() == [
        ("OutOfMemory", "s0", 1, Task(L1, 0, 1).task_id, "second"),
        ("RuntimeError", "s0", 2, min(boom), boom[min(boom)]),
    ]


# -- criteria, curves, cost ---------------------------------------------------------------------------


def test_criteria_has_every_score_of_the_schema(tmp_path: Path) -> None:
    """One line per candidate and criterion: each score_ column, what score_extra holds, and the pruned train loss."""
    store, (a, b) = Store(tmp_path), tasks(ORACLE, 2)
    plan(store, "mini", [a, b])
    names = [name for name in column_names() if name.startswith("score_") and name != "score_extra"]
    scores = {name: float(i) for i, name in enumerate(names)}
    known = done(a, pruned_train_loss=0.5, best_test_accuracy=0.9, score_extra=(("mine", 7.0),), **scores)
    store.commit_rows("s0", [known, done(b, pruned_train_loss=0.25, score_l1=3.0)])
    found = store.sql("select candidate, criterion, score, best_test_accuracy from criteria").fetchall()
    expected = {name.removeprefix("score_"): score for name, score in scores.items()}
    expected |= {"mine": 7.0, "pruned_train_loss": 0.5}
    assert {(c, name, score, y) for c, name, score, y in found} == {
        *((0, name, score, 0.9) for name, score in expected.items()),
        (1, "pruned_train_loss", 0.25, None),
        (1, "l1", 3.0, None),
    }


def test_a_correlation_for_each_criterion_is_one_query(tmp_path: Path) -> None:
    """The long form groups: tau of each criterion is that of its own column."""
    store, planned = Store(tmp_path), tasks(ORACLE, 4)
    plan(store, "mini", planned)
    l1, l2, best = [1.0, 2.0, 4.0, 3.0], [4.0, 1.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4]
    numbers = zip(planned, l1, l2, best, strict=True)
    store.commit_rows("s0", [done(t, score_l1=a, score_l2=b, best_test_accuracy=y) for t, a, b, y in numbers])
    query = "select criterion, kendall(list(score), list(best_test_accuracy)) from criteria group by 1 order by 1"
    assert store.sql(query).fetchall() == [("l1", kendall(l1, best)[0]), ("l2", kendall(l2, best)[0])]


def test_curves_have_one_line_per_epoch_from_before_retraining(tmp_path: Path) -> None:
    """Epoch 0 is the pruned network, k the k-th epoch; a failed or pending task has no line."""
    store, planned = Store(tmp_path), tasks(ORACLE, 4)
    plan(store, "mini", planned)
    curves = {"epoch_train_loss": (0.5, None), "epoch_test_loss": (0.75, 0.25), "epoch_test_accuracy": (0.25, 0.5)}
    rows = [done(planned[0], pruned_test_loss=2.0, pruned_test_accuracy=0.125, **curves), failed(planned[1])]
    store.commit_rows("s0", [*rows, done(planned[3], pruned_test_loss=3.0)])
    columns = "candidate, epoch, epoch_train_loss, epoch_test_loss, epoch_test_accuracy, epoch_val_accuracy"
    assert store.sql(f"select {columns} from curves order by candidate, epoch").fetchall() == [
        (0, 0, None, 2.0, 0.125, None),
        (0, 1, 0.5, 0.75, 0.25, None),
        (0, 2, None, 0.25, 0.5, None),
        (3, 0, None, 3.0, None, None),
    ]


def test_cost_counts_every_attempt_once_and_what_was_wasted(tmp_path: Path) -> None:
    """Failed attempts and rows that lost to another are wasted; what a failed one has no device for, its cell has."""
    store = Store(tmp_path)
    a, b, c = tasks(ORACLE, 3)
    d, e = tasks(L1, 2)
    plan(store, "mini", [a, b, c, d, e])
    plan(store, "also", [a])
    second = dt.timedelta(seconds=1)
    spent = {"seconds_prune": 1.0, "seconds_retrain": 3.0}
    store.commit_rows(
        "s0",
        [
            done(a, device="cpu", **spent),
            done(a, device="cpu", finished_at=NOON + second, **spent),  # a zombie's
            failed(b, started_at=NOON - 5 * second),
            done(b, device="cpu", **spent),
            done(d, device="cuda:0", **spent),
            failed(e, started_at=NOON - 7 * second),
        ],
    )
    columns = "sweep, model, tasks, attempts, failed_attempts, wasted_attempts"
    seconds = "cpu_seconds, gpu_seconds, wasted_cpu_seconds, wasted_gpu_seconds"
    assert store.sql(f"select {columns}, {seconds} from cost order by sweep, position").fetchall() == [
        ("also", "lenet5_mini", 1, 2, 0, 1, 8.0, 0.0, 4.0, 0.0),
        ("mini", "lenet5_mini", 3, 4, 1, 2, 17.0, 0.0, 9.0, 0.0),
        ("mini", "resnet56", 2, 2, 1, 1, 0.0, 11.0, 0.0, 7.0),
    ]


# -- statistics ---------------------------------------------------------------------------------------


def _one(store: Store, expression: str) -> Any:
    return store.sql(f"select {expression}").fetchall()[0][0]


@pytest.mark.parametrize(
    ("name", "test"), [("kendall", stats.kendalltau), ("spearman", stats.spearmanr), ("pearson", stats.pearsonr)]
)
def test_correlations_in_sql_are_scipys(name: str, test: Any, store: Store) -> None:
    """The number in a query is the number scipy gives, pairs with a NULL left out."""
    generator = np.random.Generator(np.random.Philox(1))
    x = generator.integers(0, 9, 30).tolist()
    y = [a + b for a, b in zip(x, generator.normal(size=30).tolist(), strict=True)]
    expected = test(x, y)
    assert _one(store, f"{name}({x}, {y})") == pytest.approx(expected.statistic, rel=1e-12)
    assert _one(store, f"{name}_p({x}, {y})") == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)
    with_holes = f"[NULL, 1, 99] || {x}, [5, NULL, 'nan'::double] || {y}"
    assert _one(store, f"{name}({with_holes})") == pytest.approx(expected.statistic, rel=1e-12)


@pytest.mark.parametrize("name", ["kendall", "spearman", "pearson"])
@pytest.mark.parametrize(
    "lists",
    ["[1, 1, 1], [1, 2, 3]", "[1, 2, 3], [4, 4, 4]", "[1], [2]", "[], []", "NULL, [1, 2]", "[1, NULL], [NULL, 2]"],
)
def test_a_correlation_that_is_not_defined_is_null(name: str, lists: str, store: Store) -> None:
    """A constant side, fewer than two pairs or no list give NULL, in the statistic and its p."""
    assert store.sql(f"select {name}({lists}), {name}_p({lists})").fetchall() == [(None, None)]


def test_anomaly_ratio_and_interval_in_sql_are_those_of_the_statistics(store: Store) -> None:
    """More of y is better, or less of it with the form for losses; the interval is a struct."""
    x, y = [3.0, 1.0, 2.0, 4.0, 5.0], [0.5, 0.4, 0.7, 0.2, 0.4]
    assert _one(store, f"anomaly_ratio({x}, {y})") == statistics.anomaly_ratio(x, y) == 2 / 5
    assert _one(store, f"anomaly_ratio_loss({x}, {y})") == statistics.anomaly_ratio(x, y, higher=False) == 1 / 5
    low, high = statistics.kendall_ci(x, y)
    assert _one(store, f"kendall_ci({x}, {y})") == {"low": low, "high": high}
    assert _one(store, f"kendall_ci({x}, {y}).low") == low


@pytest.mark.parametrize("name", ["anomaly_ratio", "anomaly_ratio_loss", "kendall_ci"])
@pytest.mark.parametrize("lists", ["[1], [2]", "[], []", "NULL, [1, 2]", "[1, NULL], [NULL, 2]"])
def test_what_is_not_defined_is_null(name: str, lists: str, store: Store) -> None:
    """Fewer than two pairs or no list give NULL."""
    assert _one(store, f"{name}({lists})") is None


def test_functions_are_those_that_are_documented(store: Store) -> None:
    """FUNCTIONS names every function of ours."""
    query = "select distinct function_name from duckdb_functions()"
    ours = set(store.sql(query).fetchall()) - set(duckdb.connect().sql(query).fetchall())
    assert {name for (name,) in ours} == {*FUNCTIONS, "over_seeds"}


def test_lists_of_different_length_are_refused(store: Store) -> None:
    """Two lists that cannot be pairs are a mistake, and told as one."""
    with pytest.raises(QueryError, match="lists of different length: 2 and 3"):
        store.sql("select kendall([1, 2], [1, 2, 3])")


def test_the_paper_in_one_query(store: Store) -> None:
    """The question the tool was built for is one line of SQL."""
    query = "select kendall(list(pruned_train_loss), list(best_test_accuracy)) from candidates where sweep = 'mini'"
    expected = kendall(LOSSES.mean(1).tolist(), BEST.mean(1).tolist())[0]
    assert store.sql(query).fetchall() == [(pytest.approx(expected),)]
    assert expected == pytest.approx(-1)


# -- what a query may be ------------------------------------------------------------------------------

READS = [
    "select 1",
    "select 1;",
    "/* why */ select 1 -- because",
    "with a as (select 1) from a",
    "from rows",
    "from rows select task_id limit 1",
    "table rows",
    "values (1)",
    "(select 1) union all (select 2)",
    "describe rows",
    "summarize sweeps",
    "show tables",
    "explain select * from rows",
    "EXPLAIN ANALYZE select * from rows",
    "explain (analyze) from rows",
    "explain (format json) select 1",
    "explain (analyze, format json) select 1",
    "-- a comment\nexplain select 1",
    "/* another */ explain\nselect 1",
    "select 'drop table rows; copy' as harmless",
]
REFUSED = [
    "copy (select 1) to '{out}'",
    "copy rows to '{out}' (format parquet)",
    "attach '{out}' as other",
    "detach memory",
    "drop view rows",
    "drop table if exists rows",
    "insert into row_files values (1)",
    "update row_files set seed = 0",
    "delete from row_files",
    "alter view rows rename to x",
    "create table t as select 1",
    "create view v as select 1",
    "create or replace view rows as select 1",
    "create macro f() as 1",
    "set threads = 1",
    "set enable_external_access = true",
    "reset threads",
    "use memory",
    "pragma show_tables",
    "pragma database_list",
    "install httpfs",
    "load httpfs",
    "call pragma_version()",
    "prepare p as select 1",
    "execute p",
    "export database '{out}'",
    "import database '{out}'",
    "begin",
    "checkpoint",
    "vacuum",
    "analyze",
    "select 1; select 2",
    "select 1; drop view rows",
    "",
    "  ;  ",
    "-- nothing",
    "selekt 1",
    "explain",
    "explain copy (select 1) to '{out}'",
    "explain analyze copy (select 1) to '{out}'",
    "explain (analyze) copy (select 1) to '{out}'",
    "explain analyze create table t as select 1",
    "explain analyze drop view rows",
    "explain select 1; drop view rows",
    # quotes and comments among the options must not hide what is explained
    "explain (analyze 'x) select 1 /*') create table t as select 1 --*/",
    "explain (analyze 'x) select 1 --')\ncreate table t as select 1",
    "explain (analyze /*) select 1 /*/) drop view rows --*/",
    "/* /* */ explain select 1 -- */ explain analyze drop view rows",
    "explain /* analyze select 1 */ analyze drop view rows",
    "-- explain select 1\nexplain analyze drop view rows",
]
FILES = [
    "select * from read_csv('{file}')",
    "select * from read_text('{file}')",
    "select * from read_blob('{file}')",
    "select * from read_parquet('{file}')",
    "select * from read_json('{file}')",
    "select * from glob('{file}')",
    "select * from '{file}'",
    "select * from 'http://localhost/x.parquet'",
    "explain analyze select * from read_text('{file}')",
    "select * from query('select * from read_text(''{file}'')')",
]


@pytest.fixture(scope="module")
def con(store: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """One connection for many queries."""
    with connection(store) as con:
        yield con


@pytest.mark.parametrize("query", READS)
def test_one_select_in_any_form_is_answered(query: str, con: duckdb.DuckDBPyConnection) -> None:
    """Whatever DuckDB's parser calls one SELECT, or an EXPLAIN of one, is a query."""
    check_select(con, query)
    assert len(con.sql(query).fetchall()) >= 1


@pytest.mark.parametrize("query", REFUSED)
def test_everything_that_is_not_one_select_is_refused(query: str, con: duckdb.DuckDBPyConnection) -> None:
    """A query cannot write, change, attach, load or set anything: it is refused before it runs."""
    with pytest.raises(QueryError):
        check_select(con, query)


@pytest.mark.parametrize(
    ("query", "kind"),
    [("copy (select 1) to '{out}'", "COPY"), ("explain analyze copy rows to '{out}'", "COPY"), ("", "nothing")],
)
def test_what_is_refused_is_named_and_has_no_effect(query: str, kind: str, store: Store, tmp_path: Path) -> None:
    """The message says what a query is and what this is, and no file is there."""
    with pytest.raises(QueryError, match=rf"exactly one SELECT .* this is {kind}$"):
        store.sql(query.replace("{out}", str(tmp_path / "out")))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "write",
    ["copy (select 1) to '{out}'", "insert into plan select * from plan returning *", "delete from rows returning *"],
)
def test_a_select_that_writes_inside_is_refused(write: str, store: Store, tmp_path: Path) -> None:
    """DuckDB's parser calls a SELECT from a writing CTE a SELECT: there is nothing it could write to."""
    with pytest.raises(QueryError):
        store.sql(f"with a as ({write}) from a".replace("{out}", str(tmp_path / "out")))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("query", FILES)
def test_no_file_can_be_read(query: str, store: Store, tmp_path: Path) -> None:
    """A query reads the store's rows and nothing else of the machine or the network."""
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    with pytest.raises(QueryError):
        store.sql(query.replace("{file}", str(file)))


@pytest.mark.parametrize("query", [query for query in READS if "explain" not in query.lower()])
def test_an_answer_over_the_columns_it_needs_is_that_over_all(
    query: str, store: Store, con: duckdb.DuckDBPyConnection
) -> None:
    """What is not read is null, and no query sees it."""
    whole = con.sql(query).to_arrow_table().to_pylist()
    assert sorted(map(repr, run_query(store, query).to_pylist())) == sorted(map(repr, whole))


@pytest.mark.parametrize("view", VIEWS)
def test_each_column_alone_is_what_it_is_among_all(view: str, store: Store, con: duckdb.DuckDBPyConnection) -> None:
    """Columns of every view, asked for alone: each fifth of those that pass a row through, all of the others."""
    whole = con.sql(f"from {view}").to_arrow_table()
    for name in whole.column_names[:: 5 if view in ("attempts", "rows", "tasks") else 1]:
        alone = run_query(store, f'select "{name}" from {view}')[name].to_pylist()
        assert sorted(map(repr, alone)) == sorted(map(repr, whole[name].to_pylist())), name


def test_no_python_variable_can_be_read(store: Store) -> None:
    """A query sees no data frame of the program that asks."""
    secret = store.sql("select 1 as a").to_arrow_table()
    with pytest.raises(QueryError, match="secret"):
        store.sql("select * from secret")
    with connection(store) as con, pytest.raises(duckdb.CatalogException, match="secret"):
        con.sql("select * from secret")
    assert len(secret) == 1


def test_a_connection_is_closed_whatever_happens(store: Store) -> None:
    """One with Python functions in it must be closed, also where a query fails."""
    with pytest.raises(ZeroDivisionError), connection(store) as con:
        raise ZeroDivisionError
    with pytest.raises(duckdb.ConnectionException):
        con.sql("select 1")


def test_the_connection_itself_is_locked(store: Store, tmp_path: Path) -> None:
    """Where the parser's word is not asked, the settings still keep files and settings shut."""
    with connection(store) as con:
        settings = ("set enable_external_access = true", "set python_enable_replacements = true", "set threads = 1")
        for query in (f"copy (select 1) to '{tmp_path / 'out'}'", "load httpfs", *settings):
            with pytest.raises(duckdb.Error):
                con.execute(query)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("query", ["select nosuch from rows", "from nosuch", "select 1/", "select 'a'::int"])
def test_an_error_in_a_query_is_a_query_error(query: str, store: Store) -> None:
    """A person's mistake is told in one message, not as DuckDB's exception."""
    with pytest.raises(QueryError):
        run_query(store, query)


# -- in a notebook ------------------------------------------------------------------------------------

NOTEBOOK = """
import sys
from storage import Store
store = Store(sys.argv[1])
query = "select kendall(list(pruned_train_loss), list(best_test_accuracy)) as tau, count(*) as n from candidates"
relation = store.sql(query + " where sweep = 'mini'")
frame = relation.df()
assert (round(frame["tau"][0], 12), frame["n"][0]) == (-1, 3), frame
print(len(store.sql("from rows").df()), "torch" in sys.modules, "ray" in sys.modules)
"""


def test_a_notebook_gets_data_frames_and_no_connection_is_left_open(store: Store, tmp_path: Path) -> None:
    """`Store(...).sql(...).df()` works in a fresh process that ends in silence, without torch or ray."""
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK)
    command = [sys.executable, "-W", "always::ResourceWarning", str(script), store.root]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (found.returncode, found.stdout, found.stderr) == (0, "17 False False\n", "")


def test_relations_outlive_later_queries(store: Store) -> None:
    """Each answer stands on its own."""
    first, second = store.sql("select 1 as a"), store.sql("select 2 as a")
    assert (first.fetchall(), second.fetchall()) == ([(1,)], [(2,)])


def test_equal_accuracies_are_tied_whatever_the_seeds_add_up_to(tmp_path: Path) -> None:
    """339 + 349 and 344 + 344 of 360 are the same mean: rounding errors must not break ties."""
    store = Store(str(tmp_path))
    counts = {0: (339, 349), 1: (344, 344), 2: (341, 347), 3: (340, 348)}
    planned = [Task(ORACLE, candidate, seed) for candidate in counts for seed in (0, 1)]
    plan(store, "ties", planned)
    values = {task: counts[task.candidate][task.seed] / 360 for task in planned}
    store.commit_rows("s", [done(task, best_test_accuracy=values[task]) for task in planned])
    assert len(store.sql("select distinct best_test_accuracy from candidates").fetchall()) == 1


def test_a_mean_needs_every_seed(tmp_path: Path) -> None:
    """A seed that diverged has no last epochs: no mean over the survivors is made up."""
    store = Store(str(tmp_path))
    planned = [Task(ORACLE, 0, seed) for seed in (0, 1)]
    plan(store, "half", planned)
    last = {0: 0.9, 1: None}
    store.commit_rows("s", [done(t, last_test_accuracy=last[t.seed], best_test_accuracy=0.5) for t in planned])
    found = store.sql("select last_test_accuracy, best_test_accuracy, n_seeds from candidates").fetchall()
    assert found == [(None, 0.5, 2)]


def test_a_column_named_twice_is_refused(store: Store) -> None:
    """JSON and Parquet would lose one of them without a word."""
    with pytest.raises(QueryError, match="two columns are named a"):
        run_query(store, "select 1 as a, 2 as a")


def test_the_relation_of_an_answer_is_shut_off(store: Store, tmp_path: Path) -> None:
    """It can be asked further after the store is forgotten, and reaches neither files nor settings nor variables."""
    relation: Any = store.sql("select 1 as a union all select 2")
    assert relation.filter("a > 1").fetchall() == [(2,)]
    assert relation.query("x", "select sum(a) from x").fetchall() == [(3,)]
    assert len(relation.df()) == relation.to_arrow_table().num_rows == 2
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    table = pa.table({"b": [1]})
    for sql in (
        f"from read_csv('{secret}')",
        f"from '{secret}'",
        f"from glob('{tmp_path}/*')",
        f"copy x to '{tmp_path}/out.csv'",
        f"attach '{tmp_path}/out.duckdb'",
        "set enable_external_access = true",
        "install httpfs",
        "from table",
        "from secret",
    ):
        with pytest.raises(duckdb.Error):
            relation.query("x", sql).fetchall()
    with pytest.raises(duckdb.Error, match="disabled"):
        relation.to_parquet(str(tmp_path / "out.parquet"))
    assert len(table) == 1 and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["secret.csv"]
