"""How a shard's run ended, as a worker or the driver tells it. What follows is the queue's decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from storage.errors import StoreError
from workers.pulse import MEMORY, TIME, Elsewhere, Stopped
from workers.worker import DenseMissing, MemoryShort, Repeated


class End(StrEnum):
    """The kinds of ending. The first eight are told by the worker, the others are seen by the driver."""

    FINISHED = "finished"
    STOPPED = "stopped"
    ELSEWHERE = "elsewhere"
    NO_DENSE = "no dense weights"
    NO_MEMORY = "no memory"
    REPEATED = "repeated"
    STORE = "store"
    ERROR = "error"
    TIME = "time"
    DIED = "died"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    NOT_STARTED = "not started"
    GAVE_WAY = "gave way"


SPENT = frozenset({End.STOPPED, End.STORE, End.NOT_STARTED, End.GAVE_WAY})
"""After these a worker is given nothing more: what is tried again is tried in a new process, or later."""


class Unfit(Exception):
    """A node on which no worker can run: it does not see the store, or has not the data."""


@dataclass(frozen=True)
class Ending:
    """The kind, why, and the task the worker was at, where that is known."""

    kind: End
    reason: str = ""
    task: str | None = None


def told(error: Exception) -> Ending:
    """The ending that `Worker.run_shard` tells by raising `error`."""
    match error:
        case Stopped():
            return Ending(End.STOPPED)
        case Elsewhere():
            return Ending(End.ELSEWHERE)
        case DenseMissing():
            return Ending(End.NO_DENSE, str(error))
        case MemoryShort():
            task, said = error.args
            return Ending(End.NO_MEMORY, said, task)
        case Repeated():
            return Ending(End.REPEATED, str(error))
        case Unfit():
            return Ending(End.NOT_STARTED, str(error))
        case StoreError():
            return Ending(End.STORE, str(error))
        case _:
            return Ending(End.ERROR, f"{type(error).__name__}: {error}")


def seen(
    note: dict[str, object] | None,
    reason: str,
    *,
    preempted: bool = False,
    node_lost: bool = False,
    memory: bool = False,
) -> Ending:
    """The ending of a shard whose process is gone: `note` is the last it showed, None if it never began.

    A node that went while workers started on it tells nothing of them.
    """
    task = (note or {}).get("task")
    at = task if isinstance(task, str) else None
    if preempted:
        return Ending(End.PREEMPTED, reason)
    if node_lost:
        return Ending(End.NODE_LOST, reason, at)
    if note is None:
        return Ending(End.NOT_STARTED, reason)
    if note.get("verdict") == TIME:
        return Ending(End.TIME, reason, at)
    if memory or note.get("verdict") == MEMORY:
        return Ending(End.NO_MEMORY, reason, at)
    return Ending(End.DIED, reason, at)
