"""Progress on stderr: a bar with ETA on a terminal, a heartbeat line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage.phases import TRAINING_DENSE, Phase
from storage.printable import printable, printable_lines, printable_output, unescaped

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.phases import Phases
    from storage.fallbacks import Fallback

HEARTBEAT_SECONDS = 15.0
"""How often a long command says without a terminal that it is at work."""

QUIET_SECONDS = 2.0
"""A command that takes no longer than this reports no phase."""


@dataclass
class Progress:
    """Counts of one run's tasks, shown as they change, and the phase of the run or of its workers.

    `phase` is the driver's; `at_work` are the phases of its workers, None until a worker shows itself. Any thread may
    change them and call `beat`.
    """

    total: int
    done: int = 0
    failed: int = 0
    bar: Any = None
    bar_task: Any = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    before: int = 0
    last_beat: float = field(default_factory=time.monotonic)
    phase: Phase | None = None
    at_work: tuple[Phase, ...] | None = None
    said: str | None = None
    beating: Any = field(default_factory=threading.Lock)

    def counts(self) -> dict[str, Any]:
        """Return the counts and the phase that a driver's note shows of its run."""
        return {"to_run": self.total, "done": self.done, "failed": self.failed, "phase": self.phase_text() or None}

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
        """Show the phase: on a terminal at once, elsewhere with the counts in a line now and then.

        Until a task has ended, a phase with another name is worth a line of its own.
        """
        phase, now = self.shown_phase(), time.monotonic()
        if self.bar is not None:
            self.bar.update(self.bar_task, phase=self.phase_text())
            return
        if not self.beating.acquire(blocking=False):  # another thread is at it
            return
        try:
            is_new = phase is not None and phase.name != self.said and not self.done + self.failed
            if now - self.last_beat >= (QUIET_SECONDS if is_new else HEARTBEAT_SECONDS):
                self.last_beat, self.said = now, phase.name if phase else None
                say("; ".join(filter(None, [self.line(), self.phase_text()])))
        finally:
            self.beating.release()

    def see_phases(self, at_work: tuple[Phase, ...] | None) -> None:
        """Take the phases of the workers, or None while no worker is at a shard."""
        self.at_work = at_work
        self.beat()

    def shown_phase(self) -> Phase | None:
        """Return the phase of a worker, a dense model's training first; while no worker shows itself, the driver's."""
        if self.at_work is None:
            return self.phase
        return min(self.at_work, key=lambda phase: not phase.name.startswith(TRAINING_DENSE), default=None)

    def phase_text(self) -> str:
        """Return the phase in words, with the number of other dense models in training; empty without a phase."""
        phase = self.shown_phase()
        if phase is None:
            return ""
        more = sum(one.name.startswith(TRAINING_DENSE) for one in self.at_work or ()) - 1
        return f"{phase} and {some(more, 'other dense model')}" if more > 0 else str(phase)

    def line(self) -> str:
        """`12/90 tasks, 1 failed, 0:42 elapsed, 4:33 left`."""
        finished, now = self.done + self.failed, time.monotonic()
        # Starting and training dense models says nothing about the pace of tasks.
        paced = finished - self.before
        pace = (now - self.first) / paced if self.first and paced else None
        left = "?" if pace is None else clock(pace * (self.total - finished))
        return f"{finished}/{self.total} tasks{self._failed()}, {clock(now - self.started)} elapsed, {left} left"

    def _failed(self) -> str:
        return f", {self.failed} failed" if self.failed else ""


def say(text: str) -> None:
    """A message for the person, on stderr."""
    print(printable_lines(text), file=sys.stderr, flush=True)


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


def clock(seconds: float) -> str:
    """Return `0:42`, `1:04:33`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(total: int, phases: Phases | None = None) -> Iterator[Progress]:
    """Show the progress of a run of `total` tasks, with its `phases`."""
    with _progress(total) as shown, phases.counting(shown) if phases else nullcontext():
        yield shown


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
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
    from rich.text import Text

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

    class TwoLines(Bar):
        """The bar, and the phase in a line below it."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            for task in self.tasks:
                if task.fields["phase"]:
                    yield Text(printable(task.fields["phase"]), overflow="ellipsis", no_wrap=True)

    with TwoLines(*columns, console=Console(file=unescaped(sys.stderr))) as bar, printable_output():
        yield Progress(total, bar=bar, bar_task=bar.add_task("tasks", total=total, failed="", phase=""))
