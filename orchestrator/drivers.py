"""Drivers at work: each leaves a note in scratch, for `status` and `stop`."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from storage.records import utc_now

if TYPE_CHECKING:
    from storage.store import Store


@contextmanager
def sign_of_life(store: Store, sweep: str, address: str | None) -> Iterator[None]:
    """While this lasts, a note says that this process drives `sweep`."""
    import psutil

    name = f"drivers/{uuid.uuid4().hex}"
    pid = os.getpid()
    store.note(
        name,
        {
            "sweep": sweep,
            "host": socket.gethostname(),
            "pid": pid,
            "process_started": psutil.Process(pid).create_time(),
            "address": address,
            "started_at": utc_now().isoformat(timespec="seconds"),
        },
    )
    try:
        yield
    finally:
        store.forget(name)


def drivers(store: Store, sweep: str) -> list[dict[str, Any]]:
    """The notes of a sweep's drivers, without those of this machine whose process is gone."""
    notes = [note for note in store.notes("drivers").values() if note["sweep"] == sweep]
    return [note for note in notes if not is_here(note) or _is_alive(note)]


def is_here(driver: dict[str, Any]) -> bool:
    """Whether a driver is a process of this machine."""
    return driver["host"] == socket.gethostname()


def _is_alive(driver: dict[str, Any]) -> bool:
    """Whether the process is there, and still the one that left the note."""
    import psutil

    try:
        return abs(psutil.Process(driver["pid"]).create_time() - driver["process_started"]) < 1
    except psutil.NoSuchProcess:
        return False
