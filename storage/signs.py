"""Signs of life: a note in scratch that its process renews, and whether it still counts.

`drivers/<uuid>` are those of drivers, `workers/<uuid>` those of workers. A note counts while its process
is there, where that can be told, and its last beat is no older than STALE_SECONDS.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from storage.errors import StoreError
from storage.machine import is_alive, machine, process_started
from storage.records import utc_now

if TYPE_CHECKING:
    from storage.store import Store

BEAT_SECONDS = 10.0
"""How often a living process says so."""

STALE_SECONDS = 60.0
"""A note that was not renewed for this long counts no more. Clocks that differ by less do no harm."""


class Sign:
    """This process's note in a folder of scratch, renewed by a thread as long as `with` lasts.

    `about` gives what it says besides who and when. `tick` is called about every `seconds`, between the
    beats too. Scratch may fail: a note that cannot be written is tried again at the next beat.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        about: Callable[[], Mapping[str, Any]],
        tick: Callable[[], None] = lambda: None,
        seconds: float = BEAT_SECONDS,
    ) -> None:
        self.id = uuid.uuid4().hex
        self._store, self._name, self._about, self._tick, self._seconds = (
            store,
            f"{folder}/{self.id}",
            about,
            tick,
            seconds,
        )
        self.renewed = True
        self._end, self._lock = threading.Event(), threading.RLock()
        self._thread = threading.Thread(target=self._live, name=f"sign of life in {folder}", daemon=True)
        pid = os.getpid()
        self._who = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": pid,
            "process_started": process_started(pid),
            "started_at": utc_now().isoformat(timespec="seconds"),
        }

    def __enter__(self) -> Sign:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.withdraw()

    def withdraw(self) -> None:
        """Remove the note for good, without waiting for the thread that renews it."""
        self._end.set()
        with self._lock, suppress(StoreError):
            self._store.scratch.forget(self._name)

    def beat(self, **more: Any) -> bool:
        """Renew the note now; whether that could be done. Of two threads that do, the later note stays."""
        with self._lock:
            if self._end.is_set():
                return False
            note = {**self._who, **self._about(), **more, "beat_at": utc_now().isoformat(timespec="milliseconds")}
            try:
                self._store.scratch.renew(self._name, note)
            except StoreError:
                return False
            return True

    def _live(self) -> None:
        last = time.monotonic()
        while not self._end.wait(min(self._seconds, BEAT_SECONDS)):
            with suppress(Exception):  # this thread is the sign of life: nothing may end it
                self._tick()
            if time.monotonic() - last >= BEAT_SECONDS:
                last, self.renewed = time.monotonic(), self.beat()


def age(note: Mapping[str, Any]) -> float:
    """Seconds since a note's last beat, by this machine's clock."""
    return (utc_now() - dt.datetime.fromisoformat(note["beat_at"])).total_seconds()


def counts(note: Mapping[str, Any]) -> bool:
    """Whether the process of a note lives, as far as can be told from here."""
    return age(note) <= STALE_SECONDS and (not is_here(note) or is_alive(note["pid"], note["process_started"]))


def is_here(note: Mapping[str, Any]) -> bool:
    """Whether a note is of a process of this machine."""
    return note["machine"] == machine()


def signs(store: Store, folder: str) -> dict[str, dict[str, Any]]:
    """The notes of a folder that are signs of life, by name."""
    return {name: note for name, note in store.scratch.notes(folder).items() if _is_sign(note)}


def living(store: Store, folder: str) -> dict[str, dict[str, Any]]:
    """Those of them that count."""
    return {name: note for name, note in signs(store, folder).items() if counts(note)}


def dead(store: Store, folder: str) -> list[str]:
    """The names of those that count no more."""
    return [name for name, note in store.scratch.notes(folder).items() if not (_is_sign(note) and counts(note))]


def _is_sign(note: Mapping[str, Any]) -> bool:
    return {"machine", "pid", "process_started", "started_at", "beat_at"} <= set(note)
