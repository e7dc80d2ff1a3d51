"""Files that users name: opened only where they are regular files, and read up to a limit.

Every user file is opened by `open_regular` and named in messages by `storage.printable.printable`.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

from storage.printable import printable


class NotRegular(OSError):
    """A path that leads to a folder, FIFO, socket or device."""


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read bytes, after links are followed, only if the file is regular.

    A FIFO would block and a device may never end. Raises NotRegular, or another OSError.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise NotRegular(f"{printable(path)} is {_KINDS.get(kind, 'a special file')}; only a regular file can be read")
    # The flag keeps open() from blocking where a FIFO replaces the file after the check.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def mode_of(path: Path) -> int:
    """Return the mode of what a path leads to, for `stat.S_ISDIR` and the like; 0 where it leads to nothing, also for a
    name that no file can have."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


class TooLarge(OSError):
    """A file with more bytes than are allowed."""


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises TooLarge, NotRegular or another OSError."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLarge(f"{printable(path)} has more than {limit} bytes")
    return content


def read_stream(path: Path, limit: int) -> bytes:
    """Return the content of a file, a pipe (`<(command)` of a shell) or a device; of one with more than `limit` bytes
    the first `limit` + 1.

    A FIFO that no process writes to is empty, and does not block. Raises OSError.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        return file.read(limit + 1)


def read_standard_input(limit: int) -> bytes:
    """Return what stands in standard input; where that is more than `limit` bytes, the first `limit` + 1. Raises
    OSError where it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    binary = getattr(sys.stdin, "buffer", None)
    return binary.read(limit + 1) if binary else sys.stdin.read(limit + 1).encode(errors="surrogateescape")
