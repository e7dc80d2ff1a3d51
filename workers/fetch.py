"""Data sets that can be downloaded, once per data root: who comes first downloads, others wait."""

from __future__ import annotations

import fcntl
import shutil
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workers.datasets import find_dataset, missing_message

if TYPE_CHECKING:
    from workers.datasets import Dataset

LOCK = ".prunesweep-fetch.lock"

LEFT_SECONDS = 86400.0
"""A download's folder that is older was left by a process that was killed."""

_PREFIX = ".prunesweep-fetch-"
_DAMAGED = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What unpacking raises for an archive that did not come whole, besides OSError and RuntimeError."""


@dataclass(frozen=True)
class Fetched:
    """How it went: whether anything was downloaded, and why a data set is still not there."""

    downloaded: bool = False
    problem: str | None = None


def fetch(name: str, data_root: str | Path, download: Callable[[Dataset, Path], None] | None = None) -> Fetched:
    """See to it that a data set's files are under `data_root`, downloading them where they can be.

    They come into a folder beside it and are then renamed one by one: a file that is there is whole.
    """
    try:
        dataset = find_dataset(name, data_root)
    except ValueError as error:
        return Fetched(problem=str(error))
    root = Path(data_root)
    if not dataset.missing(root):
        return Fetched()
    if dataset.source is None:
        return Fetched(problem=missing_message(name, data_root))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / LOCK):
            if not dataset.missing(root):  # somebody was here meanwhile
                return Fetched()
            _download(dataset, root, download or by_torchvision)
    except (OSError, RuntimeError, *_DAMAGED) as error:
        said = str(error).strip().splitlines()
        return Fetched(problem=said[-1] if said else type(error).__name__)
    return Fetched(downloaded=True)


def by_torchvision(dataset: Dataset, folder: Path) -> None:
    """Download a data set to a folder, in torchvision's layout."""
    from torchvision import datasets

    for train in (True, False):
        getattr(datasets, str(dataset.source))(str(folder), train=train, download=True)


def _download(dataset: Dataset, root: Path, download: Callable[[Dataset, Path], None]) -> None:
    for left in root.glob(f"{_PREFIX}*"):
        if time.time() - left.stat().st_mtime > LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    try:
        download(dataset, folder)
        for name in dataset.missing(root):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(root / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While this lasts no other process of this machine, and on most shared disks none at all, is here."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
