"""The end of an embedded Ray's processes when their driver is gone. Run as a script, this file needs Python alone.

Ray's agents watch their raylet, then report its death to the control store, which has died with the driver: they wait
for it a minute. Their process titles hide the session, so that files they have open tell whose they are.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT_SECONDS = 20.0
"""How long processes that are still starting others are looked for."""

PAUSE_SECONDS = 0.3
DONE = "done"


def sessions_of(driver: int) -> str:
    """Return a pattern of the folders of the Ray sessions that a process has started."""
    return rf"/session_\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_{driver}(?!\d)"


def end_processes(pattern: str, spared: Iterable[int] = ()) -> None:
    """Kill this user's processes that use a folder matching `pattern`, and those that they start meanwhile."""
    spared, give_up, quiet = {os.getpid(), *spared}, time.monotonic() + LIMIT_SECONDS, 0
    while quiet < 2 and time.monotonic() < give_up:
        found = [pid for pid in processes(pattern) if pid not in spared]
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(PAUSE_SECONDS)


def processes(pattern: str) -> list[int]:
    """Return the ids of processes that name a folder matching `pattern` in their command or have a file of it open."""
    wanted = re.compile(pattern)
    try:
        there = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]
    except OSError:  # not on Linux
        return []
    return [pid for pid in there if any(wanted.search(text) for text in _texts(pid))]


def _texts(pid: int) -> Iterator[str]:
    with suppress(OSError):
        yield Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield str(descriptor.readlink())


@contextmanager
def guarded() -> Iterator[None]:
    """Have Ray sessions that this process starts end with it, however it ends."""
    # A group of its own: what kills the driver's group leaves it.
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    assert guardian.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):
            guardian.stdin.write(DONE)
            guardian.stdin.close()
        guardian.wait()


def main(driver: int) -> None:
    """Wait until the driver is done, or gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while not select.select([sys.stdin], [], [], 1.0)[0] and os.getppid() == driver:
        pass  # a forked child of the driver may hold the pipe open
    if os.getppid() != driver or sys.stdin.read() != DONE:
        end_processes(sessions_of(driver), {driver})


if __name__ == "__main__":
    main(int(sys.argv[1]))
