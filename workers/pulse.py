"""A worker's sign of life, the limits of the task it is at, and the wish that it stops."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.errors import StoreError
from storage.phases import Phase
from storage.records import filed_under
from storage.signs import Sign, living

if TYPE_CHECKING:
    from storage.store import Store

TICK_SECONDS = 1.0
NOTE_SECONDS = 0.5
"""A task of the same shard that begins sooner after the last is shown at the next tick, if it still runs then."""

PHASE_SECONDS = 5.0
"""How often a counter of a phase, as the epoch of a training, is shown in the note; another phase is at the next
tick."""

MESSAGES = 20
"""Maximum number of messages in a note; older ones are dropped."""

STDERR = 2
HELD_SECONDS = 30.0
"""How much longer than its limit a task may last that keeps every thread of Python from running."""

TIME, MEMORY = "time", "memory"
ENDED = {TIME: 124, MEMORY: 137}
"""Why a worker ends its process: the verdict in its note, and its exit code."""


class Stopped(Exception):
    """The worker was asked to stop; what it was training is checkpointed."""


class Elsewhere(Exception):
    """A worker of another driver is at the shard."""


@dataclass(frozen=True)
class Limits:
    """What a task may take, None for any amount; and how often a long one is checkpointed."""

    task_seconds: float | None = None
    memory_bytes: int | None = None
    checkpoint_seconds: float = 600.0


class Pulse:
    """What a worker shows of itself while `with` lasts, and what it heeds.

    A task over a limit ends the process, with the verdict in the note: nothing else stops code that
    hangs. The driver `driver` asks its workers to stop by a note of its own.
    """

    def __init__(
        self,
        store: Store,
        driver: str,
        limits: Limits,
        where: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.limits, self.stop = limits, stop or threading.Event()
        self._store, self._driver = store, driver
        self._about: dict[str, Any] = {"driver": driver, "shard": None, "task": None, "phase": None, **(where or {})}
        self._since: float | None = None
        self._limit: float | None = None
        self._shown, self._shown_at = self._about, 0.0
        self._messages: list[str] = []
        self._sign = Sign(
            store, "workers", lambda: {**self._about, "messages": self._messages}, self._tick, TICK_SECONDS
        )

    def __enter__(self) -> Pulse:
        self._sign.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._sign.__exit__()

    @contextmanager
    def at(self, shard: str, *tasks: str, limited: int = 0) -> Iterator[None]:
        """While this lasts, the note says which tasks it is at; and the limits hold for `limited` of them at once.

        One is named as `task`, whose fault an end over a limit is; of a fleet nobody can say whose. Within `at` of a
        shard, tasks of it may be shown in turn.
        """
        (task,) = tasks if len(tasks) == 1 else (None,)
        before = self._about
        fleet = list(tasks) if task is None else []
        self._about = {**before, "shard": shard, "task": task, "fleet": fleet, "phase": None}
        if self._shown["shard"] != shard or time.monotonic() - self._shown_at >= NOTE_SECONDS:
            self._show()
        self._since = time.monotonic() if limited else None
        limit = self._limit = self.limits.task_seconds * limited if self.limits.task_seconds and limited else None
        if limit:
            faulthandler.dump_traceback_later(limit + HELD_SECONDS, exit=True, file=STDERR)
        try:
            yield
        finally:
            self._since = None
            self._about = {**before, "phase": None}
            if limit:
                faulthandler.cancel_dump_traceback_later()

    def phase(self, name: str, at: int = 0, of: int = 0, unit: str = "") -> None:
        """Be at this phase of the shard or task until another is reported or it ends; see storage.phases.Report.

        The note shows it at the next tick, so that quick phases cost nothing.
        """
        self._about = {**self._about, "phase": Phase(name, at, of, unit).to_dict()}

    def report(self, message: str) -> None:
        """Show a message in the note at once, where the driver finds it while the task is still running."""
        self._messages = [*self._messages, message][-MESSAGES:]
        self._show()

    def is_elsewhere(self, shard: str) -> bool:
        """Whether a worker of another driver is at a shard, asked within `at` of it.

        Each shows itself first and looks then, so that of two at most one goes on. Where both leave, theirs is
        shown no longer, and each comes back when its driver says.
        """
        notes = living(self._store, "workers").values()
        others = [n for n in notes if n.get("driver") != self._driver and filed_under(str(n.get("shard"))) == shard]
        if others:
            self._about = {**self._about, "shard": None}
            self._show()
        return bool(others)

    def _show(self) -> None:
        self._shown, self._shown_at = self._about, time.monotonic()
        self._sign.beat()

    def _tick(self) -> None:
        if _but_for_counter(self._shown) != _but_for_counter(self._about) or (
            self._shown != self._about and time.monotonic() - self._shown_at >= PHASE_SECONDS
        ):
            self._show()
        if not self.stop.is_set() and self._asked_to_stop():
            self.stop.set()
        since, limits, limit, about = self._since, self.limits, self._limit, self._about
        if since is not None and limit and time.monotonic() - since > limit:
            self._end(TIME, about)
        if since is not None and limits.memory_bytes and _resident() > limits.memory_bytes:
            self._end(MEMORY, about)

    def _asked_to_stop(self) -> bool:
        try:
            return self._store.scratch.noted(stop_note(self._driver)) is not None
        except StoreError:
            return False

    def _end(self, verdict: str, about: dict[str, Any]) -> None:
        self._sign.beat(**about, verdict=verdict)
        os._exit(ENDED[verdict])


def stop_note(driver: str) -> str:
    """The note by which a driver asks its workers to stop."""
    return f"stops/{driver}"


def _but_for_counter(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a note's content with the name alone of its phase."""
    return {**about, "phase": (about.get("phase") or {}).get("name")}


def _resident() -> int:
    """Bytes of memory this process holds."""
    import psutil

    return psutil.Process().memory_info().rss
