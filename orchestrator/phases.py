"""The phase of a command on stderr: nothing for two seconds, then what the command is working on.

On a terminal the phase is one line that is rewritten and disappears. Elsewhere it is a line for each phase that lasts,
and one every HEARTBEAT_SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

import click

from orchestrator.progress import HEARTBEAT_SECONDS, QUIET_SECONDS, Progress, clock, say
from storage.phases import Phase
from storage.printable import printable, unescaped

TICK_SECONDS = 0.2
CLEAR = "\r\x1b[K"
"""The start of the line, and the code of a terminal that clears the line from there."""


class Phases:
    """A command's phases, reported by calling this; see storage.phases.Report.

    A thread prints them. It runs from the first phase to `rest`. With a `counted` run the phase is part of the run's
    progress. One that is not `shown` prints nothing and starts no thread.
    """

    def __init__(self, quiet: float = QUIET_SECONDS, again: float = HEARTBEAT_SECONDS, *, shown: bool = True) -> None:
        self._quiet, self._again, self._shown = quiet, again, shown
        self._phase: Phase | None = None
        self._began = self._last = self._worked = time.monotonic()
        self._printed: str | None = None
        self._rested = False
        self._counted: Progress | None = None
        self._lock, self._end = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._line: _Line | None = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()

    def __call__(self, name: str, at: int = 0, of: int = 0, unit: str = "") -> None:
        """Be at this phase from now on. Only the main thread of a command may call this."""
        self._phase = Phase(name, at, of, unit)
        if self._thread is None and self._shown:
            self._begin()

    def rest(self) -> None:
        """Print no more until the next phase, and clear the line on a terminal: data may follow."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        self._phase, self._rested = None, True
        if self._line is not None:
            self._line.close()
            self._line = None

    @contextlib.contextmanager
    def counting(self, shown: Progress) -> Iterator[None]:
        """Report phases as part of a run's progress while this lasts."""
        with self._lock:
            if self._line is not None:
                self._line.clear()
            shown.phase, self._counted = self._phase, shown
        try:
            yield
        finally:
            with self._lock:
                self._counted = None

    def _begin(self) -> None:
        if self._rested:  # what was printed meanwhile is no silence
            self._last = self._worked = time.monotonic()
        self._end = threading.Event()
        self._line = _Line() if sys.stderr.isatty() else None
        # A daemon: a command that ends by an exception of its own is not kept alive by this.
        self._thread = threading.Thread(target=self._live, args=(self._end,), name="phases", daemon=True)
        self._thread.start()

    def _live(self, end: threading.Event) -> None:
        tick = min(TICK_SECONDS, self._quiet)
        while not end.wait(tick):
            with self._lock, contextlib.suppress(OSError, ValueError):  # a pipe that is closed, a stream that is
                self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        phase = self._phase
        if self._counted is not None:
            self._counted.phase = phase
            self._counted.beat()
        elif phase is None or now - self._worked < self._quiet:
            return
        elif self._line is not None:
            self._line.show(f"{phase}, {clock(now - self._began)}")
        elif now - self._last >= (self._quiet if phase.name != self._printed else self._again):
            repeated = f", {clock(now - self._began)} elapsed" if phase.name == self._printed else ""
            self._last, self._printed = now, phase.name
            say(f"{phase}{repeated}")


def phases() -> Phases:
    """Return the phases of the command that runs; outside a command nobody would end them, and they are not shown."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context else None
    return found["phases"] if isinstance(found, dict) and "phases" in found else Phases(shown=False)


class _Line:
    """A line on a terminal. Anything that is written to stdout or stderr meanwhile replaces it."""

    def __init__(self) -> None:
        self._shown = ""
        self._lock = threading.RLock()
        self._stderr, self._stdout = sys.stderr, sys.stdout
        self._above: list[tuple[str, _Above]] = [("stderr", _Above(self._stderr, self))]
        if self._stdout.isatty():
            self._above.append(("stdout", _Above(self._stdout, self)))
        for name, stream in self._above:
            setattr(sys, name, stream)

    def show(self, text: str) -> None:
        """Write the line in place of the last one, as far as the terminal is wide."""
        with self._lock:
            text = fitted(printable(text), _columns(self._stderr) - 1)
            if text != self._shown:
                unescaped(self._stderr).write(CLEAR + text)
                self._stderr.flush()
                self._shown = text

    def clear(self) -> None:
        """Remove the line from the terminal until it is shown again."""
        with self._lock:
            if self._shown:
                self._shown = ""
                unescaped(self._stderr).write(CLEAR)
                self._stderr.flush()

    def close(self) -> None:
        """Remove the line, and put the streams back."""
        with contextlib.suppress(OSError, ValueError):
            self.clear()
        for name, stream in self._above:
            if getattr(sys, name) is stream:
                setattr(sys, name, self._stderr if name == "stderr" else self._stdout)


class _Above:
    """A stream of a terminal that clears the line before it writes."""

    def __init__(self, under: TextIO, line: _Line) -> None:
        self._under, self._line = under, line

    def write(self, text: str) -> int:
        """Write `text` in place of the line."""
        if text:
            self._line.clear()
        return self._under.write(text)

    def writelines(self, lines: Any) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def _columns(stream: TextIO) -> int:
    """Return the width of a terminal; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def fitted(text: str, columns: int) -> str:
    """Return the start of `text` that takes no more than so many columns of a terminal."""
    used = 0
    for place, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:place]
    return text
