"""`query` from a string, a file or stdin, with parameters, in every format; and all that it may not do."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from orchestrator.cli_sql import answer
from storage.confined import SLACK, Limits
from storage.errors import QueryError
from storage.sql import connection, run_query
from storage.store import Store
from tests.rows import ORACLE, done, plan, tasks, tree
from tests.test_cli_errors import run

SECRET = "attack at dawn"
LIBRARIES = 2**28
"""Bytes of a process that has imported what answers a query."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four tasks done."""
    found, planned = Store(tmp_path_factory.mktemp("store") / "results"), tasks(ORACLE, 2, 2)
    plan(found, "mini", planned)
    found.commit_rows("s0", [done(task, best_test_accuracy=task.candidate / 2) for task in planned])
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file that no query may read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.csv").write_text(f"a\n{SECRET}\n")
    return tmp_path


# -- what is asked ------------------------------------------------------------------------------------


def asked(store: Store, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `prunesweep query ARGUMENTS` prints."""
    assert run("query", *arguments, "--store", store.location) == 0
    return capsys.readouterr().out


def test_a_query_is_a_string_a_file_or_standard_input(
    store: Store, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is the same."""
    sql = "select candidate, count(*) as n from rows group by 1 order by 1"
    (here / "mine.sql").write_text(f"{sql};\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(sql))
    for arguments in ([sql], ["--file", "mine.sql"], ["-"]):
        assert asked(store, capsys, *arguments, "-f", "csv") == "candidate,n\n0,2\n1,2\n"


@pytest.mark.parametrize("form", ["table", "json", "parquet"])
def test_a_format_in_a_file(form: str, store: Store, here: Path) -> None:
    """Text and bytes come whole through the pipe."""
    path = here / f"answer.{form}"
    sql = ["query", "select 1.5 as mine, ['a'] as b", "-f", form]
    assert run(*sql, "-o", str(path), "--store", store.location) == 0
    assert b"mine" in path.read_bytes()


PARAMETERS = {
    "2": 2,
    "-0.5": -0.5,
    "1e3": 1000.0,
    "true": True,
    "null": None,
    "mnist": "mnist",
    '"17"': "17",
    "0017": "0017",
    "": "",
    "a=b": "a=b",
    "[1]": "[1]",
    "NaN": "NaN",
    "'); drop view rows; --": "'); drop view rows; --",
}


def test_parameters_are_values(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, true, false and null are such, anything else is text, and never SQL."""
    names = [f"p{i}" for i in range(len(PARAMETERS))]
    given = [word for name, text in zip(names, PARAMETERS, strict=True) for word in ("--param", f"{name}={text}")]
    out = asked(store, capsys, f"select {', '.join(f'${name} as {name}' for name in names)}", *given, "-f", "json")
    assert json.loads(out) == [dict(zip(names, PARAMETERS.values(), strict=True))]


def test_parameters_where_they_are_used(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """In a condition over rows, several, also with the $."""
    sql = "select count(*) as n from rows where candidate = $c and seed < $s and model = $m"
    given = ["-p", "c=1", "-p", "$s=1", "-p", "m=lenet5_mini"]
    assert asked(store, capsys, sql, *given, "-f", "csv") == "n\n1\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["select $a"], "wants a value for $a: give --param a=VALUE"),
        (["select $a", "-p", "a=1", "-p", "b=2"], "has no parameter $b; it has: $a"),
        (["select 1", "-p", "b=2"], "has no parameter $b; it has: none"),
        (["select 1", "-p", "b"], "'b': write it as name=value"),
        (["select $b", "-p", "b=1", "-p", "b=2"], "b is given twice"),
        (["select 1", "--memory", "much"], "'much': write it as 512MB or 4GB, of at least 16MB"),
        (["select 1", "--memory", "1kB"], "at least 16MB"),
        (["select 1", "--timeout", "0"], "0"),
        (["from nosuch"], "LINE 1: from nosuch"),
        ([], "give the SQL, or --file FILE (or - for standard input)"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], told: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, and nothing on stdout."""
    assert run("query", *arguments, "--store", store.location) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and "Traceback" not in err


def test_a_torn_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The warning comes through from the process that reads."""
    store = Store(tmp_path)
    plan(store, "mini", tasks(ORACLE, 1))
    store.commit("rows/s0-torn.parquet", b"PAR1")
    assert run("query", "from rows", "--store", store.location) == 0
    assert "warning: skipped rows/s0-torn.parquet" in capsys.readouterr().err


ALONE = """
import sys
from storage import confined
confined.confined = lambda work, limits, *_: work()
from orchestrator import cli
try:
    cli.main(sys.argv[1:])
finally:
    print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "scipy", "pandas", "prompt_toolkit"}))
"""


def test_the_process_that_answers_imports_little(store: Store) -> None:
    """Neither torch nor ray, nor what only statistics and the prompt need."""
    command = [sys.executable, "-c", ALONE, "query", "select 1 as a", "-f", "csv", "--store", store.location]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert (found.returncode, found.stdout) == (0, "a\n1\n[]\n"), found.stderr


# -- what it may not do -------------------------------------------------------------------------------

ENDLESS = [
    "select sum(a.range * b.range) from range(1000000) a, range(1000000) b",
    "select count(*) from rows a, rows b, rows c, range(100000000) d, range(100000000) e where a.task_id <> d::text",
    "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t where n < 0",
    "select sleep_ms(100000)",
]
HUGE = [
    "select length(repeat('x', 3000000000)) as n",
    "select list_sum(range(1, 3000000000)) as n",
    "select * from range(100000000000)",
    "select * from generate_series(1, 100000000000)",
    "select count(distinct range::text) from range(1000000000)",
    "select string_agg(range::varchar) from range(1000000000)",
    "select * from range(100000000) order by hash(range)",
    "select unnest(range(1000000000)) as n",
    "explain analyze select count(distinct range::text) from range(1000000000)",
]


@pytest.mark.parametrize("sql", ENDLESS)
def test_a_query_stops_at_its_time(sql: str, store: Store, here: Path) -> None:
    """Wherever DuckDB is in it."""
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"stopped after 0\.3 s"):
        answer(store.location, sql, "csv", Limits(2**32, 0.3))
    assert time.monotonic() - began < 20
    assert list(tree(here)) == ["secret.csv"]


HUNGRY = """
import json, resource, sys
from orchestrator.cli_sql import answer
from storage.confined import Limits
from storage.errors import QueryError
for sql in json.load(sys.stdin):
    try:
        said = str(answer(sys.argv[1], sql, "csv", Limits(2**27, 1.5)))
    except QueryError as error:
        said = str(error)
    print(json.dumps([said, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def test_a_query_stops_at_its_memory(store: Store, here: Path) -> None:
    """Whether DuckDB counts that memory or not; nothing is written to a disk instead. Asked by a process as the command
    is one: what this one has, its children would begin with."""
    command = [sys.executable, "-c", HUNGRY, store.location]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(command, input=json.dumps(HUGE), capture_output=True, text=True, cwd=here, env=environment)
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(answers) == len(HUGE), found.stderr
    for sql, (said, largest) in zip(HUGE, answers, strict=True):
        assert re.search(r"more than 128 MiB of memory|stopped after", said), (sql, said)
        assert largest * 1024 <= 2**27 + SLACK + LIBRARIES, sql
    assert list(tree(here)) == ["secret.csv"]


def test_ordinary_questions_fit_in_little(store: Store) -> None:
    """The least that --memory allows answers over rows, with a statistic."""
    sql = "select kendall(list(candidate), list(best_test_accuracy)) as tau from rows"
    assert answer(store.location, sql, "csv", Limits(2**24, 60)) == b"tau\n1.0\n"


@pytest.mark.parametrize("megabytes", [650, 700])
def test_no_limit_of_memory_is_too_large_for_a_small_question(store: Store, megabytes: int) -> None:
    """Arrow's own allocator took 1 GiB at once where the limit allowed it, and left nothing. Asked in a process as a
    command is one: this one has loaded Arrow before."""
    command = [sys.executable, "-m", "prunesweep", "query", "select count(*) n from rows", "-f", "csv"]
    command += ["--memory", f"{megabytes}MB", "--store", store.location]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (found.returncode, found.stdout.splitlines()[0]) == (0, "n"), found.stderr


READING = [
    "from '{file}'",
    "from read_csv('{file}')",
    "from read_text('{file}')",
    "from read_blob('{file}')",
    "from glob('*')",
    "from sniff_csv('{file}')",
    "from parquet_metadata('{file}')",
    "from read_duckdb('{file}')",
    "from query('from read_text(''{file}'')')",
    "from query_table(['{file}'])",
    "select getenv('HOME')",
    "from duckdb_secrets()",
    "from which_secret('s3://a', 's3')",
    "from duckdb_extensions()",
    "from json_execute_serialized_sql(json_serialize_sql('from read_text(''{file}'')'))",
    "from 'https://localhost/a.parquet'",
    "from secret",
    "from store",
    "select * from (describe from read_csv('{file}'))",
    "select (select content from read_text('{file}'))",
    "with a as materialized (from read_text('{file}')) from a",
]


@pytest.mark.parametrize("sql", READING)
def test_a_query_reads_the_store_and_nothing_else(sql: str, store: Store, here: Path) -> None:
    """No file, no network, no environment, no variable of the program: an error, in any disguise."""
    with pytest.raises(QueryError):
        run_query(store, sql.replace("{file}", str(here / "secret.csv")))
    assert list(tree(here)) == ["secret.csv"]


def test_no_table_function_of_duckdb_reads_or_writes_a_file(store: Store, here: Path) -> None:
    """Each that there is, today and in later versions, is given the name of a file."""
    named = "select distinct function_name from duckdb_functions() where function_type in ('table', 'table_macro')"
    with connection(store) as con:
        names = [name for (name,) in con.sql(named).fetchall()]
        assert {"read_csv", "glob", "read_text"} <= set(names)
        for name in names:
            for given in ("", "'secret.csv'", "['secret.csv']", "'secret.csv', 'secret.csv'"):
                try:
                    found = str(con.execute(f'select * from "{name}"({given}) limit 100').fetchall())
                except duckdb.Error:
                    continue
                assert SECRET not in found, name
        assert con.sql("select current_setting('lock_configuration')").fetchall() == [(True,)]
    assert list(tree(here)) == ["secret.csv"]
