"""Which machine this is, and whether a process of it still lives."""

from __future__ import annotations

import hashlib
import socket
from functools import cache
from pathlib import Path


@cache
def machine() -> str:
    """Eight hex digits for where process ids count: this host since it was started, this container."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if path.endswith("pid") else Path(path).read_text())
        except OSError:
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def process_started(pid: int) -> float:
    """When a process of this machine was started, in seconds since the epoch."""
    import psutil

    return psutil.Process(pid).create_time()


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether a process of this machine runs, and is the one that was `started` then."""
    import psutil

    try:
        process = psutil.Process(pid)
        there = process.status() != psutil.STATUS_ZOMBIE
        return there and (started is None or abs(process.create_time() - started) < 1)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
