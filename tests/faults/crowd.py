"""Many processes and threads at one store. Run as a process of its own, which forks the others:

python -m tests.faults.crowd SCENE [ARGUMENT ...]     (arguments and answer are JSON)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, cast

from pyarrow import fs as pafs

from storage.commit import commit, replace
from storage.records import Task
from storage.rowfiles import parquet
from storage.schema import rows_to_table
from storage.sql import run_query
from storage.store import Store
from tests.faults.kills import alone
from tests.rows import ORACLE, done, failed

FORK = multiprocessing.get_context("fork")
THREADS = 5


def play(scene: str, *arguments: Any) -> Any:
    """The answer of a scene that is played in a process of its own."""
    return json.loads(alone("tests.faults.crowd", scene, *map(json.dumps, arguments)))


def _at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """The answers of `works`, each done in a forked process. If one fails, all are ended."""
    ways = [FORK.Pipe(duplex=False) for _ in works]
    processes = [
        FORK.Process(target=_answer, args=(work, w), daemon=True) for work, (_, w) in zip(works, ways, strict=True)
    ]
    for process in processes:
        process.start()
    working = {process.sentinel: process for process in processes}
    answers: dict[int, Any] = {}
    while working:
        for number, (reading, _) in enumerate(ways):
            if number not in answers and reading.poll(0.01):
                answers[number] = reading.recv()
        for sentinel in connection.wait(list(working), 0):
            if working.pop(cast("int", sentinel)).exitcode:
                sys.exit("one of many failed")  # and `alone` ends the others
    return [answers[number] if number in answers else ways[number][0].recv() for number in range(len(works))]


def _answer(work: Callable[[], Any], writing: Any) -> None:
    writing.send(work())


def _threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Do `work` in as many threads. An error in one of them ends the process: its answer is missed."""

    def one(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- many attempts at one task ------------------------------------------------------------------------


def attempts(location: str, commits: int, readers: int) -> list[list[Any]]:
    """`commits` rows of one task, some failed, from four processes; then what `readers` see, each with
    the rows in an order of its own: how many attempts, in how many files, and the host of the chosen."""

    def write(process: int) -> None:
        def one(thread: int) -> None:
            store, task = Store(location), Task(ORACLE, 0, 0)
            # Packed once: that takes longer than a commit, and nobody disturbs anybody in it.
            files = [parquet(rows_to_table([row(task, host=f"{process}-{thread}")])) for row in (failed, done)]
            for n in range(commits // 4 // THREADS):
                store.commit(f"rows/s0-{uuid.uuid4().hex}.parquet", files[n % 5 > 0])

        _threads(one)

    _at_once([lambda process=process: write(process) for process in range(4)])
    store = Store(location)
    found, problems = store.row_files()
    answers: list[list[Any]] = []
    for seed in range(readers):
        order = random.Random(seed).sample(range(len(found)), len(found))
        store.row_files = lambda columns=None, order=order: (found.take(order), problems)
        counts = "(select count(*) from attempts) as seen, (select count(distinct file) from attempts) as files"
        answers += [list(row.values()) for row in run_query(store, f"select {counts}, host from rows").to_pylist()]
    return answers


# -- many contents under one name ---------------------------------------------------------------------


def one_name(folder: str, way: str, names: int) -> list[Any]:
    """What two readers saw, per name, while four processes of five threads wrote other contents to each."""
    put = {"commit": commit, "replace": replace}[way]
    over = FORK.Semaphore(0)

    def write(process: int) -> None:
        def one(thread: int) -> None:
            for name in range(names):
                put(pafs.LocalFileSystem(), f"{folder}/{name}", content(process * THREADS + thread))

        _threads(one)
        over.release()

    def read() -> list[list[str]]:
        seen: list[set[str]] = [set() for _ in range(names)]
        last = False
        while not last:
            last = over.get_value() == 4  # once more when all is written
            for name in range(names):
                path = Path(folder, str(name))
                if path.exists():
                    seen[name].add(whose(path.read_bytes()))
        return [sorted(found) for found in seen]

    return _at_once([read, read, *(lambda process=process: write(process) for process in range(4))])[:2]


def content(writer: int) -> bytes:
    """What a writer writes: it tells whether it is whole."""
    body = bytes([writer]) * (100_000 + writer)
    return hashlib.sha256(body).digest() + body


def whose(found: bytes) -> str:
    """Which writer wrote what was found, or `torn`."""
    if hashlib.sha256(found[32:]).digest() != found[:32]:
        return "torn"
    return str(found[-1])


# -- traffic ------------------------------------------------------------------------------------------


def traffic(location: str, seconds: float, compactors: int) -> dict[str, Any]:
    """Two writers, two readers and some compactors, all at work for `seconds` and a little to do at least.

    Of each look of a reader: the rows committed before it began, those it saw, of how many tasks, and
    those that were committed or about to be when it ended. Of each compactor: how often it merged. And
    all rows that were committed: each is of another task.
    """
    begun, ended, others = FORK.Value("q", 0), FORK.Value("q", 0), FORK.Value("q", 2 + compactors)
    end = time.monotonic() + seconds

    def add(number: Any, count: int) -> None:
        with number.get_lock():
            number.value += count

    def write(number: int) -> None:
        store, n = Store(location), 0
        while others.value:
            add(begun, 2)
            store.commit_rows(f"s{number}", [done(Task(ORACLE, number, seed)) for seed in (n, n + 1)])
            add(ended, 2)
            n += 2

    def read(by_sql: bool) -> list[list[int]]:
        store, looks = Store(location), []
        while time.monotonic() < end or len(looks) < 3:
            before = ended.value
            if by_sql:
                found = run_query(store, "select task_id from attempts")
            else:
                found, problems = store.row_files()
                assert problems == []
            tasks = found["task_id"].to_pylist()
            looks.append([before, len(tasks), len(set(tasks)), begun.value])
        add(others, -1)
        return looks

    def merge() -> int:
        store, merged = Store(location), 0
        while time.monotonic() < end or merged < 2:
            merged += store.compact().merged > 0
        add(others, -1)
        return merged

    Path(location, "rows").mkdir()  # readers may come before the first writer
    writers = [lambda number=number: write(number) for number in range(2)]
    answers = _at_once([lambda: read(True), lambda: read(False), *[merge] * compactors, *writers])
    return {"looks": answers[0] + answers[1], "merged": answers[2:-2], "rows": ended.value}


if __name__ == "__main__":
    importlib.import_module("pandas")  # pyarrow would, at the first table, in every process
    scenes = {"attempts": attempts, "one_name": one_name, "traffic": traffic}
    print(json.dumps(scenes[sys.argv[1]](*map(json.loads, sys.argv[2:]))))
