"""One file made durable, whole or not at all, never in place of another.

On a local file system: a temporary name in the same folder, fsync, link without replacing, fsync of
the folder. On an object store: one PUT of a name nobody else uses, unless the name is there already.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from pyarrow import fs as pafs

from storage.errors import StoreError

# File systems without hard links (some FUSE and network mounts) answer with one of these.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def commit(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Make `content` durable under `path`; a file that is there already stays as it is.

    Raises StoreError when it cannot be written.
    """
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            _commit_local(Path(path), content)
        elif filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def _commit_local(path: Path, content: bytes) -> None:
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


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
    finally:
        os.close(handle)
