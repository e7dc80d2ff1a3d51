"""What a node of a cluster shows of itself. Sent there by value, so that it also runs where prunesweep cannot.

Only the standard library is imported at the top, for the same reason.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torchvision", "ray", "torch-pruning", "accelerate", "duckdb", "pyarrow")


def look(start: str, store: str, data_root: str, mark: str | None) -> dict[str, Any]:
    """Versions, the store, the data sets and the free disk as this process sees them.

    `start` is the module that claims our rooms; `mark` a note in the store's scratch that the driver has written.
    Sizes are in bytes. `problem` is why prunesweep cannot be imported, else None.
    """
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": versions(),
        "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
    }
    try:
        importlib.import_module(start).claim_rooms()
        ours = importlib.import_module("orchestrator.checks")
        datasets = importlib.import_module("workers.datasets")
    except Exception as error:  # whatever an import does: that is what is asked for
        return {**found, "problem": f"{type(error).__name__}: {error}"}
    there = [name for name, one in datasets.DATASETS.items() if one.files and not one.missing(data_root)]
    return {**found, "problem": None, "code": ours.code(), "data": there, **_store(store, mark)}


def versions() -> dict[str, str | None]:
    """Of Python and of what prunesweep is built on; None of what is missing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _store(location: str, mark: str | None) -> dict[str, Any]:
    """Whether the store can be written, and whether it is the one that the driver has written its mark to."""
    opened = importlib.import_module("storage.store").Store
    broken = importlib.import_module("storage.errors").StoreError
    try:
        store = opened(location)
        store.check_writable()
        same = mark is None or store.scratch.noted(mark) is not None
        free = free_at(Path(store.root)) if store.is_local else None
    except broken as error:
        return {"store": str(error), "same": None, "disk": None}
    return {"store": None, "same": same, "disk": free}


def free_at(folder: Path) -> int:
    """Free bytes where a folder is, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
