"""One file made durable, whole or not at all.

On a local file system: a temporary name in the same folder, fsync, link without replacing (or rename,
to replace), fsync of the folder. On an object store: one PUT, or one upload in parts. What was cut off leaves at most a
temporary file, which says who wrote it, so that `sweep_temporaries` can tell when nobody needs it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

from pyarrow import fs as pafs

from storage.errors import StoreError
from storage.machine import is_alive, machine
from storage.printable import printable
from storage.remote import Budget, Unanswered, one_line, within

T = TypeVar("T")

RESERVE_BYTES = 64 * 2**20
"""What is left free on a store's disk: below it nothing more is committed."""

ABANDONED_SECONDS = 3600.0
"""A temporary file of another machine that has not changed for this long belongs to nobody."""

_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}\.tmp")

RETRIES = 5
RETRY_SECONDS = 0.5
"""An object store is asked this often; the first wait, doubled each time."""

_FINAL = (FileNotFoundError, Unanswered)
"""Errors after which an object store is not asked again."""

# File systems without hard links (some FUSE and network mounts) answer with one of these.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

# Nor can every folder be synced: it is as durable there as it gets.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}


def commit(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Make `content` durable under `path`; a file that is there already stays as it is.

    Raises StoreError when it cannot be written.
    """
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            _commit_local(Path(path), content, replace=False)
        elif patiently(lambda: filesystem.get_file_info(path)).type == pafs.FileType.NotFound:
            patiently(lambda: _put(filesystem, path, content), Budget(len(content)))
    except OSError as error:
        raise StoreError(f"cannot write {printable(path)}: {one_line(error)}") from error


def replace(filesystem: pafs.FileSystem, path: str, content: bytes, *, durable: bool = True) -> None:
    """Write `content` under `path`, in place of what is there: old or new, never a mixture.

    Not `durable`, it may be gone after a power failure. Raises StoreError when it cannot be written.
    """
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            _commit_local(Path(path), content, replace=True, durable=durable)
        else:
            patiently(lambda: _put(filesystem, path, content), Budget(len(content)))
    except OSError as error:
        raise StoreError(f"cannot write {printable(path)}: {one_line(error)}") from error


def again(work: Callable[[], T], error: type[Exception], times: int = 20) -> T:
    """`work`, tried again at once when it raises `error`. Raises the last one."""
    for _ in range(times - 1):
        with suppress(error):
            return work()
    return work()


def patiently(work: Callable[[], T], budget: Budget | None = None) -> T:
    """`work` on an object store, tried again when it fails: it may be busy, or the answer got lost.

    Asking twice does no harm, since a name stands for one content. All tries together are held to the time in `budget`.
    Raises the last OSError.
    """
    import tenacity

    limit = budget or Budget()
    before: list[OSError] = []

    def attempt() -> T:
        try:
            return within(limit, work)
        except Unanswered as error:
            raise before[0] if before else error from None  # what the store answered before says more
        except OSError as error:
            before.append(error)
            raise

    return tenacity.Retrying(
        stop=lambda state: state.attempt_number >= RETRIES or limit.left() <= state.upcoming_sleep,
        wait=tenacity.wait_random_exponential(RETRY_SECONDS, max=30),
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, _FINAL)),
        reraise=True,
    )(attempt)


def _put(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def _commit_local(path: Path, content: bytes, *, replace: bool, durable: bool = True) -> None:
    _make_folder(path.parent)
    _check_room(path.parent, len(content))
    temporary = path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def _check_room(folder: Path, size: int) -> None:
    """Stop before the disk is full: what else runs there needs room to end well."""
    left = room(folder)
    if left < size:
        kept = RESERVE_BYTES // 2**20
        raise StoreError(f"the disk of {folder} is full ({kept} MiB are kept free): make room and resume")


def room(folder: str | Path) -> int:
    """Bytes that may be written below a local folder, which need not be there yet."""
    at = Path(folder)
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free - RESERVE_BYTES


def _make_folder(folder: Path) -> None:
    """A folder, and those above it that are missing, each durable in its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not path.exists():
            os.rename(temporary, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def temporaries(root: str, folders: Iterable[str]) -> dict[str, int]:
    """Return the abandoned temporary files below some folders of a store, with their sizes in bytes."""
    found: dict[str, int] = {}
    for at, _, names in chain.from_iterable(os.walk(Path(root, folder)) for folder in folders):
        for path in (Path(at, name) for name in names):
            with suppress(OSError):
                if _is_abandoned(path):
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def sweep_temporaries(root: str, folders: Iterable[str]) -> list[str]:
    """Remove what writers that are gone left below local `folders` of `root`; return the names.

    What cannot be looked at or removed stays: it does no harm, and the next sweep tries again.
    """
    gone: list[str] = []
    for at, _, names in chain.from_iterable(os.walk(Path(root, folder)) for folder in folders):
        for path in (Path(at, name) for name in names):
            with suppress(OSError):
                if _is_abandoned(path):
                    path.unlink(missing_ok=True)
                    gone.append(str(path.relative_to(root)))
    return gone


def _is_abandoned(path: Path) -> bool:
    """Whether this is a temporary file of ours whose writer is gone: its process here, or long without a change."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    if found["machine"] == machine() and not is_alive(int(found["pid"])):
        return True
    return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
