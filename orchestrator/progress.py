"""Progress on stderr: a bar with ETA on a terminal, a heartbeat line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.fallbacks import Fallback

HEARTBEAT_SECONDS = 15.0


@dataclass
class Progress:
    """Counts of one run's tasks, shown as they change."""

    total: int
    done: int = 0
    failed: int = 0
    bar: Any = None
    bar_task: Any = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    before: int = 0
    last_beat: float = field(default_factory=time.monotonic)

    def counts(self) -> dict[str, int]:
        """What a driver's note says of its run."""
        return {"to_run": self.total, "done": self.done, "failed": self.failed}

    def advance(self, done: int, failed: int) -> None:
        """`done` and `failed` more tasks have rows."""
        if self.first is None and done + failed:
            self.first = time.monotonic()
            self.before = done + failed
        self.done, self.failed = self.done + done, self.failed + failed
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=self.done + self.failed, failed=self._failed())
        self.beat()

    def beat(self) -> None:
        """A line now and then, where there is no terminal."""
        now = time.monotonic()
        if self.bar is None and now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            say(self.line())

    def line(self) -> str:
        """`12/90 tasks, 1 failed, 0:42 elapsed, 4:33 left`."""
        finished, now = self.done + self.failed, time.monotonic()
        # Starting and training dense models says nothing about the pace of tasks.
        paced = finished - self.before
        pace = (now - self.first) / paced if self.first and paced else None
        left = "?" if pace is None else _clock(pace * (self.total - finished))
        return f"{finished}/{self.total} tasks{self._failed()}, {_clock(now - self.started)} elapsed, {left} left"

    def _failed(self) -> str:
        return f", {self.failed} failed" if self.failed else ""


def say(text: str) -> None:
    """A message for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


CELLS_NAMED = 5


def slower(found: Fallback) -> str:
    """Return the line that reports tasks on a slower back-end: their number, cells and back-end, and the reason."""
    more = len(found.cells) - CELLS_NAMED
    cells = ", ".join(found.cells[:CELLS_NAMED]) + (f" and {some(more, 'more cell')}" if more > 0 else "")
    return f"slower: {some(found.tasks, 'task')} ran on the {found.backend} back-end: {found.reason} ({cells})"


def some(n: int, thing: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Progress of a run of `total` tasks."""
    if not sys.stderr.isatty():
        yield Progress(total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("tasks"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        yield Progress(total, bar=bar, bar_task=bar.add_task("tasks", total=total, failed=""))
