"""Work in a process of its own, which the system itself stops at a limit of time and of memory.

DuckDB keeps its own limit of memory and can be interrupted, but not everywhere: `repeat('x', 3000000000)` is computed
while a query is planned, out of reach of both.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from storage.errors import QueryError, StoreError

SLACK = 2**29 + 2**25 * (os.cpu_count() or 1)
"""Bytes beside the limit: the libraries themselves, and of the threads that they start for each core the stacks."""

_KINDS: dict[str, type[Exception]] = {"QueryError": QueryError, "StoreError": StoreError}


@dataclass(frozen=True)
class Limits:
    """What a query may take: bytes of memory, and seconds."""

    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.memory / 2**20:.4g} MiB, {self.seconds:g} s"


@dataclass(frozen=True)
class Done:
    """What came of the work: its answer, and what it had to say beside it."""

    answer: bytes
    said: tuple[str, ...] = ()


def half_of_memory() -> int:
    """Half of the bytes that this machine has, or that its container may have."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" where there is no limit
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return whole // 2


def confined(work: Callable[[], Done], limits: Limits, begun: Callable[[], None] = lambda: None) -> Done:
    """What `work` returns, run in a child of this process. Where there is no /proc, memory is for DuckDB to limit.
    `begun` is called once the child runs, and may start threads.

    Raises the QueryError or StoreError that it raises, QueryError where it takes more than its limits, and
    RuntimeError with its traceback for any other exception of it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(work, limits, writing)
    os.close(writing)
    try:
        begun()
        with os.fdopen(reading, "rb") as pipe:
            head, answer = pipe.readline(), pipe.read()
    except BaseException:  # Ctrl-C: nobody waits for it any more
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise QueryError(_why(-status, limits))
    return _unpacked(json.loads(head), answer, limits)


def _why(stopped_by: int, limits: Limits) -> str:
    if stopped_by == signal.SIGALRM:
        return f"stopped after {limits.seconds:g} s: ask for less, or give it more with --timeout"
    return _needs_more(limits)


def _needs_more(limits: Limits) -> str:
    return f"more than {limits.memory / 2**20:.4g} MiB of memory are needed: ask for less, or give more with --memory"


def _unpacked(head: dict[str, str | list[str]], answer: bytes, limits: Limits) -> Done:
    kind, message = str(head["kind"]), str(head.get("message", ""))
    if kind == "memory":
        raise QueryError(_needs_more(limits))
    if kind in _KINDS:
        raise _KINDS[kind](message)
    if kind != "done":
        raise RuntimeError(message)
    return Done(answer, tuple(head["said"]))


def _work(work: Callable[[], Done], limits: Limits, writing: int) -> NoReturn:
    """The child: its outcome goes into the pipe, and it ends without what its parent does at its end."""
    try:
        _confine(limits)
        head, answer = _outcome(work)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(head).encode() + b"\n")
            pipe.write(answer)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _confine(limits: Limits) -> None:
    """From here on the system ends this process where it takes more."""
    faulthandler.disable()
    _without_reserve()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # what a library says as it ends; what is to be told goes through the pipe
    for name in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # no /proc, or a lower limit already
        used = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if used:
            most = int(used[1]) * 1024 + limits.memory + SLACK
            resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _without_reserve() -> None:
    """Let Arrow take memory as it needs it: its own allocator reserves 1 GiB at once, which leaves a limit little more
    than that with nothing."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    if (arrow := sys.modules.get("pyarrow")) is not None:
        arrow.set_memory_pool(arrow.system_memory_pool())


def _outcome(work: Callable[[], Done]) -> tuple[dict[str, str | list[str]], bytes]:
    try:
        done = work()
    except Exception as error:
        if _is_of_memory(error):
            return {"kind": "memory"}, b""
        if isinstance(error, tuple(_KINDS.values())):
            return {"kind": type(error).__name__, "message": str(error)}, b""
        return {"kind": "internal", "message": traceback.format_exc()}, b""
    return {"kind": "done", "said": list(done.said)}, done.answer


_OF_MEMORY = re.compile(
    r"can't (?:start|create) new thread|cannot start a thread|bad_alloc|allocat\w* (?:fail|memory)|out of memory"
    r"|failed to (?:allocate|map)|malloc of size",
    re.IGNORECASE,
)
"""What libraries say where the system gives them no memory, or no thread for lack of it."""


def _is_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it comes from, is that of a library without memory: each has its own kind."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, MemoryError) or type(at).__name__ == "OutOfMemoryException":
            return True
        if isinstance(at, OSError) and at.errno == errno.ENOMEM:
            return True
        # The words of a query's own error can be those of the query.
        if not isinstance(at, QueryError) and type(at).__module__ != "_duckdb" and _OF_MEMORY.search(str(at)):
            return True
        if "std::bad_alloc" in str(at) and type(at).__module__ == "_duckdb":
            return True
        at = at.__cause__ or at.__context__
    return False
