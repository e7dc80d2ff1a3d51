"""Stores that are not folders: which there are, how long they may take to answer, and what a person can set for them.

A library of a cloud may wait for hours where no network is. So each request runs in a thread that is left behind when
its time is over. The time limit is TIMEOUT; every request to a remote store, retries included, is held to it here.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from storage.errors import StoreError
from storage.printable import printable

if TYPE_CHECKING:
    from pyarrow import fs as pafs

T = TypeVar("T")

TIMEOUT = "PRUNESWEEP_STORE_TIMEOUT"
TIMEOUT_SECONDS = 30.0
"""Maximum time of one request to a remote store, retries included. The environment variable TIMEOUT changes it. Data
has in addition the time that it takes at SLOWEST."""

SLOWEST = 2**17
"""Bytes per second below which a transfer is given up."""

THREAD = "prunesweep-store"
"""The name of threads that run requests. One that is left behind can keep an interpreter from its end."""

SETTINGS = {
    "s3": "AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or the URI gs://anonymous@bucket/prefix)",
    "abfs": "the URI (abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX), AZURE_TENANT_ID, AZURE_CLIENT_ID and "
    "AZURE_CLIENT_SECRET",
    "hdfs": "JAVA_HOME, HADOOP_HOME and CLASSPATH",
    "hf": "HF_TOKEN and HF_ENDPOINT, and that huggingface_hub is installed",
    "fsspec+": "that the package of this file system is installed, and its credentials",
}
"""The kind of a remote store -> the settings that it takes from the environment."""

KINDS = {
    **{name: name for name in ("s3", "gs", "abfs", "hdfs", "hf")},
    "gcs": "gs",
    "abfss": "abfs",
    "viewfs": "hdfs",
}
"""The scheme of a URI -> the kind of the store."""

LOCAL = "file"


def kind_of(location: str) -> str | None:
    """Return the kind of a remote store, a key of SETTINGS; None for a local folder or `file://`. Raises StoreError for
    a URI of another scheme."""
    scheme, separator, _ = location.partition("://")
    if not separator or scheme == LOCAL:
        return None
    if scheme.startswith("fsspec+"):
        return "fsspec+"
    if scheme not in KINDS:
        allowed = ", ".join(f"{one}://" for one in (LOCAL, *KINDS))
        raise StoreError(f"{printable(location)} is no store location; allowed: {allowed}, or a folder")
    return KINDS[scheme]


def settings(location: str) -> str:
    """Return the advice on a remote store that failed: the settings to check; empty for a local one."""
    kind = kind_of(location)
    return f". Check the network, {SETTINGS[kind]}" if kind else ""


def timeout_seconds() -> float:
    """Return the time limit of a request. Raises StoreError where the environment has something else than a number."""
    given = os.environ.get(TIMEOUT)
    if not given:
        return TIMEOUT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise StoreError(f"{TIMEOUT}={printable(given)}: a time limit is a number of seconds, more than 0")
    return seconds


class Unanswered(TimeoutError):
    """A request that is over its time."""


class Budget:
    """The time that one request has left, its retries included. Data makes it longer."""

    def __init__(self, size: int = 0) -> None:
        self.seconds = timeout_seconds()
        self._until = time.monotonic() + self.seconds
        self.allow(size)

    def allow(self, size: int) -> None:
        """Add the time that `size` bytes take at SLOWEST."""
        self._until += size / SLOWEST

    def left(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self._until - time.monotonic())


def within(budget: Budget, work: Callable[[], T]) -> T:
    """Return the result of `work`, which a thread runs. Raises Unanswered when the budget is spent, the OSErrors of
    `work`, and OSError for its other exceptions: each library has its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(f"cannot start a thread: {error}") from error
    while thread.is_alive() and (left := budget.left()):
        thread.join(left)
    if errors:
        raise _os_error(errors[0])
    if results:
        return results[0]
    raise Unanswered(f"no answer within {budget.seconds:g} s ({TIMEOUT})")


def _os_error(error: BaseException) -> BaseException:
    if isinstance(error, OSError | MemoryError | StoreError) or not isinstance(error, Exception):
        return error
    made = OSError(f"{type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of text that can be printed, not longer than 300 characters."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    line = " ".join(text.split())
    return printable(line if len(line) <= 300 else f"{line[:300]} ...")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path in it. Raises OSError or ValueError where the URI is wrong or the
    store does not answer in time."""
    from pyarrow import fs as pafs

    if kind_of(uri) is None:
        return pafs.FileSystem.from_uri(uri)
    return within(Budget(), lambda: pafs.FileSystem.from_uri(_with_limit(uri)))


def _with_limit(uri: str) -> str:
    """A gs:// URI whose library repeats a request no longer than the time limit, not for 15 minutes."""
    if KINDS.get(uri.partition("://")[0]) != "gs" or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={max(1, int(timeout_seconds() / 3))}"


def has_left_behind() -> bool:
    """Return whether a request that is over its time still runs in this process."""
    return any(thread.name == THREAD for thread in threading.enumerate())
