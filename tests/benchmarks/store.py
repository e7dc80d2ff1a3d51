"""What the store costs: commits, queries, `corr`, bytes on disk, and the commands that only read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy import stats

from storage.claims import claims
from storage.correlate import cell_data
from storage.records import Row
from storage.rowfiles import parquet
from storage.schema import rows_to_table, table_to_rows
from storage.sql import run_query
from storage.statistics import kendalls
from storage.store import Store
from storage.tables import corr_table, with_beside
from tests.benchmarks.harness import PAIRS, Figure, pairs, ratios, seconds
from tests.benchmarks.rows import CELL_ROWS, copied, planned, rows, shard_of, shards, study

SWEEP = "study"
COLUMNS = ("pruned_train_loss", "best_test_accuracy", "last5_test_accuracy_mean")


@contextmanager
def folder() -> Iterator[Path]:
    """A folder on the disk that temporary files are on, gone at the end."""
    path = Path(tempfile.mkdtemp(prefix="prunesweep-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def filled(path: Path, n: int, *, compacted: bool = True) -> Store:
    """A store with n rows of one sweep: whole in compacted files, or one row in each file."""
    store, tasks = Store(path), study(n)
    store.write_manifest(SWEEP, f"name: {SWEEP}\n", planned(tasks))
    step = 2 * CELL_ROWS if compacted else 1
    for at in range(0, n, step):
        store.commit_rows(shard_of(tasks[at]), rows(tasks[at : at + step], seed=at))
    if compacted:
        store.compact()
    return store


# -- commit -------------------------------------------------------------------------------------------


GROUP = 28


def commit(n: int = 100, times: int = PAIRS) -> Iterator[Figure]:
    """Commits, against bytes of the same size, already there, that are written, synced, renamed, the folder synced.

    Of one row each; of files already made; and of one row each in the bare loop where the store commits groups.
    """
    made = rows(study(n - n % GROUP or n))
    contents = [parquet(rows_to_table([row])) for row in made]
    groups = [made[at : at + GROUP] for at in range(0, len(made), GROUP)]
    works: dict[str, Callable[[Store], Any]] = {
        "commits of one row": lambda store: [store.commit_rows("s0", [row]) for row in made],
        "commits of one row, already a file": lambda store: [
            store.commit(f"rows/s0-{i}.parquet", one) for i, one in enumerate(contents)
        ],
        f"rows committed {GROUP} at a time": lambda store: [store.commit_rows("s0", group) for group in groups],
    }
    for name, work in works.items():
        asked = {"least": 0.8, "aim": 1.0} if name == "commits of one row" else {}
        with folder() as path:
            found = pairs(lambda work=work, path=path: _ours(path, work, made), lambda: _bare_loop(contents), times)
        notes = {"bytes": len(contents[0]), "rows": len(made), "seconds": [list(pair) for pair in found]}
        yield Figure("commit", f"{name} vs bare loop", "x", ratios(found), more=True, notes=notes, **asked)


def _ours(path: Path, work: Callable[[Store], Any], made: list[Row]) -> float:
    store = Store(path / os.urandom(4).hex())
    store.commit("rows/.made", b"")  # the folder is there
    taken = seconds(lambda: work(store))
    _check_rows(store, made)
    return taken


def _bare_loop(contents: list[bytes]) -> float:
    with folder() as path:
        return seconds(lambda: [_bare(path, f"{i}.parquet", one) for i, one in enumerate(contents)])


def _bare(at: Path, name: str, content: bytes) -> None:
    handle = os.open(at / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(handle, content)
    os.fsync(handle)
    os.close(handle)
    os.rename(at / f".{name}", at / name)
    handle = os.open(at, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _check_rows(store: Store, made: list[Row]) -> None:
    """The rows of a store are those that were committed, every column of them."""
    known = {row.task_id: row for row in table_to_rows(rows_to_table(made))}
    table, problems = store.row_files()
    assert not problems and {row.task_id: row for row in table_to_rows(table)} == known


# -- reading ------------------------------------------------------------------------------------------


def corr(n: int = 53 * CELL_ROWS, times: int = PAIRS) -> Iterator[Figure]:
    """The table of `prunesweep corr` from a compacted store, opened fresh, in a process that did it before."""
    with folder() as path:
        where = filled(path, n).location

        def table() -> Any:
            return _corr(where)

        _check_corr(Store(where), n, table().to_pylist())
        samples = tuple(1e3 * seconds(table) for _ in range(times))
    yield Figure("corr", f"corr of {n:,} rows", "ms", samples, 100, 30)


def _corr(where: str) -> Any:
    """What `corr --intervals none` computes, and keeps nowhere."""
    x, y, beside = COLUMNS
    cells = cell_data(Store(where), SWEEP, COLUMNS)
    taus = kendalls([(cell.columns[x], cell.columns[beside]) for cell in cells])
    return with_beside(corr_table(claims(cells, x, y, resamples=0), "all"), taus, beside)


def _check_corr(store: Store, n: int, lines: list[dict[str, Any]]) -> None:
    """Each line is what scipy says of the means over seeds, computed here from the rows one by one."""
    cells: dict[str, dict[int, list[tuple[float, float]]]] = {}
    x, y, _ = COLUMNS
    columns = ("cell_id", "candidate", x, y)
    found = store.row_files()[0]
    for cell, candidate, a, b in zip(*(found[c].to_pylist() for c in columns), strict=True):
        cells.setdefault(cell, {}).setdefault(candidate, []).append((a, b))
    assert [line["cell_id"] for line in lines] == list({task.cell.cell_id: 0 for task in study(n)})
    for line in lines:
        means = [
            [sum(side) / len(seeds) for side in zip(*seeds, strict=True)] for seeds in cells[line["cell_id"]].values()
        ]
        a, b = [mean for mean, _ in means], [round(mean, 12) for _, mean in means]
        tests = [stats.kendalltau(a, b), stats.spearmanr(a, b), stats.pearsonr(a, b)]
        want = [value for one in tests for value in (one.statistic, one.pvalue)]
        have = [line[name] for name in ("tau", "p", "spearman", "spearman_p", "pearson", "pearson_p")]
        assert all(abs(v - w) < 1e-9 for v, w in zip(have, want, strict=True)), (have, want)


QUERIES = {
    "count and mean": "select count(*) as n, round(avg(best_test_accuracy), 9) as mean from rows where status = 'done'",
    "cells": "select * from cells",
}


def query(n: int = 4000, times: int = PAIRS) -> Iterator[Figure]:
    """Two queries over one-row files, then over the same rows compacted; the store is opened for each."""
    with folder() as path:
        store = filled(path, n, compacted=False)
        before = {name: run_query(store, text) for name, text in QUERIES.items()}
        assert before["count and mean"]["n"].to_pylist() == [n] == [sum(before["cells"]["done"].to_pylist())]
        for name, text in QUERIES.items():
            samples = tuple(seconds(lambda text=text: run_query(Store(path), text)) for _ in range(min(times, 3)))
            yield Figure("query", f"{name}, {n:,} one-row files", "s", samples, 5, 2.5)
        store.compact()
        for name, text in QUERIES.items():
            assert run_query(store, text).to_pylist() == before[name].to_pylist(), "compaction changed an answer"
            samples = tuple(1e3 * seconds(lambda text=text: run_query(Store(path), text)) for _ in range(times))
            yield Figure("query", f"{name}, {n:,} rows compacted", "ms", samples, 50, 15)


# -- size ---------------------------------------------------------------------------------------------


def row_bytes(n: int = 10_000) -> Iterator[Figure]:
    """Bytes on disk per row, of rows that were committed one by one and compacted, with curves of 30 epochs."""
    made = rows(study(n))
    with folder() as path:
        store = Store(path)
        for row in made:
            store.commit(f"rows/{shard_of(row.task())}-{os.urandom(16).hex()}.parquet", parquet(rows_to_table([row])))
        store.compact()
        _check_rows(store, made)
        size = sum(store.sizes("rows").values()) / n
    yield Figure("row_bytes", f"bytes per row of {n:,}, compacted", "B", (size,), 600, 450)


# -- whole processes ----------------------------------------------------------------------------------

COMMANDS = {
    "--help": ["--help"],
    "status": ["status", SWEEP],
    "query": ["query", "select count(*) from rows"],
}


def startup(times: int = PAIRS, n: int = 200) -> Iterator[Figure]:
    """`prunesweep` from its start to its end, with Python's compiled files in place, as after the first use."""
    with folder() as path:
        filled(path / "results", n)
        env = os.environ | {"PRUNESWEEP_STORE": str(path / "results"), "PYTHONPYCACHEPREFIX": str(path / "compiled")}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for name, arguments in COMMANDS.items():
            started = lambda arguments=arguments: _run(arguments, env)  # noqa: E731
            assert ("Commands:" if name == "--help" else str(n)) in started()
            yield Figure("startup", f"prunesweep {name}", "s", tuple(seconds(started) for _ in range(times)), 0.8, 0.4)


def _run(arguments: list[str], env: dict[str, str]) -> str:
    script = Path(sysconfig.get_path("scripts"), "prunesweep")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "prunesweep"]
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, check=True).stdout


# -- how it bends -------------------------------------------------------------------------------------


def grown(path: Path, n: int) -> Store:
    """A compacted store with n rows of one sweep, fast: every cell is measured as the first is."""
    store, first = Store(path), rows_to_table(rows(study(CELL_ROWS)))
    store.write_manifest(SWEEP, f"name: {SWEEP}\n", shards(n))
    for shard in shards(n):
        store.commit(f"rows/{shard.shard_id}-{os.urandom(16).hex()}.parquet", parquet(copied(first, shard)))
    store.compact()
    return store


def store_curve(sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000), times: int = 3) -> Iterator[Figure]:
    """A look at all statuses, queries, `corr` and a commit, with so many rows in the store, compacted."""
    for n in sizes:
        with folder() as path:
            store = grown(path, n)
            for name, work in _works(path, n).items():
                samples = tuple(1e3 * seconds(work) for _ in range(times))
                yield Figure("store_curve", f"{name}, {n:,} rows", "ms", samples)
            yield Figure("store_curve", f"compact those, {n:,} rows", "ms", (1e3 * seconds(store.compact),))


def _works(path: Path, n: int) -> dict[str, Callable[[], Any]]:
    """What is asked of a store of n rows; the answers that are known are checked."""
    (one,) = rows(study(1))
    assert len(Store(path).statuses()) == n
    assert run_query(Store(path), QUERIES["count and mean"])["n"].to_pylist() == [n]
    return {
        "statuses": lambda: Store(path).statuses(),
        **{name: lambda text=text: run_query(Store(path), text) for name, text in QUERIES.items()},
        "corr": lambda: _corr(str(path)),
        "commit of one row": lambda: Store(path).commit_rows("s0", [one]),
    }
