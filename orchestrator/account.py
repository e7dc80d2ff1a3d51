"""The account of a run: what its runner tells of rows and endings, and what is written down for it."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.endings import End, Ending
from orchestrator.progress import Progress, say
from orchestrator.queue import Burial, Queue
from storage.errors import StoreError
from storage.records import Row, row_for, utc_now
from storage.store import Store
from workers.worker import last_line, where_it_failed

_WORTH_SAYING = {
    End.NO_DENSE: "dense weights are trained again",
    End.NO_MEMORY: "memory ran out",
    End.STORE: "the store failed",
    End.TIME: "a task took longer than its limit",
    End.DIED: "a worker's process died",
    End.NODE_LOST: "a node was lost",
    End.PREEMPTED: "a node has gone",
    End.NOT_STARTED: "a worker did not start",
}


@dataclass
class Account:
    """What both runners report to. Rows of tasks that took their process down are written here."""

    store: Store
    queue: Queue
    shown: Progress
    said: dict[str, object] = field(default_factory=dict)

    def row(self, row: Row) -> None:
        """A task's row is durable."""
        self.rows(row.status == "done", [failure(row)] if row.status == "failed" else [])

    def rows(self, done: int, failures: Iterable[Failure]) -> None:
        """So many tasks are done, and these failed."""
        failed = 0
        for one in failures:
            failed += 1
            self.queue.failed_at(*one)
        self.shown.advance(done, failed)

    def ended(self, shard_id: str, ending: Ending) -> None:
        """A shard ended."""
        if ending.kind in _WORTH_SAYING:
            at = f" at task {ending.task}" if ending.task else ""
            why = f": {ending.reason}" if ending.reason else ""
            say(f"{_WORTH_SAYING[ending.kind]}{at}{why}")
        for burial in self.queue.ended(shard_id, ending):
            self._bury(burial)

    def say_all(self, messages: Iterable[str]) -> None:
        """Report the messages of workers."""
        for message in messages:
            self.say(message)

    def say(self, message: str) -> None:
        """Report a message of a worker once, though it comes by the worker's note and by its result, and several
        workers may have the same. Any thread may call this."""
        mine = object()
        if self.said.setdefault(message, mine) is mine:
            say(message)

    def _bury(self, burial: Burial) -> None:
        now = utc_now()
        measured = {
            "error_class": burial.error_class,
            "error": burial.error,
            "host": socket.gethostname(),
            "started_at": now,
            "finished_at": now,
        }
        try:
            self.store.commit_rows(burial.filed_under, [row_for(burial.task, "failed", measured)])
        except StoreError as error:
            self.queue.halt()
            self.queue.store_problem = str(error)
            return
        self.shown.advance(0, 1)


Failure = tuple[str, str, str, str]
"""A failed task, its cell, the place, and what went wrong in a line: plain data, for the wire."""


def failure(row: Row) -> Failure:
    """What counts of a failed row for the others of its cell."""
    return row.task_id, row.cell_id, where_it_failed(row), last_line(row.error)
