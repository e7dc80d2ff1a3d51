"""Drivers at work: what each shows of itself, what it sees of its workers and of others, how it stops."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from storage.errors import StoreError
from storage.phases import Phase
from storage.records import filed_under
from storage.signs import Sign, counts, living, signs
from workers.pulse import stop_note

if TYPE_CHECKING:
    from storage.store import Store

GRACE_SECONDS = 25.0
"""So long a stopped run waits for its workers; whoever asks it to stop allows 30 s."""

LOOK_SECONDS = 2.0
"""How often a driver looks at the workers' notes."""

FROZEN_SECONDS = 120.0
"""A worker at a shard whose note has not changed for this long is ended, and its shard given away."""

OF_RAY = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a job its metadata and its environment, as JSON."""


class Driver:
    """This process as the driver of a sweep, while `with` lasts.

    Its thread renews its note, looks at the workers' notes, and passes on the wish to stop.
    """

    def __init__(
        self,
        store: Store,
        sweep: str,
        address: str | None,
        counts_of: Callable[[], Mapping[str, Any]],
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self._store, self.sweep = store, sweep
        self._about: dict[str, Any] = {"sweep": sweep, "address": address, "job": submitted_as(), **(asked or {})}
        self.sign = Sign(store, "drivers", lambda: {**self._about, **counts_of()}, self._look, LOOK_SECONDS)
        self.id = self.sign.id
        self.stop = threading.Event()
        self.elsewhere: frozenset[str] = frozenset()
        self.end_worker: Callable[[Mapping[str, Any]], None] = lambda _: None
        self.report: Callable[[str], None] = lambda _: None
        self.see_phases: Callable[[tuple[Phase, ...] | None], None] = lambda _: None
        self._beats: dict[str, tuple[str, float]] = {}
        self._told = self._hurried = False

    def __enter__(self) -> Driver:
        self.sign.__enter__()
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        self.sign.__exit__()
        if self._told:
            with suppress(StoreError):
                self._store.scratch.forget(stop_note(self.id))

    def withdraw(self) -> None:
        """Remove this driver's note, in a process that is about to end at once."""
        self.sign.withdraw()

    def leave(self, shard_id: str) -> None:
        """Another driver has this shard, as a worker has found: leave it until the next look says otherwise."""
        self.elsewhere |= {filed_under(shard_id)}

    def note_of(self, shard_id: str) -> dict[str, Any] | None:
        """The last that a worker of ours showed of itself at a shard; the note is removed."""
        try:
            notes = signs(self._store, "workers")
        except StoreError:
            return None
        mine = {n: note for n, note in notes.items() if (note.get("driver"), note.get("shard")) == (self.id, shard_id)}
        for name in mine:
            with suppress(StoreError):
                self._store.scratch.forget(name)
        return max(mine.values(), key=lambda note: note["beat_at"], default=None)

    def _look(self) -> None:
        """Called by the thread: what is elsewhere, what workers report, who is frozen, whether to stop."""
        try:
            if self.stop.is_set():
                self._pass_on_the_wish()
            notes = signs(self._store, "workers")
        except StoreError:
            self._beats.clear()  # nobody could be seen: nobody was seen to be still
            return
        if not self.sign.renewed:
            self._beats.clear()  # ours cannot be written either: it is the store that is still
        others = [n for n in notes.values() if n.get("driver") != self.id and n.get("shard") and counts(n)]
        self.elsewhere = frozenset(filed_under(str(note["shard"])) for note in others)
        mine = [n for n in notes.values() if n.get("driver") == self.id and n.get("shard") and counts(n)]
        self.see_phases(tuple(found for note in mine if (found := Phase.from_note(note))) if mine else None)
        for name, note in notes.items():
            for message in note.get("messages", ()) if note.get("driver") == self.id else ():
                self.report(message)
            if note.get("driver") == self.id and note.get("node") and self._is_frozen(name, note["beat_at"]):
                self.end_worker(note)

    def _pass_on_the_wish(self) -> None:
        """Tell our workers to stop; where somebody has noted that it is to be now, do not wait for them."""
        wish = self._store.scratch.noted(stop_note(self.id))
        if wish is None:
            self._store.scratch.note(stop_note(self.id), {})
        self._told = True
        if wish and wish.get("now") and not self._hurried:
            self._hurried = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _is_frozen(self, name: str, beat: str) -> bool:
        """Whether a note has been the same for long, by this process's clock."""
        before, since = self._beats.get(name, (None, 0.0))
        if before != beat:
            self._beats[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > FROZEN_SECONDS


def drivers(store: Store, sweep: str) -> list[dict[str, Any]]:
    """The notes of a sweep's drivers that live, as far as can be told from here."""
    return [note for note in living(store, "drivers").values() if note.get("sweep") == sweep]


def submitted_as() -> str | None:
    """The submission id of the Ray job that this process is, as Ray tells it; None for any other process."""
    try:
        told = json.loads(os.environ.get(OF_RAY, "{}"))
        name = told["metadata"]["job_submission_id"]
    except (ValueError, TypeError, KeyError):
        return None
    return str(name)


def hurry(store: Store, job: str) -> bool:
    """Note that the driver that is the Ray job `job`, which is asked to stop, is not to wait; whether it is there."""
    notes = living(store, "drivers")
    mine = [name.removeprefix("drivers/") for name, note in notes.items() if note.get("job") == job]
    for driver in mine:
        store.scratch.renew(stop_note(driver), {"now": True})
    return bool(mine)


@contextmanager
def heeding_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask a run to stop. A second one, or the end of the grace, interrupts it.

    SIGINT too where a shell's `&` had it ignored.
    """
    main = threading.main_thread().ident or 0
    # A signal also wakes a main thread that waits; interrupt_main would only set a flag.
    timer = threading.Timer(GRACE_SECONDS, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.daemon = True

    def heed(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        timer.start()
        # A handler may not print: it could be in the middle of printing.
        os.write(2, b"\nstopping: what is finished is committed, what is not is checkpointed (again: at once)\n")

    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        before = [signal.signal(number, heed) for number in numbers]
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
