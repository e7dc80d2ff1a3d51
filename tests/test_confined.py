"""Work in a process of its own: its answer and its errors come back, and the system stops it at its limits."""

from __future__ import annotations

import errno
import os
import signal
import time

import duckdb
import pyarrow as pa
import pytest

from storage.confined import SLACK, Done, Limits, confined
from storage.errors import QueryError, StoreError

FREELY = Limits(2**30, 60)


def test_the_answer_and_what_was_said_come_back() -> None:
    """Any bytes, as many as a pipe does not hold, with newlines among them."""
    answer = b"\n\x00" * 10**6
    assert confined(lambda: Done(answer, ("one", "two\n")), FREELY) == Done(answer, ("one", "two\n"))


def test_it_is_another_process() -> None:
    """Nothing that the work changes is changed here."""
    seen: list[int] = []

    def work() -> Done:
        seen.append(1)
        return Done(str(os.getpid()).encode())

    assert int(confined(work, FREELY).answer) != os.getpid()
    assert seen == []


@pytest.mark.parametrize("error", [QueryError("mine"), StoreError("mine")])
def test_an_error_for_people_comes_back_as_it_is(error: Exception) -> None:
    """Class and message, so that the exit code is the same."""
    with pytest.raises(type(error), match=r"^mine$"):
        confined(lambda: (_ for _ in ()).throw(error), FREELY)


def test_an_error_of_ours_comes_back_with_its_traceback() -> None:
    """What is no mistake of the person's names the line."""
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        confined(lambda: Done(bytes(1 // 0)), FREELY)


def test_work_stops_at_its_time() -> None:
    """Wherever it is: here in a sleep that nothing interrupts."""
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"stopped after 0\.2 s.*--timeout"):
        confined(lambda: time.sleep(30) or Done(b""), Limits(2**30, 0.2))
    assert time.monotonic() - began < 10


def test_work_stops_at_its_memory() -> None:
    """What is below the limit is given, what is above is not; both are asked for, neither is touched."""
    limits = Limits(2**28, 60)
    assert confined(lambda: Done(bytes(len(bytearray(2**27)) // 2**27)), limits).answer == b"\x00"
    with pytest.raises(QueryError, match=r"more than 256 MiB of memory are needed.*--memory"):
        confined(lambda: Done(bytes(len(bytearray(2 * (2**28 + SLACK))))), limits)


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        duckdb.OutOfMemoryException("Out of Memory Error: Allocation failure"),
        duckdb.InternalException("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libfoo.so: failed to map segment from shared object"),
        _from(StoreError("cannot read rows"), pa.ArrowMemoryError("realloc failed")),
        _from(QueryError("no"), duckdb.OutOfMemoryException("no")),
    ],
    ids=repr,
)
def test_each_librarys_error_of_memory_is_one(error: Exception) -> None:
    """DuckDB, Arrow, Python, the loader of libraries and threads have their own kinds."""
    with pytest.raises(QueryError, match=r"more than 1024 MiB of memory are needed.*--memory"):
        confined(lambda: (_ for _ in ()).throw(error), FREELY)


def test_a_query_about_memory_is_no_error_of_memory() -> None:
    """Words in a message that come from the query itself."""
    with pytest.raises(QueryError, match="out of memory"):
        confined(lambda: (_ for _ in ()).throw(QueryError("no column 'out of memory'")), FREELY)


def test_what_is_killed_is_told() -> None:
    """A child that the system ends says nothing itself: memory is the likely reason."""
    with pytest.raises(QueryError, match="memory"):
        confined(lambda: os.kill(os.getpid(), signal.SIGKILL) or Done(b""), FREELY)


def test_no_child_is_left_when_waiting_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the work with the waiting."""
    forked: list[int] = []
    fork = os.fork

    def noted() -> int:
        child = fork()
        forked.append(child)
        return child

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fork", noted)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            confined(lambda: time.sleep(30) or Done(b""), FREELY)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(forked[0], 0)
